/* Misuse of a network card (virtio 1.3, section 5.1), and round trips that show that it works. */
#include "hostile.h"

#define FEATURE_CSUM (1ull << 0)
#define FEATURE_MAC (1ull << 5)
#define FEATURE_MRG_RXBUF (1ull << 15)
enum { W = DESC_WRITE, N = DESC_NEXT, HEADER = 12, BUFFER = 2048, BUFFERS = 8, ARP = 42 };

static struct ring *const receive = &rings[0];
static struct ring *const transmit = &rings[1];
static struct ring *const control = &rings[2];
static u8 own_mac[6], own[4], host[4];

static u64 header_of(u16 slot) { return HEADERS + (u64)slot * 64; }
static u64 data_of(u16 slot) { return DATA + (u64)slot * 0x4000; }

static void address(const struct boot *boot, const char *name, u8 *to)
{
    const char *at = word(boot, name);
    for (int i = 0; at && i < 4; i++) {
        u32 value = 0;
        while (*at >= '0' && *at <= '9')
            value = value * 10 + (u32)(*at++ - '0');
        to[i] = (u8)value;
        if (*at == '.')
            at++;
    }
}

void card_set_up(const struct boot *boot)
{
    for (u64 i = 0; i < 6; i++)
        own_mac[i] = read8(victim.window + MMIO_CONFIG + i);
    address(boot, "own", own);
    address(boot, "host", host);
}

/* "Who has the host's address?", with a header, at `to`. */
static void ask(u8 *to)
{
    memset(to, 0, HEADER + 60);
    u8 *ethernet = to + HEADER, *arp = ethernet + 14;
    memset(ethernet, 0xff, 6);
    memcpy(ethernet + 6, own_mac, 6);
    ethernet[12] = 0x08, ethernet[13] = 0x06;
    static const u8 request[8] = {0, 1, 8, 0, 6, 4, 0, 1};
    memcpy(arp, request, 8);
    memcpy(arp + 8, own_mac, 6);
    memcpy(arp + 14, own, 4);
    memcpy(arp + 24, host, 4);
}

static int is_answer(const u8 *frame, u32 length)
{
    if (length < HEADER + ARP || frame[24] != 0x08 || frame[25] != 0x06 || frame[33] != 2)
        return 0;
    for (int i = 0; i < 4; i++)
        if (frame[HEADER + 28 + i] != host[i])
            fail("the host answers for another address", 0);
    return 1;
}

static void send(u16 head)
{
    offer(transmit, head);
    kick(transmit);
}

static void expect_sent(u16 head)
{
    send(head);
    if (!wait_used(transmit, transmit->next))
        fail("the card needs a reset instead of an answer", head);
    u32 id, length;
    take_used(transmit, &id, &length);
    if (id != head || length)
        fail("another packet came back: ", id);
}

void card_check(void)
{
    for (u16 i = 0; i < BUFFERS; i++) {
        memset((void *)data_of(16 + i), 0, HEADER + ARP);
        put_desc(receive, i, data_of(16 + i), BUFFER, W, 0);
        offer(receive, i);
    }
    kick(receive);
    ask((u8 *)data_of(0));
    put_desc(transmit, 0, data_of(0), HEADER + 60, 0, 0);
    expect_sent(0);
    me()->count.chains -= BUFFERS + 1; /* nothing hostile in these */
    for (u64 frames = 0; frames < 10000; frames++) {
        if (!wait_used(receive, receive->seen + 1))
            fail("the card needs a reset instead of receiving", 0);
        u32 id, length;
        take_used(receive, &id, &length);
        if (id >= BUFFERS)
            fail("a buffer that nobody gave: ", id);
        if (is_answer((const u8 *)data_of((u16)(16 + id)), length)) {
            me()->count.checks++;
            return;
        }
        /* Something else that the host said. */
        offer(receive, (u16)id);
        me()->count.chains--;
        kick(receive);
    }
    fail("the host does not answer", 0);
}

/* ---- packets that are sent or dropped, and come back in either case ---- */

static void random_header(u8 *to)
{
    static const u16 values[] = {0, 1, 2, 10, 12, 13, 14, 20, 34, 54, 60, 1448, 0x7fff, 0x8000, 0xfffe, 0xffff};
    static const u8 kinds[] = {0, 1, 3, 4, 5, 0x80, 0x81, 0x84, 2, 6, 0xff};
    to[0] = (u8)(below(2) ? below(4) : rnd());
    to[1] = below(4) ? kinds[below(sizeof kinds)] : (u8)rnd();
    for (int i = 2; i < HEADER; i += 2) {
        u16 value = below(4) ? values[below(sizeof values / sizeof *values)] : (u16)rnd();
        to[i] = (u8)value;
        to[i + 1] = (u8)(value >> 8);
    }
}

