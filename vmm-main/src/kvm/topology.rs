//! How vCPUs are grouped into sockets, dies, clusters, cores and threads.
//!
//! Job: turn a vCPU's number into its APIC id and tell CPUID how wide each level of that id is.
//! Who is not trusted: the numbers come from the command line; every product is checked.
//! Why this way: each level takes whole bits of the APIC id (Intel SDM 3A, 10.9 "Programming considerations for
//! hardware multi-threading"), which is how every operating system takes ids apart again. Levels whose size is no
//! power of two therefore leave gaps, and the largest id, not the number of vCPUs, meets the 8-bit limit.

use crate::machine::layout::MAX_VCPUS;

/// What is wrong with a `-smp` value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the message of each variant says all there is to say
pub enum Error {
    #[error("{0} vCPUs are out of range: 1 to {MAX_VCPUS}")]
    Count(u32),
    #[error("{level} must be at least 1")]
    Zero { level: &'static str },
    #[error(
        "sockets * dies * clusters * cores * threads = {product} is out of range: {cpus} vCPUs to {MAX_VCPUS}"
    )]
    Product { product: u64, cpus: u32 },
    #[error(
        "this grouping needs APIC ids up to {largest}, at most {} are possible: choose powers of two for all levels but sockets",
        MAX_VCPUS - 1
    )]
    ApicId { largest: u64 },
}

/// The grouping of vCPUs; every value is at least 1 and their product (`maxcpus`) is at least the number of vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    cpus: u32,
    /// Packages.
    sockets: u32,
    /// Dies per socket.
    dies: u32,
    /// Clusters (Intel: modules) per die.
    clusters: u32,
    /// Cores per cluster.
    cores: u32,
    /// Threads per core.
    threads: u32,
}

const fn bits_for(count: u32) -> u32 {
    u32::BITS - (count - 1).leading_zeros()
}

impl Topology {
    /// One socket with `cpus` cores, as `-smp N` without further keys means.
    ///
    /// # Errors
    /// `cpus` is not in 1..=254.
    pub fn flat(cpus: u32) -> Result<Self, Error> {
        Self::new(cpus, 1, 1, 1, cpus, 1)
    }

    /// A grouping of `cpus` vCPUs.
    ///
    /// # Errors
    /// A value out of range, a product below `cpus` or above 254, or ids that do not fit 8 bits.
    pub fn new(
        cpus: u32,
        sockets: u32,
        dies: u32,
        clusters: u32,
        cores: u32,
        threads: u32,
    ) -> Result<Self, Error> {
        if !(1..=MAX_VCPUS).contains(&cpus) {
            return Err(Error::Count(cpus));
        }
        let levels = [
            ("sockets", sockets),
            ("dies", dies),
            ("clusters", clusters),
            ("cores", cores),
            ("threads", threads),
        ];
        if let Some((level, _)) = levels.iter().find(|(_, count)| *count == 0) {
            return Err(Error::Zero { level });
        }
        let product = levels.iter().fold(1u64, |product, (_, count)| {
            product.saturating_mul(u64::from(*count))
        });
        if !(u64::from(cpus)..=u64::from(MAX_VCPUS)).contains(&product) {
            return Err(Error::Product { product, cpus });
        }
        let topology = Self {
            cpus,
            sockets,
            dies,
            clusters,
            cores,
            threads,
        };
        let largest = u64::from(topology.apic_id(cpus - 1));
        if largest >= u64::from(MAX_VCPUS) {
            return Err(Error::ApicId { largest });
        }
        Ok(topology)
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        self.cpus
    }

    /// Packages.
    #[must_use]
    pub fn sockets(&self) -> u32 {
        self.sockets
    }

    /// Dies per package.
    #[must_use]
    pub fn dies(&self) -> u32 {
        self.dies
    }

    /// Clusters per die.
    #[must_use]
    pub fn clusters(&self) -> u32 {
        self.clusters
    }

    /// Threads per core.
    #[must_use]
    pub fn threads(&self) -> u32 {
        self.threads
    }

