//! The header in front of each packet (virtio 1.3, 5.1.6): le fields, [`HEADER`] bytes.
//!
//! `flags` u8, `gso_type` u8, `hdr_len` le16, `gso_size` le16, `csum_start` le16, `csum_offset` le16, `num_buffers` le16.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use crate::features::Features;

/// Bytes of the header.
pub(crate) const HEADER: usize = 12;
/// Where `num_buffers` is.
pub(crate) const NUM_BUFFERS: usize = 10;
/// Bytes of the shortest packet: an Ethernet header.
const ETHERNET: usize = 14;
/// Bytes of the longest packet: 64 KiB of payload, its Ethernet header and two VLAN tags.
pub(crate) const MAX_PACKET: usize = 65_535 + ETHERNET + 8;

/// Bytes, with their header, of packets that are copied once more: all of a network without segmentation or jumbo frames. Two pieces of
/// memory for a system call cost it more than so few bytes cost to copy (measured; drivers of real cards call it copybreak).
pub(crate) const SMALL: usize = 2048;

/// Checks the header of a packet of `len` bytes that the driver sends, and gives the one that the tap gets: only what was
/// negotiated, and nothing that the kernel would have to be careful with. `None` if the packet must be dropped.
pub(crate) fn checked(raw: [u8; HEADER], len: usize, features: Features) -> Option<[u8; HEADER]> {
    if !(ETHERNET..=MAX_PACKET).contains(&len) {
        return None;
    }
    let [flags, gso, h0, h1, s0, s1, cs0, cs1, co0, co1, _, _] = raw;
    let mut out = [0; HEADER];
    if u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
        let start = usize::from(u16::from_le_bytes([cs0, cs1]));
        let offset = usize::from(u16::from_le_bytes([co0, co1]));
        if !features.has(VIRTIO_NET_F_CSUM) || start + offset + 2 > len {
            return None;
        }
        out[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8; // 1
        out[6..10].copy_from_slice(&raw[6..10]);
    }
    let kind = u32::from(gso) & !VIRTIO_NET_HDR_GSO_ECN;
    if kind == VIRTIO_NET_HDR_GSO_NONE {
        return Some(out);
    }
    let ecn = u32::from(gso) & VIRTIO_NET_HDR_GSO_ECN != 0;
    let negotiated = match kind {
        VIRTIO_NET_HDR_GSO_TCPV4 => features.has(VIRTIO_NET_F_HOST_TSO4),
        VIRTIO_NET_HDR_GSO_TCPV6 => features.has(VIRTIO_NET_F_HOST_TSO6),
        VIRTIO_NET_HDR_GSO_UDP => features.has(VIRTIO_NET_F_HOST_UFO),
        VIRTIO_NET_HDR_GSO_UDP_L4 => features.has(VIRTIO_NET_F_HOST_USO),
        _ => false,
    };
    let header_len = usize::from(u16::from_le_bytes([h0, h1]));
    let segment = u16::from_le_bytes([s0, s1]);
    // 5.1.6.2.1: a driver that asks for segmentation asks for the checksum too.
    let complete = out[0] != 0 && segment != 0 && header_len <= len;
    if !negotiated || !complete || (ecn && !features.has(VIRTIO_NET_F_HOST_ECN)) {
        return None;
    }
    out[1] = gso;
    out[2..6].copy_from_slice(&raw[2..6]);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(
        flags: u8,
        gso: u8,
        header_len: u16,
        segment: u16,
        start: u16,
        offset: u16,
    ) -> [u8; HEADER] {
        let mut raw = [flags, gso, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        raw[2..4].copy_from_slice(&header_len.to_le_bytes());
        raw[4..6].copy_from_slice(&segment.to_le_bytes());
        raw[6..8].copy_from_slice(&start.to_le_bytes());
        raw[8..10].copy_from_slice(&offset.to_le_bytes());
        raw
    }

    fn all() -> Features {
        Features::offered(1, true, true)
    }

    #[test]
    fn plain_packets_carry_nothing_over() {
        let raw = header(0xfe, 0, 9999, 77, 5, 5);
        assert_eq!(checked(raw, 60, all()), Some([0; HEADER]));
        assert_eq!(checked(raw, 60, Features(0)), Some([0; HEADER]));
    }

    #[test]
    fn lengths_are_capped() {
        for (len, good) in [
            (0, false),
            (13, false),
            (14, true),
            (MAX_PACKET, true),
            (MAX_PACKET + 1, false),
        ] {
            assert_eq!(checked([0; HEADER], len, all()).is_some(), good, "{len}");
        }
    }

    #[test]
    fn checksums_stay_inside_of_the_packet() {
        let good = header(1, 0, 0, 0, 34, 16);
        assert_eq!(checked(good, 60, all()).unwrap()[..10], good[..10]);
        assert!(checked(good, 51, all()).is_none());
        assert!(checked(good, 60, Features(0)).is_none(), "not negotiated");
        assert!(checked(header(1, 0, 0, 0, u16::MAX, u16::MAX), 60, all()).is_none());
    }

    #[test]
    fn segmentation_must_be_negotiated_and_complete() {
        for gso in [1, 3, 4, 5, 0x81, 0x84] {
            let good = header(1, gso, 54, 1448, 34, 16);
            let out = checked(good, 3000, all()).unwrap();
            assert_eq!(out[..10], good[..10], "{gso:#x}");
            assert_eq!(out[10..], [0, 0]);
            let csum_only = Features(1 << VIRTIO_NET_F_CSUM);
            assert!(checked(good, 3000, csum_only).is_none(), "{gso:#x}");
            assert!(checked(header(0, gso, 54, 1448, 34, 16), 3000, all()).is_none());
            assert!(checked(header(1, gso, 54, 0, 34, 16), 3000, all()).is_none());
            assert!(checked(header(1, gso, 3001, 1448, 34, 16), 3000, all()).is_none());
        }
        for gso in [2, 6, 7, 0x7f, 0xff] {
            assert!(
                checked(header(1, gso, 54, 1448, 34, 16), 3000, all()).is_none(),
                "{gso:#x}"
            );
        }
    }
}
