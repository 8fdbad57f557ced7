/* Asks for the hardware address of the host's IP address again and again (virtio 1.3, section 5.1; RFC 826), as a ping does.
 * A packet may be lost, as on any network, and is then sent again; a buffer may not be: each must come back, and once.
 * Words: host=A.B.C.D, own=A.B.C.D; it goes on until the serial port receives a byte. Says "LOOP n" before every 10th
 * answer. */
#include "virtio.h"

#define FEATURE_MAC (1ull << 5)
enum { RECEIVE = 0, TRANSMIT = 1, HEADER = 12, BUFFER = 2048, BUFFERS = 8 };

static struct queue receive, transmit;
static u8 buffers[BUFFERS][BUFFER] __attribute__((aligned(64)));
static u8 frame[HEADER + 60];

static void address(const char *at, u8 *to)
{
    for (int i = 0; at && i < 4; i++) {
        u32 value = 0;
        while (*at >= '0' && *at <= '9')
            value = value * 10 + (u32)(*at++ - '0');
        to[i] = (u8)value;
        if (*at == '.')
            at++;
    }
}

static int key(void) { return inb(SERIAL_PORT + 5) & 1; }

static int used(struct queue *queue) { return *(volatile u16 *)&queue->used.index != queue->seen; }

int payload_main(const struct boot *boot)
{
    u64 window = virtio_find(boot, 1);
    if (!window || !virtio_begin(window, virtio_features(window) & (FEATURE_VERSION_1 | FEATURE_MAC)))
        return 1;
    u8 own[4], host[4];
    address(word(boot, "own"), own);
    address(word(boot, "host"), host);
    u8 *ethernet = frame + HEADER, *arp = ethernet + 14;
    memset(ethernet, 0xff, 6);
    for (u64 i = 0; i < 6; i++)
        ethernet[6 + i] = read8(window + MMIO_CONFIG + i);
    ethernet[12] = 0x08, ethernet[13] = 0x06;
    static const u8 request[8] = {0, 1, 8, 0, 6, 4, 0, 1};
    memcpy(arp, request, 8);
    memcpy(arp + 8, ethernet + 6, 6);
    memcpy(arp + 14, own, 4);
    memcpy(arp + 24, host, 4);
    if (!virtio_queue(window, RECEIVE, &receive) || !virtio_queue(window, TRANSMIT, &transmit))
        return 1;
    virtio_go(window);
    u32 posted = 0;
    for (u16 i = 0; i < BUFFERS; i++) {
        receive.desc[i] = (struct desc){(u64)buffers[i], BUFFER, DESC_WRITE, 0};
        virtio_send(&receive, i);
        posted |= 1u << i;
    }
    transmit.desc[0] = (struct desc){(u64)frame, sizeof frame, 0, 0};
    u64 answers = 0, sent = 0;
    while (!key()) {
        if (answers % 10 == 0) {
            put("LOOP ");
            put_dec(answers);
            put("\r\n");
        }
        virtio_send(&transmit, 0);
        sent++;
        if (virtio_wait(&transmit, 0) != 0 || used(&transmit)) {
            put("a packet came back never or twice\r\n");
            return 1;
        }
        /* Long enough for the host, and not for ever: the answer may be lost. */
        int answered = 0;
        for (u32 turn = 0; turn < 100000 && !answered; turn++) {
            if (!used(&receive))
                continue;
            u32 length = 0;
            int head = virtio_wait(&receive, &length);
            if (head < 0 || head >= BUFFERS || !(posted & 1u << head)) {
                put("a buffer came back twice\r\n");
                return 1;
            }
            posted &= ~(1u << head);
            const u8 *got = buffers[head] + HEADER;
            answered = length >= HEADER + 42 && got[12] == 0x08 && got[13] == 0x06 && got[21] == 2;
            for (int i = 0; i < 4; i++)
                answered = answered && got[28 + i] == host[i];
            virtio_send(&receive, (u16)head);
            posted |= 1u << head;
        }
        answers += (u64)answered;
    }
    put("NET-LOOP OK answers ");
    put_dec(answers);
    put(" sent ");
    put_dec(sent);
    put("\r\n");
    return 0;
}
