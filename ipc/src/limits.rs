//! Every size that a peer, a guest or a user may choose, capped in one list.
//!
//! A cap that is found elsewhere in the tree is a mistake: move it here and say why it has its value.

/// Largest encoded control message, in bytes. The largest real one is the broker's policy: a few hundred bytes a device.
pub const MAX_MESSAGE: usize = 256 * 1024;
/// Most descriptors that one message carries. The kernel's own limit (`SCM_MAX_FD`) is 253.
pub const MAX_MESSAGE_FDS: usize = 64;
/// Largest start message of a device process, in bytes.
pub const MAX_START_MESSAGE: usize = 64 * 1024;

/// vCPUs of one VM (manual 1.2.1).
pub const MAX_VCPUS: u32 = 254;
/// Smallest guest memory in bytes (manual 1.3.1).
pub const MIN_MEMORY: u64 = 128 << 20;
/// Largest guest memory in bytes (manual 1.3.1).
pub const MAX_MEMORY: u64 = 512 << 30;
/// Guest memory in bytes when `-m` is not given (manual 1.3.1).
pub const DEFAULT_MEMORY: u64 = 256 << 20;

/// User-creatable virtio-mmio devices of an x86_64 microvm (manual 2).
pub const MAX_MMIO_DEVICES: usize = 11;
/// Disks of a microvm (VM configuration page, "Lightweight VMs").
pub const MAX_MICROVM_DISKS: usize = 6;
/// Network cards of a microvm (VM configuration page, "Lightweight VMs").
pub const MAX_MICROVM_NICS: usize = 2;
/// iothreads of a VM (VM configuration page, "iothread Configuration").
pub const MAX_IOTHREADS: usize = 8;

/// Memory nodes of a guest (manual 1.5).
pub const MAX_NUMA_NODES: usize = 8;

/// Images below a qcow2 image.
pub const MAX_BACKING_IMAGES: usize = 8;

/// Internal snapshots of a qcow2 image that QMP lists, and up to which it makes more. QEMU's limit is 65536; each is a copy of the
/// image's first table.
pub const MAX_INTERNAL_SNAPSHOTS: usize = 256;
/// Bytes of an internal snapshot's name or id that QMP takes and shows.
pub const MAX_SNAPSHOT_NAME: usize = 255;
/// Bytes of an image's table of snapshots: as many as there may be, with the longest names and a kilobyte of what is not known here.
pub const MAX_SNAPSHOT_TABLE: usize = MAX_INTERNAL_SNAPSHOTS * 2048;
/// Bytes of an order to a disk's process.
pub const MAX_DISK_ORDER: usize = 1024;
/// Bytes of its answer: a list of the most snapshots with the longest names.
pub const MAX_DISK_ANSWER: usize = MAX_INTERNAL_SNAPSHOTS * 640;
/// Milliseconds that the control process waits for a disk's process that makes or takes away an internal snapshot: it waits until all
/// that the guest has written is on the disk.
pub const DISK_ORDER_MS: u64 = 60_000;

/// `-hotplug` options of one VM.
pub const MAX_HOTPLUG_GRANTS: usize = 32;
/// Back ends that are added to a running VM and not removed: a device uses one, and there are no more devices.
pub const MAX_ADDED_BACKENDS: u32 = MAX_MMIO_DEVICES as u32;

