//! Guest memory: `-m`, `-mem-path`, `-object memory-backend-…`, `-machine memory-backend=` and `-numa`.
//!
//! **Job.** Puts together what guest memory is made of and which vCPUs are near which part of it (manual 1.3 to 1.5).
//! **Who is not trusted**: nobody, but people err: what does not add up is refused with the numbers. **Why this way.** All
//! forms end as a list of zones, of which a VM without nodes has one, so that nothing behind this page has two ways to go.

use std::path::PathBuf;

use ipc::limits;
use ipc::spec::cpus::CpuList;
use ipc::spec::vm::{MemoryPolicy, MemorySpec, MemoryZone, NumaNode};

use super::check::lookup;
use super::error::CmdlineError;
use super::props::Props;

/// The distance within a node (ACPI 6.5, 5.2.17), and the default between two.
const NEAR: u8 = 10;
const FAR: u8 = 20;

/// Guest memory as far as the options have told.
#[derive(Default)]
pub(super) struct Draft {
    /// What `-m`, `-mem-path`, `-mem-prealloc` and `-machine` say.
    pub(super) whole: MemoryZone,
    /// Whether there was a `-m`.
    pub(super) sized: bool,
    /// Argument of `-machine`, and its `memory-backend=`.
    pub(super) named: Option<(String, String)>,
    /// `-object memory-backend-…`, with their arguments.
    backends: Vec<(String, Backend)>,
    /// `-numa node`, by the order of the options.
    nodes: Vec<Node>,
    /// `-numa dist`
    distances: Vec<Distance>,
}

/// An `-object memory-backend-…`.
struct Backend {
    id: String,
    zone: MemoryZone,
}

/// A `-numa node`.
struct Node {
    arg: String,
    number: usize,
    cpus: CpuList,
    memdev: Option<String>,
}

/// A `-numa dist`.
struct Distance {
    arg: String,
    from: usize,
    to: usize,
    value: u8,
}

impl Draft {
    /// Ids of the objects.
    pub(super) fn ids(&self) -> impl Iterator<Item = &str> + Clone {
        self.backends.iter().map(|(_, backend)| backend.id.as_str())
    }

