//! Does what Rust, std and libc do behind every program's back, under a policy: `runtime_probe POLICY`.
//!
//! A thread installs the policy for itself, then allocates, grows and frees small and large blocks,
//! waits with and without a limit for a lock and a channel, and reads clocks, all of which libc may
//! turn into system calls; then it parks, as filtered threads do. With `main` as second argument the
//! main thread does so, alone, and ends, as a device process would.

use seccomp_policies::{Action, Policy, heap, install};
use std::{
    env,
    hint::black_box,
    process::ExitCode,
    sync::{Condvar, Mutex, mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

fn memory(early: Vec<u8>) {
    let mut early = early;
    early.resize(3 << 20, 1); // was mapped before the filter: libc tries mremap, then munmap
    let mut small: Vec<Vec<u8>> = (0..4000).map(|i| vec![1; 16 + i % 2000]).collect();
    small.retain(|v| v.len() % 3 == 0);
    let mut large = Vec::new();
    for i in 0..6 << 20 {
        large.push(i as u8); // grows by realloc, past the size from which libc maps blocks
    }
    large.shrink_to(1 << 20);
    black_box((&early, &small, &large));
}

fn time() {
    let begin = Instant::now();
    black_box((begin.elapsed(), SystemTime::now()));
}

fn waiting() {
    let (sender, receiver) = mpsc::channel::<u8>();
    black_box(receiver.recv_timeout(Duration::from_millis(2)).is_err());
    black_box(sender.send(1).map(|()| receiver.recv()).is_ok());
    let (lock, changed) = (Mutex::new(()), Condvar::new());
    if let Ok(guard) = lock.lock() {
        black_box(
            changed
                .wait_timeout(guard, Duration::from_millis(2))
                .is_ok(),
        );
    }
}

fn main() -> ExitCode {
    let early = vec![1; 2 << 20]; // past the size from which libc maps blocks
    heap::settle();
    let mut arguments = env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    let Some(policy) = Policy::ALL.into_iter().find(|p| p.to_string() == name) else {
        eprintln!("no policy {name:?}");
        return ExitCode::from(2);
    };
    let action = match env::var("ACTION").as_deref() {
        Ok("trap") => Action::Trap,
        _ => Action::Kill,
    };
    let begun = Instant::now(); // as a log macro would have done before
    if arguments.next().as_deref() == Some("main") {
        if install(policy, action).is_err() {
            return ExitCode::from(3);
        }
        memory(early);
        time();
        black_box(begun);
        return ExitCode::SUCCESS;
    }
    let (done, result) = mpsc::channel();
    thread::spawn(move || {
        let installed = install(policy, action);
        if installed.is_ok() {
            memory(early);
            time();
            waiting();
        }
        let _ = done.send(installed);
        loop {
            thread::park();
        }
    });
    match result.recv() {
        Ok(Ok(())) => ExitCode::SUCCESS,
        _ => ExitCode::from(4),
    }
}
