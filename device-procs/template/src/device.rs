//! The device.

use device_host::{BackendFds, Chain, Device, DeviceFault, HostFault, Ring};
use ipc::limits::DEFAULT_QUEUE_SIZE;
use ipc::spec::DeviceSpec;
use ipc::start::StartMessage;

use crate::error::BuildError;

/// Most bytes that one request gets back. The copy is on the stack: no request allocates.
pub(crate) const ECHO_MAX: usize = 4096;

/// Answers what it is told.
#[derive(Debug)]
pub(crate) struct Template {
    greeting: [u8; 4],
}

impl Template {
    /// From the start message; this device has no back end, so it takes no descriptor.
    pub(crate) fn build(start: &StartMessage, _fds: &mut BackendFds) -> Result<Self, BuildError> {
        let DeviceSpec::Template(spec) = &start.device else {
            return Err(BuildError::NotATemplate);
        };
        Ok(Self {
            greeting: spec.greeting,
        })
    }
}

impl Device for Template {
    fn features(&self) -> u64 {
        0
    }

    fn num_queues(&self) -> u16 {
        1
    }

    fn max_queue_size(&self) -> u16 {
        DEFAULT_QUEUE_SIZE
    }

    fn accept(&mut self, _features: u64) -> Result<(), HostFault> {
        Ok(())
    }

    fn read_config(&self, offset: usize, out: &mut [u8]) {
        device_host::copy_config(&self.greeting, offset, out);
    }

    fn process_queue(&mut self, ring: &mut Ring) -> Result<(), DeviceFault> {
        while let Some(Chain {
            token,
            mut readable,
            mut writable,
        }) = ring.pop()?
        {
            // One copy out of shared memory; what the guest writes there afterwards changes nothing.
            let mut copy = [0; ECHO_MAX];
            let len = readable.read(&mut copy);
            let written = writable.write(&copy[..len]);
            // At most ECHO_MAX.
            ring.complete(token, written as u32)?;
        }
        Ok(())
    }
}
