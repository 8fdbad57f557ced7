//! Command lines: good ones with their specs, wrong ones with their messages, and the pages.

use std::path::Path;

use ipc::spec::DeviceSpec;
use ipc::spec::block::{Aio, BlockIo, DetectZeroes, ImageFormat, OnError};
use ipc::spec::net::{Bucket, Limit, NetLimits};
use ipc::spec::vm::{
    ChardevBackend, DeviceKind, MemoryPolicy, MonitorAddress, NetBackend, RestartPolicy,
};

use super::*;

/// Splits at spaces, except between single or double quotes.
fn words(line: &str) -> Vec<OsString> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match (c, quote) {
            (c, Some(open)) if c == open => quote = None,
            ('\'', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (' ' | '\n', None) => words.extend(word.take().map(OsString::from)),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word.map(OsString::from));
    words
}

fn run(line: &str) -> VmSpec {
    match parse(&words(line), &Env::default()) {
        Ok(Request::Run(spec)) => *spec,
        other => panic!("{line}: {other:?}"),
    }
}

fn message(line: &str) -> String {
    match parse(&words(line), &Env::default()) {
        Err(error) => error.to_string(),
        Ok(good) => panic!("{line}: accepted as {good:?}"),
    }
}

#[test]
fn every_wrong_line_has_its_message() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cmdline/wrong.txt");
    let old = std::fs::read_to_string(&file).unwrap();
    let mut new = String::new();
    let mut count = 0;
    for line in old.lines() {
        if line.starts_with('#') {
            new.push_str(line);
            new.push('\n');
        } else if let Some(args) = line.strip_prefix("$ ") {
            count += 1;
            new.push_str(&format!("{line}\n{}\n", message(args)));
        }
    }
    assert!(count >= 60, "only {count} wrong lines");
    if std::env::var_os("UPDATE_WRONG").is_some() {
        std::fs::write(&file, &new).unwrap();
    }
    for (got, want) in new.lines().zip(old.lines()) {
        assert_eq!(got, want);
    }
    assert_eq!(new.lines().count(), old.lines().count());
}

#[test]
fn the_manuals_example_of_a_light_vm() {
    let spec = run(
        "-kernel /path/to/vmlinux.bin -append console=ttyS0 root=/dev/vda rw reboot=k panic=1 \
         -drive file=/home/rootfs.ext4,id=rootfs,readonly=false -device virtio-blk-device,drive=rootfs \
         -qmp unix:/tmp/stratovirt.socket,server,nowait -serial stdio",
    );
    assert_eq!(spec.machine.kind, MachineKind::Microvm);
    assert_eq!(spec.memory.size, 256 << 20);
    assert_eq!(
        spec.boot.cmdline,
        "console=ttyS0 root=/dev/vda rw reboot=k panic=1"
    );
    assert_eq!(spec.chardevs.len(), 1);
    assert_eq!(spec.chardevs[0].backend, ChardevBackend::Stdio);
    assert_eq!(spec.serial.as_deref(), Some("serial0"));
    assert_eq!(
        spec.monitors[0].address,
        MonitorAddress::Unix("/tmp/stratovirt.socket".into())
    );
    assert!(spec.monitors[0].server && spec.monitors[0].nowait);
    assert!(spec.ignored.is_empty(), "{:?}", spec.ignored);
    let drive = &spec.drives[0];
    assert!(!drive.readonly && drive.direct);
    let DeviceKind::Block {
        num_queues,
        queue_size,
        ..
    } = &spec.devices[0].kind
    else {
        panic!()
    };
    assert_eq!((*num_queues, *queue_size), (1, 256));

    let plan = plan(&spec, true);
    assert_eq!(
        (plan.kernel, plan.initrd, plan.memory),
        (Some(0), None, vec![None])
    );
    assert_eq!(
        plan.monitors,
        [plan::MonitorPlan {
            file: 1,
            server: true,
            wait: false
        }]
    );
    assert_eq!(plan.chardevs, [("serial0".to_owned(), ChardevPlan::Stdio)]);
    assert_eq!(plan.devices, [0]);
    assert!(plan.policy.restore_terminal);
    assert_eq!(plan.policy.files.len(), 2);
}

