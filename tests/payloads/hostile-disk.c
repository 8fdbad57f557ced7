/* Misuse of a disk (virtio 1.3, section 5.2), and round trips that show that one works. */
#include "hostile.h"

enum { SECTOR = 512, IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, WRITE_ZEROES = 13 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2, S_NONE = 0xee };
enum { R = 0, W = DESC_WRITE, N = DESC_NEXT };
#define BASE (FEATURE_VERSION_1 | 1ull << 9)

/* The queue that requests go to. Each has slots of its own. */
static struct ring *ring = &rings[0];

static u64 place(u16 slot) { return (u64)ring->number * SLOTS + slot; }
static u64 header_of(u16 slot) { return HEADERS + place(slot) * 64; }
static u64 status_of(u16 slot) { return header_of(slot) + 32; }
static u64 small_of(u16 slot) { return header_of(slot) + 40; }
static u64 table_of(u16 slot) { return TABLES + place(slot) * 0x400; }
static u64 data_of(u16 slot) { return DATA + place(slot) * 0x4000; }
static u8 status_byte(u16 slot) { return *(volatile u8 *)status_of(slot); }

static void header(u16 slot, u32 type, u64 sector)
{
    *(volatile u32 *)header_of(slot) = type;
    *(volatile u32 *)(header_of(slot) + 4) = 0;
    *(volatile u64 *)(header_of(slot) + 8) = sector;
    *(volatile u8 *)status_of(slot) = S_NONE;
}

/* Header, data, status in the slot's first three descriptors; its first is the head. */
static u16 request(u16 slot, u32 type, u64 sector, u64 data, u32 length)
{
    u16 at = slot * STRIDE;
    header(slot, type, sector);
    put_desc(ring, at, header_of(slot), 16, N, at + 1);
    put_desc(ring, at + 1, data, length, N | (type == OUT ? R : W), at + 2);
    put_desc(ring, at + 2, status_of(slot), 1, W, 0);
    return at;
}

static void send(u16 head)
{
    offer(ring, head);
    kick(ring);
}

/* One request by itself, of slot 0. */
static u32 answer_of(u16 head, u8 status)
{
    send(head);
    if (!wait_used(ring, ring->next))
        fail("the disk needs a reset instead of status ", status);
    u32 id, length;
    take_used(ring, &id, &length);
    if (id != head)
        fail("another request came back: ", id);
    if (status_byte(0) != status)
        fail("wrong status ", status_byte(0));
    return length;
}

/* ---- round trips ---- */

static struct queue witness;
static struct {
    u32 type, reserved;
    u64 sector;
    u64 data[SECTOR / 8];
    volatile u8 status;
} witness_slot;
static u64 witness_round;

static u64 nth_disk(const struct boot *boot, u64 nth)
{
    u64 base = number(boot, "mmio", VIRTIO_MMIO_BASE);
    for (u64 i = 0; i < VIRTIO_MMIO_SLOTS; i++) {
        u64 window = base + i * VIRTIO_MMIO_SIZE;
        if (read32(window + MMIO_MAGIC) == 0x74726976 && read32(window + MMIO_DEVICE_ID) == 2 && nth-- == 0)
            return window;
    }
    fail("no disk to compare with", 0);
}

/* The last disk is never attacked. */
void witness_set_up(const struct boot *boot)
{
    u64 window = nth_disk(boot, victim.id == 2 ? 1 : 0);
    if (!virtio_begin(window, FEATURE_VERSION_1 | 1ull << 9) || !virtio_queue(window, 0, &witness))
        fail("the other disk does not start", 0);
    virtio_go(window);
}

static void witness_request(u32 type)
{
    u16 data = type == OUT ? DESC_NEXT : DESC_NEXT | DESC_WRITE;
    witness_slot.type = type;
    witness_slot.sector = 8 + witness_round % 64;
    witness_slot.status = S_NONE;
    witness.desc[0] = (struct desc){(u64)&witness_slot, 16, DESC_NEXT, 1};
    witness.desc[1] = (struct desc){(u64)witness_slot.data, SECTOR, data, 2};
    witness.desc[2] = (struct desc){(u64)&witness_slot.status, 1, DESC_WRITE, 0};
    virtio_send(&witness, 0);
    u64 start = tsc();
    while (*(volatile u16 *)&witness.used.index == witness.seen) {
        spin();
        if (tsc() - start > 80000000000ull)
            fail("the other disk does not answer, round ", witness_round);
    }
    barrier();
    witness.seen++;
    if (witness_slot.status != S_OK)
        fail("the other disk's status ", witness_slot.status);
}

