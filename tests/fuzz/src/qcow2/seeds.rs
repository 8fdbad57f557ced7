//! # First inputs of `qcow2`
//!
//! Images of 64 KiB in clusters of 512 bytes, laid out by hand (qcow2's specification): a header, both tables, one cluster of
//! data and one of every other kind that a version has. Some have a snapshot, whose first table is a copy of the disk's.

use super::{
    COMMIT, DELETE, DISCARD, FLUSH, FROM_END, LIST, RAW_BASE, READ, READONLY, SNAPSHOT, WRITE, ZERO,
};

const CLUSTER: usize = 512;
/// Bytes of the disk: two tables of 64 clusters each.
const SIZE: u64 = 0x1_0000;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Clusters in use; see [`image`].
const USED: usize = 8;
/// 512 bytes of the line "compressed!", deflated without a header.
const DEFLATED: [u8; 19] = [
    0x4b, 0xce, 0xcf, 0x2d, 0x28, 0x4a, 0x2d, 0x2e, 0x4e, 0x4d, 0x51, 0xe4, 0x4a, 0x1e, 0x65, 0x8f,
    0x38, 0x36, 0x00,
];

/// An image. `order`: logarithm of the bits of a reference count, 4 for version 2.
fn image(version: u32, order: u32, compatible: u64, backed: bool) -> Vec<u8> {
    let mut bytes = vec![0; USED * CLUSTER];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb");
    put(4, &version.to_be_bytes());
    if backed {
        put(8, &0x100u64.to_be_bytes());
        put(16, &5u32.to_be_bytes());
        put(0x100, b"below");
    }
    put(20, &9u32.to_be_bytes());
    put(24, &SIZE.to_be_bytes());
    put(36, &2u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    let mut end = 72;
    if version == 3 {
        put(80, &compatible.to_be_bytes());
        put(96, &order.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        end = 104;
    }
    if backed {
        // A header extension: the format of what is below. The end of them is zeroes.
        put(end, &0xe279_2acau32.to_be_bytes());
        put(end + 4, &5u32.to_be_bytes());
        put(end + 8, b"qcow2");
    }
    // 1: the table of reference counts, 2: its only block.
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    let bits = 1usize << order;
    for used in 0..USED {
        let place = 2 * CLUSTER + used * bits / 8;
        if bits < 8 {
            bytes[place] |= 1 << (used * bits % 8);
        } else {
            // Big-endian: its last byte.
            bytes[place + bits / 8 - 1] = 1;
        }
    }
    let mut entry = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    let cluster = |number: u64| number * CLUSTER as u64;
    // 3: L1, 4: L2.
    entry(3 * CLUSTER, cluster(4) | COPIED);
    entry(4 * CLUSTER, cluster(5) | COPIED);
    entry(4 * CLUSTER + 8, cluster(6) | COMPRESSED);
    if version == 3 {
        entry(4 * CLUSTER + 16, 1);
        entry(4 * CLUSTER + 24, cluster(7) | COPIED | 1);
    } else {
        entry(4 * CLUSTER + 24, cluster(7) | COPIED);
    }
    bytes[6 * CLUSTER - 16..6 * CLUSTER].fill(0x11);
    bytes[6 * CLUSTER..][..DEFLATED.len()].copy_from_slice(&DEFLATED);
    bytes
}

/// The snapshots that [`with_snapshots`] adds: their ids and names.
const SNAPSHOTS: [(&str, &str); 2] = [("1", "one"), ("2", "two")];

/// An image of version 3 and 16-bit counts with two snapshots of the disk as it is: behind what it had come the table of snapshots and
/// a copy of the first table for each, and what they share is counted once more for each.
fn with_snapshots() -> Vec<u8> {
    let mut bytes = image(3, 4, 0, false);
    let (table, copies) = (USED, USED + 1);
    bytes.resize((copies + SNAPSHOTS.len()) * CLUSTER, 0);
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(60, &(SNAPSHOTS.len() as u32).to_be_bytes());
    put(64, &((table * CLUSTER) as u64).to_be_bytes());
    let mut at = table * CLUSTER;
    for (number, (id, name)) in SNAPSHOTS.into_iter().enumerate() {
        put(at, &(((copies + number) * CLUSTER) as u64).to_be_bytes());
        put(at + 8, &2u32.to_be_bytes());
        put(at + 12, &(id.len() as u16).to_be_bytes());
        put(at + 14, &(name.len() as u16).to_be_bytes());
        // When; no state of a VM; 16 bytes more: its size in 64 bits, and that of the disk.
        put(at + 16, &[1; 16]);
        put(at + 36, &16u32.to_be_bytes());
        put(at + 48, &SIZE.to_be_bytes());
        put(at + 56, id.as_bytes());
        put(at + 56 + id.len(), name.as_bytes());
        at += (56 + id.len() + name.len()).next_multiple_of(8);
        put(
            (copies + number) * CLUSTER,
            &(4 * CLUSTER as u64).to_be_bytes(),
        );
    }
    // Counts: the second table and what it maps, which are nobody's alone any more, then what is new.
    for cluster in 4..USED {
        put(2 * CLUSTER + 2 * cluster, &3u16.to_be_bytes());
    }
    for cluster in USED..copies + SNAPSHOTS.len() {
        put(2 * CLUSTER + 2 * cluster, &1u16.to_be_bytes());
    }
    for shared in [3 * CLUSTER, 4 * CLUSTER, 4 * CLUSTER + 24] {
        bytes[shared] &= 0x7f;
    }
    bytes
}

fn operation(kind: u8, sector: u16, more: u8) -> [u8; 4] {
    let [low, high] = sector.to_le_bytes();
    [kind, low, high, more]
}

/// As the target reads an image: where it is not zero.
fn pieces(image: &[u8]) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(skip) = image[at..].iter().position(|byte| *byte != 0) {
        at += skip;
        let rest = &image[at..image.len().min(at + 255)];
        // Fewer zeroes than a piece's own head cost nothing.
        let len = rest
            .windows(4)
            .position(|window| window == [0; 4])
            .unwrap_or(rest.len());
        let place = (at as u16).to_le_bytes();
        out.push([&place[..], &[len as u8], &rest[..len]].concat());
        at += len;
    }
    // An image is as long as its last piece says.
    let end = (image.len() - 1) as u16;
    out.push([&end.to_le_bytes()[..], &[1], &image[image.len() - 1..]].concat());
    out
}

fn input(kind: u8, operations: &[[u8; 4]], below: &[Vec<u8>], top: &[u8]) -> Vec<u8> {
    let mut out = vec![kind, operations.len() as u8];
    out.extend(operations.as_flattened());
    for image in below {
        let pieces = pieces(image);
        out.push(pieces.len() as u8);
        out.extend(pieces.concat());
    }
    out.extend(pieces(top).concat());
    out
}

/// All of them.
pub fn all() -> Vec<Vec<u8>> {
    let guest = [
        operation(READ, 0, 7),
        operation(WRITE, 1, 0),
        operation(WRITE, 6, 9),
        operation(READ, 0, 127),
        operation(ZERO, 0, 3),
        operation(DISCARD, 5, 4),
        operation(WRITE | FROM_END, 0, 0),
        operation(COMMIT, 0, 0),
        operation(FLUSH, 0, 0),
    ];
    let few = [
        operation(READ, 0, 127),
        operation(WRITE, 2, 3),
        operation(READ, 1, 3),
        operation(FLUSH, 0, 0),
    ];
    let mut inputs = vec![
        input(0, &guest, &[], &image(2, 4, 0, false)),
        input(READONLY, &guest, &[], &image(3, 4, 0, false)),
        // Lazy reference counts.
        input(0, &guest, &[], &image(3, 4, 1, false)),
    ];
    for order in 0..=6 {
        inputs.push(input(0, &guest, &[], &image(3, order, 0, false)));
    }
    let raw = [[0x22; 16], [0; 16]].concat().repeat(2);
    let base = image(3, 4, 0, false);
    let middle = image(2, 4, 0, true);
    let top = image(3, 4, 0, true);
    inputs.extend([
        input(1 | RAW_BASE, &guest, std::slice::from_ref(&raw), &top),
        input(1, &guest, std::slice::from_ref(&base), &top),
        input(1 | READONLY, &guest, std::slice::from_ref(&base), &middle),
        // Without a name for what it is given.
        input(1, &guest, std::slice::from_ref(&base), &base),
        input(2, &few, &[middle, base], &top),
    ]);
    let name = |number: u16| 2 * number;
    let id = |number: u16| 2 * number + 1;
    let orders = [
        operation(LIST, 0, 0),
        operation(SNAPSHOT, name(0), 0),
        operation(WRITE, 0, 7),
        operation(DELETE, name(2), 0),
        operation(SNAPSHOT, name(2), 0),
        operation(DISCARD, 0, 3),
        operation(DELETE, id(1), 0),
        operation(LIST, 0, 0),
        operation(READ, 0, 127),
        operation(FLUSH, 0, 0),
    ];
    let snapshots = with_snapshots();
    inputs.extend([
        input(0, &orders, &[], &snapshots),
        input(READONLY, &orders, &[], &snapshots),
        input(0, &orders, &[], &image(2, 4, 0, false)),
        // Counts of one bit have no room for a second reference.
        input(0, &orders, &[], &image(3, 0, 0, false)),
        input(1 | RAW_BASE, &orders, std::slice::from_ref(&raw), &top),
    ]);
    inputs
}
