//! The board, its processors and accelerators.

use serde_json::{Value, json};

use ipc::limits;
use ipc::spec::vm::MachineKind;

use crate::kvm::processor::Processor;
use crate::qmp::command::{CpuThread, QmpError, Reply, VmCommand};
use crate::qmp::cpu_model;
use crate::qmp::objects::{CPU_TYPE, cpu_path};
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
        may("alias", Type::TEXT, "another name"),
        may("is-default", Type::Bool, "whether it needs no `-machine`"),
        may("default-cpu-type", Type::TEXT, "type of its processors"),
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
        may("node-id", Type::UINT, "memory node that it is in"),
        may("socket-id", Type::UINT, "socket in the machine"),
        may("die-id", Type::UINT, "die in the socket"),
        may("core-id", Type::UINT, "core in the die"),
        may("thread-id", Type::UINT, "thread in the core"),
    ],
);

const MEMDEV: Object = object(
    "Memdev",
    &[
        may("id", Type::TEXT, "its id"),
        must("size", Type::UINT, "bytes"),
        must("merge", Type::Bool, "whether equal pages become one: never"),
        must(
            "dump",
            Type::Bool,
            "whether a core dump of the control process contains it",
        ),
        must(
            "prealloc",
            Type::Bool,
            "whether all of it was allocated at the start",
        ),
        must("share", Type::Bool, "`share=`"),
        must(
            "host-nodes",
            Type::List(&Type::UINT),
            "memory nodes of the host that it may be on",
        ),
        must(
            "policy",
            Type::Enum(&Enum {
                name: "HostMemPolicy",
                values: &["default", "preferred", "bind", "interleave"],
            }),
            "which of them",
        ),
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

const HOTPLUGGABLE: Object = object(
    "HotpluggableCPU",
    &[
        must("type", Type::TEXT, "type of the processor"),
        must("vcpus-count", Type::UINT, "vCPUs that it has"),
        must("props", Type::Object(&PROPS), "where it is in the topology"),
        may("qom-path", Type::TEXT, "its path, as it is there"),
    ],
);

const CPU_DEFINITION: Object = object(
    "CpuDefinitionInfo",
    &[
        must("name", Type::TEXT, "for `-cpu`"),
        must(
            "migration-safe",
            Type::Bool,
            "whether it is the same on every host",
        ),
        must("static", Type::Bool, "whether it never changes"),
        must("typename", Type::TEXT, "its type"),
        must("deprecated", Type::Bool, "whether it will go away"),
        must(
            "unavailable-features",
            Type::TEXTS,
            "what the host lacks for it",
        ),
    ],
);

const REGION: Object = object(
    "MemoryRange",
    &[
        must("address", Type::UINT, "physical address of its first byte"),
        must("size", Type::UINT, "its bytes"),
    ],
);

const EXPANSION: Type = Type::Enum(&Enum {
    name: "CpuModelExpansionType",
    values: &["static", "full"],
});

const MODEL: Object = object(
    "CpuModelInfo",
    &[
        must("name", Type::TEXT, "for `-cpu`"),
        may("props", Type::Any, "its features by their names"),
    ],
);

pub(super) static COMMANDS: &[Command] = &[
    main(
        "query-hotpluggable-cpus",
        "Lists the places for vCPUs; all are taken from the start, and none can be added",
        |ticket, _| {
            VmCommand::Cpus(Reply::with(ticket, |info, cpus: Vec<CpuThread>| {
                if info.machine == MachineKind::None {
                    return Err(QmpError::generic(
                        "The current machine does not support hot-plugging CPUs",
                    ));
                }
                Ok(cpus
                    .iter()
                    .map(|cpu| {
                        json!({
                            "type": CPU_TYPE,
                            "vcpus-count": 1,
                            "props": topology(info, cpu.index),
                            "qom-path": cpu_path(cpu.index),
                        })
                    })
                    .collect())
            }))
        },
    )
    .returns(Type::List(&Type::Object(&HOTPLUGGABLE))),
    here(
        "query-cpu-definitions",
        "Lists the processor models: the host's",
        |_, _| {
            Ok(json!([{
                "name": "host",
                "migration-safe": false,
                "static": false,
                "typename": CPU_TYPE,
                "deprecated": false,
                "unavailable-features": [],
            }]))
        },
    )
    .returns(Type::List(&Type::Object(&CPU_DEFINITION))),
    main(
        "query-cpu-model-expansion",
        "Tells the features of the guest's processor by their names, as CPUID shows them to it. Models are host and max, which are \
         the same, and base, the answer to `static`: a processor that has what its props say. What the guest sees is what this \
         host's KVM offers, so features of host cannot be switched",
        |ticket, mut arguments| {
            let full = arguments.text("type").is_some_and(|kind| kind == "full");
            let mut model = arguments.object("model");
            let name = model.required_text("name");
            let props = model.value("props");
            VmCommand::Processor(Reply::with(ticket, move |_, processor: Processor| {
                cpu_model::expand(&processor, full, &name, props)
            }))
        },
    )
    .takes(&[
        must("type", EXPANSION, "how far to expand"),
        must("model", Type::Object(&MODEL), "what to expand"),
    ])
    .returns(Type::Object(&object(
        "CpuModelExpansionInfo",
        &[must("model", Type::Object(&MODEL), "the model")],
    ))),
    here(
        "query-memory-size-summary",
        "Tells how much memory the guest has",
        |info, _| {
            Ok(json!({
                "base-memory": if info.machine == MachineKind::None { 0 } else { info.memory.size },
                "plugged-memory": 0,
            }))
        },
    )
    .returns(Type::Object(&object(
        "MemoryInfo",
        &[
            must("base-memory", Type::UINT, "bytes that it started with"),
            may("plugged-memory", Type::UINT, "bytes that were added: none"),
        ],
    ))),
    here(
        "query-memory-devices",
        "Lists memory that was added, of which there is none",
        |_, _| Ok(json!([])),
    )
    .returns(Type::List(&Type::Any)),
    here(
        "query-memdev",
        "Lists what guest memory is made of, as far as it has ids",
        |info, _| {
            let zones = info.memory.zones.iter();
            Ok(zones
                .filter(|zone| zone.id.is_some())
                .map(|zone| {
                    json!({
                        "id": zone.id,
                        "size": zone.size,
                        "merge": false,
                        "dump": zone.dump_guest_core,
                        "prealloc": zone.prealloc,
                        "share": zone.share,
                        "host-nodes": zone.host_nodes.iter().collect::<Vec<_>>(),
                        "policy": zone.policy.name(),
                    })
                })
                .collect())
        },
    )
    .returns(Type::List(&Type::Object(&MEMDEV))),
    here(
        "query-mem",
        "Tells where the guest's memory is",
        |info, _| {
            let size = if info.machine == MachineKind::None { 0 } else { info.memory.size };
            let ranges = crate::memory::ram_ranges(size).into_iter().filter(|(_, size)| *size > 0);
            let regions: Vec<Value> = ranges
                .map(|(address, size)| json!({ "address": address, "size": size }))
                .collect();
            Ok(json!({ "regions": regions }))
        },
    )
    .returns(Type::Object(&object(
        "MemoryLayout",
        &[must(
            "regions",
            Type::List(&Type::Object(&REGION)),
            "what is memory, by address",
        )],
    ))),
    main(
        "query-mem-gpa",
        "Tells the four bytes of guest memory at an address, as a hexadecimal number in the guest's byte order",
        |ticket, mut arguments| {
            let address = arguments.required_text("gpa");
            let reply = Reply::new(ticket, |_, word: u32| json!(format!("{word:X}")));
            VmCommand::Memory(reply, address)
        },
    )
    .takes(&[must("gpa", Type::Text(32), "the address, in hexadecimal digits")])
    .returns(Type::TEXT),
    main(
        "query-vcpu-reg",
        "Tells a register of a vCPU of a guest that is stopped, as a hexadecimal number. Registers have their numbers in DWARF: \
         0 to F general ones (rax, rdx, rcx, rbx, rsi, rdi, rbp, rsp, r8 …), 10 rip, 31 rflags, 32 to 37 es, cs, ss, ds, fs, gs, \
         3A and 3B the bases of fs and gs",
        |ticket, mut arguments| {
            let vcpu = arguments.uint("vcpu").unwrap_or_default();
            let number = arguments.required_text("addr");
            let reply = Reply::new(ticket, |_, value: u64| json!(format!("{value:X}")));
            VmCommand::Register(reply, vcpu, number)
        },
    )
    .takes(&[
        must("addr", Type::Text(32), "number of the register, in hexadecimal digits"),
        must("vcpu", Type::Int(0, limits::MAX_VCPUS as u64 - 1), "number of the vCPU"),
    ])
    .returns(Type::TEXT),
    here(
        "query-current-machine",
        "Tells what the running board can do",
        |_, _| Ok(json!({ "wakeup-suspend-support": false })),
    )
    .returns(Type::Object(&object(
        "CurrentMachineParams",
        &[must(
            "wakeup-suspend-support",
            Type::Bool,
            "whether a guest that sleeps can be woken",
        )],
    ))),
    here(
        "query-sev-capabilities",
        "Refuses, because guest memory is not encrypted",
        |_, _| Err(QmpError::generic("SEV is not supported by this program")),
    )
    .returns(Type::Any),
    here(
        "query-gic-capabilities",
        "Lists the interrupt controllers of ARM boards, of which there are none",
        |_, _| Ok(json!([])),
    )
    .returns(Type::List(&Type::Any)),
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
    let mut microvm = machine("microvm", limits::MAX_VCPUS, MachineKind::Microvm);
    microvm["alias"] = "MicroVm".into();
    microvm["default-cpu-type"] = CPU_TYPE.into();
    json!([microvm, machine("none", 1, MachineKind::None)])
}

/// Where a vCPU is in the topology of `-smp`.
pub(in crate::qmp) fn topology(info: &Info, index: u8) -> Value {
    let spec = &info.cpus;
    let of = |count: u8| u32::from(count.max(1));
    let index = u32::from(index);
    let (threads, cores, dies) = (
        of(spec.threads),
        of(spec.cores) * of(spec.clusters),
        of(spec.dies),
    );
    let mut place = json!({
        "thread-id": index % threads,
        "core-id": index / threads % cores,
        "die-id": index / (threads * cores) % dies,
        "socket-id": index / (threads * cores * dies),
    });
    let mut nodes = info.memory.nodes.iter();
    if let Some(node) = nodes.position(|node| node.cpus.contains(index as usize)) {
        place["node-id"] = node.into();
    }
    place
}

fn cpu_fast(info: &Info, cpu: &CpuThread) -> Value {
    json!({
        "cpu-index": cpu.index,
        "qom-path": cpu_path(cpu.index),
        "thread-id": cpu.thread_id,
        "props": topology(info, cpu.index),
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
        "qom_path": cpu_path(cpu.index),
        "thread_id": cpu.thread_id,
        "props": topology(info, cpu.index),
        "arch": arch,
    })
}