static u64 pattern(u64 round, u64 word) { return (round << 8 ^ word ^ seed << 40) * 0x9e3779b97f4a7c15ull; }

void witness_check(void)
{
    witness_round++;
    for (u64 i = 0; i < SECTOR / 8; i++)
        witness_slot.data[i] = pattern(witness_round, i);
    witness_request(OUT);
    memset(witness_slot.data, 0, SECTOR);
    witness_request(IN);
    for (u64 i = 0; i < SECTOR / 8; i++)
        if (witness_slot.data[i] != pattern(witness_round, i))
            fail("the other disk gives wrong data, round ", witness_round);
    me()->count.checks++;
}

void disk_check(void)
{
    u64 sector = me()->count.checks % (victim.capacity - 1), value = rnd();
    volatile u64 *data = (volatile u64 *)data_of(0);
    for (u64 i = 0; i < SECTOR / 8; i++)
        data[i] = value + i;
    answer_of(request(0, OUT, sector, data_of(0), SECTOR), S_OK);
    for (u64 i = 0; i < SECTOR / 8; i++)
        data[i] = 0;
    if (answer_of(request(0, IN, sector, data_of(0), SECTOR), S_OK) != SECTOR + 1)
        fail("wrong used length", 0);
    for (u64 i = 0; i < SECTOR / 8; i++)
        if (data[i] != value + i)
            fail("wrong data after a reset, word ", i);
    me()->count.chains -= 2; /* nothing hostile in these */
    me()->count.checks++;
}

/* ---- chains that are answered ---- */

/* A sector and a number of sectors near edges, and whether the disk has them. */
static int edge(u64 *sector, u32 *sectors)
{
    u64 cap = victim.capacity;
    const u64 sectors_at[] = {0, cap - 1, cap, cap + 1, cap - 4, 1ull << 55, (1ull << 55) - 1, 1ull << 63, ~0ull, ~0ull - 7, rnd()};
    *sector = below(2) ? below(cap) : sectors_at[below(sizeof sectors_at / sizeof *sectors_at)];
    *sectors = (u32)below(6);
    return *sector <= cap && *sectors <= cap - *sector;
}

enum { ANY = 0xff };

/* Where the last write of a row ended: the disk may do those that follow each other in one go. */
static u64 row;

