/* Two processors at one device: what one sets up, the other takes away, kicks, or rewrites while it is read. */
#include "hostile.h"

/* Where the second processor wakes up: a page below 1 MiB, told by its number. */
enum { WAKE_UP = 0x8000, LAPIC_COMMAND = 0xfee00300, INIT = 0x4500, START = 0x4600 };
extern const u8 second_begin[], second_end[];
void second_main(void);

/* A round begins when `begun` moves and is over for the second processor when `done` has followed. */
static volatile u32 begun, done, over;
static volatile u64 second_seed;

static void set(u64 offset, u32 value) { write32(victim.window + offset, value); }

/* What the other one may be changing; the structure itself is this processor's own. */
static struct ring some_ring(void)
{
    struct ring ring;
    u16 number = (u16)below(below(4) ? queues_with(~0ull) : QUEUES);
    u64 at = RINGS + (u64)number * 0x10000;
    ring_place(&ring, number, RING_SIZE, at, at + 0x8000, at + 0xc000);
    ring.next = ring.avail[1];
    return ring;
}

static void kicks(void)
{
    for (u64 turns = 1 + below(16); turns && !over; turns--) {
        struct ring ring = some_ring();
        for (u64 chains = below(8); chains; chains--)
            offer(&ring, (u16)(below(64) ? below(RING_SIZE) : rnd()));
        kick(&ring);
    }
}

static void chaotic_chains(void)
{
    struct ring ring = some_ring();
    chaos(&ring, 1);
}

/* Descriptors, indices and tables, one field at a time, with no regard to who reads them. Not counted as operations. */
static void rewrites(void)
{
    for (u64 turns = 1 + below(2000); turns && !over; turns--) {
        struct ring ring = some_ring();
        volatile struct desc *at = below(3) ? &ring.desc[below(RING_SIZE)]
                                            : (volatile struct desc *)(TABLES + below(QUEUES * SLOTS) * 0x400) + below(64);
        switch (below(8)) {
        case 0: at->address = below(2) ? ARENA + below(ram_end - ARENA) : below(2) ? ram_end - below(64) : rnd() | 1ull << 35; break;
        case 1: at->length = below(2) ? (u32)below(0x2000) : (u32)(rnd() >> below(64)); break;
        case 2: at->flags = (u16)(rnd() & 7); break;
        case 3: at->next = (u16)(below(8) ? below(RING_SIZE) : rnd()); break;
        case 4: ring.avail[below(8) ? 1 : 0] += (u16)(below(8) ? below(4) : rnd()); break;
        case 5: ring.avail[2 + below(RING_SIZE)] = (u16)(below(8) ? below(RING_SIZE) : rnd()); break;
        case 6: ring.used[below(2)] = (u16)rnd(); break;
        default: *(volatile u64 *)(HEADERS + (below(QUEUES * SLOTS * 64) & ~7ull)) = below(2) ? below(16) : rnd();
        }
    }
}

/* A driver that starts the device without looking whether it is there, or stops half-way. */
static void resets(void)
{
    static const u32 all = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
    for (u64 turns = 1 + below(8); turns && !over; turns--) {
        u64 features = FEATURE_VERSION_1 | (below(2) ? victim.features : victim.features & rnd());
        set(MMIO_STATUS, 0);
        me()->count.resets++;
        me()->count.registers++;
        if (below(4) == 0)
            continue;
        set(MMIO_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        set(MMIO_DRIVER_FEATURES_SEL, 1);
        set(MMIO_DRIVER_FEATURES, (u32)(features >> 32));
        set(MMIO_DRIVER_FEATURES_SEL, 0);
        set(MMIO_DRIVER_FEATURES, (u32)features);
        set(MMIO_STATUS, all);
        me()->count.registers += 6;
        for (u16 number = 0; number < queues_with(features); number++) {
            struct ring ring = some_ring();
            ring.number = number;
            ring.size = (u16)(below(4) ? RING_SIZE : 1u << below(11));
            ring_tell(&ring);
            me()->count.registers += 9;
        }
        if (below(8)) {
            set(MMIO_STATUS, all | STATUS_DRIVER_OK);
            me()->count.registers++;
        }
    }
}

static void registers(void)
{
    for (u64 turns = 1 + below(8); turns && !over; turns--)
        register_burst(1 + below(32));
}

static void configuration(void)
{
    for (u64 turns = 1 + below(64); turns && !over; turns--) {
        (void)read32(victim.window + MMIO_CONFIG_GENERATION);
        (void)read32(victim.window + MMIO_CONFIG + (below(64) & ~3ull));
        set(MMIO_INTERRUPT_ACK, (u32)below(4));
        me()->count.registers += 3;
    }
}

static void some_part(void)
{
    static void (*const parts[])(void) = {kicks, kicks, chaotic_chains, rewrites, rewrites, resets, resets, registers, configuration};
    parts[below(sizeof parts / sizeof *parts)]();
}

void second_main(void)
{
    for (;;) {
        u32 round = done + 1;
        while (begun != round)
            spin();
        me()->random = second_seed;
        while (!over)
            some_part();
        barrier();
        done = round;
    }
}

/* One round: both at it until this one has done its share. The device is as it may be then. */
void race(void)
{
    u64 features = victim.features & (below(2) ? ~0ull : rnd());
    victim_start(FEATURE_VERSION_1 | features);
    second_seed = rnd();
    over = 0;
    barrier();
    begun++;
    for (u64 parts = 4 + below(12); parts; parts--)
        some_part();
    over = 1;
    for (u64 start = tsc(); done != begun;) {
        spin();
        second_check();
        if (tsc() - start > 80000000000ull)
            fail("the second processor is lost", done);
    }
    me()->count.needs_reset += (u64)needs_reset();
}

void race_set_up(void)
{
    memcpy((void *)WAKE_UP, second_begin, (u64)(second_end - second_begin));
    u32 before = done;
    second_seed = 1;
    over = 1;
    begun = before + 1;
    barrier();
    write32(LAPIC_COMMAND + 0x10, 1u << 24);
    write32(LAPIC_COMMAND, INIT);
    for (u64 start = tsc(), next = start; done != begun;) {
        spin();
        if (tsc() >= next) {
            write32(LAPIC_COMMAND + 0x10, 1u << 24);
            write32(LAPIC_COMMAND, START | WAKE_UP >> 12);
            next = tsc() + 200000000;
        }
        if (tsc() - start > 80000000000ull)
            fail("there is no second processor", 0);
    }
}
