//! What the control process wants of a disk's image, as it comes and as it is answered.
//!
//! **Job.** Puts the parts of an order together, and gives the answer out in pages ([`ipc::disk`] has the places). **Who is not
//! trusted.** A front end that is not the control process: an order has a limit, and what is none is not carried out. **Why this
//! way.** What is collected is bytes until it is asked for, and the answer stays until the next order begins, so that each message is
//! answered at once.

use ipc::disk::{self, Answer, Order};
use ipc::limits::{MAX_DISK_ANSWER, MAX_DISK_ORDER};
use nix::errno::Errno;

/// An order that comes, and the answer to the last one.
#[derive(Debug, Default)]
pub(crate) struct Orders {
    comes: Vec<u8>,
    /// Its length before it.
    answer: Vec<u8>,
    /// Where the next page begins.
    at: usize,
}

impl Orders {
    /// The host wrote `data` at `offset`; gives an order back that is whole. `None`: there is more to come, or it was nothing.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) -> Option<Order> {
        match (offset, data) {
            (disk::BEGIN | disk::MORE, _) => {
                if offset == disk::BEGIN {
                    self.comes.clear();
                    self.answer.clear();
                }
                if self.comes.len() + data.len() <= MAX_DISK_ORDER {
                    self.comes.extend_from_slice(data);
                } else {
                    ipc::guest_warn!("an order of more than {MAX_DISK_ORDER} bytes");
                }
            }
            (disk::RUN, _) => {
                let comes = std::mem::take(&mut self.comes);
                match ipc::codec::decode_within::<MAX_DISK_ORDER, _>(&comes) {
                    Ok(order) => return Some(order),
                    Err(error) => ipc::guest_warn!("an order that is none: {error}"),
                }
            }
            (disk::SEEK, [a, b, c, d]) => {
                self.at = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
            }
            _ => ipc::guest_warn!("a write of {} bytes at {offset}", data.len()),
        }
        None
    }

    /// What came of it.
    pub(crate) fn answer(&mut self, result: Result<Answer, Errno>) {
        let answer = result.unwrap_or_else(|errno| Answer::Failed(errno as i32));
        let bytes = match ipc::codec::encode_within::<MAX_DISK_ANSWER, _>(&answer) {
            Ok(bytes) => bytes,
            Err(error) => {
                ipc::guest_warn!("an answer that cannot be given: {error}");
                return;
            }
        };
        self.at = 0;
        self.answer.clear();
        self.answer
            .extend_from_slice(&(bytes.len() as u32).to_le_bytes()); // at most MAX_DISK_ANSWER
        self.answer.extend_from_slice(&bytes);
    }

    /// The page that is asked for; what is beyond the answer's end stays as it is.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) {
        let rest = self.at.checked_add(offset);
        let rest = rest.and_then(|at| self.answer.get(at..)).unwrap_or(&[]);
        for (to, from) in out.iter_mut().zip(rest) {
            *to = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::codec::{decode_within, encode_within};

    #[test]
    fn an_order_comes_in_parts_and_its_answer_goes_in_pages() {
        let mut orders = Orders::default();
        let sent = Order::Delete {
            id: Some("x".repeat(200)),
            name: None,
        };
        let bytes = encode_within::<MAX_DISK_ORDER, _>(&sent).unwrap();
        assert_eq!(orders.write(disk::BEGIN, b"what was before"), None);
        let mut place = disk::BEGIN;
        for part in bytes.chunks(disk::PART) {
            assert_eq!(orders.write(place, part), None);
            place = disk::MORE;
        }
        assert_eq!(orders.write(disk::RUN, &[]), Some(sent));
        // It is carried out once.
        assert_eq!(orders.write(disk::RUN, &[]), None);
        orders.answer(Err(Errno::EFBIG));
        let mut out = [0xee; 8];
        orders.read(0, &mut out);
        let length = u32::from_le_bytes([out[0], out[1], out[2], out[3]]) as usize;
        let mut whole = Vec::new();
        for at in 0..length {
            assert_eq!(
                orders.write(disk::SEEK, &(4 + at as u32).to_le_bytes()),
                None
            );
            orders.read(0, &mut out[..1]);
            whole.push(out[0]);
        }
        let answer: Answer = decode_within::<MAX_DISK_ANSWER, _>(&whole).unwrap();
        assert_eq!(answer, Answer::Failed(Errno::EFBIG as i32));
        // Beyond the end, and anywhere.
        assert_eq!(orders.write(disk::SEEK, &u32::MAX.to_le_bytes()), None);
        out = [0xee; 8];
        orders.read(usize::MAX, &mut out);
        orders.read(0, &mut out);
        assert_eq!(out, [0xee; 8]);
    }

    #[test]
    fn an_order_that_is_too_long_is_none() {
        let mut orders = Orders::default();
        for _ in 0..100 {
            assert_eq!(orders.write(disk::MORE, &[1; 189]), None);
        }
        assert!(orders.comes.len() <= MAX_DISK_ORDER);
        for (place, data) in [
            (disk::RUN, &[][..]),
            (disk::SEEK, &[1]),
            (0, &[1; 7]),
            (255, &[1]),
        ] {
            assert_eq!(orders.write(place, data), None);
        }
    }
}
