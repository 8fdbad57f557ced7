//! The board, its processors and accelerators.

use serde_json::{Value, json};

use ipc::limits;
use ipc::spec::vm::MachineKind;

use crate::qmp::command::{CpuThread, Reply, VmCommand};
use crate::qmp::schema::types::{
    Command, Enum, Member, Object, Type, here, main, may, must, object,
};
use crate::qmp::session::Info;

const ACCELERATOR: Type = Type::Enum(&Enum {
    name: "Accelerator",
    values: &["kvm"],
});

const ARCH: Type = Type::Enum(&Enum {
    name: "SysEmuTarget",
    values: &["x86_64", "aarch64"],
});

const MACHINE: Object = object(
    "MachineInfo",
    &[
        must("name", Type::TEXT, "for `-machine`"),
        may("is-default", Type::Bool, "whether it needs no `-machine`"),
        must("cpu-max", Type::UINT, "vCPUs at most"),
        must(
            "hotpluggable-cpus",
            Type::Bool,
            "whether vCPUs can be added while it runs",
        ),
        must(
            "numa-mem-supported",
            Type::Bool,
            "whether `-numa node,mem=` exists",
        ),
        must("deprecated", Type::Bool, "whether it will go away"),
        must("acpi", Type::Bool, "whether it describes itself by ACPI"),
    ],
);

const PROPS: Object = object(
    "CpuInstanceProperties",
    &[
        may("socket-id", Type::UINT, "socket in the machine"),
        may("die-id", Type::UINT, "die in the socket"),
        may("core-id", Type::UINT, "core in the die"),
        may("thread-id", Type::UINT, "thread in the core"),
    ],
);

const PROPS_MEMBER: Member = may("props", Type::Object(&PROPS), "where it is in the topology");

const CPU_FAST: Object = object(
    "CpuInfoFast",
    &[
        must("cpu-index", Type::UINT, "its number"),
        must("qom-path", Type::TEXT, "its path"),
        must("thread-id", Type::INT, "id of its thread on the host"),
        PROPS_MEMBER,
        must("target", ARCH, "its architecture"),
    ],
);

const CPU_SLOW: Object = object(
    "CpuInfo",
    &[
        must("CPU", Type::UINT, "its number"),
        must("current", Type::Bool, "true for the first one"),
        must(
            "halted",
            Type::Bool,
            "always false: no vCPU is stopped to find out",
        ),
        must("qom_path", Type::TEXT, "its path"),
        must("thread_id", Type::INT, "id of its thread on the host"),
        PROPS_MEMBER,
        must(
            "arch",
            Type::Enum(&Enum {
                name: "CpuInfoArch",
                values: &["x86", "arm"],
            }),
            "its architecture",
        ),
    ],
);

pub(super) static COMMANDS: &[Command] = &[
    here(
        "query-kvm",
        "Tells whether KVM is used; it always is",
        |_, _| Ok(json!({ "enabled": true, "present": true })),
    )
    .returns(Type::Object(&object(
        "KvmInfo",
        &[
            must("enabled", Type::Bool, "whether it is used"),
            must("present", Type::Bool, "whether it could be used"),
        ],
    )))
    .deprecated("use query-accelerators"),
    here("query-accelerators", "Tells the accelerators", |_, _| {
        Ok(json!({ "enabled": "kvm", "present": ["kvm"] }))
    })
    .returns(Type::Object(&object(
        "AcceleratorInfo",
        &[
            must("enabled", ACCELERATOR, "the one that is used"),
            must(
                "present",
                Type::List(&ACCELERATOR),
                "those that could be used",
            ),
        ],
    ))),
    here(
        "query-target",
        "Tells the architecture of the guest",
        |_, _| Ok(json!({ "arch": std::env::consts::ARCH })),
    )
    .returns(Type::Object(&object(
        "TargetInfo",
        &[must("arch", ARCH, "the architecture")],
    ))),
    here("query-machines", "Lists the boards", |info, _| {
        Ok(machines(info))
    })
    .returns(Type::List(&Type::Object(&MACHINE))),
    main(
        "query-cpus-fast",
        "Lists the vCPUs with their threads",
        |ticket, _| {
            VmCommand::Cpus(Reply::new(ticket, |info, cpus| {
                cpus.iter().map(|cpu| cpu_fast(info, cpu)).collect()
            }))
        },
    )
    .returns(Type::List(&Type::Object(&CPU_FAST))),
    main(
        "query-cpus",
        "Lists the vCPUs with their threads, in the form that QEMU has given up; it stops no vCPU",
        |ticket, _| {
            VmCommand::Cpus(Reply::new(ticket, |info, cpus| {
                cpus.iter().map(|cpu| cpu_slow(info, cpu)).collect()
            }))
        },
    )
    .returns(Type::List(&Type::Object(&CPU_SLOW)))
    .deprecated("use query-cpus-fast"),
];

fn machines(_: &Info) -> Value {
    let machine = |name: &str, cpu_max: u32, kind: MachineKind| {
        json!({
            "name": name,
            "cpu-max": cpu_max,
            "hotpluggable-cpus": false,
            "numa-mem-supported": false,
            "deprecated": false,
            "is-default": kind == MachineKind::default(),
            "acpi": kind == MachineKind::Microvm,
        })
    };
    json!([
        machine("microvm", limits::MAX_VCPUS, MachineKind::Microvm),
        machine("none", 1, MachineKind::None),
    ])
}

fn qom_path(cpu: &CpuThread) -> String {
    format!("/machine/unattached/device[{}]", cpu.index)
}

/// Where a vCPU is in the topology of `-smp`.
fn props(info: &Info, cpu: &CpuThread) -> Value {
    let spec = &info.cpus;
    let of = |count: u8| u32::from(count.max(1));
    let index = u32::from(cpu.index);
    let (threads, cores, dies) = (
        of(spec.threads),
        of(spec.cores) * of(spec.clusters),
        of(spec.dies),
    );
    json!({
        "thread-id": index % threads,
        "core-id": index / threads % cores,
        "die-id": index / (threads * cores) % dies,
        "socket-id": index / (threads * cores * dies),
    })
}

fn cpu_fast(info: &Info, cpu: &CpuThread) -> Value {
    json!({
        "cpu-index": cpu.index,
        "qom-path": qom_path(cpu),
        "thread-id": cpu.thread_id,
        "props": props(info, cpu),
        "target": std::env::consts::ARCH,
    })
}

fn cpu_slow(info: &Info, cpu: &CpuThread) -> Value {
    let arch = if cfg!(target_arch = "x86_64") {
        "x86"
    } else {
        "arm"
    };
    json!({
        "CPU": cpu.index,
        "current": cpu.index == 0,
        "halted": false,
        "qom_path": qom_path(cpu),
        "thread_id": cpu.thread_id,
        "props": props(info, cpu),
        "arch": arch,
    })
}
