//! The header of a qcow2 image, as far as it decides how much memory the image costs.
//!
//! **Job.** Checks magic, version, cluster size and the lengths of the two tables that are held in memory (qcow2's
//! specification, "Header"), and adds up what a chain of images takes. **Who is not trusted.** The image. **Why this way.** The
//! process has a limit on its memory, and running into it ends it without a reason; a table of 32 MiB in an image of 1 MiB is refused
//! here, by a message that names the number.

use thiserror::Error;

use crate::storage::MAGIC;

/// Bytes of the header that every version has.
pub(crate) const BYTES: usize = 72;

/// Bytes that the tables and caches of all images of a disk may take: three quarters of what its process may.
const MAX_MEMORY: u64 = ipc::limits::MAX_DEVICE_MEMORY / 4 * 3;

/// Clusters of tables that are cached for each image: 128 with mappings, 32 with reference counts.
const CACHED_CLUSTERS: u64 = 160;

/// Why an image is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum HeaderError {
    /// Another format.
    #[error("it does not begin as a qcow2 image does")]
    Magic,
    /// A version that is not known.
    #[error("qcow2 version {0}; allowed: 2, 3")]
    Version(u32),
    /// Clusters of an impossible size.
    #[error("clusters of 2^{0} bytes; allowed: 2^9 to 2^21")]
    ClusterBits(u32),
    /// Counts of an impossible width.
    #[error("reference counts of 2^{0} bits; allowed: 2^0 to 2^6")]
    CountOrder(u32),
    /// Nobody has the key.
    #[error("it is encrypted, which is not supported")]
    Encrypted,
    /// A file that would have to be opened.
    #[error("its data is in another file, which is not supported")]
    ExternalData,
    /// It was not closed, and its counts of references are not to be trusted.
    #[error("it is marked as corrupt or as not closed: repair it with qemu-img check -r all")]
    NotClean,
    /// The disk is longer than its first table can map.
    #[error(
        "a disk of {size} bytes with a table of {entries} entries for clusters of {cluster} bytes"
    )]
    Table {
        /// Bytes of the disk.
        size: u64,
        /// Entries of the L1 table.
        entries: u32,
        /// Bytes of a cluster.
        cluster: u64,
    },
    /// Its tables do not fit.
    #[error(
        "its tables and their cache take {0} bytes of memory; allowed for all images of a disk: {MAX_MEMORY}"
    )]
    Memory(u64),
}

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// What it takes.
    pub(crate) cost: Cost,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Bytes of a cluster.
    pub(crate) cluster: u64,
    /// Snapshots inside of it, with tables for a disk of this size.
    pub(crate) snapshots: Snapshots,
    /// It names a file that is below it.
    pub(crate) names_backing: bool,
    /// Where its own tables are.
    pub(crate) tables: Tables,
}

/// Places in an image, as its header gives them: nothing says that they are in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tables {
    /// The L1 table, and its entries of 8 bytes.
    pub(crate) l1: u64,
    pub(crate) entries: u32,
    /// The refcount table, and its clusters.
    pub(crate) counts: u64,
    pub(crate) count_clusters: u32,
    /// A count has 2 to the power of this many bits: 0 to 6.
    pub(crate) count_order: u32,
}

/// The table of an image's snapshots, as the header gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Snapshots {
    /// Its entries.
    pub(crate) count: u32,
    /// Where it is.
    pub(crate) place: u64,
}

/// Bytes of memory that images take at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Cost {
    /// As long as they are open.
    kept: u64,
    /// The largest of their tables, of which there are two copies while it is read.
    table: u64,
}

impl Cost {
    /// That of these images and of another one together.
    ///
    /// # Errors
    /// It is more than a process may have.
    pub(crate) fn with(self, other: Self) -> Result<Self, HeaderError> {
        let both = Self {
            kept: self.kept + other.kept,
            table: self.table.max(other.table),
        };
        match both.kept + both.table {
            memory if memory > MAX_MEMORY => Err(HeaderError::Memory(memory)),
            _ => Ok(both),
        }
    }
}