static u16 packet(u16 slot, u32 length)
{
    u16 at = slot * STRIDE;
    put_desc(transmit, at, header_of(slot), HEADER, N, at + 1);
    put_desc(transmit, at + 1, data_of(slot), length, 0, 0);
    return at;
}

static u16 tame_chain(u16 slot)
{
    u16 at = slot * STRIDE;
    u8 *header = (u8 *)header_of(slot);
    volatile u64 *data = (volatile u64 *)data_of(slot);
    random_header(header);
    for (u64 i = 0; i < 8; i++)
        data[i] = rnd();
    ((u8 *)data)[0] &= 0xfe; /* not to everybody */
    switch (below(victim.accepted & FEATURE_INDIRECT ? 10 : 8)) {
    case 0: case 1:
        return packet(slot, 14 + (u32)below(1500));
    case 2: /* no Ethernet header */
        return packet(slot, (u32)below(14));
    case 3: /* header cut short */
        put_desc(transmit, at, header_of(slot), (u32)below(HEADER), 0, 0);
        return at;
    case 4: /* near 64 KiB, or far beyond */
        packet(slot, 0);
        transmit->desc[at + 1].address = ARENA;
        transmit->desc[at + 1].length = below(2) ? 65500 + (u32)below(100) : (u32)below(ram_end - ARENA);
        return at;
    case 5: /* wrong direction: nothing to send */
        packet(slot, 100);
        transmit->desc[at].flags |= W;
        transmit->desc[at + 1].flags |= W;
        return at;
    case 6: /* the last bytes of RAM */
        packet(slot, 60);
        transmit->desc[at + 1].address = ram_end - 60;
        return at;
    case 7: { /* header in pieces, with nothing in between that is nowhere */
        u32 cut = (u32)below(HEADER + 1);
        put_desc(transmit, at, header_of(slot), cut, N, at + 1);
        put_desc(transmit, at + 1, rnd(), 0, N, at + 2);
        put_desc(transmit, at + 2, header_of(slot) + cut, HEADER - cut, N, at + 3);
        put_desc(transmit, at + 3, data_of(slot), 14 + (u32)below(100), 0, 0);
        return at;
    }
    case 8: { /* more pieces than go to the kernel at once */
        u16 pieces = (u16)(60 + below(900));
        u64 table = ARENA + (u64)slot * 0x8000;
        table_desc(table, 0, header_of(slot), HEADER, N, 1);
        for (u16 i = 1; i < pieces; i++)
            table_desc(table, i, data_of(slot) + i, 1 + (u32)below(64), i + 1 < pieces ? N : 0, i + 1);
        put_desc(transmit, at, table, (u32)pieces * 16, DESC_INDIRECT, 0);
        return at;
    }
    default: /* an indirect table, larger than what is used of it */
        table_desc(TABLES + (u64)slot * 0x400, 0, header_of(slot), HEADER, N, 40);
        table_desc(TABLES + (u64)slot * 0x400, 40, data_of(slot), 14 + (u32)below(1500), 0, 0);
        put_desc(transmit, at, TABLES + (u64)slot * 0x400, 0xfffffff0, DESC_INDIRECT, 0);
        return at;
    }
}

/* ---- buffers that no packet can be put in ---- */

static u16 small_buffer(struct ring *r, u16 s) { put_desc(r, s * STRIDE, data_of(s), (u32)below(HEADER), W, 0); return s * STRIDE; }
static u16 readable_buffer(struct ring *r, u16 s) { put_desc(r, s * STRIDE, data_of(s), BUFFER, 0, 0); return s * STRIDE; }

static const struct breaker receive_breakers[] = {
    {"a receive buffer that is smaller than a header", 0, small_buffer},
    {"a receive buffer that cannot be written", 0, readable_buffer},
};
enum { RECEIVE_BREAKERS = sizeof receive_breakers / sizeof *receive_breakers };

/* ---- the control queue (5.1.6.5) ---- */

