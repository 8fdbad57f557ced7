//! Why the device cannot be served.

use thiserror::Error;

/// Why the device was not built.
#[derive(Debug, Error)]
pub(crate) enum BuildError {
    /// The start message is for another device.
    #[error("the start message describes no template device")]
    NotATemplate,
}
