/* Queues of the device under attack, and what it says about itself. */
#include "hostile.h"

/* Cycles that something may take that must happen: tens of seconds, on any processor, since the machine may be busy. */
#define PATIENCE 80000000000ull

struct victim victim;
struct ring rings[QUEUES];

u16 queues_with(u64 features)
{
    if (victim.id == 1)
        return features & FEATURE_CTRL_VQ ? 3 : 2;
    return features & FEATURE_BLK_MQ ? victim.queues : 1;
}

static u32 get(u64 offset) { return read32(victim.window + offset); }
static void set(u64 offset, u32 value) { write32(victim.window + offset, value); }

void victim_reset(void)
{
    me()->count.resets++;
    set(MMIO_STATUS, 0);
    if (get(MMIO_STATUS))
        fail("status after a reset ", get(MMIO_STATUS));
    if (get(MMIO_INTERRUPT_STATUS))
        fail("interrupt status after a reset ", get(MMIO_INTERRUPT_STATUS));
}

void victim_negotiate(u64 features)
{
    victim.accepted = features;
    if (!virtio_begin(victim.window, features))
        fail("features refused ", features);
}

void ring_place(struct ring *ring, u16 number, u16 size, u64 desc, u64 avail, u64 used)
{
    *ring = (struct ring){.number = number, .size = size};
    ring->desc = (void *)desc;
    ring->avail = (void *)avail;
    ring->used = (void *)used;
}

void ring_default(struct ring *ring, u16 number, u16 size)
{
    u64 at = RINGS + (u64)number * 0x10000;
    ring_place(ring, number, size, at, at + 0x8000, at + 0xc000);
    memset((void *)at, 0, 0x10000);
}

void ring_tell(const struct ring *ring)
{
    set(MMIO_QUEUE_SEL, ring->number);
    set(MMIO_QUEUE_NUM, ring->size);
    u64 addresses[3] = {(u64)ring->desc, (u64)ring->avail, (u64)ring->used};
    u32 registers[3] = {MMIO_QUEUE_DESC_LOW, MMIO_QUEUE_DRIVER_LOW, MMIO_QUEUE_DEVICE_LOW};
    for (int i = 0; i < 3; i++) {
        set(registers[i], (u32)addresses[i]);
        set(registers[i] + 4, (u32)(addresses[i] >> 32));
    }
    set(MMIO_QUEUE_READY, 1);
}

void victim_go(void) { virtio_go(victim.window); }

void victim_start(u64 features)
{
    victim_negotiate(features);
    for (u16 i = 0; i < queues_with(features); i++) {
        ring_default(&rings[i], i, RING_SIZE);
        ring_tell(&rings[i]);
    }
    victim_go();
}

void offer(struct ring *ring, u16 head)
{
    ring->avail[2 + ring->next % ring->size] = head;
    ring->next++;
    me()->count.chains++;
}

void kick(const struct ring *ring)
{
    barrier();
    ring->avail[1] = ring->next;
    barrier();
    set(MMIO_QUEUE_NOTIFY, ring->number);
}

u16 used_index(const struct ring *ring) { return ring->used[1]; }

int needs_reset(void) { return (get(MMIO_STATUS) & STATUS_NEEDS_RESET) != 0; }

static void seen_needs_reset(void)
{
    /* virtio 1.3, 2.1.2: a configuration change tells the driver. */
    if (!(get(MMIO_INTERRUPT_STATUS) & 2))
        fail("needs a reset without a configuration change, status ", get(MMIO_STATUS));
    me()->count.needs_reset++;
}

int wait_used(struct ring *ring, u16 until)
{
    u64 start = tsc();
    /* More may come than is waited for. */
    for (u64 turn = 1; (u16)(used_index(ring) - until) >= 0x8000; turn++) {
        spin();
        /* A register is a thousand times as expensive. */
        if (turn % 20000 == 0) {
            if (needs_reset()) {
                seen_needs_reset();
                return 0;
            }
            if (tsc() - start > PATIENCE)
                fail("no answer, used index ", used_index(ring));
        }
    }
    barrier();
    return 1;
}

void wait_used_anyway(const struct ring *ring, u16 until, const char *what)
{
    u64 start = tsc();
    while ((u16)(used_index(ring) - until) >= 0x8000) {
        spin();
        if (tsc() - start > PATIENCE)
            fail(what, used_index(ring));
    }
    barrier();
}

void take_used(struct ring *ring, u32 *id, u32 *length)
{
    const volatile u32 *entry = (const volatile u32 *)(ring->used + 2) + 2 * (ring->seen++ % ring->size);
    *id = entry[0];
    *length = entry[1];
    me()->count.answered++;
}

void wait_needs_reset(const char *what)
{
    u64 start = tsc();
    while (!needs_reset())
        if (tsc() - start > PATIENCE)
            fail(what, used_index(&rings[0]));
    seen_needs_reset();
}

void expect_quiet(const char *what)
{
    if (needs_reset())
        fail(what, get(MMIO_STATUS));
}
