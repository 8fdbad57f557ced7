/* What the parts of the hostile guest share. */
#pragma once
#include "virtio.h"

/* Where things are. Devices are told to write nearly anywhere from ARENA on; the program, its stack and its page tables
 * are far below, since a guest that shoots itself shows nothing about the VMM. */
enum {
    RINGS = 0x2000000,   /* of the device under attack: 0x10000 a queue */
    HEADERS = 0x2100000, /* 64 bytes a slot: header, status, small things */
    TABLES = 0x2180000,  /* 0x400 a slot: indirect tables */
    DATA = 0x2280000,    /* 0x4000 a slot */
    ARENA = 0x3000000,   /* up to the end of RAM */
    STRIDE = 5, /* descriptors of a slot */
    SLOTS = 204, /* a queue */
    QUEUES = 4, /* that are used of a device, at most */
};
enum { DESC_INDIRECT = 4, RING_SIZE = 1024 /* the device's queue-size must be that */ };
#define FEATURE_BLK_MQ (1ull << 12)
#define FEATURE_CTRL_VQ (1ull << 17)
#define FEATURE_INDIRECT (1ull << 28)
#define FEATURE_EVENT_IDX (1ull << 29)

/* From the command line. */
extern u64 ram_end, seed;

/* What was done; the last line tells them. */
struct count {
    u64 chains;      /* made available and kicked */
    u64 registers;   /* register accesses, those of set-up and checks not counted */
    u64 answered;    /* chains that came back */
    u64 needs_reset; /* times that the device asked for a reset */
    u64 resets;      /* times that it got one */
    u64 checks;      /* round trips with compared data, on either device */
};

/* What each processor has for itself. The second one's stack is its own. */
struct cpu {
    u64 random;
    struct count count;
} __attribute__((aligned(64)));
extern struct cpu cpus[2];
extern u8 second_stack[], second_stack_top[];
static inline struct cpu *me(void)
{
    u64 stack;
    __asm__("mov %%rsp, %0" : "=r"(stack));
    return &cpus[stack >= (u64)second_stack && stack <= (u64)second_stack_top];
}

/* Repeatable numbers (splitmix64). */
static inline u64 rnd(void)
{
    u64 z = me()->random += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}
static inline u64 below(u64 limit) { return rnd() % limit; }
static inline u64 tsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}
static inline void spin(void) { __asm__ volatile("pause" : : : "memory"); }


/* A device under attack: a disk or a card. */
struct victim {
    u32 id; /* virtio device ID */
    u64 window;
    u64 features; /* offered */
    u64 accepted; /* since the last start */
    u64 capacity; /* of a disk, in sectors */
    u16 queues;   /* of a disk that are used, with FEATURE_BLK_MQ */
};
extern struct victim victim;

/* A queue of the victim, anywhere. */
struct ring {
    u16 number, size;
    volatile struct desc *desc;
    volatile u16 *avail; /* flags, index, entries, used_event */
    volatile u16 *used;  /* flags, index, entries of two 32-bit words, avail_event */
    u16 next, seen;      /* of the available and of the used ring */
};
extern struct ring rings[QUEUES];
/* How many of them a driver with these features starts: of a card its control queue as well. */
u16 queues_with(u64 features);

/* Says what went wrong, with the seed, and ends the machine. */
_Noreturn void fail(const char *what, u64 value);
/* As the second processor would have, had it a way to say it. */
void second_check(void);

/* hostile-ring.c */
void victim_reset(void);
void victim_negotiate(u64 features);
void ring_place(struct ring *ring, u16 number, u16 size, u64 desc, u64 avail, u64 used);
void ring_default(struct ring *ring, u16 number, u16 size);
void ring_tell(const struct ring *ring); /* writes the registers, ready last */
void victim_go(void);
void victim_start(u64 features); /* all of the above with default queues */
static inline void put_desc(struct ring *ring, u16 at, u64 address, u32 length, u16 flags, u16 next)
{
    ring->desc[at].address = address;
    ring->desc[at].length = length;
    ring->desc[at].flags = flags;
    ring->desc[at].next = next;
}
static inline void table_desc(u64 table, u16 at, u64 address, u32 length, u16 flags, u16 next)
{
    ((volatile struct desc *)table)[at] = (struct desc){address, length, flags, next};
}
void offer(struct ring *ring, u16 head); /* no kick */
void kick(const struct ring *ring);
u16 used_index(const struct ring *ring);
int wait_used(struct ring *ring, u16 until); /* 0: NEEDS_RESET instead */
void wait_used_anyway(const struct ring *ring, u16 until, const char *what); /* whatever became of another queue */
void take_used(struct ring *ring, u32 *id, u32 *length);
void wait_needs_reset(const char *what);
int needs_reset(void);
void expect_quiet(const char *what); /* not NEEDS_RESET */

/* hostile-chain.c */
struct breaker {
    const char *name;
    u64 needs; /* a feature */
    u16 (*chain)(struct ring *ring, u16 slot); /* returns the head */
};
extern const struct breaker breakers[];
extern const u64 breakers_count;
u16 break_chain(struct ring *ring, u16 slot, u64 features);
void breaker_cases(struct ring *ring, const struct breaker *list, u64 length, u64 features);
void chaos(struct ring *ring, int reset_at_once);

/* hostile-disk.c, hostile-card.c: round trips with compared data, cases with a name, chains by chance */
void witness_set_up(const struct boot *boot);
void witness_check(void);
void disk_check(void); /* of the victim, after victim_start */
void disk_cases(void);
u16 disk_plain(struct ring *ring, u16 slot); /* a request that is answered */
void disk_batch(int fatal);
void card_set_up(const struct boot *boot);
void card_check(void);
void card_cases(void);
void card_batch(int fatal);

/* Resets the victim, has it started again, and has both devices show that they work. */
void recover(void);
/* The victim works after a start; does not reset it. */
void victim_check(void);

/* hostile-registers.c */
void register_cases(void);
void register_burst(u64 accesses);
/* hostile-race.c: two processors at once */
void race_set_up(void);
void race(void);
/* hostile-platform.c */
void platform(u64 accesses);

void case_begin(const char *name);
void case_end(void);
