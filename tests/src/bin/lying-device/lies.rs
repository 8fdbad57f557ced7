//! # What it says instead of the truth
//!
//! **Job.** One lie for each name: at which request, and what. **Who is not trusted.** What is said here.
//! **Why this way.** A table: a new lie is a line, and the suite that names it says what has to become of it.

use tests::vhost_user::{REPLY, VERSION, frame, request as req, words};

/// Another answer than the true one.
pub(super) enum Lie {
    /// Another body.
    Body(Vec<u8>),
    /// Other bytes altogether.
    Bytes(Vec<u8>),
    /// The true answer with so many descriptors, which are the log pipe's.
    Descriptors(usize),
    /// The true answer, with a file of so many bytes only.
    Short(usize),
    /// The true answer so many times.
    Again(usize),
    /// The true answer after so many bytes of state.
    State(usize),
    /// The true answer, and state without end from then on.
    Endless,
    /// None, and silence from here on.
    Silence,
    /// The end.
    Close,
}

/// Direction of a transfer of state (vhost-user, "Device State"): the front end wants it, or brings it.
const SAVE: u8 = 0;
const LOAD: u8 = 1;
/// Answers to `SET_DEVICE_STATE_FD`: no descriptor comes with it, and that without the bit which says so.
const NO_DESCRIPTOR: u64 = 1 << 8;
const FAILED: u64 = 1;

/// More than a front end takes of one device.
pub(super) const TOO_LONG: usize = 33 << 20;

/// What `how` answers to `request` with `body`, if not the truth; `direction` is that of the last transfer of state.
pub(super) fn lie(how: &str, request: u32, body: &[u8], direction: Option<u8>) -> Option<Lie> {
    let (at, lie) = in_the_handshake(how)
        .or_else(|| at_work(how))
        .or_else(|| of_state(how, body, direction))?;
    (at == request).then_some(lie)
}

fn in_the_handshake(how: &str) -> Option<(u32, Lie)> {
    Some(match how {
        "liar" => (
            req::GET_FEATURES,
            Lie::Bytes(frame(9999, VERSION | REPLY, 8, &[0; 8])),
        ),
        "no-version-1" => (req::GET_FEATURES, Lie::Body(words(&[1 << 30]))),
        "no-config" => (req::GET_PROTOCOL_FEATURES, Lie::Body(words(&[1]))),
        "many-queues" => (req::GET_QUEUE_NUM, Lie::Body(words(&[99]))),
        "all-queues" => (req::GET_QUEUE_NUM, Lie::Body(words(&[u64::MAX]))),
        "short-config" => (req::GET_CONFIG, Lie::Body(vec![0; 12 + 8])),
        "long-config" => (req::GET_CONFIG, Lie::Body(vec![0; 4000])),
        "short-number" => (req::GET_FEATURES, Lie::Body(vec![0; 4])),
        "huge" => (
            req::GET_FEATURES,
            Lie::Bytes(frame(req::GET_FEATURES, VERSION | REPLY, u32::MAX, &[])),
        ),
        "no-reply-flag" => (
            req::GET_FEATURES,
            Lie::Bytes(frame(req::GET_FEATURES, VERSION, 8, &[0; 8])),
        ),
        "descriptor" => (req::GET_FEATURES, Lie::Descriptors(1)),
        "descriptors" => (req::GET_QUEUE_NUM, Lie::Descriptors(253)),
        "twice" => (req::GET_FEATURES, Lie::Again(2)),
        "flood" => (req::GET_FEATURES, Lie::Again(100_000)),
        "half" => (
            req::GET_CONFIG,
            Lie::Bytes(frame(req::GET_CONFIG, VERSION | REPLY, 268, &[0; 100])),
        ),
        "leaves" => (req::GET_QUEUE_NUM, Lie::Close),
        _ => return None,
    })
}

