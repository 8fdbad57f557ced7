//! The VM as a tree of objects, for clients that ask QEMU's object model.
//!
//! **Job.** `qom-list`, `qom-get`, `qom-list-types`, `qom-list-properties` and `device-list-properties` over what there is: the
//! board, its processors, the devices, iothreads and character devices, at the paths where QEMU has them.
//! **Who is not trusted.** The client: paths and names are compared, never used as a position.
//!
//! **Why this way.** Types and their properties are read from the command line's own table, values from the spec of the
//! running VM, so nothing can be listed that this program does not take. Nothing can be set: there is no `qom-set`.

use ipc::counters::{self, BlockCounters, Field};
use ipc::disk::Snapshot;
use ipc::spec::vm::{ChardevBackend, DeviceKind, FsSource, MachineKind};
use serde_json::{Value, json};

use super::command::{Counted, Disks, ImageFacts, QmpError, VmFacts};
use super::schema::check::shown;
use super::session::Info;
use crate::cmdline::props::{Key, Kind, Shape};
use crate::cmdline::table::{Arg, OPTIONS};

/// Type of the processors.
pub(super) const CPU_TYPE: &str = "host-x86_64-cpu";

/// Abstract types with their parents, parents first.
const ABSTRACT: &[(&str, &str)] = &[
    ("object", ""),
    ("user-creatable", "object"),
    ("machine", "object"),
    ("accel", "object"),
    ("chardev", "object"),
    ("device", "object"),
    ("cpu", "device"),
    ("x86_64-cpu", "cpu"),
    ("virtio-device", "device"),
];

/// The forms of an option.
fn shapes(option: &str) -> &'static [Shape] {
    match OPTIONS
        .iter()
        .find(|one| one.name == option)
        .map(|one| one.arg)
    {
        Some(Arg::Props { shapes, .. }) => shapes,
        _ => &[],
    }
}

/// Types that objects have, with their parents.
fn concrete() -> impl Iterator<Item = (String, &'static str)> {
    let named = |shapes: &'static [Shape], prefix: &'static str, parent| {
        shapes
            .iter()
            .map(move |shape| (format!("{prefix}{}", shape.name), parent))
    };
    [
        ("microvm-machine", "machine"),
        ("none-machine", "machine"),
        ("kvm-accel", "accel"),
        (CPU_TYPE, "x86_64-cpu"),
    ]
    .into_iter()
    .map(|(name, parent)| (name.to_owned(), parent))
    .chain(named(shapes("device"), "", "virtio-device"))
    .chain(named(shapes("object"), "", "user-creatable"))
    .chain(named(shapes("chardev"), "chardev-", "chardev"))
}

/// Whether `parent` is `wanted` or comes from it.
fn comes_from(parent: &str, wanted: &str) -> bool {
    let mut at = parent;
    loop {
        if at == wanted {
            return true;
        }
        match ABSTRACT.iter().find(|(name, _)| *name == at) {
            Some((_, above)) if !above.is_empty() => at = above,
            _ => return false,
        }
    }
}

/// `qom-list-types`
pub(super) fn types(implements: Option<&str>, with_abstract: bool) -> Value {
    let wanted = |name: &str, parent: &str| {
        implements.is_none_or(|wanted| name == wanted || comes_from(parent, wanted))
    };
    let mut list: Vec<Value> = concrete()
        .filter(|(name, parent)| wanted(name, parent))
        .map(|(name, parent)| json!({ "name": name, "parent": parent }))
        .collect();
    if with_abstract {
        for (name, parent) in ABSTRACT
            .iter()
            .filter(|(name, parent)| wanted(name, parent))
        {
            let mut entry = json!({ "name": name, "abstract": true });
            if !parent.is_empty() {
                entry["parent"] = (*parent).into();
            }
            list.push(entry);
        }
    }
    list.into()
}

fn keys(typename: &str) -> Option<&'static [Key]> {
    let of = |option: &str, name: &str| {
        shapes(option)
            .iter()
            .find(|shape| shape.name == name)
            .map(|shape| shape.keys)
    };
    of("device", typename)
        .or_else(|| of("object", typename))
        .or_else(|| of("chardev", typename.strip_prefix("chardev-")?))
        .or_else(|| {
            let machine = shapes("machine").first().map(|shape| shape.keys);
            machine.filter(|_| matches!(typename, "microvm-machine" | "none-machine"))
        })
        .or_else(|| (typename == "kvm-accel" || typename == CPU_TYPE).then_some(&[]))
}

