//! What counters and filters there are.

use serde_json::json;

use ipc::spec::vm::DeviceKind;

use crate::qmp::command::{QmpError, Reply, VmCommand, VmFacts};
use crate::qmp::schema::check::shown;
use crate::qmp::schema::types::{Command, Enum, Type, here, main, may, must};

const PROVIDER: Type = Type::Enum(&Enum {
    name: "StatsProvider",
    values: &["kvm"],
});

pub(super) static COMMANDS: &[Command] = &[
    here(
        "query-stats",
        "Lists counters, of which there are none: this program asks KVM for no statistics, and its processes report none",
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
