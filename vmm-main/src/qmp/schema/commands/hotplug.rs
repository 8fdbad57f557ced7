//! What comes to the running VM and goes.

use crate::qmp::command::{QmpError, Reply, Ticket, VmCommand, VmFacts};
use crate::qmp::descriptors::Desk;
use crate::qmp::plug::{BackendKind, DRIVERS, NewBackend, NewDevice, NodeOver};
use crate::qmp::schema::Arguments;
use crate::qmp::schema::check::shown;
use crate::qmp::schema::types::{
    Command, Enum, Member, Object, OneOf, Type, here, main, may, must, object,
};
use ipc::limits;
use serde_json::{Value, json};

const PATH: Type = Type::Text(4095);

const AIO: Type = Type::Enum(&Enum {
    name: "BlockdevAioOptions",
    values: &["native", "io_uring", "threads", "off"],
});

const FILE_DRIVER: Type = Type::Enum(&Enum {
    name: "BlockdevFileDriver",
    values: &["file", "host_device"],
});

const FILE: Object = object(
    "BlockdevFile",
    &[
        may(
            "driver",
            FILE_DRIVER,
            "both open what is there: a file or a block device",
        ),
        must(
            "filename",
            PATH,
            "absolute path, beneath a folder that `-hotplug images=` grants; or `/dev/fdset/N`, a set of `add-fd`'s",
        ),
        may("aio", AIO, "as `-drive aio=`; threads means off"),
        may("node-name", Type::ID, "accepted, without effect"),
        may("locking", ON_OFF_AUTO, "accepted: images are always locked"),
        may("auto-read-only", Type::Bool, "accepted: never done"),
        may("discard", DISCARD, "accepted: the node's own counts"),
    ],
);

const ON_OFF_AUTO: Type = Type::Enum(&Enum {
    name: "OnOffAuto",
    values: &["auto", "on", "off"],
});

const DISCARD: Type = Type::Enum(&Enum {
    name: "BlockdevDiscardOptions",
    values: &["ignore", "unmap"],
});

const CACHE: Object = object(
    "BlockdevCacheOptions",
    &[
        may("direct", Type::Bool, "as `-drive direct=`, default true"),
        may("no-flush", Type::Bool, "accepted: flushes are always done"),
    ],
);

const BLOCKDEV: &[Member] = &[
    must("node-name", Type::ID, "name that a device refers to"),
    may(
        "driver",
        Type::Enum(&Enum {
            name: "BlockdevDriver",
            values: &["raw", "qcow2", "file", "host_device"],
        }),
        "format, or file in one, which is raw; default raw",
    ),
    may(
        "file",
        Type::OneOf(&OneOf {
            name: "BlockdevRef",
            types: &[Type::Object(&FILE), Type::ID],
        }),
        "where the image is; or the name of a node that was added with driver file or host_device, which then belongs to this one until this one is removed",
    ),
    may(
        "filename",
        PATH,
        "where the image is, with driver file or host_device",
    ),
    may(
        "backing",
        Type::OneOf(&OneOf {
            name: "BlockdevRefOrNull",
            types: &[Type::ID, Type::Null],
        }),
        "the node below a qcow2 image: one that was added, is read-only and has the same cache.direct; no device can have it then, but images may share it. What the image itself names is never opened; null is the same as none",
    ),
    may("read-only", Type::Bool, "default false"),
    may("auto-read-only", Type::Bool, "accepted: never done"),
    may("cache", Type::Object(&CACHE), "the host's page cache"),
    may("discard", DISCARD, "as `-drive discard=`"),
    may(
        "detect-zeroes",
        Type::Enum(&Enum {
            name: "BlockdevDetectZeroesOptions",
            values: &["off", "on", "unmap"],
        }),
        "as `-drive detect-zeroes=`",
    ),
    may(
        "iops",
        Type::Int(0, limits::MAX_IOPS as u64),
        "as `-drive throttling.iops-total=`",
    ),
];

const RATE: Type = Type::Int(0, limits::MAX_NET_RATE);
const BURST: Type = Type::Int(1, limits::MAX_NET_RATE);
const LIMIT: &str = "as of `-netdev`";

