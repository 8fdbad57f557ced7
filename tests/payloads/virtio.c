#include "virtio.h"

u64 virtio_find(const struct boot *boot, u32 device_id)
{
    u64 base = number(boot, "mmio", VIRTIO_MMIO_BASE), stride = number(boot, "stride", VIRTIO_MMIO_SIZE);
    u64 slots = number(boot, "slots", VIRTIO_MMIO_SLOTS);
    for (u64 i = 0; i < slots; i++) {
        u64 window = base + i * stride;
        if (read32(window + MMIO_MAGIC) == 0x74726976 && read32(window + MMIO_DEVICE_ID) == device_id)
            return window;
    }
    put("no device with id ");
    put_dec(device_id);
    put("\r\n");
    return 0;
}

u64 virtio_features(u64 window)
{
    write32(window + MMIO_DEVICE_FEATURES_SEL, 1);
    u64 high = read32(window + MMIO_DEVICE_FEATURES);
    write32(window + MMIO_DEVICE_FEATURES_SEL, 0);
    return high << 32 | read32(window + MMIO_DEVICE_FEATURES);
}

int virtio_begin(u64 window, u64 features)
{
    write32(window + MMIO_STATUS, 0);
    while (read32(window + MMIO_STATUS))
        ;
    write32(window + MMIO_STATUS, STATUS_ACKNOWLEDGE);
    write32(window + MMIO_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    write32(window + MMIO_DRIVER_FEATURES_SEL, 1);
    write32(window + MMIO_DRIVER_FEATURES, (u32)(features >> 32));
    write32(window + MMIO_DRIVER_FEATURES_SEL, 0);
    write32(window + MMIO_DRIVER_FEATURES, (u32)features);
    write32(window + MMIO_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
    if (read32(window + MMIO_STATUS) & STATUS_FEATURES_OK)
        return 1;
    put("features refused\r\n");
    return 0;
}

int virtio_queue(u64 window, u16 number, struct queue *queue)
{
    queue->window = window;
    queue->number = number;
    write32(window + MMIO_QUEUE_SEL, number);
    if (read32(window + MMIO_QUEUE_NUM_MAX) < QUEUE_SIZE || read32(window + MMIO_QUEUE_READY)) {
        put("queue is too small or already in use\r\n");
        return 0;
    }
    write32(window + MMIO_QUEUE_NUM, QUEUE_SIZE);
    u64 addresses[3] = {(u64)queue->desc, (u64)&queue->avail, (u64)&queue->used};
    u32 registers[3] = {MMIO_QUEUE_DESC_LOW, MMIO_QUEUE_DRIVER_LOW, MMIO_QUEUE_DEVICE_LOW};
    for (int i = 0; i < 3; i++) {
        write32(window + registers[i], (u32)addresses[i]);
        write32(window + registers[i] + 4, (u32)(addresses[i] >> 32));
    }
    write32(window + MMIO_QUEUE_READY, 1);
    return 1;
}

void virtio_go(u64 window)
{
    write32(window + MMIO_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
}

void virtio_send(struct queue *queue, u16 head)
{
    queue->avail.ring[queue->avail.index % QUEUE_SIZE] = head;
    barrier();
    queue->avail.index++;
    barrier();
    write32(queue->window + MMIO_QUEUE_NOTIFY, queue->number);
}

int virtio_wait(struct queue *queue, u32 *length)
{
    volatile u16 *index = &queue->used.index;
    /* Bounded: a guest that polls for ever would hide a device that never answers. A second or two of guest time. */
    for (u64 turn = 0; *index == queue->seen; turn++) {
        if (turn == 3000000) {
            put("the device does not answer, status ");
            put_hex(read32(queue->window + MMIO_STATUS), 2);
            put("\r\n");
            return -1;
        }
        __asm__ volatile("pause" : : : "memory");
    }
    barrier();
    u16 at = queue->seen++ % QUEUE_SIZE;
    if (length)
        *length = queue->used.ring[at].length;
    return (int)queue->used.ring[at].id;
}
