/* hotpath.c - the reactor's round on rings in plain memory, with nothing else around it.
 *
 *     hotpath write|read|direct [REQUESTS] [DEPTH] [BATCHES] [WASTE]
 *
 * One thread, a disk in memory, no helper: what is counted is what a request costs the
 * reactor. `measured()` is all of it, so that callgrind can collect inside of it only.
 * write: 4 KiB random writes, indirect tables, as a Linux driver sends them; direct: the
 * same with chained descriptors; read: of blocks that a write put into the arena before.
 * WASTE instructions are added to each request, to see that the budget's test notices.
 * Prints nanoseconds a request, best batch of five; counts do not depend on the machine's load.
 */
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <stdio.h>
#include <sys/mman.h>

#include "../../native/reactor.c"
#include "../fuzz/seam.h"

#define QUEUE_SIZE 256u
#define BATCHES 5u
#define DISK_BLOCKS (1u << 18)     /* 1 GiB: every block of the workload is on it */
#define DATA_OFFSET (1u << 20)     /* of the data pages in guest memory */
#define GUEST_BYTES (DATA_OFFSET + QUEUE_SIZE * PAGE)
#define USER 0x10000000ull

static struct core *engine;
static struct seam disk;
static uint8_t *guest;
static struct vring_desc *desc;
static struct vring_avail *avail;
static struct vring_used *used;
static bool chained;
static uint64_t chance = 88172645463325252ull;

static uint64_t next_random(void)
{
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return chance;
}

/* ---- The driver ---------------------------------------------------------------------------- */

/* Header, data, status of slot i: descriptors 3i.. when chained, else an indirect table. */
static void place(uint32_t i, uint32_t type)
{
    uint64_t base = 65536 + (uint64_t)i * 128, data = DATA_OFFSET + (uint64_t)i * PAGE;
    struct vring_desc *t = chained ? &desc[3 * i] : (struct vring_desc *)(guest + base + 32);
    uint16_t first = chained ? (uint16_t)(3 * i) : 0;
    uint16_t write = type == VIRTIO_BLK_T_IN ? VRING_DESC_F_WRITE : 0;

    *(struct virtio_blk_outhdr *)(guest + base) = (struct virtio_blk_outhdr){.type = type};
    t[0] = (struct vring_desc){.addr = base, .len = 16, .flags = VRING_DESC_F_NEXT,
                               .next = (uint16_t)(first + 1)};
    t[1] = (struct vring_desc){.addr = data, .len = PAGE, .next = (uint16_t)(first + 2),
                               .flags = (uint16_t)(VRING_DESC_F_NEXT | write)};
    t[2] = (struct vring_desc){.addr = base + 16, .len = 1, .flags = VRING_DESC_F_WRITE};
    if (!chained)
        desc[i] = (struct vring_desc){.addr = base + 32, .len = 48,
                                      .flags = VRING_DESC_F_INDIRECT};
}

static void submit(uint32_t i, uint64_t block)
{
    struct virtio_blk_outhdr *h = (void *)(guest + 65536 + (uint64_t)i * 128);

    h->sector = block * BLOCK_SECTORS;
    avail->ring[avail->idx % QUEUE_SIZE] = (uint16_t)(chained ? 3 * i : i);
    __atomic_store_n(&avail->idx, (uint16_t)(avail->idx + 1), __ATOMIC_RELEASE);
}

static uint64_t waste;             /* loop turns a round, two instructions each */

__attribute__((noinline)) static void measured(void)
{
    for (uint64_t i = waste; i > 0; i--)
        __asm__ volatile("");
    begin_round(&engine->reactor[0], true);
    step(&engine->reactor[0]);
}

static void fill(void)
{
    step(&engine->reactor[0]);
}

static void run(uint64_t requests, uint32_t depth, void (*round)(void))
{
    for (uint64_t done = 0; done < requests; done += depth) {
        for (uint32_t i = 0; i < depth; i++)
            submit(i, next_random() % DISK_BLOCKS);
        while (__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) != avail->idx)
            round();
        for (uint32_t i = 0; i < depth; i++)
            if (guest[65536 + i * 128 + 16] != VIRTIO_BLK_S_OK)
                finding("request %u failed with %u", i, guest[65536 + i * 128 + 16]);
    }
}

static void verb(enum verb_kind kind)
{
    struct verb v = {.kind = kind, .newest = true};
    core_event event;

    checkpoint_submit(&engine->group, &v);
    for (uint32_t i = 0; i < 1000; i++)
        step(&engine->reactor[0]);
    while (core_next_event(engine, &event))
        ;
}

/* ---- Life ---------------------------------------------------------------------------------- */

static void open_metrics(struct reactor *r)
{
    int fd = memfd_create("metrics", 0);

    if (ftruncate(fd, sizeof(struct metrics_page)) ||
        metrics_open(&r->metrics, fd, r->group->journal.group, "group", "control"))
        finding("cannot open the live view: %s", strerror(errno));
    r->metrics.publish_ns = UINT64_MAX; /* pictures are due by the clock, not by requests */
}

