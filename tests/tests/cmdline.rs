//! # Wrong command lines, as a user meets them
//!
//! **Job.** Each line of `vmm-main/src/cmdline/wrong.txt` given to the program: its message alone on standard error, status 1,
//! and nothing made. **Who is not trusted.** Whoever wrote the line.
//! **Why this way.** The parser's own tests know the messages; that they reach the user, and nothing else does, only the
//! program can show.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::process::{Command, Stdio};

use tests::vm::binary;

const LINES: &str = include_str!("../../vmm-main/src/cmdline/wrong.txt");

/// Splits at spaces; `'…'` groups.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut begun) = (Vec::new(), String::new(), false, false);
    for c in line.chars() {
        match c {
            '\'' => (quoted, begun) = (!quoted, true),
            ' ' if !quoted => {
                if begun {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            c => {
                word.push(c);
                begun = true;
            }
        }
    }
    if begun {
        words.push(word);
    }
    words
}

#[test]
fn each_wrong_line_gets_its_message_and_leaves_nothing() {
    let program = binary("stratovirt").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut lines = LINES.lines().filter(|line| !line.starts_with('#'));
    let mut count = 0;
    while let Some(line) = lines.next() {
        let message = lines.next().unwrap();
        let output = Command::new(&program)
            .args(words(line.strip_prefix("$ ").unwrap()))
            .current_dir(folder.path())
            .env_remove("STRATOVIRT_LOG_LEVEL")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{line}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{line}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said, format!("stratovirt: {message}\n"), "{line}");
        count += 1;
    }
    assert!(count >= 60, "only {count} lines");
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
}
