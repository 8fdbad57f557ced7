/* Asks for the hardware address of a host's IP address and waits for the answer (virtio 1.3, section 5.1; RFC 826).
 * Words: host=A.B.C.D (default 10.0.2.1), own=A.B.C.D (default 10.0.2.2). */
#include "virtio.h"

#define FEATURE_MAC (1ull << 5)
enum { RECEIVE = 0, TRANSMIT = 1, HEADER = 12, BUFFER = 2048, BUFFERS = 8 };

static struct queue receive, transmit;
static u8 buffers[BUFFERS][BUFFER] __attribute__((aligned(64)));
static u8 frame[HEADER + 60];

static void address(const struct boot *boot, const char *name, const char *otherwise, u8 *to)
{
    const char *at = word(boot, name);
    if (!at)
        at = otherwise;
    for (int i = 0; i < 4; i++) {
        u32 value = 0;
        while (*at >= '0' && *at <= '9')
            value = value * 10 + (u32)(*at++ - '0');
        to[i] = (u8)value;
        if (*at == '.')
            at++;
    }
}

static void put_mac(const u8 *mac)
{
    for (int i = 0; i < 6; i++) {
        put(i ? ":" : "");
        put_hex(mac[i], 2);
    }
}

int payload_main(const struct boot *boot)
{
    u64 window = virtio_find(boot, 1);
    if (!window)
        return 1;
    u64 offered = virtio_features(window);
    if (!virtio_begin(window, offered & (FEATURE_VERSION_1 | FEATURE_MAC)))
        return 1;
    u8 own_mac[6], own[4], host[4];
    for (u64 i = 0; i < 6; i++)
        own_mac[i] = read8(window + MMIO_CONFIG + i);
    address(boot, "own", "10.0.2.2", own);
    address(boot, "host", "10.0.2.1", host);
    if (!virtio_queue(window, RECEIVE, &receive) || !virtio_queue(window, TRANSMIT, &transmit))
        return 1;
    virtio_go(window);
    put("NET mac ");
    put_mac(own_mac);
    put("\r\n");
    for (u16 i = 0; i < BUFFERS; i++) {
        receive.desc[i] = (struct desc){(u64)buffers[i], BUFFER, DESC_WRITE, 0};
        virtio_send(&receive, i);
    }

    u8 *ethernet = frame + HEADER, *arp = ethernet + 14;
    memset(ethernet, 0xff, 6);
    memcpy(ethernet + 6, own_mac, 6);
    ethernet[12] = 0x08, ethernet[13] = 0x06;
    static const u8 request[8] = {0, 1, 8, 0, 6, 4, 0, 1};
    memcpy(arp, request, 8);
    memcpy(arp + 8, own_mac, 6);
    memcpy(arp + 14, own, 4);
    memcpy(arp + 24, host, 4);
    transmit.desc[0] = (struct desc){(u64)frame, sizeof frame, 0, 0};
    virtio_send(&transmit, 0);
    if (virtio_wait(&transmit, 0) != 0)
        return 1;
    put("NET sent\r\n");

    for (int frames = 0; frames < 32; frames++) {
        u32 length = 0;
        int head = virtio_wait(&receive, &length);
        if (head < 0 || head >= BUFFERS)
            return 1;
        const u8 *got = buffers[head] + HEADER;
        if (length >= HEADER + 42 && got[12] == 0x08 && got[13] == 0x06 && got[21] == 2) {
            for (int i = 0; i < 4; i++)
                if (got[28 + i] != host[i])
                    return 1;
            put("NET-TX OK host is at ");
            put_mac(got + 22);
            put("\r\n");
            return 0;
        }
        /* Something else that the host's network said; the buffer goes back. */
        virtio_send(&receive, (u16)head);
    }
    put("no answer among 32 frames\r\n");
    return 1;
}
