//! What crosses from QMP to the main thread, and how the answer gets back.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use ipc::counters::BlockCounters;
use ipc::disk::Snapshot;
use ipc::spec::block::IoStop;
use ipc::spec::vm::VmSpec;
use nix::sys::eventfd::EventFd;
use serde_json::{Value, json};
use thiserror::Error;

use super::schema::{self, Command};
use super::session::Info;
use crate::kvm::processor::Processor;

/// Class of a QMP error (QAPI `QapiErrorClass`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Anything without a class of its own.
    GenericError,
    /// No such command.
    CommandNotFound,
    /// The device is not in use.
    DeviceNotActive,
    /// No such device.
    DeviceNotFound,
    /// The host's KVM lacks something.
    KvmMissingCap,
}

impl ErrorClass {
    const fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::KvmMissingCap => "KVMMissingCap",
        }
    }
}

/// An error as a client sees it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{desc}")]
pub struct QmpError {
    /// Its class.
    pub class: ErrorClass,
    /// A sentence for people, without full stop.
    pub desc: String,
}

impl QmpError {
    /// An error without a class of its own.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::GenericError,
            desc: desc.into(),
        }
    }

    /// Device `id` does not exist.
    pub fn device_not_found(id: &str) -> Self {
        Self {
            class: ErrorClass::DeviceNotFound,
            desc: format!("Device '{id}' not found"),
        }
    }

    /// There is no device that this could be done to.
    pub fn device_not_active(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::DeviceNotActive,
            desc: desc.into(),
        }
    }

    pub(super) fn command_not_found(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::CommandNotFound,
            desc: desc.into(),
        }
    }
}

/// The answer to the request with this `id`, which is JSON already.
pub(super) fn answer(id: Option<&str>, result: &Result<Value, QmpError>) -> String {
    let mut line = match result {
        Ok(value) => json!({ "return": value }),
        Err(error) => json!({ "error": { "class": error.class.name(), "desc": error.desc } }),
    }
    .to_string();
    if let Some(id) = id {
        line.pop();
        line.push_str(",\"id\":");
        line.push_str(id);
        line.push('}');
    }
    line
}

/// What the QMP thread takes from the others.
#[derive(Debug)]
pub(super) enum Inbox {
    /// The answer that this client waits for.
    Answer {
        /// The client.
        client: u64,
        /// The message.
        message: String,
    },
    /// An event for all.
    Event(String),
    /// Send what is waiting and end.
    Finish,
}

/// The way into the QMP thread.
#[derive(Debug, Clone)]
pub(super) struct Outbox {
    pub(super) sender: Sender<Inbox>,
    pub(super) wake: Arc<EventFd>,
}

impl Outbox {
    pub(super) fn send(&self, message: Inbox) {
        if self.sender.send(message).is_ok() {
            wake(&self.wake);
        }
    }
}

/// Makes `eventfd` readable. It cannot block: the counter would have to be full of unread wakes.
pub(super) fn wake(eventfd: &EventFd) {
    let _ = nix::unistd::write(eventfd.as_fd(), &1_u64.to_ne_bytes());
}

/// The way back to one request, before it is known what the answer is made of.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(super) client: u64,
    pub(super) command: &'static Command,
    /// The request's id as JSON.
    pub(super) id: Option<String>,
    pub(super) info: Arc<Info>,
    pub(super) outbox: Outbox,
}

/// The way back to one request; each is answered once. One that is dropped answers with an error, so that the client
/// does not wait for ever.
pub struct Reply<T> {
    ticket: Option<Ticket>,
    shape: Option<Shape<T>>,
}

/// Gives an answer its form.
type Shape<T> = Box<dyn FnOnce(&Info, T) -> Result<Value, QmpError> + Send>;

impl<T> std::fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reply")
            .field("ticket", &self.ticket)
            .finish_non_exhaustive()
    }
}

