//! `-machine`, `-smp`, `-uuid`.

use ipc::limits;
use ipc::spec::vm::{CpuSpec, MachineKind, MemoryZone, VmSpec};

use super::error::CmdlineError;
use super::nearest::nearest;
use super::props::Props;

/// Boards that the manual names and that are not here yet.
const LATER: &[&str] = &["q35", "pc", "virt"];

/// `-machine`
pub(super) fn machine(
    spec: &mut VmSpec,
    memory: &mut MemoryZone,
    props: &Props<'_>,
) -> Result<(), CmdlineError> {
    if let Some(name) = props.text("type") {
        let lower = name.to_ascii_lowercase();
        spec.machine.kind = match lower.as_str() {
            "microvm" => MachineKind::Microvm,
            "none" => MachineKind::None,
            _ if LATER.contains(&lower.as_str()) || lower.starts_with("pc-") => {
                return Err(props.error(format!(
                    "machine {name} is not supported yet; allowed: microvm, none"
                )));
            }
            _ => {
                let near = nearest(name, ["microvm", "none"])
                    .map_or(String::new(), |near| format!(", nearest is {near}"));
                return Err(props.error(format!(
                    "unknown machine {name}{near}; allowed: microvm, none"
                )));
            }
        };
    }
    // Without a guest there is nothing to accelerate: libvirt asks once with each accelerator what there is.
    if let Some(accel) = props.text("accel")
        && !accel.split(':').any(|one| one == "kvm")
        && !(spec.machine.kind == MachineKind::None && accel == "tcg")
    {
        return Err(props.error(format!("accel={accel} is not supported yet; allowed: kvm")));
    }
    memory.dump_guest_core = props.bool("dump-guest-core").unwrap_or(true);
    memory.share = props.bool("mem-share").unwrap_or(false);
    Ok(())
}

/// `-smp`. What is not given follows from the rest: cores first, then sockets, then threads.
pub(super) fn smp(props: &Props<'_>) -> Result<CpuSpec, CmdlineError> {
    let given = |name: &str| props.int(name);
    let cpus = given("cpus").unwrap_or(1);
    let (dies, clusters) = (given("dies").unwrap_or(1), given("clusters").unwrap_or(1));
    let (sockets, cores, threads) = (given("sockets"), given("cores"), given("threads"));
    // Each factor is at most 254, so five of them fit.
    let maxcpus = given("maxcpus").unwrap_or(match (sockets, cores, threads) {
        (Some(sockets), Some(cores), Some(threads)) => sockets * dies * clusters * cores * threads,
        _ => cpus,
    });
    let rest = |others: u64| maxcpus / (others * dies * clusters);
    let (sockets, cores, threads) = match (sockets, cores, threads) {
        (sockets, None, threads) => {
            let (sockets, threads) = (sockets.unwrap_or(1), threads.unwrap_or(1));
            (sockets, rest(sockets * threads), threads)
        }
        (None, Some(cores), threads) => {
            let threads = threads.unwrap_or(1);
            (rest(cores * threads), cores, threads)
        }
        (Some(sockets), Some(cores), None) => (sockets, cores, rest(sockets * cores)),
        (Some(sockets), Some(cores), Some(threads)) => (sockets, cores, threads),
    };
    let product = sockets * dies * clusters * cores * threads;
    if product != maxcpus {
        return Err(props.error(format!(
            "sockets * dies * clusters * cores * threads = {sockets} * {dies} * {clusters} * {cores} * {threads} = \
             {product}; allowed: maxcpus, which is {maxcpus}"
        )));
    }
    if maxcpus < cpus {
        return Err(props.error(format!(
            "maxcpus is {maxcpus}; allowed: cpus, which is {cpus}, or more"
        )));
    }
    if maxcpus > u64::from(limits::MAX_VCPUS) {
        return Err(props.error(format!(
            "maxcpus is {maxcpus}; allowed: 1 to {}",
            limits::MAX_VCPUS
        )));
    }
    let small = |n: u64| u8::try_from(n).map_err(|_| props.error("out of range"));
    Ok(CpuSpec {
        cpus: small(cpus)?,
        maxcpus: small(maxcpus)?,
        sockets: small(sockets)?,
        dies: small(dies)?,
        clusters: small(clusters)?,
        cores: small(cores)?,
        threads: small(threads)?,
    })
}

/// The bytes of a UUID in the order of its text (RFC 9562, section 4).
pub(super) fn uuid(text: &str) -> Option<[u8; 16]> {
    let parts: Vec<&str> = text.split('-').collect();
    let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
    let digits = parts.concat();
    if lengths != [8, 4, 4, 4, 12] || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(uuid)
}