#[test]
fn katas_command_line() {
    let spec = run(
        "-name sandbox-1 -uuid 01234567-89ab-cdef-0123-456789abcdef -smp 4 -m 2048 -kernel /k \
         -append 'console=ttyS0 tsc=reliable root=/dev/vda' -qmp unix:/run/vc/qmp.sock,server,nowait \
         -D /run/vc/log -disable-seccomp -machine type=microvm,dump-guest-core=off,mem-share=on -initrd /i \
         -drive id=d,file=/f,readonly=on,direct=off -device virtio-blk-device,drive=d,id=blk \
         -netdev tap,id=n,fds=7:8 -device virtio-net-device,netdev=n,id=nic,mac=02:00:ca:fe:00:01",
    );
    assert_eq!(spec.name.as_deref(), Some("sandbox-1"));
    assert_eq!(
        spec.uuid.map(|uuid| (uuid[0], uuid[15])),
        Some((0x01, 0xef))
    );
    assert_eq!(
        (spec.cpus.cpus, spec.cpus.cores, spec.cpus.maxcpus),
        (4, 4, 4)
    );
    assert_eq!(spec.seccomp, SeccompMode::Disabled);
    assert!(!spec.memory.zones[0].dump_guest_core && spec.memory.zones[0].share);
    assert_eq!(spec.netdevs[0].backend, NetBackend::TapFds(vec![7, 8]));
    assert_eq!(spec.netdevs[0].queues, 2);
    let plan = plan(&spec, false);
    assert_eq!(plan.policy.devices[0].spec.num_queues(), 4);
    assert_eq!(
        plan.policy.devices[0].backend,
        ipc::control::BackendGrant::Image {
            path: "/f".into(),
            readonly: true,
            direct: false,
            backing: Vec::new(),
        }
    );
    assert_eq!(
        plan.policy.devices[1].backend,
        ipc::control::BackendGrant::Inherited { fds: vec![7, 8] }
    );
}

#[test]
fn a_card_looks_for_packets_as_long_as_its_netdev_says() {
    for (netdev, poll_us) in [
        ("tap,id=a,ifname=t0", limits::NET_POLL_US),
        ("tap,id=a,ifname=t0,poll-us=200", 200),
        ("tap,id=a,ifname=t0,poll-us=0", 0),
        ("tap,id=a,ifname=t0,vhost=on", 0),
        ("tap,id=a,ifname=t0,vhost=on,poll-us=0", 0),
    ] {
        let line = format!("-kernel k -netdev {netdev} -device virtio-net-device,netdev=a");
        let plan = plan(&run(&line), false);
        assert!(
            matches!(&plan.policy.devices[0].spec, DeviceSpec::Net(card) if card.poll_us == poll_us),
            "{netdev}"
        );
    }
}

#[test]
fn a_card_with_vhost_brings_its_descriptors_or_has_them_opened() {
    let spec = run(
        "-kernel k -netdev tap,id=a,ifname=t0,vhost=on,queues=2,vhostforce=on -device virtio-net-device,netdev=a,mq=on \
         -netdev tap,id=b,fds=7:8,vhost=on,vhostfds=9:10 -device virtio-net-device,netdev=b,mq=on",
    );
    let plan = plan(&spec, false);
    assert_eq!(plan.policy.vhost_fds, [(1, vec![9, 10])]);
    for device in &plan.policy.devices {
        assert!(
            matches!(&device.spec, DeviceSpec::Net(card) if card.vhost && card.queue_pairs == 2)
        );
    }
    // As the manual has it, without vhost=on: nobody needs it.
    let spec =
        run("-kernel k -netdev tap,id=c,fd=11,vhostfd=12 -device virtio-net-device,netdev=c");
    assert!(!spec.netdevs[0].vhost && spec.netdevs[0].vhost_fds.is_empty());
    assert!(
        spec.ignored[0].ends_with("vhost is off"),
        "{:?}",
        spec.ignored
    );
}