enum { RX, MAC, VLAN, ANNOUNCE, MQ, OFFLOADS, CLASSES };
enum { ACK_OK = 0, ACK_ERR = 1, ACK_NONE = 0xee, MAX_COMMAND = 16 << 10 };
/* With offloads, rx modes, VLANs, addresses; not the number of pairs, which a card of one pair does not offer. */
#define CONTROL (FEATURE_VERSION_1 | FEATURE_CTRL_VQ | 1ull << 2 | 1ull << 18 | 1ull << 19 | 1ull << 23)

static u64 ack_of(u16 slot) { return header_of(slot) + 16; }

/* Class, command and `length` bytes of what is in the slot's data, then room for an answer. */
static u16 command(u16 slot, u8 class, u8 what, u32 length)
{
    u16 at = slot * STRIDE;
    u8 *header = (u8 *)header_of(slot);
    header[0] = class, header[1] = what;
    *(volatile u8 *)ack_of(slot) = ACK_NONE;
    put_desc(control, at, header_of(slot), 2, N, at + 1);
    put_desc(control, at + 1, data_of(slot), length, N, at + 2);
    put_desc(control, at + 2, ack_of(slot), 1, W, 0);
    return at;
}

static void expect_ack(u16 head, u8 want)
{
    offer(control, head);
    kick(control);
    if (!wait_used(control, control->next))
        fail("the card needs a reset instead of an answer to a command", want);
    u32 id, length;
    take_used(control, &id, &length);
    if (id != head || length != 1)
        fail("another command came back: ", (u64)length << 32 | id);
    u8 ack = *(volatile u8 *)ack_of(head / STRIDE);
    if (ack != want)
        fail("wrong answer to a command: ", (u64)ack << 8 | want);
}

static u16 no_answer(struct ring *r, u16 s) { u16 h = command(s, RX, 0, 1); r->desc[h + 1].flags = 0; return h; }
static u16 answer_not_writable(struct ring *r, u16 s) { u16 h = command(s, RX, 0, 1); r->desc[h + 2].flags = 0; return h; }
static u16 answer_of_nothing(struct ring *r, u16 s) { u16 h = command(s, RX, 0, 1); r->desc[h + 2].length = 0; return h; }

static const struct breaker control_breakers[] = {
    {"a command without room for an answer", 0, no_answer},
    {"a command whose answer cannot be written", 0, answer_not_writable},
    {"a command whose answer has no length", 0, answer_of_nothing},
};
enum { CONTROL_BREAKERS = sizeof control_breakers / sizeof *control_breakers };

