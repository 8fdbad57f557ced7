//! The template device's spec: the smallest one that is still true.

use serde::{Deserialize, Serialize};

/// What the `template` process is told. It has no back-end descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateSpec {
    /// Device id, for logs.
    pub id: String,
    /// What a read of its four bytes of configuration space answers.
    pub greeting: [u8; 4],
}