/// Queues of a block device (manual 2.2).
pub const MAX_BLOCK_QUEUES: u16 = 32;
/// Queue pairs of a network card (manual 2.3).
pub const MAX_NET_QUEUE_PAIRS: u16 = 16;
/// Bytes of the name that a guest mounts a shared folder by (virtio 1.3, 5.11.4).
pub const MAX_FS_TAG: usize = 36;
/// Where mappings in a shared folder's window begin and what their lengths are multiples of, in bytes: the unit that Linux asks
/// for, which bounds how many mappings there can be.
pub const DAX_UNIT: u64 = 2 << 20;
/// Bytes of a shared folder's window at most: 4096 mappings.
pub const MAX_DAX_WINDOW: u64 = 8 << 30;
/// Rules for the users of a folder's guest in one direction, and for its groups: each is looked at for each request.
pub const MAX_FS_ID_RULES: usize = 64;
/// Request queues of a shared folder. A guest has one a vCPU at most, and a folder is on few disks.
pub const MAX_FS_REQUEST_QUEUES: u16 = 8;
/// Entries of the smallest queue of a shared folder: Linux refuses fewer than the four that a request's headers take.
pub const MIN_FS_QUEUE_SIZE: u16 = 8;
/// Entries of the largest queue of a shared folder: a request of 1 MiB takes 256 and a few.
pub const MAX_FS_QUEUE_SIZE: u16 = 1024;
/// Descriptors of a process that serves a shared folder, and with them inodes and files of the guest; less if the host
/// allows less.
pub const MAX_FS_DESCRIPTORS: u64 = 1_000_000;
/// Virtqueues of any device: a network card's 16 pairs and its control queue.
pub const MAX_QUEUES: u16 = 2 * MAX_NET_QUEUE_PAIRS + 1;
/// Entries of a virtqueue when `queue-size` is not given (manual 2.2, 2.3).
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// Entries of the largest virtqueue that a device here offers (manual 2.2: block up to 1024, 2.3: net up to 4096).
pub const MAX_QUEUE_SIZE: u16 = 4096;
/// Entries of a disk's virtqueue when its daemon is somebody else's: what such daemons have at least (QEMU's default, too).
pub const FOREIGN_DISK_QUEUE_SIZE: u16 = 128;
/// Entries of a disk's largest virtqueue (manual 2.2).
pub const MAX_DISK_QUEUE_SIZE: u16 = 1024;
/// Bytes of a block device's serial number (virtio 1.3, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
pub const BLOCK_ID_BYTES: usize = 20;

/// Bytes of guest memory under one checksum of a snapshot: small enough that a page that is wanted brings few others along.
pub const SNAPSHOT_BLOCK: u32 = 64 << 10;
/// Bytes of a snapshot's file `state`: checksums of the largest guest's blocks are 40 MiB, in-flight regions of all devices as
/// much again, a vCPU takes some 10 KiB, and shared folders up to [`MAX_DEVICE_STATE`] each.
pub const MAX_SNAPSHOT_STATE: usize = 256 << 20;
/// Bytes of what one device's process adds to that: the paths of some 300,000 files that a guest knows of a shared folder.
pub const MAX_DEVICE_STATE: usize = 32 << 20;
/// Folders that `-grant snapshot=` may name.
pub const MAX_SNAPSHOT_GRANTS: usize = 16;
/// Guest RAM regions that a front end may announce (vhost-user: `VHOST_USER_MAX_RAM_SLOTS` of old front ends is 8).
pub const MAX_MEMORY_REGIONS: usize = 32;
/// Bytes of address space in front of and behind each mapping of guest RAM that fault when touched: more than any 32-bit length
/// or offset can skip. Address space is all they cost (32 regions: 256 GiB of 128 TiB).
pub const RAM_GUARD: usize = 4 << 30;
/// Pieces of memory of one request. The kernel takes no more in one call (`UIO_MAXIOV`), and QEMU's limit is the same.
pub const MAX_CHAIN_SEGMENTS: usize = 1024;
/// Bytes of virtio configuration space that any device here has (vhost-user: 256 is the protocol's own maximum).
pub const MAX_CONFIG_SPACE: usize = 256;

/// QMP sockets of one VM.
pub const MAX_MONITORS: usize = 8;
/// Characters of a VM name (VM configuration page, "-name").
pub const MAX_NAME: usize = 255;
/// Characters of an id of a device, drive, chardev, object.
pub const MAX_ID: usize = 255;
/// Bytes of the kernel command line including its NUL (x86 boot protocol, `COMMAND_LINE_SIZE`).
pub const MAX_CMDLINE: usize = 2048;