/* A chain in the slot that the disk answers; returns its head and the status it must get. */
static u16 tame_chain(u16 slot, u8 *want)
{
    u64 sector, data = data_of(slot), table = table_of(slot);
    u32 sectors, type;
    u16 at = slot * STRIDE, head;
    int inside = edge(&sector, &sectors);
    *want = inside ? S_OK : S_IOERR;
    switch (below(victim.accepted & FEATURE_INDIRECT ? 17 : 14)) {
    case 0: case 1:
        return request(slot, IN, sector, data, sectors * SECTOR);
    case 2:
        return request(slot, OUT, sector, data, sectors * SECTOR);
    case 3: /* a row of writes, with others in between, good and bad */
        if (below(8)) {
            sector = row;
            *want = sector + sectors <= victim.capacity ? S_OK : S_IOERR;
        }
        if (*want == S_OK)
            row = sector + sectors;
        return request(slot, OUT, sector, data, sectors * SECTOR);
    case 4: /* not whole sectors */
        *want = S_IOERR;
        return request(slot, (u32)below(2), below(victim.capacity - 8), data, (u32)(below(8) * SECTOR + 1 + below(511)));
    case 5: /* types that were not offered */
        do
            type = below(2) ? (u32)below(64) : (u32)rnd();
        while (type == IN || type == OUT || type == FLUSH || type == GET_ID || type == WRITE_ZEROES);
        *want = S_UNSUPP;
        head = request(slot, type, rnd(), data, (u32)below(0x4000));
        if (below(2))
            ring->desc[at + 1].flags = N; /* its data may have either direction */
        return head;
    case 6: /* header too short, or none */
        *want = S_IOERR;
        head = request(slot, (u32)below(2), 0, data, SECTOR);
        ring->desc[at].length = (u32)below(16);
        if (below(2)) { /* only what can be read counts */
            ring->desc[at].flags |= W;
            ring->desc[at + 1].flags |= W;
        } else
            ring->desc[at + 1].flags |= W;
        return head;
    case 7: { /* header in pieces, with nothing in between that is nowhere */
        u32 cut = (u32)below(17);
        header(slot, IN, sector);
        put_desc(ring, at, header_of(slot), cut, N, at + 1);
        put_desc(ring, at + 1, rnd(), 0, N, at + 2);
        put_desc(ring, at + 2, header_of(slot) + cut, 16 - cut, N, at + 3);
        put_desc(ring, at + 3, data, sectors * SECTOR, N | W, at + 4);
        put_desc(ring, at + 4, status_of(slot), 1, W, 0);
        return at;
    }
    case 8: /* serial number of odd lengths; nothing may come after its 20 bytes */
        *want = S_OK;
        return request(slot, GET_ID, rnd(), small_of(slot), (u32)below(24));
    case 9: /* flush with a sector and data; rarely, since it costs what it should */
        if (below(32))
            return request(slot, IN, sector, data, sectors * SECTOR);
        *want = S_OK;
        return request(slot, FLUSH, rnd(), data, (u32)below(2) * SECTOR);
    case 10: /* the last bytes of RAM */
        return request(slot, (u32)below(2), sector, ram_end - sectors * SECTOR, sectors * SECTOR);
    case 11: /* a write whose data is where an answer goes: no data, which ends where it starts */
        *want = sector <= victim.capacity ? S_OK : S_IOERR;
        head = request(slot, OUT, sector, data, SECTOR);
        ring->desc[at + 1].flags |= W;
        return head;
    case 12: /* much more than the disk has */
        *want = S_IOERR;
        return request(slot, (u32)below(2), below(victim.capacity), ARENA, (u32)(ram_end - ARENA) & ~511u);
    case 13: /* a status inside of the data */
        *want = ANY;
        head = request(slot, IN, below(victim.capacity - 8), data, SECTOR);
        ring->desc[at + 2].address = data + below(SECTOR);
        return head;
    case 14: /* an indirect table, larger than what is used of it */
        header(slot, IN, sector);
        table_desc(table, 0, header_of(slot), 16, N, 1);
        table_desc(table, 1, data, sectors * SECTOR, N | W, 2);
        table_desc(table, 2, status_of(slot), 1, W, 0);
        put_desc(ring, at, table, (u32)(below(2) ? 48 : 0xfffffff0), DESC_INDIRECT, 0);
        return at;
    case 15: /* an indirect table behind a direct header */
        header(slot, OUT, sector);
        put_desc(ring, at, header_of(slot), 16, N, at + 1);
        put_desc(ring, at + 1, table, 16 * 33, DESC_INDIRECT, 0);
        table_desc(table, 0, data, sectors * SECTOR, N, 32);
        table_desc(table, 32, status_of(slot), 1, W, 0);
        return at;
    default: /* "write" on an indirect descriptor means nothing (2.7.5.3.2) */
        header(slot, IN, sector);
        put_desc(ring, at, table, 48, DESC_INDIRECT | W, (u16)rnd());
        table_desc(table, 0, header_of(slot), 16, N, 2);
        table_desc(table, 2, data, sectors * SECTOR, N | W, 1);
        table_desc(table, 1, status_of(slot), 1, W, (u16)rnd());
        return at;
    }
}

/* ---- chains that break the queue, besides those of any device ---- */

static u16 header_behind(struct ring *r, u16 s) { (void)r; u16 h = request(s, OUT, 0, data_of(s), 512); ring->desc[h].flags |= W; return h; }
static u16 no_status(struct ring *r, u16 s) { (void)r; u16 h = request(s, OUT, 0, data_of(s), 512); ring->desc[h + 2].flags = 0; return h; }
static u16 status_of_nothing(struct ring *r, u16 s) { (void)r; u16 h = request(s, OUT, 0, data_of(s), 512); ring->desc[h + 2].length = 0; return h; }
static u16 header_only(struct ring *r, u16 s) { (void)r; u16 h = request(s, IN, 0, data_of(s), 512); ring->desc[h].flags = 0; return h; }
static u16 empty_chain(struct ring *r, u16 s) { (void)r; u16 h = request(s, IN, 0, data_of(s), 512); put_desc(ring, h, rnd(), 0, 0, 0); return h; }

