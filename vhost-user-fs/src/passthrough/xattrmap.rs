//! Names of extended attributes, other ones on the host than in the guest (`--xattrmap`).
//!
//! **Job.** Rules in virtiofsd's form: what name of the host a guest's name stands for, and which of the host's names the guest
//! sees as what.
//! **Who is not trusted.** The guest: a name that no rule lets through is refused, and one of the host that no rule lets
//! through is not there.
//! **Why this way.** The form is virtiofsd's own, so that its users' lines go on working:
//! `:type:scope:key:prepend:` again and again, with any character in the place of `:`.

use std::ffi::{CStr, CString};

use nix::errno::Errno;

/// Bytes of a name at most (include/uapi/linux/limits.h: `XATTR_NAME_MAX`).
const NAME_MAX: usize = 255;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The guest's name has `prepend` before it on the host.
    Prefix,
    /// Names are the same on both sides.
    Ok,
    /// The guest is refused such a name with `EPERM`, and does not see it.
    Bad,
    /// As `Bad`, with `ENOTSUP`.
    Unsupported,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    kind: Kind,
    /// For names that the guest gives.
    client: bool,
    /// For names that the host has.
    server: bool,
    /// A guest's name must begin with it.
    key: Vec<u8>,
    /// A host's name must begin with it; what a prefix rule puts before a guest's name.
    prepend: Vec<u8>,
}

/// Rules, the first that fits counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XattrMap(Vec<Rule>);

impl XattrMap {
    /// Understands a list of rules.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let mut rules = Vec::new();
        let mut rest = text.trim_start();
        if rest.is_empty() {
            return Err("it has no rule");
        }
        while let Some(delimiter) = rest.chars().next() {
            let mut fields = rest[delimiter.len_utf8()..].splitn(5, delimiter);
            let mut field = || {
                fields.next().ok_or(
                    "a rule is :prefix|ok|bad|unsupported:client|server|all:KEY:PREPEND: or, as the last, :map:KEY:PREPEND:",
                )
            };
            let kind = match field()? {
                "prefix" => Kind::Prefix,
                "ok" => Kind::Ok,
                "bad" => Kind::Bad,
                "unsupported" => Kind::Unsupported,
                "map" => {
                    let (key, prepend) = (field()?, field()?);
                    let last = field()?;
                    if !last.trim().is_empty() || fields.next().is_some() {
                        return Err("a map rule must be the last");
                    }
                    rules.extend(map(key, prepend));
                    return Ok(Self(rules));
                }
                _ => return Err("a rule's type is prefix, ok, bad, unsupported or map"),
            };
            let (client, server) = match field()? {
                "client" => (true, false),
                "server" => (false, true),
                "all" => (true, true),
                _ => return Err("a rule's scope is client, server or all"),
            };
            let (key, prepend) = (field()?, field()?);
            let next = field()?;
            rules.push(Rule {
                kind,
                client,
                server,
                key: key.into(),
                prepend: prepend.into(),
            });
            rest = next.trim_start();
        }
        Ok(Self(rules))
    }

    /// The host's name for one that the guest gives.
    pub(super) fn to_host(&self, name: &CStr) -> Result<CString, Errno> {
        let bytes = name.to_bytes();
        let rule = self
            .0
            .iter()
            .find(|r| r.client && bytes.starts_with(&r.key));
        match rule.map(|rule| (rule.kind, &rule.prepend)) {
            Some((Kind::Ok, _)) => Ok(name.to_owned()),
            Some((Kind::Prefix, prepend)) => {
                let name = [prepend, bytes].concat();
                if name.len() > NAME_MAX {
                    return Err(Errno::ERANGE);
                }
                CString::new(name).map_err(|_| Errno::EINVAL)
            }
            Some((Kind::Unsupported, _)) => Err(Errno::ENOTSUP),
            Some((Kind::Bad, _)) | None => Err(Errno::EPERM),
        }
    }

    /// What the guest sees of one of the host's names; `None` if it sees nothing.
    pub(super) fn to_guest<'a>(&self, name: &'a [u8]) -> Option<&'a [u8]> {
        let fits = |rule: &&Rule| rule.server && name.starts_with(&rule.prepend);
        let rule = self.0.iter().find(fits)?;
        match rule.kind {
            Kind::Ok => Some(name),
            Kind::Prefix => name.get(rule.prepend.len()..),
            Kind::Bad | Kind::Unsupported => None,
        }
    }

    /// The host's name of `security.capability`, if that is another: the kernel does not take that away when a file changes.
    pub(super) fn mapped_capability(&self) -> Option<CString> {
        let name = c"security.capability";
        self.to_host(name)
            .ok()
            .filter(|host| host.as_c_str() != name)
    }
}