/// What the manual says of `-drive` and `virtio-blk-device` (2.2): each property reaches the process, and the defaults are the manual's.
#[test]
fn a_disks_process_is_told_each_property() {
    let told = |line: &str| match &plan(&run(line), false).policy.devices[0].spec {
        DeviceSpec::Block(disk) => disk.clone(),
        other => panic!("{other:?}"),
    };
    let default = told("-kernel k -smp 40 -drive id=d,file=f -device virtio-blk-device,drive=d");
    assert_eq!(
        default.io,
        BlockIo {
            aio: Aio::Native,
            discard: false,
            detect_zeroes: DetectZeroes::Off,
            iops_total: 0,
            poll_us: 50,
            werror: OnError::Report,
            rerror: OnError::Report,
            format: ImageFormat::Raw,
        }
    );
    assert!(default.direct && !default.readonly && default.serial.is_empty());
    assert_eq!((default.num_queues, default.queue_size), (32, 256));
    let all = told(
        "-kernel k -smp 3 -drive id=d,file=f,readonly=on,direct=off,aio=off,throttling.iops-total=200,discard=unmap,\
         detect-zeroes=unmap,poll-us=7,werror=enospc,rerror=stop,format=qcow2 \
         -device virtio-blk-device,drive=d,serial=S1,num-queues=2,queue-size=512",
    );
    assert_eq!(
        all.io,
        BlockIo {
            aio: Aio::Off,
            discard: true,
            detect_zeroes: DetectZeroes::Unmap,
            iops_total: 200,
            poll_us: 7,
            werror: OnError::Enospc,
            rerror: OnError::Stop,
            format: ImageFormat::Qcow2 {
                below: 0,
                raw_base: false,
                most: 0
            },
        }
    );
    assert!(!all.direct && all.readonly);
    assert_eq!(
        (all.serial.as_str(), all.num_queues, all.queue_size),
        ("S1", 2, 512)
    );
    let device = |more: &str| {
        let line =
            format!("-kernel k -smp 3 -drive id=d,file=f -device virtio-blk-device,drive=d{more}");
        run(&line).devices[0].clone()
    };
    assert_eq!(device("").restart, RestartPolicy { most: 5 });
    assert_eq!(device(",max-restarts=9").restart, RestartPolicy { most: 9 });
    assert_eq!(device(",restart=off").restart, RestartPolicy { most: 0 });
    assert_eq!(device(",bootindex=255").bootindex, Some(255));
}

/// The same of `-netdev tap` and `virtio-net-device` (2.3).
#[test]
fn a_cards_process_is_told_each_property() {
    let card = |line: &str| match &plan(&run(line), false).policy.devices[0].spec {
        DeviceSpec::Net(card) => card.clone(),
        other => panic!("{other:?}"),
    };
    let default = card("-kernel k -netdev tap,id=n,ifname=t -device virtio-net-device,netdev=n");
    assert_eq!((default.queue_pairs, default.queue_size), (1, 256));
    assert_eq!(default.limits, NetLimits::default());
    let all = card(
        "-kernel k -netdev tap,id=n,ifname=t,queues=16,throttling.rx-packets=1,throttling.rx-packets-burst=2,\
         throttling.rx-bytes=3,throttling.rx-bytes-burst=4,throttling.tx-packets=5,throttling.tx-packets-burst=6,\
         throttling.tx-bytes=7,throttling.tx-bytes-burst=8 \
         -device virtio-net-device,netdev=n,mac=02:00:00:00:00:09,queue-size=4096,mq=on",
    );
    let bucket = |rate, burst| Bucket { rate, burst };
    assert_eq!(
        all.limits,
        NetLimits {
            rx: Limit {
                packets: bucket(1, 2),
                bytes: bucket(3, 4)
            },
            tx: Limit {
                packets: bucket(5, 6),
                bytes: bucket(7, 8)
            },
        }
    );
    assert_eq!((all.queue_pairs, all.queue_size), (16, 4096));
    assert_eq!(all.mac, [2, 0, 0, 0, 0, 9]);
    // Without a burst, 100 ms worth.
    let worth = card(
        "-kernel k -netdev tap,id=n,ifname=t,throttling.tx-bytes=1000 -device virtio-net-device,netdev=n",
    );
    assert_eq!(worth.limits.tx.bytes, bucket(1000, 100));
    // The name wins over descriptors, and that is told.
    let spec =
        run("-kernel k -netdev tap,id=n,ifname=t,fds=7:8 -device virtio-net-device,netdev=n");
    assert_eq!(spec.netdevs[0].backend, NetBackend::TapName("t".into()));
    assert_eq!(spec.netdevs[0].queues, 1);
    assert!(
        spec.ignored[0].ends_with("because ifname is given"),
        "{:?}",
        spec.ignored
    );
}

