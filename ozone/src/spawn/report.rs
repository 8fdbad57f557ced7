//! What the child tells the parent: fixed-size records, one per packet.

use crate::layer::{Layer, LayerReport, State};
use nix::errno::Errno;
use std::fmt;

/// A step on the way to a running device process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Step {
    /// The caller asked for the process.
    Begin,
    /// The parent has forked.
    Clone,
    /// The parent has written the user map and released the child.
    Released,
    /// The child runs, with a clean signal mask.
    Entered,
    /// The processors that it runs on, if they were given.
    Affinity,
    /// A session and process group of its own, without the caller's keys.
    Session,
    /// Mount, network, ipc, uts and cgroup namespaces.
    Namespaces,
    /// The child's own half of the user map.
    UserMap,
    /// The empty root.
    Root,
    /// The parent's half of the user map.
    Handshake,
    /// User, group, supplementary groups.
    Identity,
    /// Descriptors on their numbers.
    Descriptors,
    /// Resource limits.
    Limits,
    /// Capability sets.
    Capabilities,
    /// `no_new_privs`.
    NoNewPrivileges,
    /// Death with the parent.
    ParentDeath,
    /// execveat.
    Exec,
}

impl Step {
    const ALL: [Self; 17] = [
        Self::Begin,
        Self::Clone,
        Self::Released,
        Self::Entered,
        Self::Affinity,
        Self::Session,
        Self::Namespaces,
        Self::UserMap,
        Self::Root,
        Self::Handshake,
        Self::Identity,
        Self::Descriptors,
        Self::Limits,
        Self::Capabilities,
        Self::NoNewPrivileges,
        Self::ParentDeath,
        Self::Exec,
    ];
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Begin => "begin",
            Self::Clone => "clone",
            Self::Released => "release",
            Self::Entered => "signal mask",
            Self::Affinity => "processors",
            Self::Session => "session",
            Self::Namespaces => "namespaces",
            Self::UserMap => "own user map",
            Self::Root => "root",
            Self::Handshake => "waiting for the user map",
            Self::Identity => "user and groups",
            Self::Descriptors => "descriptors",
            Self::Limits => "resource limits",
            Self::Capabilities => "capabilities",
            Self::NoNewPrivileges => "no_new_privs",
            Self::ParentDeath => "death with the parent",
            Self::Exec => "exec",
        })
    }
}

/// When a step was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// The step.
    pub step: Step,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub at: u64,
}

/// Length of a record: kind, step or layer, two bytes of nothing, error number, time.
pub(super) const SIZE: usize = 16;

#[derive(Clone, Copy)]
pub(super) enum Report {
    /// A step is done, for traces.
    Done(Step, u64),
    /// A layer is missing and the child went on.
    Missing(Layer, Errno),
    /// A layer is there in part and the child went on.
    Partly(Layer),
    /// A step failed and the child ended.
    Failed(Step, Errno),
    /// The next thing is exec; then the stream ends, unless `Failed` follows.
    Executing,
}

/// Layers that a child may report on, in the order of a jail's report.
const REPORTED: [Layer; 12] = [
    Layer::Session,
    Layer::MountNamespace,
    Layer::NetworkNamespace,
    Layer::IpcNamespace,
    Layer::UtsNamespace,
    Layer::CgroupNamespace,
    Layer::EmptyRoot,
    Layer::Identity,
    Layer::Descriptors,
    Layer::Limits,
    Layer::Capabilities,
    Layer::ParentDeath,
];

impl Report {
    pub(super) fn encode(&self) -> [u8; SIZE] {
        let (kind, subject, errno, time) = match *self {
            Self::Done(step, at) => (0, step as u8, 0, at),
            Self::Missing(layer, errno) => (1, index(layer), errno as i32, 0),
            Self::Partly(layer) => (2, index(layer), 0, 0),
            Self::Failed(step, errno) => (3, step as u8, errno as i32, 0),
            Self::Executing => (4, 0, 0, 0),
        };
        let mut bytes = [0; SIZE];
        bytes[0] = kind;
        bytes[1] = subject;
        bytes[4..8].copy_from_slice(&errno.to_ne_bytes());
        bytes[8..].copy_from_slice(&time.to_ne_bytes());
        bytes
    }

    /// `None` for anything that is not a record, the end of the stream above all.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; SIZE] = bytes.try_into().ok()?;
        let step = || Step::ALL.get(usize::from(bytes[1])).copied();
        let layer = || REPORTED.get(usize::from(bytes[1])).copied();
        let errno = Errno::from_raw(i32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]));
        let mut time = [0; 8];
        time.copy_from_slice(&bytes[8..]);
        Some(match bytes[0] {
            0 => Self::Done(step()?, u64::from_ne_bytes(time)),
            1 => Self::Missing(layer()?, errno),
            2 => Self::Partly(layer()?),
            3 => Self::Failed(step()?, errno),
            4 => Self::Executing,
            _ => return None,
        })
    }
}

fn index(layer: Layer) -> u8 {
    REPORTED
        .iter()
        .position(|l| *l == layer)
        .map_or(u8::MAX, |i| i as u8)
}

/// What is missing of a layer that is only partly there.
pub(super) fn partly(layer: Layer) -> &'static str {
    match layer {
        Layer::Identity => "supplementary groups cannot be given up without privilege",
        Layer::Capabilities => "the bounding set cannot be emptied without CAP_SETPCAP",
        Layer::UtsNamespace => "the host's name is still visible",
        Layer::Session => "the user's quota of keys is used up: the caller's are within reach",
        _ => "incomplete",
    }
}

/// What a child has reported so far.
#[derive(Default)]
pub(super) struct Given {
    pub(super) missing: Vec<(Layer, State)>,
    pub(super) executing: bool,
}

impl Given {
    /// The state of every layer that the child is in charge of: what it did not complain about
    /// is on, since any other failure ends it.
    pub(super) fn layers(self) -> Vec<LayerReport> {
        let all = REPORTED.into_iter().chain([Layer::NoNewPrivileges]);
        all.map(|layer| {
            let state = self
                .missing
                .iter()
                .find(|(l, _)| *l == layer)
                .map(|(_, s)| s.clone());
            LayerReport {
                layer,
                state: state.unwrap_or(State::On),
            }
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_trip() {
        for (i, step) in Step::ALL.into_iter().enumerate() {
            assert_eq!(
                step as usize, i,
                "{step:?} is at the wrong place in the list"
            );
            match Report::decode(&Report::Failed(step, Errno::EPERM).encode()) {
                Some(Report::Failed(s, Errno::EPERM)) => assert_eq!(s, step),
                _ => panic!("{step:?} got lost"),
            }
        }
        for layer in REPORTED {
            match Report::decode(&Report::Missing(layer, Errno::ENOSPC).encode()) {
                Some(Report::Missing(l, Errno::ENOSPC)) => assert_eq!(l, layer),
                _ => panic!("{layer:?} got lost"),
            }
        }
        assert!(matches!(
            Report::decode(&Report::Executing.encode()),
            Some(Report::Executing)
        ));
        assert!(Report::decode(&[]).is_none());
        assert!(Report::decode(&[9; SIZE]).is_none());
    }
}
