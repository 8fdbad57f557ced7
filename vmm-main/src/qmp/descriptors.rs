//! Descriptors that clients pass over their sockets, by name or in numbered sets.
//!
//! **Job.** `getfd` and `closefd` give a descriptor a name that only its client can use; `add-fd`, `remove-fd` and
//! `query-fdsets` keep sets that every client can use as `/dev/fdset/N`. Commands that open something take them from here
//! ([`Desk`]). What QEMU does and says in each case is done and said here, too.
//!
//! **Who is not trusted.** Clients: how many descriptors wait, have a name or are in sets is capped over all of them
//! ([`MAX_QMP_FDS`]). What a descriptor is, is looked at by the broker, which gets a copy; this process never reads, writes or maps one.
//!
//! **Why this way.** A named descriptor goes with its client, so nobody has to remember whose it was. A set's descriptor is
//! shared, not duplicated, on its way to the main thread, so this thread makes no descriptor at all.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use ipc::limits::MAX_QMP_FDS;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde_json::{Value, json};

use super::command::QmpError;
use super::schema::check::shown;

/// What a file name begins with that stands for a set.
pub(super) const FDSET: &str = "/dev/fdset/";

/// All that were passed and are kept.
#[derive(Debug, Default)]
pub(super) struct Descriptors {
    /// By client and name.
    named: BTreeMap<(u64, String), OwnedFd>,
    sets: BTreeMap<u64, Vec<Kept>>,
}

/// One of a set.
#[derive(Debug)]
struct Kept {
    fd: Arc<OwnedFd>,
    opaque: Option<String>,
}

impl Descriptors {
    /// Closes what has a name of this client's, which is gone.
    pub(super) fn forget(&mut self, client: u64) {
        self.named.retain(|(owner, _), _| *owner != client);
    }

    fn count(&self) -> usize {
        self.named.len() + self.sets.values().map(Vec::len).sum::<usize>()
    }
}

/// What one client's command may take and change.
#[derive(Debug)]
pub(crate) struct Desk<'a> {
    pub(super) client: u64,
    /// The descriptor that came last and was not asked for yet.
    pub(super) fresh: &'a mut Option<OwnedFd>,
    pub(super) all: &'a mut Descriptors,
}

