/* Starts a device of any kind, with its first queues, and sleeps (virtio 1.3, section 3.1.1).
 * Words: device=ID (virtio device ID), queues=NUMBER (at most 4), features=BITS (of bits 0 to 31, those to accept). */
#include "virtio.h"

static struct queue queues[4];

int payload_main(const struct boot *boot)
{
    u64 window = virtio_find(boot, (u32)number(boot, "device", 2));
    if (!window || !virtio_begin(window, FEATURE_VERSION_1 | number(boot, "features", 0)))
        return 1;
    u64 count = number(boot, "queues", 1);
    for (u32 i = 0; i < count && i < 4; i++)
        if (!virtio_queue(window, i, &queues[i]))
            return 1;
    virtio_go(window);
    put("STARTED\r\n");
    for (;;)
        __asm__ volatile("hlt");
}
