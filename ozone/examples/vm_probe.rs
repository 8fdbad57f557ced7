//! Stands in for `stratovirt` in the live tests of the outer jail.
//!
//! Options with values, like stratovirt's; unknown ones are ignored, and these are done in order:
//! `-status` prints what `/proc` says of it; `-list DIR` a folder; `-fds` its descriptors; `-read
//! FILE`, `-write FILE` and `-append-to FILE` try that; `-env` prints its environment; `-device-jail`
//! starts `/block` as a device process and prints its layers; `-orphan FILE` leaves a child that writes
//! the file once this process has ended; `-churn PATH` makes folders, files and links to the path in the current folder and moves
//! them about until it is killed; `-ready` prints a line; `-wait` waits for SIGTERM; `-hang`
//! waits for nothing; `-session` prints terminal and session keyring; `-exit N` ends; `-abort` too; `-daemonize` goes to the background.

#![allow(unsafe_code)] // fork, inherited descriptors

use nix::{
    sys::{
        signal::{SigSet, Signal},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
    },
    unistd::{ForkResult, fork, pause},
};
use ozone::{DeviceLaunch, Identity, Limits, Sandbox};
use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
};

fn main() -> ExitCode {
    let mut terminate = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGUSR1,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        terminate.add(signal);
    }
    if terminate.thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    let args: Vec<String> = env::args().skip(1).collect();
    for (at, arg) in args.iter().enumerate() {
        let value = args.get(at + 1).map_or("", String::as_str);
        let outcome = match arg.as_str() {
            "-status" => show("/proc/self/status"),
            "-mounts" => show("/proc/self/mountinfo"),
            "-session" => session(),
            "-fds" => list("/proc/self/fd"),
            "-list" => list(value),
            "-env" => {
                env::vars().for_each(|(k, v)| println!("env {k}={v}"));
                Ok(())
            }
            "-read" => {
                println!(
                    "read {value}: {:?}",
                    fs::read(value).map(|b| b.len()).map_err(|e| e.kind())
                );
                Ok(())
            }
            "-write" => {
                println!(
                    "write {value}: {:?}",
                    fs::write(value, "probe").map_err(|e| e.kind())
                );
                Ok(())
            }
            "-append-to" => {
                let file = File::options().append(true).open(value);
                let done = file.and_then(|mut f| f.write_all(b"probe"));
                println!("append {value}: {:?}", done.map_err(|e| e.kind()));
                Ok(())
            }
            "-device-jail" => device_jail(),
            "-orphan" => orphan(value),
            "-churn" => loop {
                // Each fails now and then, when somebody else was faster.
                let _ = fs::create_dir_all("a/b/c");
                let _ = fs::write("a/b/file", "");
                let _ = fs::rename("a/b", "a/x");
                let _ = std::os::unix::fs::symlink(value, "a/b");
                let _ = fs::remove_file("a/b");
                let _ = fs::rename("a/x", "a/b");
            },
            "-ready" => {
                println!("ready {}", std::process::id());
                Ok(())
            }
            "-wait" => match terminate.wait() {
                Ok(signal) => {
                    println!("signal {signal}");
                    Ok(())
                }
                Err(e) => Err(e.to_string()),
            },
            "-hang" => loop {
                pause();
            },
            "-exit" => return ExitCode::from(value.parse::<u8>().unwrap_or(99)),
            "-abort" => std::process::abort(),
            // SAFETY: this process has one thread.
            "-daemonize" => match unsafe { fork() } {
                Ok(ForkResult::Parent { .. }) => return ExitCode::SUCCESS,
                Ok(ForkResult::Child) => Ok(()),
                Err(e) => Err(e.to_string()),
            },
            _ => Ok(()),
        };
        if let Err(error) = outcome {
            println!("{arg} {value}: {error}");
        }
    }
    ExitCode::SUCCESS
}

/// Number of the controlling terminal (proc(5), field 7 of stat) and of the session keyring.
fn session() -> Result<(), String> {
    const KEYCTL_GET_KEYRING_ID: i64 = 0; // include/uapi/linux/keyctl.h
    const SESSION_KEYRING: i64 = -3;
    let stat = fs::read_to_string("/proc/self/stat").map_err(|e| e.to_string())?;
    let terminal = stat
        .rsplit(')')
        .next()
        .and_then(|fields| fields.split_whitespace().nth(4))
        .ok_or("no terminal in stat")?;
    // SAFETY: no addresses.
    let keyring = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_keyctl,
            KEYCTL_GET_KEYRING_ID,
            SESSION_KEYRING,
            0,
        )
    };
    println!("terminal {terminal}");
    println!("keyring {keyring}");
    Ok(())
}

fn show(path: &str) -> Result<(), String> {
    print!("{}", fs::read_to_string(path).map_err(|e| e.to_string())?);
    Ok(())
}

fn list(path: &str) -> Result<(), String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .map_err(|e| e.to_string())?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    names.sort();
    println!("list {path}: {}", names.join(" "));
    Ok(())
}

/// What the broker does: a jail in the jail.
fn device_jail() -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let kind = SockType::Stream;
    let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|e| text(&e))?;
    let null = || {
        let (reader, writer) = std::io::pipe().map_err(|e| text(&e))?;
        drop(reader);
        Ok::<_, String>(OwnedFd::from(writer))
    };
    let binary = File::open("/block").map_err(|e| text(&e))?;
    let child = ozone::spawn(DeviceLaunch {
        name: "probe",
        binary: binary.as_fd(),
        argv: vec![c"block".into(), c"serve".into()],
        fds: vec![(theirs, 3), (null()?, 0), (null()?, 1), (null()?, 2)],
        identity: Identity::least(),
        tree: None,
        limits: Limits::default(),
        cpus: None,
        mode: Sandbox::Strict,
        trace: false,
    })
    .and_then(ozone::Pending::finish)
    .map_err(|e| text(&e))?;
    for layer in &child.layers {
        println!("layer {layer}");
    }
    let mut line = String::new();
    BufReader::new(File::from(ours))
        .read_line(&mut line)
        .map_err(|e| text(&e))?;
    print!("{line}");
    Ok(())
}

/// A grandchild that outlives this process for as long as its work takes.
fn orphan(path: &str) -> Result<(), String> {
    let (mut reader, writer) = std::io::pipe().map_err(|e| e.to_string())?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(|e| e.to_string())? {
        // Open until this process has ended.
        ForkResult::Parent { .. } => {
            Box::leak(Box::new((reader, writer)));
            Ok(())
        }
        ForkResult::Child => {
            drop(writer);
            let _ = reader.read(&mut [0]);
            let _ = fs::write(path, "after the end");
            // SAFETY: ends this process.
            unsafe { nix::libc::_exit(0) }
        }
    }
}