/// The manual, 1.2.1: what of a topology is not given follows from `maxcpus`.
#[test]
fn what_a_topology_leaves_out_follows_from_the_rest() {
    let topology = |smp: &str| {
        let cpus = run(&format!("-kernel k -smp {smp}")).cpus;
        (
            (cpus.cpus, cpus.maxcpus),
            (
                cpus.sockets,
                cpus.dies,
                cpus.clusters,
                cpus.cores,
                cpus.threads,
            ),
        )
    };
    assert_eq!(topology("8"), ((8, 8), (1, 1, 1, 8, 1)));
    assert_eq!(topology("2,maxcpus=8"), ((2, 8), (1, 1, 1, 8, 1)));
    assert_eq!(topology("8,sockets=2"), ((8, 8), (2, 1, 1, 4, 1)));
    assert_eq!(topology("8,threads=2"), ((8, 8), (1, 1, 1, 4, 2)));
    assert_eq!(topology("8,cores=2"), ((8, 8), (4, 1, 1, 2, 1)));
    assert_eq!(topology("8,sockets=2,cores=2"), ((8, 8), (2, 1, 1, 2, 2)));
    assert_eq!(
        topology("16,dies=2,clusters=2,cores=2"),
        ((16, 16), (2, 2, 2, 2, 1))
    );
    // All that is given makes maxcpus.
    assert_eq!(
        topology("1,sockets=2,cores=3,threads=2"),
        ((1, 12), (2, 1, 1, 3, 2))
    );
}

/// Each form of `-hotplug`, as the manual page lists them.
#[test]
fn what_may_be_added_later_is_what_was_granted() {
    use ipc::control::added::AdditionGrant as Grant;
    let spec = run(
        "-kernel k -hotplug images=/i -hotplug images=/r,readonly=on -hotplug folders=/f,readonly -hotplug sockets=/s \
         -hotplug tap=tap7 -hotplug vhost=on",
    );
    assert_eq!(
        spec.hotplug,
        [
            Grant::Images {
                path: "/i".into(),
                readonly: false
            },
            Grant::Images {
                path: "/r".into(),
                readonly: true
            },
            Grant::Folders {
                path: "/f".into(),
                readonly: true
            },
            Grant::Sockets { path: "/s".into() },
            Grant::Tap {
                ifname: "tap7".into()
            },
            Grant::Vhost,
        ]
    );
    let usage = usage();
    for form in [
        "images=PATH",
        "folders=PATH",
        "sockets=PATH",
        "tap=TEXT",
        "vhost=on",
        "readonly=on|off",
    ] {
        assert!(
            usage
                .split("-hotplug")
                .nth(1)
                .unwrap()
                .split("-device")
                .next()
                .unwrap()
                .contains(form),
            "{form}"
        );
    }
}

#[test]
fn libvirts_probe() {
    let spec = run(
        "-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg \
         -qmp unix:/var/lib/libvirt/qemu/caps.monitor.sock,server=on,wait=off -pidfile /p -daemonize",
    );
    assert_eq!(spec.machine.kind, MachineKind::None);
    assert!(spec.start_paused && spec.daemonize);
    assert!(spec.monitors[0].server && spec.monitors[0].nowait);
    assert_eq!(
        spec.ignored,
        ["-no-user-config", "-nodefaults", "-nographic"]
    );
}

#[test]
fn what_libvirt_passes_for_a_guest() {
    let spec = run(
        "-name guest=vm1,debug-threads=on -S -machine microvm,usb=off,dump-guest-core=off -accel kvm \
         -cpu host,migratable=on -m size=1048576k -overcommit mem-lock=off \
         -smp 2,sockets=2,cores=1,threads=1 -uuid c7a5fdbd-edaf-9455-926a-d65c16db1809 -no-user-config \
         -nodefaults -chardev socket,id=charmonitor,path=/m.sock,server=on,wait=off \
         -mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc -no-shutdown -boot strict=on \
         -kernel /k -append 'console=ttyS0' -chardev pty,id=charserial0 -serial chardev:charserial0 \
         -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -msg timestamp=on \
         -realtime mlock=off -display none -usb",
    );
    assert_eq!(spec.name.as_deref(), Some("vm1"));
    assert_eq!(spec.memory.size, 1 << 30);
    assert_eq!((spec.cpus.sockets, spec.cpus.cores), (2, 1));
    assert!(spec.no_shutdown);
    assert_eq!(
        spec.monitors[0].address,
        MonitorAddress::Unix("/m.sock".into())
    );
    let plan = plan(&spec, true);
    assert_eq!(
        plan.chardevs,
        [("charserial0".to_owned(), ChardevPlan::Pty { file: 2 })]
    );
    assert!(!plan.policy.restore_terminal);
}

