//! Everything that is a KVM call.
//!
//! Job: `/dev/kvm` with its capabilities checked, the VM with its interrupt controllers and memory slots, vCPUs with
//! CPUID, MSRs and registers, the threads that run them, the state they had when new, for a reset in place, and the state
//! they have now, for a snapshot.
//! Who is not trusted: the guest, which chooses every exit's port, address and data. Exits are handed to an
//! [`run::IoHandler`]; nothing here interprets what the guest says.
//! Why this way: this folder holds all of this process's KVM `unsafe`, and knows no device and no machine.

pub mod cpuid;
pub mod processor;
pub mod regs;
pub mod run;
pub mod snapshot;
pub mod state;
pub mod topology;
pub mod vm;

pub use regs::{BootRegisters, RegisterDump};
pub use run::{IoHandler, VcpuThreads};
pub use topology::Topology;
pub use vm::{Kvm, Vm};

/// What can go wrong between this process and KVM.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the message of each variant says all there is to say
pub enum Error {
    #[error("cannot open /dev/kvm")]
    Open(#[source] kvm_ioctls::Error),
    #[error("/dev/kvm speaks API version {0}, this program needs version 12")]
    ApiVersion(i32),
    #[error("KVM lacks {name}: {purpose}")]
    Capability {
        name: &'static str,
        purpose: &'static str,
    },
    #[error("KVM runs at most {max} vCPUs, {wanted} were asked for")]
    TooManyVcpus { wanted: u32, max: usize },
    #[error("KVM: {call} failed")]
    Call {
        call: &'static str,
        source: kvm_ioctls::Error,
    },
    #[error("KVM: {call} failed for vCPU {vcpu}")]
    VcpuCall {
        call: &'static str,
        vcpu: u32,
        source: kvm_ioctls::Error,
    },
    #[error("KVM: cannot map {size} bytes of RAM at guest address {address:#x}")]
    MapRam {
        address: u64,
        size: u64,
        source: kvm_ioctls::Error,
    },
    #[error("KVM accepted {set} of {given} MSRs on vCPU {vcpu}; the next one was {index:#x}")]
    Msrs {
        vcpu: u32,
        set: usize,
        given: usize,
        index: u32,
    },
    #[error("KVM reports no CPUID leaf {0:#x}")]
    MissingLeaf(u32),
    #[error("too many entries for a KVM list")]
    List(#[source] vmm_sys_util::fam::Error),
    #[error("cannot start the thread of vCPU {vcpu}")]
    Thread { vcpu: u32, source: std::io::Error },
    #[error("cannot install the signal handler that interrupts vCPUs")]
    Signal(#[source] vmm_sys_util::errno::Error),
    #[error("vCPU threads have been started already")]
    AlreadyStarted,
    #[error("vCPU threads have not been started")]
    NotStarted,
    #[error("vCPU threads run; pause them first")]
    Running,
}
