//! # The lab: a place where Linux guests boot
//!
//! **Job.** Answer "where can a Linux guest run here?" and run a command or a test there. A host whose own
//! `/dev/kvm` boots Linux is used directly. Any other x86-64 host gets a nested machine ("L1"): QEMU in pure
//! emulation, with AMD SVM emulated, boots Debian's stock kernel on this host's own root file system, and in it
//! `/dev/kvm` runs unmodified guests ("L2").
//!
//! **Who is not trusted.** The host's `/dev/kvm`: that it opens does not mean that it can boot Linux, since a
//! software KVM may lack instructions that a kernel needs. So the answer comes from a boot, not from a name.
//!
//! **Why this way.** All material is Debian's: nothing is built, hosted or pinned outside of the distribution,
//! and a nested machine that uses the host's files needs no image of its own.

mod error;
mod guest;
mod initramfs;
mod kernel;
mod last_words;
mod nested;
mod packages;
mod place;
mod process;
pub mod programs;

pub use error::LabError;
pub use guest::{Guest, Script};
pub use initramfs::Archive;
pub use ipc::log::with_causes as chain;
pub use kernel::{Flavour, Kernel, cache_dir};
pub use nested::{Nested, in_nested};
pub use packages::ensure as ensure_packages;
pub use place::{Place, place};
pub use process::run as run_program;

/// Runs a test's body where Linux guests boot: here, or by running this same test binary again in L1.
///
/// `test` is the path of the test function as libtest prints it; [`test_path!`](crate::test_path) gives it.
/// In L1 the test's own output is part of this test's output, and its failure is this test's failure.
///
/// # Panics
/// When the lab cannot be set up, or when the test fails in L1.
pub fn where_linux_boots(test: &str, body: impl FnOnce()) {
    where_linux_boots_or_in(&Nested::default(), test, body);
}

/// As [`where_linux_boots`], with other settings for a nested machine, if it takes one.
///
/// # Panics
/// As [`where_linux_boots`].
pub fn where_linux_boots_or_in(nested: &Nested, test: &str, body: impl FnOnce()) {
    match place(Flavour::Cloud) {
        Err(error) => panic!("{}", chain(&error)),
        Ok(Place::Here { .. }) => body(),
        Ok(Place::Nested { why }) => {
            eprintln!("{test} runs in the nested lab: {why}");
            run_nested(nested, test);
        }
    }
}

/// Runs the body in a nested machine with these settings, wherever Linux boots: for what a test changes for the whole
/// machine, such as its cgroup hierarchies or sysctls. `test` is [`test_path!`].
///
/// # Panics
/// When the test fails in the nested machine, or that cannot be started.
pub fn in_a_nested_machine(nested: &Nested, test: &str, body: impl FnOnce()) {
    if in_nested() {
        body();
    } else {
        run_nested(nested, test);
    }
}

/// Runs the body where Linux boots and the kernel has vhost-net: here, or in a nested machine. `test` is [`test_path!`].
///
/// # Panics
/// As [`where_linux_boots`].
pub fn where_vhost_net_is(test: &str, body: impl FnOnce()) {
    let here = std::path::Path::new("/dev/vhost-net").exists()
        && matches!(place(Flavour::Cloud), Ok(Place::Here { .. }));
    if here {
        body();
    } else {
        in_a_nested_machine(&Nested::default(), test, body);
    }
}

/// Runs the test again in a nested machine with these settings, where it ends in [`cut_the_power`]. `test` is [`test_path!`].
///
/// # Panics
/// When the nested machine cannot be started, or ends in another way.
pub fn until_the_power_fails(nested: &Nested, test: &str) {
    match nested.run(&command(test)) {
        Err(LabError::Ended(_)) => {}
        Err(error) => panic!("{}", chain(&error)),
        Ok(status) => panic!("{test} ended in the nested lab with status {status}"),
    }
}

/// Ends the nested machine at once: what its kernel has not written to a disk by now is lost.
///
/// # Panics
/// When its kernel does not let it.
pub fn cut_the_power() -> ! {
    let cut = std::fs::write("/proc/sysrq-trigger", "b");
    panic!("the power cannot be cut: {cut:?}");
}

fn run_nested(nested: &Nested, test: &str) {
    let status = nested
        .run(&command(test))
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(
        status, 0,
        "{test} failed in the nested lab with status {status}"
    );
}

/// What runs the test again.
fn command(test: &str) -> Vec<String> {
    let binary = std::env::current_exe().unwrap_or_else(|e| panic!("the test binary: {e}"));
    vec![
        binary.display().to_string(),
        "--exact".into(),
        test.into(),
        // Who runs it here has decided already.
        "--include-ignored".into(),
        "--nocapture".into(),
        "--test-threads=1".into(),
    ]
}

/// The path of the enclosing test function as libtest prints it, without the crate's name.
#[macro_export]
macro_rules! test_path {
    () => {{
        fn marker() {}
        let full = std::any::type_name_of_val(&marker);
        let function = full.strip_suffix("::marker").unwrap_or(full);
        function.split_once("::").map_or(function, |(_, path)| path)
    }};
}
