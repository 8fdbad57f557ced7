//! Bincode 2 with a limit and without leftovers.
//!
//! **Job.** Bytes to values and back. **Who is not trusted**: whoever wrote the bytes. A length inside them is
//! checked against the limit before memory is taken for it, and bytes after the value are an error, so two readers can
//! never disagree on where a message ends.

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

use crate::limits::MAX_MESSAGE;

/// Why bytes are not a message, or a message has no bytes.
#[derive(Debug, Error)]
pub enum CodecError {
    /// The value could not be encoded.
    #[error("message cannot be encoded")]
    Encode(#[source] bincode::error::EncodeError),
    /// The bytes are not a value of this type, or name a length beyond the limit.
    #[error("message cannot be decoded")]
    Decode(#[source] bincode::error::DecodeError),
    /// The bytes go on after the value.
    #[error("message has {0} bytes after its end")]
    Trailing(usize),
    /// The encoded value is too large to be sent.
    #[error("message of {len} bytes is larger than the limit of {MAX_MESSAGE}")]
    TooLarge {
        /// Encoded size in bytes.
        len: usize,
    },
}

fn config() -> bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Fixint,
    bincode::config::Limit<MAX_MESSAGE>,
> {
    bincode::config::standard()
        .with_fixed_int_encoding()
        .with_limit::<MAX_MESSAGE>()
}

/// As [`encode`] with another limit, for what is no message: `LIMIT` bytes.
pub fn encode_within<const LIMIT: usize, T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let config = bincode::config::standard()
        .with_fixed_int_encoding()
        .with_limit::<LIMIT>();
    bincode::serde::encode_to_vec(value, config).map_err(CodecError::Encode)
}

/// As [`decode`] with another limit.
pub fn decode_within<const LIMIT: usize, T: DeserializeOwned>(
    bytes: &[u8],
) -> Result<T, CodecError> {
    let config = bincode::config::standard()
        .with_fixed_int_encoding()
        .with_limit::<LIMIT>();
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, config).map_err(CodecError::Decode)?;
    match bytes.len() - used {
        0 => Ok(value),
        rest => Err(CodecError::Trailing(rest)),
    }
}

/// Encodes `value`; fails above [`MAX_MESSAGE`] bytes.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(value, config()).map_err(CodecError::Encode)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(CodecError::TooLarge { len: bytes.len() });
    }
    Ok(bytes)
}

/// Decodes a value that fills `bytes` exactly.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, config()).map_err(CodecError::Decode)?;
    match bytes.len() - used {
        0 => Ok(value),
        rest => Err(CodecError::Trailing(rest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_survives_the_round_trip() {
        let value = (7u32, String::from("disk"), vec![1u8, 2, 3]);
        let bytes = encode(&value).unwrap();
        assert_eq!(decode::<(u32, String, Vec<u8>)>(&bytes).unwrap(), value);
    }

    #[test]
    fn leftover_bytes_are_refused() {
        let mut bytes = encode(&1u32).unwrap();
        bytes.push(0);
        assert!(matches!(
            decode::<u32>(&bytes),
            Err(CodecError::Trailing(1))
        ));
    }

    #[test]
    fn a_huge_length_is_refused_without_an_allocation() {
        let bytes = u64::MAX.to_le_bytes();
        assert!(matches!(
            decode::<Vec<u8>>(&bytes),
            Err(CodecError::Decode(_))
        ));
        assert!(matches!(
            decode::<String>(&bytes),
            Err(CodecError::Decode(_))
        ));
    }

    #[test]
    fn an_oversized_value_is_not_encoded() {
        assert!(encode(&vec![0u8; MAX_MESSAGE + 1]).is_err());
    }
}
