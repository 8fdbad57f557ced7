//! What is there to be reached outside of the jails: sockets, keys, shared memory, a message queue.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use std::sync::{Mutex, MutexGuard, PoisonError};

use tests::escape::local::Local;
use tests::escape::{Machine, Stop};

/// There is one bait at a time, whether the test runner makes a process of each test or not.
static TURN: Mutex<()> = Mutex::new(());
const SOCKET: &str = "/run/stratovirt-escape";
const KEY: u64 = 0x5354_5256;

/// Goes away with its owner, but for the key, which goes with its session.
#[derive(Debug)]
pub(crate) struct Bait {
    memory: u64,
    _sockets: [UnixListener; 2],
    _turn: MutexGuard<'static, ()>,
}

impl Bait {
    pub(crate) fn lay() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // One that an interrupted run left.
        let _ = std::fs::remove_file(SOCKET);
        let address = SocketAddr::from_abstract_name("stratovirt-escape").unwrap();
        let sockets = [
            UnixListener::bind(SOCKET).unwrap(),
            UnixListener::bind_addr(&address).unwrap(),
        ];
        let mut me = Local::silent();
        let make = (libc::IPC_CREAT | 0o666) as u64;
        let memory = me.call(libc::SYS_shmget, &[KEY, 4096, make]).unwrap();
        let queue = me.put(b"stratovirt\0").unwrap();
        let flags = (libc::O_CREAT | libc::O_RDWR) as u64;
        me.call(libc::SYS_mq_open, &[queue, flags, 0o666, 0])
            .unwrap();
        let (kind, name) = (
            me.put(b"user\0").unwrap(),
            me.put(b"stratovirt-escape\0").unwrap(),
        );
        let session = -3i64 as u64;
        match me.call(libc::SYS_add_key, &[kind, name, name, 4, session]) {
            // A kernel without keys has none to be found.
            Ok(_) | Err(Stop::Errno(libc::ENOSYS)) => {}
            Err(stop) => panic!("add_key: {stop:?}"),
        }
        Self {
            memory,
            _sockets: sockets,
            _turn: turn,
        }
    }
}

impl Drop for Bait {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(SOCKET);
        let mut me = Local::silent();
        // These fail only when somebody else has removed them.
        let _ = me.call(libc::SYS_shmctl, &[self.memory, libc::IPC_RMID as u64, 0]);
        if let Ok(queue) = me.put(b"stratovirt\0") {
            let _ = me.call(libc::SYS_mq_unlink, &[queue]);
        }
    }
}
