#include "payload.h"

void put(const char *text)
{
    while (*text)
        outb(SERIAL_PORT, (u8)*text++);
}

void put_hex(u64 value, int digits)
{
    for (int i = digits - 1; i >= 0; i--)
        outb(SERIAL_PORT, (u8) "0123456789abcdef"[(value >> (i * 4)) & 15]);
}

void put_dec(u64 value)
{
    char digits[21];
    int count = 0;
    do {
        digits[count++] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    while (count)
        outb(SERIAL_PORT, (u8)digits[--count]);
}

int starts_with(const char *text, const char *prefix)
{
    while (*prefix)
        if (*text++ != *prefix++)
            return 0;
    return 1;
}

const char *word(const struct boot *boot, const char *name)
{
    const char *at = boot->cmdline;
    while (*at) {
        while (*at == ' ')
            at++;
        if (starts_with(at, name)) {
            const char *value = at;
            for (const char *n = name; *n; n++)
                value++;
            if (*value == '=')
                return value + 1;
        }
        while (*at && *at != ' ')
            at++;
    }
    return 0;
}

u64 number(const struct boot *boot, const char *name, u64 otherwise)
{
    const char *at = word(boot, name);
    if (!at)
        return otherwise;
    u64 base = 10, value = 0;
    if (at[0] == '0' && at[1] == 'x') {
        base = 16;
        at += 2;
    }
    for (;; at++) {
        u64 digit;
        if (*at >= '0' && *at <= '9')
            digit = (u64)(*at - '0');
        else if (base == 16 && *at >= 'a' && *at <= 'f')
            digit = (u64)(*at - 'a' + 10);
        else
            return value;
        value = value * base + digit;
    }
}

void end_machine(const struct boot *boot)
{
    const char *how = word(boot, "end");
    if (how && starts_with(how, "reset"))
        outb(I8042_COMMAND, 0xfe);
    else if (how && starts_with(how, "reboot"))
        outb(POWER_PORT + 2, 1); /* the value that the FADT names */
    else if (how && starts_with(how, "triple")) {
        struct __attribute__((packed)) {
            u16 limit;
            u64 base;
        } none = {0, 0};
        __asm__ volatile("lidt %0; int3" : : "m"(none));
    } else if (!(how && starts_with(how, "halt")))
        outb(POWER_PORT, 5 << 2 | 1 << 5); /* SLP_TYP of S5, SLP_EN */
    for (;;)
        __asm__ volatile("cli; hlt");
}

/* Linux/x86 boot protocol: offsets into boot_params. */
enum { E820_ENTRIES = 0x1e8, RAMDISK_IMAGE = 0x218, RAMDISK_SIZE = 0x21c, CMD_LINE_PTR = 0x228, ACPI_RSDP = 0x70, E820_TABLE = 0x2d0 };

/* PVH: hvm_start_info (xen/include/public/arch-x86/hvm/start_info.h). */
struct pvh_info {
    u32 magic, version, flags, modules;
    u64 module_list, cmdline, rsdp, map;
    u32 map_entries, reserved;
};

static u32 load32(const u8 *at) { return (u32)at[0] | (u32)at[1] << 8 | (u32)at[2] << 16 | (u32)at[3] << 24; }
static u64 load64(const u8 *at) { return load32(at) | (u64)load32(at + 4) << 32; }

/* start.S comes here. */
void payload_start(u64 pvh, const u8 *info)
{
    struct boot boot = {.pvh = (u32)pvh, .cmdline = ""};
    if (pvh) {
        const struct pvh_info *p = (const void *)info;
        if (p->cmdline)
            boot.cmdline = (const char *)p->cmdline;
        boot.rsdp = p->rsdp;
        boot.map = (const void *)p->map;
        boot.map_entries = p->version ? p->map_entries : 0;
        boot.map_entry_size = 24;
        if (p->modules) {
            boot.initrd = *(const u64 *)p->module_list;
            boot.initrd_size = *(const u64 *)(p->module_list + 8);
        }
    } else {
        if (load32(info + CMD_LINE_PTR))
            boot.cmdline = (const char *)(u64)load32(info + CMD_LINE_PTR);
        boot.rsdp = load64(info + ACPI_RSDP);
        boot.map = info + E820_TABLE;
        boot.map_entries = info[E820_ENTRIES];
        boot.map_entry_size = 20;
        boot.initrd = load32(info + RAMDISK_IMAGE);
        boot.initrd_size = load32(info + RAMDISK_SIZE);
    }
    if (payload_main(&boot))
        put("FAILED\r\n");
    end_machine(&boot);
}

/* The compiler may call these. */
void *memset(void *to, int value, u64 count)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(value) : "memory");
    return start;
}

void *memcpy(void *to, const void *from, u64 count)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    return start;
}
