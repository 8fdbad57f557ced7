//! Routing of guest accesses to devices.
//!
//! Job: find the device whose range holds an address.
//! Who is not trusted: the guest chooses addresses and sizes; an access that does not fit into one device's range
//! reads as all ones and is otherwise ignored.
//! Why this way: each device has its own lock, so vCPUs that use different devices do not wait for each other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// A device behind a range of addresses or ports.
pub trait BusDevice {
    /// Fills `data` (1 to 8 bytes) with what the guest reads `offset` bytes into the range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes `offset` bytes into the range.
    fn write(&mut self, offset: u64, data: &[u8]);
    /// Returns to the state at power-on. Called with all vCPUs parked, before RAM is emptied: a device that lets others
    /// use guest RAM must have stopped them when this returns.
    fn reset(&mut self) {}
}

/// A device as buses hold it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice + Send>>;

/// A range that cannot be added to a bus.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the message of each variant says all there is to say
pub enum Error {
    #[error("bus range of {size} bytes at {base:#x} is empty or overflows")]
    Range { base: u64, size: u64 },
    #[error("bus range {base:#x} to {end:#x} overlaps {other_base:#x} to {other_end:#x}")]
    Overlap {
        base: u64,
        end: u64,
        other_base: u64,
        other_end: u64,
    },
}

struct Range {
    base: u64,
    end: u64,
    device: SharedDevice,
}

/// Devices by address. Ranges are half open and do not overlap.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Vec<Range>>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(
                self.ranges()
                    .iter()
                    .map(|range| format!("{:#x}..{:#x}", range.base, range.end)),
            )
            .finish()
    }
}

// A panic aborts the process, so poisoned locks cannot be seen.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    fn ranges(&self) -> std::sync::RwLockReadGuard<'_, Vec<Range>> {
        self.ranges.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a device.
    ///
    /// # Errors
    /// The range is empty, overflows or overlaps another.
    pub fn add(&self, base: u64, size: u64, device: SharedDevice) -> Result<(), Error> {
        let end = base
            .checked_add(size)
            .filter(|end| *end > base)
            .ok_or(Error::Range { base, size })?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let position = ranges.partition_point(|range| range.base < base);
        let neighbours = [position.checked_sub(1), Some(position)];
        if let Some(other) = neighbours
            .into_iter()
            .flatten()
            .filter_map(|index| ranges.get(index))
            .find(|other| other.base < end && base < other.end)
        {
            return Err(Error::Overlap {
                base,
                end,
                other_base: other.base,
                other_end: other.end,
            });
        }
        ranges.insert(position, Range { base, end, device });
        Ok(())
    }

    /// Takes the device off whose range begins at `base`. An access that is under way ends first or reaches it once more.
    pub fn remove(&self, base: u64) {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        ranges.retain(|range| range.base != base);
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, SharedDevice)> {
        let ranges = self.ranges();
        let index = ranges
            .partition_point(|range| range.base <= address)
            .checked_sub(1)?;
        let range = ranges.get(index)?;
        let end = address.checked_add(length as u64)?;
        (end <= range.end).then(|| (address - range.base, range.device.clone()))
    }

    /// The guest reads.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => lock(&device).read(offset, data),
            None => data.fill(0xFF),
        }
    }

    /// The guest writes.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            lock(&device).write(offset, data);
        }
    }

    /// Resets all devices in the order of their addresses.
    pub fn reset(&self) {
        let devices: Vec<_> = self
            .ranges()
            .iter()
            .map(|range| range.device.clone())
            .collect();
        for device in devices {
            lock(&device).reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Vec<(u64, Vec<u8>)>);
    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
        fn reset(&mut self) {
            self.0.clear();
        }
    }

    #[test]
    fn accesses_reach_the_device_that_holds_them() {
        let bus = Bus::default();
        let device = Arc::new(Mutex::new(Recorder::default()));
        bus.add(0x2000, 0x10, Arc::new(Mutex::new(Recorder::default())))
            .unwrap();
        bus.add(0x1000, 0x10, device.clone()).unwrap();
        let read = |address, length| {
            let mut data = vec![0xAA; length];
            bus.read(address, &mut data);
            data
        };
        assert_eq!(read(0x100C, 4), [0xC; 4]);
        assert_eq!(read(0x100D, 4), [0xFF; 4], "crosses the end");
        assert_eq!(read(0xFFF, 1), [0xFF]);
        assert_eq!(read(0x2000, 1), [0]);
        assert_eq!(read(u64::MAX, 8), [0xFF; 8]);
        bus.write(0x1004, &[1, 2]);
        bus.write(0x1010, &[3]);
        assert_eq!(device.lock().unwrap().0, [(4, vec![1, 2])]);
        bus.reset();
        assert!(device.lock().unwrap().0.is_empty());
        bus.remove(0x1000);
        bus.write(0x1004, &[1]);
        assert!(device.lock().unwrap().0.is_empty());
        bus.add(0x1000, 0x10, device).unwrap();
    }

    #[test]
    fn overlaps_are_refused_from_either_side() {
        let bus = Bus::default();
        let device = || Arc::new(Mutex::new(Recorder::default()));
        bus.add(0x1000, 0x1000, device()).unwrap();
        for (base, size) in [
            (0x1000, 0x1000),
            (0xFFF, 2),
            (0x1FFF, 1),
            (0, 0x10_0000),
            (0x1800, 1),
        ] {
            assert!(
                matches!(bus.add(base, size, device()), Err(Error::Overlap { .. })),
                "{base:#x}"
            );
        }
        assert!(matches!(bus.add(0, 0, device()), Err(Error::Range { .. })));
        assert!(matches!(
            bus.add(u64::MAX, 2, device()),
            Err(Error::Range { .. })
        ));
        bus.add(0x2000, 1, device()).unwrap();
        bus.add(0xFFF, 1, device()).unwrap();
    }
}
