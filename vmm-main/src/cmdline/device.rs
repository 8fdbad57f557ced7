//! `-drive`, `-netdev`, `-fsdev`, `-device`, `-object`.

use ipc::control::added::AdditionGrant;
use ipc::limits;
use ipc::spec::block::{Aio, BlockIo, DetectZeroes, ImageFormat, OnError};
use ipc::spec::fs::FsCache;
use ipc::spec::ids::Translation;
use ipc::spec::net::{Bucket, Limit, NetLimits};
use ipc::spec::vm::{
    DriveSpec, FsSource, FsdevSpec, IothreadSpec, NetBackend, NetdevSpec, RestartPolicy,
};

use super::error::CmdlineError;
use super::props::Props;

/// A `-device` whose defaults are still open.
pub(super) struct Draft {
    /// Its argument.
    pub(super) arg: String,
    /// `id=`
    pub(super) id: Option<String>,
    /// `iothread=`
    pub(super) iothread: Option<String>,
    /// `restart=`, `max-restarts=`
    pub(super) restart: RestartPolicy,
    /// `bootindex=`
    pub(super) bootindex: Option<u8>,
    /// What it is.
    pub(super) kind: DraftKind,
}

/// What a device is, as far as its own argument says.
pub(super) enum DraftKind {
    /// `virtio-blk-device`
    Block {
        drive: String,
        serial: Option<String>,
        num_queues: Option<u16>,
        queue_size: u16,
    },
    /// `vhost-user-blk-device`
    ForeignBlock {
        chardev: String,
        num_queues: Option<u16>,
        queue_size: u16,
    },
    /// `virtio-net-device`
    Net {
        netdev: String,
        mac: Option<[u8; 6]>,
        mq: Option<bool>,
        queue_size: u16,
    },
    /// `virtio-fs-device`, `vhost-user-fs-device`
    Fs {
        source: FsSource,
        tag: String,
        request_queues: u16,
        queue_size: u16,
        window: u64,
    },
}

/// How arguments of a node begin.
const NODE: &str = "-blockdev ";

/// A qcow2 image with nothing below it.
const QCOW2: ImageFormat = ImageFormat::Qcow2 {
    below: 0,
    raw_base: false,
    most: 0,
};

/// How a `-drive` does its I/O.
fn block_io(props: &Props<'_>) -> BlockIo {
    let default = BlockIo::default();
    BlockIo {
        aio: match props.text("aio").or_else(|| props.text("file.aio")) {
            Some("off" | "threads") => Aio::Off,
            Some("io_uring") => Aio::IoUring,
            _ => Aio::Native,
        },
        discard: props.text("discard") == Some("unmap"),
        detect_zeroes: match props.text("detect-zeroes") {
            Some("on") => DetectZeroes::On,
            Some("unmap") => DetectZeroes::Unmap,
            _ => DetectZeroes::Off,
        },
        iops_total: props
            .small("throttling.iops-total")
            .unwrap_or(default.iops_total),
        poll_us: props.small("poll-us").unwrap_or(default.poll_us),
        werror: on_error(props.text("werror")),
        rerror: on_error(props.text("rerror")),
        format: match props.text("format") {
            Some("qcow2") => QCOW2,
            _ => ImageFormat::Raw,
        },
    }
}

/// What may pass a `-netdev` in a time.
fn net_limits(props: &Props<'_>) -> NetLimits {
    let bucket = |rate: &str, burst: &str| {
        let rate = props.int(rate).unwrap_or(0);
        // A tenth of a second's worth.
        let burst = props.int(burst).unwrap_or(rate.div_ceil(10));
        Bucket { rate, burst }
    };
    NetLimits {
        rx: Limit {
            packets: bucket("throttling.rx-packets", "throttling.rx-packets-burst"),
            bytes: bucket("throttling.rx-bytes", "throttling.rx-bytes-burst"),
        },
        tx: Limit {
            packets: bucket("throttling.tx-packets", "throttling.tx-packets-burst"),
            bytes: bucket("throttling.tx-bytes", "throttling.tx-bytes-burst"),
        },
    }
}