    /// Takes in an `-object memory-backend-…`, whose id nothing else has.
    pub(super) fn backend(&mut self, id: String, props: &Props<'_>) -> Result<(), CmdlineError> {
        let path = props.text("mem-path").map(PathBuf::from);
        if path.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err(props.error("mem-path is not an absolute path"));
        }
        // Two names, one of QEMU and one of the manual.
        let either =
            |one: &str, other: &str, default: bool| match (props.bool(one), props.bool(other)) {
                (Some(_), Some(_)) => {
                    Err(props.error(format!("{one} and {other} are the same; give one of them")))
                }
                (one, other) => Ok(one.or(other).unwrap_or(default)),
            };
        let policy = match props.text("policy") {
            Some("preferred") => MemoryPolicy::Preferred,
            Some("bind") => MemoryPolicy::Bind,
            Some("interleave") => MemoryPolicy::Interleave,
            _ => MemoryPolicy::Default,
        };
        let zone = MemoryZone {
            id: Some(id.clone()),
            size: props.int("size").unwrap_or_default(),
            prealloc: either("prealloc", "mem-prealloc", false)?,
            path,
            dump_guest_core: either("dump", "dump-guest-core", true)?,
            share: props.bool("share").unwrap_or(false),
            policy,
            host_nodes: props.cpus("host-nodes").unwrap_or_default(),
        };
        if policy != MemoryPolicy::Default && zone.host_nodes.is_empty() {
            return Err(props.error(format!("policy={} needs host-nodes=", policy.name())));
        }
        self.backends
            .push((props.raw().to_owned(), Backend { id, zone }));
        Ok(())
    }

    /// Takes in a `-numa`.
    pub(super) fn numa(&mut self, props: &Props<'_>) -> Result<(), CmdlineError> {
        let arg = props.raw().to_owned();
        if props.shape() == "dist" {
            let number = |name: &str| props.small(name).unwrap_or_default();
            let distance = Distance {
                arg,
                from: number("src"),
                to: number("dst"),
                value: props.small("val").unwrap_or(NEAR),
            };
            let (from, to) = (distance.from, distance.to);
            if (distance.value == NEAR) != (from == to) {
                return Err(props.error(format!(
                    "val={} from node {from} to node {to}; allowed: {}",
                    distance.value,
                    if from == to { "10" } else { "11 to 255" }
                )));
            }
            if self
                .distances
                .iter()
                .any(|other| (other.from, other.to) == (from, to))
            {
                return Err(props.error(format!(
                    "the way from node {from} to node {to} is given twice"
                )));
            }
            self.distances.push(distance);
            return Ok(());
        }
        if self.nodes.len() == limits::MAX_NUMA_NODES {
            return Err(props.error(format!(
                "one node too many; allowed: 0 to {}",
                limits::MAX_NUMA_NODES
            )));
        }
        let free = (0..).find(|number| self.nodes.iter().all(|node| node.number != *number));
        let number = props.small("nodeid").or(free).unwrap_or_default();
        if self.nodes.iter().any(|node| node.number == number) {
            return Err(props.error(format!("node {number} is given twice")));
        }
        let cpus = props.cpus("cpus").unwrap_or_default();
        let memdev = props.text("memdev").map(str::to_owned);
        if cpus.is_empty() && memdev.is_none() {
            return Err(props.error("a node has vCPUs (cpus=) or memory (memdev=), or both"));
        }
        for (cpu, other) in self
            .nodes
            .iter()
            .flat_map(|node| node.cpus.iter().map(move |cpu| (cpu, node)))
        {
            if cpus.contains(cpu) {
                return Err(props.error(format!("vCPU {cpu} is in node {} already", other.number)));
            }
        }
        self.nodes.push(Node {
            arg,
            number,
            cpus,
            memdev,
        });
        Ok(())
    }

    /// Guest memory, of a guest with so many vCPUs, and notes on what has no effect.
    pub(super) fn finish(self, vcpus: u8) -> Result<(MemorySpec, Vec<String>), CmdlineError> {
        let mut notes: Vec<String> = self
            .backends
            .iter()
            .filter(|(_, backend)| !self.uses(&backend.id))
            .map(|(arg, _)| format!("-object {arg}: nothing uses it"))
            .collect();
        for (arg, backend) in &self.backends {
            if backend.zone.policy == MemoryPolicy::Default && !backend.zone.host_nodes.is_empty() {
                notes.push(format!(
                    "-object {arg}: host-nodes= says nothing with policy=default"
                ));
            }
        }
        let memory =
            if !self.nodes.is_empty() {
                notes.extend(self.whole.path.iter().map(|path| {
                    format!("-mem-path {}: each node has its own memory", path.display())
                }));
                if self.whole.prealloc {
                    notes.push("-mem-prealloc: each node has its own memory".into());
                }
                self.by_nodes(vcpus)?
            } else if let Some(distance) = self.distances.first() {
                return Err(CmdlineError::new(
                    "-numa",
                    &distance.arg,
                    "there are no nodes; give -numa node as well",
                ));
            } else {
                self.by_name()?
            };
        Ok((memory, notes))
    }

    fn uses(&self, id: &str) -> bool {
        let named = self.named.iter().map(|(_, id)| id);
        named
            .chain(self.nodes.iter().filter_map(|node| node.memdev.as_ref()))
            .any(|other| other == id)
    }

    /// Guest memory is what `-machine memory-backend=` names, if that is given.
    fn by_name(self) -> Result<MemorySpec, CmdlineError> {
        let mut whole = self.whole;
        if let Some((arg, id)) = &self.named {
            let ids = self.backends.iter().map(|(_, backend)| backend.id.as_str());
            let at = lookup(("-machine", arg), ("memory-backend", id), ids)?;
            let (arg, Backend { zone, .. }) = &self.backends[at];
            let fail = |text: String| CmdlineError::new("-object", arg, text);
            if self.sized && whole.size != zone.size {
                return Err(fail(format!(
                    "size is {} MiB, but -m says {} MiB",
                    zone.size >> 20,
                    whole.size >> 20
                )));
            }
            if whole.path.is_some() {
                return Err(fail("contradicts -mem-path".into()));
            }
            if zone.size < limits::MIN_MEMORY {
                return Err(fail(format!(
                    "size is {} MiB; guest memory is {} MiB at least",
                    zone.size >> 20,
                    limits::MIN_MEMORY >> 20
                )));
            }
            whole = MemoryZone {
                prealloc: zone.prealloc | whole.prealloc,
                ..inherit(zone, &whole)
            };
        }
        Ok(MemorySpec {
            size: whole.size,
            zones: vec![whole],
            nodes: Vec::new(),
            distances: Vec::new(),
        })
    }

    /// Guest memory is that of all nodes.
    fn by_nodes(mut self, vcpus: u8) -> Result<MemorySpec, CmdlineError> {
        if let Some((arg, _)) = &self.named {
            return Err(CmdlineError::new(
                "-machine",
                arg,
                "memory-backend contradicts -numa: each node has its own memory",
            ));
        }
        self.nodes.sort_by_key(|node| node.number);
        let mut zones: Vec<MemoryZone> = Vec::new();
        let mut nodes = Vec::new();
        for (number, node) in self.nodes.iter().enumerate() {
            let fail = |text: String| CmdlineError::new("-numa", &node.arg, text);
            if node.number != number {
                return Err(fail(format!(
                    "is node {}, but there is no node {number}",
                    node.number
                )));
            }
            let last = usize::from(vcpus).saturating_sub(1);
            if let Some(vcpu) = node.cpus.iter().find(|vcpu| *vcpu > last) {
                return Err(fail(format!(
                    "vCPU {vcpu} does not exist; allowed: 0 to {last}"
                )));
            }
            let zone = match &node.memdev {
                None => None,
                Some(id) => {
                    let ids = self.backends.iter().map(|(_, backend)| backend.id.as_str());
                    let at = lookup(("-numa", &node.arg), ("memdev", id), ids)?;
                    if zones.iter().any(|zone| zone.id.as_ref() == Some(id)) {
                        return Err(fail(format!("memdev {id} is another node's memory")));
                    }
                    zones.push(inherit(&self.backends[at].1.zone, &self.whole));
                    u32::try_from(zones.len() - 1).ok()
                }
            };
            nodes.push(NumaNode {
                cpus: node.cpus,
                zone,
            });
        }
        let fail = |text: String| CmdlineError::new("-numa", &self.nodes[0].arg, text);
        let without: CpuList = (0..usize::from(vcpus))
            .filter(|vcpu| !nodes.iter().any(|node| node.cpus.contains(*vcpu)))
            .collect();
        if !without.is_empty() {
            return Err(fail(format!(
                "vCPU {without} has no node; with nodes every vCPU has one"
            )));
        }
        // At most eight of at most 512G.
        let size: u64 = zones.iter().map(|zone| zone.size).sum();
        if self.sized && size != self.whole.size {
            return Err(fail(format!(
                "the memory of all nodes is {} MiB, but -m says {} MiB",
                size >> 20,
                self.whole.size >> 20
            )));
        }
        if !(limits::MIN_MEMORY..=limits::MAX_MEMORY).contains(&size) {
            return Err(fail(format!(
                "the memory of all nodes is {} MiB; allowed: 128M to 512G",
                size >> 20
            )));
        }
        let distances = distances(nodes.len(), &self.distances)?;
        Ok(MemorySpec {
            size,
            zones,
            nodes,
            distances,
        })
    }
}

/// What an object says, with what holds for all memory of the machine.
fn inherit(zone: &MemoryZone, whole: &MemoryZone) -> MemoryZone {
    MemoryZone {
        share: zone.share | whole.share,
        dump_guest_core: zone.dump_guest_core & whole.dump_guest_core,
        ..zone.clone()
    }
}

/// The table of distances of so many nodes, row by row.
fn distances(nodes: usize, given: &[Distance]) -> Result<Vec<u8>, CmdlineError> {
    let mut table: Vec<u8> = (0..nodes * nodes)
        .map(|at| if at / nodes == at % nodes { NEAR } else { FAR })
        .collect();
    for Distance { arg, from, to, .. } in given {
        if let Some(node) = [*from, *to].into_iter().find(|node| *node >= nodes) {
            return Err(CmdlineError::new(
                "-numa",
                arg,
                format!("node {node} does not exist; allowed: 0 to {}", nodes - 1),
            ));
        }
    }
    // The way back is as long, unless that is given too.
    for one in given {
        table[one.to * nodes + one.from] = one.value;
    }
    for one in given {
        table[one.from * nodes + one.to] = one.value;
    }
    Ok(table)
}
