/* A virtio-mmio driver of the plainest kind (virtio 1.3, sections 2.7 and 4.2): one split queue per number, polled. */
#pragma once
#include "payload.h"

/* Registers, section 4.2.2. */
enum {
    MMIO_MAGIC = 0x00, MMIO_VERSION = 0x04, MMIO_DEVICE_ID = 0x08, MMIO_VENDOR_ID = 0x0c,
    MMIO_DEVICE_FEATURES = 0x10, MMIO_DEVICE_FEATURES_SEL = 0x14, MMIO_DRIVER_FEATURES = 0x20,
    MMIO_DRIVER_FEATURES_SEL = 0x24, MMIO_QUEUE_SEL = 0x30, MMIO_QUEUE_NUM_MAX = 0x34, MMIO_QUEUE_NUM = 0x38,
    MMIO_QUEUE_READY = 0x44, MMIO_QUEUE_NOTIFY = 0x50, MMIO_INTERRUPT_STATUS = 0x60, MMIO_INTERRUPT_ACK = 0x64,
    MMIO_STATUS = 0x70, MMIO_QUEUE_DESC_LOW = 0x80, MMIO_QUEUE_DRIVER_LOW = 0x90, MMIO_QUEUE_DEVICE_LOW = 0xa0,
    MMIO_CONFIG_GENERATION = 0xfc, MMIO_CONFIG = 0x100,
};
enum { STATUS_ACKNOWLEDGE = 1, STATUS_DRIVER = 2, STATUS_DRIVER_OK = 4, STATUS_FEATURES_OK = 8, STATUS_NEEDS_RESET = 64 };
#define FEATURE_VERSION_1 (1ull << 32)
enum { DESC_NEXT = 1, DESC_WRITE = 2 };
enum { QUEUE_SIZE = 16 };

struct desc {
    u64 address;
    u32 length;
    u16 flags, next;
};

struct queue {
    struct desc desc[QUEUE_SIZE];
    struct {
        u16 flags, index, ring[QUEUE_SIZE];
    } avail;
    struct {
        u16 flags, index;
        struct {
            u32 id, length;
        } ring[QUEUE_SIZE];
    } used __attribute__((aligned(16)));
    u16 seen; /* of the used ring */
    u16 number;
    u64 window;
} __attribute__((aligned(4096)));

/* The window of the first device of this kind, or 0. */
u64 virtio_find(const struct boot *boot, u32 device_id);
u64 virtio_features(u64 window);
/* Reset and negotiate; 0 and a message when the device refuses. */
int virtio_begin(u64 window, u64 features);
int virtio_queue(u64 window, u16 number, struct queue *queue);
void virtio_go(u64 window);
/* Puts a chain that starts at descriptor `head` on the ring and notifies the device. */
void virtio_send(struct queue *queue, u16 head);
/* Polls until one more chain was used; returns its head and its length, or -1 when the device took too long. */
int virtio_wait(struct queue *queue, u32 *length);