impl<T: 'static> Reply<T> {
    pub(super) fn new(ticket: Ticket, shape: fn(&Info, T) -> Value) -> Self {
        Self::with(ticket, move |info, value| Ok(shape(info, value)))
    }

    /// One whose answer depends on more than the command's name, or may still be an error.
    pub(super) fn with(
        ticket: Ticket,
        shape: impl FnOnce(&Info, T) -> Result<Value, QmpError> + Send + 'static,
    ) -> Self {
        Self {
            ticket: Some(ticket),
            shape: Some(Box::new(shape)),
        }
    }

    /// Answers.
    pub fn send(mut self, result: Result<T, QmpError>) {
        if let (Some(ticket), Some(shape)) = (self.ticket.take(), self.shape.take()) {
            let result = result.and_then(|value| shape(&ticket.info, value));
            if let Ok(value) = &result {
                schema::assert_conforms(ticket.command.name, ticket.command.returns, value);
            }
            ticket.send(&result);
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            ticket.send(&Err(QmpError::generic(
                "The command was given up: the VM is going down",
            )));
        }
    }
}

impl Ticket {
    fn send(self, result: &Result<Value, QmpError>) {
        let message = answer(self.id.as_deref(), result);
        self.outbox.send(Inbox::Answer {
            client: self.client,
            message,
        });
    }
}

/// State of the VM (QAPI `RunState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Set up, and not started yet (`-S`).
    Prelaunch,
    /// vCPUs run.
    Running,
    /// Stopped by `stop`.
    Paused,
    /// Powered off, with `-no-shutdown`.
    Shutdown,
    /// The guest panicked.
    GuestPanicked,
    /// KVM or this program failed.
    InternalError,
    /// The host failed a disk whose `werror` or `rerror` stops the guest.
    IoError,
}

impl RunState {
    /// All names, for the schema.
    pub(super) const NAMES: [&str; 7] = [
        "prelaunch",
        "running",
        "paused",
        "shutdown",
        "guest-panicked",
        "internal-error",
        "io-error",
    ];

    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prelaunch => Self::NAMES[0],
            Self::Running => Self::NAMES[1],
            Self::Paused => Self::NAMES[2],
            Self::Shutdown => Self::NAMES[3],
            Self::GuestPanicked => Self::NAMES[4],
            Self::InternalError => Self::NAMES[5],
            Self::IoError => Self::NAMES[6],
        }
    }
}

/// How far a snapshot is (QAPI `MigrationStatus`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MigrationStatus {
    /// There was none.
    #[default]
    None,
    /// Its files are being made.
    Setup,
    /// Guest memory is being written.
    Active,
    /// It is on the disk.
    Completed,
    /// There is none.
    Failed,
    /// It was given up by `migrate_cancel`.
    Cancelled,
}

impl MigrationStatus {
    /// All names, for the schema.
    pub(super) const NAMES: [&str; 6] = [
        "none",
        "setup",
        "active",
        "completed",
        "failed",
        "cancelled",
    ];

    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => Self::NAMES[0],
            Self::Setup => Self::NAMES[1],
            Self::Active => Self::NAMES[2],
            Self::Completed => Self::NAMES[3],
            Self::Failed => Self::NAMES[4],
            Self::Cancelled => Self::NAMES[5],
        }
    }
}

/// The last snapshot that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Migration {
    /// How far it is.
    pub status: MigrationStatus,
    /// Bytes of guest memory; 0 as long as none has been written.
    pub total: u64,
    /// Bytes of it that are done.
    pub done: u64,
    /// Why it failed.
    pub error: Option<String>,
}

impl Migration {
    /// All `total` bytes are done.
    #[must_use]
    pub fn completed(total: u64) -> Self {
        Self {
            status: MigrationStatus::Completed,
            total,
            done: total,
            error: None,
        }
    }
}

/// What `dump-guest-memory` is to do.
#[derive(Debug)]
pub struct DumpOrder {
    /// `file:PATH`; otherwise a descriptor came along.
    pub uri: Option<String>,
    /// The file that the client passed.
    pub fds: Vec<Arc<OwnedFd>>,
    /// `detach`: the answer does not wait for the end.
    pub detach: bool,
}

