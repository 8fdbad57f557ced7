//! The wire format of a request (virtio 1.3, 5.2.6): 16 bytes of header, data, one byte of status.

use ipc::limits::MAX_RANGE_SECTORS;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

/// Unit of `sector`, whatever the block size.
pub(crate) const SECTOR: u64 = 512;
/// `type` le32, `reserved` le32, `sector` le64.
pub(crate) const HEADER: usize = 16;
/// `sector` le64, `num_sectors` le32, `flags` le32 (`struct virtio_blk_discard_write_zeroes`).
pub(crate) const RANGE: usize = 16;

/// What the driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// Read from this sector on.
    In { sector: u64 },
    /// Write from this sector on.
    Out { sector: u64 },
    /// Make everything durable that was completed before.
    Flush,
    /// Tell the serial number.
    GetId,
    /// The contents of some ranges are of no use any more.
    Discard,
    /// Some ranges shall read as zeroes.
    WriteZeroes,
    /// Something that was not offered.
    Unsupported,
}

impl Request {
    pub(crate) fn parse(header: [u8; HEADER]) -> Self {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => Self::In { sector },
            VIRTIO_BLK_T_OUT => Self::Out { sector },
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::GetId,
            VIRTIO_BLK_T_DISCARD => Self::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            _ => Self::Unsupported,
        }
    }
}

/// How it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(crate) const fn byte(self) -> u8 {
        // The constants are 0, 1 and 2.
        match self {
            Self::Ok => VIRTIO_BLK_S_OK as u8,
            Self::IoError => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// Place in the image of `len` bytes from `sector` on, if all of them are in an image of `size` bytes and `len` is a whole
/// number of sectors.
pub(crate) fn place(sector: u64, len: usize, size: u64) -> Option<u64> {
    let len = u64::try_from(len).ok()?;
    let start = sector.checked_mul(SECTOR)?;
    let end = start.checked_add(len)?;
    (end <= size && len.is_multiple_of(SECTOR)).then_some(start)
}

/// One range of a discard or write-zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Its first byte.
    pub(crate) at: u64,
    /// Bytes, at least one sector.
    pub(crate) len: u64,
    /// Its space may be freed.
    pub(crate) unmap: bool,
}

impl Extent {
    /// `Ok(None)` for a range without sectors.
    pub(crate) fn parse(
        range: [u8; RANGE],
        request: Request,
        size: u64,
    ) -> Result<Option<Self>, Status> {
        let [sector @ .., c0, c1, c2, c3, f0, f1, f2, f3] = range;
        let sector = u64::from_le_bytes(sector);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        // The one flag is for write zeroes; everything else is reserved (virtio 1.3, 5.2.6.2).
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0
            || (unmap && request == Request::Discard)
        {
            return Err(Status::Unsupported);
        }
        if count > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        let len = u64::from(count) * SECTOR;
        // At most 1 GiB.
        let at = place(sector, len as usize, size).ok_or(Status::IoError)?;
        Ok((len > 0).then_some(Self {
            at,
            len,
            unmap: unmap || request == Request::Discard,
        }))
    }

