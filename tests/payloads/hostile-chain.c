/* Chains that no device takes (virtio 1.3, sections 2.7.5 and 2.7.13). */
#include "hostile.h"

enum { W = DESC_WRITE, N = DESC_NEXT };

static u64 table_of(u16 slot) { return TABLES + (u64)slot * 0x400; }

/* An address where `length` bytes of RAM are not. */
static u64 nowhere(u32 length)
{
    const u64 places[] = {
        ram_end - length + 1, ram_end, ram_end + 1, 0xc0000000, 0xbffff000, VIRTIO_MMIO_BASE, VIRTIO_MMIO_BASE + MMIO_STATUS,
        0xfec00000, 0xfee00000, 0xfffbc000, 0xfffff000, 1ull << 32, 1ull << 40, 1ull << 52, 1ull << 63, ~0ull, ~0ull - length,
        ~0ull - length + 1, rnd() | 1ull << 63,
    };
    return places[below(sizeof places / sizeof *places)];
}

/* A chain of three descriptors, in the slot's first three, that the queue's device answers. */
static u16 plain(struct ring *r, u16 slot)
{
    if (victim.id == 2)
        return disk_plain(r, slot);
    u16 at = slot * STRIDE, way = r->number == 0 ? W : 0;
    put_desc(r, at, HEADERS + (u64)slot * 64, 12, N | way, at + 1);
    put_desc(r, at + 1, DATA + (u64)slot * 0x4000, 64, N | way, at + 2);
    put_desc(r, at + 2, DATA + (u64)slot * 0x4000 + 64, 64, way, 0);
    return at;
}

