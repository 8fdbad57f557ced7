//! The process that `stratovirt`'s broker starts for `-device virtio-fs-device`.
//!
//! **Job.** Makes the device from the start message; the harness does the rest. The tree is the root of this process's
//! namespaces already, and came as a descriptor: there is no path.
//! **Who is not trusted.** The guest. The start message is the broker's, but a value outside of its range is an error.
//! **Why this way.** The same device as in the daemon, in the jail that all device processes have. What the guest holds is kept by
//! the first process of the jail, and one that serves takes it over from the one before; where the host allows no `/proc` of the
//! jail's own, files could be opened anew by the first process only, so that one serves by itself and keeps nothing.

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::process::ExitCode;

use device_host::{BackendFds, Estate, Heir, Kept, Movers, MoversError};
use fs_device::FsDevice;
use fs_device::device::{Moved, TAG_BYTES};
use fs_device::passthrough::{Cache, Config, OwnFds, Passthrough, Store, may_switch_user};
use ipc::channel::Channel;
use ipc::limits::{
    DAX_UNIT, MAX_DAX_WINDOW, MAX_FS_QUEUE_SIZE, MAX_FS_REQUEST_QUEUES, MIN_FS_QUEUE_SIZE,
};
use ipc::spec::DeviceSpec;
use ipc::spec::fs::{FsCache, FsSpec};
use ipc::start::StartMessage;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::Mode;
use seccomp_policies::Action;
use thiserror::Error;

use crate::movers;

/// First word of the arguments of a process that the broker has started.
pub(crate) const NAME: &str = "fs";

/// Descriptors that are not for the guest's files: the socket, queues, memory while it is mapped, the log.
const RESERVED: u64 = 128;

