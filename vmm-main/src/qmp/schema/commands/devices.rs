//! Devices and what is behind them.

use serde_json::json;

use crate::qmp::command::{ChardevInfo, IothreadInfo, QmpError, Reply, VmCommand, Workload};
use crate::qmp::objects;
use crate::qmp::schema::types::{Command, Enum, Object, Type, here, main, may, must, object};

const IOTHREAD: Object = object(
    "IOThreadInfo",
    &[
        must("id", Type::ID, "its id"),
        must(
            "thread-id",
            Type::INT,
            "id on the host of the process that does its work",
        ),
        must("poll-max-ns", Type::UINT, "always 0: nobody polls for it"),
        must("poll-grow", Type::UINT, "always 0"),
        must("poll-shrink", Type::UINT, "always 0"),
        must("aio-max-batch", Type::UINT, "always 0: no limit of its own"),
    ],
);

const CHARDEV: Object = object(
    "ChardevInfo",
    &[
        must("label", Type::ID, "its id"),
        must(
            "filename",
            Type::TEXT,
            "where it leads; a pty's names its terminal",
        ),
        must(
            "frontend-open",
            Type::Bool,
            "whether the guest's device uses it",
        ),
    ],
);

const CACHE: Object = object(
    "BlockdevCacheInfo",
    &[
        must(
            "writeback",
            Type::Bool,
            "whether the guest may choose to write without waiting for the disk",
        ),
        must(
            "direct",
            Type::Bool,
            "whether the host's page cache is left out",
        ),
        must("no-flush", Type::Bool, "always false: flushes are done"),
    ],
);

const INSERTED: Object = object(
    "BlockDeviceInfo",
    &[
        must("file", Type::TEXT, "the image's path"),
        may("node-name", Type::ID, "id of the `-drive`"),
        must("ro", Type::Bool, "whether the guest cannot write"),
        must("drv", Type::TEXT, "format of the image"),
        must("encrypted", Type::Bool, "always false"),
        must(
            "detect_zeroes",
            Type::Enum(&Enum {
                name: "BlockdevDetectZeroesOptions",
                values: &["off", "on", "unmap"],
            }),
            "`detect-zeroes`",
        ),
        must("bps", Type::UINT, "limit in bytes a second, 0 for none"),
        must("bps_rd", Type::UINT, "the same for reads"),
        must("bps_wr", Type::UINT, "the same for writes"),
        must("iops", Type::UINT, "limit in requests a second, 0 for none"),
        must("iops_rd", Type::UINT, "the same for reads"),
        must("iops_wr", Type::UINT, "the same for writes"),
        must("cache", Type::Object(&CACHE), "caching"),
        must("write_threshold", Type::UINT, "always 0"),
        must("backing_file_depth", Type::UINT, "images below it"),
        may(
            "image",
            Type::Object(&IMAGE),
            "what its process knows of it, while there is a disk",
        ),
    ],
);

const IMAGE: Object = object(
    "ImageInfo",
    &[
        must("filename", Type::TEXT, "its path"),
        must("format", Type::TEXT, "its format"),
        must("virtual-size", Type::UINT, "bytes that the guest sees"),
        may(
            "cluster-size",
            Type::UINT,
            "bytes of a cluster, if it has them",
        ),
        may(
            "snapshots",
            Type::List(&Type::Object(&super::disks::SNAPSHOT)),
            "those inside of it, if there are any",
        ),
    ],
);

const BLOCK: Object = object(
    "BlockInfo",
    &[
        must("device", Type::ID, "id of the `-drive`"),
        may("qdev", Type::ID, "id of the `-device`"),
        must("type", Type::TEXT, "always `unknown`"),
        must("removable", Type::Bool, "always false"),
        must("locked", Type::Bool, "always false"),
        may(
            "io-status",
            Type::Enum(&Enum {
                name: "BlockDeviceIoStatus",
                values: &["ok", "failed", "nospace"],
            }),
            "whether the guest has stopped because the host failed this disk",
        ),
        may("inserted", Type::Object(&INSERTED), "the image"),
    ],
);

const WORKLOAD: Object = object(
    "WorkloadInfo",
    &[
        must("module", Type::ID, "id of the device"),
        must(
            "state",
            Type::Enum(&Enum {
                name: "WorkloadState",
                values: &[
                    "serving", "starting", "stopping", "waiting", "foreign", "failed",
                ],
            }),
            "what its process does; `waiting` is a disk's that the host failed, until `cont`; `foreign` is a daemon of \
             somebody else's",
        ),
        may("pid", Type::INT, "id of the process, if there is one"),
        may(
            "ifname",
            Type::TEXT,
            "a card's tap, if it was given by its name",
        ),
    ],
);

const NO_BALLOON: &str = "No balloon device has been activated";

