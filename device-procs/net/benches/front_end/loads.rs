//! # The loads
//!
//! **Job.** Names, and the frames. **Who is not trusted.** Nobody.
//! **Why this way.** The smallest frame shows what a packet costs, the largest what a byte costs; 64 KiB is what a guest's TCP
//! hands over when segmentation is left to the other side.

use virtio_bindings::virtio_net::{VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4};

/// Ethernet, IPv4 and TCP headers of a frame that is to be segmented.
const HEADERS: usize = 14 + 20 + 20;
/// Payload of each segment; as many as make less than 64 KiB, for the kernel cuts longer ones itself.
const SEGMENT: usize = 1448;
/// What the card and its driver put in front (virtio 1.3, 5.1.6).
pub(crate) const NET_HEADER: usize = 12;

/// Where packets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the front end to the tap.
    Send,
    /// From the tap to the front end.
    Receive,
    /// From the tap to the front end and back, one at a time; the host waits so many microseconds before the next.
    Echo(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) way: Way,
    /// Bytes of a frame.
    pub(crate) size: usize,
    pub(crate) queues: usize,
}

impl Load {
    pub(crate) fn name(&self) -> String {
        let size = if self.segmented() {
            "64K TSO".to_owned()
        } else {
            self.size.to_string()
        };
        let queues = self.queues;
        match self.way {
            Way::Send => format!("send {size} q{queues}"),
            Way::Receive => format!("receive {size} q{queues}"),
            Way::Echo(0) => format!("echo {size} q{queues}"),
            Way::Echo(apart) => format!("echo {size} +{apart}us"),
        }
    }

    /// Whether segmentation is left to whoever takes the frame.
    pub(crate) fn segmented(&self) -> bool {
        self.size > 1514
    }

    /// Buffers that a driver offers for such frames: Linux sizes them by what it has seen lately, a page at most.
    pub(crate) fn buffer(&self) -> usize {
        if self.segmented() { 4096 } else { 1536 }
    }

    /// Buffers that a received frame takes.
    pub(crate) fn buffers(&self) -> usize {
        (NET_HEADER + self.size).div_ceil(self.buffer())
    }

    /// Frames that are put into the tap's queue at a time: memory is the limit.
    pub(crate) fn burst(&self) -> usize {
        if self.segmented() { 256 } else { 2048 }
    }

    /// The same as a packet socket takes and gives it: its header lacks the last two bytes of the card's.
    pub(crate) fn frame(&self, flow: usize) -> Vec<u8> {
        let packet = self.packet(flow);
        let mut frame = packet[..NET_HEADER - 2].to_vec();
        frame.extend_from_slice(&packet[NET_HEADER..]);
        frame
    }

    /// The header and the frame. Flow `flow` of the frames of one load: a tap spreads them over its queues by this.
    pub(crate) fn packet(&self, flow: usize) -> Vec<u8> {
        let mut packet = vec![0x5a; NET_HEADER + self.size];
        let (header, frame) = packet.split_at_mut(NET_HEADER);
        header.fill(0);
        if self.segmented() {
            header[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
            header[1] = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
            header[2..4].copy_from_slice(&(HEADERS as u16).to_le_bytes());
            header[4..6].copy_from_slice(&(SEGMENT as u16).to_le_bytes());
            header[6..8].copy_from_slice(&34u16.to_le_bytes());
            header[8..10].copy_from_slice(&16u16.to_le_bytes());
        }
        // To another one's address: the host drops it as soon as it has looked.
        frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        frame[12..14].copy_from_slice(&[8, 0]);
        let mut ip = [0; 20];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&((self.size - 14) as u16).to_be_bytes());
        ip[8] = 64;
        ip[9] = libc::IPPROTO_TCP as u8;
        ip[12..16].copy_from_slice(&[10, 0, 0, 1]);
        ip[16..20].copy_from_slice(&[10, 0, 0, 2]);
        let sum: u32 = ip
            .chunks_exact(2)
            .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])))
            .sum();
        let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        frame[14..34].copy_from_slice(&ip);
        let mut tcp = [0; 20];
        tcp[..2].copy_from_slice(&(1024 + flow as u16).to_be_bytes());
        tcp[2..4].copy_from_slice(&5001u16.to_be_bytes());
        tcp[12] = 0x50;
        tcp[13] = 0x10;
        frame[34..54].copy_from_slice(&tcp);
        packet
    }
}

pub(crate) fn all() -> Vec<Load> {
    let mut all = Vec::new();
    for queues in [1, 4] {
        for way in [Way::Send, Way::Receive] {
            for size in [64, 1500, HEADERS + 45 * SEGMENT] {
                all.push(Load { way, size, queues });
            }
        }
    }
    // At once, and for a host that thinks before it asks again: less than a look lasts, a little more, and much more.
    for apart in [0, 10, 30, 300] {
        let (way, size, queues) = (Way::Echo(apart), 64, 1);
        all.push(Load { way, size, queues });
    }
    all
}