impl Header {
    /// What the image takes beside that when its first table is made to map `size` bytes: the new one, and the old one until then.
    pub(crate) fn cost_of_growth(&self, size: u64) -> Cost {
        let mapped = self.cluster / 8 * self.cluster;
        let maps = (size.div_ceil(mapped) * 8).next_multiple_of(self.cluster);
        Cost {
            kept: maps,
            table: maps,
        }
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

/// Bytes of what follows in version 3, as far as it is looked at.
pub(crate) const MORE: usize = 32;
/// Bits of a count in version 2: 2 to the power of this.
const COUNT_ORDER: u32 = 4;

/// Checks the first bytes of an image, and those that follow, which mean something else in version 2.
pub(crate) fn check(bytes: &[u8; BYTES], more: &[u8; MORE]) -> Result<Header, HeaderError> {
    if bytes[..4] != MAGIC {
        return Err(HeaderError::Magic);
    }
    let version = be32(bytes, 4);
    if !(2..=3).contains(&version) {
        return Err(HeaderError::Version(version));
    }
    let bits = be32(bytes, 20);
    if !(9..=21).contains(&bits) {
        return Err(HeaderError::ClusterBits(bits));
    }
    if be32(bytes, 32) != 0 {
        return Err(HeaderError::Encrypted);
    }
    // "incompatible_features" and "refcount_order" of qcow2's specification.
    let (incompatible, count_order) = match version {
        3 => (be64(more, 0), be32(more, 24)),
        _ => (0, COUNT_ORDER),
    };
    if count_order > 6 {
        return Err(HeaderError::CountOrder(count_order));
    }
    if incompatible & 0b011 != 0 {
        return Err(HeaderError::NotClean);
    }
    if incompatible & 0b100 != 0 {
        return Err(HeaderError::ExternalData);
    }
    let cluster = 1u64 << bits;
    let (size, entries) = (be64(bytes, 24), be32(bytes, 36));
    // Each entry maps a cluster full of entries of 8 bytes, each of which maps a cluster.
    let mapped = u128::from(entries) * u128::from(cluster / 8) * u128::from(cluster);
    if u128::from(size) > mapped || size > i64::MAX as u64 {
        return Err(HeaderError::Table {
            size,
            entries,
            cluster,
        });
    }
    let counts = u64::from(be32(bytes, 56)) * cluster;
    let maps = u64::from(entries) * 8;
    let own = Cost {
        kept: CACHED_CLUSTERS * cluster + maps + counts,
        table: maps.max(counts),
    };
    Ok(Header {
        cost: Cost::default().with(own)?,
        size,
        cluster,
        snapshots: Snapshots {
            count: be32(bytes, 60),
            place: be64(bytes, 64),
        },
        names_backing: be64(bytes, 8) != 0,
        tables: Tables {
            l1: be64(bytes, 40),
            entries,
            counts: be64(bytes, 48),
            count_clusters: be32(bytes, 56),
            count_order,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        bytes[7] = 3;
        bytes[23] = 16;
        bytes[28..32].copy_from_slice(&(1u32 << 30).to_be_bytes());
        bytes[39] = 2;
        bytes[59] = 1;
        bytes
    }

    fn more(incompatible: u64, count_order: u32) -> [u8; MORE] {
        let mut more = [0; MORE];
        more[..8].copy_from_slice(&incompatible.to_be_bytes());
        more[24..28].copy_from_slice(&count_order.to_be_bytes());
        more
    }

    #[test]
    fn what_an_image_may_cost_is_bounded() {
        let found = check(&good(), &more(0, 4)).unwrap();
        let one = Cost {
            kept: 160 * 65536 + 16 + 65536,
            table: 65536,
        };
        assert_eq!(found.cost, one);
        let nine = (1..9).try_fold(one, |all, _| all.with(one)).unwrap();
        assert_eq!((nine.kept, nine.table), (9 * one.kept, one.table));
        assert!(matches!(nine.with(one), Err(HeaderError::Memory(_))));
        assert!(!found.names_backing);
        let refused = |at: usize, value: u32, wanted: fn(&HeaderError) -> bool| {
            let mut bytes = good();
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            let error = check(&bytes, &more(0, 4)).unwrap_err();
            assert!(wanted(&error), "{at}: {error}");
        };
        refused(0, 0, |e| *e == HeaderError::Magic);
        refused(4, 4, |e| *e == HeaderError::Version(4));
        refused(20, 8, |e| *e == HeaderError::ClusterBits(8));
        refused(20, 22, |e| *e == HeaderError::ClusterBits(22));
        refused(20, u32::MAX, |e| *e == HeaderError::ClusterBits(u32::MAX));
        refused(20, 21, |e| matches!(e, HeaderError::Memory(_)));
        refused(24, u32::MAX, |e| matches!(e, HeaderError::Table { .. }));
        refused(32, 1, |e| *e == HeaderError::Encrypted);
        refused(36, 1, |e| {
            matches!(e, HeaderError::Table { entries: 1, .. })
        });
        refused(36, u32::MAX, |e| matches!(e, HeaderError::Memory(_)));
        refused(56, u32::MAX, |e| matches!(e, HeaderError::Memory(_)));
        let mut bytes = good();
        bytes[63] = 1;
        bytes[71] = 7;
        let with = check(&bytes, &more(0, 4)).unwrap().snapshots;
        assert_eq!((with.count, with.place), (1, 7));
        assert_eq!(found.snapshots, Snapshots::default());
        assert_eq!(found.tables.count_order, 4);
        let error = check(&good(), &more(0, 7)).unwrap_err();
        assert_eq!(error, HeaderError::CountOrder(7));
        // Of version 2 all that follows is something else.
        bytes[7] = 2;
        let old = check(&bytes, &[0xff; MORE]).unwrap();
        assert_eq!(old.tables.count_order, 4);
        for (bits, wanted) in [
            (1, HeaderError::NotClean),
            (2, HeaderError::NotClean),
            (4, HeaderError::ExternalData),
        ] {
            assert_eq!(check(&good(), &more(bits, 4)), Err(wanted));
        }
    }
}
