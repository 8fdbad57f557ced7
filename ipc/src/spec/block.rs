//! A disk as its device process sees it: no path, only properties; the image is descriptor 5.

use serde::{Deserialize, Serialize};

/// What the `block` process is told. Its only back-end descriptor is the image, opened by the broker: read-only if
/// `readonly`, with `O_DIRECT` if `direct`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockSpec {
    /// Device id, for logs.
    pub id: String,
    /// The guest may not write, and the descriptor cannot.
    pub readonly: bool,
    /// The image is open with `O_DIRECT`: buffers and offsets must be aligned.
    pub direct: bool,
    /// Answer to `VIRTIO_BLK_T_GET_ID`: at most 20 bytes.
    pub serial: String,
    /// Request queues: 1 to 32.
    pub num_queues: u16,
    /// Entries of a queue: a power of two, 4 to 1024.
    pub queue_size: u16,
}