impl Desk<'_> {
    /// The descriptor that came with the command, if there is room for one more.
    fn take_fresh(&mut self, replaces: bool) -> Result<OwnedFd, QmpError> {
        let fd = self
            .fresh
            .take()
            .ok_or_else(|| QmpError::generic("No file descriptor supplied via SCM_RIGHTS"))?;
        if !replaces && self.all.count() >= MAX_QMP_FDS {
            return Err(QmpError::generic(format!(
                "Too many file descriptors; allowed: {MAX_QMP_FDS} that have a name or are in a set"
            )));
        }
        Ok(fd)
    }

    /// `getfd`
    pub(super) fn get(&mut self, name: String) -> Result<Value, QmpError> {
        if name.is_empty() || name.starts_with(|first: char| first.is_ascii_digit()) {
            // Dropped with it, as after every other answer.
            self.fresh.take();
            return Err(QmpError::generic(format!(
                "Parameter 'fdname' is '{}'; a name does not start with a digit",
                shown(&name)
            )));
        }
        let key = (self.client, name);
        let fd = self.take_fresh(self.all.named.contains_key(&key))?;
        self.all.named.insert(key, fd);
        Ok(json!({}))
    }

    /// `closefd`
    pub(super) fn close(&mut self, name: &str) -> Result<Value, QmpError> {
        self.take_named(name).map(|_| json!({}))
    }

    fn take_named(&mut self, name: &str) -> Result<OwnedFd, QmpError> {
        self.all
            .named
            .remove(&(self.client, name.to_owned()))
            .ok_or_else(|| not_found(name))
    }

    /// `add-fd`
    pub(super) fn add(
        &mut self,
        set: Option<u64>,
        opaque: Option<String>,
    ) -> Result<Value, QmpError> {
        let fd = self.take_fresh(false)?;
        let sets = &mut self.all.sets;
        let set = set
            .or_else(|| (0..).find(|free| !sets.contains_key(free)))
            .unwrap_or(0);
        let number = fd.as_raw_fd();
        sets.entry(set).or_default().push(Kept {
            fd: Arc::new(fd),
            opaque,
        });
        Ok(json!({ "fdset-id": set, "fd": number }))
    }

    /// `remove-fd`
    pub(super) fn remove(&mut self, set: u64, number: Option<i64>) -> Result<Value, QmpError> {
        let name = || match number {
            Some(number) => format!("fdset-id:{set}, fd:{number}"),
            None => format!("fdset-id:{set}"),
        };
        let Some(kept) = self.all.sets.get_mut(&set) else {
            return Err(not_found(&name()));
        };
        let before = kept.len();
        kept.retain(|one| number.is_some_and(|number| i64::from(one.fd.as_raw_fd()) != number));
        if kept.len() == before {
            return Err(not_found(&name()));
        }
        if kept.is_empty() {
            self.all.sets.remove(&set);
        }
        Ok(json!({}))
    }

    /// `query-fdsets`
    pub(super) fn tell(&self) -> Value {
        let told = |kept: &Kept| {
            let mut one = json!({ "fd": kept.fd.as_raw_fd() });
            if let Some(opaque) = &kept.opaque {
                one["opaque"] = json!(opaque);
            }
            one
        };
        self.all
            .sets
            .iter()
            .map(|(set, kept)| {
                json!({ "fdset-id": set, "fds": kept.iter().map(told).collect::<Vec<_>>() })
            })
            .collect()
    }

    /// What `path` stands for if it is a set's: its descriptor that is open as `readonly` says. One that is open for both
    /// stands in for one that is for reading only; the broker narrows it.
    pub(super) fn open(
        &self,
        path: &str,
        readonly: bool,
    ) -> Result<Option<Arc<OwnedFd>>, QmpError> {
        let Some(number) = path.strip_prefix(FDSET) else {
            return Ok(None);
        };
        let failed =
            |why: &str| QmpError::generic(format!("Could not open '{}': {why}", shown(path)));
        let kept = number
            .parse::<u64>()
            .ok()
            .and_then(|set| self.all.sets.get(&set))
            .ok_or_else(|| failed("there is no such set; add-fd makes one"))?;
        let with = |wanted: OFlag| {
            kept.iter().map(|one| &one.fd).find(|fd| {
                fcntl(fd, FcntlArg::F_GETFL).is_ok_and(|flags| {
                    let flags = OFlag::from_bits_retain(flags);
                    !flags.contains(OFlag::O_PATH) && flags & OFlag::O_ACCMODE == wanted
                })
            })
        };
        let found = if readonly {
            with(OFlag::O_RDONLY).or_else(|| with(OFlag::O_RDWR))
        } else {
            with(OFlag::O_RDWR)
        };
        let needed = if readonly {
            "none in this set is open for reading"
        } else {
            "none in this set is open for reading and writing"
        };
        found.cloned().map(Some).ok_or_else(|| failed(needed))
    }

    /// The descriptors of these names, which they lose; or of these numbers, which are in sets. All or none are taken.
    pub(super) fn take(
        &mut self,
        argument: &str,
        names: &[&str],
    ) -> Result<Vec<Arc<OwnedFd>>, QmpError> {
        let mut taken = Vec::new();
        for (at, name) in names.iter().enumerate() {
            if names[..at].contains(name) {
                return Err(QmpError::generic(format!(
                    "Parameter '{argument}' has '{}' twice",
                    shown(name)
                )));
            }
            if let Ok(number) = name.parse::<i32>() {
                let mut all = self.all.sets.values().flatten();
                match all.find(|one| one.fd.as_raw_fd() == number) {
                    Some(one) => taken.push(Some(Arc::clone(&one.fd))),
                    None => return Err(not_found(name)),
                }
            } else if self
                .all
                .named
                .contains_key(&(self.client, (*name).to_owned()))
            {
                taken.push(None);
            } else {
                return Err(not_found(name));
            }
        }
        names
            .iter()
            .zip(taken)
            .map(|(name, from_set)| match from_set {
                Some(fd) => Ok(fd),
                None => self.take_named(name).map(Arc::new),
            })
            .collect()
    }
}

