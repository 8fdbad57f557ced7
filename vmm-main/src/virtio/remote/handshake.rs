//! The handshake with a device process.
//!
//! **Job.** From a socket to a [`RemoteDevice`]: features, protocol features, number of queues, configuration space. **Who is not trusted**: whoever
//! answers, or does not; all of it has one deadline.
//! **Why this way.** In steps that do not wait for each other, see the parent module, and for a caller that may not wait at all, [`Handshake::advance`].

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use ipc::control::DeviceGrant;
use ipc::counters::BlockCounters;
use ipc::spec::DeviceSpec;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures, VhostUserVirtioFeatures};

use super::config::post_get_config;
use super::offer::{
    ConfigFrom, Expected, F_VERSION_1, OFFERABLE, WELCOME, WITH_WINDOW, fs_config, net_config,
};
use super::{RemoteDevice, RemoteError, number};
use crate::virtio::link::{Link, LinkError};

/// A handshake under way.
#[derive(Debug)]
pub struct Handshake {
    link: Link,
    expected: Expected,
    /// Features and protocol features, once the second half has been sent.
    negotiated: Option<(u64, VhostUserProtocolFeatures)>,
    /// Answers to the second half, if they came in [`Handshake::advance`].
    answers: Option<Vec<Vec<u8>>>,
}

impl Handshake {
    /// Sends the first half of the handshake; does not wait, not even for the process to start.
    pub fn begin(socket: UnixStream, spec: &DeviceSpec) -> Result<Self, RemoteError> {
        Self::begin_with(socket, spec, ConfigFrom::Own)
    }

    /// As [`Handshake::begin`], with a process that this VM started or with somebody else's, as `grant` says.
    pub fn begin_for(socket: UnixStream, grant: &DeviceGrant) -> Result<Self, RemoteError> {
        let config = match &grant.spec {
            DeviceSpec::Fs(spec) if grant.is_foreign() => ConfigFrom::Fixed(fs_config(spec)),
            DeviceSpec::Block(_) if grant.is_foreign() => ConfigFrom::Disk,
            DeviceSpec::Net(spec) if grant.is_foreign() => ConfigFrom::Card(net_config(spec)),
            _ => ConfigFrom::Own,
        };
        Self::begin_with(socket, &grant.spec, config)
    }

    fn begin_with(
        socket: UnixStream,
        spec: &DeviceSpec,
        config: ConfigFrom,
    ) -> Result<Self, RemoteError> {
        let mut handshake = Self {
            link: Link::new(socket),
            expected: Expected {
                id: spec.id().to_owned(),
                virtio_id: spec.virtio_id(),
                num_queues: spec.num_queues(),
                queue_size: spec.queue_size(),
                window: match spec {
                    DeviceSpec::Fs(spec) => spec.window,
                    _ => 0,
                },
                config,
            },
            negotiated: None,
            answers: None,
        };
        let link = &mut handshake.link;
        link.start_first_clock();
        let sent = link
            .post(FrontendReq::SET_OWNER, &[], &[])
            .and_then(|()| link.post(FrontendReq::GET_FEATURES, &[], &[]))
            .and_then(|()| link.post(FrontendReq::GET_PROTOCOL_FEATURES, &[], &[]))
            .and_then(|()| link.flush());
        handshake.check(sent)?;
        Ok(handshake)
    }

    /// Waits for the features and sends the second half; does not wait for its answers. A second call has no effect.
    pub fn negotiate(&mut self) -> Result<(), RemoteError> {
        if self.negotiated.is_some() {
            return Ok(());
        }
        self.link.start_first_clock();
        let values = self.link.finish();
        let values = self.check(values)?;
        self.accept(&values)
    }

    /// Goes as far as is possible without waiting, for a caller that is told when the [socket](AsFd) is readable. `true`
    /// when all answers are there, so that [`Handshake::finish`] will not wait. A process that is not as far by
    /// [`Handshake::deadline`] is given up by the next call.
    pub fn advance(&mut self) -> Result<bool, RemoteError> {
        if self.negotiated.is_none() {
            let values = self.link.try_finish();
            match self.check(values)? {
                Some(values) => self.accept(&values)?,
                None => return Ok(false),
            }
        }
        if self.answers.is_none() {
            let values = self.link.try_finish();
            self.answers = self.check(values)?;
        }
        Ok(self.answers.is_some())
    }

    /// When the process's time is over.
    pub const fn deadline(&self) -> Instant {
        self.link.deadline()
    }

