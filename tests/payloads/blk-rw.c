/* Writes sectors of the first disk, flushes, reads them back and compares (virtio 1.3, section 5.2).
 * Words: sector=FIRST (default 8), count=SECTORS (default 8), rounds=NUMBER (default 4), seed=NUMBER of the pattern,
 * zero=1 (every second round writes zeroes),
 * readonly=1 (expect the write to be refused, read and print the first bytes instead). */
#include "virtio.h"

enum { SECTOR = 512, MOST = 64, BLK_READ = 0, BLK_WRITE = 1, BLK_FLUSH = 4, BLK_GET_ID = 8 };
#define FEATURE_RO (1ull << 5)
#define FEATURE_FLUSH (1ull << 9)

static struct queue queue;
static u64 data[MOST * SECTOR / 8];
static struct {
    u32 type, reserved;
    u64 sector;
} header;
static volatile u8 status;

/* One request of up to three descriptors; returns the device's status byte, or -1 when it does not answer. */
static int request(u32 type, u64 sector, void *buffer, u32 bytes)
{
    header.type = type;
    header.sector = sector;
    status = 0xff;
    queue.desc[0] = (struct desc){(u64)&header, sizeof header, DESC_NEXT, 1};
    u16 last = 1;
    if (bytes) {
        u16 flags = type == BLK_WRITE ? DESC_NEXT : DESC_NEXT | DESC_WRITE;
        queue.desc[1] = (struct desc){(u64)buffer, bytes, flags, 2};
        last = 2;
    }
    queue.desc[last] = (struct desc){(u64)&status, 1, DESC_WRITE, 0};
    virtio_send(&queue, 0);
    u32 length = 0;
    if (virtio_wait(&queue, &length) != 0)
        return -1;
    u32 expected = 1 + (type == BLK_WRITE ? 0 : bytes);
    if (status == 0 && length != expected && type != BLK_GET_ID) {
        put("used length ");
        put_dec(length);
        put(" is not ");
        put_dec(expected);
        put("\r\n");
        return -1;
    }
    return status;
}

static u64 pattern(u64 seed, u64 at) { return (seed << 32 ^ at) * 0x9e3779b97f4a7c15ull; }

int payload_main(const struct boot *boot)
{
    u64 window = virtio_find(boot, 2);
    if (!window)
        return 1;
    u64 offered = virtio_features(window);
    if (!virtio_begin(window, offered & (FEATURE_VERSION_1 | FEATURE_RO | FEATURE_FLUSH)))
        return 1;
    u64 capacity = read32(window + MMIO_CONFIG) | (u64)read32(window + MMIO_CONFIG + 4) << 32;
    if (!virtio_queue(window, 0, &queue))
        return 1;
    virtio_go(window);
    put("BLK capacity ");
    put_dec(capacity);
    put(offered & FEATURE_RO ? " readonly" : " writable");
    static char id[21];
    int result = request(BLK_GET_ID, 0, id, 20);
    put(" id ");
    put(result == 0 ? id : "none");
    put("\r\n");

    u64 first = number(boot, "sector", 8), count = number(boot, "count", 8);
    u64 rounds = number(boot, "rounds", 4), seed = number(boot, "seed", 1);
    if (count > MOST)
        count = MOST;
    u64 words = count * SECTOR / 8, zero = number(boot, "zero", 0);
    if (number(boot, "readonly", 0)) {
        result = request(BLK_WRITE, first, data, (u32)(count * SECTOR));
        put("BLK write status ");
        put_dec((u64)result);
        put("\r\n");
        if (result == 0 || request(BLK_READ, first, data, (u32)(count * SECTOR)) != 0)
            return 1;
        put("BLK first bytes ");
        for (int i = 0; i < 16; i++)
            put_hex(((u8 *)data)[i], 2);
        put("\r\nBLK-RO OK\r\n");
        return 0;
    }
    for (u64 round = 0; round < rounds; round++) {
        u64 sector = first + round * count;
        for (u64 i = 0; i < words; i++)
            data[i] = zero && round % 2 ? 0 : pattern(seed, sector * SECTOR / 8 + i);
        result = request(BLK_WRITE, sector, data, (u32)(count * SECTOR));
        if (result == 0 && (offered & FEATURE_FLUSH))
            result = request(BLK_FLUSH, 0, 0, 0);
        for (u64 i = 0; i < words; i++)
            data[i] = ~0ull;
        if (result == 0)
            result = request(BLK_READ, sector, data, (u32)(count * SECTOR));
        if (result != 0) {
            put("request status ");
            put_dec((u64)result);
            put("\r\n");
            return 1;
        }
        for (u64 i = 0; i < words; i++)
            if (data[i] != (zero && round % 2 ? 0 : pattern(seed, sector * SECTOR / 8 + i))) {
                put("differs in sector ");
                put_dec(sector + i * 8 / SECTOR);
                put("\r\n");
                return 1;
            }
    }
    /* Behind the end: the device must say so and not write there. */
    result = request(BLK_READ, capacity, data, SECTOR);
    put("BLK behind the end status ");
    put_dec((u64)result);
    put("\r\n");
    if (result != 1)
        return 1;
    put("BLK-RW OK sectors ");
    put_dec(rounds * count);
    put("\r\n");
    return 0;
}
