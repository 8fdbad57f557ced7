//! A qcow2 image and what is below it, as a [`Format`].
//!
//! **Job.** Builds the chain from the descriptors, lowest first, and does the device's reads and writes on the top. **Who is not
//! trusted.** The images. One that names an image below it gets none unless the command line gave one, and is then refused, since its
//! guest would read zeroes for data. **Why this way.** Each write is followed by a write of the tables that it changed, before the
//! guest is told: what the guest was told of then outlives this process, in the order of writes that `imago` keeps. A process that is to
//! take another one's place reads the tables when its first request comes: until then that other one changes them.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use block_device::Format;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use ipc::disk::{Answer, Order};
use ipc::spec::block::{BlockSpec, ImageFormat};
use nix::errno::Errno;
use thiserror::Error;

use crate::counts;
use crate::header::{self, Cost, Header, HeaderError};
use crate::snapshots::{self, When, Work};
use crate::storage::Descriptor;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Why there is no disk.
#[derive(Debug, Error)]
pub(crate) enum ImageError {
    /// The start message is for a raw image.
    #[error("the start message is for a raw image")]
    NotQcow2,
    /// Fewer descriptors than images.
    #[error("descriptor of image {0} is missing")]
    Missing(usize),
    /// It cannot be looked at.
    #[error("image {number} cannot be read (0 is the disk's, 1 the one below it)")]
    Read {
        /// Which one, from the top.
        number: usize,
        /// Why.
        source: io::Error,
    },
    /// It is refused.
    #[error("image {number} (0 is the disk's, 1 the one below it)")]
    Header {
        /// Which one, from the top.
        number: usize,
        /// Why.
        source: HeaderError,
    },
    /// One is missing below it.
    #[error(
        "image {0} has an image below it, which backing= has to give (0 is the disk's, 1 the one below it)"
    )]
    Backing(usize),
    /// It is not what its header says.
    #[error("image {number} cannot be used (0 is the disk's, 1 the one below it)")]
    Open {
        /// Which one, from the top.
        number: usize,
        /// Why.
        source: io::Error,
    },
}

type Layer = FormatAccess<Descriptor>;

/// A chain of images.
#[derive(Debug)]
pub(crate) struct Qcow2Image {
    /// From the top down.
    files: Vec<Descriptor>,
    /// The lowest is raw.
    raw_base: bool,
    readonly: bool,
    /// Space that is not needed any more is given back to the host.
    discard: bool,
    /// With their tables, once they are needed.
    top: Option<Layer>,
    /// Bytes that the guest can reach: a multiple of 512.
    size: u64,
    /// Those that it may be given at most.
    most: u64,
    /// Bytes of the disk below, if there is one.
    below: u64,
    /// Of all images.
    cost: Cost,
    /// Of the disk's own image.
    header: Header,
}

impl Qcow2Image {
    /// `next` gives the descriptors, the disk's own first. `beside`: another process writes the image until the first request comes.
    pub(crate) fn open(
        spec: &BlockSpec,
        beside: bool,
        mut next: impl FnMut() -> Option<OwnedFd>,
    ) -> Result<Self, ImageError> {
        let ImageFormat::Qcow2 {
            below,
            raw_base,
            most,
        } = spec.io.format
        else {
            return Err(ImageError::NotQcow2);
        };
        let last = usize::from(below);
        let mut files = Vec::with_capacity(1 + last);
        let (mut cost, mut own, mut under) = (Cost::default(), None, 0);
        for number in 0..=last {
            let fd = next().ok_or(ImageError::Missing(number))?;
            let file = Descriptor::new(fd, spec.direct)
                .map_err(io::Error::from)
                .map_err(|source| ImageError::Read { number, source })?;
            if raw_base && number == last && number > 0 {
                if number == 1 {
                    under = file.end();
                }
            } else {
                let header = look(&file, number)?;
                if header.names_backing && number == last {
                    return Err(ImageError::Backing(number));
                }
                cost = cost
                    .with(header.cost)
                    .map_err(|source| ImageError::Header { number, source })?;
                if number == 1 {
                    under = header.size;
                }
                own = own.or(Some(header));
            }
            files.push(file);
        }
        let header = own.ok_or(ImageError::Missing(0))?;
        let mut image = Self {
            files,
            raw_base: raw_base && last > 0,
            readonly: spec.readonly,
            discard: spec.io.discard,
            top: None,
            size: header.size - header.size % SECTOR,
            most,
            below: under,
            cost,
            header,
        };
        if beside {
            // The keys of hash tables, which those of the image need: the kernel gives no random bytes to a process in its jail.
            let _keys = std::hash::RandomState::new();
        } else {
            image.top = Some(image.layers()?);
        }
        Ok(image)
    }

    /// The chain with its tables as they are now.
    fn layers(&self) -> Result<Layer, ImageError> {
        let last = self.files.len() - 1;
        let mut layer: Option<Layer> = None;
        for (number, file) in self.files.iter().enumerate().rev() {
            let file = file
                .again()
                .map_err(io::Error::from)
                .map_err(|source| ImageError::Read { number, source })?;
            let failed = |source| ImageError::Open { number, source };
            if number == 0 && !self.readonly {
                // As it is now: who wrote it before this process may have moved its tables.
                let header = look(&file, number)?;
                let added = counts::complete(&file, &header).map_err(failed)?;
                if added > 0 {
                    ipc::log::warn!(
                        "{added} clusters with tables were not counted: whoever wrote the image before was killed in the midst of it"
                    );
                }
            }
            let gate = DenyImplicitOpenGate::default();
            layer = Some(if self.raw_base && number == last {
                FormatAccess::new(Raw::builder(file).open(gate).map_err(failed)?)
            } else {
                let builder = Qcow2::<Descriptor, Arc<Layer>>::builder(file)
                    .backing(layer.take().map(Arc::new))
                    .write(number == 0 && !self.readonly);
                FormatAccess::new(builder.open(gate).map_err(failed)?)
            });
        }
        layer.ok_or(ImageError::Missing(0))
    }