static void control_cases(void)
{
    static const struct {
        u8 class, what, length, data[10], want;
    } commands[] = {
        {RX, 0, 1, {1}, ACK_OK}, {RX, 0, 1, {0}, ACK_OK}, {RX, 1, 1, {1}, ACK_OK}, {RX, 1, 1, {0}, ACK_OK},
        {RX, 0, 1, {2}, ACK_ERR}, {RX, 0, 1, {0xff}, ACK_ERR}, {RX, 0, 0, {0}, ACK_ERR}, {RX, 0, 2, {1, 0}, ACK_ERR},
        /* RX_EXTRA was not offered */
        {RX, 2, 1, {1}, ACK_ERR}, {RX, 3, 1, {1}, ACK_ERR}, {RX, 4, 1, {1}, ACK_ERR}, {RX, 5, 1, {1}, ACK_ERR}, {RX, 0xff, 1, {1}, ACK_ERR},
        {MAC, 0, 8, {0}, ACK_OK}, {MAC, 0, 0, {0}, ACK_ERR}, {MAC, 0, 3, {0}, ACK_ERR}, {MAC, 0, 4, {0}, ACK_ERR}, {MAC, 0, 7, {0}, ACK_ERR},
        {MAC, 0, 9, {0}, ACK_ERR}, {MAC, 0, 8, {1}, ACK_ERR}, {MAC, 0, 8, {0, 0, 0, 0, 1}, ACK_ERR},
        {MAC, 0, 10, {1, 0, 0, 0, 2, 2, 2, 2, 2, 2}, ACK_ERR},
        {MAC, 0, 8, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, ACK_ERR},
        {MAC, 0, 8, {0xab, 0xaa, 0xaa, 0x2a, 0, 0, 0, 0}, ACK_ERR}, /* times 6 is 2 beyond 2^32 */
        {MAC, 1, 5, {2}, ACK_ERR}, {MAC, 1, 7, {2}, ACK_ERR}, {MAC, 1, 0, {0}, ACK_ERR}, {MAC, 2, 6, {2}, ACK_ERR},
        {VLAN, 0, 2, {5, 0}, ACK_OK}, {VLAN, 1, 2, {5, 0}, ACK_OK}, {VLAN, 1, 2, {6, 0}, ACK_OK}, {VLAN, 0, 2, {0xff, 0x0f}, ACK_OK},
        {VLAN, 0, 2, {0, 0x10}, ACK_ERR}, {VLAN, 1, 2, {0xff, 0xff}, ACK_ERR}, {VLAN, 0, 1, {5}, ACK_ERR}, {VLAN, 0, 3, {5}, ACK_ERR},
        {VLAN, 2, 2, {5, 0}, ACK_ERR}, {ANNOUNCE, 0, 0, {0}, ACK_ERR}, {MQ, 0, 2, {1, 0}, ACK_ERR}, {MQ, 0, 2, {0, 0x80}, ACK_ERR},
        {MQ, 1, 2, {1, 0}, ACK_ERR}, {OFFLOADS, 0, 8, {0}, ACK_OK},
        /* what was not negotiated, and what is none */
        {OFFLOADS, 0, 8, {2}, ACK_ERR}, {OFFLOADS, 0, 8, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, ACK_ERR},
        {OFFLOADS, 0, 7, {0}, ACK_ERR}, {OFFLOADS, 0, 9, {0}, ACK_ERR}, {OFFLOADS, 1, 8, {0}, ACK_ERR}, {CLASSES, 0, 2, {0}, ACK_ERR},
        {0xff, 0xff, 10, {0xff}, ACK_ERR},
    };
    for (u64 i = 0; i < sizeof commands / sizeof *commands; i++) {
        case_begin("a command to the card that gets an answer");
        victim_start(CONTROL);
        memset((void *)data_of(0), 0, 64);
        memcpy((void *)data_of(0), commands[i].data, commands[i].length);
        expect_ack(command(0, commands[i].class, commands[i].what, commands[i].length), commands[i].want);
        /* One that is refused changes nothing, and none does so beyond a reset. */
        if (commands[i].want == ACK_ERR)
            card_check();
        case_end();
    }
    case_begin("commands whose features were not negotiated");
    victim_start(FEATURE_VERSION_1 | FEATURE_CTRL_VQ);
    for (u8 class = 0; class < 8; class++)
        for (u8 what = 0; what < 8; what++)
            for (u32 length = 0; length < 9; length++) {
                memset((void *)data_of(0), 0, 16);
                expect_ack(command(0, class, what, length), ACK_ERR);
            }
    card_check();
    case_end();

    case_begin("commands in pieces, too short and too long");
    victim_start(CONTROL);
    u16 at = command(0, RX, 0, 1);
    *(volatile u8 *)data_of(0) = 1;
    put_desc(control, at, header_of(0), 1, N, at + 3);
    put_desc(control, at + 3, header_of(0) + 1, 1, N, at + 4);
    put_desc(control, at + 4, rnd(), 0, N, at + 1); /* nothing, which is nowhere */
    expect_ack(at, ACK_OK);
    for (u32 length = 0; length < 2; length++) {
        at = command(0, RX, 0, 0);
        control->desc[at].length = length;
        expect_ack(at, ACK_ERR);
    }
    /* Tables that fill the longest command, one byte more, and all of RAM. */
    memset((void *)data_of(0), 0, MAX_COMMAND);
    *(volatile u32 *)data_of(0) = (MAX_COMMAND - 2 - 8) / 6;
    static const u32 lengths[] = {MAX_COMMAND - 2, MAX_COMMAND - 1, MAX_COMMAND, 1 << 20, 64 << 20};
    for (u64 i = 0; i < sizeof lengths / sizeof *lengths; i++)
        expect_ack(command(0, MAC, 0, lengths[i]), (MAX_COMMAND - 2 - 8) % 6 || i ? ACK_ERR : ACK_OK);
    /* Only the last byte that can be written is the answer. */
    at = command(0, RX, 0, 1);
    *(volatile u8 *)data_of(0) = 0;
    memset((void *)data_of(1), 0x5a, 64);
    put_desc(control, at + 2, data_of(1), 63, W | N, at + 3);
    put_desc(control, at + 3, ack_of(0), 1, W, 0);
    expect_ack(at, ACK_OK);
    for (u64 i = 0; i < 64; i++)
        if (*(volatile u8 *)(data_of(1) + i) != 0x5a)
            fail("the card wrote more than an answer, at ", i);
    case_end();

    case_begin("an address and VLANs that are gone after a reset");
    victim_start(CONTROL);
    memset((void *)data_of(0), 2, 6);
    expect_ack(command(0, MAC, 1, 6), ACK_OK);
    *(volatile u8 *)data_of(0) = 0;
    expect_ack(command(0, RX, 0, 1), ACK_OK);
    case_end();
}

