/* ring.c - the ring and request parser against guest memory that lies and changes.
 *
 * The input's front is guest memory and a script: descriptors, available entries, polls,
 * completions, verbs, and what a front end commands between them. Its back is the guest's
 * second processor: each load of guest memory by the code under test is announced to
 * __sanitizer_cov_loadN(), which changes guest memory as the back says before the load is
 * carried out. The reactor's own round (reactor.c) drives rings, group and front end on a
 * disk in memory.
 *
 * Checked besides what the sanitizers see: a byte of guest memory changes only if it is in a
 * used ring or in a descriptor that was read as device-writable; another disk's front end is
 * served afterwards; nothing stays in flight or in the arena.
 */
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <sys/mman.h>

#include "../../native/reactor.c"
#include "seam.h"

#define QUEUES 2u
#define REGIONS 4u
#define SEGMENTS 10u
#define ARENA_BYTES ((uint64_t)SEGMENTS * SEGMENT_BYTES + 2 * PAGE)
#define JOURNAL_BYTES (JOURNAL_LOG_OFFSET + 4 * SEGMENTS * SEGMENT_BYTES)
#define IMAGE_BYTES ((1u << 20) + 3 * SECTOR_BYTES)

/* Neighbours, a region at the end of the address space, and one on odd addresses. */
static const struct {
    uint64_t guest, user, bytes, skew;
} place[REGIONS] = {
    {0, 0x7f0000000000, 0x8000, 0},
    {0x8000, 0x7f0000010000, 0x2000, 0},
    {0xffffffffffff8000, 0xffffffffffff0000, 0x7000, 0},
    {0x100000003, 0x7f0000020000, 0x1fff, 3},
};

struct region {
    uint8_t *base, *host;       /* NULL: not shown */
    uint8_t *next;              /* base of the table that was sent and is not in use yet */
    uint8_t shadow[0x8000], allowed[0x8000];
};

static struct core *engine;
static struct seam disk;
static int arena_fd = -1;
static struct region region[REGIONS];
static const uint8_t *back, *back_end;  /* mutations, read downwards */
static uint32_t loads_left;
static bool armed;
static uint64_t token;

/* ---- Guest memory ----------------------------------------------------------------------- */

static uintptr_t lowest = UINTPTR_MAX, highest; /* all that regions ever covered */

static int region_of(const void *at, uint64_t bytes)
{
    if ((uintptr_t)at < lowest || (uintptr_t)at >= highest)
        return -1;
    for (uint32_t i = 0; i < REGIONS; i++)
        if (region[i].host && (uintptr_t)at >= (uintptr_t)region[i].host &&
            (uintptr_t)at + bytes <= (uintptr_t)region[i].host + place[i].bytes)
            return (int)i;
    return -1;
}

static void guest_write(uint32_t r, uint64_t offset, const void *from, uint64_t bytes)
{
    if (offset >= place[r].bytes)
        return;
    if (bytes > place[r].bytes - offset)
        bytes = place[r].bytes - offset;
    memcpy(region[r].shadow + offset, from, bytes);
    if (region[r].host)
        memcpy(region[r].host + offset, from, bytes);
}

static void allow(uint64_t guest, uint64_t bytes)
{
    for (uint32_t i = 0; i < REGIONS; i++) {
        uint64_t first = guest > place[i].guest ? guest - place[i].guest : 0, last;

        if (guest >= place[i].guest + place[i].bytes)
            continue;
        if (guest < place[i].guest && place[i].guest - guest >= bytes)
            continue;
        last = guest + bytes < guest || guest + bytes - place[i].guest > place[i].bytes
                   ? place[i].bytes : guest + bytes - place[i].guest;
        memset(region[i].allowed + first, 1, last - first);
    }
}

static void check_region(uint32_t r)
{
    if (memcmp(region[r].host, region[r].shadow, place[r].bytes) == 0)
        return;
    for (uint64_t i = 0; i < place[r].bytes; i++)
        if (region[r].host[i] != region[r].shadow[i] && !region[r].allowed[i])
            finding("guest byte %#llx changed from %02x to %02x; no descriptor allows that",
                    (unsigned long long)(place[r].guest + i), region[r].shadow[i],
                    region[r].host[i]);
}