/// A property's type as QEMU calls it.
const fn type_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Bool => "bool",
        Kind::Int(..) => "uint64",
        Kind::PowerOfTwo(..) => "uint16",
        Kind::Size | Kind::Bytes | Kind::Window => "size",
        Kind::Text(_)
        | Kind::Id
        | Kind::Path
        | Kind::Choice(_)
        | Kind::Fixed(_)
        | Kind::Later
        | Kind::Mac
        | Kind::Cpus
        | Kind::Nodes
        | Kind::Vcpus
        | Kind::Fds(_) => "str",
    }
}

/// `device-list-properties`, `qom-list-properties`
pub(super) fn properties(typename: &str, of_device: bool) -> Result<Value, QmpError> {
    let is_device =
        concrete().any(|(name, parent)| name == typename && comes_from(parent, "device"));
    let is_abstract = ABSTRACT.iter().any(|(name, _)| *name == typename);
    match keys(typename) {
        Some(keys) if is_device || !of_device => Ok(keys
            .iter()
            .filter(|key| !matches!(key.kind, Kind::Later))
            .map(|key| {
                json!({
                    "name": key.name,
                    "type": type_name(key.kind),
                    "description": format!("{}; allowed: {}", key.help, key.kind.allowed()),
                })
            })
            .collect()),
        Some(_) => Err(QmpError::generic(format!(
            "Parameter 'typename' is '{typename}', which is no device; allowed: what qom-list-types tells for 'device'"
        ))),
        None if is_abstract && of_device => Err(QmpError::generic(format!(
            "Parameter 'typename' is '{typename}', which is abstract; allowed: what qom-list-types tells for 'device'"
        ))),
        None if is_abstract => Ok(json!([])),
        None => Err(QmpError::device_not_found(&shown(typename))),
    }
}

/// `query-command-line-options`
pub(super) fn options(wanted: Option<&str>) -> Result<Value, QmpError> {
    use crate::cmdline::table::Group;
    let list: Vec<Value> = OPTIONS
        .iter()
        .filter(|option| !matches!(option.group, Group::Later | Group::Help))
        .filter(|option| wanted.is_none_or(|wanted| wanted == option.name))
        .map(|option| {
            let shapes = match option.arg {
                Arg::Props { shapes, .. } => shapes,
                Arg::Flag | Arg::Text(_) | Arg::Optional(_) | Arg::Words(_) => &[],
            };
            let mut parameters: Vec<Value> = Vec::new();
            for key in shapes.iter().flat_map(|shape| shape.keys) {
                let known = parameters.iter().any(|one| one["name"] == key.name);
                if known || matches!(key.kind, Kind::Later) {
                    continue;
                }
                parameters.push(json!({
                    "name": key.name,
                    "type": match key.kind {
                        Kind::Bool => "boolean",
                        Kind::Int(..) | Kind::PowerOfTwo(..) => "number",
                        Kind::Size | Kind::Bytes | Kind::Window => "size",
                        _ => "string",
                    },
                    "help": key.help,
                }));
            }
            json!({ "option": option.name, "parameters": parameters })
        })
        .collect();
    match wanted {
        Some(wanted) if list.is_empty() => Err(QmpError::generic(format!(
            "Parameter 'option' is '{}', which is no option of this program; allowed: what is listed without it",
            shown(wanted)
        ))),
        _ => Ok(list.into()),
    }
}