static u16 loop_of_one(struct ring *r, u16 s) { u16 h = plain(r, s); r->desc[h].next = h; return h; }
static u16 loop_of_two(struct ring *r, u16 s) { u16 h = plain(r, s); r->desc[h + 2].flags |= N; r->desc[h + 2].next = h + 1; return h; }
static u16 loop_of_nothing(struct ring *r, u16 s)
{
    u16 h = plain(r, s), flags = r->desc[h].flags;
    put_desc(r, h + 1, rnd(), 0, flags, h + 3);
    put_desc(r, h + 3, rnd(), 0, flags, h + 1);
    return h;
}
static u16 next_beyond(struct ring *r, u16 s) { u16 h = plain(r, s); r->desc[h + 1].next = (u16)(r->size + below(0x10000 - r->size)); return h; }
static u16 head_beyond(struct ring *r, u16 s) { (void)s; return (u16)(r->size + below(0x10000 - r->size)); }
static u16 first_outside(struct ring *r, u16 s) { u16 h = plain(r, s); r->desc[h].address = nowhere(r->desc[h].length); return h; }
static u16 middle_outside(struct ring *r, u16 s)
{
    u16 h = plain(r, s);
    r->desc[h + 1].length = (u32)(1 + below(64)) * 512;
    r->desc[h + 1].address = nowhere(r->desc[h + 1].length);
    return h;
}
static u16 last_outside(struct ring *r, u16 s) { u16 h = plain(r, s); r->desc[h + 2].address = nowhere(r->desc[h + 2].length); return h; }
static u16 length_huge(struct ring *r, u16 s) { u16 h = plain(r, s); r->desc[h + 1].length = (u32)(0xffffffff - below(2) * below(0x70000000)); return h; }
static u16 four_gibibytes(struct ring *r, u16 s)
{
    u16 h = plain(r, s), flags = r->desc[h + 1].flags;
    /* 64 MiB, 64 times, and the header. */
    for (u16 i = 0; i < 64; i++)
        table_desc(table_of(s), i, ARENA, 0x4000000, flags, i + 1);
    put_desc(r, h + 1, table_of(s), 64 * 16, DESC_INDIRECT, 0);
    return h;
}
static u16 readable_behind(struct ring *r, u16 s) { u16 h = plain(r, s); r->desc[h + 1].flags |= W; r->desc[h + 2].flags = 0; return h; }
static u16 table(struct ring *r, u16 s)
{
    u16 h = plain(r, s);
    for (u16 i = 0; i < 3; i++)
        table_desc(table_of(s), i, r->desc[h + i].address, r->desc[h + i].length, r->desc[h + i].flags, i + 1);
    put_desc(r, h, table_of(s), 48, DESC_INDIRECT, 0);
    return h;
}
static u16 indirect_in_indirect(struct ring *r, u16 s) { u16 h = table(r, s); table_desc(table_of(s), 1, table_of(s), 48, DESC_INDIRECT, 0); return h; }
static u16 indirect_with_next(struct ring *r, u16 s) { u16 h = table(r, s); r->desc[h].flags |= N; r->desc[h].next = h + 1; return h; }
static u16 indirect_length(struct ring *r, u16 s) { u16 h = table(r, s); r->desc[h].length = below(2) ? 0 : (u32)(rnd() | 1); return h; }
static u16 indirect_outside(struct ring *r, u16 s) { u16 h = table(r, s); r->desc[h].address = nowhere(16); return h; }
static u16 indirect_over_the_end(struct ring *r, u16 s)
{
    u16 h = table(r, s);
    struct desc first = *(struct desc *)table_of(s);
    /* One entry fits, and names the next. */
    table_desc(ram_end - 16, 0, first.address, first.length, first.flags, 1);
    r->desc[h].address = ram_end - 16;
    return h;
}
static u16 indirect_next_beyond(struct ring *r, u16 s) { u16 h = table(r, s); ((volatile struct desc *)table_of(s))[1].next = (u16)(3 + below(0xfffc)); return h; }
static u16 indirect_loop(struct ring *r, u16 s) { u16 h = table(r, s); ((volatile struct desc *)table_of(s))[1].next = 1; return h; }
static u16 indirect_loop_of_nothing(struct ring *r, u16 s)
{
    u16 h = table(r, s);
    table_desc(table_of(s), 0, 0, 0, N, 0);
    r->desc[h].length = 0xfffffff0; /* a table of 2^28 entries */
    return h;
}
static u16 too_many_pieces(struct ring *r, u16 s)
{
    u16 h = plain(r, s), way = r->desc[h + 1].flags;
    for (u16 i = 0; i < 2000; i++)
        table_desc(ARENA, i, DATA, 1, way, i + 1);
    table_desc(ARENA, 2000, DATA, 1, way & W, 0);
    put_desc(r, h + 1, ARENA, 2001 * 16, DESC_INDIRECT, 0);
    return h;
}
static u16 too_many_nothings(struct ring *r, u16 s)
{
    u16 h = plain(r, s), way = r->desc[h + 1].flags;
    for (u16 i = 0; i < 0xffff; i++)
        table_desc(ARENA, i, ~0ull, 0, way, i + 1);
    table_desc(ARENA, 0xffff, DATA, 1, way & W, 0);
    put_desc(r, h + 1, ARENA, 0x10000 * 16, DESC_INDIRECT, 0);
    return h;
}