static void free_off_page(void *at)
{
    free((uint8_t *)at - ((uint8_t *)at)[-1]);
}

/* A mapping ends: what it held lives on in the guest. Called instead of munmap(). */
int fuzz_munmap(void *base, size_t bytes)
{
    for (uint32_t i = 0; i < REGIONS; i++)
        if (region[i].base == base) {
            check_region(i);
            memcpy(region[i].shadow, region[i].host, place[i].bytes);
            region[i].base = region[i].host = NULL;
            free_off_page(base);
            return 0;
        }
    if ((uintptr_t)base % PAGE == 0) /* the arena's */
        return munmap(base, bytes);
    free_off_page(base); /* log, in-flight region */
    return 0;
}

/* ---- The guest's other processor -------------------------------------------------------- */

static uint8_t back_8(void)
{
    return back > back_end ? *--back : 0;
}

/* What is about to be loaded lies at `at`. */
static void mutate(uint32_t r, uint64_t at, uint64_t bytes)
{
    uint8_t how, value[8];
    uint64_t offset = at;

    if (back <= back_end || loads_left-- > 0)
        return;
    how = back_8();
    loads_left = how >> 3;
    if ((how & 3) == 3) {
        r = back_8() % REGIONS;
        offset = back_8();
        offset |= (uint64_t)back_8() << 8;
        bytes = 4;
    } else if ((how & 3) == 2) {
        offset = at ^ 16; /* its neighbour in the table */
    }
    if (bytes > sizeof(value))
        bytes = sizeof(value);
    if (offset + bytes > place[r].bytes)
        return;
    for (uint32_t i = 0; i < bytes; i++)
        value[i] = region[r].shadow[offset + i];
    if (how & 4) {
        value[0] ^= back_8();
    } else {
        for (uint32_t i = 0; i < bytes && i < 4; i++)
            value[i] = back_8();
    }
    guest_write(r, offset, value, bytes);
}

/* Descriptors as the code under test reads them, field by field or as a table. */
static struct vring_desc seen;

static void observe_field(uint32_t r, uint64_t offset)
{
    for (uint32_t q = 0; q < QUEUES; q++) {
        const struct ring *ring = &engine->blk[0].ring[q];
        const uint8_t *table = (const uint8_t *)ring->desc, *at = region[r].host + offset;

        if (!table || at < table || at >= table + ring->size * sizeof(seen))
            continue;
        switch ((uint64_t)(at - table) % sizeof(seen)) {
        case 0:
            memcpy(&seen.addr, at, sizeof(seen.addr));
            break;
        case 8:
            memcpy(&seen.len, at, sizeof(seen.len));
            break;
        case 12:
            memcpy(&seen.flags, at, sizeof(seen.flags));
            if (seen.flags & VRING_DESC_F_WRITE)
                allow(seen.addr, seen.len);
            break;
        }
    }
}

static void observe_table(const uint8_t *copy, uint64_t bytes)
{
    static const uint8_t *end;
    static uint8_t piece[sizeof(struct vring_desc)];
    static uint32_t have;

    if (copy != end)
        have = 0;
    end = copy + bytes;
    while (bytes > 0) {
        piece[have++] = *copy++;
        bytes--;
        if (have == sizeof(piece)) {
            struct vring_desc d;

            memcpy(&d, piece, sizeof(d));
            if (d.flags & VRING_DESC_F_WRITE)
                allow(d.addr, d.len);
            have = 0;
        }
    }
}

static void on_load(const void *at, uint32_t bytes)
{
    int r;

    if (!armed || (r = region_of(at, bytes)) < 0)
        return;
    armed = false;
    mutate((uint32_t)r, (uint64_t)((const uint8_t *)at - region[r].host), bytes);
    observe_field((uint32_t)r, (uint64_t)((const uint8_t *)at - region[r].host));
    armed = true;
}

