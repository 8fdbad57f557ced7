//! Telling the network where a guest is, for a driver that does not do it (RFC 903; virtio 1.3, 5.1.6.5.4).
//!
//! **Job.** One frame: the reverse ARP request that switches learn a port from, as other VMMs send it.
//! **Who is not trusted.** Nobody: of the guest's there is one address in it. **Why this way.** It asks for nothing that anybody answers.

/// Bytes of the shortest Ethernet frame, without its checksum.
const FRAME: usize = 60;

/// From `mac` to all: "which IP address has `mac`?".
pub(crate) fn frame(mac: [u8; 6]) -> [u8; FRAME] {
    let mut frame = [0; FRAME];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    // Reverse ARP; Ethernet, IPv4, their addresses' lengths; a request.
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}