/// How far a dump is (QAPI `DumpStatus`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DumpStatus {
    /// There was none.
    #[default]
    None,
    /// It is being written.
    Active,
    /// It is written.
    Completed,
    /// It could not be written to its end.
    Failed,
}

impl DumpStatus {
    /// All names, for the schema.
    pub(super) const NAMES: [&str; 4] = ["none", "active", "completed", "failed"];

    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => Self::NAMES[0],
            Self::Active => Self::NAMES[1],
            Self::Completed => Self::NAMES[2],
            Self::Failed => Self::NAMES[3],
        }
    }
}

/// The last dump that was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DumpProgress {
    /// How far it is.
    pub status: DumpStatus,
    /// Bytes of guest memory that are done.
    pub done: u64,
    /// Bytes of guest memory.
    pub total: u64,
}

impl DumpProgress {
    pub(super) fn value(self) -> Value {
        json!({ "status": self.status.name(), "completed": self.done, "total": self.total })
    }
}

/// One vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuThread {
    /// Its number, from 0.
    pub index: u8,
    /// Its thread's id on the host.
    pub thread_id: i32,
}

/// One iothread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IothreadInfo {
    /// Its id on the command line.
    pub id: String,
    /// Id on the host of the thread, or of the process, that does its work.
    pub thread_id: i32,
}

/// One character device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChardevInfo {
    /// Its id on the command line.
    pub label: String,
    /// Where it leads, as QEMU writes it: `pty:/dev/pts/3`, `unix:/path,server=on`, `file`, `stdio`.
    pub filename: String,
    /// Whether the guest's device uses it.
    pub frontend_open: bool,
}

/// What the VM is made of right now.
#[derive(Debug, Clone)]
pub struct VmFacts {
    /// The command line, and what came and went since.
    pub spec: VmSpec,
    /// The vCPUs.
    pub cpus: Vec<CpuThread>,
    /// Disks that wait for `cont` because the host failed them.
    pub stopped: Vec<(String, IoStop)>,
}

/// What the VM is made of, and what its disks have counted.
#[derive(Debug, Clone)]
pub struct Counted {
    /// The VM.
    pub facts: VmFacts,
    /// Ids of devices, with what they counted.
    pub disks: Vec<(String, BlockCounters)>,
}

/// What is known of a disk's image while the disk is there.
#[derive(Debug, Clone, Default)]
pub struct ImageFacts {
    /// Bytes that the guest sees.
    pub size: u64,
    /// Bytes of a cluster, if its format has them.
    pub cluster: Option<u32>,
    /// What is in it beside the disk, in its order.
    pub snapshots: Vec<Snapshot>,
}

/// What the VM is made of, and what is in its disks' images.
#[derive(Debug, Clone)]
pub struct Disks {
    /// The VM.
    pub facts: VmFacts,
    /// Ids of drives, with what is known of them.
    pub images: Vec<(String, ImageFacts)>,
}

/// What one device's process does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Id of the device.
    pub device: String,
    /// `serving`, `starting`, `stopping`, `waiting`, `foreign` or `failed`.
    pub state: &'static str,
    /// Its process, if there is one.
    pub pid: Option<i32>,
    /// A card's tap, if it has one by name.
    pub ifname: Option<String>,
}

