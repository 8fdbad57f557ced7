//! Chardevs under the filters that they run under: the main thread's for the event loop, a vCPU's for output. A forbidden
//! call kills this whole test process with SIGSYS.

#![allow(clippy::unwrap_used)] // a test
#![allow(unsafe_code)] // a function for the time before main

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use seccomp_policies::{Action, Policy, heap, install};
use vmm_main::chardev::terminal::RawTerminal;
use vmm_main::chardev::{Chardev, EventSource, InputSink};
use vmm_main::platform::serial::SerialSink;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

struct Input(std::sync::mpsc::Sender<Vec<u8>>, EventFd);

impl InputSink for Input {
    fn room(&self) -> usize {
        64
    }

    fn push(&mut self, bytes: &[u8]) -> usize {
        self.0.send(bytes.to_vec()).unwrap();
        bytes.len()
    }

    fn room_event(&self) -> &EventFd {
        &self.1
    }
}

/// The test runner starts its threads before a test can say that one heap is for all of them.
// SAFETY: called once by the loader, with arguments that are not looked at; it sets three numbers of the allocator.
#[used]
#[unsafe(link_section = ".init_array")]
static ONE_HEAP: extern "C" fn() = {
    extern "C" fn one_heap() {
        heap::settle();
    }
    one_heap
};

/// Runs `work` on a thread under `policy`.
fn under<T: Send + 'static>(policy: Policy, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    thread::spawn(move || {
        install(policy, Action::Kill).unwrap();
        done.send(work()).unwrap();
        // Filtered threads do not end.
        loop {
            thread::park();
        }
    });
    result.recv().unwrap()
}

#[test]
fn clients_come_talk_and_leave_under_the_main_threads_filter() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let listener = UnixListener::bind(&path).unwrap();
    let mut chardev = Chardev::listening("c", listener.into(), true).unwrap();
    let (sender, input) = std::sync::mpsc::channel();
    chardev.connect_input(Box::new(Input(sender, EventFd::new(EFD_NONBLOCK).unwrap())));
    let output = chardev.output();

    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"key").unwrap();
    let mut chardev = under(Policy::ControlMain, move || {
        chardev.handle();
        chardev.handle();
        chardev
    });
    assert_eq!(input.recv().unwrap(), b"key");

    // More than the socket takes, so that the vCPU wakes the main thread, which writes the rest.
    let mut on_vcpu = output.clone();
    under(Policy::ControlVcpu, move || {
        for _ in 0..100 {
            on_vcpu.push(&[b'x'; 4096]);
        }
    });
    let mut part = [0; 4096];
    client.read_exact(&mut part).unwrap();
    let mut fds = [PollFd::new(chardev.fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(10_000u16)), Ok(1));
    drop(client);
    under(Policy::ControlMain, move || {
        chardev.handle();
        chardev.handle();
        drop(chardev);
    });
}

#[test]
fn a_terminal_is_restored_under_the_main_threads_filter() {
    let pair = nix::pty::openpty(None, None).unwrap();
    let before = nix::sys::termios::tcgetattr(&pair.slave).unwrap();
    let raw = RawTerminal::enter(pair.slave.as_fd()).unwrap().unwrap();
    under(Policy::ControlMain, move || drop(raw));
    assert_eq!(nix::sys::termios::tcgetattr(&pair.slave).unwrap(), before);
}