const NETDEV: &[Member] = &[
    must("id", Type::ID, "name that a device refers to"),
    may(
        "type",
        Type::Enum(&Enum {
            name: "NetClientDriver",
            values: &["tap"],
        }),
        "default tap",
    ),
    may(
        "ifname",
        Type::Text(15),
        "a tap that `-hotplug tap=` grants",
    ),
    may(
        "fd",
        Type::ID,
        "instead of ifname: the name of an open tap that `getfd` took, which the name loses, or the number of one that `add-fd` took",
    ),
    may(
        "fds",
        Type::TEXT,
        "instead of ifname: one for each queue pair, with colons between them",
    ),
    may(
        "queues",
        Type::Int(1, limits::MAX_NET_QUEUE_PAIRS as u64),
        "queue pairs, default 1",
    ),
    may(
        "vhost",
        Type::Bool,
        "accepted: packets never go through the host kernel's vhost",
    ),
    may("vhostfd", Type::ID, "accepted: this descriptor is closed"),
    may("vhostfds", Type::TEXT, "accepted: these are closed"),
    may("throttling.rx-packets", RATE, LIMIT),
    may("throttling.rx-packets-burst", BURST, LIMIT),
    may("throttling.rx-bytes", RATE, LIMIT),
    may("throttling.rx-bytes-burst", BURST, LIMIT),
    may("throttling.tx-packets", RATE, LIMIT),
    may("throttling.tx-packets-burst", BURST, LIMIT),
    may("throttling.tx-bytes", RATE, LIMIT),
    may("throttling.tx-bytes-burst", BURST, LIMIT),
];

const FSDEV: &[Member] = &[
    must("id", Type::ID, "name that a device refers to"),
    must(
        "path",
        PATH,
        "absolute path of a folder, beneath or the one that `-hotplug folders=` grants",
    ),
    may("readonly", Type::Bool, "default false"),
    may(
        "cache",
        Type::Enum(&Enum {
            name: "FsdevCache",
            values: &["never", "metadata", "auto", "always"],
        }),
        "as `-fsdev cache=`",
    ),
    may("xattr", Type::Bool, "as `-fsdev xattr=`"),
    may(
        "posix-acl",
        Type::Bool,
        "as `-fsdev posix-acl=`; switches xattr on",
    ),
];

const DEVICE: &[Member] = &[
    must("id", Type::ID, "name of the device"),
    must(
        "driver",
        Type::Enum(&Enum {
            name: "HotplugDriver",
            values: &DRIVERS,
        }),
        "kind of device",
    ),
    may(
        "drive",
        Type::ID,
        "for a disk: name of its block node, default the device's id",
    ),
    may(
        "netdev",
        Type::ID,
        "for a card: its netdev, default the device's id",
    ),
    may(
        "fsdev",
        Type::ID,
        "for a folder: its fsdev, default the device's id",
    ),
    may(
        "addr",
        Type::Text(8),
        "number among the devices of its kind, as in 0x1: one that was used before is used again, whatever the guest still has open there; default: one that nobody used",
    ),
    may(
        "serial",
        Type::Text(limits::BLOCK_ID_BYTES),
        "for a disk: its serial number",
    ),
    may("mac", Type::Text(17), "for a card: its MAC address"),
    may(
        "tag",
        Type::Text(limits::MAX_FS_TAG),
        "for a folder: name that the guest mounts, default the device's id",
    ),
    may(
        "num-queues",
        Type::Int(1, limits::MAX_BLOCK_QUEUES as u64),
        "for a disk: default one a vCPU",
    ),
    may(
        "num-request-queues",
        Type::Int(1, limits::MAX_FS_REQUEST_QUEUES as u64),
        "for a folder: default 1",
    ),
    may(
        "queue-size",
        Type::Int(4, limits::MAX_QUEUE_SIZE as u64),
        "entries of each queue",
    ),
    may("iothread", Type::ID, "id of an -object iothread"),
    may("restart", Type::Bool, "as `-device restart=`"),
    may(
        "max-restarts",
        Type::Int(0, limits::MAX_RESTARTS as u64),
        "as `-device max-restarts=`",
    ),
];

fn add(
    ticket: Ticket,
    mut arguments: Arguments,
    make: fn(Arguments, usize) -> NewBackend,
) -> VmCommand {
    let fds = arguments.descriptors();
    let what = make(arguments, fds.len());
    VmCommand::BackendAdd(Box::new(what), fds, nothing(ticket))
}

/// The descriptor that `/dev/fdset/N` stands for.
fn image_descriptor(desk: &mut Desk<'_>, arguments: &mut Arguments) -> Result<(), QmpError> {
    let readonly = arguments.flag("read-only").unwrap_or(false);
    let path = arguments
        .at(&["file", "filename"])
        .or_else(|| arguments.at(&["filename"]))
        .and_then(Value::as_str)
        .unwrap_or_default();
    let fd = desk.open(path, readonly)?;
    arguments.bring(fd.into_iter().collect());
    Ok(())
}

