//! What windows do with files, and with what is none.
//!
//! **Job.** Plays the device process: sends messages, right and wrong, and looks at this process's own mappings. **Who is not
//! trusted.** Nobody. **Why this way.** In a file of its own, since it is as long as what it tests.

#![allow(clippy::unwrap_used)] // test code

use std::io::{Read, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::ControlMessage;

use super::*;

const MAP: u32 = 9;
const UNMAP: u32 = 10;
const UNIT: u64 = DAX_UNIT;

/// A window of eight units, its thread, and the device's end of its channel.
struct Bench {
    window: Arc<Window>,
    device: UnixStream,
}

impl Bench {
    fn new() -> Self {
        let mut windows = Windows::new().unwrap();
        let window = windows.add("fs0", 4 << 30, 8 * UNIT).unwrap();
        windows.hand_over();
        std::thread::spawn(move || windows.serve());
        let device = UnixStream::from(window.connect().unwrap());
        window.open();
        Self { window, device }
    }

    fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) {
        let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let parts = [IoSlice::new(bytes)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(self.device.as_raw_fd(), &parts, control, flags, None);
        assert_eq!(sent.unwrap(), bytes.len());
    }

    /// `None` if the channel was closed instead.
    fn answer(&mut self) -> Option<u64> {
        let mut reply = [0; 20];
        self.device.read_exact(&mut reply).ok()?;
        assert_eq!(reply[4..12], [5, 0, 0, 0, 8, 0, 0, 0]);
        Some(u64::from_le_bytes(reply[12..].try_into().unwrap()))
    }

    fn ask(&mut self, request: u32, words: [u64; 4], file: Option<&impl AsFd>) -> bool {
        let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        self.send(&message([request, 9, 40], 0, words), &fds);
        self.answer().unwrap() == 0
    }

    /// `at` and `len` in units.
    fn map(&mut self, file: &impl AsFd, from: u64, (at, len): (u64, u64), writable: bool) -> bool {
        let words = [from, at * UNIT, len * UNIT, u64::from(writable)];
        self.ask(MAP, words, Some(file))
    }

    fn unmap(&mut self, (at, len): (u64, u64)) -> bool {
        self.ask(UNMAP, [0, at * UNIT, len * UNIT, 0], None::<&OwnedFd>)
    }

    /// The rights of each unit, and whether a file is there.
    fn view(&self) -> Vec<String> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        (0..8)
            .map(|unit| {
                let address = self.window.host_address() + unit * UNIT;
                let line = maps.lines().find(|line| {
                    let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
                    let hex = |text| u64::from_str_radix(text, 16).unwrap();
                    (hex(start)..hex(end)).contains(&address)
                });
                line.unwrap().split_whitespace().nth(1).unwrap().to_owned()
            })
            .collect()
    }

    fn is_empty(&self) -> bool {
        self.view().iter().all(|rights| rights == "---p")
    }
}