const struct breaker breakers[] = {
    {"a descriptor that is its own next", 0, loop_of_one},
    {"a loop of two descriptors", 0, loop_of_two},
    {"a loop of descriptors of no length", 0, loop_of_nothing},
    {"a next descriptor beyond the table", 0, next_beyond},
    {"a head beyond the table", 0, head_beyond},
    {"a first buffer outside of RAM", 0, first_outside},
    {"a second buffer outside of RAM", 0, middle_outside},
    {"a last buffer outside of RAM", 0, last_outside},
    {"a buffer longer than RAM", 0, length_huge},
    {"a readable buffer behind a writable one", 0, readable_behind},
    {"a chain of more than 4 GiB", FEATURE_INDIRECT, four_gibibytes},
    {"an indirect table in an indirect table", FEATURE_INDIRECT, indirect_in_indirect},
    {"an indirect table with a next descriptor", FEATURE_INDIRECT, indirect_with_next},
    {"an indirect table of an odd length", FEATURE_INDIRECT, indirect_length},
    {"an indirect table outside of RAM", FEATURE_INDIRECT, indirect_outside},
    {"an indirect table that leaves RAM", FEATURE_INDIRECT, indirect_over_the_end},
    {"a next descriptor beyond an indirect table", FEATURE_INDIRECT, indirect_next_beyond},
    {"a loop in an indirect table", FEATURE_INDIRECT, indirect_loop},
    {"a loop of nothing in an indirect table", FEATURE_INDIRECT, indirect_loop_of_nothing},
    {"a chain of more pieces than the device takes", FEATURE_INDIRECT, too_many_pieces},
    {"a chain of tens of thousands of nothings", FEATURE_INDIRECT, too_many_nothings},
};
const u64 breakers_count = sizeof breakers / sizeof *breakers;

u16 break_chain(struct ring *r, u16 slot, u64 features)
{
    const struct breaker *how;
    do
        how = &breakers[below(breakers_count)];
    /* The longest takes a while to write down, so it comes less often. */
    while ((how->needs & ~features) || (how->chain == too_many_nothings && below(16)));
    return how->chain(r, slot);
}

/* Each breaker once more than its random choices need, alone on a fresh queue. */
void breaker_cases(struct ring *r, const struct breaker *list, u64 length, u64 features)
{
    for (u64 i = 0; i < length; i++)
        for (int round = 0; round < (list[i].chain == too_many_nothings ? 1 : 4); round++) {
            case_begin(list[i].name);
            victim_start(features | list[i].needs);
            offer(r, list[i].chain(r, 0));
            kick(r);
            wait_needs_reset("a broken chain and no reset asked for, used ");
            if (used_index(r))
                fail("a broken chain was answered", 0);
            /* A broken queue stays so, whatever is rung. */
            kick(r);
            case_end();
        }
    case_begin("an indirect table without the feature");
    victim_start(features);
    offer(r, table(r, 0));
    kick(r);
    wait_needs_reset("an indirect table without the feature and no reset asked for");
    case_end();
    static const u16 jumps[] = {RING_SIZE + 1, 0x8000, 0xffff};
    for (u64 i = 0; i < sizeof jumps / sizeof *jumps; i++) {
        case_begin("an available index that jumps");
        victim_start(features);
        plain(r, 0);
        r->next = jumps[i];
        kick(r);
        me()->count.chains++;
        wait_needs_reset("an index jump and no reset asked for");
        case_end();
    }
}

/* Random bytes in place of a ring's descriptors and indices, in place of indirect tables too. Addresses that hit RAM hit
 * the arena. What the device makes of it is its own affair. */
void chaos(struct ring *r, int reset_at_once)
{
    for (u16 i = 0; i < r->size; i++) {
        u64 address = below(3) ? ARENA + below(ram_end - ARENA) : below(2) ? RINGS + below(0x300000) : rnd() | 1ull << 35;
        u32 length = below(4) ? (u32)below(0x2000) : (u32)(rnd() >> below(64));
        put_desc(r, i, address, length, (u16)(below(8) ? rnd() & 7 : rnd()), (u16)(below(8) ? below(r->size) : rnd()));
    }
    for (u16 i = 0; i < 64; i++)
        table_desc(table_of((u16)below(SLOTS)), (u16)below(64), ARENA + below(ram_end - ARENA), (u32)below(0x4000), (u16)(rnd() & 7), (u16)below(64));
    u16 chains = (u16)(1 + below(r->size));
    for (u16 i = 0; i < chains; i++)
        offer(r, (u16)(below(64) ? below(r->size) : rnd()));
    if (below(8) == 0)
        r->next += (u16)rnd();
    kick(r);
    if (!reset_at_once)
        for (u64 wait = below(100000); wait; wait--)
            spin();
}