/// The descriptors that `fd` or `fds` name.
fn tap_descriptors(desk: &mut Desk<'_>, arguments: &mut Arguments) -> Result<(), QmpError> {
    let wrong = |what: String| Err(QmpError::generic(what));
    for name in ["rx-packets", "rx-bytes", "tx-packets", "tx-bytes"] {
        let rate = format!("throttling.{name}");
        let burst = format!("{rate}-burst");
        if arguments.at(&[&burst]).is_some() && arguments.uint(&rate).unwrap_or(0) == 0 {
            return wrong(format!("Parameter '{burst}' needs '{rate}' above 0"));
        }
    }
    let given: Vec<&str> = ["ifname", "fd", "fds"]
        .into_iter()
        .filter(|name| arguments.at(&[name]).is_some())
        .collect();
    let [argument] = given.as_slice() else {
        return wrong(format!(
            "netdev_add takes one of ifname, fd and fds; given: {}",
            if given.is_empty() {
                "none".into()
            } else {
                given.join(", ")
            }
        ));
    };
    // Those of vhost are taken and closed, whatever follows.
    for argument in ["vhostfd", "vhostfds"] {
        if let Some(text) = arguments.text(argument) {
            desk.take(argument, &text.split(':').collect::<Vec<_>>())?;
        }
    }
    if *argument == "ifname" {
        return Ok(());
    }
    let text = arguments.text(argument).unwrap_or_default();
    let names: Vec<&str> = text.split(':').collect();
    let most = match *argument {
        "fd" => 1,
        _ => usize::from(limits::MAX_NET_QUEUE_PAIRS),
    };
    if names.len() > most {
        return wrong(format!(
            "Parameter '{argument}' names {} descriptors; allowed: 1 to {most}",
            names.len()
        ));
    }
    if let Some(queues) = arguments.uint("queues")
        && queues != names.len() as u64
    {
        return wrong(format!(
            "Parameter 'queues' is {queues}, and '{argument}' names {} descriptors; one for each queue pair is needed",
            names.len()
        ));
    }
    let fds = desk.take(argument, &names)?;
    arguments.bring(fds);
    Ok(())
}

fn nothing(ticket: Ticket) -> Reply<()> {
    Reply::new(ticket, |_, ()| json!({}))
}

/// What QEMU's iothreads can be told.
const IOTHREAD: &[&str] = &[
    "poll-max-ns",
    "poll-grow",
    "poll-shrink",
    "aio-max-batch",
    "thread-pool-min",
    "thread-pool-max",
];

/// `object-add`
fn object_add(ticket: Ticket, mut arguments: Arguments) -> VmCommand {
    let (kind, id) = (
        arguments.required_text("qom-type"),
        arguments.required_text("id"),
    );
    let refused = match kind.as_str() {
        "iothread" => {
            let rest = arguments.rest();
            match rest.keys().find(|name| !IOTHREAD.contains(&name.as_str())) {
                Some(name) => format!(
                    "Parameter '{}' is unexpected; allowed for an iothread: {}",
                    shown(name),
                    IOTHREAD.join(", ")
                ),
                None if id.is_empty() => "Parameter 'id' is empty".into(),
                None => return VmCommand::IothreadAdd(id, nothing(ticket)),
            }
        }
        memory if memory.starts_with("memory-backend-") => format!(
            "Object type '{}' cannot be added: the guest's memory is what the command line gave",
            shown(memory)
        ),
        "rng-random" | "rng-builtin" | "rng-egd" => format!(
            "Object type '{kind}' cannot be added: there is no device yet that could use it"
        ),
        other => format!(
            "Parameter 'qom-type' does not accept value '{}'; allowed: iothread",
            shown(other)
        ),
    };
    VmCommand::Wrong(refused, nothing(ticket))
}

