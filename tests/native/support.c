/* support.c - see support.h. */
#include "support.h"

#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* ---- Randomness ------------------------------------------------------------------------------ */

struct dice dice_new(const char *test)
{
    const char *given = getenv("EPOCHD_SEED");
    struct timespec now;
    struct dice d;

    clock_gettime(CLOCK_REALTIME, &now);
    d.state = given ? strtoull(given, NULL, 0)
                    : (uint64_t)now.tv_nsec * 2654435761u ^ (uint64_t)now.tv_sec;
    print_message("%s: EPOCHD_SEED=%llu\n", test, (unsigned long long)d.state);
    return d;
}

uint64_t dice_next(struct dice *d)
{
    uint64_t x = d->state += 0x9e3779b97f4a7c15ull;

    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

void dice_fill(struct dice *d, void *to, size_t bytes)
{
    uint8_t *p = to;

    for (size_t i = 0; i < bytes; i++)
        p[i] = (uint8_t)(dice_next(d) | 1);
}

int memory_file(uint64_t bytes)
{
    int fd = memfd_create("epochd-test", MFD_CLOEXEC);

    check(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    return fd;
}

/* ---- The disk -------------------------------------------------------------------------------- */

static void submit(struct disk *d, struct disk_op *op)
{
    struct memory_disk *m = (struct memory_disk *)d;

    check(op->file < FILES_MAX && m->file[op->file]);
    op->next = NULL;
    if (m->last)
        m->last->next = op;
    else
        m->first = op;
    m->last = op;
}

static void move(struct memory_disk *m, const struct disk_op *op)
{
    uint8_t *at = m->file[op->file] + op->offset;
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < op->iov_count; i++) {
        uint8_t *place = at + bytes;

        bytes += op->iov[i].iov_len;
        check(op->offset + bytes <= m->bytes[op->file]);
        if (op->opcode == DISK_READ)
            memcpy(op->iov[i].iov_base, place, op->iov[i].iov_len);
        else
            memcpy(place, op->iov[i].iov_base, op->iov[i].iov_len);
    }
    check(bytes == op->bytes);
}

static int64_t run(struct memory_disk *m, const struct disk_op *op)
{
    if (m->fail[op->file][op->opcode])
        return -m->fail[op->file][op->opcode];
    switch (op->opcode) {
    case DISK_READ:
    case DISK_WRITE:
        move(m, op);
        return (int64_t)op->bytes;
    case DISK_ZERO:
    case DISK_PUNCH:
        check(op->offset + op->bytes <= m->bytes[op->file]);
        memset(m->file[op->file] + op->offset, 0, op->bytes);
        return 0;
    case DISK_SYNC:
        return 0;
    }
    return -EINVAL;
}

static uint32_t reap(struct disk *d, bool wait)
{
    struct memory_disk *m = (struct memory_disk *)d;
    struct disk_op *op = m->first, *next;
    uint32_t count = 0;

    if (m->hold && !wait)
        return 0;
    m->first = m->last = NULL;
    for (; op; op = next) {
        int64_t result;

        next = op->next; /* the operation is the owner's again after done() */
        if (m->hold_file[op->file]) {
            submit(d, op);
            continue;
        }
        count++;
        result = run(m, op);
        m->done[op->file][op->opcode]++;
        op->done(op, result);
    }
    return count;
}

static void set_file(struct memory_disk *m, uint32_t n, uint64_t bytes)
{
    check(n < FILES_MAX);
    m->fd[n] = memory_file(bytes);
    m->bytes[n] = bytes;
    m->file[n] = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd[n], 0);
    check(m->file[n] != MAP_FAILED);
}

static void add_file(struct memory_disk *m, uint64_t bytes)
{
    set_file(m, m->files++, bytes);
}

/* ---- The group ------------------------------------------------------------------------------- */

static void note(void *owner, const core_event *event)
{
    struct bench *b = owner;

    if (b->events < BENCH_EVENTS)
        b->event[b->events++] = *event;
}

void bench_start(struct bench *b, uint64_t size0, uint64_t size1, int compress_level)
{
    static const uint8_t uuid[16] = "group of a test";
    uint64_t size[BENCH_DISKS] = {size0, size1};

    memset(b, 0, sizeof(*b));
    b->disk.disk = (struct disk){.submit = submit, .reap = reap};
    add_file(&b->disk, core_journal_bytes_min(BENCH_ARENA + BENCH_SPILL_MAX));
    b->config = (core_config){.disks = BENCH_DISKS, .workers = 1, .journal_fd = b->disk.fd[0],
                              .arena_fd = memory_file(BENCH_ARENA), .arena_bytes = BENCH_ARENA,
                              .compress_level = compress_level, .boot_id = "this boot"};
    for (uint32_t i = 0; i < BENCH_DISKS; i++) {
        core_disk_config *d = &b->config.disk[i];

        add_file(&b->disk, size[i]);
        *d = (core_disk_config){.fd = b->disk.fd[DISK_IMAGE(i)], .size_bytes = size[i],
                                .logical_block_bytes = 512, .memory_align = 1};
        snprintf(d->name, sizeof(d->name), "disk%u", i);
    }
    check(core_journal_format(&b->config, uuid, b->text) == 0);
    assert_int_equal(bench_open(b), 0);
}