#[test]
fn spellings() {
    let spec = run("--kernel k --machine MicroVm --m 1g,");
    assert_eq!(spec.memory.size, 1 << 30);
    let spec = run("-kernel k -append 'a=b,c' -D -drive file=/a,,b=c,id=x,readonly");
    assert_eq!(spec.drives[0].file, Path::new("/a,b=c"));
    assert!(spec.drives[0].readonly);
    assert_eq!(spec.log.file, None);
    assert_eq!(
        spec.ignored,
        ["-drive file=/a,,b=c,id=x,readonly: no device uses it"]
    );
    for (line, want) in [
        ("-h -xyz", None),
        ("-kernel k -h", Some(Request::Usage)),
        ("-V", Some(Request::Version)),
    ] {
        assert_eq!(parse(&words(line), &Env::default()).ok(), want, "{line}");
    }
    // A kernel command line may start with a dash, as long as it is no option.
    assert_eq!(run("-kernel k -append '-- x'").boot.cmdline, "-- x");
    assert_eq!(run("-kernel k -append ''").boot.cmdline, "");
}

#[test]
fn addresses_of_cards_are_unique() {
    let spec = run(
        "-kernel k -netdev tap,id=a,ifname=a -netdev tap,id=b,ifname=b -device virtio-net-device,netdev=a \
         -device virtio-net-device,netdev=b,mac=52:54:00:12:34:56",
    );
    let macs: Vec<_> = spec
        .devices
        .iter()
        .map(|device| match device.kind {
            DeviceKind::Net { mac, .. } => mac,
            _ => panic!(),
        })
        .collect();
    assert_eq!(
        macs,
        [
            [0x52, 0x54, 0, 0x12, 0x34, 0x57],
            [0x52, 0x54, 0, 0x12, 0x34, 0x56]
        ]
    );
}

#[test]
fn the_environment_sets_the_level() {
    let level = |name: &str| {
        parse(
            &words("-kernel k"),
            &Env {
                log_level: Some(name.into()),
            },
        )
        .map(|request| match request {
            Request::Run(spec) => spec.log.level,
            _ => panic!(),
        })
    };
    assert_eq!(level("trace").unwrap(), Level::Trace);
    assert_eq!(level("").unwrap(), Level::Error);
    assert_eq!(
        level("loud").unwrap_err().to_string(),
        "STRATOVIRT_LOG_LEVEL loud: not valid; allowed: error, warn, info, debug, trace"
    );
}

#[test]
fn every_option_of_the_table_is_handled() {
    for option in table::OPTIONS {
        if matches!(option.group, Group::Later | Group::Accepted | Group::Help) {
            continue;
        }
        let given = Given {
            option,
            value: "x".into(),
            has_value: true,
            _spelled: option.name,
        };
        let mut draft = Draft::new(&Env::default()).unwrap();
        if let Err(error) = draft.take(&given) {
            assert!(
                !error.to_string().contains("option is not supported"),
                "{error}"
            );
        }
    }
}