pub(super) static COMMANDS: &[Command] = &[
    main(
        "object-add",
        "Adds an iothread, which devices can name from then on. Other objects are refused: memory is what the command line gave, and no device could use the rest",
        object_add,
    )
    .takes(&[
        must("qom-type", Type::ID, "`iothread`"),
        must("id", Type::ID, "its id"),
    ])
    .takes_more(),
    main(
        "object-del",
        "Removes an iothread that `object-add` added and no device names",
        |ticket, mut arguments| {
            VmCommand::ObjectDel(arguments.required_text("id"), nothing(ticket))
        },
    )
    .takes(&[must("id", Type::ID, "its id")]),
    here(
        "chardev-add",
        "Refuses: character devices are those of the command line, because no device that is added later could use another",
        |_, mut arguments| {
            Err(QmpError::generic(format!(
                "Chardev '{}' cannot be added: character devices are those of -chardev, since no device that is added later uses one",
                shown(&arguments.required_text("id"))
            )))
        },
    )
    .takes(&[
        must("id", Type::ID, "its id"),
        must("backend", Type::Any, "what it leads to"),
    ])
    .returns(Type::Object(&object(
        "ChardevReturn",
        &[may("pty", Type::TEXT, "path of the terminal that was made")],
    ))),
    main(
        "chardev-remove",
        "Refuses: character devices are those of the command line and stay",
        |ticket, mut arguments| {
            let id = arguments.required_text("id");
            VmCommand::Facts(Reply::with(ticket, move |_, facts: VmFacts| {
                let there = facts.spec.chardevs.iter().any(|one| one.id == id);
                Err::<Value, _>(QmpError::generic(if there {
                    format!("Chardev '{id}' is of the command line, and stays as long as the VM")
                } else {
                    format!("Chardev '{}' not found", shown(&id))
                }))
            }))
        },
    )
    .takes(&[must("id", Type::ID, "its id")]),
    main(
        "blockdev-add",
        "Opens an image for a disk to come",
        |ticket, mut arguments| {
            let qcow2 = arguments.at(&["driver"]).and_then(Value::as_str) == Some("qcow2");
            if arguments.at(&["backing"]).is_some_and(Value::is_string) && !qcow2 {
                return VmCommand::Wrong(
                    "Parameter 'backing' needs driver qcow2".into(),
                    nothing(ticket),
                );
            }
            match NodeOver::read(&mut arguments) {
                Some(node) => VmCommand::NodeOver(Box::new(node), nothing(ticket)),
                None => add(ticket, arguments, |arguments, _| NewBackend::drive(arguments)),
            }
        },
    )
    .takes(BLOCKDEV)
    .brings(image_descriptor),
    main(
        "blockdev-del",
        "Closes an image that no disk uses",
        |ticket, mut arguments| {
            VmCommand::BackendDel(
                BackendKind::Drive,
                arguments.required_text("node-name"),
                nothing(ticket),
            )
        },
    )
    .takes(&[must("node-name", Type::ID, "its name")]),
    main(
        "netdev_add",
        "Takes a tap for a card to come",
        |ticket, arguments| {
            add(ticket, arguments, NewBackend::netdev)
        },
    )
    .takes(NETDEV)
    .brings(tap_descriptors),
    main(
        "netdev_del",
        "Gives up a tap that no card uses",
        |ticket, mut arguments| {
            VmCommand::BackendDel(
                BackendKind::Netdev,
                arguments.required_text("id"),
                nothing(ticket),
            )
        },
    )
    .takes(&[must("id", Type::ID, "its id")]),
    main(
        "fsdev-add",
        "Opens a folder for a device to come",
        |ticket, arguments| {
            add(ticket, arguments, |arguments, _| NewBackend::fsdev(arguments))
        },
    )
    .takes(FSDEV),
    main(
        "fsdev-del",
        "Closes a folder that no device uses",
        |ticket, mut arguments| {
            VmCommand::BackendDel(
                BackendKind::Fsdev,
                arguments.required_text("id"),
                nothing(ticket),
            )
        },
    )
    .takes(&[must("id", Type::ID, "its id")]),
    main(
        "device_add",
        "Starts a device's process and shows the device to the guest: at once to one that reads ACPI, and at its next start to others",
        |ticket, arguments| match NewDevice::read(arguments) {
            Ok(device) => VmCommand::DeviceAdd(Box::new(device), nothing(ticket)),
            Err(why) => VmCommand::Wrong(why, nothing(ticket)),
        },
    )
    .takes(DEVICE),
    main(
        "block_resize",
        "Makes a disk's image longer, up to `max-size=` of its `-drive`, and shows the guest its new size; an image is never made shorter. For a block device of the host, whose size somebody else has changed, `size` must be what it has now. The disk's process is replaced by one that may write that far (DEVICE_UPGRADED)",
        |ticket, mut arguments| {
            let names = (arguments.text("device"), arguments.text("node-name"));
            let ((Some(name), None) | (None, Some(name))) = names else {
                return VmCommand::Wrong(
                    "block_resize takes exactly one of 'device' and 'node-name'".into(),
                    nothing(ticket),
                );
            };
            let size = arguments.uint("size").unwrap_or_default();
            VmCommand::BlockResize(name, size, nothing(ticket))
        },
    )
    .takes(&[
        may("device", Type::ID, "id of the drive, or of the disk"),
        may("node-name", Type::ID, "the same"),
        must(
            "size",
            Type::Int(0, limits::MAX_IMAGE_SIZE),
            "bytes, a multiple of 512",
        ),
    ]),
    main(
        "device-upgrade",
        "Replaces a device's process by one of the program that is at its place now, in the same jail, while the guest runs: answers when the old one is gone. If the new one does not come up, or cannot go on with what a shared folder's guest has open, the old one serves on",
        |ticket, mut arguments| {
            VmCommand::DeviceUpgrade(arguments.required_text("id"), nothing(ticket))
        },
    )
    .takes(&[must("id", Type::ID, "its id")]),
    main(
        "device_del",
        "Takes a device out: a disk loses its medium, a card its link, and requests that are under way are ended first; what the guest asks for after that is not answered until a device with the same addr is added",
        |ticket, mut arguments| {
            VmCommand::DeviceDel(arguments.required_text("id"), nothing(ticket))
        },
    )
    .takes(&[must("id", Type::ID, "its id")]),
];
