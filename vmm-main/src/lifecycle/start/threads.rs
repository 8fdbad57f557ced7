//! What runs beside the main loop: signals, vCPUs, and the threads that answer for guest memory.
//!
//! **Job.** Starts each thread, and returns when it has its filter. **Why this way.** What a thread is allowed is known only once the
//! process is locked down, and nothing of a guest may run before that.

use std::sync::Arc;

use ipc::log::info;
use ipc::spec::vm::VmSpec;
use ipc::start::SeccompMode;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use seccomp_policies::Policy;

use super::board::SharedTransport;
use super::error::{StartError, failed};
use crate::affinity;
use crate::kvm;
use crate::lifecycle::event_loop::lock;
use crate::lifecycle::lockdown;
use crate::machine::microvm::Microvm;
use crate::memory::pager::{Pager, Progress};
use crate::memory::sharing::Orders;
use crate::virtio::window::Windows;

/// What ends the VM in good order.
pub(in crate::lifecycle) fn termination_signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]
        .into_iter()
        .collect()
}

/// Termination signals become events of the main loop.
pub(super) fn signals() -> Result<SignalFd, StartError> {
    let set = termination_signals();
    set.thread_block().map_err(failed("sigprocmask"))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(failed("signalfd"))
}

/// Starts the threads of vCPUs, each on its processors and behind its filter.
pub(super) fn start_vcpus(machine: &mut Microvm, spec: &VmSpec) -> Result<(), StartError> {
    let mode = spec.seccomp;
    let pinned: Vec<_> = (0..u32::from(spec.cpus.maxcpus))
        .map(|vcpu| spec.vcpu_cpus(vcpu))
        .collect();
    machine.start(
        &(Arc::new(move |vcpu: u32| {
            if let Some(Some(cpus)) = pinned.get(vcpu as usize) {
                affinity::enter(cpus)?;
            }
            lockdown::hook(Policy::ControlVcpu, mode)
        }) as kvm::run::ThreadStart),
    )?;
    // Ids are asked for now: each thread says its own once it has its filter.
    machine.vcpu_thread_ids()?;
    Ok(())
}

/// Guest memory that comes in from a snapshot while the guest runs.
#[derive(Default)]
pub(super) struct Coming {
    /// How far it is, where that ends.
    pub(super) progress: Option<Arc<Progress>>,
    /// It is a template's where nobody has written.
    pub(super) sharing: Option<Arc<Orders>>,
}

impl Coming {
    /// Starts the thread that brings it in, and has devices work in it.
    pub(super) fn serve(
        lazy: Pager,
        transports: &[SharedTransport],
        mode: SeccompMode,
    ) -> Result<Self, StartError> {
        let sharing = lazy.orders();
        let mut progress = pager(lazy, mode)?;
        if let Some(sharing) = &sharing {
            progress = share(transports, sharing).or(progress);
        }
        Ok(Self { progress, sharing })
    }
}

/// Has devices work in memory that is partly a template's; if one cannot, how far all of it is on its way in.
fn share(transports: &[SharedTransport], sharing: &Arc<Orders>) -> Option<Arc<Progress>> {
    let mut watched = true;
    for transport in transports {
        let mut transport = lock(transport);
        watched &= transport.core().device().can_share();
        transport.share(sharing.clone());
    }
    if watched {
        return None;
    }
    // They map the memory file, which has nothing of what is the template's.
    info!("a device's process cannot be watched: memory is copied for all");
    Some(sharing.bring_in())
}

/// Starts the thread that answers for guest memory; returns when it has its filter.
fn pager(lazy: Pager, mode: SeccompMode) -> Result<Option<Arc<Progress>>, StartError> {
    let progress = lazy.progress();
    filtered("pager", Policy::ControlPager, mode, move || lazy.serve())?;
    Ok(progress)
}

/// Starts the thread that maps files of shared folders for the guest; returns when it has its filter.
pub(super) fn serve_windows(windows: Windows, mode: SeccompMode) -> Result<(), StartError> {
    windows.hand_over();
    filtered("window", Policy::ControlWindow, mode, move || {
        windows.serve()
    })
}

/// Starts a thread that does `work` under `policy`, and returns when it has its filter.
fn filtered(
    name: &str,
    policy: Policy,
    mode: SeccompMode,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), StartError> {
    let (told, started) = std::sync::mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let filtered = lockdown::filter(policy, mode);
            let goes = filtered.is_ok();
            let _ = told.send(filtered);
            drop(told);
            if goes {
                work();
            }
            // A thread's end takes calls that its filter would have to allow for nothing but that.
            loop {
                std::thread::park();
            }
        })
        .map_err(|e| StartError::System {
            call: "clone3",
            source: e.raw_os_error().map_or(Errno::EAGAIN, Errno::from_raw),
        })?;
    // It sends before anything can end it.
    if let Ok(filtered) = started.recv() {
        filtered?;
    }
    Ok(())
}
