//! The process that keeps a device's state, and starts those that serve.
//!
//! **Job.** First process of the jail. It forks a process that serves the front end, with one table of descriptors for both;
//! when that one has ended it tells the broker, closes what is nobody's any more, and waits to be given the next socket.
//! **Who is not trusted.** The process that serves: it runs what the guest asks for, and can write wherever the keeper can. So
//! the keeper takes nothing from it but numbers of descriptors to keep, and decides nothing by itself.
//! **Why this way.** Open files, locks and unlinked files exist only as descriptors; a process that has them too, and does
//! nothing with them, is the one place from which they cannot be lost. Whether another process is started is the control
//! process's decision, as for all devices, and the next one is told of its queues as theirs are.

#![allow(unsafe_code)] // close_range on numbers that nobody owns any more

use std::collections::BTreeSet;
use std::error::Error;
use std::ffi::CString;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use ipc::channel::{Channel, ChannelError};
use ipc::control::Exit;
use ipc::keeper::{Heritage, Order, Told};
use ipc::start::StartMessage;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ozone::inner;
use ozone::keeper::{Ended, Keeper, Served, Side};
use thiserror::Error;

use crate::device::Device;
use crate::heritage::{self, HeritageError};
use crate::jail;
use crate::start::{Jailed, Prepared, RunError};

