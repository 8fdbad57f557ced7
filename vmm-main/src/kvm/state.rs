//! The state of a VM and its vCPUs when new, and how to bring them back to it.
//!
//! Job: a guest that asks for a reset gets a machine that a fresh start would give it, without new processes, new
//! eventfds or a new VM.
//! Who is not trusted: the guest ruled all this state until now, so every piece that KVM can set is set.
//! Why this way: KVM has no reset call, but all it keeps can be written. What depends on the host (MSRs, system
//! registers, LAPIC) is read once, right after the vCPU got its CPUID, which gives KVM's own values without a list of
//! ours to maintain.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, MsrList, Msrs, kvm_debugregs, kvm_fpu, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
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

/// What KVM keeps of one vCPU when it is new.
///
/// Only what differs from host to host is read, since every call costs start-up time. General registers, x87 and SSE
/// state, debug registers and XCR0 have the values that the architecture gives them at reset (SDM 3A, table 10-1).
/// CPUID is not here because no guest can change it.
#[derive(Debug)]
pub(crate) struct VcpuState {
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// RFLAGS at reset: bit 1 is always set.
const RESET_RFLAGS: u64 = 2;
const RESET_FCW: u16 = 0x37F;
const RESET_MXCSR: u32 = 0x1F80;
const RESET_DR6: u64 = 0xFFFF_0FF0;
const RESET_DR7: u64 = 0x400;
/// XCR0 at reset: x87 only.
const RESET_XCR0: u64 = 1;
/// `IA32_APIC_BASE` bit 8: this is the boot processor.
const APIC_BASE_BSP: u64 = 1 << 8;

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
    /// Reads the state of a vCPU that has not run, whose LAPIC has just been set to `lapic`.
    pub(crate) fn save(
        vcpu: &VcpuFd,
        index: u32,
        lapic: kvm_lapic_state,
        list: &MsrList,
    ) -> Result<Self, Error> {
        let call = |call| {
            move |source| Error::VcpuCall {
                call,
                vcpu: index,
                source,
            }
        };
        Ok(Self {
            sregs: vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?,
            lapic,
            msrs: read_msrs(vcpu, index, list.as_slice())?,
            events: vcpu
                .get_vcpu_events()
                .map_err(call("KVM_GET_VCPU_EVENTS"))?,
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
        let mp_state = if self.sregs.apic_base & APIC_BASE_BSP != 0 {
            KVM_MP_STATE_RUNNABLE
        } else {
            KVM_MP_STATE_UNINITIALIZED
        };
        vcpu.set_mp_state(kvm_mp_state { mp_state })
            .map_err(call("KVM_SET_MP_STATE"))?;
        vcpu.set_sregs(&self.sregs).map_err(call("KVM_SET_SREGS"))?;
        let regs = kvm_regs {
            rflags: RESET_RFLAGS,
            ..Default::default()
        };
        vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = RESET_XCR0;
        vcpu.set_xcrs(&xcrs).map_err(call("KVM_SET_XCRS"))?;
        let fpu = kvm_fpu {
            fcw: RESET_FCW,
            mxcsr: RESET_MXCSR,
            ..Default::default()
        };
        vcpu.set_fpu(&fpu).map_err(call("KVM_SET_FPU"))?;
        let debug = kvm_debugregs {
            dr6: RESET_DR6,
            dr7: RESET_DR7,
            ..Default::default()
        };
        vcpu.set_debug_regs(&debug)
            .map_err(call("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        write_msrs(vcpu, index, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(call("KVM_SET_VCPU_EVENTS"))
    }
}

const MSRS_PER_CALL: usize = 256;

/// Writes MSRs back, in pieces that KVM takes at once.
///
/// Some MSRs that KVM lists and lets be read it does not let be written on some hosts, not even with the value that
/// they have. Such an MSR is one that no guest can have changed either, for a guest may write less than this
/// process. It is skipped, with a word in the log.
pub(super) fn write_msrs(vcpu: &VcpuFd, index: u32, msrs: &[kvm_msr_entry]) -> Result<(), Error> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let piece = &rest[..rest.len().min(MSRS_PER_CALL)];
        let done = match regs::set_msrs(vcpu, index, piece) {
            Ok(()) => piece.len(),
            Err(Error::Msrs { set, index, .. }) => {
                debug!("KVM does not let MSR {index:#x} be written");
                set + 1
            }
            Err(other) => return Err(other),
        };
        rest = &rest[done..];
    }
    Ok(())
}

/// Reads the MSRs of `list`, leaving out those that KVM lists but this vCPU's CPUID does not have.
pub(super) fn read_msrs(
    vcpu: &VcpuFd,
    vcpu_index: u32,
    list: &[u32],
) -> Result<Vec<kvm_msr_entry>, Error> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that can be read of a vCPU, as text: the bindings compare by bytes nowhere else.
    fn all(vcpu: &VcpuFd) -> [String; 8] {
        [
            format!("{:?}", vcpu.get_sregs().unwrap()),
            format!("{:?}", vcpu.get_fpu().unwrap()),
            format!("{:?}", vcpu.get_lapic().unwrap()),
            format!("{:?}", vcpu.get_mp_state().unwrap()),
            format!("{:?}", vcpu.get_vcpu_events().unwrap()),
            format!("{:?}", vcpu.get_debug_regs().unwrap()),
            format!("{:?}", vcpu.get_xcrs().unwrap()),
            format!("{:?}", vcpu.get_regs().unwrap().rflags),
        ]
    }

    #[test]
    fn a_restored_vcpu_is_like_a_new_one() {
        if !std::path::Path::new("/dev/kvm").exists() {
            eprintln!("skipped: this host has no /dev/kvm");
            return;
        }
        let kvm = Kvm::open().unwrap();
        let vm = Vm::create(&kvm).unwrap();
        vm.add_interrupt_controllers().unwrap();
        let list = msr_list(&kvm).unwrap();
        for index in [0, 1] {
            let vcpu = vm.create_vcpu(index).unwrap();
            let new = all(&vcpu);
            let lapic = vcpu.get_lapic().unwrap();
            let state = VcpuState::save(&vcpu, index, lapic, &list).unwrap();
            // What a guest would leave behind.
            let mut sregs = vcpu.get_sregs().unwrap();
            (sregs.cr2, sregs.cr3) = (0x1234, 0x5000);
            vcpu.set_sregs(&sregs).unwrap();
            let fpu = kvm_fpu {
                fcw: 0x27F,
                mxcsr: 0x1F00,
                ..Default::default()
            };
            vcpu.set_fpu(&fpu).unwrap();
            let debug = kvm_debugregs {
                db: [1, 2, 3, 4],
                dr6: 0xFFFF_0FF1,
                dr7: 0x401,
                ..Default::default()
            };
            vcpu.set_debug_regs(&debug).unwrap();
            let mp_state = KVM_MP_STATE_RUNNABLE + 3;
            vcpu.set_mp_state(kvm_mp_state { mp_state }).unwrap();
            assert_ne!(all(&vcpu), new);
            state.restore(&vcpu, index).unwrap();
            for (now, new) in all(&vcpu).iter().zip(&new) {
                assert_eq!(now, new, "vCPU {index}");
            }
        }
    }
}