static const struct breaker disk_breakers[] = {
    {"a writable header before readable data", 0, header_behind},
    {"a status that cannot be written", 0, no_status},
    {"a status of no length", 0, status_of_nothing},
    {"a chain that is only a header", 0, header_only},
    {"a chain of nothing", 0, empty_chain},
};
enum { DISK_BREAKERS = sizeof disk_breakers / sizeof *disk_breakers };

u16 disk_plain(struct ring *r, u16 slot)
{
    struct ring *kept = ring;
    ring = r;
    u16 head = request(slot, IN, 0, data_of(slot), SECTOR);
    ring = kept;
    return head;
}

/* What each request of a batch must come to, for each queue. */
static struct batch {
    u8 want[SLOTS], waiting[SLOTS];
    u16 slots, first;
} batches[QUEUES];

static void take_answers(struct batch *b)
{
    /* Of those before a broken one, some may still have been under way. */
    if ((u16)(used_index(ring) - b->first) > b->slots)
        fail("more answers than requests: ", (u16)(used_index(ring) - b->first));
    while (ring->seen != used_index(ring)) {
        u32 id, length;
        take_used(ring, &id, &length);
        u16 s = (u16)(id / STRIDE);
        if (id % STRIDE || s >= b->slots || !b->waiting[s])
            fail("an answer to nothing, id ", id);
        b->waiting[s] = 0;
        if (b->want[s] != ANY && status_byte(s) != b->want[s])
            fail("wrong status of a tame chain: ", (u64)status_byte(s) << 8 | b->want[s]);
    }
}

/* Offers a number of chains on one queue, or on all at once; with `fatal`, one more on the last of them that breaks it. Each
 * answer is checked: a broken queue leaves the others alone. */
void disk_batch(int fatal)
{
    u16 queues = queues_with(victim.accepted), busy = below(2) ? queues : 1, first = (u16)below(queues);
    for (u16 i = 0; i < busy; i++) {
        ring = &rings[(first + i) % queues];
        struct batch *b = &batches[ring->number];
        b->slots = (u16)(below(8) ? 140 + below(SLOTS - 140) : 1 + below(140));
        b->first = ring->seen;
        memset(b->waiting, 0, SLOTS);
        for (u16 s = 0; s < b->slots; s++) {
            offer(ring, tame_chain(s, &b->want[s]));
            b->waiting[s] = 1;
        }
        if (fatal && i == busy - 1)
            offer(ring, below(4) ? break_chain(ring, SLOTS - 1, victim.accepted)
                                 : disk_breakers[below(DISK_BREAKERS)].chain(ring, SLOTS - 1));
        kick(ring);
    }
    if (fatal)
        wait_needs_reset("a broken chain and no reset asked for, used ");
    for (u16 i = 0; i < busy; i++) {
        ring = &rings[(first + i) % queues];
        if (fatal && i < busy - 1)
            wait_used_anyway(ring, ring->next, "a queue beside a broken one stands still, used index ");
        else if (!fatal && !wait_used(ring, ring->next))
            fail("a tame chain broke the queue", 0);
        take_answers(&batches[ring->number]);
    }
    ring = &rings[0];
}

