/* Misuse of virtio-mmio registers and configuration space (virtio 1.3, section 4.2.2). */
#include "hostile.h"

static u32 get(u64 offset) { return read32(victim.window + offset); }
static void set(u64 offset, u32 value) { write32(victim.window + offset, value); }
static void write8(u64 address, u8 value) { *(volatile u8 *)address = value; }
static void write16(u64 address, u16 value) { *(volatile u16 *)address = value; }
static void write64(u64 address, u64 value) { *(volatile u64 *)address = value; }
static u16 read16(u64 address) { return *(volatile u16 *)address; }
static u64 read64(u64 address) { return *(volatile u64 *)address; }

static void must(int holds, const char *what, u64 value)
{
    me()->count.registers++;
    if (!holds)
        fail(what, value);
}

enum { BEFORE = STATUS_ACKNOWLEDGE | STATUS_DRIVER, NEGOTIATED = BEFORE | STATUS_FEATURES_OK, RUNNING = NEGOTIATED | STATUS_DRIVER_OK };

static void refused(u64 features)
{
    set(MMIO_STATUS, 0);
    set(MMIO_STATUS, BEFORE);
    set(MMIO_DRIVER_FEATURES_SEL, 1);
    set(MMIO_DRIVER_FEATURES, (u32)(features >> 32));
    set(MMIO_DRIVER_FEATURES_SEL, 0);
    set(MMIO_DRIVER_FEATURES, (u32)features);
    set(MMIO_STATUS, NEGOTIATED);
    must(get(MMIO_STATUS) == BEFORE, "features that were not offered are accepted: ", features);
    /* A driver that does not look. */
    set(MMIO_STATUS, RUNNING);
    must(get(MMIO_STATUS) == BEFORE, "a device without features runs", get(MMIO_STATUS));
    ring_default(&rings[0], 0, RING_SIZE);
    ring_tell(&rings[0]);
    must(!get(MMIO_QUEUE_READY), "a queue is ready before the features are settled", 0);
}

static void frozen(void)
{
    /* Everything about queue 0 changes, and nothing happens. */
    set(MMIO_QUEUE_SEL, 0);
    set(MMIO_QUEUE_READY, 0);
    must(get(MMIO_QUEUE_READY) == 1, "a running queue was stopped", 0);
    set(MMIO_QUEUE_NUM, 4);
    for (u64 offset = MMIO_QUEUE_DESC_LOW; offset <= MMIO_QUEUE_DEVICE_LOW + 4; offset += 4)
        set(offset, (u32)rnd());
    set(MMIO_QUEUE_READY, 1);
    for (u32 queue = 1; queue < 40; queue++) {
        set(MMIO_QUEUE_SEL, queue);
        set(MMIO_QUEUE_NUM, 16);
        set(MMIO_QUEUE_DESC_LOW, ARENA);
        set(MMIO_QUEUE_READY, 1);
    }
    set(MMIO_DRIVER_FEATURES_SEL, 0);
    set(MMIO_DRIVER_FEATURES, ~0u);
    for (u32 status = 1; status < 128; status++) {
        u32 before = get(MMIO_STATUS);
        set(MMIO_STATUS, status); /* takes bits back */
        must(get(MMIO_STATUS) == before, "the status has changed: ", get(MMIO_STATUS));
    }
    for (u32 bit = 8; bit < 32; bit++)
        set(MMIO_STATUS, 1u << bit);
    must(get(MMIO_STATUS) == RUNNING, "the status has changed: ", get(MMIO_STATUS));
}

static void doorbells(void)
{
    for (u32 queue = 0; queue < 70; queue++)
        set(MMIO_QUEUE_NOTIFY, queue);
    for (u32 bit = 6; bit < 32; bit++)
        set(MMIO_QUEUE_NOTIFY, 1u << bit);
    set(MMIO_QUEUE_NOTIFY, ~0u);
    write8(victim.window + MMIO_QUEUE_NOTIFY, 0);
    write16(victim.window + MMIO_QUEUE_NOTIFY, 0);
    write64(victim.window + MMIO_QUEUE_NOTIFY, 0);
    write32(victim.window + MMIO_QUEUE_NOTIFY + 1, 0);
    me()->count.registers += 101;
}