    /// Logical processors per die.
    #[must_use]
    pub fn threads_per_die(&self) -> u32 {
        self.clusters * self.cores * self.threads
    }

    /// Logical processors per cluster.
    #[must_use]
    pub fn threads_per_cluster(&self) -> u32 {
        self.cores * self.threads
    }

    /// Logical processors per package.
    #[must_use]
    pub fn threads_per_socket(&self) -> u32 {
        self.dies * self.threads_per_die()
    }

    /// Bits of the APIC id that name the thread within its core.
    #[must_use]
    pub fn core_shift(&self) -> u32 {
        bits_for(self.threads)
    }

    /// Bits of the APIC id below the cluster's number.
    #[must_use]
    pub fn cluster_shift(&self) -> u32 {
        self.core_shift() + bits_for(self.cores)
    }

    /// Bits of the APIC id below the die's number.
    #[must_use]
    pub fn die_shift(&self) -> u32 {
        self.cluster_shift() + bits_for(self.clusters)
    }

    /// Bits of the APIC id below the package's number.
    #[must_use]
    pub fn socket_shift(&self) -> u32 {
        self.die_shift() + bits_for(self.dies)
    }

    /// APIC id of vCPU `index` (0-based, below [`Self::cpus`]).
    #[must_use]
    pub fn apic_id(&self, index: u32) -> u32 {
        let thread = index % self.threads;
        let core = index / self.threads % self.cores;
        let cluster = index / (self.threads * self.cores) % self.clusters;
        let die = index / self.threads_per_die() % self.dies;
        let socket = index / self.threads_per_socket();
        (socket << self.socket_shift())
            | (die << self.die_shift())
            | (cluster << self.cluster_shift())
            | (core << self.core_shift())
            | thread
    }

    /// APIC ids of all vCPUs in order.
    pub fn apic_ids(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.cpus).map(|index| self.apic_id(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_ids_count_up() {
        for cpus in [1, 2, 3, 254] {
            let ids: Vec<_> = Topology::flat(cpus).unwrap().apic_ids().collect();
            assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
        }
    }

    #[test]
    fn levels_take_whole_bits() {
        // 2 sockets of 3 cores of 2 threads: the core field is 2 bits wide and its value 3 stays unused.
        let topology = Topology::new(12, 2, 1, 1, 3, 2).unwrap();
        assert_eq!(
            topology.apic_ids().collect::<Vec<_>>(),
            [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]
        );
        assert_eq!((topology.core_shift(), topology.socket_shift()), (1, 3));
        let topology = Topology::new(32, 2, 2, 2, 2, 2).unwrap();
        assert_eq!(topology.apic_id(31), 31);
        assert_eq!(
            (
                topology.cluster_shift(),
                topology.die_shift(),
                topology.socket_shift()
            ),
            (2, 3, 4)
        );
    }

    #[test]
    fn wrong_groupings_name_the_numbers() {
        assert_eq!(Topology::flat(0), Err(Error::Count(0)));
        assert_eq!(Topology::flat(255), Err(Error::Count(255)));
        assert_eq!(
            Topology::new(4, 1, 1, 1, 3, 1),
            Err(Error::Product {
                product: 3,
                cpus: 4
            })
        );
        assert_eq!(
            Topology::new(4, 4, 0, 1, 1, 1),
            Err(Error::Zero { level: "dies" })
        );
        assert!(matches!(
            Topology::new(4, u32::MAX, u32::MAX, u32::MAX, u32::MAX, u32::MAX),
            Err(Error::Product { .. })
        ));
        assert!(
            Topology::new(2, 4, 1, 1, 1, 1).is_ok(),
            "maxcpus may exceed cpus"
        );
        // 84 sockets of 3 cores: ids reach 83 * 4 + 2.
        assert_eq!(
            Topology::new(252, 84, 1, 1, 3, 1),
            Err(Error::ApicId { largest: 334 })
        );
    }
}
