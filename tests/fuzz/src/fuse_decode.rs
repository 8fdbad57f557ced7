//! # `fuse_decode`: the body of a FUSE request, without files
//!
//! Bytes 0 to 3 are the opcode, byte 4 the negotiated layout. Names that come out are single components.

use crate::bytes::Input;
use fs_device::fuse::decode::Layout;
use fs_device::fuse::wire::IN_HEADER;
use fs_device::fuse::{Body, InHeader, Name, decode};

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut head = [0; IN_HEADER];
    head[4..8].copy_from_slice(&input.array::<4>());
    let layout = Layout {
        setxattr_ext: input.byte() & 1 != 0,
    };
    head[..4].copy_from_slice(&((IN_HEADER + input.0.len()) as u32).to_le_bytes());
    let Ok(request) = decode(InHeader::read(&head), input.0, layout) else {
        return;
    };
    let component = |name: Name<'_>| {
        let bytes = name.as_c_str().to_bytes();
        assert!(!bytes.is_empty() && bytes.len() <= 255 && !bytes.contains(&b'/'));
        assert!(bytes != b"." && bytes != b"..");
    };
    match request.body {
        Body::Lookup { name }
        | Body::Unlink { name }
        | Body::Rmdir { name }
        | Body::Link { name, .. } => component(name),
        Body::Symlink { name, .. }
        | Body::Mknod { name, .. }
        | Body::Mkdir { name, .. }
        | Body::Create { name, .. } => {
            component(name);
        }
        Body::Rename { name, newname, .. } => {
            component(name);
            component(newname);
            crate::planted!(newname.as_c_str().to_bytes().len() == 3);
        }
        Body::BatchForget(entries) => assert!(entries.iter().count() <= input.0.len() / 16),
        Body::SetXattr { value, .. } => assert!(value.len() <= input.0.len()),
        _ => {}
    }
}