/// One object of the tree.
struct Object {
    path: String,
    kind: String,
    properties: Vec<(&'static str, Value)>,
}

fn tree(info: &Info, facts: &VmFacts) -> Vec<Object> {
    let spec = &facts.spec;
    let container = |path: &str| Object {
        path: path.to_owned(),
        kind: "container".to_owned(),
        properties: Vec::new(),
    };
    let mut machine = vec![
        ("accel", json!("kvm")),
        (
            "dump-guest-core",
            json!(spec.memory.zones.iter().any(|zone| zone.dump_guest_core)),
        ),
    ];
    let path = |path: &std::path::Path| json!(path.to_string_lossy());
    machine.extend(spec.boot.kernel.as_ref().map(|one| ("kernel", path(one))));
    machine.extend(spec.boot.initrd.as_ref().map(|one| ("initrd", path(one))));
    if !spec.boot.cmdline.is_empty() {
        machine.push(("append", json!(spec.boot.cmdline)));
    }
    let mut list = vec![
        container("/"),
        Object {
            path: "/machine".into(),
            kind: match spec.machine.kind {
                MachineKind::Microvm => "microvm-machine",
                MachineKind::None => "none-machine",
            }
            .into(),
            properties: machine,
        },
        container("/machine/peripheral"),
        container("/machine/peripheral-anon"),
        container("/machine/unattached"),
        container("/objects"),
        container("/chardevs"),
    ];
    for cpu in &facts.cpus {
        let mut properties = vec![("realized", json!(true))];
        let place = super::schema::topology(info, cpu.index);
        for name in ["socket-id", "die-id", "core-id", "thread-id"] {
            properties.push((name, place[name].clone()));
        }
        list.push(Object {
            path: cpu_path(cpu.index),
            kind: CPU_TYPE.into(),
            properties,
        });
    }
    for device in &spec.devices {
        let (kind, mut properties) = device_object(&device.kind);
        properties.push(("realized", json!(true)));
        properties.push(("max-restarts", json!(device.restart.most)));
        // As in QEMU, -1 is none.
        let bootindex = device.bootindex.map_or(-1, i32::from);
        properties.push(("bootindex", json!(bootindex)));
        list.push(Object {
            path: format!("/machine/peripheral/{}", device.id),
            kind: kind.into(),
            properties,
        });
    }
    list.extend(spec.memory.zones.iter().filter_map(|zone| {
        let id = zone.id.as_ref()?;
        Some(Object {
            path: format!("/objects/{id}"),
            kind: if zone.path.is_some() {
                "memory-backend-file"
            } else {
                "memory-backend-memfd"
            }
            .into(),
            properties: vec![
                ("size", json!(zone.size)),
                ("share", json!(zone.share)),
                ("prealloc", json!(zone.prealloc)),
                ("dump", json!(zone.dump_guest_core)),
                ("policy", json!(zone.policy.name())),
                ("host-nodes", zone.host_nodes.iter().collect()),
            ],
        })
    }));
    list.extend(spec.iothreads.iter().map(|iothread| Object {
        path: format!("/objects/{}", iothread.id),
        kind: "iothread".into(),
        properties: Vec::new(),
    }));
    list.extend(spec.chardevs.iter().map(|chardev| {
        Object {
            path: format!("/chardevs/{}", chardev.id),
            kind: match chardev.backend {
                ChardevBackend::Stdio => "chardev-stdio",
                ChardevBackend::Pty => "chardev-pty",
                ChardevBackend::Socket { .. } | ChardevBackend::Inherited { .. } => {
                    "chardev-socket"
                }
                ChardevBackend::File { .. } => "chardev-file",
            }
            .into(),
            properties: Vec::new(),
        }
    }));
    list
}

/// Where a vCPU is in the tree.
pub(super) fn cpu_path(index: u8) -> String {
    format!("/machine/unattached/device[{index}]")
}

fn device_object(kind: &DeviceKind) -> (&'static str, Vec<(&'static str, Value)>) {
    match kind {
        DeviceKind::Block {
            drive,
            serial,
            num_queues,
            queue_size,
        } => (
            "virtio-blk-device",
            vec![
                ("drive", json!(drive)),
                ("serial", json!(serial.as_deref().unwrap_or_default())),
                ("num-queues", json!(num_queues)),
                ("queue-size", json!(queue_size)),
            ],
        ),
        DeviceKind::ForeignBlock {
            chardev,
            num_queues,
            queue_size,
        } => (
            "vhost-user-blk-device",
            vec![
                ("chardev", json!(chardev)),
                ("num-queues", json!(num_queues)),
                ("queue-size", json!(queue_size)),
            ],
        ),
        DeviceKind::Net {
            netdev,
            mac,
            queue_size,
        } => {
            let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
            (
                "virtio-net-device",
                vec![
                    ("netdev", json!(netdev)),
                    ("mac", json!(mac.join(":"))),
                    ("queue-size", json!(queue_size)),
                ],
            )
        }
        DeviceKind::Fs {
            source,
            tag,
            request_queues,
            queue_size,
            window,
        } => {
            let (kind, property, id) = match source {
                FsSource::Fsdev(id) => ("virtio-fs-device", "fsdev", id),
                FsSource::Chardev(id) => ("vhost-user-fs-device", "chardev", id),
            };
            (
                kind,
                vec![
                    (property, json!(id)),
                    ("tag", json!(tag)),
                    ("num-request-queues", json!(request_queues)),
                    ("queue-size", json!(queue_size)),
                    ("cache-size", json!(window)),
                ],
            )
        }
    }
}

