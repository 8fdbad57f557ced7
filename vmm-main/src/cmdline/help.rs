//! `--help`, `-version` and the manual page, all from the table.

use std::fmt::Write as _;

use super::props::{Key, Kind, Shape};
use super::table::{Arg, Group, OPTIONS, OptionDef};

/// Columns of the pages.
const WIDTH: usize = 100;

/// The QEMU version whose QMP this program speaks: clients decide by it what they may ask.
pub(crate) const QMP_VERSION: (u32, u32, u32) = (9, 2, 0);

const EXAMPLES: &str = "\
Examples
  A guest with a disk and a card, its console in this terminal:

    stratovirt -machine microvm -smp 2 -m 1G -kernel vmlinux -append 'console=ttyS0 root=/dev/vda' \\
      -drive id=root,file=root.img,direct=off -device virtio-blk-device,drive=root \\
      -netdev tap,id=net0,ifname=tap0 -device virtio-net-device,netdev=net0 -serial stdio

  The same in the background, controlled over QMP, with a log and the strictest start:

    STRATOVIRT_LOG_LEVEL=info stratovirt … -serial file,path=console.log -daemonize \\
      -pidfile vm.pid -D vm.log -qmp unix:vm.qmp,server,nowait -sandbox strict

  Asking a running VM, here with socat; quit ends it:

    echo '{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-status\"}' | socat - UNIX:vm.qmp
";

/// What `-version` prints.
pub fn version() -> String {
    let (major, minor, micro) = QMP_VERSION;
    format!(
        "stratovirt {} (process protocol {}, QMP as QEMU {major}.{minor}.{micro}, machines: microvm, none)\n",
        env!("CARGO_PKG_VERSION"),
        ipc::PROTOCOL_VERSION,
    )
}

/// What `--help` prints.
pub fn usage() -> String {
    let mut out = version();
    out.push_str("Runs a virtual machine whose every device is a jailed process of its own.\n\n");
    out.push_str(
        "Usage: stratovirt -kernel FILE [-option value]…   (-option and --option are the same)\n",
    );
    out.push_str(
        "In a list of properties two commas stand for one; on, true, yes mean the same.\n",
    );
    for group in Group::ALL {
        let _ = write!(out, "\n{}\n", group.title());
        if matches!(group, Group::Accepted | Group::Later) {
            let names: Vec<String> = in_group(group).map(OptionDef::dashed).collect();
            wrap(&mut out, 2, &names.join(" "));
            continue;
        }
        for option in in_group(group) {
            for line in synopses(option) {
                wrap_hanging(&mut out, 2, 6, &line);
            }
            wrap(&mut out, 8, option.help);
        }
    }
    out.push('\n');
    out.push_str(EXAMPLES);
    out
}

/// The manual page, in Markdown.
pub fn manual() -> String {
    let mut out = String::from(
        "# stratovirt(1)\n\n\
         <!-- Generated from the option table: UPDATE_DOCS=1 cargo test -p vmm-main --lib cmdline -->\n\n\
         ## Name\n\nstratovirt - run a virtual machine whose every device is a jailed process of its own\n\n\
         ## Synopsis\n\n`stratovirt -kernel FILE [-option value]…`\n\n\
         ## Description\n\n\
         Options start with one dash or two. Many take a list of properties, `word,key=value,key`: the leading word\n\
         selects a form, a bare key of type on|off means on, and two commas stand for one comma in a value. on, true, yes\n\
         and off, false, no mean the same. An unknown, repeated, missing or contradictory option or property is an error:\n\
         one line on standard error, `stratovirt: -option value: text`, and exit status 1.\n",
    );
    for group in Group::ALL {
        let _ = write!(out, "\n## {}\n\n", group.title());
        if group == Group::Accepted {
            out.push_str("These are taken and noted in the log, and change nothing.\n\n");
        }
        for option in in_group(group) {
            manual_option(&mut out, option);
        }
    }
    out.push_str(
        "\n## Environment\n\n- `STRATOVIRT_LOG_LEVEL`: `error` (default), `warn`, `info`, `debug` or `trace`.\n\
         \n## Exit status\n\n0 after a power-off of the guest, `quit` or a terminating signal; 1 after an error.\n\
         \n## Notes\n\n\
         - A `-drive`, `-netdev` or `-chardev` that nothing uses is accepted and noted in the log. A `-chardev socket` of those can be named by `device_add` or `netdev_add`.\n\
         - `-pidfile` works with and without `-daemonize`.\n\
         - `-daemonize` without `-D` logs nothing once the VM is in the background.\n\
         - A card without `mac=` gets the first address from 52:54:00:12:34:56 on that no other card of this VM has.\n\
         \n## ",
    );
    out.push_str(
        &EXAMPLES
            .replacen('\n', "\n\n", 1)
            .replace("    ", "        ")
            .replace("\n  ", "\n"),
    );
    out
}

