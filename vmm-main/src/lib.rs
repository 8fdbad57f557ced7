//! placeholder
pub mod cmdline;