fn on_error(word: Option<&str>) -> OnError {
    match word {
        Some("ignore") => OnError::Ignore,
        Some("stop") => OnError::Stop,
        Some("enospc") => OnError::Enospc,
        _ => OnError::Report,
    }
}

impl super::Draft {
    /// `-drive`
    pub(super) fn drive(&mut self, props: &Props<'_>) -> Result<(), CmdlineError> {
        let mut drive = DriveSpec {
            id: props.required("id")?,
            file: props.required("file")?.into(),
            backing: Vec::new(),
            readonly: props.bool("readonly").unwrap_or(false),
            direct: props.bool("direct").unwrap_or(true),
            max_size: props.int("max-size"),
            io: block_io(props),
        };
        if props.text("aio") == Some("native") && !drive.direct {
            return Err(props.error(
                "aio=native contradicts direct=off; allowed with it: aio=io_uring, aio=off",
            ));
        }
        if drive.readonly && drive.max_size.is_some() {
            return Err(props.error("max-size contradicts readonly=on; allowed with it: none"));
        }
        if let ImageFormat::Qcow2 { most, .. } = &mut drive.io.format {
            *most = drive.max_size.unwrap_or(0);
        }
        if let Some(id) = props.text("backing") {
            if drive.io.format == ImageFormat::Raw {
                return Err(
                    props.error("backing contradicts format=raw; allowed with it: format=qcow2")
                );
            }
            let Some(at) = self.spec.drives.iter().position(|other| other.id == id) else {
                return Err(props.error(format!(
                    "backing={id} is no drive that is free; give it by a -drive before this one"
                )));
            };
            self.put_on(props, &mut drive, at)?;
        }
        self.add_drive(props, drive)
    }

    /// Puts `drive`, a qcow2 image, on top of number `at` of the drives, which is a part of it from here on.
    fn put_on(
        &mut self,
        props: &Props<'_>,
        drive: &mut DriveSpec,
        at: usize,
    ) -> Result<(), CmdlineError> {
        let lower = &self.spec.drives[at];
        if !lower.readonly {
            let id = &lower.id;
            return Err(props.error(if self.drive_args[at].starts_with(NODE) {
                format!("node {id} is not read-only=on, which backing needs")
            } else {
                format!("drive {id} is not readonly=on, which backing needs")
            }));
        }
        let (lower, _) = self.take_drive(at);
        drive.stand_on(&lower).map_err(|what| props.error(what))
    }

    /// A drive and its argument, which nothing else can have from here on.
    fn take_drive(&mut self, at: usize) -> (DriveSpec, String) {
        (self.spec.drives.remove(at), self.drive_args.remove(at))
    }

    /// The place of node `id`, if nothing has it.
    fn node(&self, id: &str) -> Option<usize> {
        let at = self.spec.drives.iter().position(|drive| drive.id == id)?;
        self.drive_args[at].starts_with(NODE).then_some(at)
    }

    /// `-blockdev`
    pub(super) fn blockdev(&mut self, props: &Props<'_>) -> Result<(), CmdlineError> {
        let id = props.required("node-name")?;
        let mut drive = match (props.text("file"), props.shape()) {
            (Some(file), "raw" | "qcow2") => self.over_node(props, id, file)?,
            (None, "raw" | "qcow2") if !props.has("file.filename") => {
                return Err(props.error("names no image; give file= or file.filename="));
            }
            _ => {
                let name = if props.has("file.filename") {
                    "file.filename"
                } else {
                    "filename"
                };
                DriveSpec {
                    id,
                    file: props.required(name)?.into(),
                    backing: Vec::new(),
                    readonly: props.bool("read-only").unwrap_or(false),
                    direct: props.bool("cache.direct").unwrap_or(false),
                    max_size: props.int("max-size"),
                    io: block_io(props),
                }
            }
        };
        if drive.readonly && props.has("max-size") {
            return Err(props.error("max-size contradicts read-only=on; allowed with it: none"));
        }
        let native = [props.text("aio"), props.text("file.aio")].contains(&Some("native"));
        if native && !drive.direct {
            return Err(props.error("aio=native needs cache.direct=on"));
        }
        if props.shape() == "qcow2" {
            if drive.io.format != ImageFormat::Raw {
                return Err(props.error(
                    "file is a node of driver qcow2 itself; allowed: one of driver file, host_device or raw",
                ));
            }
            drive.io.format = ImageFormat::Qcow2 {
                below: 0,
                raw_base: false,
                most: drive.max_size.unwrap_or(0),
            };
            if let Some(id) = props.text("backing") {
                let Some(at) = self.node(id) else {
                    return Err(props.error(format!(
                        "backing={id} is no node that is free; give it by a -blockdev before this one"
                    )));
                };
                self.put_on(props, &mut drive, at)?;
            }
        }
        self.add_drive(props, drive)
    }

