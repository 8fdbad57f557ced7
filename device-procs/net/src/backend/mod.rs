//! Where packets go.

pub(crate) mod tap;