/* Commands by chance, all at once; with `fatal`, one more chain that breaks the queue. */
static void control_batch(int fatal)
{
    u16 slots = (u16)(1 + below(SLOTS - 1)), first = control->seen;
    u8 waiting[SLOTS] = {0};
    for (u16 s = 0; s < slots; s++) {
        volatile u64 *data = (volatile u64 *)data_of(s);
        data[0] = below(2) ? below(4) : rnd();
        data[1] = below(2) ? 0 : rnd();
        u32 length = (u32)(below(8) ? below(12) : below(2) ? below(0x4000) : below(ram_end - ARENA));
        u16 head = command(s, (u8)(below(8) ? below(CLASSES) : rnd()), (u8)(below(8) ? below(3) : rnd()), length);
        if (length > 0x4000)
            control->desc[head + 1].address = ARENA;
        offer(control, head);
        waiting[s] = 1;
    }
    if (fatal)
        offer(control, below(4) ? break_chain(control, SLOTS - 1, victim.accepted)
                                : control_breakers[below(CONTROL_BREAKERS)].chain(control, SLOTS - 1));
    kick(control);
    if (fatal)
        wait_needs_reset("a broken command and no reset asked for, used ");
    else if (!wait_used(control, control->next))
        fail("a command broke the queue", 0);
    if ((u16)(used_index(control) - first) > slots)
        fail("more answers than commands: ", (u16)(used_index(control) - first));
    while (control->seen != used_index(control)) {
        u32 id, length;
        take_used(control, &id, &length);
        u16 s = (u16)(id / STRIDE);
        if (id % STRIDE || s >= slots || !waiting[s] || length != 1)
            fail("an answer to no command, id ", id);
        waiting[s] = 0;
        if (*(volatile u8 *)ack_of(s) > ACK_ERR)
            fail("an answer that is none: ", *(volatile u8 *)ack_of(s));
    }
}

/* Offers packets; with `fatal`, one more chain that breaks one of the two queues. */
void card_batch(int fatal)
{
    if (victim.accepted & FEATURE_CTRL_VQ && below(4) == 0) {
        control_batch(fatal);
        return;
    }
    u16 slots = (u16)(below(8) ? 140 + below(SLOTS - 140) : 1 + below(140)), first = transmit->seen;
    u8 waiting[SLOTS] = {0};
    for (u16 s = 0; s < slots; s++) {
        offer(transmit, tame_chain(s));
        waiting[s] = 1;
    }
    if (fatal && below(2)) {
        kick(transmit);
        if (!wait_used(transmit, transmit->next))
            fail("a tame packet broke the queue", 0);
        for (u16 i = 0; i < slots; i++) {
            u32 id, length;
            take_used(transmit, &id, &length);
        }
        /* Alone: behind a good buffer the card would find it only with the next packet. */
        victim_start(victim.accepted);
        offer(receive, below(4) ? break_chain(receive, SLOTS - 1, victim.accepted)
                                : receive_breakers[below(RECEIVE_BREAKERS)].chain(receive, SLOTS - 1));
        kick(receive);
        wait_needs_reset("a broken receive buffer and no reset asked for, used ");
        return;
    } else if (fatal) {
        offer(transmit, break_chain(transmit, SLOTS - 1, victim.accepted));
        kick(transmit);
    } else
        kick(transmit);
    if (fatal)
        wait_needs_reset("a broken chain and no reset asked for, used ");
    else if (!wait_used(transmit, transmit->next))
        fail("a tame packet broke the queue", 0);
    if ((u16)(used_index(transmit) - first) > slots)
        fail("more answers than packets: ", (u16)(used_index(transmit) - first));
    while (transmit->seen != used_index(transmit)) {
        u32 id, length;
        take_used(transmit, &id, &length);
        u16 s = (u16)(id / STRIDE);
        if (id % STRIDE || s >= slots || !waiting[s] || length)
            fail("an answer to nothing, id ", id);
        waiting[s] = 0;
    }
}

