//! Users and groups of the guest as others of the host (`translate-uid`, `translate-gid`).
//!
//! **Job.** Rules in virtiofsd's form, for ids on their way to the host and back.
//! **Who is not trusted.** The guest: an id that a rule forbids is refused, wherever it comes from.
//! **Why this way.** A list of ranges, looked at in order; an id that no rule covers stays what it is. The command line that has
//! them and the process that follows them are two programs, so they are here.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::limits::MAX_FS_ID_RULES;

/// What becomes of the ids of one range.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Becomes {
    /// Those that begin here, in the same order.
    From(u32),
    /// All this one.
    One(u32),
    /// The request is refused.
    Refused,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Rule {
    ids: RangeInclusive<u32>,
    becomes: Becomes,
}

/// Rules for users, or for groups.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Translation {
    to_host: Vec<Rule>,
    to_guest: Vec<Rule>,
}

impl Translation {
    /// Adds a rule: `guest:G:H:N`, `host:H:G:N`, `map:G:H:N`, `squash-guest:G:H:N`, `squash-host:H:G:N`, `forbid-guest:G:N`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn add(&mut self, rule: &str) -> Result<(), &'static str> {
        const FORM: &str = "guest:G:H:N, host:H:G:N, map:G:H:N, squash-guest:G:H:N, squash-host:H:G:N or forbid-guest:G:N, with \
                            N ids from G in the guest and from H on the host";
        let mut words = rule.split(':');
        let kind = words.next().unwrap_or_default();
        let numbers: Option<Vec<u32>> = words.map(|word| word.parse().ok()).collect();
        match (kind, numbers.as_deref()) {
            ("guest", Some(&[guest, host, count])) => {
                add(&mut self.to_host, guest, Some(host), count, true)
            }
            ("host", Some(&[host, guest, count])) => {
                add(&mut self.to_guest, host, Some(guest), count, true)
            }
            ("map", Some(&[guest, host, count])) => {
                add(&mut self.to_host, guest, Some(host), count, true)?;
                add(&mut self.to_guest, host, Some(guest), count, true)
            }
            ("squash-guest", Some(&[guest, host, count])) => {
                add(&mut self.to_host, guest, Some(host), count, false)
            }
            ("squash-host", Some(&[host, guest, count])) => {
                add(&mut self.to_guest, host, Some(guest), count, false)
            }
            ("forbid-guest", Some(&[guest, count])) => {
                add(&mut self.to_host, guest, None, count, false)
            }
            _ => Err(FORM),
        }
    }

    /// Whether all ids stay what they are.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.to_host.is_empty() && self.to_guest.is_empty()
    }

    /// The host's id for one of the guest; `None` if it is refused.
    #[must_use]
    pub fn to_host(&self, id: u32) -> Option<u32> {
        translate(&self.to_host, id)
    }

    /// The guest's id for one of the host.
    #[must_use]
    pub fn to_guest(&self, id: u32) -> u32 {
        // No rule refuses in this direction.
        translate(&self.to_guest, id).unwrap_or(id)
    }
}

fn translate(rules: &[Rule], id: u32) -> Option<u32> {
    let Some(rule) = rules.iter().find(|rule| rule.ids.contains(&id)) else {
        return Some(id);
    };
    match rule.becomes {
        // Both ranges fit, as `add` has seen to; rules of another making get no id.
        Becomes::From(first) => first.checked_add(id - rule.ids.start()),
        Becomes::One(one) => Some(one),
        Becomes::Refused => None,
    }
}

/// `in_order`: several become several; otherwise all become `to`, or with none are refused.
fn add(
    rules: &mut Vec<Rule>,
    from: u32,
    to: Option<u32>,
    count: u32,
    in_order: bool,
) -> Result<(), &'static str> {
    let Some(last) = count.checked_sub(1) else {
        return Err("a rule is for one id at least");
    };
    // 4294967295 is no id: it means none to the kernel.
    let end = |first: u32| first.checked_add(last).filter(|end| *end < u32::MAX);
    let fits = |first| end(first).ok_or("ids end at 4294967294");
    let ids = from..=fits(from)?;
    let becomes = match to {
        Some(to) if in_order => {
            fits(to)?;
            Becomes::From(to)
        }
        Some(u32::MAX) => return Err("ids end at 4294967294"),
        Some(to) => Becomes::One(to),
        None => Becomes::Refused,
    };
    if rules.len() >= MAX_FS_ID_RULES {
        return Err("there are more than 64 rules for one direction");
    }
    let overlaps = |rule: &Rule| rule.ids.start() <= ids.end() && ids.start() <= rule.ids.end();
    if rules.iter().any(overlaps) {
        return Err("two rules are for one id");
    }
    rules.push(Rule { ids, becomes });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(list: &[&str]) -> Translation {
        let mut all = Translation::default();
        for rule in list {
            all.add(rule).unwrap();
        }
        all
    }

    #[test]
    fn ids_change_as_the_rules_say_and_others_do_not() {
        let ids = rules(&[
            "map:0:100000:1000",
            "squash-guest:2000:99:10",
            "forbid-guest:5000:1",
        ]);
        assert_eq!(ids.to_host(0), Some(100_000));
        assert_eq!(ids.to_host(999), Some(100_999));
        assert_eq!(ids.to_host(1000), Some(1000));
        assert_eq!(
            (ids.to_host(2003), ids.to_host(2010)),
            (Some(99), Some(2010))
        );
        assert_eq!(ids.to_host(5000), None);
        assert_eq!(
            (ids.to_guest(100_999), ids.to_guest(101_000)),
            (999, 101_000)
        );
        assert_eq!(ids.to_guest(99), 99, "one way only");
        let back = rules(&["squash-host:0:65534:4294967295"]);
        assert_eq!((back.to_guest(0), back.to_guest(77)), (65534, 65534));
    }

    #[test]
    fn wrong_rules_are_refused() {
        for rule in [
            "",
            "map",
            "map:0:1",
            "map:0:1:2:3",
            "map:a:1:2",
            "map:-1:1:2",
            "map:0:0:0",
            "map:4294967295:0:1",
            "map:0:4294967290:10",
            "guest:1:1:4294967295",
            "squash-guest:0:4294967295:1",
            "forbid-guest:0:0",
            "forbid-host:0:1",
        ] {
            assert!(Translation::default().add(rule).is_err(), "{rule}");
        }
        let mut ids = rules(&["map:0:100:10"]);
        assert!(ids.add("guest:9:0:1").is_err(), "the guest's 9 has a rule");
        assert!(
            ids.add("host:109:0:1").is_err(),
            "the host's 109 has a rule"
        );
        ids.add("guest:10:0:1").unwrap();
    }

    #[test]
    fn there_are_so_many_rules_and_no_more() {
        let mut ids = Translation::default();
        for n in 0..MAX_FS_ID_RULES {
            ids.add(&format!("guest:{n}:{}:1", 1000 + n)).unwrap();
        }
        let more = ids.add("guest:5000:1:1").unwrap_err();
        assert!(more.contains(&MAX_FS_ID_RULES.to_string()), "{more}");
        assert_eq!(ids.to_host(63), Some(1063));
        assert_eq!(ids.to_host(5000), Some(5000), "it is not there");
        ids.add("host:5000:1:1").unwrap();
    }
}