static void open_engine(uint64_t arena_bytes)
{
    static const uint8_t id[16] = {1};
    uint64_t journal_bytes = JOURNAL_LOG_OFFSET + 64 * SEGMENT_BYTES;
    core_config config = {.disks = 1, .arena_bytes = arena_bytes};
    char text[CORE_TEXT_MAX] = "";
    struct reactor *r;

    journal_bytes = core_journal_bytes_min(arena_bytes);
    config.arena_fd = memfd_create("arena", 0);
    config.journal_fd = memfd_create("journal", 0);
    seam_init(&disk, (const uint64_t[]){journal_bytes, (uint64_t)DISK_BLOCKS * PAGE}, 2);
    config.disk[0] = (core_disk_config){.size_bytes = (uint64_t)DISK_BLOCKS * PAGE,
                                        .logical_block_bytes = 512, .memory_align = 512,
                                        .name = "disk"};
    if (ftruncate(config.arena_fd, (off_t)arena_bytes) ||
        ftruncate(config.journal_fd, (off_t)journal_bytes) ||
        core_journal_format(&config, id, text) ||
        pread(config.journal_fd, disk.file[0].data, JOURNAL_LOG_OFFSET, 0) < 0)
        finding("%s", text);
    arena_huge_pages(config.arena_fd, arena_bytes);
    engine = core_alloc(1);
    r = &engine->reactor[0];
    if (group_open(r->group, &config, &disk.disk, text) || group_start(r->group, -1, true))
        finding("%s", text);
    /* First touches are not what is measured. */
    if (madvise(r->group->arena.header, arena_bytes, MADV_POPULATE_WRITE))
        finding("cannot populate the arena: %s", strerror(errno));
    blk_init(&engine->blk[0], r, 0);
    r->disk = r->group->disk;
    r->now_ns = r->group->now_ns = 1;
    open_metrics(r);
}

static void start_ring(void)
{
    static struct mapping whole;
    static struct memory memory;
    struct blk *b = &engine->blk[0];
    struct ring *r = &b->ring[0];

    guest = mmap(NULL, GUEST_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    whole = (struct mapping){.base = guest, .bytes = GUEST_BYTES};
    memory.count = 1;
    memory.region[0] = (struct memory_region){.user = USER, .bytes = GUEST_BYTES, .host = guest,
                                              .mapping = &whole};
    for (uint64_t i = DATA_OFFSET; i < GUEST_BYTES; i += 8)
        *(uint64_t *)(guest + i) = next_random();
    desc = (struct vring_desc *)guest;
    avail = (struct vring_avail *)(guest + 16 * QUEUE_SIZE);
    used = (struct vring_used *)(guest + 20 * QUEUE_SIZE);
    b->features = 1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << VIRTIO_RING_F_EVENT_IDX |
                  BLK_F_FLUSH;
    b->memory = &memory;
    r->size = QUEUE_SIZE;
    r->has_addr = r->kicked = r->fresh = r->enabled = true;
    r->desc_user = USER;
    r->avail_user = USER + 16 * QUEUE_SIZE;
    r->used_user = USER + 20 * QUEUE_SIZE;
    ring_resolve(r);
    ring_update(r);
    avail->ring[QUEUE_SIZE] = 0x8000; /* the driver polls: no calls, as far as 16 bits go */
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "write";
    uint64_t requests = argc > 2 ? strtoull(argv[2], NULL, 0) : 20000;
    uint32_t depth = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 0) : 32;
    uint32_t batches = argc > 4 ? (uint32_t)strtoul(argv[4], NULL, 0) : BATCHES;
    uint64_t wasted = argc > 5 ? strtoull(argv[5], NULL, 0) : 0;
    bool read = strcmp(what, "read") == 0;
    double best = 1e9;

    chained = strcmp(what, "direct") == 0;
    if (depth == 0 || depth > QUEUE_SIZE / 3 || (!read && !chained && strcmp(what, "write"))) {
        fprintf(stderr, "usage: hotpath write|read|direct [REQUESTS] [DEPTH up to %u] [BATCHES] [WASTE]\n",
                QUEUE_SIZE / 3);
        return 2;
    }
    waste = wasted * depth / 2;
    open_engine(((requests + 8192) * (PAGE + 32) + (64u << 20)) & ~(uint64_t)(SEGMENT_BYTES - 1));
    start_ring();
    for (uint32_t n = 0; n < batches; n++) {
        uint64_t start;

        chance = 88172645463325252ull;
        for (uint32_t i = 0; i < depth; i++)
            place(i, VIRTIO_BLK_T_OUT);
        if (read) {
            run(requests, depth, fill);
            for (uint32_t i = 0; i < depth; i++)
                place(i, VIRTIO_BLK_T_IN);
            chance = 88172645463325252ull;
        }
        start = now_ns();
        run(requests, depth, measured);
        if ((double)(now_ns() - start) / (double)requests < best)
            best = (double)(now_ns() - start) / (double)requests;
        verb(VERB_DISCARD);
    }
    printf("%s %llu requests, depth %u: %.1f ns each\n", what, (unsigned long long)requests, depth,
           best);
    return 0;
}