    /// A node for what node `file` holds.
    fn over_node(
        &mut self,
        props: &Props<'_>,
        id: String,
        file: &str,
    ) -> Result<DriveSpec, CmdlineError> {
        for name in ["file.driver", "file.filename", "file.aio", "file.locking"] {
            if props.has(name) {
                return Err(props.error(format!(
                    "file and {name} contradict each other; give a node or a file"
                )));
            }
        }
        let Some(at) = self.node(file) else {
            return Err(props.error(format!(
                "file={file} is no node that is free; give it by a -blockdev before this one"
            )));
        };
        let (below, _) = self.take_drive(at);
        let readonly = props.bool("read-only").unwrap_or(below.readonly);
        if below.readonly && !readonly {
            return Err(props.error(format!(
                "read-only=off contradicts node {file}, which is read-only=on"
            )));
        }
        let own = block_io(props);
        Ok(DriveSpec {
            id,
            readonly,
            direct: props.bool("cache.direct").unwrap_or(below.direct),
            max_size: props.int("max-size").or(below.max_size),
            io: BlockIo {
                discard: own.discard || below.io.discard && !props.has("discard"),
                detect_zeroes: if props.has("detect-zeroes") {
                    own.detect_zeroes
                } else {
                    below.io.detect_zeroes
                },
                ..below.io
            },
            ..below
        })
    }

    fn add_drive(&mut self, props: &Props<'_>, drive: DriveSpec) -> Result<(), CmdlineError> {
        if self.spec.drives.iter().any(|other| other.id == drive.id) {
            return Err(props.error(format!("id {} is used by another drive or node", drive.id)));
        }
        let shared =
            |other: &&DriveSpec| other.file == drive.file && !(other.readonly && drive.readonly);
        if let Some(other) = self.spec.drives.iter().find(shared) {
            return Err(props.error(format!(
                "file {} is also that of drive {}; allowed only if both are readonly=on",
                drive.file.display(),
                other.id
            )));
        }
        self.spec.drives.push(drive);
        self.drive_args
            .push(format!("{} {}", props.dashed(), props.raw()));
        Ok(())
    }

