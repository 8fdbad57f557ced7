//! What may be added to a VM that runs.
//!
//! **Job.** The rule, fixed by the command line before the guest runs ([`Additions`]), and what the control process may then
//! ask for ([`Addition`]). Six ways lead to a back end:
//!
//! * an image or folder **beneath** a folder that the operator granted (`-hotplug images=DIR`, `-hotplug folders=DIR`). The
//!   broker holds these folders open from the start and resolves names below them without links;
//! * a tap that the operator granted by its name (`-hotplug tap=NAME`);
//! * a socket, where somebody else's daemon listens, **beneath** a folder that the operator granted (`-hotplug sockets=DIR`);
//! * a socket that the command line names as a chardev and nothing there uses;
//! * the kernel's vhost-net for the packets of such a tap, if the operator granted that (`-hotplug vhost=on`);
//! * a descriptor that comes along, which a client of QMP has opened. Whoever can pass one has had it already.
//!
//! **Who is not trusted.** The control process, once the guest runs. What it can reach by asking is what the operator
//! granted and what clients passed, no more: other paths have no spelling here that the broker would follow, a grant for
//! reading gives nothing that can be written, and descriptors are checked to be files or taps.
//!
//! **Why this way.** A manager that wants nothing granted passes descriptors; one that knows only file names, as
//! StratoVirt's do, works with one option more, and says by it how far a VM that was taken over may reach.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What the policy allows to be added.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Additions {
    /// Devices that may be there besides those of the policy: their numbers follow those.
    pub devices: u32,
    /// Where their back ends may come from, besides descriptors.
    pub grants: Vec<AdditionGrant>,
}

/// A place that back ends may come from: `-hotplug`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum AdditionGrant {
    /// `images=`: images anywhere beneath a folder.
    Images {
        /// The folder, absolute.
        path: PathBuf,
        /// Only for reading.
        readonly: bool,
    },
    /// `folders=`: folders anywhere beneath a folder, and that one itself.
    Folders {
        /// The folder, absolute.
        path: PathBuf,
        /// Only for reading.
        readonly: bool,
    },
    /// `tap=`: a tap device.
    Tap {
        /// Interface name, at most 15 bytes.
        ifname: String,
    },
    /// A `-chardev socket` that nothing of the command line uses: a daemon for a device to come. Their back ends are there from the
    /// start, and numbered from 0 in the order of their grants.
    Daemon {
        /// Id of the chardev.
        id: String,
        /// Where it listens.
        path: PathBuf,
    },
    /// `sockets=`: vhost-user daemons that listen anywhere beneath a folder.
    Sockets {
        /// The folder, absolute.
        path: PathBuf,
    },
    /// `vhost=on`: cards may have their packets passed by the host's kernel (vhost-net), whose device is opened for them.
    Vhost,
}

/// A back end that the control process asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Addition {
    /// An image by name.
    Image {
        /// Absolute; beneath the folder of a grant.
        path: PathBuf,
        /// `O_RDONLY` instead of `O_RDWR`.
        readonly: bool,
        /// `O_DIRECT`.
        direct: bool,
    },
    /// An image whose descriptor comes along.
    GivenImage {
        /// Only for reading.
        readonly: bool,
        /// `O_DIRECT` is set on it.
        direct: bool,
    },
    /// A tap by name.
    Tap {
        /// Interface name, as in a grant.
        ifname: String,
        /// Queue pairs.
        queues: u16,
    },
    /// A tap whose queues' descriptors come along, one a queue pair.
    GivenTap,
    /// A folder by name.
    Folder {
        /// Absolute; the folder of a grant or beneath it.
        path: PathBuf,
        /// Only for reading.
        readonly: bool,
    },
    /// A unix socket by name, where a vhost-user daemon listens. It is connected to when a device is made of it, and again when
    /// the daemon has left.
    Socket {
        /// Absolute; beneath the folder of a grant.
        path: PathBuf,
    },
    /// A socket whose descriptor comes along, connected to a vhost-user daemon. It serves one device once.
    GivenSocket,
}
