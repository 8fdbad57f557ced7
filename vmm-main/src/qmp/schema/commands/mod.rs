//! The commands, in groups: the chapters of the manual page, one file each.

mod descriptors;
mod devices;
mod disks;
mod dump;
mod foreign;
mod hotplug;
mod machine;
mod migration;
mod objects;
mod protocol;
mod sandbox;
mod statistics;
mod vm;

pub(super) use dump::DUMP_RESULT;
pub(in crate::qmp) use machine::topology;
pub(super) use migration::STATUS as MIGRATION_STATUS;

use super::types::Command;

/// Commands that belong together.
#[derive(Debug)]
pub struct Group {
    /// The chapter's heading.
    pub title: &'static str,
    /// The commands.
    pub commands: &'static [Command],
}

/// All of them.
pub static GROUPS: &[Group] = &[
    Group {
        title: "Protocol",
        commands: protocol::COMMANDS,
    },
    Group {
        title: "The VM",
        commands: vm::COMMANDS,
    },
    Group {
        title: "The machine",
        commands: machine::COMMANDS,
    },
    Group {
        title: "Devices",
        commands: devices::COMMANDS,
    },
    Group {
        title: "Statistics",
        commands: statistics::COMMANDS,
    },
    Group {
        title: "Objects and options",
        commands: objects::COMMANDS,
    },
    Group {
        title: "Snapshots",
        commands: migration::COMMANDS,
    },
    Group {
        title: "Snapshots inside of images",
        commands: disks::COMMANDS,
    },
    Group {
        title: "Dumps",
        commands: dump::COMMANDS,
    },
    Group {
        title: "Hot-plug",
        commands: hotplug::COMMANDS,
    },
    Group {
        title: "Descriptors",
        commands: descriptors::COMMANDS,
    },
    Group {
        title: "Sandbox",
        commands: sandbox::COMMANDS,
    },
    Group {
        title: "Of other boards",
        commands: foreign::COMMANDS,
    },
];