    /// `-netdev`
    pub(super) fn netdev(&mut self, props: &Props<'_>) -> Result<(), CmdlineError> {
        let id = props.required("id")?;
        if self.spec.netdevs.iter().any(|other| other.id == id) {
            return Err(props.error(format!("id {id} is used by another -netdev")));
        }
        let given_queues = props.small::<u16>("queues");
        for name in ["rx-packets", "rx-bytes", "tx-packets", "tx-bytes"] {
            let (rate, burst) = (
                format!("throttling.{name}"),
                format!("throttling.{name}-burst"),
            );
            if props.has(&burst) && props.int(&rate).unwrap_or(0) == 0 {
                return Err(props.error(format!("{burst} needs {rate} above 0")));
            }
        }
        if props.has("fd") && props.has("fds") {
            return Err(props.error("fd and fds contradict each other; give one"));
        }
        let fds = props.fds("fds").or_else(|| props.fds("fd"));
        let (backend, queues) = if let Some(ifname) = props.text("ifname") {
            if ifname
                .chars()
                .any(|c| c == '/' || c == ':' || c.is_whitespace())
                || matches!(ifname, "." | "..")
            {
                return Err(props.error(format!(
                    "ifname={ifname} is not valid; allowed: 1 to 15 bytes without '/', ':' and spaces"
                )));
            }
            if fds.is_some() {
                self.spec.ignored.push(format!(
                    "-netdev {}: fd and fds, because ifname is given",
                    props.raw()
                ));
            }
            (
                NetBackend::TapName(ifname.to_owned()),
                given_queues.unwrap_or(1),
            )
        } else if let Some(fds) = fds {
            self.check_fds(props, fds)?;
            let count = u16::try_from(fds.len()).unwrap_or(limits::MAX_NET_QUEUE_PAIRS);
            if given_queues.is_some_and(|queues| queues != count) {
                return Err(props.error(format!(
                    "queues is not the number of descriptors; allowed: {count}"
                )));
            }
            (NetBackend::TapFds(fds.to_vec()), count)
        } else if props.shape() == "vhost-user" {
            (NetBackend::Daemon(props.required("chardev")?), 1)
        } else {
            return Err(props.error("names no tap; give ifname=, fd= or fds="));
        };
        let (vhost, vhost_fds) = self.vhost(props, queues, &backend)?;
        let poll_us = match backend {
            NetBackend::Daemon(_) => 0,
            _ if vhost => 0,
            _ => props.small("poll-us").unwrap_or(limits::NET_POLL_US),
        };
        let same_tap = |other: &&NetdevSpec| {
            matches!(
                (&other.backend, &backend),
                (NetBackend::TapName(a), NetBackend::TapName(b)) if a == b
            )
        };
        if let Some(other) = self.spec.netdevs.iter().find(same_tap) {
            return Err(props.error(format!("ifname is also that of netdev {}", other.id)));
        }
        self.spec.netdevs.push(NetdevSpec {
            id,
            backend,
            queues,
            vhost,
            vhost_fds,
            limits: net_limits(props),
            poll_us,
        });
        self.netdev_args.push(props.raw().to_owned());
        Ok(())
    }

    /// `vhost=on` and its descriptors, for a card with `queues` pairs.
    fn vhost(
        &mut self,
        props: &Props<'_>,
        queues: u16,
        backend: &NetBackend,
    ) -> Result<(bool, Vec<i32>), CmdlineError> {
        if matches!(backend, NetBackend::Daemon(_)) {
            return Ok((false, Vec::new()));
        }
        let on = props.bool("vhost").unwrap_or(false);
        if props.has("vhostfd") && props.has("vhostfds") {
            return Err(props.error("vhostfd and vhostfds contradict each other; give one"));
        }
        let fds = props.fds("vhostfds").or_else(|| props.fds("vhostfd"));
        if !on {
            if props.bool("vhostforce") == Some(true) {
                return Err(props.error("vhostforce=on needs vhost=on"));
            }
            if fds.is_some() {
                self.spec.ignored.push(format!(
                    "-netdev {}: vhostfd and vhostfds, because vhost is off",
                    props.raw()
                ));
            }
            return Ok((false, Vec::new()));
        }
        let limits = ["rx-packets", "rx-bytes", "tx-packets", "tx-bytes"]
            .map(|name| format!("throttling.{name}"));
        if let Some(limit) = limits.iter().find(|name| props.int(name).unwrap_or(0) > 0) {
            return Err(props.error(format!(
                "{limit} contradicts vhost=on, where packets do not pass this program; allowed with it: vhost=off"
            )));
        }
        if props.small::<u32>("poll-us").unwrap_or(0) > 0 {
            return Err(props.error(
                "poll-us contradicts vhost=on, where packets do not pass this program; allowed with it: poll-us=0",
            ));
        }
        let Some(fds) = fds else {
            return Ok((true, Vec::new()));
        };
        if fds.len() != usize::from(queues) {
            return Err(props.error(format!(
                "vhostfd and vhostfds name {} descriptors for {queues} queue pairs; allowed: {queues}",
                fds.len()
            )));
        }
        self.check_fds(props, fds)?;
        if let NetBackend::TapFds(taps) = backend
            && let Some(fd) = fds.iter().find(|fd| taps.contains(fd))
        {
            return Err(props.error(format!("descriptor {fd} is given twice")));
        }
        Ok((true, fds.to_vec()))
    }

