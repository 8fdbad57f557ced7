/* Has a file of a shared folder put into the window of its device, and reads it there (virtio 1.3, sections 2.10, 4.2.2 and 5.11;
 * FUSE's `fuse_setupmapping_in` and `fuse_removemapping_in`). Each key on the serial line takes it away, or puts it there again,
 * every second time for writing: its first byte is an F then.
 * Words: name=FILE (default from-host). */
#include "virtio.h"

enum { MMIO_SHM_SEL = 0xac, MMIO_SHM_LEN_LOW = 0xb0, MMIO_SHM_BASE_LOW = 0xb8, MMIO_SHM_BASE_HIGH = 0xbc };
enum { LOOKUP = 1, OPEN = 14, INIT = 26, SETUPMAPPING = 48, REMOVEMAPPING = 49 };
enum { ROOT = 1, MAP_ALIGNMENT = 1 << 26, FOR_WRITING = 1, FOR_READING = 2, READ_WRITE = 2, LARGE_PAGE = 2 << 20 };

extern u64 pml4[];
static u64 directory[512] __attribute__((aligned(4096)));
static struct queue high, requests;
static struct {
    u32 length, opcode;
    u64 unique, node;
    u32 uid, gid, pid, padding;
    u8 body[256];
} request __attribute__((aligned(64)));
static struct {
    u32 length;
    int error;
    u64 unique;
    u8 body[256];
} answer __attribute__((aligned(64)));

/* Asks and waits; 0 when it went well. */
static int ask(u32 opcode, u64 node, const void *body, u32 length)
{
    static u64 unique;
    request.length = 40 + length;
    request.opcode = opcode;
    request.unique = ++unique;
    request.node = node;
    memcpy(request.body, body, length);
    requests.desc[0] = (struct desc){(u64)&request, request.length, DESC_NEXT, 1};
    requests.desc[1] = (struct desc){(u64)&answer, sizeof answer, DESC_WRITE, 0};
    virtio_send(&requests, 0);
    if (virtio_wait(&requests, 0) != 0)
        return 1;
    if (answer.error || answer.unique != unique) {
        put("request ");
        put_dec(opcode);
        put(" failed with ");
        put_dec((u64)-answer.error);
        put("\r\n");
        return 1;
    }
    return 0;
}

static void key(void)
{
    while (!(inb(SERIAL_PORT + 5) & 1))
        __asm__ volatile("pause" : : : "memory");
    inb(SERIAL_PORT);
}

int payload_main(const struct boot *boot)
{
    u64 device = virtio_find(boot, 26);
    if (!device || !virtio_begin(device, FEATURE_VERSION_1))
        return 1;
    write32(device + MMIO_SHM_SEL, 0);
    u64 window = (u64)read32(device + MMIO_SHM_BASE_HIGH) << 32 | read32(device + MMIO_SHM_BASE_LOW);
    put("WINDOW ");
    put_hex(window, 16);
    put(" ");
    put_dec(read32(device + MMIO_SHM_LEN_LOW));
    put("\r\n");
    if (window >> 39 || window % (1 << 30))
        return 1;
    /* start.S maps the first 4 GiB. */
    u64 *gibibytes = (u64 *)(pml4[0] & ~0xfffull);
    for (u64 i = 0; i < 512; i++)
        directory[i] = (window + i * LARGE_PAGE) | 0x87;
    gibibytes[window >> 30] = (u64)directory | 7;
    __asm__ volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" : : : "rax", "memory");

    if (!virtio_queue(device, 0, &high) || !virtio_queue(device, 1, &requests))
        return 1;
    virtio_go(device);
    u32 init[16] = {7, 38, 0, MAP_ALIGNMENT};
    if (ask(INIT, 0, init, sizeof init))
        return 1;
    char name[64] = "from-host";
    const char *other = word(boot, "name");
    if (other)
        for (int i = 0; i < 63; i++) {
            name[i] = *other && *other != ' ' ? *other++ : 0;
        }
    u32 length = 0;
    while (name[length++])
        ;
    if (ask(LOOKUP, ROOT, name, length))
        return 1;
    u64 node = *(u64 *)answer.body, flags = READ_WRITE;
    if (ask(OPEN, node, &flags, sizeof flags))
        return 1;
    u64 handle = *(u64 *)answer.body;
    for (u64 place = 0;; place = LARGE_PAGE - place) {
        u64 map[5] = {handle, 0, LARGE_PAGE, place ? FOR_READING | FOR_WRITING : FOR_READING, place};
        if (ask(SETUPMAPPING, node, map, sizeof map))
            return 1;
        if (place)
            *(volatile char *)(window + place) = 'F';
        put("SAW ");
        for (const volatile char *at = (const char *)(window + place); *at; at++)
            put((char[2]){*at, 0});
        key();
        struct __attribute__((packed)) {
            u32 count;
            u64 place, length;
        } gone = {1, place, LARGE_PAGE};
        if (ask(REMOVEMAPPING, node, &gone, sizeof gone))
            return 1;
        put("REMOVED\r\n");
        key();
    }
}