fn not_found(name: &str) -> QmpError {
    QmpError::generic(format!("File descriptor named '{}' not found", shown(name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn file(write: bool) -> OwnedFd {
        File::options()
            .read(true)
            .write(write)
            .open("/dev/null")
            .unwrap()
            .into()
    }

    fn with<T>(
        all: &mut Descriptors,
        client: u64,
        fd: Option<OwnedFd>,
        work: impl FnOnce(&mut Desk<'_>) -> T,
    ) -> T {
        let mut fresh = fd;
        let done = work(&mut Desk {
            client,
            fresh: &mut fresh,
            all,
        });
        assert!(fresh.is_none(), "a descriptor was left");
        done
    }

    #[test]
    fn names_are_their_clients_and_can_be_taken_once() {
        let mut all = Descriptors::default();
        let desc = |done: Result<_, QmpError>| done.map(drop).map_err(|e| e.desc);
        let refused = with(&mut all, 1, Some(file(true)), |desk| desk.get("1a".into()));
        assert!(desc(refused).unwrap_err().contains("digit"));
        let refused = with(&mut all, 1, None, |desk| desk.get("a".into()));
        assert_eq!(
            desc(refused).unwrap_err(),
            "No file descriptor supplied via SCM_RIGHTS"
        );
        for name in ["a", "b", "a"] {
            with(&mut all, 1, Some(file(true)), |desk| desk.get(name.into())).unwrap();
        }
        assert_eq!(all.count(), 2, "a name was used again");
        let other = with(&mut all, 2, None, |desk| {
            desc(desk.take("fds", &["a"]).map(|_| Value::Null))
        });
        assert_eq!(other.unwrap_err(), "File descriptor named 'a' not found");
        // All or none.
        assert!(with(&mut all, 1, None, |desk| desk.take("fds", &["a", "c"])).is_err());
        assert!(with(&mut all, 1, None, |desk| desk.take("fds", &["a", "a"])).is_err());
        assert_eq!(
            with(&mut all, 1, None, |desk| desk.take("fds", &["a", "b"]))
                .unwrap()
                .len(),
            2
        );
        assert!(with(&mut all, 1, None, |desk| desk.close("a")).is_err());
        with(&mut all, 1, Some(file(true)), |desk| desk.get("d".into())).unwrap();
        all.forget(2);
        assert_eq!(all.count(), 1);
        all.forget(1);
        assert_eq!(all.count(), 0);
    }

    #[test]
    fn a_set_gives_the_descriptor_with_the_right_mode() {
        let mut all = Descriptors::default();
        let reading = with(&mut all, 1, Some(file(false)), |desk| desk.add(None, None)).unwrap();
        assert_eq!(reading["fdset-id"], 0);
        with(&mut all, 1, None, |desk| {
            assert!(desk.open("/srv/disk", false).unwrap().is_none());
            assert!(
                desk.open("/dev/fdset/0", false).is_err(),
                "for reading only"
            );
            assert!(desk.open("/dev/fdset/1", true).is_err(), "no such set");
            assert!(desk.open("/dev/fdset/x", true).is_err());
            let found = desk.open("/dev/fdset/0", true).unwrap().unwrap();
            assert_eq!(json!(found.as_raw_fd()), reading["fd"]);
        });
        let both = with(&mut all, 2, Some(file(true)), |desk| {
            desk.add(Some(0), Some("rw".into()))
        })
        .unwrap();
        with(&mut all, 1, None, |desk| {
            let found = |readonly| {
                desk.open("/dev/fdset/0", readonly)
                    .unwrap()
                    .unwrap()
                    .as_raw_fd()
            };
            assert_eq!(json!(found(false)), both["fd"]);
            assert_eq!(json!(found(true)), reading["fd"]);
            assert_eq!(
                desk.tell(),
                json!([{ "fdset-id": 0, "fds": [{ "fd": reading["fd"] }, { "fd": both["fd"], "opaque": "rw" }] }])
            );
            let gone = desk.remove(0, Some(1_000_000)).unwrap_err();
            assert_eq!(
                gone.desc,
                "File descriptor named 'fdset-id:0, fd:1000000' not found"
            );
            desk.remove(0, reading["fd"].as_i64()).unwrap();
            // One for both stands in.
            assert!(desk.open("/dev/fdset/0", true).unwrap().is_some());
            desk.remove(0, None).unwrap();
            assert_eq!(
                desk.remove(0, None).unwrap_err().desc,
                "File descriptor named 'fdset-id:0' not found"
            );
            assert_eq!(desk.tell(), json!([]));
        });
    }

    #[test]
    fn descriptors_are_capped_over_all_clients() {
        let mut all = Descriptors::default();
        for number in 0..MAX_QMP_FDS as u64 {
            with(&mut all, number % 5, Some(file(true)), |desk| {
                match number % 2 {
                    0 => desk.get(format!("n{number}")),
                    _ => desk.add(Some(number % 7), None),
                }
            })
            .unwrap();
        }
        let one_more = with(&mut all, 0, Some(file(true)), |desk| desk.add(None, None));
        assert!(
            one_more
                .unwrap_err()
                .desc
                .contains(&MAX_QMP_FDS.to_string())
        );
        assert!(with(&mut all, 0, Some(file(true)), |desk| desk.get("m".into())).is_err());
        // One that takes the place of another is not one more.
        with(&mut all, 0, Some(file(true)), |desk| desk.get("n0".into())).unwrap();
    }
}