    /// `-fsdev`
    pub(super) fn fsdev(&mut self, props: &Props<'_>) -> Result<(), CmdlineError> {
        let on = |name| props.bool(name).unwrap_or(false);
        let fsdev = FsdevSpec {
            id: props.required("id")?,
            path: props.required("path")?.into(),
            readonly: on("readonly"),
            cache: match props.text("cache") {
                Some("never") => FsCache::Never,
                Some("metadata") => FsCache::Metadata,
                Some("always") => FsCache::Always,
                _ => FsCache::Auto,
            },
            xattr: on("xattr"),
            posix_acl: on("posix-acl"),
            users: translation(props, "translate-uid")?,
            groups: translation(props, "translate-gid")?,
        };
        if fsdev.posix_acl && !fsdev.xattr {
            return Err(props.error("posix-acl=on needs xattr=on"));
        }
        if fsdev.posix_acl && !(fsdev.users.is_empty() && fsdev.groups.is_empty()) {
            return Err(props.error(
                "posix-acl=on and translate-uid or translate-gid exclude each other: lists name users",
            ));
        }
        if self.spec.fsdevs.iter().any(|other| other.id == fsdev.id) {
            return Err(props.error(format!("id {} is used by another -fsdev", fsdev.id)));
        }
        self.spec.fsdevs.push(fsdev);
        self.fsdev_args.push(props.raw().to_owned());
        Ok(())
    }

    /// A descriptor belongs to one queue of one card.
    fn check_fds(&self, props: &Props<'_>, fds: &[i32]) -> Result<(), CmdlineError> {
        for (at, fd) in fds.iter().enumerate() {
            if fds[..at].contains(fd) {
                return Err(props.error(format!("descriptor {fd} is given twice")));
            }
            let user = self.spec.netdevs.iter().find(|other| {
                matches!(&other.backend, NetBackend::TapFds(theirs) if theirs.contains(fd))
                    || other.vhost_fds.contains(fd)
            });
            if let Some(user) = user {
                return Err(props.error(format!("descriptor {fd} is used by netdev {}", user.id)));
            }
        }
        Ok(())
    }

    /// `-device`
    pub(super) fn device(&mut self, props: &Props<'_>) -> Result<(), CmdlineError> {
        let queue_size = props
            .small("queue-size")
            .unwrap_or(limits::DEFAULT_QUEUE_SIZE);
        let kind = match props.shape() {
            "virtio-blk-device" => DraftKind::Block {
                drive: props.required("drive")?,
                serial: props.text("serial").map(str::to_owned),
                num_queues: props.small("num-queues"),
                queue_size,
            },
            "vhost-user-blk-device" => DraftKind::ForeignBlock {
                chardev: props.required("chardev")?,
                num_queues: props.small("num-queues"),
                queue_size: props
                    .small("queue-size")
                    .unwrap_or(limits::FOREIGN_DISK_QUEUE_SIZE),
            },
            "virtio-net-device" => DraftKind::Net {
                netdev: props.required("netdev")?,
                mac: props.mac("mac"),
                mq: props.bool("mq"),
                queue_size,
            },
            "virtio-fs-device" => fs_kind(props, FsSource::Fsdev(props.required("fsdev")?))?,
            "vhost-user-fs-device" => {
                fs_kind(props, FsSource::Chardev(props.required("chardev")?))?
            }
            other => {
                return Err(props.error(format!("device {other} is not available in this build")));
            }
        };
        let bootindex = props.small("bootindex");
        if let Some(index) = bootindex
            && self
                .devices
                .iter()
                .any(|other| other.bootindex == Some(index))
        {
            return Err(props.error(format!("bootindex {index} is used by another -device")));
        }
        let given = props.small::<u16>("max-restarts");
        // Somebody else's daemon may not know what the guest has open when it comes back, and then another file may have the
        // same number.
        let own = !props.shape().starts_with("vhost-user-");
        let most = if props.bool("restart").unwrap_or(own) {
            given.unwrap_or(limits::DEFAULT_RESTARTS)
        } else if given.is_some() {
            return Err(props.error("max-restarts contradicts restart=off; allowed with it: none"));
        } else {
            0
        };
        let id = props.text("id").map(str::to_owned);
        if let Some(id) = &id
            && self
                .devices
                .iter()
                .any(|other| other.id.as_ref() == Some(id))
        {
            return Err(props.error(format!("id {id} is used by another -device")));
        }
        self.devices.push(Draft {
            arg: props.raw().to_owned(),
            id,
            iothread: props.text("iothread").map(str::to_owned),
            restart: RestartPolicy { most },
            bootindex,
            kind,
        });
        Ok(())
    }

