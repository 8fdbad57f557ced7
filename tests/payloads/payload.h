/* What bare guests share: ports, the serial line, the command line, ways to end. */
#pragma once
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

/* The machine's addresses; `vmm-main/src/machine/layout.rs` is where they are decided. Each can be changed by a word
 * of the command line where a payload says so, so that other VMMs' machines can be probed. */
enum {
    SERIAL_PORT = 0x3f8,
    I8042_COMMAND = 0x64,
    POWER_PORT = 0x600, /* ACPI sleep control; then sleep status, reset */
    VIRTIO_MMIO_BASE = 0xd0000000u,
    VIRTIO_MMIO_SIZE = 0x1000,
    VIRTIO_MMIO_SLOTS = 11,
};

/* What the boot protocol passed, whichever it was. */
struct boot {
    u32 pvh;             /* 1: PVH, 0: Linux 64-bit */
    const char *cmdline; /* never null */
    u64 initrd, initrd_size;
    u64 rsdp; /* 0 when not told */
    const void *map;
    u32 map_entries;
    u32 map_entry_size; /* address, size, type at offsets 0, 8, 16 in both forms */
};

/* Each payload defines this. It ends the machine when it returns: 0 prints nothing, else "FAILED". */
int payload_main(const struct boot *boot);

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline u32 read32(u64 address) { return *(volatile u32 *)address; }
static inline void write32(u64 address, u32 value) { *(volatile u32 *)address = value; }
static inline u8 read8(u64 address) { return *(volatile u8 *)address; }
static inline void barrier(void) { __asm__ volatile("mfence" : : : "memory"); }

void *memset(void *to, int value, u64 count);
void *memcpy(void *to, const void *from, u64 count);
void put(const char *text);
void put_hex(u64 value, int digits);
void put_dec(u64 value);

/* The value of NAME=VALUE on the command line, or null. It ends at a space. */
const char *word(const struct boot *boot, const char *name);
u64 number(const struct boot *boot, const char *name, u64 otherwise);
int starts_with(const char *text, const char *prefix);
void end_machine(const struct boot *boot);