/// The object at `path`, which may also be the last part of one, as in QEMU.
fn find<'a>(tree: &'a [Object], path: &str) -> Result<&'a Object, QmpError> {
    let whole = path.trim_end_matches('/');
    let exact = |object: &&Object| object.path == whole || (whole.is_empty() && object.path == "/");
    if let Some(object) = tree.iter().find(exact) {
        return Ok(object);
    }
    if !path.starts_with('/') && !path.is_empty() {
        let end = format!("/{whole}");
        let mut ends = tree.iter().filter(|object| object.path.ends_with(&end));
        match (ends.next(), ends.next()) {
            (Some(object), None) => return Ok(object),
            (Some(_), Some(_)) => {
                return Err(QmpError::generic(format!(
                    "Path '{}' is ambiguous",
                    shown(path)
                )));
            }
            (None, _) => {}
        }
    }
    Err(QmpError {
        class: super::ErrorClass::DeviceNotFound,
        desc: format!("Device '{}' not found", shown(path)),
    })
}

fn value_type(value: &Value) -> &'static str {
    match value {
        Value::Bool(_) => "bool",
        Value::Number(_) => "uint64",
        _ => "string",
    }
}

/// `qom-list`
pub(super) fn list(info: &Info, facts: &VmFacts, path: &str) -> Result<Value, QmpError> {
    let tree = tree(info, facts);
    let object = find(&tree, path)?;
    let mut list = vec![json!({ "name": "type", "type": "string" })];
    list.extend(
        object
            .properties
            .iter()
            .map(|(name, value)| json!({ "name": name, "type": value_type(value) })),
    );
    let inside = if object.path == "/" {
        "/"
    } else {
        &format!("{}/", object.path)
    };
    for child in &tree {
        // An id may contain a slash; it is one name all the same.
        let name = child
            .path
            .strip_prefix(inside)
            .filter(|name| !name.is_empty());
        let between = tree.iter().any(|other| {
            other.path.len() > object.path.len()
                && other.path != "/"
                && child.path.starts_with(&format!("{}/", other.path))
        });
        if let Some(name) = name
            && !between
        {
            list.push(json!({ "name": name, "type": format!("child<{}>", child.kind) }));
        }
    }
    Ok(list.into())
}

/// `qom-get`
pub(super) fn get(
    info: &Info,
    facts: &VmFacts,
    path: &str,
    property: &str,
) -> Result<Value, QmpError> {
    let tree = tree(info, facts);
    let object = find(&tree, path)?;
    if property == "type" {
        return Ok(object.kind.as_str().into());
    }
    object
        .properties
        .iter()
        .find(|(name, _)| *name == property)
        .map(|(_, value)| value.clone())
        .ok_or_else(|| {
            QmpError::generic(format!(
                "Property '{}.{}' not found",
                object.kind,
                shown(property)
            ))
        })
}

/// `query-block`: the disks that the guest has.
pub(super) fn disks(disks: &Disks) -> Value {
    let facts = &disks.facts;
    let spec = &facts.spec;
    let status = |id: &str| {
        let stop = facts.stopped.iter().find(|(device, _)| device == id);
        stop.map_or(
            "ok",
            |(_, stop)| {
                if stop.no_space { "nospace" } else { "failed" }
            },
        )
    };
    let disk = |(device, drive): (&ipc::spec::vm::DeviceOption, &ipc::spec::vm::DriveSpec)| {
        json!({
            "device": drive.id,
            "qdev": device.id,
            "type": "unknown",
            "removable": false,
            "locked": false,
            "io-status": status(&device.id),
            "inserted": inserted(disks, drive),
        })
    };
    spec.devices
        .iter()
        .filter_map(|device| match &device.kind {
            DeviceKind::Block { drive, .. } => {
                let drive = spec.drives.iter().find(|one| one.id == *drive)?;
                Some(disk((device, drive)))
            }
            _ => None,
        })
        .collect()
}

