//! What the broker keeps of its caller's rights.
//!
//! **Job.** When it was started by root, drop every capability that the policy gives no use for.
//! **Who is not trusted**: the control process later; a broker that it could confuse should hold little.
//! **Why this way.** The policy is known before the guest runs, so what the broker will ever need can be counted.

use std::collections::HashSet;

use caps::errors::CapsError;
use caps::{CapSet, Capability};
use ipc::control::added::AdditionGrant;
use ipc::control::{BackendGrant, Policy};

/// Sysctls that, with this value, leave the making of user namespaces to those with `CAP_SYS_ADMIN`, or to nobody.
const USER_NAMESPACES_RESTRICTED: [(&str, &str); 3] = [
    ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
    ),
    ("/proc/sys/user/max_user_namespaces", "0"),
];

/// Keeps what `policy` needs of what this process has, and drops the rest for good.
pub(super) fn narrow(policy: &Policy) -> Result<(), CapsError> {
    let has = caps::read(None, CapSet::Permitted)?;
    if has.is_empty() {
        return Ok(());
    }
    let restricted = USER_NAMESPACES_RESTRICTED
        .iter()
        .any(|(path, value)| std::fs::read_to_string(path).is_ok_and(|text| text.trim() == *value));
    let keep: HashSet<Capability> = needed(policy, restricted)
        .intersection(&has)
        .copied()
        .collect();
    // Nothing that this process starts may have more. A caller without the right to say so has to do without.
    for other in caps::all().difference(&keep) {
        let _ = caps::drop(None, CapSet::Bounding, *other);
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)?;
    caps::clear(None, CapSet::Inheritable)
}

fn needed(policy: &Policy, user_namespaces_restricted: bool) -> HashSet<Capability> {
    // Paths that the caller may name although the bits of the file say otherwise.
    let mut needed = HashSet::from([
        Capability::CAP_DAC_OVERRIDE,
        Capability::CAP_DAC_READ_SEARCH,
    ]);
    let grants = &policy.additions.grants;
    if !policy.devices.is_empty() || policy.additions.devices > 0 {
        // Device processes run as another user, and are ended by signal.
        needed.extend([
            Capability::CAP_SETUID,
            Capability::CAP_SETGID,
            Capability::CAP_KILL,
        ]);
        if policy
            .devices
            .iter()
            .any(|device| matches!(device.backend, BackendGrant::Folder { .. }))
            || grants
                .iter()
                .any(|grant| matches!(grant, AdditionGrant::Folders { .. }))
        {
            // A user namespace in which root's own id exists can be made with this only (Linux 5.12).
            needed.insert(Capability::CAP_SETFCAP);
        }
        if user_namespaces_restricted {
            needed.extend([Capability::CAP_SYS_ADMIN, Capability::CAP_SETPCAP]);
        }
    }
    if policy
        .devices
        .iter()
        .any(|device| matches!(device.backend, BackendGrant::Tap { .. }))
        || grants
            .iter()
            .any(|grant| matches!(grant, AdditionGrant::Tap { .. }))
    {
        needed.insert(Capability::CAP_NET_ADMIN);
    }
    needed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmdline::{Env, Request, parse, plan};

    fn policy(args: &[&str]) -> Policy {
        let args: Vec<_> = args.iter().map(Into::into).collect();
        let Ok(Request::Run(spec)) = parse(&args, &Env::default()) else {
            panic!("{args:?}")
        };
        plan(&spec, false).policy
    }

    #[test]
    fn a_vm_without_devices_needs_to_open_files_only() {
        let needed = needed(&policy(&["-kernel", "k"]), true);
        assert_eq!(
            needed,
            HashSet::from([
                Capability::CAP_DAC_OVERRIDE,
                Capability::CAP_DAC_READ_SEARCH
            ])
        );
    }

    #[test]
    fn a_tap_by_name_needs_the_network_and_an_inherited_one_does_not() {
        let net = |tap: &str| {
            let netdev = format!("tap,id=n,{tap}");
            needed(
                &policy(&[
                    "-kernel",
                    "k",
                    "-netdev",
                    &netdev,
                    "-device",
                    "virtio-net-device,netdev=n",
                ]),
                false,
            )
        };
        assert!(net("ifname=tap0").contains(&Capability::CAP_NET_ADMIN));
        assert!(!net("fd=7").contains(&Capability::CAP_NET_ADMIN));
        assert!(!net("ifname=tap0").contains(&Capability::CAP_SYS_ADMIN));
    }
}
