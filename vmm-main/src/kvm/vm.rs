//! The KVM device and one virtual machine.
//!
//! Job: open and check `/dev/kvm`, create the VM, attach RAM, in-kernel interrupt controllers, eventfds and lines.
//! Who is not trusted: nobody yet; the guest does not run while these calls are made, except for the eventfd calls,
//! whose arguments come from this process.
//! Why this way: [`Kvm::open`] and [`Vm::create`] depend on nothing, so they can run beside the start of device
//! processes; capabilities are checked once, with what each is for, instead of failing later with a bare errno.

#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION takes an address of this process

use kvm_bindings::{
    KVM_API_VERSION, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::Error;
use crate::machine::layout;
use crate::memory::GuestRam;
use crate::virtio::window::Window;

/// The KVM device, checked.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

/// Capabilities without which no machine of ours can run, and why.
const NEEDED: [(Cap, &str, &str); 10] = [
    (
        Cap::UserMemory,
        "KVM_CAP_USER_MEMORY",
        "guest RAM is memory of this process",
    ),
    (
        Cap::Irqchip,
        "KVM_CAP_IRQCHIP",
        "interrupt controllers are emulated in the kernel",
    ),
    (
        Cap::Pit2,
        "KVM_CAP_PIT2",
        "the timer is emulated in the kernel",
    ),
    (
        Cap::SetTssAddr,
        "KVM_CAP_SET_TSS_ADDR",
        "real-mode emulation on older hosts needs three pages",
    ),
    (
        Cap::ExtCpuid,
        "KVM_CAP_EXT_CPUID",
        "the guest's CPUID is derived from the host's",
    ),
    (
        Cap::Irqfd,
        "KVM_CAP_IRQFD",
        "device processes raise interrupts through eventfds",
    ),
    (
        Cap::Ioeventfd,
        "KVM_CAP_IOEVENTFD",
        "device processes take doorbells through eventfds",
    ),
    (
        Cap::MpState,
        "KVM_CAP_MP_STATE",
        "a reset puts all but the first vCPU back to waiting for start-up",
    ),
    (
        Cap::VcpuEvents,
        "KVM_CAP_VCPU_EVENTS",
        "a reset clears pending exceptions and interrupts",
    ),
    (
        Cap::ImmediateExit,
        "KVM_CAP_IMMEDIATE_EXIT",
        "pausing a vCPU must not race with its next run",
    ),
];

impl Kvm {
    /// Opens `/dev/kvm` and checks that it can do what every machine needs.
    ///
    /// # Errors
    /// The device cannot be opened, or lacks a capability; the error names it and what it is for.
    pub fn open() -> Result<Self, Error> {
        Self::check(kvm_ioctls::Kvm::new().map_err(Error::Open)?)
    }

    fn check(fd: kvm_ioctls::Kvm) -> Result<Self, Error> {
        let version = fd.get_api_version();
        if version != KVM_API_VERSION.cast_signed() {
            return Err(Error::ApiVersion(version));
        }
        for (capability, name, purpose) in NEEDED {
            if !fd.check_extension(capability) {
                return Err(Error::Capability { name, purpose });
            }
        }
        Ok(Self { fd })
    }

    /// The device, for CPUID and MSR lists.
    pub(crate) fn fd(&self) -> &kvm_ioctls::Kvm {
        &self.fd
    }
}

/// A virtual machine: interrupt controllers, timer and memory slots. Shared by reference; all calls are thread-safe.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
}