#[test]
fn a_folder_is_served_by_an_own_process_that_never_sees_its_path() {
    let spec = run(
        "-kernel k -fsdev local,id=f,path=/srv/share,readonly=on,cache=always,xattr=on,\
         translate-uid=map:0:100000:60+forbid-guest:60:1000 \
         -device virtio-fs-device,fsdev=f,tag=share,num-request-queues=2",
    );
    let plan = plan(&spec, false);
    let grant = &plan.policy.devices[0];
    assert!(!grant.is_foreign());
    assert_eq!(
        grant.backend,
        ipc::control::BackendGrant::Folder {
            path: "/srv/share".into()
        }
    );
    let ipc::spec::DeviceSpec::Fs(fs) = &grant.spec else {
        panic!("{grant:?}")
    };
    assert_eq!((fs.id.as_str(), fs.tag.as_str()), ("virtio-fs0", "share"));
    assert!(fs.readonly && fs.xattr && !fs.posix_acl);
    assert_eq!(fs.users.to_host(5), Some(100_005));
    assert_eq!(
        (fs.users.to_host(70), fs.groups.to_host(5)),
        (None, Some(5))
    );
    assert_eq!(fs.cache, ipc::spec::fs::FsCache::Always);
    assert_eq!((fs.num_queues(), fs.queue_size), (3, 1024));
    assert!(!format!("{:?}", grant.spec).contains("/srv"));
}

#[test]
fn a_folder_behind_a_daemon_is_a_connection_as_in_the_manual() {
    let spec = run(
        "-kernel k -chardev socket,id=virtio_fs,path=/tmp/fs.sock,server,nowait \
         -device vhost-user-fs-device,id=device_id,chardev=virtio_fs,tag=myfs",
    );
    let plan = plan(&spec, false);
    let grant = &plan.policy.devices[0];
    assert!(grant.is_foreign());
    assert_eq!(
        grant.backend,
        ipc::control::BackendGrant::Socket {
            option: "-chardev id=virtio_fs".into(),
            path: "/tmp/fs.sock".into()
        }
    );
    assert_eq!(grant.spec.num_queues(), 2);
    assert!(
        plan.policy
            .files
            .iter()
            .all(|file| !matches!(file, ipc::control::FileGrant::ListenUnix { .. }))
    );
    assert!(
        spec.ignored
            .iter()
            .any(|note| note.contains("server and nowait")),
        "{:?}",
        spec.ignored
    );
}

#[test]
fn an_argument_that_is_no_text_is_told() {
    use std::os::unix::ffi::OsStringExt;
    let args = [OsString::from_vec(vec![b'-', 0xff])];
    assert!(
        parse(&args, &Env::default())
            .unwrap_err()
            .to_string()
            .contains("not valid UTF-8")
    );
}

#[test]
fn help_fits_the_screen_and_names_every_option() {
    let usage = usage();
    for line in usage.lines() {
        assert!(line.chars().count() <= 100, "{line}");
    }
    for option in table::OPTIONS {
        assert!(usage.contains(&option.dashed()), "{}", option.name);
    }
}

#[test]
fn the_manual_page_is_that_of_the_table() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/stratovirt.1.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&file, manual()).unwrap();
    }
    let page = std::fs::read_to_string(&file).unwrap();
    assert!(
        page == manual(),
        "{} is stale: UPDATE_DOCS=1 cargo test -p vmm-main --lib",
        file.display()
    );
}

#[test]
fn properties_may_be_json_as_libvirt_writes_them() {
    let json = run("-machine microvm,memory-backend=pc.ram -kernel k \
         -object '{\"qom-type\":\"memory-backend-file\",\"id\":\"pc.ram\",\"size\":536870912,\"mem-path\":\"/a,b\",\"share\":true,\"prealloc\":true}' \
         -object '{\"qom-type\":\"iothread\",\"id\":\"io\"}' -drive file=d,id=d,direct=off \
         -device '{\"driver\":\"virtio-blk-device\",\"drive\":\"d\",\"id\":\"disk\",\"num-queues\":2,\"iothread\":\"io\",\"restart\":false}' \
         -netdev '{\"type\":\"tap\",\"ifname\":\"tap0\",\"id\":\"n\"}' -device '{\"driver\":\"virtio-net-device\",\"netdev\":\"n\",\"mac\":\"52:54:00:00:00:01\"}'");
    let text = run("-machine microvm,memory-backend=pc.ram -kernel k -m 512 \
         -object memory-backend-file,id=pc.ram,size=536870912,mem-path=/a,,b,share=on,prealloc=on \
         -object iothread,id=io -drive file=d,id=d,direct=off \
         -device virtio-blk-device,drive=d,id=disk,num-queues=2,iothread=io,restart=off \
         -netdev tap,ifname=tap0,id=n -device virtio-net-device,netdev=n,mac=52:54:00:00:00:01");
    assert_eq!(json, text);
    let memory = &json.memory.zones[0];
    assert_eq!(memory.path.as_deref(), Some(Path::new("/a,b")));
    assert_eq!(memory.size, 512 << 20);
    assert!(memory.share && memory.prealloc && memory.dump_guest_core);
}

