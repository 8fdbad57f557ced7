//! # The test harness
//!
//! **Job.** Everything that black-box suites, benches and `cargo xtask` share: the lab that finds or makes a
//! `/dev/kvm` on which Linux boots ([`lab`]), programs that run as a bare guest ([`payload`]), a running VM with
//! its consoles ([`vm`], [`console`]), a back end that was there before it ([`daemon`]), QMP ([`qmp`]), what benches share ([`bench`]), and readers of `/proc` ([`procfs`]), and the jail suite's parts
//! ([`jail`], [`trace`]).
//!
//! **Who is not trusted.** The product under test: nothing here believes what it says about itself where the
//! kernel can be asked instead.
//!
//! **Why this way.** Readiness is an event (a byte, an end of file, a pidfd), never a pause, so a slow machine
//! makes a test slower, not red. A host that lacks something is an error that names it, not a silent pass.

pub mod bench;
pub mod calls;
pub mod chance;
pub mod console;
pub mod daemon;
pub mod escape;
pub mod host;
pub mod jail;
pub mod lab;
pub mod lying;
pub mod payload;
pub mod plot;
pub mod procfs;
pub mod qcow2;
pub mod qmp;
#[cfg(target_arch = "x86_64")]
pub mod trace;

pub mod vhost_user;
pub mod vm;
pub mod wait;