void __sanitizer_cov_load1(uint8_t *at) { on_load(at, 1); }
void __sanitizer_cov_load2(uint16_t *at) { on_load(at, 2); }
void __sanitizer_cov_load4(uint32_t *at) { on_load(at, 4); }
void __sanitizer_cov_load8(uint64_t *at) { on_load(at, 8); }
void __sanitizer_cov_load16(__int128 *at) { on_load(at, 16); }

/* The code under test's memcpy(): guest memory changes before and in the middle of it. */
void *fuzz_memcpy(void *to, const void *from, size_t bytes)
{
    int r = armed ? region_of(from, bytes) : -1;
    uint64_t offset;

    if (r < 0)
        return memcpy(to, from, bytes);
    armed = false;
    offset = (uint64_t)((const uint8_t *)from - region[r].host);
    mutate((uint32_t)r, offset, bytes);
    memcpy(to, from, bytes / 2);
    if (bytes > 1)
        mutate((uint32_t)r, offset + bytes / 2, bytes - bytes / 2);
    memcpy((uint8_t *)to + bytes / 2, (const uint8_t *)from + bytes / 2, bytes - bytes / 2);
    for (uint32_t i = 0; i < CHAINS_AHEAD; i++) {
        const struct chain *c = &engine->reactor[0].chain[i];

        if ((uint8_t *)to >= (const uint8_t *)c->table &&
            (uint8_t *)to < (const uint8_t *)c->table + sizeof(c->table))
            observe_table(to, bytes);
    }
    armed = true;
    return to;
}

/* ---- Commands of the front end ------------------------------------------------------------ */

static void send_command(struct command *c)
{
    struct reactor *r = &engine->reactor[0];

    c->token = ++token;
    c->fd = -1;
    if (r->command_last)
        r->command_last->next = c;
    else
        r->command_first = c;
    r->command_last = c;
    r->commands++;
}

static struct command *command(enum command_kind kind, uint32_t queue)
{
    struct command *c = calloc(1, sizeof(*c));

    c->kind = kind;
    c->queue = queue;
    return c;
}

/* Zeroed, never on a page's start: fuzz_munmap() tells it by that from the arena. The byte
 * before it is how far behind the allocation's start it is. */
static void *off_page(uint64_t bytes)
{
    for (uint8_t skip = 16;; skip = 32) {
        uint8_t *at = calloc(1, bytes + skip);

        if (((uintptr_t)at + skip) % PAGE) {
            at[skip - 1] = skip;
            return at + skip;
        }
        free(at);
    }
}

static struct mapping *mapping(uint64_t bytes)
{
    struct mapping *m = calloc(1, sizeof(*m));

    m->bytes = bytes;
    m->base = off_page(bytes);
    return m;
}

static bool rest(void);

/* The table with the regions that `shown` names. */
static void send_memory(uint32_t shown)
{
    struct command *c;
    struct memory *m = calloc(1, sizeof(*m));

    rest(); /* the one before is in use by now, or waits for ever: then it must not be lost */
    if (engine->blk[0].command_first || engine->reactor[0].command_first) {
        free(m);
        return;
    }
    c = command(COMMAND_MEMORY, 0);
    /* Sorted by guest address: 0, 1, 3, 2. */
    static const uint32_t order[REGIONS] = {0, 1, 3, 2};
    for (uint32_t i = 0; i < REGIONS; i++) {
        uint32_t n = order[i];
        struct memory_region *to = &m->region[m->count];

        if (!(shown & 1u << n))
            continue;
        *to = (struct memory_region){.guest = place[n].guest, .user = place[n].user,
                                     .bytes = place[n].bytes,
                                     .mapping = mapping(place[n].bytes + place[n].skew)};
        to->host = (uint8_t *)to->mapping->base + place[n].skew;
        region[n].next = to->mapping->base;
        memcpy(to->host, region[n].shadow, place[n].bytes);
        m->count++;
    }
    c->memory = m;
    send_command(c);
}