    /// Checks the features and sends the second half.
    fn accept(&mut self, values: &[Vec<u8>]) -> Result<(), RemoteError> {
        let (features, protocol) = (number(values, 0), number(values, 1));
        let need = F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if features & need != need {
            return Err(self.lacks("virtio", features, need));
        }
        let protocol = VhostUserProtocolFeatures::from_bits_truncate(protocol);
        let (mut required, config) = (self.expected.config.required(), self.expected.config.len());
        let has_window = self.expected.window != 0;
        if has_window {
            required |= WITH_WINDOW;
        }
        if !protocol.contains(required) {
            return Err(self.lacks("vhost-user", protocol.bits(), required.bits()));
        }
        let mut welcome = WELCOME;
        if self.expected.config.is_own() {
            // Who else has it watches for less than we have to.
            welcome |= VhostUserProtocolFeatures::PAGEFAULT;
        }
        let protocol = protocol & (required | welcome);
        let link = &mut self.link;
        link.start_clock();
        let sent = link
            .post(
                FrontendReq::SET_PROTOCOL_FEATURES,
                &[&protocol.bits().to_le_bytes()],
                &[],
            )
            .and_then(|()| {
                link.enable_acks();
                link.post(FrontendReq::GET_QUEUE_NUM, &[], &[])
            })
            .and_then(|()| match config {
                0 => Ok(()),
                len => post_get_config(link, len),
            })
            .and_then(|()| match has_window {
                true => link.post(FrontendReq::GET_SHMEM_CONFIG, &[], &[]),
                false => Ok(()),
            })
            .and_then(|()| link.flush());
        self.check(sent)?;
        self.negotiated = Some((features, protocol));
        Ok(())
    }

    /// Waits for the rest of the answers and checks them.
    pub fn finish(mut self) -> Result<RemoteDevice, RemoteError> {
        self.negotiate()?;
        let values = match self.answers.take() {
            Some(values) => values,
            None => {
                self.link.start_clock();
                let values = self.link.finish();
                self.check(values)?
            }
        };
        let id = self.expected.id.clone();
        let queues = number(&values, 0);
        let from = std::mem::replace(&mut self.expected.config, ConfigFrom::Own);
        let want = from.queues(self.expected.num_queues);
        if !from.is_own() && queues < u64::from(want) {
            return Err(match from {
                ConfigFrom::Disk => RemoteError::FewDiskQueues {
                    id,
                    got: queues,
                    want,
                },
                _ => RemoteError::FewQueues {
                    id,
                    got: queues,
                    want,
                },
            });
        }
        if from.is_own() && queues != u64::from(self.expected.num_queues) {
            return Err(RemoteError::Queues {
                id,
                got: queues,
                want: self.expected.num_queues,
            });
        }
        let config = from.space(&id, values.get(1), self.expected.num_queues)?;
        if self.expected.window != 0 {
            check_window(&id, values.last(), self.expected.window)?;
        }
        // `negotiate` succeeded, so this is there; an absent value would offer nothing to the guest.
        let (features, protocol) = self
            .negotiated
            .unwrap_or((0, VhostUserProtocolFeatures::empty()));
        Ok(RemoteDevice {
            id,
            virtio_id: self.expected.virtio_id,
            num_queues: self.expected.num_queues,
            queue_size: self.expected.queue_size,
            features: from.features(features & OFFERABLE),
            protocol,
            config,
            config_from: from,
            inflight: None,
            processes: 0,
            past: Vec::new(),
            counted: BlockCounters::default(),
            restored: None,
            active: Vec::new(),
            window: None,
            exposed: false,
            failed: false,
            link_down: false,
            sharing: None,
            faults: None,
            ordered: None,
            link: Some(self.link),
        })
    }

    fn check<T>(&self, result: Result<T, LinkError>) -> Result<T, RemoteError> {
        result.map_err(|source| RemoteError::Link {
            id: self.expected.id.clone(),
            source,
        })
    }

    fn lacks(&self, kind: &'static str, got: u64, need: u64) -> RemoteError {
        RemoteError::Features {
            id: self.expected.id.clone(),
            kind,
            got,
            need,
        }
    }
}

/// Whether `reply`, to `GET_SHMEM_CONFIG`, tells one region of `want` bytes: the number of regions in 32 bits, as many of padding,
/// then the bytes of each of 256 (vhost-user, "VIRTIO Shared Memory Region configuration").
fn check_window(id: &str, reply: Option<&Vec<u8>>, want: u64) -> Result<(), RemoteError> {
    let reply = reply.map_or(&[][..], Vec::as_slice);
    let regions = reply
        .first_chunk::<4>()
        .map_or(0, |word| u32::from_le_bytes(*word));
    let first = reply
        .get(8..)
        .and_then(|sizes| sizes.first_chunk::<8>())
        .map_or(0, |word| u64::from_le_bytes(*word));
    if (regions, first) == (1, want) {
        return Ok(());
    }
    Err(RemoteError::WindowSize {
        id: id.to_owned(),
        got: first,
        want,
    })
}

impl AsFd for Handshake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}
