//! Which packets of the network the driver wants (virtio 1.3, 5.1.6.5.1 to 5.1.6.5.3).
//!
//! **Job.** The receive modes, the addresses and the VLANs that the driver told on the control queue, and whether the first bytes of a
//! packet fit them.
//! **Who is not trusted.** The driver, whose tables are capped; the packet, of which two addresses and a VLAN tag are looked at and nothing
//! is followed. **Why this way.** A filter in the tap itself would outlive this process and hold for whoever opens the tap next.
//! A driver that says nothing gets everything.

/// Addresses of a table: more of one kind, and all of that kind pass, as the standard allows.
const MAX_ADDRESSES: usize = 64;
/// VLANs.
const VLANS: usize = 4096;
/// Bytes of a packet that are looked at: two addresses, type, VLAN tag (IEEE 802.3, 802.1Q).
pub(crate) const LOOKED_AT: usize = 16;
/// Tag protocol identifiers of 802.1Q and 802.1ad.
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];

type Address = [u8; 6];

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filter {
    mac: Address,
    promiscuous: bool,
    all_multicast: bool,
    unicast: Vec<Address>,
    multicast: Vec<Address>,
    /// One bit each; `None` while the driver has told none.
    vlans: Option<Box<[u8; VLANS / 8]>>,
}

impl Filter {
    /// Of a driver that has told nothing.
    pub(crate) fn new(mac: Address) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            unicast: Vec::new(),
            multicast: Vec::new(),
            vlans: None,
        }
    }

    /// The card's own address.
    pub(crate) fn mac(&self) -> Address {
        self.mac
    }

    /// Whether everything passes.
    pub(crate) fn is_open(&self) -> bool {
        self.promiscuous && self.vlans.is_none()
    }

    pub(crate) fn set_promiscuous(&mut self, on: bool) {
        self.promiscuous = on;
    }

    pub(crate) fn set_all_multicast(&mut self, on: bool) {
        self.all_multicast = on;
    }

    pub(crate) fn set_mac(&mut self, mac: Address) {
        self.mac = mac;
    }

    /// Both tables, each `le32` entries and then the addresses; `false` if they are not that.
    pub(crate) fn set_tables(&mut self, raw: &[u8]) -> bool {
        let read = |raw: &[u8]| -> Option<(Vec<Address>, usize)> {
            let count = u32::from_le_bytes(*raw.first_chunk::<4>()?) as usize;
            let end = count.checked_mul(6)?.checked_add(4)?;
            let list = raw.get(4..end)?;
            let (addresses, _) = list.as_chunks::<6>();
            Some((addresses.to_vec(), end))
        };
        let Some((unicast, end)) = read(raw) else {
            return false;
        };
        let Some((multicast, last)) = raw.get(end..).and_then(read) else {
            return false;
        };
        if raw.len() != end + last {
            return false;
        }
        self.unicast = unicast;
        self.multicast = multicast;
        true
    }

    /// `false` if there is no such VLAN.
    pub(crate) fn set_vlan(&mut self, id: u16, on: bool) -> bool {
        // The first one makes this a filter, which one that is refused must not.
        if usize::from(id) >= VLANS {
            return false;
        }
        let vlans = self.vlans.get_or_insert_with(|| Box::new([0; VLANS / 8]));
        let Some(byte) = vlans.get_mut(usize::from(id / 8)) else {
            return false;
        };
        let bit = 1 << (id % 8);
        if on {
            *byte |= bit;
        } else {
            *byte &= !bit;
        }
        true
    }

    /// Whether the driver wants a packet that begins so. A tag of no VLAN (priority only) passes.
    pub(crate) fn wants(&self, start: &[u8; LOOKED_AT]) -> bool {
        let [d0, d1, d2, d3, d4, d5, .., t0, t1, v0, v1] = *start;
        if let Some(vlans) = &self.vlans
            && TAGS.contains(&[t0, t1])
        {
            let id = u16::from_be_bytes([v0, v1]) & 0xfff;
            let known = vlans.get(usize::from(id / 8)).copied().unwrap_or(0) & 1 << (id % 8);
            if id != 0 && known == 0 {
                return false;
            }
        }
        let to = [d0, d1, d2, d3, d4, d5];
        if self.promiscuous || to == [0xff; 6] {
            return true;
        }
        if d0 & 1 != 0 {
            let many = self.multicast.len() > MAX_ADDRESSES;
            return self.all_multicast || many || self.multicast.contains(&to);
        }
        to == self.mac || self.unicast.len() > MAX_ADDRESSES || self.unicast.contains(&to)
    }

    /// For a process that comes after this one.
    pub(crate) fn save(&self, out: &mut Vec<u8>) {
        let flags = u8::from(self.promiscuous)
            | u8::from(self.all_multicast) << 1
            | u8::from(self.vlans.is_some()) << 2;
        out.push(flags);
        out.extend(self.mac);
        for table in [&self.unicast, &self.multicast] {
            // One more than the most stands for any number.
            let kept = &table[..table.len().min(MAX_ADDRESSES + 1)];
            out.push(kept.len() as u8);
            out.extend(kept.as_flattened());
        }
        if let Some(vlans) = &self.vlans {
            out.extend(vlans.as_slice());
        }
    }

    /// What [`save`](Self::save) wrote; `None` if it is not that.
    pub(crate) fn load(raw: &[u8]) -> Option<Self> {
        let (flags, raw) = raw.split_first()?;
        let (mac, mut raw) = raw.split_first_chunk::<6>()?;
        let mut filter = Self::new(*mac);
        filter.promiscuous = flags & 1 != 0;
        filter.all_multicast = flags & 2 != 0;
        for table in [&mut filter.unicast, &mut filter.multicast] {
            let (count, rest) = raw.split_first()?;
            let (list, rest) = rest.split_at_checked(usize::from(*count) * 6)?;
            *table = list.as_chunks::<6>().0.to_vec();
            raw = rest;
        }
        if flags & 4 != 0 {
            let vlans = raw.first_chunk::<{ VLANS / 8 }>()?;
            filter.vlans = Some(Box::new(*vlans));
        }
        Some(filter)
    }
}