    /// `-hotplug`
    pub(super) fn hotplug(&mut self, props: &Props<'_>) -> Result<(), CmdlineError> {
        let readonly = props.bool("readonly").unwrap_or(false);
        let mut grants = Vec::new();
        let places = ["images", "folders", "sockets", "tap"].map(|key| (key, props.text(key)));
        for (key, value) in places {
            let Some(value) = value else { continue };
            if key == "tap" {
                grants.push(AdditionGrant::Tap {
                    ifname: value.to_owned(),
                });
                continue;
            }
            let path = std::path::PathBuf::from(value);
            let plain = path.is_absolute()
                && !path
                    .components()
                    .any(|part| part == std::path::Component::ParentDir);
            if !plain {
                return Err(props.error(format!(
                    "{key}={value} is not valid; allowed: an absolute path without '..'"
                )));
            }
            grants.push(match key {
                "images" => AdditionGrant::Images { path, readonly },
                "sockets" => AdditionGrant::Sockets { path },
                _ => AdditionGrant::Folders { path, readonly },
            });
        }
        if props.has("vhost") {
            grants.push(AdditionGrant::Vhost);
        }
        if grants.len() != 1 {
            return Err(
                props.error("exactly one of images, folders, sockets, tap and vhost is needed")
            );
        }
        for key in ["tap", "sockets", "vhost"] {
            if props.has("readonly") && props.has(key) {
                return Err(props.error(format!("readonly says nothing about {key}")));
            }
        }
        if self.spec.hotplug.len() == limits::MAX_HOTPLUG_GRANTS {
            return Err(props.error(format!(
                "one too many; allowed: 0 to {}",
                limits::MAX_HOTPLUG_GRANTS
            )));
        }
        self.spec.hotplug.append(&mut grants);
        Ok(())
    }

    /// `-object`
    pub(super) fn object(&mut self, props: &Props<'_>) -> Result<(), CmdlineError> {
        let id = props.required("id")?;
        if self
            .spec
            .iothreads
            .iter()
            .map(|iothread| iothread.id.as_str())
            .chain(self.memory.ids())
            .any(|other| other == id)
        {
            return Err(props.error(format!("id {id} is used by another -object")));
        }
        if props.shape() == "secret" {
            self.spec.ignored.push(format!("-object {}", props.raw()));
            return Ok(());
        }
        if props.shape() != "iothread" {
            return self.memory.backend(id, props);
        }
        if self.spec.iothreads.len() == limits::MAX_IOTHREADS {
            return Err(props.error(format!(
                "one iothread too many; allowed: 0 to {}",
                limits::MAX_IOTHREADS
            )));
        }
        let cpus = props.cpus("cpus");
        self.spec.iothreads.push(IothreadSpec { id, cpus });
        Ok(())
    }
}

/// The rules of one property, which are separated by `+`.
fn translation(props: &Props<'_>, name: &'static str) -> Result<Translation, CmdlineError> {
    let mut rules = Translation::default();
    for rule in props.text(name).into_iter().flat_map(|all| all.split('+')) {
        rules
            .add(rule)
            .map_err(|allowed| props.error(format!("{name}={rule}: {allowed}")))?;
    }
    Ok(rules)
}

fn fs_kind(props: &Props<'_>, source: FsSource) -> Result<DraftKind, CmdlineError> {
    Ok(DraftKind::Fs {
        source,
        tag: props.required("tag")?,
        request_queues: props.small("num-request-queues").unwrap_or(1),
        queue_size: props
            .small("queue-size")
            .unwrap_or(limits::MAX_FS_QUEUE_SIZE),
        window: props.int("cache-size").unwrap_or(0),
    })
}
