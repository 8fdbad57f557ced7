//! The kernel command line.
//!
//! Job: join the user's line with the parameters that describe devices, within what the kernel takes.
//! Who is not trusted: the line is the user's; it is copied, never parsed, except for the `--` that ends it.
//! Why this way: parameters behind `--` belong to init, so device parameters go before it.

use super::Error;

/// Bytes that an x86 kernel takes, the final NUL included (`COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_SIZE: usize = 2048;

/// Joins the line: NUL-terminated, at most `max` bytes before the NUL.
///
/// # Errors
/// A NUL inside, or too long; the error tells the numbers.
pub fn compose(user: &str, device_parameters: &[String], max: usize) -> Result<Vec<u8>, Error> {
    let (kernel, init) = split_init(user);
    let mut line = String::with_capacity(user.len() + 64 * device_parameters.len() + 1);
    line.push_str(kernel.trim());
    for parameter in device_parameters {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(parameter);
    }
    if let Some(init) = init {
        line.push_str(" -- ");
        line.push_str(init.trim());
    }
    if let Some(position) = line.find('\0') {
        return Err(Error::CommandLineNul(position));
    }
    if line.len() > max {
        let added = device_parameters
            .iter()
            .map(|parameter| parameter.len() + 1)
            .sum();
        return Err(Error::CommandLine {
            length: line.len(),
            added,
            max,
        });
    }
    let mut bytes = line.into_bytes();
    bytes.push(0);
    Ok(bytes)
}

/// Splits at the first free-standing `--` outside quotes, as the kernel does.
fn split_init(line: &str) -> (&str, Option<&str>) {
    let mut quoted = false;
    let mut word_start = 0;
    let ends = line.char_indices().chain([(line.len(), ' ')]);
    for (position, character) in ends {
        match character {
            '"' => quoted = !quoted,
            c if c.is_ascii_whitespace() && !quoted => {
                if &line[word_start..position] == "--" {
                    return (&line[..word_start], Some(&line[position..]));
                }
                word_start = position + 1;
            }
            _ => {}
        }
    }
    (line, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = COMMAND_LINE_SIZE - 1;

    fn text(user: &str, parameters: &[&str]) -> String {
        let parameters: Vec<_> = parameters.iter().map(ToString::to_string).collect();
        let mut bytes = compose(user, &parameters, MAX).unwrap();
        assert_eq!(bytes.pop(), Some(0));
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn device_parameters_follow_the_users() {
        assert_eq!(
            text("console=ttyS0 quiet ", &["a=1", "b=2"]),
            "console=ttyS0 quiet a=1 b=2"
        );
        assert_eq!(text("", &["a=1"]), "a=1");
        assert_eq!(text("", &[]), "");
    }

    #[test]
    fn device_parameters_stay_before_inits() {
        assert_eq!(text("quiet -- sh -c x", &["a=1"]), "quiet a=1 -- sh -c x");
        assert_eq!(text("quiet --", &["a=1"]), "quiet a=1 -- ");
        assert_eq!(
            text("x=--y p=\"a -- b\" --z", &["a=1"]),
            "x=--y p=\"a -- b\" --z a=1"
        );
    }

    #[test]
    fn the_limit_counts_all_bytes_and_is_named() {
        assert_eq!(compose(&"x".repeat(2047), &[], MAX).unwrap().len(), 2048);
        let error = compose(&"x".repeat(2046), &["a".into()], MAX)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("2048 bytes (2 of them added") && error.contains("at most 2047"),
            "{error}"
        );
        assert!(matches!(
            compose("a\0b", &[], MAX),
            Err(Error::CommandLineNul(1))
        ));
    }
}
