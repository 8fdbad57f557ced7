//! What front ends get wrong, and what each of it leads to.
//!
//! **Job.** The table. **Who is not trusted.** Nobody. **Why this way.** It is read as the promise of a device process.

use super::front::Leads::{End, Leave, No, On};
use super::front::*;
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use tests::vhost_user::{HEADER, REPLY, VERSION, frame, request as req, send, words};

pub(crate) const BAD_FRAME: &str = "message cannot be served";
pub(crate) const TABLE_NO: &str = "SET_MEM_TABLE";
pub(crate) const NO_MESSAGE: &str = "front end";

pub(crate) const CASES: &[Case] = &[
    // Frames.
    ("nothing is said", |_| {}, On),
    (
        "no version",
        |f| bare(f, req::GET_FEATURES, 0, 0),
        End(BAD_FRAME),
    ),
    (
        "version 2",
        |f| bare(f, req::GET_FEATURES, 2, 0),
        End(BAD_FRAME),
    ),
    (
        "a reply as a request",
        |f| bare(f, req::GET_FEATURES, VERSION | REPLY, 0),
        End(BAD_FRAME),
    ),
    (
        "a flag that does not exist",
        |f| bare(f, req::GET_FEATURES, VERSION | 16, 0),
        End(BAD_FRAME),
    ),
    (
        "a message of 4097 bytes",
        |f| f.raw(&frame(req::GET_FEATURES, VERSION, 4097, &[0; 4097]), &[]),
        End(BAD_FRAME),
    ),
    (
        "a message of 4 GiB",
        |f| bare(f, req::GET_FEATURES, VERSION, u32::MAX),
        End(BAD_FRAME),
    ),
    ("request 0", |f| bare(f, 0, VERSION, 0), End(BAD_FRAME)),
    (
        "request 9999",
        |f| bare(f, 9999, VERSION, 0),
        End(BAD_FRAME),
    ),
    (
        "request 2^32 - 1",
        |f| bare(f, u32::MAX, VERSION, 0),
        End(BAD_FRAME),
    ),
    (
        "a body where none belongs",
        |f| f.raw(&frame(req::GET_FEATURES, VERSION, 8, &[0; 8]), &[]),
        End(BAD_FRAME),
    ),
    (
        "no body where one belongs",
        |f| bare(f, req::SET_FEATURES, VERSION, 0),
        End(BAD_FRAME),
    ),
    (
        "half a body where one belongs",
        |f| f.raw(&frame(req::SET_FEATURES, VERSION, 4, &[0; 4]), &[]),
        End(BAD_FRAME),
    ),
    (
        "a body in two pieces",
        |f| {
            f.raw(&frame(req::SET_FEATURES, VERSION, 8, &[0; 4]), &[]);
            f.turns();
        },
        End(BAD_FRAME),
    ),
    (
        "a header byte by byte",
        |f| {
            for byte in frame(req::SET_OWNER, VERSION, 0, &[]) {
                f.raw(&[byte], &[]);
            }
        },
        On,
    ),
    ("noise", |f| f.raw(&[0xa5; 4096], &[]), End(BAD_FRAME)),
    ("zeros", |f| f.raw(&[0; 4096], &[]), End(BAD_FRAME)),
    // Order.
    (
        "a kick before memory",
        |f| {
            f.greet();
            let k = f.kick.as_raw_fd();
            f.fd_of(req::SET_VRING_KICK, k);
        },
        No("before SET_MEM_TABLE"),
    ),
    (
        "a running queue without description",
        |f| {
            f.ram();
            let e = f.error.as_raw_fd();
            f.fd_of(req::SET_VRING_ERR, e);
            f.go();
            f.wait_broken();
        },
        On,
    ),
    (
        "configuration before protocol features",
        |f| {
            let _ = f.ask(req::GET_CONFIG, &config(0, 8, 8));
        },
        End(BAD_FRAME),
    ),
    (
        "in-flight region before protocol features",
        |f| {
            let _ = f.ask(req::GET_INFLIGHT_FD, &inflight(0, 0, 1, 16));
        },
        End(BAD_FRAME),
    ),
    (
        "a memory slot before protocol features",
        |f| {
            let m = f.memory.as_raw_fd();
            f.acks = false;
            f.tell_with(req::ADD_MEM_REG, &words(&[0, 0, 0x1000, 0, 0]), &[m]);
        },
        End(BAD_FRAME),
    ),
    (
        "features that were not offered",
        |f| {
            f.greet();
            f.tell(req::SET_FEATURES, &[u64::MAX]);
        },
        No("SET_FEATURES"),
    ),
    (
        "protocol features that were not offered",
        |f| {
            f.greet();
            f.tell(req::SET_PROTOCOL_FEATURES, &[u64::MAX]);
        },
        Leave,
    ),
    (
        "owner a hundred times",
        |f| {
            f.greet();
            for _ in 0..100 {
                f.tell(req::SET_OWNER, &[]);
            }
        },
        On,
    ),
    (
        "features a hundred times",
        |f| {
            f.run();
            for _ in 0..100 {
                f.tell(req::SET_FEATURES, &[VERSION_1 | PROTOCOL_FEATURES]);
            }
        },
        On,
    ),
    (
        "memory two hundred times",
        |f| {
            f.run();
            for _ in 0..200 {
                let m = f.memory.as_raw_fd();
                f.region(m, 0, RAM, 0, 0);
            }
            f.offer();
        },
        On,
    ),
    (
        "eventfds a thousand times",
        |f| {
            f.run();
            for _ in 0..1000 {
                let fd = event();
                f.fd_of(req::SET_VRING_CALL, fd.as_raw_fd());
                f.fd_of(req::SET_VRING_KICK, fd.as_raw_fd());
                f.fd_of(req::SET_VRING_ERR, fd.as_raw_fd());
            }
        },
        On,
    ),
    (
        "reset a hundred times",
        |f| {
            for _ in 0..100 {
                f.run();
                f.tell(req::RESET_DEVICE, &[]);
            }
        },
        On,
    ),
    (
        "the old reset",
        |f| {
            f.run();
            f.tell(req::RESET_OWNER, &[]);
        },
        On,
    ),
    (
        "the size of a running queue",
        |f| {
            f.run();
            f.tell(req::SET_VRING_NUM, &[8 << 32]);
        },
        No("while the queue runs"),
    ),
    (
        "the place of a running queue",
        |f| {
            f.run();
            f.tell(req::SET_VRING_ADDR, &[0, 0, 0, 0, 0]);
        },
        No("while the queue runs"),
    ),
    (
        "the base of a running queue",
        |f| {
            f.run();
            f.tell(req::SET_VRING_BASE, &[1 << 32]);
        },
        No("while the queue runs"),
    ),
    (
        "an in-flight region for a running queue",
        |f| {
            f.run();
            let m = memfd(0x10_0000);
            f.tell_with(
                req::SET_INFLIGHT_FD,
                &inflight(0x10_0000, 0, 1, 16),
                &[m.as_raw_fd()],
            );
        },
        No("while the queue runs"),
    ),
    (
        "a new in-flight region while a queue runs",
        |f| {
            f.run();
            let _ = f.ask(req::GET_INFLIGHT_FD, &inflight(0, 0, 1, 16));
        },
        End("while the queue runs"),
    ),
    (
        "memory taken from a running queue",
        |f| {
            f.run();
            let m = f.memory.as_raw_fd();
            f.region(m, 0x80_0000, 0x1000, 0x80_0000, 0);
            f.wait_broken();
        },
        On,
    ),
    // Queues.
    (
        "queue 9999",
        |f| {
            f.greet();
            f.tell(req::SET_VRING_NUM, &[9999 | 16 << 32]);
        },
        No("queue 9999"),
    ),
    (
        "a kick for queue 255",
        |f| {
            f.ram();
            let k = f.kick.as_raw_fd();
            f.tell_with(req::SET_VRING_KICK, &words(&[255]), &[k]);
        },
        No("queue 255"),
    ),
    (
        "the base of queue 9999",
        |f| {
            f.greet();
            let _ = f.ask(req::GET_VRING_BASE, &words(&[9999]));
        },
        End("queue 9999"),
    ),
    (
        "a queue of 0",
        |f| {
            f.greet();
            f.tell(req::SET_VRING_NUM, &[0]);
        },
        No("SET_VRING_NUM"),
    ),
    (
        "a queue of 3",
        |f| {
            f.greet();
            f.tell(req::SET_VRING_NUM, &[3 << 32]);
        },
        No("SET_VRING_NUM"),
    ),
    (
        "a queue of 32768",
        |f| {
            f.greet();
            f.tell(req::SET_VRING_NUM, &[32768 << 32]);
        },
        No("SET_VRING_NUM"),
    ),
    (
        "a queue of 2^32 - 1",
        |f| {
            f.greet();
            f.tell(req::SET_VRING_NUM, &[(u64::from(u32::MAX)) << 32]);
        },
        No("SET_VRING_NUM"),
    ),
    (
        "a base of 65536",
        |f| {
            f.greet();
            f.tell(req::SET_VRING_BASE, &[65536 << 32]);
        },
        No("SET_VRING_BASE"),
    ),
    (
        "a queue with a log",
        |f| {
            f.greet();
            f.tell(req::SET_VRING_ADDR, &[1 << 32, 0, 0, 0, 0]);
        },
        No("SET_VRING_ADDR"),
    ),
    (
        "a queue with unknown flags",
        |f| {
            f.greet();
            f.acks = false;
            f.tell(req::SET_VRING_ADDR, &[0xfe << 32, 0, 0, 0, 0]);
        },
        End(BAD_FRAME),
    ),
    (
        "a queue enabled by 2",
        |f| {
            f.greet();
            f.acks = false;
            f.tell(req::SET_VRING_ENABLE, &[2 << 32]);
        },
        End(BAD_FRAME),
    ),
    (
        "a queue outside of memory",
        |f| {
            f.ram();
            f.describe();
            f.tell(req::SET_VRING_ADDR, &[0, RAM, USED, AVAILABLE, 0]);
            f.go();
            f.wait_broken();
        },
        On,
    ),
    (
        "a queue that ends outside of memory",
        |f| {
            f.ram();
            f.describe();
            f.tell(req::SET_VRING_ADDR, &[0, RAM - 16, USED, AVAILABLE, 0]);
            f.go();
            f.wait_broken();
        },
        On,
    ),
    (
        "a queue at the end of the address space",
        |f| {
            f.ram();
            f.describe();
            f.tell(
                req::SET_VRING_ADDR,
                &[0, u64::MAX - 15, u64::MAX - 3, u64::MAX - 1, 0],
            );
            f.go();
            if f.acks {
                assert!(f.acknowledged.is_some());
            }
        },
        Leave,
    ),
    (
        "a queue at odd places",
        |f| {
            f.ram();
            f.describe();
            f.tell(
                req::SET_VRING_ADDR,
                &[0, TABLE + 1, USED + 1, AVAILABLE + 1, 0],
            );
            f.go();
        },
        Leave,
    ),
    // Memory.
    (
        "memory without a descriptor",
        |f| {
            f.greet();
            f.tell_with(req::SET_MEM_TABLE, &words(&[1, 0, RAM, 0, 0]), &[]);
        },
        Leave,
    ),
    (
        "memory with too many descriptors",
        |f| {
            f.greet();
            let m = f.memory.as_raw_fd();
            f.tell_with(req::SET_MEM_TABLE, &words(&[1, 0, RAM, 0, 0]), &[m, m]);
        },
        Leave,
    ),
    (
        "a table that promises more regions",
        |f| {
            f.greet();
            let m = f.memory.as_raw_fd();
            f.tell_with(req::SET_MEM_TABLE, &words(&[2, 0, RAM, 0, 0]), &[m]);
        },
        Leave,
    ),
    (
        "no region",
        |f| {
            f.greet();
            f.tell(req::SET_MEM_TABLE, &[0]);
        },
        Leave,
    ),
    (
        "33 regions",
        |f| {
            regions(
                f,
                &(0..33)
                    .map(|i| [i << 12, 0x1000, i << 12, 0])
                    .collect::<Vec<_>>(),
            );
        },
        Leave,
    ),
    (
        "a region without bytes",
        |f| regions(f, &[[0, 0, 0, 0]]),
        Leave,
    ),
    (
        "overlapping regions",
        |f| regions(f, &[[0, 0x2000, 0, 0], [0x1000, 0x2000, 0x1000, 0]]),
        No(TABLE_NO),
    ),
    (
        "the same region twice",
        |f| regions(f, &[[0, 0x1000, 0, 0], [0, 0x1000, 0, 0]]),
        No(TABLE_NO),
    ),
    (
        "a region that wraps in the guest",
        |f| regions(f, &[[u64::MAX - 0xfff, 0x2000, 0, 0]]),
        Leave,
    ),
    (
        "a region that wraps in the front end",
        |f| regions(f, &[[0, 0x2000, u64::MAX - 0xfff, 0]]),
        Leave,
    ),
    (
        "a region that wraps in its file",
        |f| regions(f, &[[0, 0x2000, 0, u64::MAX - 0xfff]]),
        Leave,
    ),
    (
        "a region beyond its file",
        |f| regions(f, &[[0, RAM + 0x1000, 0, 0]]),
        No("bytes of its file"),
    ),
    (
        "a region at an odd offset",
        |f| regions(f, &[[0, 0x1000, 0, 1]]),
        No(TABLE_NO),
    ),
    (
        "a region of a terabyte",
        |f| {
            let file = memfd(1 << 45);
            table_of(f, file.try_clone().unwrap().into());
            f.region(file.as_raw_fd(), 0, 1 << 40, 0, 0);
        },
        No(TABLE_NO),
    ),
    (
        "a sparse file of 32 TiB",
        |f| table_of(f, memfd(1 << 45).into()),
        On,
    ),
    (
        "memory in a pipe",
        |f| table_of(f, std::io::pipe().unwrap().0.into()),
        No(TABLE_NO),
    ),
    (
        "memory in an O_PATH descriptor",
        |f| table_of(f, open("/", libc::O_PATH)),
        No(TABLE_NO),
    ),
    (
        "memory in a folder",
        |f| table_of(f, open("/", libc::O_DIRECTORY)),
        No(TABLE_NO),
    ),
    (
        "memory in /dev/null",
        |f| table_of(f, open("/dev/null", 0)),
        No(TABLE_NO),
    ),
    (
        "memory in a socket",
        |f| table_of(f, UnixStream::pair().unwrap().0.into()),
        No(TABLE_NO),
    ),
    (
        "memory in an eventfd",
        |f| table_of(f, event().into()),
        No(TABLE_NO),
    ),
    (
        "memory in an epoll set",
        |f| table_of(f, Epoll::new(EpollCreateFlags::empty()).unwrap().0),
        No(TABLE_NO),
    ),
    (
        "memory that is read-only",
        |f| {
            let path = format!("/proc/self/fd/{}", f.memory.as_raw_fd());
            table_of(f, open(&path, 0));
        },
        No(TABLE_NO),
    ),
    (
        "memory that shrinks under a queue",
        |f| {
            f.run();
            f.memory.set_len(0).unwrap();
            f.kick.write(1).unwrap();
            f.acks = false;
            let _ = f.ask(req::GET_VRING_BASE, &words(&[0]));
            f.turns();
        },
        Leave,
    ),
    (
        "memory that shrinks under a chain",
        |f| {
            f.run();
            f.turns();
            f.memory.set_len(0).unwrap();
            f.kick.write(1).unwrap();
            f.acks = false;
            f.turns();
        },
        End("the front end's file ends before a page"),
    ),
    // Memory slots.
    (
        "33 memory slots",
        |f| {
            f.greet();
            for at in 0..33 {
                let m = f.memory.as_raw_fd();
                f.tell_with(
                    req::ADD_MEM_REG,
                    &words(&[0, at << 12, 0x1000, at << 12, 0]),
                    &[m],
                );
            }
        },
        No("33 memory regions"),
    ),
    (
        "a memory slot over another",
        |f| {
            f.ram();
            let m = f.memory.as_raw_fd();
            f.tell_with(req::ADD_MEM_REG, &words(&[0, 0, 0x1000, 0, 0]), &[m]);
        },
        No("ADD_MEM_REG"),
    ),
    (
        "a memory slot in a pipe",
        |f| {
            f.greet();
            let p = OwnedFd::from(std::io::pipe().unwrap().0);
            f.tell_with(
                req::ADD_MEM_REG,
                &words(&[0, 0, 0x1000, 0, 0]),
                &[p.as_raw_fd()],
            );
        },
        No("ADD_MEM_REG"),
    ),
    (
        "a memory slot without a descriptor",
        |f| {
            f.greet();
            f.acks = false;
            f.tell_with(req::ADD_MEM_REG, &words(&[0, 0, 0x1000, 0, 0]), &[]);
        },
        End(BAD_FRAME),
    ),
    (
        "a memory slot that was never there",
        |f| {
            f.ram();
            f.tell(req::REM_MEM_REG, &[0, 0x100_0000, 0x1000, 0, 0]);
        },
        No("REM_MEM_REG"),
    ),
    (
        "all memory slots away under a queue",
        |f| {
            f.run();
            f.tell(req::REM_MEM_REG, &[0, 0, RAM, 0, 0]);
        },
        No("REM_MEM_REG"),
    ),
    // Descriptors.
    (
        "a descriptor where none belongs",
        |f| {
            let m = f.memory.as_raw_fd();
            f.raw(&frame(req::GET_FEATURES, VERSION, 0, &[]), &[m]);
        },
        End(BAD_FRAME),
    ),
    (
        "a hundred descriptors",
        |f| {
            let fds = vec![f.memory.as_raw_fd(); 100];
            f.raw(&frame(req::SET_OWNER, VERSION, 0, &[]), &fds);
            f.raw(&frame(req::SET_OWNER, VERSION, 0, &[]), &[]);
        },
        On,
    ),
    (
        "253 descriptors, a hundred times",
        |f| {
            let fds = vec![f.memory.as_raw_fd(); 253];
            for _ in 0..100 {
                f.raw(&frame(req::SET_OWNER, VERSION, 0, &[]), &fds);
            }
        },
        On,
    ),
    (
        "two kicks at once",
        |f| {
            f.ram();
            f.acks = false;
            let k = f.kick.as_raw_fd();
            f.tell_with(req::SET_VRING_KICK, &words(&[0]), &[k, k]);
        },
        End(BAD_FRAME),
    ),
    (
        "no kick",
        |f| {
            f.ram();
            f.tell(req::SET_VRING_KICK, &[1 << 8]);
        },
        No("polling"),
    ),
    (
        "a file as a kick",
        |f| {
            f.ram();
            f.describe();
            let m = f.memory.as_raw_fd();
            f.fd_of(req::SET_VRING_KICK, m);
        },
        No("no eventfd"),
    ),
    (
        "an O_PATH descriptor as a kick",
        |f| {
            f.ram();
            let p = open("/", libc::O_PATH);
            f.fd_of(req::SET_VRING_KICK, p.as_raw_fd());
        },
        No("SET_VRING_KICK"),
    ),
    (
        "an O_PATH descriptor as a call",
        |f| {
            f.ram();
            let p = open("/", libc::O_PATH);
            f.fd_of(req::SET_VRING_CALL, p.as_raw_fd());
        },
        No("SET_VRING_CALL"),
    ),
    (
        "the front end's own socket as a kick",
        |f| {
            f.run();
            let s = f.socket.as_raw_fd();
            f.fd_of(req::SET_VRING_KICK, s);
        },
        No("no eventfd"),
    ),
    (
        "a full pipe as a call",
        |f| {
            f.run();
            let (_reader, full) = full_pipe();
            f.fd_of(req::SET_VRING_CALL, full.as_raw_fd());
        },
        No("no eventfd"),
    ),
    (
        "a full blocking eventfd as a call",
        |f| {
            f.run();
            let full = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
            full.write(u64::MAX - 1).unwrap();
            f.fd_of(req::SET_VRING_CALL, full.as_raw_fd());
            f.offer();
            f.turns();
        },
        On,
    ),
    (
        "a pipe without a reader as a call",
        |f| {
            f.run();
            let writer = OwnedFd::from(std::io::pipe().unwrap().1);
            f.fd_of(req::SET_VRING_CALL, writer.as_raw_fd());
        },
        No("no eventfd"),
    ),
    (
        "a file at its limit as a call",
        |f| {
            f.run();
            let file = memfd(0);
            nix::unistd::lseek(&file, 1 << 40, nix::unistd::Whence::SeekSet).unwrap();
            f.fd_of(req::SET_VRING_CALL, file.as_raw_fd());
            f.offer();
            f.turns();
        },
        On,
    ),
    // In-flight region.
    (
        "an in-flight region of 65535 queues",
        |f| {
            f.greet();
            let _ = f.ask(req::GET_INFLIGHT_FD, &inflight(0, 0, u16::MAX, 16));
        },
        End("at most the device's queues"),
    ),
    (
        "an in-flight region of 65535 entries",
        |f| {
            f.greet();
            let _ = f.ask(req::GET_INFLIGHT_FD, &inflight(0, 0, 1, u16::MAX));
        },
        End("at most the device's queue size"),
    ),
    (
        "a thousand in-flight regions",
        |f| {
            f.greet();
            for _ in 0..1000 {
                let reply = f.ask(req::GET_INFLIGHT_FD, &inflight(0, 0, 1, 16)).unwrap();
                let fds: Vec<RawFd> = reply.fds.iter().map(AsRawFd::as_raw_fd).collect();
                assert_eq!(fds.len(), 1);
                f.tell_with(req::SET_INFLIGHT_FD, &reply.body, &fds);
            }
        },
        On,
    ),
    (
        "an in-flight region that is too small",
        |f| {
            f.ram();
            let m = memfd(64);
            f.tell_with(
                req::SET_INFLIGHT_FD,
                &inflight(0x10_0000, 0, 1, 16),
                &[m.as_raw_fd()],
            );
        },
        No("SET_INFLIGHT_FD"),
    ),
    (
        "an in-flight region that says it is too small",
        |f| {
            f.ram();
            let m = memfd(0x10_0000);
            f.tell_with(
                req::SET_INFLIGHT_FD,
                &inflight(1, 0, 1, 16),
                &[m.as_raw_fd()],
            );
        },
        No("SET_INFLIGHT_FD"),
    ),
    (
        "an in-flight region at the end of the address space",
        |f| {
            f.ram();
            let m = memfd(0x10_0000);
            f.tell_with(
                req::SET_INFLIGHT_FD,
                &inflight(0x1000, u64::MAX - 0xfff, 1, 16),
                &[m.as_raw_fd()],
            );
        },
        No("SET_INFLIGHT_FD"),
    ),
    (
        "an in-flight region in a pipe",
        |f| {
            f.ram();
            let p = OwnedFd::from(std::io::pipe().unwrap().0);
            f.tell_with(
                req::SET_INFLIGHT_FD,
                &inflight(0x1000, 0, 1, 16),
                &[p.as_raw_fd()],
            );
        },
        No("SET_INFLIGHT_FD"),
    ),
    (
        "an in-flight region without a descriptor",
        |f| {
            f.ram();
            f.acks = false;
            f.tell_with(req::SET_INFLIGHT_FD, &inflight(0x1000, 0, 1, 16), &[]);
        },
        End(BAD_FRAME),
    ),
    (
        "an in-flight region of noise",
        |f| {
            f.ram();
            let m = memfd(0x1000);
            m.write_all_at(&[0xa5; 0x1000], 0).unwrap();
            f.tell_with(
                req::SET_INFLIGHT_FD,
                &inflight(0x1000, 0, 1, 16),
                &[m.as_raw_fd()],
            );
            f.describe();
            f.go();
            f.wait_broken();
        },
        On,
    ),
    (
        "an in-flight region that shrinks",
        |f| {
            f.ram();
            let m = memfd(0x1000);
            f.tell_with(
                req::SET_INFLIGHT_FD,
                &inflight(0x1000, 0, 1, 16),
                &[m.as_raw_fd()],
            );
            f.turns();
            m.set_len(0).unwrap();
            f.acks = false;
            f.describe();
            f.go();
            f.turns();
        },
        End("the front end's file ends before a page"),
    ),
    // Configuration space.
    (
        "configuration from 257 on",
        |f| {
            f.greet();
            let reply = f.ask(req::GET_CONFIG, &config(257, 8, 8));
            assert!(reply.is_none_or(|reply| reply.body.len() <= HEADER));
        },
        Leave,
    ),
    (
        "configuration of 4000 bytes",
        |f| {
            f.greet();
            let reply = f.ask(req::GET_CONFIG, &config(0, 4000, 4000));
            assert!(reply.is_none_or(|reply| reply.body.len() <= HEADER));
        },
        Leave,
    ),
    (
        "configuration of other bytes than told",
        |f| {
            f.greet();
            let _ = f.ask(req::GET_CONFIG, &config(0, 8, 9));
        },
        End(BAD_FRAME),
    ),
    (
        "configuration without a header",
        |f| {
            f.greet();
            let _ = f.ask(req::GET_CONFIG, &[0; 4]);
        },
        End(BAD_FRAME),
    ),
    (
        "configuration with unknown flags",
        |f| {
            f.greet();
            let mut body = config(0, 8, 8);
            body[8] = 0xff;
            let _ = f.ask(req::GET_CONFIG, &body);
        },
        End(BAD_FRAME),
    ),
    (
        "all of configuration written",
        |f| {
            f.greet();
            f.tell_with(req::SET_CONFIG, &config(0, 256, 256), &[]);
        },
        Leave,
    ),
    (
        "configuration written beyond its end",
        |f| {
            f.greet();
            f.tell_with(req::SET_CONFIG, &config(250, 256, 256), &[]);
        },
        Leave,
    ),
    // What is not offered.
    (
        "a log",
        |f| {
            f.greet();
            f.acks = false;
            let m = f.memory.as_raw_fd();
            f.tell_with(req::SET_LOG_BASE, &words(&[0x1000, 0]), &[m]);
        },
        End(NO_MESSAGE),
    ),
    (
        "a log's eventfd",
        |f| {
            f.greet();
            f.acks = false;
            let m = f.memory.as_raw_fd();
            f.tell_with(req::SET_LOG_FD, &[], &[m]);
        },
        End(NO_MESSAGE),
    ),
    (
        "a channel back",
        |f| {
            f.greet();
            f.acks = false;
            let s = f.socket.as_raw_fd();
            f.tell_with(req::SET_BACKEND_REQ_FD, &[], &[s]);
        },
        End(NO_MESSAGE),
    ),
    (
        "a shared object",
        |f| {
            f.greet();
            let _ = f.ask(req::GET_SHARED_OBJECT, &[0; 16]);
        },
        End(NO_MESSAGE),
    ),
    (
        "device state",
        |f| {
            f.greet();
            let m = f.memory.as_raw_fd();
            f.raw(&frame(req::SET_DEVICE_STATE_FD, VERSION, 8, &[0; 8]), &[m]);
            if let Some(reply) = f.reply(req::SET_DEVICE_STATE_FD) {
                assert_ne!(reply.number(), Some(0));
            }
        },
        Leave,
    ),
    (
        "a check of device state",
        |f| {
            f.greet();
            let reply = f.ask(req::CHECK_DEVICE_STATE, &[]);
            assert!(reply.is_none_or(|reply| reply.number() != Some(0)));
        },
        Leave,
    ),
    // Bad manners.
    (
        "a flood that reads no answer",
        |f| {
            f.socket.set_nonblocking(true).unwrap();
            let bytes = frame(req::GET_FEATURES, VERSION, 0, &[]);
            while send(&f.socket, &bytes, &[]).is_ok() {}
        },
        Leave,
    ),
    (
        "a flood of kicks",
        |f| {
            f.run();
            for _ in 0..10_000 {
                f.kick.write(1).unwrap();
            }
            f.turns();
        },
        On,
    ),
];