/* Each queue once: it is broken by each misuse, and the others go on. */
static void broken_beside_others(void)
{
    for (u16 broken = 0; broken < victim.queues; broken++) {
        case_begin("a broken queue of a disk with several");
        for (u64 how = 0; how < breakers_count; how++) {
            victim_start(BASE | FEATURE_BLK_MQ | breakers[how].needs);
            offer(&rings[broken], breakers[how].chain(&rings[broken], 0));
            kick(&rings[broken]);
            wait_needs_reset("a broken chain and no reset asked for, used ");
            for (u16 other = 0; other < victim.queues; other++) {
                if (other == broken)
                    continue;
                for (u16 s = 0; s < 16; s++)
                    offer(&rings[other], disk_plain(&rings[other], s));
                kick(&rings[other]);
            }
            for (u16 other = 0; other < victim.queues; other++)
                if (other != broken)
                    wait_used_anyway(&rings[other], 16, "a queue beside a broken one stands still, used index ");
            if (used_index(&rings[broken]))
                fail("a broken chain was answered", 0);
        }
        case_end();
    }
    case_begin("one queue's rings given to all");
    victim_negotiate(BASE | FEATURE_BLK_MQ);
    for (u16 i = 0; i < victim.queues; i++) {
        ring_default(&rings[i], 0, RING_SIZE);
        rings[i].number = i;
        ring_tell(&rings[i]);
    }
    victim_go();
    for (u16 round = 0; round < 64; round++) {
        offer(&rings[0], disk_plain(&rings[0], round % 8));
        for (u16 i = 0; i < victim.queues; i++) {
            rings[i].next = rings[0].next;
            kick(&rings[i]);
        }
    }
    case_end();
    case_begin("one queue of several, the first not among them");
    victim_negotiate(BASE | FEATURE_BLK_MQ);
    u16 last = victim.queues - 1;
    ring_default(&rings[last], last, RING_SIZE);
    ring_tell(&rings[last]);
    victim_go();
    for (u16 i = 0; i < victim.queues; i++)
        write32(victim.window + MMIO_QUEUE_NOTIFY, i);
    offer(&rings[last], disk_plain(&rings[last], 0));
    kick(&rings[last]);
    if (!wait_used(&rings[last], 1))
        fail("a queue alone does not serve", last);
    case_end();
}

/* ---- cases with a name ---- */

static void overlap(const char *name, u64 desc, u64 avail, u64 used)
{
    /* Nothing is promised for the device itself. */
    case_begin(name);
    victim_negotiate(BASE);
    ring_place(ring, 0, 16, desc, avail, used);
    memset((void *)desc, 0, 256);
    memset((void *)used, 0, 134);
    memset((void *)avail, 0, 38);
    ring_tell(ring);
    victim_go();
    for (u16 i = 0; i < 64; i++) {
        request(0, IN, 0, data_of(0), 512);
        send(0);
    }
    case_end();
}

static void outside(const char *name, u64 desc, u64 avail, u64 used)
{
    case_begin(name);
    victim_negotiate(BASE);
    struct ring bad;
    ring_place(&bad, 0, 16, desc, avail, used);
    ring_tell(&bad);
    if (!read32(victim.window + MMIO_QUEUE_READY))
        fail("an aligned queue was not taken", desc);
    victim_go();
    wait_needs_reset("a queue outside of RAM and no reset asked for");
    write32(victim.window + MMIO_QUEUE_NOTIFY, 0);
    case_end();
}