/* Buffers that a packet needs several of, the last of which are broken: the card has taken some when it finds out. */
static void broken_in_the_middle(u16 good)
{
    case_begin("a broken receive buffer in the middle of a packet");
    victim_start(FEATURE_VERSION_1 | FEATURE_MRG_RXBUF);
    for (u16 i = 0; i < good; i++) {
        put_desc(receive, i, data_of(16 + i), 14, W, 0);
        offer(receive, i);
    }
    put_desc(receive, good, data_of(16), 14, W | N, good);
    offer(receive, good);
    kick(receive);
    ask((u8 *)data_of(0));
    put_desc(transmit, 0, data_of(0), HEADER + 60, 0, 0);
    send(0);
    wait_needs_reset("a broken receive buffer and no reset asked for, used ");
    case_end();
    /* Once more with buffers of the same kind, all good: as many as the packet needs, and none from before. */
    case_begin("small receive buffers after that");
    victim_start(FEATURE_VERSION_1 | FEATURE_MRG_RXBUF);
    for (u16 i = 0; i < 64; i++) {
        put_desc(receive, i, data_of(16) + 64ull * i, 14, W, 0);
        offer(receive, i);
    }
    kick(receive);
    ask((u8 *)data_of(0));
    put_desc(transmit, 0, data_of(0), HEADER + 60, 0, 0);
    expect_sent(0);
    u16 next = 0;
    u8 frame[14 * 8];
    for (;;) {
        u32 id, length, filled = 0;
        if (!wait_used(receive, receive->seen + 1))
            fail("good buffers broke the queue", next);
        u16 buffers = *(volatile u16 *)(data_of(16) + 64ull * next + 10);
        for (u16 i = 0; i < buffers; i++, next++) {
            take_used(receive, &id, &length);
            if (id != next)
                fail("a buffer that is not the next: ", id);
            for (u32 at = 0; at < length && filled < sizeof frame; at++)
                frame[filled++] = *(volatile u8 *)(data_of(16) + 64ull * id + at);
        }
        if (is_answer(frame, filled))
            break;
    }
    case_end();
}

void card_cases(void)
{
    breaker_cases(transmit, breakers, breakers_count, FEATURE_VERSION_1);
    breaker_cases(receive, breakers, breakers_count, FEATURE_VERSION_1);
    breaker_cases(receive, receive_breakers, RECEIVE_BREAKERS, FEATURE_VERSION_1);
    breaker_cases(control, breakers, breakers_count, CONTROL);
    breaker_cases(control, control_breakers, CONTROL_BREAKERS, CONTROL);
    control_cases();
    for (u16 good = 1; good < 4; good++)
        broken_in_the_middle(good);

    case_begin("the other queue of a card whose receive queue is broken");
    victim_start(FEATURE_VERSION_1);
    offer(receive, small_buffer(receive, 0));
    kick(receive);
    wait_needs_reset("a broken receive buffer and no reset asked for, used ");
    send(packet(1, 60));
    u64 start = tsc();
    while (used_index(transmit) != 1) {
        spin();
        if (tsc() - start > 80000000000ull)
            fail("the card does not send any more", 0);
    }
    case_end();

    case_begin("headers that promise what is not there");
    victim_start(FEATURE_VERSION_1 | (victim.features & 0xffffff));
    for (u64 i = 0; i < 20000; i++)
        expect_sent(tame_chain(0));
    case_end();

    case_begin("a reset with packets in flight");
    for (u64 round = 0; round < 50; round++) {
        victim_start(FEATURE_VERSION_1);
        for (u16 s = 0; s < SLOTS; s++) {
            put_desc(receive, s, data_of(s), BUFFER, W, 0);
            offer(receive, s);
            random_header((u8 *)header_of(s));
            offer(transmit, packet(s, 60));
        }
        kick(receive);
        kick(transmit);
        for (u64 wait = below(30000); wait; wait--)
            spin();
        victim_reset();
        u64 mark = rnd();
        for (u64 at = DATA; at < DATA + SLOTS * 0x4000; at += 8)
            *(volatile u64 *)at = mark;
        u16 used = used_index(transmit);
        witness_check();
        for (u64 at = DATA; at < DATA + SLOTS * 0x4000; at += 8)
            if (*(volatile u64 *)at != mark)
                fail("the card wrote after its reset, to ", at);
        if (used_index(transmit) != used)
            fail("the card answered after its reset, ", used);
    }
    case_end();
}
