/* Prints what the boot protocol passed. Words: flood=KIBIBYTES (that much more text before the end, default 0). */
#include "payload.h"

static u64 load(const void *at, int bytes)
{
    u64 value = 0;
    for (int i = bytes - 1; i >= 0; i--)
        value = value << 8 | ((const u8 *)at)[i];
    return value;
}

int payload_main(const struct boot *boot)
{
    put(boot->pvh ? "BOOT pvh\r\n" : "BOOT linux64\r\n");
    put("CMDLINE ");
    put(boot->cmdline);
    put("\r\nINITRD ");
    put_hex(boot->initrd, 16);
    put(" ");
    put_dec(boot->initrd_size);
    put(" ");
    for (u64 i = 0; i < boot->initrd_size && i < 8; i++)
        put_hex(read8(boot->initrd + i), 2);
    put("\r\nRSDP ");
    put_hex(boot->rsdp, 16);
    put("\r\n");
    for (u32 i = 0; i < boot->map_entries; i++) {
        const u8 *entry = (const u8 *)boot->map + i * boot->map_entry_size;
        put("MAP ");
        put_hex(load(entry, 8), 16);
        put(" ");
        put_hex(load(entry + 8, 8), 16);
        put(" ");
        put_dec(load(entry + 16, 4));
        put("\r\n");
    }
    for (u64 line = number(boot, "flood", 0) * 16; line; line--)
        put("FLOOD of text that nobody may want to read, in lines of 64 ....\n");
    put("MACHINE OK\r\n");
    return 0;
}