void disk_cases(void)
{
    breaker_cases(ring, breakers, breakers_count, FEATURE_VERSION_1);
    breaker_cases(ring, disk_breakers, DISK_BREAKERS, FEATURE_VERSION_1);

    if (victim.queues > 1)
        broken_beside_others();

    case_begin("the same chain as often as the ring has entries");
    victim_start(BASE);
    request(0, IN, 0, data_of(0), 512);
    for (u16 i = 0; i < RING_SIZE; i++)
        offer(ring, 0);
    kick(ring);
    if (!wait_used(ring, RING_SIZE))
        fail("the same chain again and again broke the queue", 0);
    ring->seen = RING_SIZE;
    disk_check();
    case_end();

    static const struct { u8 status; u32 type; u64 sector; u32 length; } answers[] = {
        {S_OK, IN, 0, 0}, {S_IOERR, IN, 0, 511}, {S_IOERR, OUT, 0, 513}, {S_IOERR, IN, ~0ull, 512}, {S_IOERR, OUT, 1ull << 55, 512},
        {S_IOERR, IN, (1ull << 55) - 1, 512}, {S_IOERR, OUT, 1ull << 63, 0}, {S_OK, GET_ID, ~0ull, 0}, {S_OK, GET_ID, 0, 1},
        {S_OK, GET_ID, 0, 19}, {S_OK, GET_ID, 0, 4096}, {S_OK, FLUSH, ~0ull, 0}, {S_UNSUPP, 2, 0, 512}, {S_UNSUPP, 11, 0, 512},
        {S_IOERR, WRITE_ZEROES, 0, 0}, {S_IOERR, WRITE_ZEROES, 0, 15}, {S_IOERR, WRITE_ZEROES, 0, 33 * 16},
        {S_UNSUPP, 12, 0, 512}, {S_UNSUPP, 0x80000001, 0, 512}, {S_UNSUPP, ~0u, 0, 512},
    };
    for (u64 i = 0; i < sizeof answers / sizeof *answers; i++) {
        case_begin("a request that gets an answer");
        victim_start(BASE);
        volatile u8 *data = (volatile u8 *)data_of(0);
        memset((void *)data, 0x5a, 4096);
        answer_of(request(0, answers[i].type, answers[i].sector, data_of(0), answers[i].length), answers[i].status);
        u32 from = answers[i].type == GET_ID ? (answers[i].length < 20 ? answers[i].length : 20) : answers[i].length;
        for (u32 at = from; at < 4096; at++)
            if (data[at] != 0x5a)
                fail("the disk wrote where nothing belongs, at ", at);
        case_end();
    }
    case_begin("a read beyond the last sector");
    victim_start(BASE);
    answer_of(request(0, IN, victim.capacity - 1, data_of(0), 1024), S_IOERR);
    answer_of(request(0, IN, victim.capacity, data_of(0), 512), S_IOERR);
    answer_of(request(0, IN, victim.capacity - 1, data_of(0), 512), S_OK);
    case_end();

    case_begin("event index values out of range");
    victim_start(BASE | FEATURE_EVENT_IDX);
    for (u64 i = 0; i < 2000; i++) {
        ring->avail[2 + RING_SIZE] = (u16)rnd();
        *(ring->used + 2 + 4 * RING_SIZE) = (u16)rnd();
        ring->avail[0] = (u16)rnd();
        ring->used[0] = (u16)rnd();
        answer_of(request(0, IN, 0, data_of(0), 512), S_OK);
    }
    case_end();

    case_begin("a used index that the driver moves");
    victim_start(BASE);
    ring->used[1] = 0xf000;
    answer_of(request(0, IN, 0, data_of(0), 512), S_OK);
    case_end();

    u64 at = RINGS;
    overlap("all three rings in one place", at, at, at);
    overlap("the used ring on the descriptors", at, at + 0x1000, at);
    overlap("the used ring on the available ring", at, at + 0x1000, at + 0x1000);
    overlap("the used ring on the available ring's indices", at, at + 0x1004, at + 0x1000);
    overlap("rings inside of the buffers", data_of(0) & ~15ull, data_of(0) + 256, data_of(0) + 128);
    outside("descriptors over the end of RAM", ram_end - 16 * 16 + 16, at, at + 0x1000);
    outside("an available ring over the end of RAM", at, ram_end - (6 + 2 * 16) + 2, at + 0x1000);
    outside("a used ring over the end of RAM", at, at + 0x1000, ram_end - (6 + 8 * 16 + 2) + 4);
    outside("descriptors at the end of the address space", ~0ull - 15, at, at + 0x1000);
    outside("an available ring in the hole", at, 0xc0000000, at + 0x1000);
    outside("a used ring on registers", at, at + 0x1000, victim.window);

    case_begin("rings up to the last byte of RAM");
    for (int part = 0; part < 3; part++) {
        victim_negotiate(BASE);
        ring_place(ring, 0, 16, part == 0 ? ram_end - 256 : at, part == 1 ? ram_end - 38 : at + 0x1000, part == 2 ? (ram_end - 134) & ~3ull : at + 0x2000);
        memset((void *)at, 0, 0x3000);
        memset((void *)(ram_end - 256), 0, 256);
        ring_tell(ring);
        victim_go();
        disk_check();
    }
    case_end();

    case_begin("a reset with requests in flight");
    for (u64 round = 0; round < 50; round++) {
        victim_start(BASE);
        for (u16 s = 0; s < SLOTS; s++)
            offer(ring, request(s, IN, 0, data_of(s), 0x4000));
        kick(ring);
        for (u64 wait = below(30000); wait; wait--)
            spin();
        victim_reset();
        /* From here on the memory is somebody else's. */
        u64 mark = rnd();
        for (u64 word = DATA; word < DATA + SLOTS * 0x4000; word += 8)
            *(volatile u64 *)word = mark;
        u16 used = used_index(ring);
        witness_check();
        for (u64 word = DATA; word < DATA + SLOTS * 0x4000; word += 8)
            if (*(volatile u64 *)word != mark)
                fail("the disk wrote after its reset, to ", word);
        if (used_index(ring) != used)
            fail("the disk answered after its reset, ", used_index(ring));
    }
    case_end();
}