/// With a guest at work.
fn at_work(how: &str) -> Option<(u32, Lie)> {
    Some(match how {
        "no-memory" => (req::SET_MEM_TABLE, Lie::Body(words(&[1]))),
        "no-inflight" => (req::GET_INFLIGHT_FD, Lie::Descriptors(0)),
        "two-inflights" => (req::GET_INFLIGHT_FD, Lie::Descriptors(2)),
        "empty-inflight" => (req::GET_INFLIGHT_FD, Lie::Body(vec![0; 24])),
        "leaves-at-kick" => (req::SET_VRING_KICK, Lie::Close),
        "wrong-ack" => (
            req::SET_VRING_NUM,
            Lie::Bytes(frame(req::SET_VRING_BASE, VERSION | REPLY, 8, &[0; 8])),
        ),
        "silent-at-enable" => (req::SET_VRING_ENABLE, Lie::Silence),
        // What a snapshot asks for.
        "inflight-is-a-pipe" => (req::GET_INFLIGHT_FD, Lie::Descriptors(1)),
        "inflight-is-short" => (req::GET_INFLIGHT_FD, Lie::Short(16)),
        "inflight-is-everything" => (req::GET_INFLIGHT_FD, Lie::Body(vec![0xff; 24])),
        "base-of-another-queue" => (req::GET_VRING_BASE, Lie::Body(vec![9, 0, 0, 0, 0, 0, 0, 0])),
        "base-beyond-16-bits" => (req::GET_VRING_BASE, Lie::Body(vec![0, 0, 0, 0, 0, 0, 1, 0])),
        "base-far-ahead" => (
            req::GET_VRING_BASE,
            Lie::Body(vec![0, 0, 0, 0, 0x39, 0x30, 0, 0]),
        ),
        // Of memory that is a template's.
        "faults-are-a-pipe" => (req::POSTCOPY_ADVISE, Lie::Descriptors(1)),
        "faults-are-nothing" => (req::POSTCOPY_ADVISE, Lie::Descriptors(0)),
        "faults-are-nobodys" => (req::POSTCOPY_LISTEN, Lie::Body(words(&[1]))),
        "faults-have-no-table" => (req::SET_MEM_TABLE, Lie::Body(words(&[0]))),
        "faults-leave" => (req::POSTCOPY_ADVISE, Lie::Close),
        "base-is-short" => (req::GET_VRING_BASE, Lie::Body(vec![0; 4])),
        "base-is-long" => (req::GET_VRING_BASE, Lie::Body(vec![0; 12])),
        "base-is-silence" => (req::GET_VRING_BASE, Lie::Silence),
        "base-is-the-end" => (req::GET_VRING_BASE, Lie::Close),
        _ => return None,
    })
}

/// Lies about state, each while it is saved (`save-…`) or restored (`load-…`).
fn of_state(how: &str, body: &[u8], direction: Option<u8>) -> Option<(u32, Lie)> {
    let (begin, end) = (req::SET_DEVICE_STATE_FD, req::CHECK_DEVICE_STATE);
    let now = body.first().copied().filter(|_| body.len() == 8);
    let (when, what) = how.split_once('-')?;
    let (at, lie) = match what {
        "is-refused" => (begin, Lie::Body(words(&[NO_DESCRIPTOR | FAILED]))),
        "without-the-bit" => (begin, Lie::Body(words(&[0]))),
        "brings-a-descriptor" => (begin, Lie::Descriptors(1)),
        "is-a-short-answer" => (begin, Lie::Body(vec![0; 4])),
        "is-another-answer" => (
            begin,
            Lie::Bytes(frame(end, VERSION | REPLY, 8, &words(&[NO_DESCRIPTOR]))),
        ),
        "is-silence" => (begin, Lie::Silence),
        "is-the-end" => (begin, Lie::Close),
        "is-nothing" => (begin, Lie::State(0)),
        "is-too-long" => (begin, Lie::State(TOO_LONG)),
        "has-no-end" => (begin, Lie::Endless),
        "fails-in-the-end" => (end, Lie::Body(words(&[FAILED]))),
        "is-silence-in-the-end" => (end, Lie::Silence),
        "leaves-before-the-end" => (end, Lie::Close),
        "ends-with-a-long-answer" => (end, Lie::Body(vec![0; 16])),
        _ => return None,
    };
    let direction = if at == begin { now } else { direction };
    let meant = match when {
        "save" => SAVE,
        "load" => LOAD,
        _ => return None,
    };
    (direction == Some(meant)).then_some((at, lie))
}