#[test]
fn nodes_are_drives_and_a_format_takes_its_file_over() {
    // As libvirt writes it, with a node for the file and one for what it holds, and without the second.
    let nodes = run("-kernel k \
         -blockdev '{\"driver\":\"file\",\"filename\":\"/a,b\",\"node-name\":\"one\",\"read-only\":true,\"auto-read-only\":true,\"discard\":\"unmap\",\"cache\":{\"direct\":true,\"no-flush\":false}}' \
         -blockdev '{\"node-name\":\"two\",\"read-only\":true,\"driver\":\"raw\",\"file\":\"one\"}' \
         -blockdev driver=host_device,node-name=three,filename=/dev/vg/c,aio=threads \
         -device virtio-blk-device,drive=two,id=disk -device virtio-blk-device,drive=three,id=other");
    let drives = run("-kernel k \
         -drive id=two,file=/a,,b,readonly=on,discard=unmap,direct=on \
         -drive id=three,file=/dev/vg/c,direct=off,aio=off \
         -device virtio-blk-device,drive=two,id=disk -device virtio-blk-device,drive=three,id=other");
    assert_eq!(nodes, drives);
    let unused = run("-kernel k -blockdev file,node-name=one,filename=f");
    assert_eq!(
        unused.ignored,
        ["-blockdev file,node-name=one,filename=f: no device uses it"]
    );
}

#[test]
fn nodes_of_a_qcow2_chain_are_the_drives_of_one() {
    // As libvirt writes it, whose files below are read-only only where their formats are; and in one node each.
    let libvirt = run("-kernel k \
         -blockdev '{\"driver\":\"file\",\"filename\":\"base\",\"node-name\":\"l-2-storage\",\"auto-read-only\":true,\"discard\":\"unmap\"}' \
         -blockdev '{\"node-name\":\"l-2-format\",\"read-only\":true,\"driver\":\"qcow2\",\"file\":\"l-2-storage\",\"backing\":null}' \
         -blockdev '{\"driver\":\"file\",\"filename\":\"top\",\"node-name\":\"l-1-storage\",\"auto-read-only\":true,\"discard\":\"unmap\"}' \
         -blockdev '{\"node-name\":\"d\",\"read-only\":false,\"driver\":\"qcow2\",\"file\":\"l-1-storage\",\"backing\":\"l-2-format\"}' \
         -device virtio-blk-device,drive=d,id=disk");
    let short = run("-kernel k \
         -blockdev qcow2,node-name=b,file.driver=file,file.filename=base,read-only=on \
         -blockdev driver=qcow2,node-name=d,file.filename=top,backing=b,discard=unmap \
         -device virtio-blk-device,drive=d,id=disk");
    let drives = run("-kernel k -drive id=b,file=base,format=qcow2,readonly=on \
         -drive id=d,file=top,format=qcow2,backing=b,discard=unmap,direct=off \
         -device virtio-blk-device,drive=d,id=disk");
    assert_eq!(libvirt, drives);
    assert_eq!(short, drives);
    assert_eq!(drives.drives.len(), 1);
    assert!(drives.ignored.is_empty(), "{:?}", drives.ignored);
    let raw = run("-kernel k \
         -blockdev file,node-name=b,filename=base,read-only=on \
         -blockdev raw,node-name=d,file.filename=top,file.aio=threads \
         -blockdev qcow2,node-name=e,file=d,backing=b -device virtio-blk-device,drive=e,id=disk");
    let drives = run("-kernel k -drive id=b,file=base,readonly=on \
         -drive id=e,file=top,format=qcow2,backing=b,direct=off,aio=off -device virtio-blk-device,drive=e,id=disk");
    assert_eq!(raw, drives);
}

