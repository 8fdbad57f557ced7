//! Snapshots inside of disks' images.

use serde_json::json;

use ipc::limits::MAX_SNAPSHOT_NAME;

use super::super::types::{Command, Object, Type, main, may, must, object};
use crate::qmp::command::{Reply, VmCommand};
use crate::qmp::objects;

/// One of them.
pub(super) const SNAPSHOT: Object = object(
    "SnapshotInfo",
    &[
        must("id", Type::ID, "its id, unique in the image"),
        must("name", Type::ID, "its name"),
        must(
            "vm-state-size",
            Type::UINT,
            "bytes of a VM's state in it, which is never made here",
        ),
        must(
            "date-sec",
            Type::UINT,
            "when it was made: seconds since 1970",
        ),
        must("date-nsec", Type::UINT, "and nanoseconds"),
        must(
            "vm-clock-sec",
            Type::UINT,
            "how long the VM had been running in the process that made it: seconds",
        ),
        must("vm-clock-nsec", Type::UINT, "and nanoseconds"),
        may("icount", Type::UINT, "instructions, if somebody counted"),
    ],
);

const NAME: Type = Type::Text(MAX_SNAPSHOT_NAME);

pub(super) static COMMANDS: &[Command] = &[
    main(
        "blockdev-snapshot-internal-sync",
        "Makes a snapshot of a qcow2 disk inside of its image, as it is between two requests of the guest, which runs on and need not \
         be paused; what its file system has not written yet is not in it. While an image has snapshots its disk keeps its size. \
         Whatever happens, the image has the snapshots of before or those of after; if the disk's process is killed meanwhile, or the \
         host fails, `qemu-img check -r all` finds space that is counted and not used. The answer comes when it is made, which on a \
         slow disk takes up to a minute: until then other clients can watch, stop and end the VM, and commands about its devices wait",
        |ticket, mut arguments| {
            VmCommand::DiskSnapshot(
                arguments.required_text("device"),
                arguments.required_text("name"),
                Reply::new(ticket, |_, ()| json!({})),
            )
        },
    )
    .takes(&[
        must("device", Type::ID, "id of the drive, or of the disk"),
        must("name", NAME, "name of the snapshot; no other may have it"),
    ]),
    main(
        "blockdev-snapshot-delete-internal-sync",
        "Takes a snapshot out of a qcow2 disk's image, and tells what it was: the first one that has all that is given. Its space is \
         used again, and given back to the host with `discard=unmap`",
        |ticket, mut arguments| VmCommand::DiskSnapshotDelete {
            device: arguments.required_text("device"),
            id: arguments.text("id"),
            name: arguments.text("name"),
            reply: Reply::new(ticket, |_, snapshot| objects::snapshot(&snapshot)),
        },
    )
    .takes(&[
        must("device", Type::ID, "id of the drive, or of the disk"),
        may("id", NAME, "id of the snapshot"),
        may("name", NAME, "its name; one of both must be given"),
    ])
    .returns(Type::Object(&SNAPSHOT)),
];
