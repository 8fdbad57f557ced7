//! What KVM keeps of a VM and its vCPUs in the middle of their work, to go on in another process.
//!
//! Job: read all of it from a paused VM, and write it into a new one.
//! Who is not trusted: whoever made the snapshot. KVM checks each value that it is given; one that it refuses is an error
//! before the guest runs, and no value is used here for anything but to hand it on.
//! Why this way: the order is KVM's. What it delivers late (a pending interrupt, the end of an instruction that left the
//! guest) is part of vCPU events and of the registers only after the vCPU's thread has finished its last exit, which
//! [`super::run`] sees to. Time: the guest's clock goes on from where it stood, and so does its time stamp counter.

#![allow(unsafe_code)] // KVM_SET_XSAVE takes a structure whose real size depends on features

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::state::{read_msrs, write_msrs};
use super::{Error, Vm};

/// The local APIC's timer counts to this moment: written after the counter that it is compared with.
const MSR_TSC_DEADLINE: u32 = 0x6E0;

/// Interrupt controllers, timer and clock of a VM.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedVm {
    chips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
    /// Nanoseconds of the guest's clock (kvmclock).
    clock: u64,
}

impl SavedVm {
    /// Reads it. All vCPUs are paused.
    pub(crate) fn save(vm: &Vm) -> Result<Self, Error> {
        let call = |call| move |source| Error::Call { call, source };
        let mut chips = [kvm_irqchip::default(); 3];
        for (chip, id) in chips.iter_mut().zip([
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ]) {
            chip.chip_id = id;
            vm.fd().get_irqchip(chip).map_err(call("KVM_GET_IRQCHIP"))?;
        }
        Ok(Self {
            chips,
            pit: vm.fd().get_pit2().map_err(call("KVM_GET_PIT2"))?,
            clock: vm.fd().get_clock().map_err(call("KVM_GET_CLOCK"))?.clock,
        })
    }

    /// Writes it into a new VM.
    pub(crate) fn restore(&self, vm: &Vm) -> Result<(), Error> {
        let call = |call| move |source| Error::Call { call, source };
        for chip in &self.chips {
            vm.fd().set_irqchip(chip).map_err(call("KVM_SET_IRQCHIP"))?;
        }
        vm.fd().set_pit2(&self.pit).map_err(call("KVM_SET_PIT2"))?;
        let clock = kvm_clock_data {
            clock: self.clock,
            ..Default::default()
        };
        vm.fd().set_clock(&clock).map_err(call("KVM_SET_CLOCK"))
    }
}

/// All that KVM keeps of one vCPU.
#[derive(Serialize, Deserialize)]
pub struct SavedVcpu {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl std::fmt::Debug for SavedVcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SavedVcpu")
            .field("regs", &self.regs)
            .field("msrs", &self.msrs.len())
            .finish_non_exhaustive()
    }
}

#[cfg(any(test, fuzzing))]
impl SavedVm {
    /// All zero.
    pub fn example() -> Self {
        Self {
            chips: [kvm_irqchip::default(); 3],
            pit: kvm_pit_state2::default(),
            clock: 1,
        }
    }
}

#[cfg(any(test, fuzzing))]
impl SavedVcpu {
    /// All zero.
    pub fn example() -> Self {
        Self {
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: Box::default(),
            xcrs: kvm_xcrs::default(),
            debug: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            msrs: vec![kvm_msr_entry::default(); 2],
            events: kvm_vcpu_events::default(),
        }
    }
}

fn failed(vcpu: u32, call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::VcpuCall { call, vcpu, source }
}

impl SavedVcpu {
    /// Reads vCPU `index`, which is paused; `msrs` are those that KVM lists for it.
    pub(crate) fn save(vcpu: &VcpuFd, index: u32, msrs: &[u32]) -> Result<Self, Error> {
        let call = |call| failed(index, call);
        // First, since KVM takes pending start-up messages in with it.
        let mp_state = vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().map_err(call("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?,
            xsave: Box::new(vcpu.get_xsave().map_err(call("KVM_GET_XSAVE"))?),
            xcrs: vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
            debug: vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?,
            msrs: read_msrs(vcpu, index, msrs)?,
            // Last: reading the registers may turn what was being delivered into what is pending.
            events: vcpu
                .get_vcpu_events()
                .map_err(call("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Writes it into vCPU `index` of a new VM.
    pub(crate) fn restore(&self, vcpu: &VcpuFd, index: u32) -> Result<(), Error> {
        let call = |call| failed(index, call);
        vcpu.set_mp_state(self.mp_state)
            .map_err(call("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(call("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(call("KVM_SET_SREGS"))?;
        // SAFETY: no feature was enabled that makes KVM read more than the 4096 bytes of this structure: that takes an
        // arch_prctl which this program never calls.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(call("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(call("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(call("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        let (late, early): (Vec<_>, Vec<_>) = self
            .msrs
            .iter()
            .partition(|entry| entry.index == MSR_TSC_DEADLINE);
        write_msrs(vcpu, index, &early)?;
        write_msrs(vcpu, index, &late)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(call("KVM_SET_VCPU_EVENTS"))
    }
}