/// A command that the main thread executes. It answers through the reply that comes along, now or later.
#[derive(Debug)]
pub enum VmCommand {
    /// `query-status`
    Status(Reply<RunState>),
    /// `query-cpus`, `query-cpus-fast`
    Cpus(Reply<Vec<CpuThread>>),
    /// `query-cpu-model-expansion`
    Processor(Reply<Processor>),
    /// `query-iothreads`
    Iothreads(Reply<Vec<IothreadInfo>>),
    /// `query-chardev`
    Chardevs(Reply<Vec<ChardevInfo>>),
    /// `qom-list` and others that tell what the VM is made of
    Facts(Reply<VmFacts>),
    /// `query-block`, `query-named-block-nodes`
    Disks(Reply<Disks>),
    /// `blockdev-snapshot-internal-sync`: of the disk with this drive or id, by this name
    DiskSnapshot(String, String, Reply<()>),
    /// `blockdev-snapshot-delete-internal-sync`
    DiskSnapshotDelete {
        /// The disk's drive or id.
        device: String,
        /// The snapshot's.
        id: Option<String>,
        /// The same.
        name: Option<String>,
        /// What it was.
        reply: Reply<Snapshot>,
    },
    /// `query-blockstats`
    Blockstats(Reply<Counted>),
    /// `query-workloads`
    Workloads(Reply<Vec<Workload>>),
    /// `query-mem-gpa`: the four bytes at this guest physical address, which is in hexadecimal, as the guest reads them
    Memory(Reply<u32>, String),
    /// `query-vcpu-reg`: of this vCPU the register with this number, which is in hexadecimal
    Register(Reply<u64>, u64, String),
    /// `query-sandbox`
    Sandbox(Reply<super::SandboxReport>),
    /// `blockdev-add`, `netdev_add`, `fsdev-add`, with descriptors that the client passed
    BackendAdd(Box<super::NewBackend>, Vec<Arc<OwnedFd>>, Reply<()>),
    /// `blockdev-del`, `netdev_del`, `fsdev-del`
    BackendDel(super::BackendKind, String, Reply<()>),
    /// `blockdev-add` of a format whose file is a node
    NodeOver(Box<super::NodeOver>, Reply<()>),
    /// `object-add` of an iothread with this id
    IothreadAdd(String, Reply<()>),
    /// `object-del`
    ObjectDel(String, Reply<()>),
    /// `device_add`
    DeviceAdd(Box<super::NewDevice>, Reply<()>),
    /// `block_resize`: of the disk with this drive or id, to so many bytes
    BlockResize(String, u64, Reply<()>),
    /// `device-upgrade`
    DeviceUpgrade(String, Reply<()>),
    /// `netdev_replace`, with descriptors that the client passed
    NetdevReplace(super::OtherTap, Vec<Arc<OwnedFd>>, Reply<()>),
    /// `device_del`
    DeviceDel(String, Reply<()>),
    /// `set_link`: of this device or netdev, up or down
    SetLink(String, bool, Reply<()>),
    /// `announce-self`: these cards or netdevs, or all if none is named
    AnnounceSelf(Vec<String>, Reply<()>),
    /// A command with an argument that is wrong for this reason.
    Wrong(String, Reply<()>),
    /// `stop`: pauses the vCPUs; emits STOP before it answers.
    Stop(Reply<()>),
    /// `cont`: lets them run; emits RESUME before it answers.
    Cont(Reply<()>),
    /// `system_reset`
    SystemReset(Reply<()>),
    /// `system_powerdown`
    SystemPowerdown(Reply<()>),
    /// `migrate` to this URI; answers when the snapshot is on the disk.
    Migrate(String, Reply<()>),
    /// `dump-guest-memory`; answers when the file is written, or at once.
    Dump(DumpOrder, Reply<()>),
    /// `query-dump`
    QueryDump(Reply<DumpProgress>),
    /// `query-migrate`
    QueryMigrate(Reply<Migration>),
    /// `migrate_cancel`
    CancelMigration(Reply<()>),
    /// `quit`: answers, emits SHUTDOWN, ends.
    Quit(Reply<()>),
}

impl VmCommand {
    /// Whether it can be executed while a disk's process is at work on its image for the host: it says nothing to any device's process
    /// and changes no device.
    pub const fn goes_beside_an_order(&self) -> bool {
        matches!(
            self,
            Self::Status(_)
                | Self::Cpus(_)
                | Self::Processor(_)
                | Self::Iothreads(_)
                | Self::Chardevs(_)
                | Self::Facts(_)
                | Self::Blockstats(_)
                | Self::Workloads(_)
                | Self::Memory(..)
                | Self::Register(..)
                | Self::Sandbox(_)
                | Self::Wrong(..)
                | Self::Stop(_)
                | Self::SystemPowerdown(_)
                | Self::QueryDump(_)
                | Self::QueryMigrate(_)
                | Self::Quit(_)
        )
    }
}