/* Has the table that was sent come into use? Then the guest's bytes are in it. */
static void adopt_memory(void)
{
    const struct memory *m = engine->blk[0].memory;

    for (uint32_t i = 0; m && i < m->count; i++)
        for (uint32_t n = 0; n < REGIONS; n++)
            if (region[n].next && m->region[i].mapping->base == region[n].next) {
                region[n].base = region[n].next;
                region[n].host = region[n].base + place[n].skew;
                region[n].next = NULL;
                if ((uintptr_t)region[n].base < lowest)
                    lowest = (uintptr_t)region[n].base;
                if ((uintptr_t)region[n].host + place[n].bytes > highest)
                    highest = (uintptr_t)region[n].host + place[n].bytes;
                memcpy(region[n].host, region[n].shadow, place[n].bytes);
            }
}

static void allow_rings(void)
{
    for (uint32_t q = 0; q < QUEUES; q++) {
        const struct ring *ring = &engine->blk[0].ring[q];
        int r = ring->used ? region_of(ring->used, 1) : -1;

        if (r >= 0)
            memset(region[r].allowed + ((uint8_t *)ring->used - region[r].host), 1,
                   6 + 8 * ring->size);
    }
}

/* One round of the reactor. */
static bool round_once(void)
{
    struct reactor *r = &engine->reactor[0];
    core_event event;
    bool moved;

    r->now_ns = r->group->now_ns += 1000;
    allow_rings();
    armed = true;
    moved = step(r);
    armed = false;
    adopt_memory();
    allow_rings();
    while (core_next_event(engine, &event))
        ;
    return moved;
}

static bool rest(void)
{
    uint32_t rounds = 0;

    while (round_once())
        if (++rounds > 20000)
            finding("the reactor does not come to rest");
    return rounds > 0;
}

static void verb(enum verb_kind kind)
{
    struct command *c = command(COMMAND_VERB, 0);

    c->verb = (struct verb){.kind = kind, .newest = true};
    send_command(c);
}

/* ---- Script ---------------------------------------------------------------------------------- */

static uint64_t guest_address(struct input *in)
{
    uint8_t how = input_8(in);

    if (how & 8)
        return input_n(in, 8);
    return place[how % REGIONS].guest + input_n(in, 2);
}

static uint64_t user_address(struct input *in)
{
    uint8_t how = input_8(in);

    if (how & 8)
        return input_n(in, 8);
    return place[how % REGIONS].user + input_n(in, 2);
}

static void write_descriptor(struct input *in)
{
    uint16_t index = (uint16_t)input_n(in, 2);
    struct vring_desc d = {.addr = guest_address(in)};

    d.len = (uint32_t)input_n(in, 2) << (input_8(in) & 16);
    d.flags = input_8(in) & 7;
    d.next = (uint16_t)input_n(in, 2);
    guest_write(0, (uint64_t)(index & 0x7ff) * sizeof(d), &d, sizeof(d));
}

static void write_request(struct input *in)
{
    uint8_t where = input_8(in);
    uint64_t offset = input_n(in, 2);
    struct virtio_blk_outhdr h = {.type = input_8(in) & 31, .sector = input_n(in, 2)};

    guest_write(where % REGIONS, offset, &h, sizeof(h));
}

static void write_available(struct input *in)
{
    struct ring *ring = &engine->blk[0].ring[input_8(in) % QUEUES];
    uint16_t head = (uint16_t)input_n(in, 2), idx;
    int r = ring->avail ? region_of(ring->avail, 4) : -1;
    uint64_t at;

    if (r < 0)
        return;
    at = (uint64_t)((uint8_t *)ring->avail - region[r].host);
    memcpy(&idx, region[r].shadow + at + 2, 2);
    guest_write((uint32_t)r, at + 4 + idx % ring->size * 2u, &head, 2);
    idx++;
    guest_write((uint32_t)r, at + 2, &idx, 2);
}

static void write_bytes(struct input *in)
{
    uint8_t where = input_8(in), bytes = input_8(in) & 31, value[32];
    uint64_t offset = input_n(in, 2);

    for (uint32_t i = 0; i < bytes; i++)
        value[i] = input_8(in);
    guest_write(where % REGIONS, offset, value, bytes);
}