/// One QMP request, in bytes, as QEMU's own limit on a token stream (64 MiB) is far beyond any real request.
pub const MAX_QMP_REQUEST: usize = 1 << 20;
/// Brackets inside each other in one QMP request (QEMU: 1024). No command needs more than a few.
pub const MAX_QMP_NESTING: usize = 64;
/// QMP clients at once on one socket.
pub const MAX_QMP_CLIENTS: usize = 8;
/// Descriptors that clients of QMP have passed and that have a name or are in a set, of all clients together: a card with the
/// most queues takes two for each pair.
pub const MAX_QMP_FDS: usize = 128;
/// Descriptors that one client of QMP has passed ahead of the command that they are for; of more, the oldest are closed. Clients wait for
/// an answer before they pass the next one. All clients of one socket together have as many as may have a name.
pub const MAX_QMP_WAITING_FDS: usize = MAX_QMP_FDS / MAX_QMP_CLIENTS;
/// Bytes that wait for a QMP client that does not read; beyond it the client is dropped.
pub const MAX_QMP_BACKLOG: usize = 8 << 20;
/// Bytes that wait for a QMP client, beyond which no further command of it is taken.
pub const QMP_PAUSE_BACKLOG: usize = 64 * 1024;
/// Commands that a QMP client may send at once before it is slowed down: libvirt's longest probe is a few hundred.
pub const QMP_COMMANDS_AT_ONCE: u32 = 1024;
/// Commands a second that are taken from a QMP client that has sent more than that; the others wait. Each takes main some
/// 20 microseconds, so one client that never stops costs it two percent of its time.
pub const QMP_COMMANDS_PER_SECOND: u32 = 1000;
/// Milliseconds that QMP clients have at the end of the VM to take what waits for them.
pub const QMP_FLUSH_MS: u64 = 200;
/// Bytes of serial output kept for a reader that is slow or absent; beyond it the oldest are dropped and counted.
pub const MAX_CHARDEV_BACKLOG: usize = 64 * 1024;

/// Milliseconds that a stand-alone daemon of a shared folder waits for another program that is tried, and for that one's process
/// that serves: both take some tens on an idle machine.
pub const UPGRADE_PATIENCE_MS: u64 = 10_000;
/// Milliseconds that the broker waits for a keeper to end the process that serves; then it ends both.
pub const KEEPER_PATIENCE_MS: u64 = 2000;
/// Requests of one guest that wait for a lock on a shared folder's file.
pub const MAX_FS_WAITERS: usize = 64;
/// Milliseconds after which it is asked anew for a lock that somebody on the host may have given back.
pub const FS_LOCK_RETRY_MS: u64 = 10;
/// Milliseconds that a new keeper has to be ready, and then to have taken over a million descriptors. The broker does other work
/// meanwhile.
pub const HAND_OVER_PATIENCE_MS: u64 = 10_000;

/// Milliseconds that the control process waits for a device process to answer one vhost-user message.
pub const DEVICE_REPLY_MS: u64 = 5_000;
/// The same for the first answer of a process that has just been started: it says that the jail is shut. Ten on an idle machine; on one
/// whose processors are all wanted another process would not be sooner.
pub const DEVICE_START_MS: u64 = 15_000;
/// Milliseconds for which a snapshot waits for devices whose processes are being replaced: that one of them does not answer is found
/// out in half of it.
pub const SNAPSHOT_WAIT_MS: u64 = 2 * DEVICE_REPLY_MS;
/// Milliseconds of one queue's turn, after which a device process takes no further request before it has looked at the control
/// process's messages and its other queues: far less than [`DEVICE_REPLY_MS`], whatever a guest asks for.
pub const DEVICE_TURN_MS: u64 = 50;
/// Milliseconds that a vCPU waits for the end of a device process that does not give its queues back. The broker kills and
/// reaps within a few; the limit is for a main loop that itself waits for this vCPU to pause.
pub const DEVICE_END_MS: u64 = 1_000;
/// Milliseconds in which a device process may be restarted `max-restarts` times. A fault that a guest's request causes comes
/// back with every replay of that request, within milliseconds; one that is not the guest's comes once in a long while.
pub const RESTART_WINDOW_MS: u64 = 10_000;
/// Restarts of one device in [`RESTART_WINDOW_MS`] when `max-restarts` is not given: enough for an operator who kills a
/// process again and again, and a device that cannot be saved costs the host five process starts.
pub const DEFAULT_RESTARTS: u16 = 5;
/// Largest `max-restarts`: one restart every 10 ms, which is about as fast as a process starts.
pub const MAX_RESTARTS: u16 = 1_000;
/// Bytes of one log line that a device process may send; longer ones are cut.
pub const MAX_LOG_LINE: usize = 1024;
/// Log lines a second that a guest or a peer may cause in one process; beyond it they are counted and dropped.
pub const MAX_LOG_LINES_PER_SECOND: u32 = 100;
/// Of these, lines that may come from one place in the code, so that a flood of one kind leaves room for others.
pub const MAX_LOG_LINES_PER_PLACE: u32 = 20;

