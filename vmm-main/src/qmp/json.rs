//! Cuts a byte stream into JSON objects, however it arrives: in pieces, several at once, with rubbish between.
//!
//! Only brackets and strings are understood here, as much as it takes to find where a value ends; what is between them is
//! [`super::parse`]'s business. After rubbish the stream is taken up again at the next bracket or line.

use ipc::limits::{MAX_QMP_NESTING, MAX_QMP_REQUEST};

/// Why there is no object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    /// Something that is neither an object nor a list.
    Garbage,
    /// A control character in a string, a newline for instance.
    Control,
    /// A bracket that closes another kind of bracket.
    Bracket,
    /// Too many brackets inside each other.
    Nesting,
    /// More than [`MAX_QMP_REQUEST`] bytes. The stream is not worth going on with.
    TooLarge,
}

/// The stream.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    buffer: Vec<u8>,
    /// Where the value that is being scanned begins; what is before it is done with.
    start: usize,
    /// Where scanning goes on.
    at: usize,
    /// Brackets that are open.
    open: Vec<u8>,
    /// The quote that ends the string that is being scanned.
    quote: Option<u8>,
    escaped: bool,
    /// Rubbish is being skipped.
    skipping: bool,
    /// Bytes that have arrived so far.
    received: u64,
}

impl Splitter {
    /// Adds what has arrived.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        self.received += bytes.len() as u64;
    }

    /// How many bytes have arrived.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// How many of them were before the end of the value that was given last.
    pub(super) fn position(&self) -> u64 {
        self.received - (self.buffer.len() - self.at) as u64
    }

    /// The next complete value, or what is wrong; `None` when more has to arrive.
    pub(super) fn next(&mut self) -> Option<Result<&[u8], Broken>> {
        while let Some(&byte) = self.buffer.get(self.at) {
            self.at += 1;
            if self.open.is_empty() {
                match byte {
                    b'{' | b'[' => {
                        self.skipping = false;
                        self.start = self.at - 1;
                        self.open.push(byte);
                        continue;
                    }
                    b'\n' => self.skipping = false,
                    b' ' | b'\t' | b'\r' => {}
                    _ if self.skipping => {}
                    _ => {
                        self.skipping = true;
                        self.start = self.at;
                        return Some(Err(Broken::Garbage));
                    }
                }
                self.start = self.at;
            } else if let Some(quote) = self.quote {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    _ if byte == quote => self.quote = None,
                    0..0x20 => return Some(Err(self.give_up(Broken::Control, byte))),
                    _ => {}
                }
            } else {
                match byte {
                    b'"' | b'\'' => self.quote = Some(byte),
                    b'{' | b'[' if self.open.len() == MAX_QMP_NESTING => {
                        return Some(Err(self.give_up(Broken::Nesting, byte)));
                    }
                    b'{' | b'[' => self.open.push(byte),
                    b'}' | b']' => {
                        let opened = self.open.pop();
                        if opened != Some(if byte == b'}' { b'{' } else { b'[' }) {
                            return Some(Err(self.give_up(Broken::Bracket, byte)));
                        }
                        if self.open.is_empty() {
                            let value = self.start..self.at;
                            self.start = self.at;
                            return Some(Ok(&self.buffer[value]));
                        }
                    }
                    _ => {}
                }
            }
        }
        // Once for all values of a batch: cutting each one off would move the rest each time.
        self.buffer.drain(..self.start);
        self.at -= self.start;
        self.start = 0;
        (self.buffer.len() > MAX_QMP_REQUEST).then_some(Err(Broken::TooLarge))
    }

    /// Forgets the value that is being scanned.
    fn give_up(&mut self, why: Broken, byte: u8) -> Broken {
        self.open.clear();
        self.quote = None;
        self.escaped = false;
        self.skipping = byte != b'\n';
        self.start = self.at;
        why
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(splitter: &mut Splitter) -> Vec<Result<String, Broken>> {
        let mut out = Vec::new();
        while let Some(one) = splitter.next() {
            out.push(one.map(|bytes| String::from_utf8_lossy(bytes).into_owned()));
            if out.last() == Some(&Err(Broken::TooLarge)) {
                break;
            }
        }
        out
    }

    fn good(values: &[&str]) -> Vec<Result<String, Broken>> {
        values.iter().map(|value| Ok((*value).to_owned())).collect()
    }

    const STREAM: &str =
        "{'a\"':'\\'}'}{\"a\":\"}\\\"{\"}{\"b\":[1,{}]}\r\n\n  [2]\n{\n \"c\" :\n 1 }";
    const VALUES: [&str; 5] = [
        "{'a\"':'\\'}'}",
        "{\"a\":\"}\\\"{\"}",
        "{\"b\":[1,{}]}",
        "[2]",
        "{\n \"c\" :\n 1 }",
    ];

    #[test]
    fn values_need_no_newline() {
        let mut splitter = Splitter::default();
        splitter.push(STREAM.as_bytes());
        assert_eq!(all(&mut splitter), good(&VALUES));
    }

    #[test]
    fn values_may_come_byte_by_byte() {
        let mut splitter = Splitter::default();
        let mut got = Vec::new();
        for byte in STREAM.bytes() {
            splitter.push(&[byte]);
            got.append(&mut all(&mut splitter));
        }
        assert_eq!(got, good(&VALUES));
        assert!(splitter.buffer.is_empty());
    }

    #[test]
    fn the_stream_is_taken_up_after_rubbish() {
        for (stream, why) in [
            ("GET / HTTP/1.1\r\n{}", Broken::Garbage),
            ("}}]\n{}", Broken::Garbage),
            ("42 {}", Broken::Garbage),
            ("\u{ff}{}", Broken::Garbage),
            ("{\"a\": \"open\n{}", Broken::Control),
            ("{\"a\": [1}\n{}", Broken::Bracket),
        ] {
            let mut splitter = Splitter::default();
            splitter.push(stream.as_bytes());
            assert_eq!(
                all(&mut splitter),
                [Err(why), Ok("{}".to_owned())],
                "{stream}"
            );
        }
    }

    #[test]
    fn depth_and_size_are_capped() {
        let mut splitter = Splitter::default();
        splitter.push("[".repeat(MAX_QMP_NESTING + 1).as_bytes());
        assert_eq!(all(&mut splitter), [Err(Broken::Nesting)]);
        splitter.push(b"\n{\"a\":\"");
        splitter.push(&vec![b'x'; MAX_QMP_REQUEST]);
        assert_eq!(all(&mut splitter), [Err(Broken::TooLarge)]);
    }

    #[test]
    fn rubbish_takes_no_memory() {
        let mut splitter = Splitter::default();
        for _ in 0..100 {
            splitter.push(&[b'x'; 4096]);
            all(&mut splitter);
            assert!(splitter.buffer.is_empty());
        }
    }
}
