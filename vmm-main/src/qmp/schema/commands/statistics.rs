//! What counters and filters there are.

use serde_json::json;

use ipc::spec::vm::DeviceKind;

use crate::qmp::command::{QmpError, Reply, VmCommand, VmFacts};
use crate::qmp::objects;
use crate::qmp::schema::check::shown;
use crate::qmp::schema::types::{Command, Enum, Object, Type, here, main, may, must, object};

const PROVIDER: Type = Type::Enum(&Enum {
    name: "StatsProvider",
    values: &["kvm"],
});

const BLOCK_STATS: Object = object(
    "BlockDeviceStats",
    &[
        must("rd_bytes", Type::UINT, "bytes read"),
        must("wr_bytes", Type::UINT, "bytes written, and zeroed"),
        must("unmap_bytes", Type::UINT, "bytes discarded"),
        must("rd_operations", Type::UINT, "reads"),
        must("wr_operations", Type::UINT, "writes, and ranges zeroed"),
        must("flush_operations", Type::UINT, "flushes"),
        must("unmap_operations", Type::UINT, "discards"),
        must(
            "rd_total_time_ns",
            Type::UINT,
            "nanoseconds that reads took",
        ),
        must(
            "wr_total_time_ns",
            Type::UINT,
            "nanoseconds that writes took",
        ),
        must(
            "flush_total_time_ns",
            Type::UINT,
            "nanoseconds that flushes took",
        ),
        must(
            "unmap_total_time_ns",
            Type::UINT,
            "nanoseconds that discards took",
        ),
        must(
            "wr_highest_offset",
            Type::UINT,
            "the first byte behind the highest one that was written",
        ),
        must("rd_merged", Type::UINT, "always 0: requests are not merged"),
        must("wr_merged", Type::UINT, "always 0"),
        must("unmap_merged", Type::UINT, "always 0"),
        must(
            "failed_rd_operations",
            Type::UINT,
            "reads that the host failed",
        ),
        must(
            "failed_wr_operations",
            Type::UINT,
            "writes that the host failed",
        ),
        must(
            "failed_flush_operations",
            Type::UINT,
            "flushes that the host failed",
        ),
        must(
            "failed_unmap_operations",
            Type::UINT,
            "discards that the host failed",
        ),
        must(
            "invalid_rd_operations",
            Type::UINT,
            "reads that are not inside of the disk",
        ),
        must(
            "invalid_wr_operations",
            Type::UINT,
            "writes that are not, or on a read-only disk",
        ),
        must("invalid_flush_operations", Type::UINT, "always 0"),
        must(
            "invalid_unmap_operations",
            Type::UINT,
            "discards that are not, or on a read-only disk",
        ),
        must(
            "account_invalid",
            Type::Bool,
            "false: those are not in the times",
        ),
        must("account_failed", Type::Bool, "true: those are in the times"),
        must("timed_stats", Type::List(&Type::Any), "always empty"),
    ],
);

const STATS: Object = object(
    "BlockStats",
    &[
        may("device", Type::ID, "id of the `-drive`"),
        may("qdev", Type::ID, "id of the `-device`"),
        may("node-name", Type::ID, "id of the `-drive`"),
        must("stats", Type::Object(&BLOCK_STATS), "the numbers"),
    ],
);

pub(super) static COMMANDS: &[Command] = &[
    here(
        "query-stats",
        "Lists counters, of which there are none: this program asks KVM for no statistics, and disks have `query-blockstats`",
        |_, _| Ok(json!([])),
    )
    .takes(&[
        must(
            "target",
            Type::Enum(&Enum {
                name: "StatsTarget",
                values: &["vm", "vcpu"],
            }),
            "whose",
        ),
        may("providers", Type::List(&Type::Any), "accepted, without effect"),
        may("vcpus", Type::TEXTS, "accepted, without effect"),
    ])
    .returns(Type::List(&Type::Any)),
    here(
        "query-stats-schemas",
        "Describes the counters of `query-stats`, of which there are none",
        |_, _| Ok(json!([])),
    )
    .takes(&[may("provider", PROVIDER, "whose")])
    .returns(Type::List(&Type::Any)),
    main(
        "query-blockstats",
        "Tells what the guest's disks have done. Numbers go on over restarts and upgrades of a disk's process, resets, and \
         snapshots; those of a disk of somebody else's daemon are not known here, and it is not listed",
        |ticket, arguments| {
            let nodes = arguments.flag("query-nodes").unwrap_or(false);
            VmCommand::Blockstats(Reply::with(ticket, move |_, counted| {
                Ok(objects::blockstats(&counted, nodes))
            }))
        },
    )
    .takes(&[may(
        "query-nodes",
        Type::Bool,
        "list all drives instead, also those without a disk",
    )])
    .returns(Type::List(&Type::Object(&STATS))),
    main(
        "query-rx-filter",
        "Lists what network cards let through. A card's filter is known to its process alone, so the list is empty, and asking for a card by name is an error",
        |ticket, mut arguments| {
            let name = arguments.text("name");
            VmCommand::Facts(Reply::with(ticket, move |_, facts: VmFacts| {
                let Some(name) = name else {
                    return Ok(json!([]));
                };
                let device = facts.spec.devices.iter().find(|device| {
                    device.id == name
                        || matches!(&device.kind, DeviceKind::Net { netdev, .. } if *netdev == name)
                });
                Err(QmpError::generic(match device.map(|device| &device.kind) {
                    None => format!("invalid net client name: {}", shown(&name)),
                    Some(DeviceKind::Net { .. }) => {
                        format!("net client({name}) doesn't support rx-filter querying")
                    }
                    Some(_) => format!("net client({name}) isn't a NIC"),
                }))
            }))
        },
    )
    .takes(&[may("name", Type::ID, "id of the card")])
    .returns(Type::List(&Type::Any)),
];
