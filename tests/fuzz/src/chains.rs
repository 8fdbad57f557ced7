//! # Descriptor chains from an input
//!
//! Guest memory is two regions with a hole between them. An input describes a queue: feature bits, size, heads, descriptors,
//! an indirect table, and the bytes that the descriptors point to. Descriptors take 6 bytes, so that a mutation hits
//! something that matters; addresses reach across the end of RAM, and 8 bits of each say where it is wild.

use crate::bytes::Input;
use device_host::Device;
use device_host::fuzzing::{Bench, QueueShape};

/// Guest physical start and bytes of both regions.
pub const REGIONS: [(u64, u64); 2] = [(0, 0x1_0000), (0x2_0000, 0x1_0000)];
/// Parts of the queue; the data is behind them.
pub const TABLE: u64 = 0;
pub const AVAILABLE: u64 = 0x1000;
pub const USED: u64 = 0x2000;
pub const INDIRECT: u64 = 0x3000;
pub const DATA: u64 = 0x4000;

/// A queue as an input describes it.
#[derive(Debug)]
pub struct Queue<'a> {
    /// What the driver would accept.
    pub features: u64,
    /// Entries.
    pub size: u16,
    /// What is made available, in order.
    pub heads: Vec<u16>,
    descriptors: Vec<[u8; 16]>,
    indirect: Vec<[u8; 16]>,
    /// Bytes at [`DATA`].
    pub data: &'a [u8],
}

/// Places that no driver would choose.
const WILD: [u64; 8] = [
    0xffff,
    0x1_ffff,
    0x2_fff8,
    0x3_0000,
    u64::MAX,
    u64::MAX - 15,
    1 << 40,
    TABLE,
];

fn descriptor(input: &mut Input<'_>) -> [u8; 16] {
    let place = input.u16();
    let len = input.u16();
    let flags = input.byte();
    let next = input.byte();
    let mut address = DATA + u64::from(place);
    if flags & 0x08 != 0 {
        address = REGIONS[1].0 + u64::from(place);
    }
    if flags & 0x10 != 0 {
        address = INDIRECT;
    }
    if flags & 0x20 != 0 {
        address = WILD[usize::from(place) % WILD.len()];
    }
    let mut len = u32::from(len);
    if flags & 0x40 != 0 {
        len <<= 16;
    }
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&address.to_le_bytes());
    raw[8..12].copy_from_slice(&len.to_le_bytes());
    // NEXT, WRITE, INDIRECT
    raw[12] = flags & 7;
    raw[14] = next;
    raw
}

impl<'a> Queue<'a> {
    /// Reads the description; what is left of the input is data.
    pub fn read(input: &mut Input<'a>) -> Self {
        let features = input.u64();
        let shape = input.byte();
        let size = 1u16 << (shape % 9);
        let (heads, direct, indirect) = (input.byte() % 33, input.byte() % 65, input.byte() % 65);
        let queue = Self {
            features,
            size,
            heads: (0..heads).map(|_| u16::from(input.byte())).collect(),
            descriptors: (0..direct).map(|_| descriptor(input)).collect(),
            indirect: (0..indirect).map(|_| descriptor(input)).collect(),
            data: input.0,
        };
        input.0 = &[];
        queue
    }

    /// Writes it to guest memory.
    pub fn place<D: Device>(&self, bench: &Bench<D>) {
        bench.write(TABLE, &[0; 0x1000]);
        bench.write(TABLE, self.descriptors.as_flattened());
        bench.write(INDIRECT, &[0; 0x1000]);
        bench.write(INDIRECT, self.indirect.as_flattened());
        let mut available = vec![0; 4];
        available[2..].copy_from_slice(&(self.heads.len() as u16).to_le_bytes());
        for slot in 0..usize::from(self.size) {
            // More heads than entries overwrite the oldest, as a careless driver would.
            let head = self
                .heads
                .iter()
                .skip(slot)
                .step_by(self.size.into())
                .last();
            available.extend(head.copied().unwrap_or(0).to_le_bytes());
        }
        available.extend([0; 2]);
        bench.write(AVAILABLE, &available);
        bench.write(USED, &[0; 0x1000]);
        bench.write(DATA, &self.data[..self.data.len().min(0xc000)]);
    }

    /// Whether no buffer lies in the queue, and no table in a buffer.
    fn is_tidy(&self) -> bool {
        let number = |raw: &[u8]| {
            raw.iter()
                .rev()
                .fold(0u64, |all, byte| all << 8 | u64::from(*byte))
        };
        self.descriptors.iter().chain(&self.indirect).all(|raw| {
            if raw[12] & 4 != 0 {
                number(&raw[..8]) == INDIRECT && number(&raw[8..12]) <= 0x1000
            } else {
                number(&raw[..8]) >= DATA
            }
        })
    }

    /// As queue `index`.
    pub fn shape(&self, index: u16) -> QueueShape {
        QueueShape {
            index,
            size: self.size,
            descriptors: TABLE,
            available: AVAILABLE,
            used: USED,
            base: 0,
        }
    }

    /// What the device has given back: index of the used ring, and its elements. Never more than it was given.
    pub fn used<D: Device>(&self, bench: &Bench<D>) -> Vec<(u32, u32)> {
        // A driver may have the device write to the queue itself; then it is told what it told.
        if !self.is_tidy() {
            return Vec::new();
        }
        let mut index = [0; 2];
        bench.read(USED + 2, &mut index);
        let count = usize::from(u16::from_le_bytes(index));
        assert!(
            count <= self.heads.len(),
            "{count} requests given back of {}",
            self.heads.len()
        );
        let first = count.saturating_sub(self.size.into());
        (first..count)
            .map(|at| {
                let mut element = [0; 8];
                bench.read(
                    USED + 4 + 8 * (at as u64 % u64::from(self.size)),
                    &mut element,
                );
                let [a, b, c, d, e, f, g, h] = element;
                let used = (
                    u32::from_le_bytes([a, b, c, d]),
                    u32::from_le_bytes([e, f, g, h]),
                );
                assert!(
                    self.heads.iter().any(|head| u32::from(*head) == used.0),
                    "{used:?} was never made available"
                );
                used
            })
            .collect()
    }
}