#[derive(Debug, Error)]
enum BuildError {
    #[error("the start message is not one of a shared folder")]
    NotAFolder,
    #[error("no descriptor of the tree, of the jail's processes or of the broker came along")]
    NoTree,
    #[error("{property} is {value}: {allowed}")]
    Property {
        property: &'static str,
        value: u64,
        allowed: &'static str,
    },
    #[error("limit of descriptors")]
    Limits(#[source] Errno),
    #[error("shared folder")]
    Tree(#[source] Errno),
    #[error(transparent)]
    Movers(#[from] MoversError),
}

/// Serves until the VM ends.
pub(crate) fn run() -> ExitCode {
    device_host::run_kept("vhost_user_fs", build)
}

fn build(start: &StartMessage, fds: &mut BackendFds) -> Result<Kept<Shared>, BuildError> {
    let DeviceSpec::Fs(spec) = &start.device else {
        return Err(BuildError::NotAFolder);
    };
    check(spec)?;
    let (Some(tree), Some(processes), Some(broker)) = (fds.take(), fds.take(), fds.take()) else {
        return Err(BuildError::NoTree);
    };
    let config = config(spec)?;
    let processes = ManuallyDrop::new(processes);
    let movers = movers::sensible();
    let action = device_host::filter_action(start);
    if let Some(line) = fds.take() {
        let spec = spec.clone();
        // The index of inodes hashes with these seeds, which nothing has asked for yet and which the filter gives to nobody.
        let _ = std::hash::RandomState::new();
        return Ok(Kept::After(Heir {
            broker: Channel::from_fd(broker),
            line: Channel::from_fd(line),
            layout: Store::layout(),
            adopt: Box::new(move |memory| {
                // The same folder by another mount: the tables' own descriptor of it takes its number.
                drop(tree);
                let store = Store::adopt(&memory)?;
                Ok(Shared {
                    spec,
                    config,
                    store,
                    movers,
                    action,
                    processes,
                })
            }),
        }));
    }
    let store = store(config.descriptors)?;
    let shared = Shared {
        spec: spec.clone(),
        config,
        store,
        movers,
        action,
        processes,
    };
    if shared.own_fds().is_err() {
        ipc::log::warn!(
            "this host allows no /proc in the jail: open files are lost if this process dies"
        );
        let own = OwnFds::new(ManuallyDrop::into_inner(shared.processes));
        let tree = Passthrough::new(tree, own, store, shared.config).map_err(BuildError::Tree)?;
        // Its threads would have to be started before the jail is shut.
        return device(tree, spec, None).map(Kept::Alone);
    }
    // Descriptors are on the mounts of this jail, whichever process has them.
    let mounts = shared.mounts().map_err(BuildError::Tree)?;
    store.keep_open(Some(mounts));
    Passthrough::plant(tree, store).map_err(BuildError::Tree)?;
    Ok(Kept::By(shared, Channel::from_fd(broker)))
}

/// What the broker says is looked at here as well: another build may have started this one.
fn check(spec: &FsSpec) -> Result<(), BuildError> {
    let wrong = |property, value: usize, allowed| BuildError::Property {
        property,
        value: value as u64,
        allowed,
    };
    let (queues, size) = (spec.request_queues, spec.queue_size);
    if !(1..=MAX_FS_REQUEST_QUEUES).contains(&queues) {
        return Err(wrong("num-request-queues", queues.into(), "1 to 8"));
    }
    if !size.is_power_of_two() || !(MIN_FS_QUEUE_SIZE..=MAX_FS_QUEUE_SIZE).contains(&size) {
        return Err(wrong(
            "queue-size",
            size.into(),
            "a power of two from 8 to 1024",
        ));
    }
    if !(1..=TAG_BYTES).contains(&spec.tag.len()) {
        return Err(wrong("length of tag", spec.tag.len(), "1 to 36 bytes"));
    }
    if spec.window > MAX_DAX_WINDOW || !spec.window.is_multiple_of(DAX_UNIT) {
        return Err(BuildError::Property {
            property: "cache-size",
            value: spec.window,
            allowed: "a multiple of 2M, up to 8G",
        });
    }
    Ok(())
}

/// How the folder is served, by the rights and limits that this process has.
fn config(spec: &FsSpec) -> Result<Config, BuildError> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).map_err(BuildError::Limits)?;
    let switch_user = !spec.readonly && may_switch_user();
    if !switch_user && !spec.readonly {
        ipc::log::info!("all new files belong to the user of this process");
    }
    Ok(Config {
        cache: match spec.cache {
            FsCache::Never => Cache::Never,
            FsCache::Metadata => Cache::Metadata,
            FsCache::Auto => Cache::Auto,
            FsCache::Always => Cache::Always,
        },
        readonly: spec.readonly,
        xattr: spec.xattr,
        posix_acl: spec.posix_acl,
        announce_submounts: true,
        switch_user,
        users: spec.users.clone(),
        groups: spec.groups.clone(),
        // At most a million.
        descriptors: limit.saturating_sub(RESERVED) as usize,
        ..Config::default()
    })
}

/// Tables that another program can go on with, if the limit of a file's size allows them.
fn store(descriptors: usize) -> Result<Store, BuildError> {
    let (most, _) = getrlimit(Resource::RLIMIT_FSIZE).map_err(BuildError::Limits)?;
    if Store::bytes(descriptors) <= most {
        Store::new_to_hand_over(descriptors)
    } else {
        ipc::log::info!(
            "by its limit of a file's size, no other program can take the place of this one"
        );
        Store::new(descriptors)
    }
    .map_err(BuildError::Tree)
}

fn device(
    mut tree: Passthrough,
    spec: &FsSpec,
    movers: Option<Movers<Moved>>,
) -> Result<FsDevice, BuildError> {
    // This VM's control process does.
    tree.leave_mappings_to_front_end();
    FsDevice::new(tree, &spec.tag)
        .map(|device| {
            let device = device.with_queues(spec.request_queues, spec.queue_size);
            device.with_window(spec.window).with_movers(movers)
        })
        .ok_or(BuildError::NotAFolder)
}

/// A folder and what the guest holds of it.
struct Shared {
    spec: FsSpec,
    config: Config,
    store: Store,
    /// Threads that move data, and what their filters do.
    movers: usize,
    action: Option<Action>,
    /// A `/proc` of the jail. Both processes have it, so neither closes it.
    processes: ManuallyDrop<OwnedFd>,
}

impl Shared {
    /// Of the process that asks.
    fn own_fds(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        openat(&*self.processes, "self/fd", flags, Mode::empty())
    }

    /// The mounts of this jail.
    fn mounts(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        openat(&*self.processes, "self/ns/mnt", flags, Mode::empty())
    }
}

impl Estate for Shared {
    type Device = FsDevice;
    type Error = BuildError;

    fn heir(&self) -> Result<FsDevice, BuildError> {
        let own = OwnFds::new(self.own_fds().map_err(BuildError::Tree)?);
        let tree = Passthrough::resume(None, own, self.store, self.config.clone())
            .map_err(BuildError::Tree)?;
        let movers = movers::start(self.movers, self.action)?;
        device(tree, &self.spec, movers)
    }

    fn descriptors(&self, with: &mut dyn FnMut(RawFd)) {
        self.store.descriptors(with);
    }

    fn own(&self, with: &mut dyn FnMut(RawFd)) {
        with(self.processes.as_raw_fd());
    }

    fn heritage(&self) -> Option<(u64, BorrowedFd<'_>)> {
        Some((Store::layout(), self.store.memory()?))
    }
}
