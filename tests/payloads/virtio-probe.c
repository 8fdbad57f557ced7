/* Prints one line per virtio-mmio window. Words: mmio=ADDRESS, stride=BYTES, slots=NUMBER. */
#include "virtio.h"

int payload_main(const struct boot *boot)
{
    u64 base = number(boot, "mmio", VIRTIO_MMIO_BASE), stride = number(boot, "stride", VIRTIO_MMIO_SIZE);
    u64 slots = number(boot, "slots", VIRTIO_MMIO_SLOTS), found = 0;
    for (u64 i = 0; i < slots; i++) {
        u64 window = base + i * stride;
        if (read32(window + MMIO_MAGIC) != 0x74726976)
            continue;
        u32 id = read32(window + MMIO_DEVICE_ID);
        put("slot ");
        put_dec(i);
        put(" version ");
        put_dec(read32(window + MMIO_VERSION));
        put(" id ");
        put_dec(id);
        if (id) {
            found++;
            put(" vendor ");
            put_hex(read32(window + MMIO_VENDOR_ID), 8);
            put(" features ");
            put_hex(virtio_features(window), 16);
            put(" queues");
            for (u32 q = 0; q < 64; q++) {
                write32(window + MMIO_QUEUE_SEL, q);
                u32 size = read32(window + MMIO_QUEUE_NUM_MAX);
                if (!size)
                    break;
                put(" ");
                put_dec(size);
            }
            put(" config ");
            for (u64 at = 0; at < 24; at++)
                put_hex(read8(window + MMIO_CONFIG + at), 2);
        }
        put("\r\n");
    }
    put("PROBE OK devices ");
    put_dec(found);
    put("\r\n");
    return 0;
}
