//! What comes to the running VM and goes.

use crate::qmp::command::{QmpError, Reply, Ticket, VmCommand};
use crate::qmp::descriptors::Desk;
use crate::qmp::plug::{BackendKind, DRIVERS, NewBackend, NewDevice, NodeOver, OtherTap};
use crate::qmp::schema::Arguments;
use crate::qmp::schema::check::shown;
use crate::qmp::schema::types::{
    Command, Enum, Member, Object, OneOf, Type, Variants, main, may, must, object,
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

const CHARDEV: Object = Object {
    name: "ChardevBackend",
    members: &[must(
        "type",
        Type::Enum(&Enum {
            name: "ChardevBackendKind",
            values: &["socket"],
        }),
        "a unix socket, or a connection that a client passed",
    )],
    variants: Some(Variants {
        tag: "type",
        cases: &[(
            "socket",
            &object(
                "ChardevSocketWrapper",
                &[must("data", Type::Object(&CHARDEV_SOCKET), "where it is")],
            ),
        )],
    }),
};

const CHARDEV_SOCKET: Object = object(
    "ChardevSocket",
    &[
        must("addr", Type::Object(&ADDRESS), "its address"),
        may(
            "server",
            Type::Bool,
            "accepted: it is always the daemon that listens",
        ),
        may("wait", Type::Bool, "accepted: nothing is waited for"),
        may("nodelay", Type::Bool, "accepted: of TCP"),
        may("telnet", Type::Bool, "accepted: never"),
        may("tn3270", Type::Bool, "accepted: never"),
        may("websocket", Type::Bool, "accepted: never"),
        may(
            "reconnect",
            Type::INT,
            "accepted: `restart` of the device says whether a daemon that left is tried again",
        ),
        may("logfile", PATH, "accepted: nothing is logged"),
        may("logappend", Type::Bool, "accepted: nothing is logged"),
    ],
);

const ADDRESS: Object = Object {
    name: "SocketAddressLegacy",
    members: &[must(
        "type",
        Type::Enum(&Enum {
            name: "SocketAddressType",
            values: &["unix", "fd"],
        }),
        "its kind",
    )],
    variants: Some(Variants {
        tag: "type",
        cases: &[("unix", &ADDRESS_UNIX), ("fd", &ADDRESS_FD)],
    }),
};

const ADDRESS_UNIX: Object = object(
    "UnixSocketAddressWrapper",
    &[must(
        "data",
        Type::Object(&object(
            "UnixSocketAddress",
            &[
                must(
                    "path",
                    PATH,
                    "absolute, beneath a folder that `-hotplug sockets=` grants",
                ),
                may("abstract", Type::Bool, "must be false: sockets have a path"),
                may("tight", Type::Bool, "accepted: of abstract sockets"),
            ],
        )),
        "where the daemon listens",
    )],
);

const ADDRESS_FD: Object = object(
    "FdSocketAddressWrapper",
    &[must(
        "data",
        Type::Object(&object(
            "String",
            &[must(
                "str",
                Type::ID,
                "the name of a connected socket that `getfd` took, which the name loses, or the number of one that `add-fd` took. It serves one device once",
            )],
        )),
        "a connection",
    )],
);

const DIRECTIONS: [&str; 4] = ["rx-packets", "rx-bytes", "tx-packets", "tx-bytes"];

const RATE: Type = Type::Int(0, limits::MAX_NET_RATE);
const BURST: Type = Type::Int(1, limits::MAX_NET_RATE);
const LIMIT: &str = "as of `-netdev`";

const NETDEV: &[Member] = &[
    must("id", Type::ID, "name that a device refers to"),
    may(
        "type",
        Type::Enum(&Enum {
            name: "NetClientDriver",
            values: &["tap", "vhost-user"],
        }),
        "default tap",
    ),
    may(
        "chardev",
        Type::ID,
        "for vhost-user: a chardev of `chardev-add`'s, behind which the daemon is that moves the packets",
    ),
    may(
        "vhostforce",
        Type::Bool,
        "accepted: packets of vhost-user always go through its daemon",
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
        "the host's kernel passes the packets (vhost-net), as `-netdev vhost=on`; takes `-hotplug vhost=on`",
    ),
    may(
        "vhostfd",
        Type::ID,
        "accepted: this descriptor is closed, for each process of the card has one that was opened for it",
    ),
    may(
        "vhostfds",
        Type::TEXT,
        "accepted: these are closed, as `vhostfd` is",
    ),
    may("throttling.rx-packets", RATE, LIMIT),
    may("throttling.rx-packets-burst", BURST, LIMIT),
    may("throttling.rx-bytes", RATE, LIMIT),
    may("throttling.rx-bytes-burst", BURST, LIMIT),
    may("throttling.tx-packets", RATE, LIMIT),
    may("throttling.tx-packets-burst", BURST, LIMIT),
    may("throttling.tx-bytes", RATE, LIMIT),
    may("throttling.tx-bytes-burst", BURST, LIMIT),
    may(
        "poll-us",
        Type::Int(0, limits::MAX_POLL_US as u64),
        "as of `-netdev`",
    ),
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
        "chardev",
        Type::ID,
        "for vhost-user-blk-device and vhost-user-fs-device: a chardev of `chardev-add`'s",
    ),
    may(
        "addr",
        Type::Text(8),
        "number among the devices of its kind, as in 0x1: one that was used before is used again, whatever the guest still has open there; default: one that nobody used",
    ),
    may(
        "romfile",
        Type::Text(0),
        "accepted if it is empty, as Kata sends it: no device has a ROM",
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
    may(
        "iothread",
        Type::ID,
        "id of an -object iothread; not with a daemon, which has its own threads",
    ),
    may("restart", Type::Bool, "as `-device restart=`"),
    may(
        "max-restarts",
        Type::Int(1, limits::MAX_RESTARTS as u64),
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

/// The descriptor that the address of a socket names.
fn chardev_descriptor(desk: &mut Desk<'_>, arguments: &mut Arguments) -> Result<(), QmpError> {
    let at = ["backend", "data", "addr", "data"];
    let data = |name| arguments.at(&[at[0], at[1], at[2], at[3], name]);
    let at = at.join(".");
    if data("abstract").and_then(Value::as_bool) == Some(true) {
        return Err(QmpError::generic(format!(
            "Parameter '{at}.abstract' is true; allowed: false"
        )));
    }
    if let Some(name) = data("str").and_then(Value::as_str) {
        let fds = desk.take(&format!("{at}.str"), &[name])?;
        arguments.bring(fds);
    }
    Ok(())
}

/// The descriptors that `fd` or `fds` name.
fn tap_descriptors(desk: &mut Desk<'_>, arguments: &mut Arguments) -> Result<(), QmpError> {
    let wrong = |what: String| Err(QmpError::generic(what));
    for name in DIRECTIONS {
        let rate = format!("throttling.{name}");
        let burst = format!("{rate}-burst");
        if arguments.at(&[&burst]).is_some() && arguments.uint(&rate).unwrap_or(0) == 0 {
            return wrong(format!("Parameter '{burst}' needs '{rate}' above 0"));
        }
    }
    let daemon = arguments
        .at(&["type"])
        .is_some_and(|kind| kind == "vhost-user");
    match (daemon, arguments.at(&["chardev"]).is_some()) {
        (true, false) => return wrong("Parameter 'chardev' is missing".into()),
        (false, true) => {
            return wrong("Parameter 'chardev' is unexpected: of type vhost-user".into());
        }
        (false, false) => {}
        (true, true) => {
            let of_tap = [
                "ifname", "fd", "fds", "vhost", "vhostfd", "vhostfds", "poll-us",
            ]
            .into_iter();
            let limits = DIRECTIONS
                .into_iter()
                .map(|name| format!("throttling.{name}"));
            let mut others = of_tap.map(str::to_owned).chain(limits);
            if let Some(name) = others.find(|name| arguments.at(&[name]).is_some()) {
                return wrong(format!(
                    "Parameter '{name}' is unexpected: not of type vhost-user"
                ));
            }
            if arguments.uint("queues").is_some_and(|queues| queues != 1) {
                return wrong("Parameter 'queues' is not 1; allowed with vhost-user: 1".into());
            }
            return Ok(());
        }
    }
    let argument = way_to_tap("netdev_add", arguments)?;
    if arguments.at(&["vhost"]) == Some(&Value::Bool(true))
        && let Some(rate) = DIRECTIONS
            .map(|name| format!("throttling.{name}"))
            .iter()
            .find(|rate| arguments.uint(rate).unwrap_or(0) > 0)
    {
        return wrong(format!(
            "Parameter '{rate}' contradicts 'vhost', with which packets do not pass this program"
        ));
    }
    if arguments.at(&["vhost"]) == Some(&Value::Bool(true))
        && arguments.uint("poll-us").unwrap_or(0) > 0
    {
        return wrong(
            "Parameter 'poll-us' contradicts 'vhost', with which packets do not pass this program; allowed with it: 0"
                .into(),
        );
    }
    // Those of vhost are taken and closed, whatever follows.
    for argument in ["vhostfd", "vhostfds"] {
        if let Some(text) = arguments.text(argument) {
            desk.take(argument, &text.split(':').collect::<Vec<_>>())?;
        }
    }
    take_queues(argument, desk, arguments)
}

/// Those of the tap that takes the place of another one.
fn other_tap_descriptors(desk: &mut Desk<'_>, arguments: &mut Arguments) -> Result<(), QmpError> {
    let argument = way_to_tap("netdev_replace", arguments)?;
    take_queues(argument, desk, arguments)
}

/// Which of the arguments of `command` leads to the tap.
fn way_to_tap(command: &str, arguments: &Arguments) -> Result<&'static str, QmpError> {
    let given: Vec<&'static str> = ["ifname", "fd", "fds"]
        .into_iter()
        .filter(|name| arguments.at(&[name]).is_some())
        .collect();
    let [argument] = given.as_slice() else {
        return Err(QmpError::generic(format!(
            "{command} takes one of ifname, fd and fds; given: {}",
            if given.is_empty() {
                "none".into()
            } else {
                given.join(", ")
            }
        )));
    };
    Ok(*argument)
}

/// The descriptors that `argument` names, if it is not a tap's name.
fn take_queues(
    argument: &str,
    desk: &mut Desk<'_>,
    arguments: &mut Arguments,
) -> Result<(), QmpError> {
    let wrong = |what: String| Err(QmpError::generic(what));
    if argument == "ifname" {
        return Ok(());
    }
    let text = arguments.text(argument).unwrap_or_default();
    let names: Vec<&str> = text.split(':').collect();
    let most = match argument {
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
    main(
        "chardev-add",
        "Names the socket of a vhost-user daemon for a device to come: `vhost-user-blk-device`, `vhost-user-fs-device`, or a card by \
         `netdev_add` of type vhost-user. The daemon listens already, and is connected to when the device is added. Other character \
         devices are those of -chardev: no device that is added later uses one",
        |ticket, arguments| add(ticket, arguments, NewBackend::chardev),
    )
    .takes(&[
        must("id", Type::ID, "its id"),
        must("backend", Type::Object(&CHARDEV), "what it leads to"),
    ])
    .brings(chardev_descriptor)
    .returns(Type::Object(&object(
        "ChardevReturn",
        &[may("pty", Type::TEXT, "never: no terminal is made")],
    ))),
    main(
        "chardev-remove",
        "Forgets a character device of `chardev-add`'s that no device uses. Those of the command line stay",
        |ticket, mut arguments| {
            VmCommand::BackendDel(
                BackendKind::Chardev,
                arguments.required_text("id"),
                nothing(ticket),
            )
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
        "netdev_replace",
        "Puts another tap under a card that runs; QEMU has no such command. The guest keeps its card, its address and everything that it \
         has negotiated, and its connections if the new tap leads to the same network: to it this is a pause as of `device-upgrade`, in \
         which packets may be lost. Another process in the same jail takes the place of the one that serves (DEVICE_UPGRADED), and the \
         new tap is the card's for the processes after it as well; then the network is told where the guest is, as by `announce-self`. The \
         old tap is free when this answers. What is refused leaves the old tap where it is",
        |ticket, mut arguments| {
            let fds = arguments.descriptors();
            VmCommand::NetdevReplace(OtherTap::read(arguments), fds, nothing(ticket))
        },
    )
    .takes(&[
        must("id", Type::ID, "id of the netdev, which a card has"),
        may(
            "type",
            Type::Enum(&Enum {
                name: "NetReplaceDriver",
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
            "queue pairs: those that the netdev has",
        ),
    ])
    .brings(other_tap_descriptors),
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
        "Makes a disk longer, up to `max-size=` of its `-drive`, and shows the guest its new size; a disk is never made shorter. For a block device of the host, whose size somebody else has changed, `size` must be what it has now. The process of a raw disk is replaced by one that may write that far (DEVICE_UPGRADED); that of a qcow2 disk does it itself",
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
        "Takes a device out: a disk loses its medium, a card its link, and requests that are under way are ended first; what the guest asks for after that is not answered until a device with the same addr is added, but for what a card's driver says on its control queue: a process without a tap answers that. Its back end stays, but one of a driver `-mmio` with the same id makes room when its name or its place is needed, as StratoVirt's clients expect",
        |ticket, mut arguments| {
            VmCommand::DeviceDel(arguments.required_text("id"), nothing(ticket))
        },
    )
    .takes(&[must("id", Type::ID, "its id")]),
];