    /// Its part of whole units, if it has any, and what is before and behind that. `unit` is a power of two.
    pub(crate) fn split(self, unit: u64) -> (Option<Self>, [Option<Self>; 2]) {
        let end = self.at + self.len;
        let (first, last) = (self.at.next_multiple_of(unit), end - end % unit);
        let part = |at: u64, end: u64| {
            (at < end).then(|| Self {
                at,
                len: end - at,
                ..self
            })
        };
        if first >= last {
            return (None, [Some(self), None]);
        }
        (part(first, last), [part(self.at, first), part(last, end)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u32, sector: u64) -> [u8; HEADER] {
        let mut header = [0xaa; HEADER];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    #[test]
    fn headers_are_told_apart() {
        assert_eq!(Request::parse(header(0, 7)), Request::In { sector: 7 });
        assert_eq!(
            Request::parse(header(1, u64::MAX)),
            Request::Out { sector: u64::MAX }
        );
        assert_eq!(Request::parse(header(4, 0)), Request::Flush);
        assert_eq!(Request::parse(header(8, 0)), Request::GetId);
        assert_eq!(Request::parse(header(11, 0)), Request::Discard);
        assert_eq!(Request::parse(header(13, 0)), Request::WriteZeroes);
        for kind in [2, 3, 5, 12, 14, u32::MAX] {
            assert_eq!(Request::parse(header(kind, 0)), Request::Unsupported);
        }
    }

    #[test]
    fn places_outside_of_the_image_are_none() {
        let size = 8 * SECTOR;
        assert_eq!(place(0, 4096, size), Some(0));
        assert_eq!(place(7, 512, size), Some(7 * 512));
        assert_eq!(place(8, 0, size), Some(size), "nothing, at the end");
        assert_eq!(place(7, 1024, size), None);
        assert_eq!(place(8, 512, size), None);
        assert_eq!(place(0, 511, size), None);
        assert_eq!(place(u64::MAX, 512, size), None);
        assert_eq!(
            place(u64::MAX / 512, 512, u64::MAX),
            None,
            "start + len wraps"
        );
    }

    #[test]
    fn ranges_are_split_into_units_and_ends() {
        let extent = |at, end| Extent {
            at,
            len: end - at,
            unmap: true,
        };
        for (at, end, middle, ends) in [
            (512, 1024, Some((512, 1024)), [None, None]),
            (4096, 8192, Some((4096, 8192)), [None, None]),
            (512, 4096, None, [Some((512, 4096)), None]),
            (3584, 4608, None, [Some((3584, 4608)), None]),
            (512, 8192, Some((4096, 8192)), [Some((512, 4096)), None]),
            (4096, 8704, Some((4096, 8192)), [None, Some((8192, 8704))]),
            (
                3584,
                8704,
                Some((4096, 8192)),
                [Some((3584, 4096)), Some((8192, 8704))],
            ),
        ] {
            let unit = if end == 1024 { 512 } else { 4096 };
            let of = |range: Option<(u64, u64)>| range.map(|(at, end)| extent(at, end));
            assert_eq!(
                extent(at, end).split(unit),
                (of(middle), ends.map(of)),
                "{at} {end}"
            );
        }
        assert_eq!(
            extent(513, 514).split(1),
            (Some(extent(513, 514)), [None, None])
        );
    }

    #[test]
    fn ranges_are_checked() {
        let size = 100 * SECTOR;
        let parse = |sector: u64, count: u32, flags: u32, request| {
            let mut range = [0; RANGE];
            range[..8].copy_from_slice(&sector.to_le_bytes());
            range[8..12].copy_from_slice(&count.to_le_bytes());
            range[12..].copy_from_slice(&flags.to_le_bytes());
            Extent::parse(range, request, size)
        };
        let (discard, zero) = (Request::Discard, Request::WriteZeroes);
        let extent = |at: u64, len: u64, unmap| {
            Ok(Some(Extent {
                at: at * SECTOR,
                len: len * SECTOR,
                unmap,
            }))
        };
        assert_eq!(parse(1, 99, 0, discard), extent(1, 99, true));
        assert_eq!(parse(1, 2, 0, zero), extent(1, 2, false));
        assert_eq!(parse(1, 2, 1, zero), extent(1, 2, true));
        assert_eq!(parse(100, 0, 0, zero), Ok(None));
        assert_eq!(parse(1, 2, 1, discard), Err(Status::Unsupported));
        assert_eq!(parse(1, 2, 2, zero), Err(Status::Unsupported));
        assert_eq!(parse(1, 100, 0, discard), Err(Status::IoError));
        assert_eq!(parse(u64::MAX, 1, 0, zero), Err(Status::IoError));
        assert_eq!(
            parse(0, MAX_RANGE_SECTORS + 1, 0, zero),
            Err(Status::IoError)
        );
    }
}