static void send_inflight(struct input *in)
{
    uint32_t size = 1 + (uint32_t)(input_n(in, 2) & 1023), queues = 1 + (input_8(in) & 1);
    struct command *c = command(COMMAND_INFLIGHT, 0);
    uint8_t fill = input_8(in);

    c->queues = queues;
    c->queue_size = size;
    c->mapping = mapping(queues * inflight_queue_bytes(size));
    if (fill)
        for (uint64_t i = 0; i < c->mapping->bytes; i++)
            ((uint8_t *)c->mapping->base)[i] = (uint8_t)(i % 16 == 8 ? 1 : i * fill);
    send_command(c);
}

static void send_log(struct input *in)
{
    struct command *c = command(COMMAND_LOG, 0);

    c->bytes = 1 + (input_n(in, 2) & 0x1fff);
    c->mapping = mapping(c->bytes);
    send_command(c);
}

static void front_end(struct input *in)
{
    static const enum command_kind plain[] = {COMMAND_SIZE, COMMAND_BASE, COMMAND_ENABLE,
                                              COMMAND_FEATURES};
    uint8_t what = input_8(in);
    uint32_t queue = what >> 7;
    struct command *c;

    switch (what % 12) {
    case 0:
    case 1:
    case 2:
    case 3:
        c = command(plain[what % 4], queue);
        c->value = what % 4 == 3 ? input_n(in, 5) : what % 4 == 0 ? 1ull << (input_8(in) % 12)
                                                                  : input_n(in, 2);
        send_command(c);
        break;
    case 4:
        c = command(COMMAND_ADDR, queue);
        c->flags = input_8(in);
        c->desc = user_address(in);
        c->avail = user_address(in);
        c->used = user_address(in);
        c->log = guest_address(in);
        send_command(c);
        break;
    case 5:
        send_memory(input_8(in));
        break;
    case 6:
        send_inflight(in);
        break;
    case 7:
        send_log(in);
        break;
    case 8:
        send_command(command(COMMAND_STOP, queue));
        break;
    case 9:
        send_command(command(COMMAND_KICK, queue));
        break;
    case 10:
        send_command(command(COMMAND_RESET, 0));
        break;
    case 11:
        send_command(command(COMMAND_CALL, queue));
        break;
    }
}

/* Where a driver would put them: tables in region 0, 8 KiB a queue. */
static void start_queue(uint32_t q, uint32_t size, uint32_t base)
{
    struct command *c = command(COMMAND_SIZE, q);

    c->value = size;
    send_command(c);
    c = command(COMMAND_BASE, q);
    c->value = base;
    send_command(c);
    c = command(COMMAND_ADDR, q);
    c->desc = place[0].user + 0x2000 * q;
    c->avail = c->desc + 16 * size;
    c->used = (c->avail + 4 + 2 * size + 2 + 3) & ~3ull;
    c->log = place[0].guest + c->used - place[0].user;
    c->flags = VHOST_VRING_LOG;
    send_command(c);
    send_command(command(COMMAND_KICK, q));
    c = command(COMMAND_ENABLE, q);
    c->value = 1;
    send_command(c);
}

static void script(struct input *in)
{
    uint32_t raw;
    uint8_t size = input_8(in), shown = input_8(in);
    struct command *c = command(COMMAND_FEATURES, 0);

    c->value = input_n(in, 4) | 1ull << VIRTIO_F_VERSION_1;
    send_command(c);
    send_memory(~shown);
    raw = input_8(in) * 16u;
    for (uint32_t i = 0; i < raw && !input_over(in); i++) {
        uint8_t byte = input_8(in);

        guest_write(0, i, &byte, 1);
    }
    start_queue(0, 1u << size % 8, 0);
    if (size & 0x80)
        start_queue(1, 1u << (size >> 3) % 8, 0);
    rest();
    while (!input_over(in)) {
        uint8_t op = input_8(in);

        switch (op & 15) {
        case 0:
        case 1:
            write_descriptor(in);
            break;
        case 2:
        case 3:
            write_available(in);
            break;
        case 4:
            write_request(in);
            break;
        case 5:
            write_bytes(in);
            break;
        case 6:
        case 7:
            front_end(in);
            break;
        case 8:
            disk.limit = op >> 4 ? op >> 4 : UINT32_MAX;
            break;
        case 9:
            disk.reverse = !disk.reverse;
            disk.failing = op >> 6;
            break;
        case 10:
            for (uint32_t i = 0; i < DISK_IMAGE(0) + 1; i++)
                disk.file[i].hold = op >> 4 & 1u << i;
            break;
        case 11:
            verb(op >> 4 == 15 ? VERB_PROMOTE : (enum verb_kind)(1 + (op >> 4) % 3));
            break;
        case 12:
            armed = true;
            want_kicks(&engine->reactor[0], op >> 4 & 1);
            armed = false;
            break;
        default:
            round_once();
        }
    }
}

