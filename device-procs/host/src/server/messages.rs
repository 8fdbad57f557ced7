//! What the device does for each message of the front end.
//!
//! **Job.** One function a message of the specification, after what several of them do. **Who is not trusted.** The front end:
//! everything that came with a message is checked before anything changes.

use std::fs::File;
use std::os::fd::AsFd;
use std::rc::Rc;

use ipc::limits::{MAX_CONFIG_SPACE, MAX_MEMORY_REGIONS};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::refusal::Refusal;
use super::region::{clear, kept_end};
use super::{FIRST_KICK, Server};
use crate::device::Device;
use crate::fault::HostFault;
use crate::memory::{GuestRam, Region};
use crate::ring::{Ring, UserAddresses};

impl<D: Device> Server<D> {
    /// Takes queue `index` back from the kernel, if that has it: it is about to be told something else of it.
    fn taken_back(&mut self, index: u32) -> VhostResult<()> {
        let result = self.take_back(|ring| u32::from(ring) == index);
        self.or_fatal(result)
    }

    /// After a message that changes what the kernel serves, before its answer.
    fn settled(&mut self) -> VhostResult<()> {
        let result = self.settle();
        self.or_fatal(result)
    }

    fn drained(&mut self) -> VhostResult<()> {
        let result = self.drain();
        self.or_fatal(result)
    }

    fn unpoll_kick(&mut self, index: usize) {
        if let Some(kick) = self.rings.get_mut(index).and_then(|ring| ring.kick.take()) {
            // A descriptor that was closed elsewhere would be gone from the set already; ours is open until here.
            let _ = self.epoll.delete(&kick);
        }
    }

    fn stop_ring(&mut self, index: usize) -> u16 {
        self.unpoll_kick(index);
        self.rings.get_mut(index).map_or(0, Ring::stop)
    }

    pub(crate) fn set_regions(
        &mut self,
        message: &'static str,
        regions: Vec<Region>,
    ) -> VhostResult<()> {
        let ram = match GuestRam::new(regions) {
            Ok(ram) => Rc::new(ram),
            Err(source) => return Err(self.refuse(&Refusal::Memory { message, source })),
        };
        let taken = self.take_back(|_| true);
        self.or_fatal(taken)?;
        for ring in self
            .rings
            .iter_mut()
            .filter(|r| r.is_started() && !r.is_broken())
        {
            if let Err(kind) = ring.place(&ram) {
                ring.break_with(kind);
            }
        }
        self.ram = Some(ram);
        self.settled()
    }

    /// A region that came with a message; its file is kept only for a process that comes after this one.
    fn kept(&self, region: Region, file: File) -> Region {
        if self.record.is_some() {
            region.with_file(file)
        } else {
            region
        }
    }
}