int bench_open(struct bench *b)
{
    int error;

    check(!b->group);
    b->group = aligned_alloc(_Alignof(struct group), sizeof(*b->group));
    check(b->group);
    memset(b->group, 0, sizeof(*b->group));
    b->group->event = note;
    b->group->event_owner = b;
    b->group->now_ns = 1;
    error = group_open(b->group, &b->config, &b->disk.disk, b->text);
    if (!error)
        error = group_start(b->group, -1, true);
    if (error) {
        free(b->group);
        b->group = NULL;
    }
    return error;
}

void bench_kill(struct bench *b)
{
    b->disk.first = b->disk.last = NULL;
    b->disk.hold = false;
    memset(b->disk.hold_file, 0, sizeof(b->disk.hold_file));
    group_close(b->group);
    free(b->group);
    b->group = NULL;
}

void bench_forget_arena(struct bench *b)
{
    check(!b->group);
    close(b->config.arena_fd);
    b->config.arena_fd = memory_file(BENCH_ARENA);
}

void bench_add_spill(struct bench *b, uint64_t bytes)
{
    bench_forget_arena(b);
    set_file(&b->disk, DISK_SPILL, core_spill_file_bytes(bytes));
    b->config.spill_fd = b->disk.fd[DISK_SPILL];
    b->config.spill_bytes = bytes;
}

void bench_end(struct bench *b)
{
    if (b->group)
        bench_kill(b);
    close(b->config.arena_fd);
    for (uint32_t i = 0; i < FILES_MAX; i++) {
        if (!b->disk.file[i])
            continue;
        munmap(b->disk.file[i], b->disk.bytes[i]);
        close(b->disk.fd[i]);
    }
}

struct bench *bench_new(uint64_t size0, uint64_t size1, int compress_level)
{
    struct bench *b = calloc(1, sizeof(*b));

    check(b);
    bench_start(b, size0, size1, compress_level);
    return b;
}

int bench_teardown(void **state)
{
    bench_end(*state);
    free(*state);
    return 0;
}

static bool deliverable(const struct memory_disk *m)
{
    const struct disk_op *op = m->hold ? NULL : m->first;

    while (op && m->hold_file[op->file])
        op = op->next;
    return op;
}

void bench_settle(struct bench *b)
{
    bool moved = true;

    while (moved) {
        moved = disk_reap(&b->disk.disk, false) > 0;
        while (group_step(b->group))
            moved = true;
        moved |= deliverable(&b->disk);
    }
}

uint64_t bench_submit(struct bench *b, enum verb_kind kind, uint64_t epoch, bool newest)
{
    struct verb v = {.kind = kind, .token = ++b->token, .epoch = epoch, .newest = newest};

    check(checkpoint_submit(b->group, &v) == 0);
    bench_settle(b);
    return v.token;
}

const core_event *bench_answer(const struct bench *b, uint64_t token)
{
    const core_event *found = NULL;

    for (uint32_t i = 0; i < b->events; i++)
        if (b->event[i].type == CORE_EVENT_DONE && b->event[i].token == token) {
            assert_null(found); /* exactly one answer */
            found = &b->event[i];
        }
    return found;
}

const core_event *bench_verb(struct bench *b, enum verb_kind kind)
{
    const core_event *answer;

    b->events = 0;
    answer = bench_answer(b, bench_submit(b, kind, 0, kind == VERB_COMMIT));
    assert_non_null(answer);
    return answer;
}

uint32_t bench_count(const struct bench *b, uint32_t type)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < b->events; i++)
        n += b->event[i].type == type;
    return n;
}

bool bench_room(struct bench *b, uint32_t disk, uint64_t blocks)
{
    struct writer *w = group_writer(b->group, disk);

    epoch_batch_begin(w);
    if (w->shared && !epoch_room(w, blocks)) {
        writer_want(w, blocks);
        writer_round(w);
        if (!epoch_room(w, blocks))
            writer_hold(w, blocks);
    }
    epoch_batch_end(w);
    return epoch_room(w, blocks);
}

int bench_write(struct bench *b, uint32_t disk, uint64_t sector, const void *data, uint64_t bytes)
{
    struct span span = {.ptr = (uint8_t *)(uintptr_t)data, .bytes = bytes};
    struct span_cursor from = span_start(&span, 1);

    return epoch_write(b->group, disk, sector, &from, bytes);
}

void bench_read(struct bench *b, uint32_t disk, uint64_t sector, void *to, uint64_t bytes)
{
    uint8_t block_bytes[BLOCK_BYTES], *out = to;

    for (uint64_t at = sector; at < sector + bytes / SECTOR_BYTES; at++) {
        uint64_t block = at / BLOCK_SECTORS, n = at % BLOCK_SECTORS;
        const uint8_t *direct, *from = block_bytes + n * SECTOR_BYTES;
        int found = epoch_read(b->group, disk, block, (uint8_t)(1u << n), block_bytes, &direct);

        assert_true(found >= 0);
        if (found == 0)
            from = b->disk.file[DISK_IMAGE(disk)] + at * SECTOR_BYTES;
        else if (direct)
            from = direct;
        memcpy(out, from, SECTOR_BYTES);
        out += SECTOR_BYTES;
    }
}