#[test]
fn guest_memory_without_a_file_is_an_object_like_any() {
    let spec = run(
        "-kernel k -machine microvm,memory-backend=m -object memory-backend-memfd,id=m,size=1G,dump=off",
    );
    let zone = &spec.memory.zones[0];
    assert_eq!(
        (spec.memory.size, zone.size, &zone.path),
        (1 << 30, 1 << 30, &None)
    );
    assert!(!zone.dump_guest_core);
    let unused = run("-kernel k -object memory-backend-ram,id=m,size=1G");
    assert_eq!(unused.memory.size, 256 << 20);
    assert_eq!(
        unused.ignored,
        ["-object memory-backend-ram,id=m,size=1G: nothing uses it"]
    );
}

#[test]
fn a_chardev_may_be_an_inherited_socket() {
    let spec = run(
        "-machine none -chardev socket,id=m,fd=20,server=on,wait=off -mon chardev=m,id=monitor,mode=control",
    );
    assert_eq!(
        spec.chardevs[0].backend,
        ChardevBackend::Inherited {
            fd: 20,
            server: true,
            nowait: true
        }
    );
    assert_eq!(spec.monitors[0].address, MonitorAddress::Inherited(20));
    assert!(spec.ignored.is_empty(), "{:?}", spec.ignored);
    let plan = plan(&spec, false);
    assert!(matches!(
        &plan.policy.files[..],
        [ipc::control::FileGrant::InheritedSocket {
            fd: 20,
            listens: true,
            ..
        }]
    ));
}

#[test]
fn without_a_guest_any_accelerator_will_do() {
    assert_eq!(
        run("-machine none,accel=tcg").machine.kind,
        MachineKind::None
    );
}

#[test]
fn nodes_have_vcpus_memory_and_distances() {
    // The manual's example, 1.5.
    let spec = run("-kernel k -smp 8 -m 4G -mem-prealloc \
         -object memory-backend-file,size=2G,id=mem0,host-nodes=0-1,policy=bind,mem-path=/path/to/file \
         -object memory-backend-memfd,size=2G,id=mem1,host-nodes=0-1,policy=bind,mem-prealloc=true \
         -numa node,nodeid=0,cpus=0-1:4-5,memdev=mem0 -numa node,nodeid=1,cpus=2-3,cpus=6-7,memdev=mem1 \
         -numa dist,src=0,dst=1,val=30 -numa dist,src=1,dst=0,val=40");
    let memory = &spec.memory;
    let nodes: Vec<_> = memory
        .nodes
        .iter()
        .map(|node| (node.cpus.to_string(), node.zone))
        .collect();
    assert_eq!(
        nodes,
        [("0-1:4-5".into(), Some(0)), ("2-3:6-7".into(), Some(1))]
    );
    assert_eq!(memory.distances, [10, 30, 40, 10]);
    let zones: Vec<_> = memory
        .zones
        .iter()
        .map(|zone| {
            (
                zone.size >> 30,
                zone.policy,
                zone.host_nodes.to_string(),
                zone.prealloc,
            )
        })
        .collect();
    assert_eq!(
        zones,
        [
            (2, MemoryPolicy::Bind, "0-1".into(), false),
            (2, MemoryPolicy::Bind, "0-1".into(), true)
        ]
    );
    assert_eq!(
        spec.ignored,
        ["-mem-prealloc: each node has its own memory"]
    );
    assert_eq!(plan::plan(&spec, false).memory, [Some(1), None]);

    // As libvirt writes it; the second node has no vCPUs, the third no memory, and their order is that of their numbers.
    let spec = run("-kernel k -smp 2 \
         -object '{\"qom-type\":\"memory-backend-ram\",\"id\":\"ram-node0\",\"size\":67108864,\"host-nodes\":[0,2],\"policy\":\"interleave\"}' \
         -object memory-backend-ram,id=ram-node1,size=64M -numa node,nodeid=2,cpus=1 \
         -numa node,nodeid=1,memdev=ram-node1 -numa node,nodeid=0,cpus=0,memdev=ram-node0 -numa dist,src=2,dst=0,val=15");
    let memory = &spec.memory;
    assert_eq!(memory.size, 128 << 20, "the memory of all nodes");
    assert_eq!(memory.zones[0].host_nodes.to_string(), "0:2");
    let zones: Vec<_> = memory.nodes.iter().map(|node| node.zone).collect();
    assert_eq!(zones, [Some(0), Some(1), None]);
    assert_eq!(memory.distances, [10, 20, 15, 20, 10, 20, 15, 20, 10]);
}