/// Bytes of private memory that a device process may write to. The largest need is a few MiB, for a card or disk with all
/// its queues; the rest is room for what a device keeps of its image's structure.
pub const MAX_DEVICE_MEMORY: u64 = 128 << 20;
/// Bytes that a shared folder's process may take besides for each descriptor that it may hold: what it knows of an inode, with
/// room for the tables to double.
pub const FS_INODE_MEMORY: u64 = 1024;
/// Bytes of a device's in-flight region: 16 a descriptor (vhost-user, "Inflight description"), for the largest device,
/// rounded up generously. Also the largest file that a device without a writable image may make.
pub const MAX_INFLIGHT_REGION: u64 = 4 << 20;

/// Packets or bytes a second that a card can be limited to, and its bucket: 1 TiB.
pub const MAX_NET_RATE: u64 = 1 << 40;

/// Threads of one process that the broker tells about: more than a VM has vCPUs, and few enough for [`MAX_MESSAGE`].
pub const MAX_INSPECTED_THREADS: usize = 512;
/// Descriptors of one process that the broker tells about. A control process with the most devices and queues has some 900.
pub const MAX_INSPECTED_FDS: usize = 1536;
/// File names, and bytes of each, that the broker tells about where there should be none.
pub const MAX_INSPECTED_NAMES: usize = 16;
/// Bytes of one name that the broker tells: of a thread, a descriptor's kind, a file.
pub const MAX_INSPECTED_NAME: usize = 64;
/// Bytes of one file of `/proc` that the broker reads: a control process's `maps` with the most devices is below 64 KiB.
pub const MAX_PROC_FILE: u64 = 1 << 20;

/// Inodes that one guest may know of a shared folder: 80 MiB of tables, and 64 MiB of names.
pub const MAX_FS_INODES: usize = 1 << 21;
/// Names of one file of a shared folder that are remembered besides the one by which it was last looked up, and of all files together: some
/// 24 MiB, which is besides the tables.
pub const MAX_FS_NAMES_OF_ONE: usize = 8;
/// See [`MAX_FS_NAMES_OF_ONE`].
pub const MAX_FS_OTHER_NAMES: usize = 1 << 20;
/// Bytes of all tables of a shared folder, as a file; what no entry has needed takes no memory.
pub const MAX_FS_TABLES: u64 = 256 << 20;
/// Descriptors of inodes, open files and locks together that one guest may have of a shared folder. The limit of open
/// descriptors is lower on most hosts (`fs.nr_open` is 2^20) and counts first.
pub const MAX_FS_HELD: usize = 1 << 22;
/// Microseconds that a device process may look for work before it sleeps (`poll-us`): longer than any sleep and wake-up takes.
pub const MAX_POLL_US: u32 = 200;
/// `poll-us` of a disk when it is not given: about what a sleep and the wake-up from it cost both sides, and what a good disk takes for
/// a read.
pub const DEFAULT_POLL_US: u32 = 50;
/// The same for a network card: the next packet is an answer to the last one, from a process that is woken for it, in the guest or on
/// the host.
pub const NET_POLL_US: u32 = 50;
/// The same for a shared folder, whose requests come one after the other from a process of the guest that each of them wakes:
/// about what an interrupt into the guest and the way back cost.
pub const FS_POLL_US: u32 = 50;
/// Ranges of one discard or write-zeroes request (virtio 1.3, 5.2.4: `max_discard_seg`).
pub const MAX_RANGES: usize = 32;
/// Sectors of one such range (`max_discard_sectors`): 1 GiB, which no file system takes long for.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// I/Os a second that a limit may name (VM configuration page, "Disk QoS").
pub const MAX_IOPS: u32 = 1_000_000;
/// Bytes of a disk that `max-size` may name: far from where a byte's place would not fit an `off_t`.
pub const MAX_IMAGE_SIZE: u64 = 1 << 62;
/// Requests of one disk in the kernel at once: what the fastest disks have use for. The rest waits in the rings.
pub const MAX_DISK_DEPTH: u16 = 128;
/// Bytes of io_uring rings of all disks of one host user: Linux counts them together against each process's limit. A disk takes
/// some 20 KiB; one that finds no room goes without io_uring. Linux's own default is the same.
pub const MAX_RING_MEMORY: u64 = 8 << 20;