fn manual_option(out: &mut String, option: &OptionDef) {
    if option.group == Group::Accepted {
        let _ = writeln!(out, "- `{}`", synopses(option).join("`, `"));
        return;
    }
    let _ = write!(out, "### `{}`", option.dashed());
    for alias in option.aliases {
        let _ = write!(out, ", `-{alias}`");
    }
    out.push_str("\n\n");
    for line in synopses(option) {
        let _ = writeln!(out, "    {line}");
    }
    let _ = write!(out, "\n{}\n\n", option.help);
    if let Arg::Props {
        shapes,
        noun,
        later,
        ..
    } = option.arg
    {
        for shape in shapes {
            if !shape.name.is_empty() {
                let _ = write!(out, "**`{}`**: {}.\n\n", shape.name, shape.help);
            }
            for key in shape.keys {
                manual_key(out, key);
            }
            if !shape.keys.is_empty() {
                out.push('\n');
            }
        }
        if !later.is_empty() {
            let _ = write!(
                out,
                "Not available yet, as {noun}: {}.\n\n",
                later.join(", ")
            );
        }
    }
}

fn manual_key(out: &mut String, key: &Key) {
    let _ = write!(
        out,
        "- `{}`: {}. Allowed: {}.",
        key.name,
        key.help,
        key.kind.allowed()
    );
    if key.required {
        out.push_str(" Required.");
    } else if !key.default.is_empty() {
        let _ = write!(out, " Default: {}.", key.default);
    }
    out.push('\n');
}

fn in_group(group: Group) -> impl Iterator<Item = &'static OptionDef> {
    OPTIONS.iter().filter(move |option| option.group == group)
}

/// One line for each form of an option.
fn synopses(option: &OptionDef) -> Vec<String> {
    let name = option.dashed();
    match option.arg {
        Arg::Flag => {
            let aliases: String = option
                .aliases
                .iter()
                .map(|alias| format!(", -{alias}"))
                .collect();
            vec![format!("{name}{aliases}")]
        }
        Arg::Text(value) | Arg::Words(value) => vec![format!("{name} {value}")],
        Arg::Optional(value) => vec![format!("{name} [{value}]")],
        Arg::Props { shapes, .. } => shapes.iter().map(|shape| synopsis(&name, shape)).collect(),
    }
}

fn synopsis(name: &str, shape: &Shape) -> String {
    let mut out = format!("{name} {}", shape.name);
    let mut first = shape.name.is_empty();
    // Properties that allow nothing but what happens anyway would only hide the others.
    let says_something = |key: &&Key| {
        key.required || !matches!(key.kind, Kind::Later | Kind::Fixed([_] | ["on", "off"]))
    };
    for key in shape.keys.iter().filter(says_something) {
        let comma = if first { "" } else { "," };
        let value = key.kind.placeholder();
        let _ = if key.name == shape.implied {
            write!(out, "{comma}[{}=]{value}", key.name)
        } else if key.required {
            write!(out, "{comma}{}={value}", key.name)
        } else {
            write!(out, "[{comma}{}={value}]", key.name)
        };
        first = false;
    }
    out
}

fn wrap(out: &mut String, indent: usize, text: &str) {
    wrap_hanging(out, indent, indent, text);
}

/// Breaks `text` at spaces and before `[`, the first line indented by `first` and the others by `rest`.
fn wrap_hanging(out: &mut String, first: usize, rest: usize, text: &str) {
    let mut column = first;
    let _ = write!(out, "{:first$}", "");
    let mut start_of_line = true;
    for piece in pieces(text) {
        let shown = if start_of_line {
            piece.trim_start()
        } else {
            piece
        };
        let width = shown.chars().count();
        if !start_of_line && column + width > WIDTH {
            let _ = write!(out, "\n{:rest$}", "");
            let shown = piece.trim_start();
            out.push_str(shown);
            column = rest + shown.chars().count();
        } else {
            out.push_str(shown);
            column += width;
        }
        start_of_line = false;
    }
    out.push('\n');
}

/// `text` cut before each space and each `[`.
fn pieces(text: &str) -> Vec<&str> {
    let mut cuts: Vec<usize> = text
        .match_indices([' ', '['])
        .map(|(at, _)| at)
        .filter(|at| *at > 0)
        .collect();
    cuts.push(text.len());
    let mut start = 0;
    cuts.iter()
        .map(|&cut| {
            let piece = &text[start..cut];
            start = cut;
            piece
        })
        .collect()
}
