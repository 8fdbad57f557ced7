/* Misuses a disk or a card in every way that comes to mind, and sees to it that what is not attacked goes on.
 *
 * Words: target=disk|card; what=cases (each misuse with a name, and what it must lead to), rings (chains by chance),
 * registers (virtio-mmio accesses by chance), race (two processors at once, by chance), platform (the board's ports and addresses); seed=NUMBER; ops=NUMBER, how many
 * hostile operations: chains made available and kicked, and register accesses; ram=BYTES; with target=card own= and host=,
 * IP addresses. A disk that is not attacked is needed in any case.
 *
 * After each attack that stops the device, it is reset and must serve again with the right data; the other disk must too.
 * Ends with "HOSTILE OK", what was done, and how fast. Each batch of chains follows from the seed and its number alone. */
#include "hostile.h"

void run_at_level_3(void (*function)(void));

static const struct boot *boot;
static const char *now = "";
static u64 batch;
u64 ram_end, seed;
struct cpu cpus[2];

static u64 operations(void)
{
    u64 sum = 0;
    for (int i = 0; i < 2; i++)
        sum += cpus[i].count.chains + cpus[i].count.registers;
    return sum;
}

static void put_number(const char *name, u64 value)
{
    put(name);
    put_dec(value);
}

/* Said by the second processor, which has no way to the serial port. */
static volatile struct {
    const char *what;
    u64 value;
} second_failed;

_Noreturn void fail(const char *what, u64 value)
{
    if (me() != &cpus[0]) {
        second_failed.value = value;
        barrier();
        second_failed.what = what;
        for (;;)
            spin();
    }
    put("\r\nHOSTILE FAILED ");
    put(what);
    put_hex(value, 16);
    put_number(" seed ", seed);
    put_number(" batch ", batch);
    put(" in: ");
    put(now);
    put("\r\n");
    end_machine(boot);
    for (;;)
        ;
}

void second_check(void)
{
    if (second_failed.what)
        fail(second_failed.what, second_failed.value);
}

void victim_check(void)
{
    if (victim.id == 2)
        disk_check();
    else
        card_check();
}

static u64 base_features(void) { return FEATURE_VERSION_1 | (victim.id == 2 ? 1ull << 9 : 1ull << 5); }

void recover(void)
{
    victim_reset();
    victim_start(base_features());
    victim_check();
    witness_check();
}

void case_begin(const char *name)
{
    static u64 cases;
    now = name;
    me()->random = seed ^ ++cases << 32;
}

void case_end(void)
{
    put("CASE ");
    put(now);
    recover();
    put(": ok\r\n");
}

/* Offered bits by chance, and those that make sense often. */
static u64 some_features(void)
{
    u64 all = victim.features;
    u64 picked = below(2) ? all : all & (rnd() | rnd());
    /* A disk that cannot flush writes each sector through, which is slow and no one's fault. */
    return picked | base_features();
}

static void rings_by_chance(u64 wanted)
{
    u64 told = 0;
    now = "chains by chance";
    victim_start(some_features());
    for (; operations() < wanted; batch++) {
        me()->random = seed ^ batch * 0xd1342543de82ef95ull;
        if (operations() - told > 1000000) {
            told = operations();
            put_number("OPERATIONS ", told);
            put("\r\n");
        }
        u64 kind = below(256);
        int fatal = kind < 12;
        if (kind >= 252)
            chaos(&rings[below(queues_with(victim.accepted))], kind & 1);
        else if (kind >= 250)
            register_burst(1 + below(32));
        else if (victim.id == 2)
            disk_batch(fatal);
        else
            card_batch(fatal);
        if (fatal || kind >= 250) {
            recover();
            victim_start(some_features());
        }
    }
}

static void registers_by_chance(u64 wanted)
{
    now = "registers by chance";
    for (; operations() < wanted; batch++) {
        me()->random = seed ^ batch * 0xd1342543de82ef95ull;
        if (below(2))
            victim_start(some_features());
        register_burst(1 + below(256));
        recover();
    }
}

static void attack(void)
{
    const char *what = word(boot, "what"), *target = word(boot, "target");
    victim.id = target && starts_with(target, "card") ? 1 : 2;
    victim.window = virtio_find(boot, victim.id);
    if (!victim.window)
        fail("no device to attack", victim.id);
    victim.features = virtio_features(victim.window);
    victim.capacity = *(volatile u64 *)(victim.window + MMIO_CONFIG);
    victim.queues = 1;
    if (victim.id == 2 && victim.features & FEATURE_BLK_MQ)
        victim.queues = *(volatile u16 *)(victim.window + MMIO_CONFIG + 34);
    if (victim.queues > QUEUES)
        victim.queues = QUEUES;
    if (victim.id == 1)
        card_set_up(boot);
    witness_set_up(boot);
    u64 wanted = number(boot, "ops", 100000), start = tsc();
    put("HOSTILE\r\n");
    if (what && starts_with(what, "cases")) {
        register_cases();
        if (victim.id == 2)
            disk_cases();
        else
            card_cases();
    } else if (what && starts_with(what, "registers")) {
        registers_by_chance(wanted);
    } else if (what && starts_with(what, "race")) {
        now = "two processors";
        race_set_up();
        for (u64 told = 0; operations() < wanted; batch++) {
            me()->random = seed ^ batch * 0xd1342543de82ef95ull;
            race();
            recover();
            if (operations() - told > 1000000) {
                told = operations();
                put_number("OPERATIONS ", told);
                put("\r\n");
            }
        }
    } else if (what && starts_with(what, "platform")) {
        now = "platform";
        for (; operations() < wanted; batch++) {
            me()->random = seed ^ batch * 0xd1342543de82ef95ull;
            platform(10000);
            recover();
        }
    } else
        rings_by_chance(wanted);
    now = "the end";
    recover();
    put_number("\r\nHOSTILE OK seed ", seed);
    struct count all = cpus[0].count;
    all.chains += cpus[1].count.chains;
    all.registers += cpus[1].count.registers;
    all.resets += cpus[1].count.resets;
    put_number(" chains ", all.chains);
    put_number(" registers ", all.registers);
    put_number(" answered ", all.answered);
    put_number(" needs_reset ", all.needs_reset);
    put_number(" resets ", all.resets);
    put_number(" checks ", all.checks);
    put_number(" second ", cpus[1].count.chains + cpus[1].count.registers);
    put_number(" cycles ", tsc() - start);
    put("\r\n");
    /* Whoever watches looks at the processes now, and then sends a byte. */
    while (!(inb(SERIAL_PORT + 5) & 1))
        spin();
    end_machine(boot);
}

int payload_main(const struct boot *from)
{
    boot = from;
    ram_end = number(boot, "ram", 128 << 20);
    seed = number(boot, "seed", 1);
    run_at_level_3(attack);
    return 1;
}