/// Header, id of the region, then offset in the file, offset in the region, length and flags.
fn message(header: [u32; 3], region: u8, words: [u64; 4]) -> Vec<u8> {
    let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend([region, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    bytes
}

fn file(units: u64) -> std::fs::File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(units * UNIT).unwrap();
    file
}

#[test]
fn files_come_and_go_with_the_rights_that_were_asked_for() {
    let mut bench = Bench::new();
    assert!(bench.is_empty());
    let one = file(4);
    assert!(bench.map(&one, UNIT, (1, 2), false));
    assert!(bench.map(&one, 0, (7, 1), true));
    let wanted = [
        "---p", "r--s", "r--s", "---p", "---p", "---p", "---p", "rw-s",
    ];
    assert_eq!(bench.view(), wanted);
    one.write_all_at(b"seen", UNIT).unwrap();
    let there = (bench.window.host_address() + UNIT) as *const u8;
    // SAFETY: a shared mapping of a file that is long enough.
    let bytes = unsafe { std::slice::from_raw_parts(there, 4) };
    assert_eq!(bytes, b"seen");
    // The same range again, with the right to write.
    assert!(bench.map(&one, UNIT, (1, 2), true));
    assert_eq!(bench.view()[1..3], ["rw-s", "rw-s"]);
    assert!(bench.unmap((0, 8)));
    assert!(bench.is_empty());
    assert!(bench.unmap((0, 8)), "nothing is there already");
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let mut bench = Bench::new();
    let one = file(8);
    assert!(bench.map(&one, 0, (2, 2), false));
    let before = bench.view();
    for (at, len) in [(1, 2), (3, 1), (2, 1), (3, 2), (0, 8), (2, 3)] {
        assert!(!bench.map(&one, 0, (at, len), false), "{at} {len}");
    }
    for (at, len) in [(2, 1), (3, 1), (1, 2), (3, 5)] {
        assert!(!bench.unmap((at, len)), "{at} {len}");
    }
    let size = 8 * UNIT;
    let top = 0u64.wrapping_sub(UNIT);
    for [from, at, len, flags] in [
        [0, 0, 0, 0],
        [0, 0, 4096, 0],
        [0, 4096, UNIT, 0],
        [0, size, UNIT, 0],
        [0, 7 * UNIT, 2 * UNIT, 0],
        [0, top, UNIT, 0],
        [0, top, 2 * UNIT, 0],
        [0, 0, top, 0],
        [0, 0, u64::MAX, 0],
        [1, 0, UNIT, 0],
        [1 << 63, 0, UNIT, 0],
        [u64::MAX, 0, UNIT, 0],
        [0, 0, UNIT, 2],
        [0, 0, UNIT, 4],
        [0, 0, UNIT, u64::MAX],
    ] {
        assert!(!bench.ask(MAP, [from, at, len, flags], Some(&one)));
    }
    assert_eq!(bench.view(), before);
}

#[test]
fn only_regular_files_are_mapped_and_only_as_they_are_open() {
    let mut bench = Bench::new();
    let (socket, _other) = UnixStream::pair().unwrap();
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    // Both can be mapped, as far as the kernel goes.
    let zero = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .unwrap();
    let folder = std::fs::File::open("/").unwrap();
    for (fd, what) in [
        (socket.as_fd(), "socket"),
        (event.as_fd(), "eventfd"),
        (zero.as_fd(), "device"),
        (folder.as_fd(), "folder"),
    ] {
        assert!(!bench.map(&fd, 0, (0, 1), false), "{what}");
    }
    let path = tempfile::NamedTempFile::new().unwrap();
    let reading = std::fs::File::open(path.path()).unwrap();
    assert!(!bench.map(&reading, 0, (0, 1), true));
    let writing = std::fs::File::options()
        .write(true)
        .open(path.path())
        .unwrap();
    assert!(!bench.map(&writing, 0, (0, 1), false));
    assert!(bench.is_empty());
    // A mapping that cannot be replaced stays.
    assert!(bench.map(&reading, 0, (0, 1), false));
    assert!(!bench.map(&reading, 0, (0, 1), true));
    assert_eq!(bench.view()[0], "r--s");
    // Sealed against writing, which only the mapping itself finds out.
    let sealed = memfd_create(c"sealed", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&sealed, UNIT as i64).unwrap();
    let seals = nix::fcntl::SealFlag::F_SEAL_WRITE;
    nix::fcntl::fcntl(&sealed, nix::fcntl::FcntlArg::F_ADD_SEALS(seals)).unwrap();
    assert!(!bench.map(&sealed, 0, (0, 1), true));
    assert_eq!(bench.view()[0], "r--s");
}

#[test]
fn messages_that_are_none_end_the_channel_and_nothing_else() {
    let one = file(1);
    let good = message([MAP, 9, 40], 0, [0, 0, UNIT, 0]);
    let mut bench = Bench::new();
    let fds = |count: usize| vec![one.as_fd(); count];
    for (bytes, files) in [
        (good.clone(), 0),
        (good.clone(), 2),
        (good.clone(), 5),
        (good[..12].to_vec(), 1),
        (good[..51].to_vec(), 1),
        (message([UNMAP, 9, 40], 0, [0, 0, UNIT, 0]), 1),
        (message([MAP, 1, 40], 0, [0, 0, UNIT, 0]), 1),
        (message([MAP, 13, 40], 0, [0, 0, UNIT, 0]), 1),
        (message([MAP, 9, 41], 0, [0, 0, UNIT, 0]), 1),
        (message([MAP, 9, u32::MAX], 0, [0, 0, UNIT, 0]), 1),
        (message([MAP, 9, 40], 1, [0, 0, UNIT, 0]), 1),
        (message([1, 9, 40], 0, [0; 4]), 0),
        (message([u32::MAX; 3], 255, [u64::MAX; 4]), 0),
        (vec![0], 0),
    ] {
        bench.send(&bytes, &fds(files));
        assert_eq!(bench.answer(), None, "{bytes:?} {files}");
        assert!(bench.is_empty());
        bench.device = UnixStream::from(bench.window.connect().unwrap());
    }
    assert!(bench.map(&one, 0, (0, 1), false), "the next process serves");
}

#[test]
fn a_device_that_does_not_run_has_nothing_mapped() {
    let mut bench = Bench::new();
    let one = file(1);
    assert!(bench.map(&one, 0, (0, 1), false));
    assert!(bench.map(&one, 0, (5, 1), true));
    bench.window.close();
    assert!(bench.is_empty());
    assert!(!bench.map(&one, 0, (0, 1), false));
    bench.window.open();
    assert!(bench.map(&one, 0, (0, 1), false));
    // What a process left stays for the next one; a new channel ends the old one.
    let old = std::mem::replace(
        &mut bench.device,
        UnixStream::from(bench.window.connect().unwrap()),
    );
    (&old).write_all(&[0]).unwrap_err();
    assert_eq!(bench.view()[0], "r--s");
    assert!(bench.unmap((0, 1)));
}

#[test]
fn guards_are_around_every_window() {
    let mut windows = Windows::new().unwrap();
    let one = windows.add("a", 1 << 32, UNIT).unwrap();
    let two = windows.add("b", windows.end().unwrap(), 4 * UNIT).unwrap();
    assert_eq!(two.guest_address(), (1 << 32) + UNIT);
    assert_eq!(
        (windows.len(), windows.end()),
        (2, Some((1 << 32) + 5 * UNIT))
    );
    for window in [&one, &two] {
        assert!(window.host_address().is_multiple_of(UNIT));
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    for window in [one, two] {
        let (first, last) = (
            window.host_address() - RAM_GUARD as u64,
            window.host_address() + window.size() + RAM_GUARD as u64 - 1,
        );
        let mut covered = first;
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let (start, end) = words.next().unwrap().split_once('-').unwrap();
            let hex = |text| u64::from_str_radix(text, 16).unwrap();
            if covered <= last && (hex(start)..hex(end)).contains(&covered) {
                assert_eq!(words.next().unwrap(), "---p", "{line}");
                covered = hex(end);
            }
        }
        assert!(covered > last);
    }
}
