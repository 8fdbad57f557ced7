/* For measuring restores: writes a word to each of touch=MEBIBYTES (from 32 MiB on, behind this program), then one dot after the other to the
 * serial port, for ever; now and then it looks whether the words are still there. */
#include "payload.h"

int payload_main(const struct boot *boot)
{
    u64 from = 32ull << 20, end = from + (number(boot, "touch", 0) << 20);
    for (u64 at = from; at < end; at += 4096)
        *(volatile u64 *)at = at;
    for (u64 at = from;; at += 4096) {
        put(".");
        if (at >= end)
            at = from;
        if (at < end && *(volatile u64 *)at != at)
            return 1;
    }
}
