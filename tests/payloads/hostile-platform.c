/* Ports and addresses of the board, and those where nothing is, in no order; string instructions of any length.
 *
 * Left out is what ends or resets the guest when it works, as it should: that is tested elsewhere. And what belongs to KVM
 * itself: its interrupt controllers could stop this processor for good. */
#include "hostile.h"

enum { STRING = 0x2000 };

static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline u16 inw(u16 port)
{
    u16 value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline u32 inl(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* `repeat` times, 1, 2 or 4 bytes each, from or to the arena. */
static void string_io(u16 port, int write, u64 width, u64 repeat)
{
    u64 at = ARENA;
    if (write && width == 1)
        __asm__ volatile("rep outsb" : "+S"(at), "+c"(repeat) : "d"(port) : "memory");
    else if (write && width == 2)
        __asm__ volatile("rep outsw" : "+S"(at), "+c"(repeat) : "d"(port) : "memory");
    else if (write)
        __asm__ volatile("rep outsl" : "+S"(at), "+c"(repeat) : "d"(port) : "memory");
    else if (width == 1)
        __asm__ volatile("rep insb" : "+D"(at), "+c"(repeat) : "d"(port) : "memory");
    else if (width == 2)
        __asm__ volatile("rep insw" : "+D"(at), "+c"(repeat) : "d"(port) : "memory");
    else
        __asm__ volatile("rep insl" : "+D"(at), "+c"(repeat) : "d"(port) : "memory");
}

/* Whether a write there ends or resets the guest by right, or is KVM's. */
static int spared(u32 port, u64 bytes)
{
    for (u32 at = port; at < port + bytes; at++)
        if (at == I8042_COMMAND || at == 0x60 || (at >= POWER_PORT && at < POWER_PORT + 3) || at == 0xcf9 || at == 0x92 ||
            (at >= 0x20 && at < 0x22) || (at >= 0x40 && at < 0x44) || at == 0x61 || (at >= 0xa0 && at < 0xa2) || at == 0x4d0 || at == 0x4d1)
            return 1;
    return 0;
}

static u16 some_port(void)
{
    static const u16 ports[] = {
        SERIAL_PORT, SERIAL_PORT + 1, SERIAL_PORT + 2, SERIAL_PORT + 3, SERIAL_PORT + 4, SERIAL_PORT + 5, SERIAL_PORT + 6,
        SERIAL_PORT + 7, 0x70, 0x71, 0x72, POWER_PORT, POWER_PORT + 1, POWER_PORT + 2, POWER_PORT + 3, POWER_PORT + 4, 0x60, 0x64,
        0x62, 0x80, 0x2f8, 0x3e8, 0x510, 0x511, 0x514, 0xcf8, 0xcfc, 0xcff, 0xb2, 0, 0xffff, 0xfffe, 0xfffc,
    };
    return below(4) ? ports[below(sizeof ports / sizeof *ports)] : (u16)rnd();
}

static void one_port(void)
{
    u16 port = some_port();
    u32 value = below(2) ? (u32)rnd() : (u32)below(256);
    switch (below(8)) {
    case 0: (void)inb(port); break;
    case 1: (void)inw(port); break;
    case 2: (void)inl(port); break;
    case 3: if (!spared(port, 2)) outw(port, (u16)value); break;
    case 4: if (!spared(port, 4)) outl(port, value); break;
    case 5: /* the commands of the keyboard controller but its reset, and nothing for its output port */
        if (value % 256 != 0xfe && value % 256 != 0xd1 && !(value % 256 >= 0xf0))
            outb(I8042_COMMAND, (u8)value);
        break;
    case 6: /* sleep types that are none */
        if ((value & 0x3c) != (5 << 2 | 1 << 5))
            outb(POWER_PORT, (u8)value);
        break;
    default: if (!spared(port, 1)) outb(port, (u8)value);
    }
}

static void one_address(void)
{
    /* The hole below 4 GiB; devices, and the interrupt controllers' pages left out. */
    u64 at = 0xc0000000 + below(0x3ffffff8);
    if (below(2))
        at = VIRTIO_MMIO_BASE + below((VIRTIO_MMIO_SLOTS + 2) * VIRTIO_MMIO_SIZE);
    if (at >= victim.window - 8 && at < victim.window + VIRTIO_MMIO_SIZE)
        at = 0xc0000000;
    if (at >= 0xfebff000 && at < 0xfef00000)
        at = 0xffff0000 + below(0xfff0);
    int disk = read32((at & ~0xfffull) + MMIO_MAGIC) == 0x74726976;
    u64 value = rnd();
    switch (below(8)) {
    case 0: (void)*(volatile u8 *)at; break;
    case 1: (void)*(volatile u16 *)at; break;
    case 2: (void)*(volatile u64 *)at; break;
    case 3: (void)*(volatile u32 *)at; break;
    case 4: if (!disk) *(volatile u8 *)at = (u8)value; break;
    case 5: if (!disk) *(volatile u16 *)at = (u16)value; break;
    case 6: if (!disk) *(volatile u64 *)at = value; break;
    default: if (!disk) *(volatile u32 *)at = (u32)value;
    }
}

void platform(u64 accesses)
{
    u64 until = me()->count.registers + accesses;
    while (me()->count.registers < until) {
        u64 kind = below(64);
        if (kind == 0) {
            u16 port = some_port();
            u64 width = 1ull << below(3), repeat = below(4) ? below(64) : below(STRING);
            int write = below(2) != 0;
            /* One operation, however often it repeats. */
            if (!(write && spared(port, width)))
                string_io(port, write, width, repeat);
        } else if (kind < 40)
            one_port();
        else
            one_address();
        me()->count.registers++;
    }
    /* The serial port as the firmware would leave it: no divisor latch, no loop. */
    outb(SERIAL_PORT + 3, 3);
    outb(SERIAL_PORT + 4, 3);
    outb(SERIAL_PORT + 1, 0);
    while (inb(SERIAL_PORT + 5) & 1)
        (void)inb(SERIAL_PORT);
}
