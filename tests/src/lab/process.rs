//! # Helper programs
//!
//! **Job.** Run a program of the distribution and turn its failure into a [`LabError`] that says what it wrote.
//! **Who is not trusted.** The program: its output is kept and shown, never interpreted beyond what is asked.
//! **Why this way.** One place decides how a failed helper looks to the user.

use super::LabError;
use std::process::{Command, Stdio};

/// How much of a failed program's standard error is shown, in bytes.
const STDERR_SHOWN: usize = 2000;

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// When it cannot start or ends with another status than 0.
pub fn run(command: &mut Command) -> Result<Vec<u8>, LabError> {
    let program = describe(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| LabError::Start {
            program: program.clone(),
            source,
        })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let from = stderr.len().saturating_sub(STDERR_SHOWN);
    let from = (from..stderr.len())
        .find(|&i| stderr.is_char_boundary(i))
        .unwrap_or(0);
    Err(LabError::Failed {
        program,
        status: output.status,
        stderr: stderr[from..].to_owned(),
    })
}

fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}
