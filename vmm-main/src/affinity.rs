//! Which of the host's processors vCPUs and device processes run on.
//!
//! **Job.** Checks the sets of `-object iothread,cpus=` and `-vcpu-affinity` against what this process may use, and puts a
//! thread on its set. **Who is not trusted**: nobody, the sets come from the command line. **Why this way.** The kernel takes
//! a set of which a single processor is allowed, and quietly drops the others; a user who asked for two of them would never
//! learn. Affinity is inherited, so each thread and process is put in its place before it starts another.

use ipc::spec::cpus::{CpuList, MAX_CPUS};
use ipc::spec::vm::VmSpec;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// A set that cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AffinityError {
    /// Not all of it may be used.
    #[error(
        "{option}cpus={cpus}: allowed: processors that this process may use, which are {allowed}"
    )]
    Allowed {
        /// Where it was asked for.
        option: String,
        /// The set.
        cpus: Box<CpuList>,
        /// What there is.
        allowed: Box<CpuList>,
    },
    /// The kernel does not say what may be used.
    #[error("sched_getaffinity failed")]
    Unknown(#[source] Errno),
}

/// Whether every set that `spec` asks for can be had.
pub(crate) fn check(spec: &VmSpec) -> Result<(), AffinityError> {
    let iothreads = spec
        .iothreads
        .iter()
        .filter_map(|one| Some((format!("-object iothread,id={},", one.id), one.cpus?)));
    let vcpus = spec.vcpu_affinity.iter().map(|one| {
        let option = one.vcpu.map_or("-vcpu-affinity ".to_owned(), |vcpu| {
            format!("-vcpu-affinity vcpu={vcpu},")
        });
        (option, one.cpus)
    });
    let mut wanted = iothreads.chain(vcpus).peekable();
    if wanted.peek().is_none() {
        return Ok(());
    }
    let own = sched_getaffinity(Pid::from_raw(0)).map_err(AffinityError::Unknown)?;
    let allowed: CpuList = (0..MAX_CPUS)
        .filter(|cpu| own.is_set(*cpu) == Ok(true))
        .collect();
    for (option, cpus) in wanted {
        if !cpus.iter().all(|cpu| allowed.contains(cpu)) {
            return Err(AffinityError::Allowed {
                option,
                cpus: Box::new(cpus),
                allowed: Box::new(allowed),
            });
        }
    }
    Ok(())
}

/// The kernel's form of a set.
pub(crate) fn to_set(cpus: &CpuList) -> Result<CpuSet, Errno> {
    let mut set = CpuSet::new();
    cpus.iter().try_for_each(|cpu| set.set(cpu))?;
    Ok(set)
}

/// Puts the calling thread there.
pub(crate) fn enter(cpus: &CpuList) -> Result<(), Errno> {
    sched_setaffinity(Pid::from_raw(0), &to_set(cpus)?)
}
