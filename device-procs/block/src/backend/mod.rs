//! What an image is.

pub(crate) mod raw;