/// The short form: names that begin with `key` have `prepend` before them on the host; without a key all have, and others of
/// the host are not seen.
fn map(key: &str, prepend: &str) -> Vec<Rule> {
    let rule = |kind, (client, server), key: &str, prepend: &str| Rule {
        kind,
        client,
        server,
        key: key.into(),
        prepend: prepend.into(),
    };
    let (all, client, server) = ((true, true), (true, false), (false, true));
    if key.is_empty() {
        return vec![
            rule(Kind::Prefix, all, "", prepend),
            rule(Kind::Bad, all, "", ""),
        ];
    }
    vec![
        rule(Kind::Prefix, all, key, prepend),
        // Neither reach what stands for another name, nor see what another name stands for.
        rule(Kind::Bad, client, prepend, ""),
        rule(Kind::Bad, server, "", key),
        rule(Kind::Ok, all, "", ""),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(map: &XattrMap, name: &CStr) -> Result<String, Errno> {
        map.to_host(name).map(|name| name.into_string().unwrap())
    }

    fn guest(map: &XattrMap, name: &str) -> Option<String> {
        let name = map.to_guest(name.as_bytes())?;
        Some(String::from_utf8(name.to_vec()).unwrap())
    }

    #[test]
    fn everything_can_get_a_prefix() {
        for text in [
            ":map::user.virtiofs.:",
            "/prefix/all//user.virtiofs./\n /bad/all///",
        ] {
            let map = XattrMap::parse(text).unwrap();
            assert_eq!(host(&map, c"trusted.x").unwrap(), "user.virtiofs.trusted.x");
            assert_eq!(guest(&map, "user.virtiofs.user.y").unwrap(), "user.y");
            assert_eq!(guest(&map, "user.other"), None);
            assert_eq!(
                map.mapped_capability().unwrap().as_c_str(),
                c"user.virtiofs.security.capability"
            );
        }
    }

    #[test]
    fn some_can_get_a_prefix_and_others_stay() {
        let map = XattrMap::parse(":map:trusted.:user.vm.:").unwrap();
        assert_eq!(host(&map, c"trusted.x").unwrap(), "user.vm.trusted.x");
        assert_eq!(host(&map, c"user.x").unwrap(), "user.x");
        assert_eq!(host(&map, c"user.vm.trusted.x"), Err(Errno::EPERM));
        assert_eq!(guest(&map, "user.vm.trusted.x").unwrap(), "trusted.x");
        assert_eq!(guest(&map, "trusted.of-the-host"), None);
        assert_eq!(guest(&map, "user.x").unwrap(), "user.x");
        assert_eq!(map.mapped_capability(), None);
    }

    #[test]
    fn the_first_rule_that_fits_counts_and_without_one_nothing_passes() {
        let map = XattrMap::parse(
            ":unsupported:client:security.::;bad;client;user.no;;:ok:all:user.:user.:",
        )
        .unwrap();
        assert_eq!(host(&map, c"security.selinux"), Err(Errno::ENOTSUP));
        assert_eq!(host(&map, c"user.nobody"), Err(Errno::EPERM));
        assert_eq!(host(&map, c"user.a").unwrap(), "user.a");
        assert_eq!(host(&map, c"system.a"), Err(Errno::EPERM));
        assert_eq!(guest(&map, "security.selinux"), None);
        assert_eq!(guest(&map, "user.nobody").unwrap(), "user.nobody");
    }

    #[test]
    fn names_do_not_grow_too_long() {
        let map = XattrMap::parse(":map::user.virtiofs.:").unwrap();
        let name = CString::new(vec![b'x'; 241]).unwrap();
        assert_eq!(host(&map, &name).map(|n| n.len()), Ok(255));
        let name = CString::new(vec![b'x'; 242]).unwrap();
        assert_eq!(host(&map, &name), Err(Errno::ERANGE));
    }

    #[test]
    fn wrong_rules_are_refused() {
        for text in [
            "",
            "  ",
            ":",
            ":ok:all::",
            ":ok:everyone:::",
            ":yes:all:::",
            ":map:a:",
            ":map::p::ok:all:::",
            ":ok:all:::x",
        ] {
            assert!(XattrMap::parse(text).is_err(), "{text:?}");
        }
    }
}
