//! The broker: the one process of a VM that may still open things.
//!
//! **Job.** It is split off before anything else is opened, by re-executing this binary, so that it shares no address-space
//! layout with the control process. It takes one [`Policy`](ipc::control::Policy), and from then on opens what the policy
//! lists, starts the device processes it lists, watches them, and cleans up behind the VM: sockets, the pid file, the
//! terminal's mode, and every device process, however the control process ended.
//!
//! **Who is not trusted.** The control process, once the guest runs: requests name policy entries by number only (see
//! [`ipc::control`]). Device processes: their log lines are cut, cleaned and rate limited. The broker maps no guest memory
//! and holds no KVM descriptor.
//!
//! **Why this way.** A control process without the right to open, connect or fork cannot lose it, and hot-plug works in the
//! locked-down state because somebody else still can.
//!
//! | file | job |
//! |---|---|
//! | `client.rs` | the control process's end: start the broker, ask, take what it tells unasked |
//! | `process.rs` | the broker's own loop |
//! | `log_target.rs` | the log on standard error, which no write waits for |
//! | `open.rs` | one function per kind of grant |
//! | `added.rs` | back ends that are added while the guest runs |
//! | `devices.rs` | device processes: start, log lines, end |
//! | `inspect.rs` | what confines each process of the VM, read from `/proc` |
//! | `keeper.rs` | which process serves a device that has another one keep its state |
//! | `rights.rs` | what it keeps of its caller's rights |
//! | `snapshot.rs` | where a snapshot is written, and how it gets its name |
//! | `cleanup.rs` | what must be gone when the VM is |

mod added;
mod cleanup;
mod client;
mod devices;
mod inspect;
mod keeper;
mod log_target;
mod open;
mod process;
mod resize;
mod rights;
mod snapshot;

pub(crate) use added::NO_VHOST;
pub use client::{
    Client, ClientError, DeviceExit, Inspection, Notice, SnapshotAnswer, SnapshotFiles,
};
pub use process::{is_broker, run};
pub(crate) use resize::check as check_resize;