/// `query-blockstats`: of disks, or of all drives by their names.
pub(super) fn blockstats(counted: &Counted, nodes: bool) -> Value {
    let spec = &counted.facts.spec;
    let disk_of = |drive: &str| {
        spec.devices.iter().find(
            |device| matches!(&device.kind, DeviceKind::Block { drive: one, .. } if one == drive),
        )
    };
    let of = |device: Option<&ipc::spec::vm::DeviceOption>| {
        let numbers = device.and_then(|device| {
            let mut disks = counted.disks.iter();
            disks.find(|(id, _)| *id == device.id)
        });
        stats(&numbers.map(|(_, numbers)| *numbers).unwrap_or_default())
    };
    if nodes {
        let node = |drive: &ipc::spec::vm::DriveSpec| json!({ "node-name": drive.id, "stats": of(disk_of(&drive.id)) });
        return spec.drives.iter().map(node).collect();
    }
    let disk = |device: &ipc::spec::vm::DeviceOption| match &device.kind {
        DeviceKind::Block { drive, .. } => Some(json!({
            "device": drive,
            "qdev": device.id,
            "node-name": drive,
            "stats": of(Some(device)),
        })),
        _ => None,
    };
    spec.devices.iter().filter_map(disk).collect()
}

fn stats(numbers: &BlockCounters) -> Value {
    let mut stats = json!({
        "wr_highest_offset": numbers.written_to(),
        "account_invalid": false,
        "account_failed": true,
        "timed_stats": [],
    });
    for (kind, name) in [
        (counters::Kind::Read, "rd"),
        (counters::Kind::Write, "wr"),
        (counters::Kind::Flush, "flush"),
        (counters::Kind::Unmap, "unmap"),
    ] {
        stats[format!("{name}_operations")] = numbers.get(kind, Field::Operations).into();
        stats[format!("{name}_total_time_ns")] = numbers.get(kind, Field::Nanoseconds).into();
        stats[format!("failed_{name}_operations")] = numbers.get(kind, Field::Failed).into();
        stats[format!("invalid_{name}_operations")] = numbers.get(kind, Field::Invalid).into();
        if kind != counters::Kind::Flush {
            stats[format!("{name}_bytes")] = numbers.get(kind, Field::Bytes).into();
            // Each request is done as it comes.
            stats[format!("{name}_merged")] = 0.into();
        }
    }
    stats
}

/// `query-named-block-nodes`: all drives, with or without a device.
pub(super) fn nodes(disks: &Disks) -> Value {
    let drives = disks.facts.spec.drives.iter();
    drives.map(|drive| inserted(disks, drive)).collect()
}

/// An internal snapshot of an image (QAPI `SnapshotInfo`).
pub(super) fn snapshot(snapshot: &Snapshot) -> Value {
    const SECOND: u64 = 1_000_000_000;
    let mut shown = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state,
        "date-sec": snapshot.seconds,
        "date-nsec": snapshot.nanoseconds,
        "vm-clock-sec": snapshot.clock / SECOND,
        "vm-clock-nsec": snapshot.clock % SECOND,
    });
    if let Some(icount) = snapshot.icount {
        shown["icount"] = icount.into();
    }
    shown
}

/// QAPI `ImageInfo`, as far as it is known.
fn image(drive: &ipc::spec::vm::DriveSpec, facts: &ImageFacts) -> Value {
    let mut shown = json!({
        "filename": drive.file.to_string_lossy(),
        "format": format_name(drive),
        "virtual-size": facts.size,
    });
    if let Some(cluster) = facts.cluster {
        shown["cluster-size"] = cluster.into();
    }
    if !facts.snapshots.is_empty() {
        shown["snapshots"] = facts.snapshots.iter().map(snapshot).collect();
    }
    shown
}

fn format_name(drive: &ipc::spec::vm::DriveSpec) -> &'static str {
    use ipc::spec::block::ImageFormat;
    match drive.io.format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 { .. } => "qcow2",
    }
}

fn inserted(disks: &Disks, drive: &ipc::spec::vm::DriveSpec) -> Value {
    use ipc::spec::block::DetectZeroes;
    let mut shown = json!({
        "file": drive.file.to_string_lossy(),
        "node-name": drive.id,
        "ro": drive.readonly,
        "drv": format_name(drive),
        "encrypted": false,
        "detect_zeroes": match drive.io.detect_zeroes {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        },
        "bps": 0, "bps_rd": 0, "bps_wr": 0,
        "iops": drive.io.iops_total, "iops_rd": 0, "iops_wr": 0,
        "cache": { "writeback": true, "direct": drive.direct, "no-flush": false },
        "write_threshold": 0,
        "backing_file_depth": drive.backing.len(),
    });
    if let Some((_, facts)) = disks.images.iter().find(|(id, _)| *id == drive.id) {
        shown["image"] = image(drive, facts);
    }
    shown
}