void register_cases(void)
{
    case_begin("features that were never offered");
    refused(0);
    refused(FEATURE_VERSION_1 ^ victim.features);
    for (int bit = 0; bit < 64; bit++)
        if (!(victim.features & 1ull << bit))
            refused(FEATURE_VERSION_1 | 1ull << bit);
    case_end();

    case_begin("features beyond the 64th");
    set(MMIO_STATUS, 0);
    set(MMIO_STATUS, BEFORE);
    set(MMIO_DRIVER_FEATURES_SEL, 1);
    set(MMIO_DRIVER_FEATURES, 1);
    for (u32 word = 2; word < 6; word++) {
        set(MMIO_DEVICE_FEATURES_SEL, word);
        must(get(MMIO_DEVICE_FEATURES) == 0, "features beyond the 64th are offered", word);
        set(MMIO_DRIVER_FEATURES_SEL, word);
        set(MMIO_DRIVER_FEATURES, 1u << word);
    }
    set(MMIO_STATUS, NEGOTIATED);
    must(get(MMIO_STATUS) == BEFORE, "features beyond the 64th are accepted", 0);
    case_end();

    case_begin("a status that jumps");
    set(MMIO_STATUS, 0);
    set(MMIO_STATUS, STATUS_DRIVER_OK);
    must(!(get(MMIO_STATUS) & STATUS_DRIVER_OK), "DRIVER_OK alone counts", get(MMIO_STATUS));
    set(MMIO_STATUS, 0);
    set(MMIO_STATUS, STATUS_FEATURES_OK);
    must(!(get(MMIO_STATUS) & STATUS_FEATURES_OK), "FEATURES_OK alone counts", get(MMIO_STATUS));
    set(MMIO_STATUS, 0);
    set(MMIO_STATUS, STATUS_NEEDS_RESET);
    must(get(MMIO_STATUS) == 0, "the driver sets the device's bit", get(MMIO_STATUS));
    set(MMIO_STATUS, 128);
    set(MMIO_STATUS, 128 | RUNNING);
    must(!(get(MMIO_STATUS) & STATUS_DRIVER_OK), "a driver that gave up goes on", get(MMIO_STATUS));
    case_end();

    case_begin("queues of sizes that none has");
    victim_negotiate(FEATURE_VERSION_1);
    static const u32 sizes[] = {0, 3, 255, 257, 1023, 1025, 2048, 4096, 0x8000, 0x10000, 0x10100, 0x80000000, ~0u};
    for (u64 i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        ring_default(&rings[0], 0, RING_SIZE);
        set(MMIO_QUEUE_SEL, 0);
        set(MMIO_QUEUE_NUM, sizes[i]);
    }
    /* None of them was taken: the queue works with the size that it has at first. */
    for (u16 i = 0; i < queues_with(FEATURE_VERSION_1); i++) {
        ring_default(&rings[i], i, RING_SIZE);
        ring_tell(&rings[i]);
    }
    victim_go();
    victim_check();
    case_end();

    case_begin("misaligned queues");
    static const u32 off[][3] = {{8, 0, 0}, {1, 0, 0}, {0, 1, 0}, {0, 0, 2}, {0, 0, 1}};
    for (u64 i = 0; i < sizeof off / sizeof *off; i++) {
        victim_negotiate(FEATURE_VERSION_1);
        struct ring bad;
        ring_place(&bad, 0, 16, RINGS + off[i][0], RINGS + 0x1000 + off[i][1], RINGS + 0x2000 + off[i][2]);
        ring_tell(&bad);
        must(!get(MMIO_QUEUE_READY), "a misaligned queue is ready", i);
        set(MMIO_QUEUE_READY, 2);
        set(MMIO_QUEUE_READY, ~0u);
        must(!get(MMIO_QUEUE_READY), "a misaligned queue is ready", i);
        victim_go();
        doorbells();
        must(!needs_reset(), "queues that were never ready break the device", i);
    }
    case_end();

    case_begin("changes to a running queue");
    victim_start(FEATURE_VERSION_1);
    frozen();
    victim_check();
    case_end();

    case_begin("doorbells of queues that are not there");
    set(MMIO_STATUS, 0);
    doorbells();
    victim_negotiate(FEATURE_VERSION_1);
    doorbells();
    victim_go();
    doorbells();
    victim_start(FEATURE_VERSION_1);
    doorbells();
    victim_check();
    expect_quiet("doorbells broke the device");
    case_end();

    case_begin("doorbells of a broken device");
    victim_start(FEATURE_VERSION_1);
    rings[0].next = 0x8000;
    kick(&rings[0]);
    wait_needs_reset("an index jump and no reset asked for");
    for (int i = 0; i < 100; i++)
        doorbells();
    set(MMIO_STATUS, RUNNING);
    must(get(MMIO_STATUS) == (RUNNING | STATUS_NEEDS_RESET), "NEEDS_RESET has gone without a reset", get(MMIO_STATUS));
    case_end();

    case_begin("accesses that are not 32 bits wide");
    victim_start(FEATURE_VERSION_1);
    for (u64 offset = 0; offset < MMIO_CONFIG; offset++) {
        u64 at = victim.window + offset;
        must(read8(at) == 0, "8 bits of a register at ", offset);
        must(read16(at) == 0 || offset == 0xff, "16 bits of a register at ", offset);
        must(read64(at) == 0 || offset > 0xf8, "64 bits of a register at ", offset);
        must(offset % 4 == 0 || read32(at) == 0 || offset > 0xfc, "a misaligned register at ", offset);
        write8(at, 0);
        write16(at, 0);
        if (offset <= 0xf8)
            write64(at, 0);
        if (offset % 4 && offset < 0xfc)
            write32(at, 0);
    }
    must(get(MMIO_STATUS) == RUNNING, "a narrow write has changed the status: ", get(MMIO_STATUS));
    victim_check();
    case_end();

    case_begin("registers that are not there");
    for (u64 offset = 0; offset < MMIO_CONFIG; offset += 4) {
        if (offset == MMIO_STATUS || offset == MMIO_QUEUE_NOTIFY)
            continue;
        (void)get(offset);
        set(offset, 0);
        set(offset, ~0u);
        me()->count.registers += 3;
    }
    must(get(MMIO_MAGIC) == 0x74726976, "the magic value has changed", get(MMIO_MAGIC));
    case_end();

    case_begin("configuration space and what is behind it");
    victim_start(FEATURE_VERSION_1);
    u64 first = read64(victim.window + MMIO_CONFIG);
    for (u64 offset = MMIO_CONFIG; offset < VIRTIO_MMIO_SIZE; offset += 1 + below(8)) {
        u64 at = victim.window + offset;
        if (offset >= MMIO_CONFIG + 256)
            must(read8(at) == 0, "a byte behind configuration space at ", offset);
        (void)read16(at);
        (void)read32(at);
        write8(at, 0xff);
        write16(at, 0xffff);
        write32(at, ~0u);
        if (offset + 8 <= VIRTIO_MMIO_SIZE) {
            (void)read64(at);
            write64(at, ~0ull);
        }
        me()->count.registers += 7;
    }
    must(read64(victim.window + MMIO_CONFIG) == first, "configuration space has changed", 0);
    expect_quiet("writes to configuration space broke the device");
    victim_check();
    case_end();
}

