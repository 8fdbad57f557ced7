/* For restores: writes a word to each page of touch=MEBIBYTES (from 32 MiB on, behind this program), then one dot after the other to the
 * serial port, for ever. With each it looks at one page more: the words must still be there, and what comes behind them,
 * empty=MEBIBYTES that nobody writes, must be zero. In the first write=MEBIBYTES of those pages it also counts: a word behind the first says
 * how often it has been there. */
#include "payload.h"

int payload_main(const struct boot *boot)
{
    u64 from = 32ull << 20, end = from + (number(boot, "touch", 0) << 20);
    for (u64 at = from; at < end; at += 4096)
        *(volatile u64 *)at = at;
    u64 written = from + (number(boot, "write", 0) << 20), rounds = 0;
    u64 empty_end = end + (number(boot, "empty", 0) << 20);
    for (u64 at = from, empty = end;; at += 4096, empty += 4096) {
        put(".");
        if (at >= end) {
            at = from;
            rounds++;
        }
        if (at < end && at < written) {
            volatile u64 *count = (volatile u64 *)(at + 2048);
            if (*count != rounds)
                return 1;
            *count = rounds + 1;
        }
        if (at < end && *(volatile u64 *)at != at)
            return 1;
        if (empty >= empty_end)
            empty = end;
        if (empty < empty_end && *(volatile u64 *)empty != 0)
            return 1;
    }
}