impl<D: Device> VhostUserBackendReqHandlerMut for Server<D> {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        // Deprecated; the specification tells back ends to ignore it or to disable all rings.
        self.reset_device()
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.drained()?;
        let taken = self.take_back(|_| true);
        self.or_fatal(taken)?;
        for index in 0..self.rings.len() {
            self.unpoll_kick(index);
            self.rings[index].reset();
        }
        self.features = 0;
        self.device.reset();
        self.keep();
        self.poll_backends().map_err(|fault| {
            self.fatal = Some(fault);
            VhostError::BackendInternalError
        })
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        let message = "SET_FEATURES";
        if features & !self.offered() != 0 {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: features & !self.offered(),
                allowed: "bits that GET_FEATURES told",
            }));
        }
        self.features = features;
        ipc::log::debug!("features {features:#x} accepted");
        let taken = self.take_back(|_| true);
        self.or_fatal(taken)?;
        if let Err(source) = self.device.accept(features) {
            return Err(self.refuse(&Refusal::Host { message, source }));
        }
        self.settled()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        let message = "SET_MEM_TABLE";
        // Who did not want it before will not: nobody is left who could watch this process.
        self.userfault = None;
        let mut list = Vec::with_capacity(regions.len());
        for (region, file) in regions.iter().zip(files) {
            match Region::new(
                region.guest_phys_addr,
                region.memory_size,
                region.user_addr,
                &file,
                region.mmap_offset,
            ) {
                Ok(region) => list.push(self.kept(region, file)),
                Err(source) => return Err(self.refuse(&Refusal::Memory { message, source })),
            }
        }
        let bases = list.iter().map(Region::address).collect();
        self.set_regions(message, list)?;
        Ok((postcopy_listening == Some(true)).then_some(bases))
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        let message = "SET_VRING_NUM";
        let ring = self.stopped_ring(message, index)?;
        if u16::try_from(num).is_ok_and(|size| ring.set_size(size)) {
            return Ok(());
        }
        Err(self.refuse(&Refusal::Value {
            message,
            value: u64::from(num),
            allowed: "a power of two up to the device's queue size",
        }))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let message = "SET_VRING_ADDR";
        if !flags.is_empty() {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: u64::from(flags.bits()),
                allowed: "no flags: dirty logging is not offered",
            }));
        }
        self.stopped_ring(message, index)?.addresses = Some(UserAddresses {
            descriptors: descriptor,
            available,
            used,
        });
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        let message = "SET_VRING_BASE";
        let ring = self.stopped_ring(message, index)?;
        if let Ok(base) = u16::try_from(base) {
            ring.base = base;
            return Ok(());
        }
        Err(self.refuse(&Refusal::Value {
            message,
            value: u64::from(base),
            allowed: "0 to 65535",
        }))
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        self.ring("GET_VRING_BASE", index)?;
        self.drained()?;
        self.taken_back(index)?;
        let base = self.stop_ring(index as usize);
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let message = "SET_VRING_KICK";
        let queue = u32::from(index);
        self.ring(message, queue)?;
        let Some(fd) = fd else {
            return Err(self.refuse(&Refusal::NotOffered {
                message: "SET_VRING_KICK without a descriptor (polling)",
            }));
        };
        let Some(ram) = self.ram.clone() else {
            return Err(self.refuse(&Refusal::NoMemory { message }));
        };
        let Some(fd) = self.eventfd(message, Some(fd))? else {
            return Err(self.refuse(&Refusal::NoEvent { message }));
        };
        self.taken_back(queue)?;
        self.unpoll_kick(usize::from(index));
        let event = EpollEvent::new(
            EpollFlags::EPOLLIN | EpollFlags::EPOLLET,
            FIRST_KICK + u64::from(index),
        );
        // Nobody is to wake here for what the kernel serves.
        let outside = self.device.kernel_queue(u16::from(index)).is_some();
        if !outside && let Err(errno) = self.epoll.add(&fd, event) {
            let source = HostFault::of("epoll_ctl")(errno);
            return Err(self.refuse(&Refusal::Host { message, source }));
        }
        let protocol = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let indirect = self.features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0;
        let ring = self.ring(message, queue)?;
        ring.kick = Some(fd);
        ring.outside = outside;
        if ring.is_started() {
            return self.settled();
        }
        // Without protocol features there is no SET_VRING_ENABLE, and a started ring is enabled.
        if !protocol {
            ring.enabled = true;
        }
        if let Err(fault) = ring.start(&ram, event_idx, indirect) {
            ring.break_with(fault.kind);
        }
        ipc::log::debug!("queue {index}: started with {} entries", ring.size());
        self.settled()
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let message = "SET_VRING_CALL";
        self.ring(message, u32::from(index))?;
        let fd = self.eventfd(message, fd)?;
        self.taken_back(u32::from(index))?;
        self.ring(message, u32::from(index))?.set_call(fd);
        self.settled()
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let message = "SET_VRING_ERR";
        self.ring(message, u32::from(index))?;
        let fd = self.eventfd(message, fd)?;
        self.taken_back(u32::from(index))?;
        self.ring(message, u32::from(index))?.error = fd;
        self.settled()
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | if self.device.takes_single_regions() {
                VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            } else {
                VhostUserProtocolFeatures::empty()
            }
            | if self.device.has_state() {
                VhostUserProtocolFeatures::DEVICE_STATE
            } else {
                VhostUserProtocolFeatures::empty()
            }
            | if self.device.window_len() > 0 {
                VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::SHMEM
            } else {
                VhostUserProtocolFeatures::empty()
            }
            | if self.userfault.is_some() {
                VhostUserProtocolFeatures::PAGEFAULT
            } else {
                VhostUserProtocolFeatures::empty()
            })
    }

    fn postcopy_advice(&mut self) -> VhostResult<File> {
        match self.userfault.take() {
            Some(userfault) => Ok(userfault.into()),
            None => Err(self.refuse(&Refusal::NotOffered {
                message: "POSTCOPY_ADVISE",
            })),
        }
    }

    fn postcopy_listen(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn postcopy_end(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn postcopy_ack_mem_regions(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered != 0 {
            return Err(self.refuse(&Refusal::Value {
                message: "SET_PROTOCOL_FEATURES",
                value: features & !offered,
                allowed: "bits that GET_PROTOCOL_FEATURES told",
            }));
        }
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(self.device.told_queues())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.ring("SET_VRING_ENABLE", index)?;
        if !enable {
            self.drained()?;
        }
        let ring = self.ring("SET_VRING_ENABLE", index)?;
        ring.enabled = enable;
        let number = ring.index();
        ipc::log::debug!("queue {index}: enabled {enable}");
        ring.due = ring.is_running();
        self.device.enabled(number, enable);
        if !self.begun {
            // They may have been waiting for this one.
            self.rings.iter_mut().for_each(Ring::want_turn);
        }
        self.settled()
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        flags: VhostUserConfigFlags,
    ) -> VhostResult<Vec<u8>> {
        let (offset, size) = (offset as usize, size as usize);
        if offset > MAX_CONFIG_SPACE || size > MAX_CONFIG_SPACE - offset {
            return Err(self.refuse(&Refusal::Value {
                message: "GET_CONFIG",
                value: (offset as u64).saturating_add(size as u64),
                allowed: "up to 256 bytes",
            }));
        }
        let mut out = vec![0; size];
        // As for SET_CONFIG.
        if flags.contains(VhostUserConfigFlags::LIVE_MIGRATION) {
            self.device.read_config_as_host(offset, &mut out);
        } else {
            self.device.read_config(offset, &mut out);
        }
        Ok(out)
    }

    fn set_config(
        &mut self,
        offset: u32,
        data: &[u8],
        flags: VhostUserConfigFlags,
    ) -> VhostResult<()> {
        let offset = offset as usize;
        if offset > MAX_CONFIG_SPACE || data.len() > MAX_CONFIG_SPACE - offset {
            return Err(self.refuse(&Refusal::Value {
                message: "SET_CONFIG",
                value: (offset as u64).saturating_add(data.len() as u64),
                allowed: "up to 256 bytes",
            }));
        }
        // The specification's word for what is not the driver's doing.
        if flags.contains(VhostUserConfigFlags::LIVE_MIGRATION) {
            self.device.write_config_as_host(offset, data);
            let polled = self.poll_backends();
            self.or_fatal(polled)?;
            return self.settled();
        }
        self.device.write_config(offset, data);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        Err(self.refuse(&Refusal::NotOffered {
            message: "GPU_SET_SOCKET",
        }))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        Err(self.refuse(&Refusal::NotOffered {
            message: "GET_SHARED_OBJECT",
        }))
    }

    fn get_inflight_fd(
        &mut self,
        wanted: &VhostUserInflight,
    ) -> VhostResult<(VhostUserInflight, File)> {
        let message = "GET_INFLIGHT_FD";
        if self.rings.iter().any(Ring::is_started) {
            return Err(self.refuse(&Refusal::Running { message }));
        }
        let size = self.inflight_bytes(message, wanted)?;
        // What is counted goes on.
        let kept = kept_end(&self.device, wanted.num_queues, wanted.queue_size);
        let Some(file) = self.inflight_memory.take() else {
            return Err(self.refuse(&Refusal::InflightAway { message }));
        };
        if std::mem::replace(&mut self.inflight_given, true)
            && let Err(source) = clear(&file, kept as u64)
        {
            return Err(self.refuse(&Refusal::Memory { message, source }));
        }
        let reply = VhostUserInflight::new(size, 0, wanted.num_queues, wanted.queue_size);
        Ok((reply, file))
    }

    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> VhostResult<()> {
        self.use_inflight(region, &file)?;
        // Who asks for one again gets this, emptied.
        self.inflight_given = true;
        self.inflight_memory = Some(file);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(MAX_MEMORY_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<VhostUserMemoryRegionBase>> {
        let message = "ADD_MEM_REG";
        self.userfault = None;
        let mut regions = self
            .ram
            .as_ref()
            .map_or(Vec::new(), |r| r.regions().to_vec());
        match Region::new(
            region.guest_phys_addr,
            region.memory_size,
            region.user_addr,
            &fd,
            region.mmap_offset,
        ) {
            Ok(region) => regions.push(self.kept(region, fd)),
            Err(source) => return Err(self.refuse(&Refusal::Memory { message, source })),
        }
        let base = regions.last().map(Region::address);
        self.set_regions(message, regions)?;
        Ok(base.filter(|_| postcopy_listening == Some(true)))
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        let (guest, size, user) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let message = "REM_MEM_REG";
        let mut regions = self
            .ram
            .as_ref()
            .map_or(Vec::new(), |r| r.regions().to_vec());
        let before = regions.len();
        regions.retain(|r| (r.guest, r.size, r.user) != (guest, size, user));
        if regions.len() == before {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: guest,
                allowed: "a region that was added",
            }));
        }
        self.set_regions(message, regions)
    }

    /// The front end's file is used as it is: all is written, or read, before the reply.
    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        fd: File,
    ) -> VhostResult<Option<File>> {
        let message = "SET_DEVICE_STATE_FD";
        self.state_moved = false;
        if self.protocol_features & VhostUserProtocolFeatures::DEVICE_STATE.bits() == 0 {
            return Err(self.refuse(&Refusal::NotOffered { message }));
        }
        if self.rings.iter().any(Ring::is_started) {
            return Err(self.refuse(&Refusal::Running { message }));
        }
        let moved = match direction {
            VhostTransferStateDirection::SAVE => self.device.save_state(fd.as_fd()),
            VhostTransferStateDirection::LOAD => self.device.load_state(fd.as_fd()),
        };
        match moved {
            Ok(()) => {
                self.state_moved = true;
                Ok(None)
            }
            // The library tells the front end that it failed, and goes on.
            Err(why) => {
                ipc::log::error!("{message}: {why}");
                Err(VhostError::InvalidOperation("device state"))
            }
        }
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        if self.state_moved {
            return Ok(());
        }
        Err(VhostError::InvalidOperation("device state"))
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        match self.device.window_len() {
            0 => Err(self.refuse(&Refusal::NotOffered {
                message: "GET_SHMEM_CONFIG",
            })),
            len => Ok(VhostUserShMemConfig::new(1, &[len])),
        }
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        Err(self.refuse(&Refusal::NotOffered {
            message: "SET_LOG_BASE",
        }))
    }
}