/* Random accesses in no order at all. Addresses that a queue may get are in the arena, outside of RAM, or 0. */
void register_burst(u64 accesses)
{
    static const u8 known[] = {0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xfc};
    static const u32 values[] = {0, 1, 2, 3, 4, 7, 8, 11, 15, 16, 128, 256, 1024, 0xffff, 0x80000000, ~0u};
    for (; accesses; accesses--) {
        u64 offset = below(8) ? known[below(sizeof known)] : below(8) ? below(MMIO_CONFIG + 64) : below(VIRTIO_MMIO_SIZE - 8);
        u64 value = below(2) ? values[below(sizeof values / sizeof *values)] : rnd();
        if (offset >= MMIO_QUEUE_DESC_LOW && offset < 0xa8 && !(offset & 4))
            value = below(4) ? ARENA + (below(ram_end - ARENA) & ~15ull) : ram_end + (rnd() & 0x7ffffff0);
        else if (offset >= MMIO_QUEUE_DESC_LOW && offset < 0xa8)
            value = below(4) ? 0 : rnd();
        u64 at = victim.window + offset;
        me()->count.registers++;
        switch (below(24)) {
        case 0: (void)read8(at); break;
        case 1: (void)read16(at); break;
        case 2: (void)read64(at); break;
        case 3: case 4: case 5: case 6: (void)read32(at); break;
        case 7: write8(at, (u8)value); break;
        case 8: write16(at, (u16)value); break;
        case 9: write64(at, value); break;
        default: write32(at, (u32)value);
        }
    }
}