    /// The top of the chain, to do something with.
    fn top(&mut self) -> Result<&mut Layer, Errno> {
        if self.top.is_none() {
            let top = self.layers().map_err(|error| {
                let why = std::error::Error::source(&error)
                    .map_or(String::new(), |source| format!(": {source}"));
                ipc::guest_warn!("{error}{why}");
                Errno::EIO
            })?;
            self.top = Some(top);
        }
        self.top.as_mut().ok_or(Errno::EIO)
    }
}

/// Reads the header and checks it.
fn look(file: &Descriptor, number: usize) -> Result<Header, ImageError> {
    use imago::StorageExt;
    let (mut head, mut more) = ([0; header::BYTES], [0; header::MORE]);
    file.read(&mut head[..], 0)
        .and_then(|()| file.read(&mut more[..], header::BYTES as u64))
        .map_err(|source| ImageError::Read { number, source })?;
    header::check(&head, &more).map_err(|source| ImageError::Header { number, source })
}

/// What the device tells its guest by, with the reason in the log.
fn errno(what: &str) -> impl FnOnce(io::Error) -> Errno {
    move |error| match error.raw_os_error() {
        Some(number) => Errno::from_raw(number),
        None if error.kind() == io::ErrorKind::Unsupported => Errno::EOPNOTSUPP,
        None => {
            ipc::guest_warn!("{what}: {error}");
            Errno::EIO
        }
    }
}

impl Format for Qcow2Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, data: &mut [u8], at: u64) -> Result<(), Errno> {
        self.top()?.read(data, at).map_err(errno("read"))
    }

    fn write(&mut self, data: &[u8], at: u64) -> Result<(), Errno> {
        self.top()?.write(data, at).map_err(errno("write"))
    }

    fn zero(&mut self, at: u64, len: u64, unmap: bool) -> Result<(), Errno> {
        let top = self.top()?;
        if unmap {
            top.discard_to_zero(at, len)
        } else {
            top.write_zeroes(at, len)
        }
        .map_err(errno("zeroes"))
    }

    fn grow(&mut self, size: u64) -> Result<(), Errno> {
        if size > self.most {
            return Err(Errno::EPERM);
        }
        if self.header.snapshots.count > 0 {
            ipc::guest_warn!("an image with internal snapshots keeps its size");
            return Err(Errno::EOPNOTSUPP);
        }
        if self.cost.with(self.header.cost_of_growth(size)).is_err() {
            return Err(Errno::ENOMEM);
        }
        let (old, hidden) = (self.size, self.below.min(size));
        let top = self.top()?;
        // What is longer below must not show through.
        let grown = if hidden > old {
            top.resize_grow(hidden, PreallocateMode::Zero)
        } else {
            Ok(())
        };
        let grown = grown.and_then(|()| top.resize_grow(size, PreallocateMode::None));
        // Where it fails the first table has been moved already, too, and what it takes is not counted yet.
        let written = top.flush().and_then(|()| top.sync());
        grown.and(written).map_err(errno("growth"))?;
        self.size = size;
        Ok(())
    }

    fn order(&mut self, order: &Order) -> Result<Answer, Errno> {
        let failed = errno("internal snapshots");
        let broken = |error: ImageError| {
            ipc::guest_warn!("{error}");
            Errno::EIO
        };
        if let Order::List = order {
            let file = self.files[0].again()?;
            let header = look(&file, 0).map_err(broken)?;
            let snapshots = snapshots::list(&file, &header).map_err(failed)?;
            let cluster = header.cluster as u32; // at most 2 MiB
            return Ok(Answer::Image { cluster, snapshots });
        }
        if self.readonly {
            return Err(Errno::EROFS);
        }
        // All of it is in the file then, and nobody else knows what is where.
        self.flush()?;
        self.top = None;
        let file = self.files[0].again()?;
        self.header = look(&file, 0).map_err(broken)?;
        let mut work = Work::new(&file, &self.header, self.discard);
        let answer = match order {
            Order::List => Ok(Answer::Unknown),
            Order::Create {
                name,
                seconds,
                nanoseconds,
                clock,
            } => {
                let when = When {
                    seconds: *seconds,
                    nanoseconds: *nanoseconds,
                    clock: *clock,
                };
                work.create(name, when).map(|made| match made {
                    true => Answer::Created,
                    false => Answer::Exists,
                })
            }
            Order::Delete { id, name } => work
                .delete(id.as_deref(), name.as_deref())
                .map(|gone| gone.map_or(Answer::Unknown, Answer::Deleted)),
        };
        let answer = answer.map_err(failed);
        self.header = look(&file, 0).map_err(broken)?;
        answer
    }

    fn commit(&mut self) -> Result<(), Errno> {
        self.top()?.flush().map_err(errno("write of the tables"))
    }

    fn flush(&mut self) -> Result<(), Errno> {
        let top = self.top()?;
        top.flush()
            .and_then(|()| top.sync())
            .map_err(errno("flush"))
    }
}