impl Vm {
    /// Creates an empty VM: no RAM, no interrupt controllers, no vCPUs.
    ///
    /// # Errors
    /// A KVM call failed; the error names it.
    pub fn create(kvm: &Kvm) -> Result<Self, Error> {
        let call = |call| move |source| Error::Call { call, source };
        let fd = kvm.fd.create_vm().map_err(call("KVM_CREATE_VM"))?;
        // Intel hosts without unrestricted guests keep their real-mode emulation in these pages; both calls come
        // before the first vCPU.
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::KVM_TSS)
            .map_err(call("KVM_SET_TSS_ADDR"))?;
        Ok(Self { fd })
    }

    /// Adds IOAPIC, PIC, local APICs of vCPUs to come, and PIT.
    ///
    /// Comes after [`Self::map_ram`]: registering their ports starts a grace period in KVM that installing a memory
    /// slot would have to wait out, several milliseconds.
    ///
    /// # Errors
    /// A KVM call failed; the error names it.
    pub fn add_interrupt_controllers(&self) -> Result<(), Error> {
        let call = |call| move |source| Error::Call { call, source };
        self.fd
            .create_irq_chip()
            .map_err(call("KVM_CREATE_IRQCHIP"))?;
        // The dummy speaker answers port 0x61, through which kernels gate the timer when they calibrate.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.fd.create_pit2(pit).map_err(call("KVM_CREATE_PIT2"))
    }

    /// Gives the VM its RAM: one slot per region, numbered from 0.
    ///
    /// The VM does not keep `ram` alive: whoever owns both must drop the VM and its vCPUs first, as
    /// [`crate::machine::microvm::Microvm`] does by the order of its fields.
    ///
    /// # Errors
    /// KVM refused a region.
    pub fn map_ram(&self, ram: &GuestRam) -> Result<(), Error> {
        for (slot, region) in ram.regions().enumerate() {
            let slot_number = u32::try_from(slot).unwrap_or(u32::MAX);
            let description = kvm_userspace_memory_region {
                slot: slot_number,
                flags: 0,
                guest_phys_addr: region.guest_address,
                memory_size: region.size,
                userspace_addr: region.host_address,
            };
            // SAFETY: the range is a shared mapping of the memory file that `ram` owns, and the documented contract
            // above keeps it mapped as long as vCPUs can run.
            unsafe { self.fd.set_user_memory_region(description) }.map_err(|source| {
                Error::MapRam {
                    address: region.guest_address,
                    size: region.size,
                    source,
                }
            })?;
        }
        Ok(())
    }

    /// Puts `window` at its guest address, in slot `slot`, which no RAM has. Windows are never unmapped in this process, so nothing
    /// has to outlive anything.
    ///
    /// # Errors
    /// KVM refused.
    pub fn map_window(&self, slot: u32, window: &Window) -> Result<(), Error> {
        let description = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: window.guest_address(),
            memory_size: window.size(),
            userspace_addr: window.host_address(),
        };
        // SAFETY: the range was made for this window, holds nothing of this process, and stays as long as the process.
        unsafe { self.fd.set_user_memory_region(description) }.map_err(|source| Error::MapRam {
            address: window.guest_address(),
            size: window.size(),
            source,
        })
    }

    /// Lets a write to `event` raise line `gsi` as an edge.
    ///
    /// # Errors
    /// KVM refused, for instance because this eventfd raises a line already.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(|source| Error::Call {
                call: "KVM_IRQFD",
                source,
            })
    }

    /// Undoes [`Self::register_irqfd`].
    ///
    /// # Errors
    /// KVM does not know the pair.
    pub fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.fd
            .unregister_irqfd(event, gsi)
            .map_err(|source| Error::Call {
                call: "KVM_IRQFD (deassign)",
                source,
            })
    }

    /// Lets a guest write to MMIO address `address` signal `event` without an exit. With `datamatch`, only a write of
    /// four bytes with that value does (virtio-mmio's `QueueNotify`); without, a write of any size and value.
    ///
    /// # Errors
    /// KVM refused, for instance because the address and value are taken.
    pub fn register_ioeventfd(
        &self,
        event: &EventFd,
        address: u64,
        datamatch: Option<u32>,
    ) -> Result<(), Error> {
        let address = IoEventAddress::Mmio(address);
        match datamatch {
            Some(value) => self.fd.register_ioevent(event, &address, value),
            None => self.fd.register_ioevent(event, &address, NoDatamatch),
        }
        .map_err(|source| Error::Call {
            call: "KVM_IOEVENTFD",
            source,
        })
    }

    /// Undoes [`Self::register_ioeventfd`] with the same arguments.
    ///
    /// # Errors
    /// KVM does not know the combination.
    pub fn unregister_ioeventfd(
        &self,
        event: &EventFd,
        address: u64,
        datamatch: Option<u32>,
    ) -> Result<(), Error> {
        let address = IoEventAddress::Mmio(address);
        match datamatch {
            Some(value) => self.fd.unregister_ioevent(event, &address, value),
            None => self.fd.unregister_ioevent(event, &address, NoDatamatch),
        }
        .map_err(|source| Error::Call {
            call: "KVM_IOEVENTFD (deassign)",
            source,
        })
    }

    /// Creates the vCPU with local APIC id `apic_id`.
    pub(crate) fn create_vcpu(&self, apic_id: u32) -> Result<VcpuFd, Error> {
        self.fd
            .create_vcpu(u64::from(apic_id))
            .map_err(|source| Error::VcpuCall {
                call: "KVM_CREATE_VCPU",
                vcpu: apic_id,
                source,
            })
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }
}
