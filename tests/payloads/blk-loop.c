/* Writes and reads the first disk without a pause, several requests in flight, and checks every byte (virtio 1.3,
 * section 5.2). Words: bursts=NUMBER (default 200), each of one write and one read to each of DEPTH places; the reads are
 * of what the burst before wrote, to the places before. Says "LOOP n" before every 10th burst. spin=1: goes on until the
 * serial port receives a byte. span=SECTORS (default 8): the places go round in so many sectors. reads=1: writes nothing, and reads whatever is there. again=1: says "IDLE" afterwards,
 * waits for a byte, resets the disk and does it once more. */
#include "virtio.h"

enum { SECTOR = 512, DEPTH = 2, WORDS = 2 * SECTOR / 8, BLK_READ = 0, BLK_WRITE = 1, FIRST = 16 };

static struct queue queue;
static struct slot {
    u32 type, reserved;
    u64 sector;
    u64 data[WORDS];
    volatile u8 status;
} slots[2 * DEPTH] __attribute__((aligned(16)));

static u64 pattern(u64 burst, u64 place, u64 word)
{
    return ((burst + 1) << 40 ^ place << 20 ^ word) * 0x9e3779b97f4a7c15ull;
}

static void submit(u16 at, u32 type, u64 sector)
{
    struct slot *slot = &slots[at];
    u16 head = at * 3;
    slot->type = type;
    slot->sector = sector;
    slot->status = 0xff;
    u16 flags = type == BLK_WRITE ? DESC_NEXT : DESC_NEXT | DESC_WRITE;
    queue.desc[head] = (struct desc){(u64)slot, 16, DESC_NEXT, head + 1};
    queue.desc[head + 1] = (struct desc){(u64)slot->data, sizeof slot->data, flags, head + 2};
    queue.desc[head + 2] = (struct desc){(u64)&slot->status, 1, DESC_WRITE, 0};
    virtio_send(&queue, head);
}

static int fail(const char *what, u64 value)
{
    put(what);
    put_dec(value);
    put("\r\n");
    return 1;
}

static int key(void)
{
    if (!(inb(SERIAL_PORT + 5) & 1))
        return 0;
    inb(SERIAL_PORT);
    return 1;
}

static int loop(const struct boot *boot, u64 window)
{
    memset(&queue, 0, sizeof queue);
    if (!virtio_begin(window, virtio_features(window) & (FEATURE_VERSION_1 | 1ull << 9)))
        return 1;
    if (!virtio_queue(window, 0, &queue))
        return 1;
    virtio_go(window);
    u64 bursts = number(boot, "bursts", 200), burst = 0;
    u64 span = number(boot, "span", 8);
    int spin = number(boot, "spin", 0) != 0, reads = number(boot, "reads", 0) != 0;
    for (; spin ? !key() : burst < bursts; burst++) {
        if (burst % 10 == 0) {
            put("LOOP ");
            put_dec(burst);
            put("\r\n");
        }
        for (u16 i = 0; i < DEPTH; i++) {
            for (u64 w = 0; w < WORDS; w++) {
                slots[i].data[w] = pattern(burst, i, w);
                slots[DEPTH + i].data[w] = ~0ull;
            }
            submit(i, reads ? BLK_READ : BLK_WRITE, FIRST + (burst * DEPTH + i) * 2 % span);
            /* Of the first burst, those that the second one is going to write. */
            u64 before = burst ? burst - 1 : 1;
            submit(DEPTH + i, BLK_READ, FIRST + (before * DEPTH + i) * 2 % span);
        }
        u32 seen = 0;
        for (int done = 0; done < 2 * DEPTH; done++) {
            u32 length = 0;
            int head = virtio_wait(&queue, &length);
            if (head < 0)
                return fail("no answer in burst ", burst);
            u32 at = (u32)head / 3;
            if (head % 3 || at >= 2 * DEPTH || seen & 1u << at)
                return fail("completed twice or never asked for: head ", (u64)head);
            seen |= 1u << at;
            if (slots[at].status != 0)
                return fail("status ", slots[at].status);
            if (length != (at < DEPTH && !reads ? 1 : 1 + sizeof slots[at].data))
                return fail("used length ", length);
        }
        for (u64 i = 0; burst && !reads && i < DEPTH; i++)
            for (u64 w = 0; w < WORDS; w++)
                if (slots[DEPTH + i].data[w] != pattern(burst - 1, i, w))
                    return fail("differs in burst ", burst);
        if (queue.used.index != queue.avail.index)
            return fail("more completions than requests in burst ", burst);
    }
    put("BLK-LOOP OK bursts ");
    put_dec(burst);
    put("\r\n");
    return 0;
}

int payload_main(const struct boot *boot)
{
    u64 window = virtio_find(boot, 2);
    if (!window || loop(boot, window))
        return 1;
    if (!number(boot, "again", 0))
        return 0;
    put("IDLE\r\n");
    while (!key())
        ;
    return loop(boot, window);
}
