//! # `control`: messages between the control process and its broker
//!
//! The first byte says which direction. What decodes has no second encoding and fits in a packet; a policy is also looked
//! through as the broker does.

use ipc::channel::Channel;
use ipc::codec::{decode, encode};
use ipc::control::{Reply, Request, is_snapshot_name};
use ipc::limits::MAX_MESSAGE;
use nix::sys::socket::{MsgFlags, send};
use std::os::fd::AsRawFd;

/// One input.
pub fn run(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    match kind % 3 {
        0 => {
            if let Ok(request) = decode::<Request>(data) {
                assert_eq!(encode(&request).expect("it was decoded"), data);
                // What the broker may be asked after the policy brings nothing that could be opened, but for names beneath
                // folders that the policy granted.
                match &request {
                    Request::SetPolicy(_) => {}
                    Request::SnapshotBegin { name, .. } => {
                        // The broker's own check: one component.
                        let name = name.as_deref().unwrap_or("x");
                        assert!(!is_snapshot_name(name) || !name.contains(['/', '\0']));
                    }
                    Request::DumpFile { name, .. } => {
                        assert!(!is_snapshot_name(name) || !name.contains(['/', '\0']));
                    }
                    // Looked up beneath a grant, which needs the folders: the broker's own tests.
                    Request::Add { .. } | Request::Replace { .. } => {}
                    Request::Plug { spec, .. } => {
                        // The broker's own check of numbers.
                        let _ = spec.check();
                    }
                    // A device, and a size or features.
                    Request::Resize { .. } | Request::StandIn { .. } => assert_eq!(data.len(), 16),
                    // A number, and a yes or no.
                    _ => assert!(data.len() <= 9),
                }
                // No first input has two of them.
                crate::planted!(matches!(&request, Request::SetPolicy(policy)
                        if policy.restore_terminal && (policy.pidfile.is_some() || policy.daemonize)));
            }
        }
        1 => {
            if let Ok(reply) = decode::<Reply>(data) {
                assert_eq!(encode(&reply).expect("it was decoded"), data);
            }
        }
        // Over the channel, with nothing else in the packet.
        _ => {
            let (ours, theirs) = Channel::pair().expect("socketpair");
            if send(ours.as_fd_raw(), data, MsgFlags::MSG_DONTWAIT).is_err() {
                return;
            }
            drop(ours);
            let received = theirs.receive::<Request>();
            if data.is_empty() || data.len() > MAX_MESSAGE {
                assert!(received.is_err());
            }
            if let Ok((request, fds)) = received {
                assert!(fds.is_empty());
                assert_eq!(encode(&request).expect("it was decoded"), data);
            }
        }
    }
}

trait Raw {
    fn as_fd_raw(&self) -> i32;
}

impl Raw for Channel {
    fn as_fd_raw(&self) -> i32 {
        use std::os::fd::AsFd;
        self.as_fd().as_raw_fd()
    }
}
