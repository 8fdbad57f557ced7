//! Tables that are in use and not counted.
//!
//! **Job.** Before an image is opened for writing, gives each table of mappings that is in use at least one reference in the image's
//! counts (qcow2's specification, "Host cluster management").
//! **Who is not trusted.** The image: its tables may be anywhere and name anything. What lies outside of the counts is left to
//! `imago`, which refuses it.
//! **Why this way.** `imago` makes a table known, by the header or by the table above, before it writes that its clusters are taken. A
//! process that is killed between the two leaves a table in clusters that count as free, and the next process would give them to
//! something else. Data has no such gap. The other way round, a cluster that is counted and not used, costs nothing but its space.

use std::io;

use imago::StorageExt;

use crate::header::Header;
use crate::refcounts::{Counts, be64};
use crate::storage::Descriptor;

/// Bits of an entry of the L1 table that are an offset: 9 to 55.
const L2_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Entries of the L1 table that are read at a time.
const ENTRIES: usize = 512;

/// Counts what is in use and not counted, and gives how many clusters that were.
///
/// # Errors
/// The image cannot be read or written.
pub(crate) fn complete(file: &Descriptor, header: &Header) -> io::Result<u64> {
    let tables = &header.tables;
    let mut counts = Counts::new(file, header);
    let mut added = 0;
    let mut at_least_one = |offset: u64| -> io::Result<()> {
        let cluster = offset / header.cluster;
        if counts.get(cluster)? == Some(0) {
            counts.add(cluster, 1)?;
            added += 1;
        }
        Ok(())
    };
    let bytes = u64::from(tables.entries) * 8;
    for part in 0..bytes.div_ceil(header.cluster) {
        at_least_one(tables.l1.saturating_add(part * header.cluster))?;
    }
    let mut some = [0; ENTRIES * 8];
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(some.len() as u64) as usize;
        let Some(place) = tables.l1.checked_add(at) else {
            break;
        };
        file.read(&mut some[..length], place)?;
        for entry in some[..length].chunks_exact(8) {
            let table = be64(entry) & L2_OFFSET;
            if table != 0 {
                at_least_one(table)?;
            }
        }
        at += length as u64;
    }
    if added > 0 {
        counts.write_back()?;
        imago::Storage::sync(file)?;
    }
    Ok(added)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Tables;
    use std::os::unix::fs::FileExt;

    const CLUSTER: u64 = 512;

    /// Of 512 bytes each: a header, the counts' table, a block of counts, an L1 table with one entry, and its table.
    fn image(order: u32, entry: u64) -> (std::fs::File, Descriptor, Header) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5 * CLUSTER).unwrap();
        file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER)
            .unwrap();
        file.write_all_at(&entry.to_be_bytes(), 3 * CLUSTER)
            .unwrap();
        let descriptor = Descriptor::new(file.try_clone().unwrap().into(), false).unwrap();
        let header = Header {
            cost: crate::header::Cost::default(),
            size: 1 << 15,
            cluster: CLUSTER,
            snapshots: crate::header::Snapshots::default(),
            names_backing: false,
            tables: Tables {
                l1: 3 * CLUSTER,
                entries: 1,
                counts: CLUSTER,
                count_clusters: 1,
                count_order: order,
            },
        };
        (file, descriptor, header)
    }

    /// The counts from the first on, as bytes.
    fn counts(file: &std::fs::File, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, 2 * CLUSTER).unwrap();
        bytes
    }

    #[test]
    fn tables_without_a_count_get_one_of_any_width() {
        let in_use = (4 * CLUSTER) | (1 << 63);
        for (order, wanted) in [
            (0, vec![0b0001_1000]),
            (1, vec![0b0100_0000, 0b01]),
            (2, vec![0, 0x10, 0x01]),
            (3, vec![0, 0, 0, 1, 1]),
            (4, vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 1]),
        ] {
            let (file, descriptor, header) = image(order, in_use);
            assert_eq!(complete(&descriptor, &header).unwrap(), 2, "order {order}");
            assert_eq!(counts(&file, wanted.len()), wanted, "order {order}");
            assert_eq!(complete(&descriptor, &header).unwrap(), 0, "order {order}");
        }
    }

    #[test]
    fn counts_that_are_there_stay() {
        let (file, descriptor, header) = image(4, 4 * CLUSTER);
        let there = [9u8; 10];
        file.write_all_at(&there, 2 * CLUSTER).unwrap();
        assert_eq!(complete(&descriptor, &header).unwrap(), 0);
        assert_eq!(counts(&file, 10), there);
    }

    #[test]
    fn places_outside_of_the_counts_are_left_alone() {
        let (file, descriptor, header) = image(6, L2_OFFSET);
        let before = counts(&file, 512);
        // The first table is counted, the one that is nowhere is not.
        assert_eq!(complete(&descriptor, &header).unwrap(), 1);
        assert_ne!(counts(&file, 512), before);
        // Nor does an image grow for counts that are said to lie behind its end.
        file.write_all_at(&(1u64 << 40).to_be_bytes(), CLUSTER)
            .unwrap();
        assert_eq!(complete(&descriptor, &header).unwrap(), 0);
        assert_eq!(file.metadata().unwrap().len(), 5 * CLUSTER);
        let nowhere = Header {
            tables: Tables {
                l1: u64::MAX - 7,
                counts: u64::MAX - 7,
                ..header.tables
            },
            ..header
        };
        let _ = complete(&descriptor, &nowhere);
        assert_eq!(file.metadata().unwrap().len(), 5 * CLUSTER);
    }
}