/// Why a state cannot be kept on.
#[derive(Debug, Error)]
pub enum KeeperError {
    /// A system call failed.
    #[error("{0}")]
    Call(&'static str, #[source] Errno),
    /// The broker cannot be talked with.
    #[error("broker")]
    Broker(#[from] ChannelError),
    /// It wants something served and says not what.
    #[error("the broker sent {0} sockets instead of 1")]
    Sockets(usize),
    /// What another program kept cannot be gone on with.
    #[error("taking over what another process keeps")]
    Heritage(#[from] HeritageError),
    /// The tables are not what this program takes them for.
    #[error("tables that another process kept")]
    Tables(#[source] Box<dyn Error + Send + Sync>),
}

/// What is kept: tables in shared memory, and the descriptors that they name.
pub trait Estate {
    /// What serves it.
    type Device: Device;
    /// Why it cannot be served.
    type Error: Error + Send + Sync + 'static;

    /// The device, in the process that will serve. What came before it may have been killed at any instruction.
    ///
    /// # Errors
    /// The process then ends.
    fn heir(&self) -> Result<Self::Device, Self::Error>;

    /// Calls `with` for each descriptor that the tables name: they stay open between two of them, and go with the tables.
    fn descriptors(&self, with: &mut dyn FnMut(RawFd));

    /// As [`descriptors`](Self::descriptors), for those that belong to this process whatever the tables say.
    fn own(&self, with: &mut dyn FnMut(RawFd));

    /// What a program must know to go on with the tables, as one number, and their memory. `None` if they cannot be handed over.
    fn heritage(&self) -> Option<(u64, BorrowedFd<'_>)>;
}

/// Makes an estate of the memory of another one's tables, whose descriptors come later.
pub type Adopt<K> = Box<dyn FnOnce(OwnedFd) -> Result<K, Box<dyn Error + Send + Sync>>>;

/// A keeper that goes on with what one of another program has.
pub struct Heir<K> {
    /// To the broker.
    pub broker: Channel,
    /// To the other keeper.
    pub line: Channel,
    /// What this program can go on with, as one number.
    pub layout: u64,
    /// What to do then.
    pub adopt: Adopt<K>,
}

/// Whether there is a keeper.
pub enum Kept<K: Estate> {
    /// There is, with a socket to the broker.
    By(K, Channel),
    /// There is one already, of another program.
    After(Heir<K>),
    /// There cannot be one on this host: one process serves, and its state ends with it.
    Alone(K::Device),
}

/// Keeps, or serves, until the front end leaves or the broker is gone.
pub(crate) fn run<K: Estate>(
    start: &StartMessage,
    socket: OwnedFd,
    kept: Kept<K>,
) -> Result<(), RunError> {
    match kept {
        Kept::Alone(device) => {
            let jailed = Prepared::new(device, start.clone())?.enter_jail()?;
            Ok(jailed.serve(UnixStream::from(socket))?.run()?)
        }
        Kept::By(estate, broker) => {
            let (proof, keeper) = become_keeper(start)?;
            keep(
                start,
                (proof, keeper),
                ManuallyDrop::new(estate),
                broker,
                socket,
            )
        }
        Kept::After(heir) => {
            let jail = become_keeper(start)?;
            let (estate, broker, socket) = inherit(heir, socket)?;
            keep(start, jail, estate, broker, socket)
        }
    }
}

fn become_keeper(start: &StartMessage) -> Result<(inner::Jailed, Keeper), RunError> {
    name(&format!("{}-keeper", start.device.process()));
    // The socket to the broker tells when it was too late.
    ozone::keeper::follow_parent().map_err(|e| KeeperError::Call("prctl", e))?;
    let proof = jail::lock_keeper(start)?;
    let keeper = Keeper::of(&proof).map_err(|e| KeeperError::Call("capset", e))?;
    Ok((proof, keeper))
}

/// In its jail: the other keeper may be the guest's by now.
fn inherit<K: Estate>(
    heir: Heir<K>,
    socket: OwnedFd,
) -> Result<(ManuallyDrop<K>, Channel, OwnedFd), KeeperError> {
    let Heir {
        broker,
        line,
        layout,
        adopt,
    } = heir;
    heritage::offered(&line, layout)?;
    broker.send(&Told::Ready, &[])?;
    let memory = heritage::memory(&line)?;
    let estate = ManuallyDrop::new(adopt(memory).map_err(KeeperError::Tables)?);
    let mut numbers = BTreeSet::new();
    estate.descriptors(&mut |fd| {
        numbers.insert(fd);
    });
    let mut own: BTreeSet<RawFd> = own_descriptors(&broker).into_iter().collect();
    estate.own(&mut |fd| {
        own.insert(fd);
    });
    let socket = heritage::files(line, &numbers, &own, UnixStream::from(socket))?;
    Ok((estate, broker, socket.into()))
}

/// Those of a keeper of any device.
fn own_descriptors(broker: &Channel) -> Vec<RawFd> {
    let mut own = vec![0, 1, 2, broker.as_fd().as_raw_fd()];
    own.extend(ipc::log::descriptor().map(|fd| fd.as_raw_fd()));
    own
}

fn keep<K: Estate>(
    start: &StartMessage,
    (proof, keeper): (inner::Jailed, Keeper),
    estate: ManuallyDrop<K>,
    broker: Channel,
    socket: OwnedFd,
) -> Result<(), RunError> {
    // Neither side may close what the other has, so nothing of this is ever dropped.
    let post = ManuallyDrop::new(Post {
        start,
        proof,
        keeper,
        estate,
        broker,
    });
    post.hold(socket)
}

fn name(name: &str) {
    if let Ok(name) = CString::new(name) {
        // For process lists only.
        let _ = nix::sys::prctl::set_name(&name);
    }
}

struct Post<'a, K> {
    start: &'a StartMessage,
    proof: inner::Jailed,
    keeper: Keeper,
    estate: ManuallyDrop<K>,
    broker: Channel,
}

impl<K: Estate> Post<'_, K> {
    fn hold(&self, socket: OwnedFd) -> Result<(), RunError> {
        let mut next = Some(socket);
        let mut served: Option<Served> = None;
        let mut heir: Option<Channel> = None;
        loop {
            if let Some(socket) = next.take() {
                let socket = ManuallyDrop::new(socket);
                match self
                    .keeper
                    .start()
                    .map_err(|e| KeeperError::Call("starting a process that serves", e))?
                {
                    Side::Served => return self.serve(ManuallyDrop::into_inner(socket)),
                    Side::Keeper(other) => {
                        self.tell(Told::Serving, Some(&other.pidfd))?;
                        served = Some(other);
                    }
                }
            }
            let (order, ended) = self.wait(served.as_ref())?;
            if ended {
                self.reap(&mut served, heir.as_ref(), Served::try_reap)?;
            }
            if order {
                match self.broker.receive::<Order>() {
                    Err(ChannelError::Closed) => return Ok(()),
                    Err(e) => return Err(KeeperError::from(e).into()),
                    Ok((Order::Stop, _)) => {
                        self.reap(&mut served, heir.as_ref(), |served| served.end().map(Some))?;
                        self.tell(Told::Stopped, None)?;
                    }
                    Ok((Order::Serve, mut sockets)) => {
                        self.reap(&mut served, heir.as_ref(), |served| served.end().map(Some))?;
                        let count = sockets.len();
                        let socket = sockets.pop().filter(|_| count == 1);
                        next = Some(socket.ok_or(KeeperError::Sockets(count))?);
                    }
                    Ok((Order::Offer, mut sockets)) => {
                        heir = sockets.pop().map(Channel::from_fd);
                        self.offer(&mut heir);
                    }
                    Ok((Order::HandOver, _)) => {
                        self.reap(&mut served, heir.as_ref(), |served| served.end().map(Some))?;
                        self.hand_over(heir.take());
                    }
                }
            }
        }
    }

    /// The process that serves, to its end.
    fn serve(&self, socket: OwnedFd) -> Result<(), RunError> {
        name(self.start.device.process());
        let device = self
            .estate
            .heir()
            .map_err(|error| RunError::Device(Box::new(error)))?;
        let jailed = Jailed::heir(device, &self.proof)?;
        let serving = jailed.serve(UnixStream::from(socket))?;
        jail::serve(self.start)?;
        serving.run()?;
        ipc::log::trace!("front end left");
        Ok(())
    }

    fn tell(&self, told: Told, fd: Option<&OwnedFd>) -> Result<(), KeeperError> {
        let fds: Vec<_> = fd.into_iter().map(AsFd::as_fd).collect();
        Ok(self.broker.send(&told, &fds)?)
    }

    /// Waits for an order, or for the end of the process that serves.
    fn wait(&self, served: Option<&Served>) -> Result<(bool, bool), KeeperError> {
        let mut polled = vec![PollFd::new(self.broker.as_fd(), PollFlags::POLLIN)];
        polled.extend(served.map(|served| PollFd::new(served.pidfd.as_fd(), PollFlags::POLLIN)));
        loop {
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(KeeperError::Call("poll", errno)),
            }
        }
        let fired = |at: usize| polled.get(at).is_some_and(|fd| fd.any().unwrap_or(true));
        Ok((fired(0), fired(1)))
    }

    /// Tells another keeper what there is; without an answer that one gives up, and the broker learns it from there.
    fn offer(&self, heir: &mut Option<Channel>) {
        let told = match (heir.as_ref(), self.estate.heritage()) {
            (Some(line), Some((layout, _))) => line.send(&Heritage::Layout(layout), &[]),
            _ => Err(ChannelError::Closed),
        };
        if let Err(error) = told {
            ipc::log::warn!("offering what is kept: {}", ipc::log::with_causes(&error));
            *heir = None;
        }
    }

    /// Sends all that is kept. Whatever comes of it, it is kept here until this process is ended.
    fn hand_over(&self, heir: Option<Channel>) {
        let mut numbers = BTreeSet::new();
        self.estate.descriptors(&mut |fd| {
            numbers.insert(fd);
        });
        let sent = match (heir, self.estate.heritage()) {
            (Some(line), Some((_, memory))) => heritage::hand_over(&line, memory, &numbers),
            _ => Err(ChannelError::Closed),
        };
        if let Err(error) = sent {
            ipc::log::warn!(
                "handing over what is kept: {}",
                ipc::log::with_causes(&error)
            );
        }
    }

    /// Takes the end of the process that serves as `how` says, tells it, and closes what it leaves.
    fn reap(
        &self,
        served: &mut Option<Served>,
        heir: Option<&Channel>,
        how: impl FnOnce(&Served) -> Result<Option<Ended>, Errno>,
    ) -> Result<(), KeeperError> {
        let Some(gone) = served.as_ref() else {
            return Ok(());
        };
        let ended = how(gone).map_err(|e| KeeperError::Call("waitid", e))?;
        let Some(ended) = ended else {
            return Ok(());
        };
        *served = None;
        self.close_others(heir)?;
        self.tell(
            Told::Ended(match ended {
                Ended::Exited(status) => Exit::Code(status),
                Ended::Killed(signal) => Exit::Signal(signal as i32),
            }),
            None,
        )
    }

    /// Closes what a process that is gone had open for itself, or for a request that it was at.
    fn close_others(&self, heir: Option<&Channel>) -> Result<(), KeeperError> {
        let mut kept = own_descriptors(&self.broker);
        kept.extend(heir.map(|line| line.as_fd().as_raw_fd()));
        self.estate.own(&mut |fd| kept.push(fd));
        self.estate.descriptors(&mut |fd| kept.push(fd));
        kept.sort_unstable();
        let close = |first: RawFd, last: u32| {
            // SAFETY: nothing in this process owns a number that is not in the list: the one that ended owned them.
            Errno::result(unsafe {
                libc::syscall(libc::SYS_close_range, first.cast_unsigned(), last, 0)
            })
            .map_err(|e| KeeperError::Call("close_range", e))
        };
        let mut next = 0;
        for fd in kept.into_iter().filter(|fd| *fd >= 0) {
            if fd > next {
                close(next, fd.cast_unsigned() - 1)?;
            }
            next = next.max(fd + 1);
        }
        close(next, u32::MAX).map(drop)
    }
}
