//! The state of a VM and its vCPUs when new, and how to bring them back to it.
//!
//! Job: a guest that asks for a reset gets a machine that a fresh start would give it, without new processes, new
//! eventfds or a new VM.
//! Who is not trusted: the guest ruled all this state until now, so every piece that KVM can set is set.
//! Why this way: KVM has no reset call, but all it keeps can be read and written. Reading it once, right after the
//! vCPU got its CPUID, gives exactly KVM's own reset values on this host, without a list of ours to maintain.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, MsrList, Msrs,
    kvm_debugregs, kvm_fpu, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use log::debug;

use super::{Error, Kvm, Vm, regs};

/// Interrupt controllers and timer of a VM.
#[derive(Debug)]
pub(crate) struct VmState {
    chips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

impl VmState {
    pub(crate) fn save(vm: &Vm) -> Result<Self, Error> {
        let mut chips = [kvm_irqchip::default(); 3];
        for (chip, id) in chips.iter_mut().zip([
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ]) {
            chip.chip_id = id;
            vm.fd().get_irqchip(chip).map_err(|source| Error::Call {
                call: "KVM_GET_IRQCHIP",
                source,
            })?;
        }
        let pit = vm.fd().get_pit2().map_err(|source| Error::Call {
            call: "KVM_GET_PIT2",
            source,
        })?;
        Ok(Self { chips, pit })
    }

    pub(crate) fn restore(&self, vm: &Vm) -> Result<(), Error> {
        for chip in &self.chips {
            vm.fd().set_irqchip(chip).map_err(|source| Error::Call {
                call: "KVM_SET_IRQCHIP",
                source,
            })?;
        }
        vm.fd().set_pit2(&self.pit).map_err(|source| Error::Call {
            call: "KVM_SET_PIT2",
            source,
        })
    }
}

/// Everything that KVM keeps of one vCPU, except CPUID, which a guest cannot change.
#[derive(Debug)]
pub(crate) struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    debug: kvm_debugregs,
    xcrs: kvm_xcrs,
}

/// `IA32_MCG_CTL`
const MSR_MCG_CTL: u32 = 0x17B;

/// MSRs to put back, as KVM lists them for this host.
pub(crate) fn msr_list(kvm: &Kvm) -> Result<MsrList, Error> {
    let mut list = kvm
        .fd()
        .get_msr_index_list()
        .map_err(|source| Error::Call {
            call: "KVM_GET_MSR_INDEX_LIST",
            source,
        })?;
    // Listed always, readable only on a vCPU with machine-check banks, which ours have not.
    list.retain(|index| *index != MSR_MCG_CTL);
    Ok(list)
}

impl VcpuState {
    /// Reads the state of a vCPU that has not run.
    pub(crate) fn save(vcpu: &VcpuFd, index: u32, list: &MsrList) -> Result<Self, Error> {
        let call = |call| {
            move |source| Error::VcpuCall {
                call,
                vcpu: index,
                source,
            }
        };
        Ok(Self {
            regs: vcpu.get_regs().map_err(call("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?,
            fpu: vcpu.get_fpu().map_err(call("KVM_GET_FPU"))?,
            lapic: vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?,
            msrs: read_msrs(vcpu, index, list.as_slice())?,
            mp_state: vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?,
            events: vcpu
                .get_vcpu_events()
                .map_err(call("KVM_GET_VCPU_EVENTS"))?,
            debug: vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            xcrs: vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
        })
    }

    /// System registers when new, with the APIC base that tells the boot processor from the others.
    pub(crate) fn sregs(&self) -> kvm_sregs {
        self.sregs
    }

    /// Writes the state back. The order is KVM's: modes before what depends on them, the LAPIC before MSRs that its
    /// timer mode gates, events last.
    pub(crate) fn restore(&self, vcpu: &VcpuFd, index: u32) -> Result<(), Error> {
        let call = |call| {
            move |source| Error::VcpuCall {
                call,
                vcpu: index,
                source,
            }
        };
        vcpu.set_mp_state(self.mp_state)
            .map_err(call("KVM_SET_MP_STATE"))?;
        vcpu.set_sregs(&self.sregs).map_err(call("KVM_SET_SREGS"))?;
        vcpu.set_regs(&self.regs).map_err(call("KVM_SET_REGS"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(call("KVM_SET_XCRS"))?;
        vcpu.set_fpu(&self.fpu).map_err(call("KVM_SET_FPU"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(call("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        self.restore_msrs(vcpu, index)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    /// Writes the MSRs back, in pieces that KVM takes at once.
    ///
    /// Some MSRs that KVM lists and lets be read it does not let be written on some hosts, not even with the value that
    /// they have. Such an MSR is one that no guest can have changed either, for a guest may write less than this
    /// process. It is skipped, with a word in the log.
    fn restore_msrs(&self, vcpu: &VcpuFd, index: u32) -> Result<(), Error> {
        let mut rest = &self.msrs[..];
        while !rest.is_empty() {
            let piece = &rest[..rest.len().min(MSRS_PER_CALL)];
            let done = match regs::set_msrs(vcpu, index, piece) {
                Ok(()) => piece.len(),
                Err(Error::Msrs { set, index, .. }) => {
                    debug!("KVM does not let MSR {index:#x} be written at reset");
                    set + 1
                }
                Err(other) => return Err(other),
            };
            rest = &rest[done..];
        }
        Ok(())
    }
}

const MSRS_PER_CALL: usize = 256;

/// Reads the MSRs of `list`, leaving out those that KVM lists but this vCPU's CPUID does not have.
fn read_msrs(vcpu: &VcpuFd, vcpu_index: u32, list: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut values = Vec::with_capacity(list.len());
    let mut rest = list;
    while !rest.is_empty() {
        let asked: Vec<_> = rest
            .iter()
            .take(MSRS_PER_CALL)
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&asked).map_err(Error::List)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(|source| Error::VcpuCall {
            call: "KVM_GET_MSRS",
            vcpu: vcpu_index,
            source,
        })?;
        values.extend_from_slice(&msrs.as_slice()[..read]);
        // KVM stops at the first MSR it refuses: skip that one.
        let done = if read == asked.len() { read } else { read + 1 };
        rest = &rest[done..];
    }
    Ok(values)
}
