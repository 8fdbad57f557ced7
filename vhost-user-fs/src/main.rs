//! The daemon `vhost_user_fs`: shares a folder of the host with a guest (manual 2.17.2).

mod cli;
mod daemon;
mod inherited;
mod managed;
mod movers;
mod upgrade;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    if arguments.next().is_some_and(|name| name == managed::NAME) {
        return managed::run();
    }
    // Another program of this daemon may have started this one, for a try or to go on.
    let mut arguments = arguments.peekable();
    let trial = arguments.next_if(|word| word == upgrade::TRIAL).is_some();
    // Options are ASCII; a path that is no UTF-8 would be changed, so it is refused.
    let words: Result<Vec<String>, _> = arguments.map(std::ffi::OsString::into_string).collect();
    let Ok(words) = words else {
        eprintln!("vhost_user_fs: arguments must be UTF-8");
        return ExitCode::from(2);
    };
    cli::ABOUT.answer(cli::parse(words.into_iter()), |options| {
        daemon::run(&options, trial)
    })
}