/* ---- Everybody else ---------------------------------------------------------------------------- */

static void serve_other(void)
{
    static uint8_t page[PAGE];
    static struct mapping whole = {.base = page, .bytes = sizeof(page)};
    static struct memory memory;
    struct blk *b = &engine->blk[1];
    struct ring *r = &b->ring[0];
    struct vring_desc *desc = (struct vring_desc *)page;
    struct vring_avail *avail = (struct vring_avail *)(page + 256);
    struct virtio_blk_outhdr header[2] = {{.type = VIRTIO_BLK_T_OUT, .sector = 5},
                                          {.type = VIRTIO_BLK_T_IN, .sector = 5}};

    memset(page, 0, sizeof(page));
    memory = (struct memory){.count = 1};
    memory.region[0] = (struct memory_region){.user = 0x1000, .bytes = PAGE, .host = page,
                                              .mapping = &whole};
    memcpy(page + 1024, header, sizeof(header));
    memset(page + 2048, 0x5a, 512);
    for (uint32_t i = 0; i < 2; i++) {
        desc[3 * i] = (struct vring_desc){.addr = 1024 + 16 * i, .len = 16, .flags = 1,
                                          .next = (uint16_t)(3 * i + 1)};
        desc[3 * i + 1] = (struct vring_desc){.addr = 2048 + 1024 * i, .len = 512,
                                              .flags = (uint16_t)(1 + 2 * i),
                                              .next = (uint16_t)(3 * i + 2)};
        desc[3 * i + 2] = (struct vring_desc){.addr = 1100 + i, .len = 1, .flags = 2};
        avail->ring[i] = (uint16_t)(3 * i);
        page[1100 + i] = 0xee;
    }
    avail->idx = 2;
    b->memory = &memory;
    r->size = 8;
    r->has_addr = r->kicked = r->fresh = r->enabled = true;
    r->desc_user = 0x1000;
    r->avail_user = 0x1000 + 256;
    r->used_user = 0x1000 + 512;
    ring_resolve(r);
    ring_update(r);
    rest();
    if (page[1100] != 0 || page[1101] != 0 || memcmp(page + 2048, page + 3072, 512) != 0)
        finding("the other disk's requests ended with %u and %u", page[1100], page[1101]);
    ring_reset(r);
    b->memory = NULL;
    reactor_running_changed(&engine->reactor[0]);
}

/* ---- Life ------------------------------------------------------------------------------------- */

static void close_engine(void)
{
    struct reactor *r = &engine->reactor[0];

    seam_drop(&disk);
    for (uint32_t i = 0; i < r->group->config.disks; i++)
        blk_free(&engine->blk[i]);
    group_close(r->group);
    core_free(engine);
    engine = NULL;
}

