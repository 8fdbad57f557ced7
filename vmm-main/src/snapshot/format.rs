//! The envelope of a snapshot's file `state`.
//!
//! **Job.** Bytes to a [`Snapshot`] and back. **Who is not trusted**: whoever wrote the bytes. **Why this way.** The header
//! has a checksum of its own, so that a damaged version number is not taken for a newer one, and the header's layout stays
//! the same for all versions.
//!
//! | bytes | what, little-endian |
//! |---|---|
//! | 0 to 7 | magic number `SVSNAP\r\n`, which a transfer as text would damage |
//! | 8 to 11 | version |
//! | 12 to 15 | CRC-32 of the body |
//! | 16 to 23 | bytes of the body |
//! | 24 to 27 | 0 |
//! | 28 to 31 | CRC-32 of bytes 0 to 27 |
//! | 32 … | the body: a [`Snapshot`] in bincode with fixed integers |

use ipc::codec::{CodecError, decode_within, encode_within};
use ipc::limits::MAX_SNAPSHOT_STATE;
use thiserror::Error;

use super::Snapshot;

const MAGIC: [u8; 8] = *b"SVSNAP\r\n";
/// Version of the body that this program writes, and the only one that it reads.
pub const VERSION: u32 = 4;
/// Bytes before the body.
pub const HEADER: usize = 32;

/// Why bytes are no snapshot that this program can go on from.
#[derive(Debug, Error)]
pub enum FormatError {
    /// Somebody else's file.
    #[error("is not a snapshot's state (no magic number)")]
    Foreign,
    /// The file ends too early.
    #[error("is truncated: it has {got} bytes and should have {want}")]
    Truncated {
        /// Bytes that are there.
        got: usize,
        /// Bytes that should be there.
        want: u64,
    },
    /// The file goes on after its end.
    #[error("is damaged: it has {got} bytes and should have {want}")]
    Longer {
        /// Bytes that are there.
        got: usize,
        /// Bytes that should be there.
        want: u64,
    },
    /// A checksum is wrong.
    #[error("is damaged: the checksum of its {part} is wrong")]
    Damaged {
        /// "header" or "body".
        part: &'static str,
    },
    /// Another version.
    #[error("has version {got} of the format; this program reads version {VERSION}")]
    Version {
        /// Its version.
        got: u32,
    },
    /// More than a snapshot can have.
    #[error("says that it has {0} bytes; a snapshot's state has at most {MAX_SNAPSHOT_STATE}")]
    Large(u64),
    /// The body is not a snapshot, although its checksum is right.
    #[error("cannot be understood")]
    Body(#[from] CodecError),
}

/// The bytes of the file `state`.
///
/// # Errors
/// More than the limit.
pub fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, FormatError> {
    let body = encode_within::<MAX_SNAPSHOT_STATE, _>(snapshot)?;
    if body.len() > MAX_SNAPSHOT_STATE - HEADER {
        return Err(FormatError::Large(body.len() as u64));
    }
    Ok(seal(&body))
}

/// A header in front of `body`.
#[must_use]
pub fn seal(body: &[u8]) -> Vec<u8> {
    let length = body.len() as u64;
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    let sum = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// The snapshot in `bytes`, which are a whole file.
///
/// # Errors
/// See [`FormatError`].
pub fn decode(bytes: &[u8]) -> Result<Snapshot, FormatError> {
    if !MAGIC.starts_with(&bytes[..bytes.len().min(MAGIC.len())]) || bytes.is_empty() {
        return Err(FormatError::Foreign);
    }
    let truncated = |want| FormatError::Truncated {
        got: bytes.len(),
        want,
    };
    let Some((header, body)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(truncated(HEADER as u64));
    };
    let word = |at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&header[at..at + 4]);
        u32::from_le_bytes(word)
    };
    if crc32fast::hash(&header[..HEADER - 4]) != word(HEADER - 4) {
        return Err(FormatError::Damaged { part: "header" });
    }
    if word(8) != VERSION {
        return Err(FormatError::Version { got: word(8) });
    }
    let length = u64::from(word(16)) | u64::from(word(20)) << 32;
    if length > (MAX_SNAPSHOT_STATE - HEADER) as u64 {
        return Err(FormatError::Large(length));
    }
    let want = length + HEADER as u64;
    let got = bytes.len();
    match (got as u64).cmp(&want) {
        std::cmp::Ordering::Less => return Err(truncated(want)),
        std::cmp::Ordering::Greater => return Err(FormatError::Longer { got, want }),
        std::cmp::Ordering::Equal => {}
    }
    if crc32fast::hash(body) != word(12) {
        return Err(FormatError::Damaged { part: "body" });
    }
    Ok(decode_within::<MAX_SNAPSHOT_STATE, _>(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let bytes = encode(&Snapshot::example()).unwrap();
        let back = decode(&bytes).unwrap();
        assert_eq!(back.shape, Snapshot::example().shape);
        assert_eq!(back.devices, Snapshot::example().devices);
        assert_eq!(back.memory, Snapshot::example().memory);
        assert_eq!(encode(&back).unwrap(), bytes);
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_seen() {
        let bytes = encode(&Snapshot::example()).unwrap();
        for length in 0..bytes.len() {
            assert!(
                matches!(
                    decode(&bytes[..length]),
                    Err(FormatError::Truncated { .. } | FormatError::Foreign)
                ),
                "{length}"
            );
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            assert!(decode(&bytes).is_err(), "{at}");
        }
    }

    #[test]
    fn lengths_inside_are_held_against_what_is_there() {
        for byte in [0x7f, 0xff] {
            let body = vec![byte; 4096];
            assert!(matches!(decode(&seal(&body)), Err(FormatError::Body(_))));
        }
        let mut body = encode(&Snapshot::example()).unwrap().split_off(HEADER);
        body.push(0);
        assert!(matches!(
            decode(&seal(&body)),
            Err(FormatError::Body(CodecError::Trailing(1)))
        ));
    }
}
