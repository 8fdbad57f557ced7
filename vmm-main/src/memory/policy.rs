//! Which of the host's memory nodes pages of guest RAM come from.
//!
//! **Job.** Gives a range of a memory file its policy (`mbind(2)`, `set_mempolicy(2)` names the modes).
//! **Who is not trusted**: nobody; the command line says which nodes.
//! **Why this way.** A memfd and a file of a tmpfs or hugetlbfs keep the policy of a range for all who map it, so one call by
//! the control process holds for all device processes, and none of those needs the call.

#![allow(unsafe_code)] // mbind and get_mempolicy have no wrapper

use ipc::spec::cpus::{MAX_CPUS, NodeList};
use ipc::spec::vm::MemoryPolicy;
use nix::errno::Errno;

/// A policy that the host refuses.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Nodes that are not there, or not for this process.
    #[error("guest RAM cannot be on memory nodes {nodes} of this host; allowed: {allowed}")]
    Nodes {
        /// `host-nodes=`
        nodes: String,
        /// Nodes with memory that this process may use.
        allowed: String,
    },
    /// Anything else.
    #[error("cannot give guest RAM policy {}", .policy.name())]
    Call {
        /// `policy=`
        policy: MemoryPolicy,
        /// Why.
        source: Errno,
    },
}

/// Gives (address, bytes) of a mapping of guest RAM, of which nothing has been touched, a policy.
pub(super) fn set(
    (start, size): (usize, u64),
    policy: MemoryPolicy,
    nodes: &NodeList,
) -> Result<(), PolicyError> {
    let mode = match policy {
        // What a file has that nobody gave one.
        MemoryPolicy::Default => return Ok(()),
        MemoryPolicy::Preferred => libc::MPOL_PREFERRED,
        MemoryPolicy::Bind => libc::MPOL_BIND,
        MemoryPolicy::Interleave => libc::MPOL_INTERLEAVE,
    };
    let failed = |source| PolicyError::Call { policy, source };
    let allowed = allowed().map_err(failed)?;
    // The kernel takes the part that exists, if any does.
    if nodes.is_empty() || nodes.iter().any(|node| !allowed.contains(node)) {
        return Err(PolicyError::Nodes {
            nodes: nodes.to_string(),
            allowed: allowed.to_string(),
        });
    }
    // SAFETY: the mask lives during the call and has as many bits as are told; the range is part of a mapping of guest RAM, in
    // which a policy changes nothing but where pages come from.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start,
            size,
            mode,
            nodes.words().as_ptr(),
            // The kernel looks at one bit less than it is told.
            MAX_CPUS + 1,
            0,
        )
    };
    Errno::result(result).map(drop).map_err(failed)
}

/// The nodes that this process may have memory of.
fn allowed() -> Result<NodeList, Errno> {
    const MPOL_F_MEMS_ALLOWED: libc::c_ulong = 1 << 2;
    let mut words = [0u64; MAX_CPUS / 64];
    // SAFETY: the kernel writes at most as many bits as are told, which the array has.
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            std::ptr::null_mut::<libc::c_int>(),
            words.as_mut_ptr(),
            MAX_CPUS,
            0,
            MPOL_F_MEMS_ALLOWED,
        )
    };
    Errno::result(result)?;
    let has = |node: &usize| words[node / 64] & 1 << (node % 64) != 0;
    Ok((0..MAX_CPUS).filter(has).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Error, GuestRam, MIN_SIZE, RamConfig};

    fn with(policy: MemoryPolicy, nodes: &str) -> Result<GuestRam, Error> {
        let mut config = RamConfig::new(MIN_SIZE);
        config.zones[0].policy = policy;
        config.zones[0].host_nodes = NodeList::parse(nodes).unwrap();
        GuestRam::new(config)
    }

    /// proc(5), numa_maps: address, policy, and what is mapped.
    fn policy_of(ram: &GuestRam) -> String {
        let start = ram.regions().next().unwrap().host_address;
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
        let line = maps
            .lines()
            .find(|line| line.starts_with(&format!("{start:x} ")));
        let policy = line.unwrap().split(' ').nth(1).unwrap();
        policy.to_owned()
    }

    #[test]
    fn the_file_has_the_policy_that_was_asked_for() {
        let node = allowed().unwrap().iter().next().unwrap();
        for (policy, shown) in [
            (MemoryPolicy::Default, "default".to_owned()),
            (MemoryPolicy::Preferred, format!("prefer:{node}")),
            (MemoryPolicy::Bind, format!("bind:{node}")),
            (MemoryPolicy::Interleave, format!("interleave:{node}")),
        ] {
            let ram = with(policy, &node.to_string()).unwrap();
            assert_eq!(policy_of(&ram), shown);
        }
    }

    #[test]
    fn nodes_that_are_not_there_are_refused_with_those_that_are() {
        let node = allowed().unwrap().iter().next().unwrap();
        let error = with(MemoryPolicy::Bind, &format!("{node}:1023")).unwrap_err();
        let told = error.to_string();
        assert!(told.contains(":1023 of this host; allowed: "), "{told}");
    }
}