static void open_engine(void)
{
    core_config config = {.disks = 2, .journal_fd = -1, .compress_level = 1,
                          .arena_bytes = ARENA_BYTES};
    char text[CORE_TEXT_MAX] = "";
    struct reactor *r;

    if (arena_fd < 0) {
        const uint64_t files[] = {JOURNAL_BYTES, IMAGE_BYTES, IMAGE_BYTES};
        static const uint8_t id[16] = {1};
        int fd = memfd_create("journal", 0);

        arena_fd = memfd_create("arena", 0);
        seam_init(&disk, files, 3);
        if (ftruncate(arena_fd, ARENA_BYTES) || ftruncate(fd, JOURNAL_BYTES))
            abort();
        config.journal_fd = fd;
        for (uint32_t i = 0; i < 2; i++) {
            config.disk[i].size_bytes = IMAGE_BYTES;
            config.disk[i].logical_block_bytes = 512;
            config.disk[i].name[0] = (char)('a' + i);
        }
        if (core_journal_format(&config, id, text) ||
            pread(fd, disk.file[0].data, JOURNAL_LOG_OFFSET, 0) < 0)
            finding("%s", text);
        close(fd);
        for (uint32_t n = 1; n < 3; n++)
            for (uint32_t i = 0; i < IMAGE_BYTES; i++)
                disk.file[n].data[i] = (uint8_t)(i * 31 + n);
        seam_keep(&disk);
    }
    seam_restore(&disk);
    if (fallocate(arena_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, ARENA_BYTES))
        abort();
    for (uint32_t i = 0; i < 2; i++) {
        config.disk[i].size_bytes = IMAGE_BYTES;
        config.disk[i].logical_block_bytes = 512;
        config.disk[i].memory_align = 512;
        config.disk[i].direct = 1; /* unaligned guest memory goes through bounce buffers */
        config.disk[i].name[0] = (char)('a' + i);
        memcpy(config.disk[i].serial, "0123456789abcdefghij", CORE_SERIAL_BYTES);
    }
    config.arena_fd = arena_fd;
    engine = core_alloc(1);
    r = &engine->reactor[0];
    if (group_open(r->group, &config, &disk.disk, text) || group_start(r->group, -1, true))
        finding("%s", text);
    for (uint32_t i = 0; i < 2; i++)
        blk_init(&engine->blk[i], r, i);
    r->disk = r->group->disk;
    r->now_ns = r->group->now_ns = 1;
}

/* The front end hangs up; then nothing of it may be left. */
static void end_session(void)
{
    struct reactor *r = &engine->reactor[0];
    struct group *g = r->group;

    back = back_end;
    disk.limit = UINT32_MAX;
    disk.failing = 0;
    for (uint32_t i = 0; i < disk.files; i++)
        disk.file[i].hold = false;
    send_command(command(COMMAND_RESET, 0));
    for (uint32_t i = 0; i < 4; i++) {
        rest();
        g->now_ns += 2 * GROUP_RETRY_NS;
    }
    if (engine->blk[0].requests || engine->blk[0].command_first || engine->blk[0].memory || engine->blk[0].reads_busy)
        finding("the front end is gone and something of it is left");
    for (uint32_t i = 0; i < REGIONS; i++)
        if (region[i].base)
            finding("region %u is still mapped", i);
    serve_other();
    if (g->mode == CORE_ACTIVE || engine->events_lost) {
        close_engine();
        return;
    }
    verb(VERB_DISCARD);
    rest();
    if (g->epochs != 1 || !epoch_empty(epoch_open(g)) || g->arena.free_count != g->arena.segments)
        finding("%u epochs and %u of %u segments after a discard", g->epochs,
                g->arena.segments - g->arena.free_count, g->arena.segments);
    if (g->epoch[0]->id > 3000 || g->error[0])
        close_engine();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct input in = {.at = data, .end = data + bytes};
    uint32_t share = bytes > 4 ? data[0] : 0;

    if (!engine)
        open_engine();
    for (uint32_t i = 0; i < REGIONS; i++) {
        memset(region[i].shadow, 0, place[i].bytes);
        memset(region[i].allowed, 0, place[i].bytes);
        region[i].next = NULL;
    }
    if (bytes > 0) { /* the last share/256 of the input are mutations */
        in.at++;
        in.end = data + bytes - (bytes - 1) * share / 512;
    }
    back = data + bytes;
    back_end = in.end;
    loads_left = 0;
    seen = (struct vring_desc){0};
    disk.reverse = false;
    script(&in);
    end_session();
    return 0;
}