pub(super) static COMMANDS: &[Command] = &[
    main("query-block", "Lists the guest's disks", |ticket, _| {
        VmCommand::Disks(Reply::new(ticket, |_, disks| objects::disks(&disks)))
    })
    .returns(Type::List(&Type::Object(&BLOCK))),
    main(
        "query-named-block-nodes",
        "Lists the drives, with or without a device",
        |ticket, _| VmCommand::Disks(Reply::new(ticket, |_, disks| objects::nodes(&disks))),
    )
    .takes(&[may(
        "flat",
        Type::Bool,
        "accepted: no drive tells here what is below it",
    )])
    .returns(Type::List(&Type::Object(&INSERTED))),
    here(
        "query-block-jobs",
        "Lists jobs on disks, of which there are none",
        |_, _| Ok(json!([])),
    )
    .returns(Type::List(&Type::Any)),
    here(
        "query-jobs",
        "Lists jobs, of which there are none",
        |_, _| Ok(json!([])),
    )
    .returns(Type::List(&Type::Any)),
    main(
        "query-workloads",
        "Tells what each device's process does",
        |ticket, _| {
            VmCommand::Workloads(Reply::new(ticket, |_, workloads| {
                let one = |workload: Workload| {
                    let mut entry = json!({ "module": workload.device, "state": workload.state });
                    if let Some(pid) = workload.pid {
                        entry["pid"] = pid.into();
                    }
                    if let Some(ifname) = workload.ifname {
                        entry["ifname"] = ifname.into();
                    }
                    entry
                };
                workloads.into_iter().map(one).collect()
            }))
        },
    )
    .returns(Type::List(&Type::Object(&WORKLOAD))),
    here(
        "balloon",
        "Asks the guest to leave memory to the host; there is no balloon device yet",
        |_, _| Err(QmpError::device_not_active(NO_BALLOON)),
    )
    .takes(&[must("value", Type::UINT, "bytes that the guest keeps")]),
    here(
        "query-balloon",
        "Tells how much memory the guest keeps; there is no balloon device yet",
        |_, _| Err(QmpError::device_not_active(NO_BALLOON)),
    )
    .returns(Type::Object(&object(
        "BalloonInfo",
        &[must("actual", Type::UINT, "bytes that the guest keeps")],
    ))),
    here(
        "query-tpm-models",
        "Lists TPMs, of which there are none",
        |_, _| Ok(json!([])),
    )
    .returns(Type::TEXTS),
    here(
        "query-tpm-types",
        "Lists kinds of TPMs, of which there are none",
        |_, _| Ok(json!([])),
    )
    .returns(Type::TEXTS),
    here(
        "query-tpm",
        "Lists the VM's TPMs, of which there are none",
        |_, _| Ok(json!([])),
    )
    .returns(Type::List(&Type::Any)),
    here(
        "query-pci",
        "Lists PCI buses, of which these boards have none",
        |_, _| Ok(json!([])),
    )
    .returns(Type::List(&Type::Any)),
    here(
        "query-vnc",
        "Tells about VNC, which there is not",
        |_, _| Ok(json!({ "enabled": false })),
    )
    .returns(Type::Object(&object(
        "VncInfo",
        &[must("enabled", Type::Bool, "always false")],
    ))),
    main(
        "query-chardev",
        "Lists the character devices",
        |ticket, _| {
            VmCommand::Chardevs(Reply::new(ticket, |_, chardevs| {
                let one = |chardev: ChardevInfo| {
                    json!({
                        "label": chardev.label,
                        "filename": chardev.filename,
                        "frontend-open": chardev.frontend_open,
                    })
                };
                chardevs.into_iter().map(one).collect()
            }))
        },
    )
    .returns(Type::List(&Type::Object(&CHARDEV))),
    main(
        "set_link",
        "Pulls the cable of a network card, or plugs it in: the guest sees its link go, what it sends goes nowhere, and what comes for it meanwhile is dropped",
        |ticket, mut arguments| {
            VmCommand::SetLink(
                arguments.required_text("name"),
                arguments.flag("up").unwrap_or(true),
                Reply::new(ticket, |_, ()| json!({})),
            )
        },
    )
    .takes(&[
        must("name", Type::ID, "id of the card or of its netdev"),
        must("up", Type::Bool, "whether there is a link"),
    ]),
    main(
        "announce-self",
        "Has network cards tell the network where the guest is, as they do by themselves when a VM goes on from a snapshot: the guest's driver does it, or, if it cannot, the card's process sends one frame (RARP)",
        |ticket, mut arguments| {
            VmCommand::AnnounceSelf(
                arguments.texts("interfaces"),
                Reply::new(ticket, |_, ()| json!({})),
            )
        },
    )
    .takes(&[
        may("initial", Type::UINT, "accepted: it is done once, now"),
        may("max", Type::UINT, "accepted"),
        may("rounds", Type::UINT, "accepted"),
        may("step", Type::UINT, "accepted"),
        may("id", Type::ID, "accepted"),
        may(
            "interfaces",
            Type::List(&Type::ID),
            "ids of cards or their netdevs; all cards without it",
        ),
    ]),
    main("query-iothreads", "Lists the iothreads", |ticket, _| {
        VmCommand::Iothreads(Reply::new(ticket, |_, threads| {
            let one = |thread: IothreadInfo| {
                json!({
                    "id": thread.id,
                    "thread-id": thread.thread_id,
                    "poll-max-ns": 0, "poll-grow": 0, "poll-shrink": 0, "aio-max-batch": 0,
                })
            };
            threads.into_iter().map(one).collect()
        }))
    })
    .returns(Type::List(&Type::Object(&IOTHREAD))),
];