/// Bytes that [`Filter::save`] writes at most.
pub(crate) const SAVED: usize = 1 + 6 + 2 * (1 + (MAX_ADDRESSES + 1) * 6) + VLANS / 8;

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Address = [2, 0, 0, 0, 0, 1];
    const OTHER: Address = [2, 0, 0, 0, 0, 2];
    const GROUP: Address = [1, 0, 0x5e, 0, 0, 1];

    fn start(to: Address, tag: Option<u16>) -> [u8; LOOKED_AT] {
        let mut start = [0; LOOKED_AT];
        start[..6].copy_from_slice(&to);
        if let Some(id) = tag {
            start[12..14].copy_from_slice(&[0x81, 0]);
            start[14..].copy_from_slice(&(id | 0xe000).to_be_bytes());
        }
        start
    }

    fn tables(unicast: &[Address], multicast: &[Address]) -> Vec<u8> {
        let mut raw = Vec::new();
        for table in [unicast, multicast] {
            raw.extend((table.len() as u32).to_le_bytes());
            raw.extend(table.as_flattened());
        }
        raw
    }

    #[test]
    fn modes_and_addresses() {
        let mut filter = Filter::new(OWN);
        assert!(filter.is_open() && filter.wants(&start(OTHER, None)));
        filter.set_promiscuous(false);
        let wants = |filter: &Filter| {
            [OWN, OTHER, GROUP, [0xff; 6]].map(|to| filter.wants(&start(to, None)))
        };
        assert_eq!(wants(&filter), [true, false, false, true]);
        filter.set_all_multicast(true);
        assert_eq!(wants(&filter), [true, false, true, true]);
        filter.set_all_multicast(false);
        assert!(filter.set_tables(&tables(&[OTHER], &[GROUP])));
        assert_eq!(wants(&filter), [true, true, true, true]);
        assert!(filter.set_tables(&tables(&[], &[])));
        filter.set_mac(OTHER);
        assert_eq!(wants(&filter), [false, true, false, true]);
        assert!(filter.set_tables(&tables(&[GROUP; 65], &[])));
        assert_eq!(
            wants(&filter),
            [true, true, false, true],
            "too many are all"
        );
    }

    #[test]
    fn vlans() {
        let mut filter = Filter::new(OWN);
        assert!(filter.wants(&start(OWN, Some(7))));
        let untouched = filter.clone();
        for id in [4096, u16::MAX] {
            assert!(!filter.set_vlan(id, true) && !filter.set_vlan(id, false));
        }
        assert_eq!(filter, untouched, "a refused one makes it no filter");
        assert!(
            filter.set_vlan(7, true) && filter.set_vlan(4095, true) && !filter.set_vlan(4096, true)
        );
        let wants = |filter: &Filter| {
            [None, Some(0), Some(7), Some(8), Some(4095)].map(|tag| filter.wants(&start(OWN, tag)))
        };
        assert_eq!(wants(&filter), [true, true, true, false, true]);
        assert!(filter.set_vlan(7, false));
        assert_eq!(wants(&filter), [true, true, false, false, true]);
    }

    #[test]
    fn tables_that_are_none_change_nothing() {
        let mut filter = Filter::new(OWN);
        assert!(filter.set_tables(&tables(&[OTHER], &[])));
        let before = filter.clone();
        let good = tables(&[OTHER], &[GROUP]);
        for raw in [
            &good[..good.len() - 1],
            &[good.clone(), vec![0]].concat(),
            &[],
            &[0; 7],
            &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
            &[0xab, 0xaa, 0xaa, 0x2a, 0, 0, 0, 0],
        ] {
            assert!(!filter.set_tables(raw), "{raw:?}");
            assert_eq!(filter, before);
        }
    }

    #[test]
    fn what_is_saved_comes_back() {
        let mut filter = Filter::new(OWN);
        filter.set_promiscuous(false);
        filter.set_tables(&tables(&[OTHER; 65], &[GROUP; 65]));
        filter.set_vlan(100, true);
        let mut raw = Vec::new();
        filter.save(&mut raw);
        assert_eq!(raw.len(), SAVED);
        assert_eq!(Filter::load(&raw).as_ref(), Some(&filter));
        for len in 0..raw.len() {
            assert_eq!(Filter::load(&raw[..len]), None);
        }
    }
}
