/* journal.c - see journal.h. */
#include "journal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "checksum.h"
#include "crash.h"
#include "group.h"
#include "mutant.h"

int journal_init(struct journal *j)
{
    j->super = aligned_alloc(PAGE, PAGE);
    j->void_page = aligned_alloc(PAGE, PAGE);
    if (!j->super || !j->void_page)
        return -ENOMEM;
    memset(j->void_page, 0, PAGE);
    return 0;
}

void journal_free(struct journal *j)
{
    free(j->super);
    free(j->void_page);
    free(j->commit.segment);
    free(j->commit.header);
    j->super = NULL;
    j->void_page = NULL;
    j->commit.segment = NULL;
    j->commit.header = NULL;
}

uint64_t journal_ring_bytes(uint64_t file_bytes)
{
    return file_bytes > JOURNAL_LOG_OFFSET ? (file_bytes - JOURNAL_LOG_OFFSET) / PAGE * PAGE : 0;
}

/* ---- Flushes -------------------------------------------------------------------------- */

static void sync_submit(struct group *g);

static void sync_over(struct disk_op *op, int64_t result)
{
    struct group *g = op->owner;
    struct journal *j = &g->journal;
    struct journal_sync *s = j->sync_first;
    int error = result < 0 ? (int)result : 0;

    if (!error && s->failures != j->sync_failures && !mutant(MUTANT_IGNORE_OTHERS_SYNC))
        error = -EIO; /* the failure was told to somebody else */
    if (result < 0)
        j->sync_failures++;
    j->sync_first = s->next;
    if (j->sync_first)
        sync_submit(g);
    s->done(g, error);
}

static void sync_submit(struct group *g)
{
    struct journal *j = &g->journal;

    j->sync_op = (struct disk_op){.opcode = DISK_SYNC, .file = DISK_JOURNAL, .done = sync_over,
                                  .owner = g};
    disk_submit(g->disk, &j->sync_op);
}

/* Before the first of the writes that a flush is to cover. */
static void sync_prepare(struct group *g, struct journal_sync *s,
                         void (*done)(struct group *g, int error))
{
    *s = (struct journal_sync){.done = done, .failures = g->journal.sync_failures};
}

/* All those writes have completed. */
static void sync_start(struct group *g, struct journal_sync *s)
{
    struct journal *j = &g->journal;

    if (j->sync_first) {
        j->sync_last->next = s;
        j->sync_last = s;
        return;
    }
    j->sync_first = j->sync_last = s;
    sync_submit(g);
}

/* ---- Superblock ----------------------------------------------------------------------- */

uint32_t journal_super_crc(const struct journal_super *page)
{
    struct journal_super copy = *page;

    copy.crc = 0;
    return checksum_crc32c(0, &copy, sizeof(copy));
}

void journal_super_fill(struct group *g, struct journal_super *page)
{
    struct journal *j = &g->journal;

    memset(page, 0, sizeof(*page));
    page->magic = JOURNAL_MAGIC;
    page->version = JOURNAL_VERSION;
    page->super_seq = j->super_seq;
    memcpy(page->group, j->group, sizeof(page->group));
    page->file_bytes = j->file_bytes;
    page->head_lsn = j->head_lsn;
    page->applied = j->head_applied;
    page->epoch_limit = j->super_limit;
    page->generation = g->generation;
    page->mode = g->mode;
    page->disks = j->disks;
    page->clean = j->clean;
    memcpy(page->disk, j->disk, sizeof(page->disk));
    page->crc = journal_super_crc(page);
}

static void super_start(struct group *g);

static void super_finish(struct group *g, int error)
{
    struct journal *j = &g->journal;
    struct super_waiter due[SUPER_WAITERS_MAX];
    uint32_t count = 0, kept = 0;

    j->super_busy = false;
    if (error && !mutant(MUTANT_SUPER_NEXT_SLOT))
        j->super_seq += JOURNAL_SUPER_SLOTS - 1; /* the same slot: the one before it is whole */
    if (!error && j->super->epoch_limit > j->epoch_limit)
        j->epoch_limit = j->super->epoch_limit;
    for (uint32_t i = 0; i < j->waiters; i++) {
        if (j->waiter[i].version <= j->super_writing)
            due[count++] = j->waiter[i];
        else
            j->waiter[kept++] = j->waiter[i];
    }
    j->waiters = kept;
    for (uint32_t i = 0; i < count; i++)
        due[i].done(g, error);
    if (!j->super_busy && j->waiters > 0)
        super_start(g);
}

static void super_written(struct disk_op *op, int64_t result)
{
    struct group *g = op->owner;

    if (result < 0) {
        super_finish(g, (int)result);
        return;
    }
    if (mutant(MUTANT_NO_SUPER_SYNC)) {
        super_finish(g, 0);
        return;
    }
    crash_point("super-before-sync");
    sync_start(g, &g->journal.super_sync);
}

static void super_start(struct group *g)
{
    struct journal *j = &g->journal;

    j->super_busy = true;
    j->super_writing = j->super_version;
    j->super_seq++;
    if (mutant(MUTANT_SUPER_ONE_SLOT))
        while (j->super_seq % JOURNAL_SUPER_SLOTS)
            j->super_seq++;
    journal_super_fill(g, j->super);
    sync_prepare(g, &j->super_sync, super_finish);
    j->super_iov = (struct iovec){.iov_base = j->super, .iov_len = PAGE};
    j->super_op = (struct disk_op){
        .opcode = DISK_WRITE, .file = DISK_JOURNAL, .bytes = PAGE, .iov = &j->super_iov,
        .iov_count = 1, .done = super_written, .owner = g,
        .offset = j->super_seq % JOURNAL_SUPER_SLOTS * JOURNAL_SUPER_STRIDE};
    disk_submit(g->disk, &j->super_op);
}

void journal_super_save(struct group *g, uint64_t epoch_limit,
                        void (*done)(struct group *g, int error))
{
    struct journal *j = &g->journal;

    check(j->waiters < SUPER_WAITERS_MAX);
    if (epoch_limit)
        j->super_limit = epoch_limit;
    j->waiter[j->waiters++] =
        (struct super_waiter){.done = done, .version = ++j->super_version};
    if (!j->super_busy)
        super_start(g);
}

/* ---- Checksums of a commit's segments -------------------------------------------------- */

/* Completes the frames' own checksums and folds the headers into the segment's. False: a
 * frame that an earlier agent left, or that lay in the spill file, has changed since it got its
 * checksum. */
static bool segment_checksum(struct arena *a, struct commit_segment *s)
{
    uint32_t offset = 0;
    struct frame_header *h;

    s->crc = 0;
    while ((h = arena_frame_next(a, s->segment, s->bytes, &offset))) {
        if (h->crc == 0)
            h->crc = frame_crc(h);
        else if (s->verify && h->crc != frame_crc(h))
            return false;
        s->crc = checksum_crc32c(s->crc, h, sizeof(*h));
    }
    check(offset == s->bytes);
    return true;
}

/* The same of a segment in the spill file, whose frames have their checksums all. */
static bool spilled_checksum(struct expander *x, const struct arena *a, struct commit_segment *s)
{
    s->crc = 0;
    for (uint32_t at = 0; at < s->bytes;) {
        const struct frame_header *h = frame_get(x, a, arena_loc_of(s->segment, at));

        if (!h || !frame_plausible(h, s->bytes - at))
            return false;
        s->crc = checksum_crc32c(s->crc, h, sizeof(*h));
        at += frame_bytes(h->payload_bytes);
    }
    return true;
}

static void checksum_run(struct job *job, struct worker *w)
{
    struct group *g = job->owner;
    struct commit *c = &g->journal.commit;

    for (uint32_t i = c->checked; i < c->job_end; i++) {
        struct commit_segment *s = &c->segment[i];

        if (s->segment >= g->arena.segments)
            c->spill_lost |= !spilled_checksum(w ? &w->expand : &g->writer[0].expand, &g->arena, s);
        else
            c->damaged |= !segment_checksum(&g->arena, s);
    }
}

static void spill_fails_commit(struct group *g, int error)
{
    struct commit *c = &g->journal.commit;

    spill_fault(g, error);
    c->spill_lost = true;
    if (!c->error)
        c->error = error;
}

static void checksum_done(struct job *job)
{
    struct group *g = job->owner;
    struct commit *c = &g->journal.commit;

    if (c->spill_lost)
        spill_fails_commit(g, -EIO);
    else if (c->damaged && !c->error)
        c->error = -EILSEQ;
    c->checked = c->job_end;
    c->job_busy = false;
}

static bool checksum_step(struct group *g)
{
    struct commit *c = &g->journal.commit;

    if (c->job_busy || c->checked == c->segments || c->error)
        return false;
    c->job = (struct job){.run = checksum_run, .done = checksum_done, .owner = g};
    if (c->record_bytes <= JOURNAL_INLINE_BYTES + PAGE) {
        c->job_end = c->segments;
        checksum_run(&c->job, NULL);
        checksum_done(&c->job);
        return true;
    }
    c->job_end = c->checked + JOURNAL_WRITE_MAX / SEGMENT_BYTES;
    if (c->job_end > c->segments)
        c->job_end = c->segments;
    c->job_busy = worker_submit(&g->worker, &c->job, true);
    return c->job_busy;
}

/* ---- Commit --------------------------------------------------------------------------- */

uint32_t journal_record_crc(const struct record_header *h)
{
    static const uint32_t zero;
    const uint8_t *p = (const uint8_t *)h;
    size_t at = offsetof(struct record_header, crc), behind = at + sizeof(zero);
    uint32_t crc = checksum_crc32c(0, p, at);

    crc = checksum_crc32c(crc, &zero, sizeof(zero));
    return checksum_crc32c(crc, p + behind, h->header_bytes - behind);
}

static int add_segments(struct group *g, const struct epoch *e, const struct segment_list *l)
{
    struct commit *c = &g->journal.commit;

    for (uint32_t n = 0, s = l->first; n < l->count; n++, s = g->arena.next[s]) {
        uint32_t bytes = arena_tail(&g->arena, s);

        if (bytes == 0)
            continue;
        if (c->segments == c->segments_max) {
            uint32_t max = c->segments_max ? c->segments_max * 2 : 64;
            struct commit_segment *more = realloc(c->segment, max * sizeof(*more));
            if (!more)
                return -ENOMEM;
            c->segment = more;
            c->segments_max = max;
        }
        c->segment[c->segments++] =
            (struct commit_segment){.segment = s, .bytes = bytes, .epoch = e->id,
                                    .verify = e->adopted};
    }
    return 0;
}

static int by_place(const void *a, const void *b)
{
    const struct commit_segment *x = a, *y = b;

    return x->segment < y->segment ? -1 : x->segment > y->segment;
}

static bool small(const struct commit *c)
{
    return c->record_bytes <= JOURNAL_SMALL_BYTES;
}

static int reserve_header(struct commit *c)
{
    uint64_t bytes = small(c) ? c->record_bytes : record_header_bytes(c->segments);

    if (bytes <= c->header_max)
        return 0;
    free(c->header);
    c->header = aligned_alloc(PAGE, bytes);
    c->header_max = c->header ? bytes : 0;
    return c->header ? 0 : -ENOMEM;
}

/* The record's layout: its segments in order of place, so that neighbours are one write. */
static int lay_out(struct group *g)
{
    struct journal *j = &g->journal;
    struct commit *c = &j->commit;
    uint64_t bytes;
    int error = 0;

    c->segments = 0;
    for (uint32_t i = 0; i < g->epochs && !error; i++) {
        const struct epoch *e = g->epoch[i];

        if (e->id < c->first || e->id > c->last)
            continue;
        for (uint32_t n = 0; n < g->writers && !error; n++)
            error = add_segments(g, e, &e->part[n].raw_list);
        if (!error)
            error = add_segments(g, e, &e->kept_list);
        if (!error)
            error = add_segments(g, e, &e->worn_list);
        if (!error)
            error = add_segments(g, e, &e->spill_list);
        if (!error)
            error = add_segments(g, e, &e->spill_worn_list);
    }
    if (error)
        return error;
    if (c->segments > 1)
        qsort(c->segment, c->segments, sizeof(*c->segment), by_place);
    bytes = record_header_bytes(c->segments);
    for (uint32_t i = 0; i < c->segments; i++) {
        c->segment[i].lsn = j->tail_lsn + bytes;
        bytes += page_round_up(c->segment[i].bytes);
    }
    c->record_bytes = bytes;
    error = reserve_header(c);
    return !error && bytes > j->ring_bytes ? -EFBIG : error;
}

static void fill_header(struct group *g)
{
    struct journal *j = &g->journal;
    struct commit *c = &j->commit;
    struct record_header *h = (struct record_header *)c->header;
    struct record_segment *table = (struct record_segment *)(h + 1);
    uint32_t bytes = record_header_bytes(c->segments);

    memset(h, 0, bytes);
    h->magic = RECORD_MAGIC;
    h->version = JOURNAL_VERSION;
    memcpy(h->group, j->group, sizeof(h->group));
    h->lsn = j->tail_lsn;
    h->epoch_first = c->first;
    h->epoch_last = c->last;
    h->record_bytes = c->record_bytes;
    h->epoch_limit = epoch_open(g)->id + JOURNAL_EPOCH_STEP;
    h->segments = c->segments;
    h->header_bytes = bytes;
    for (uint32_t i = 0; i < c->segments; i++)
        table[i] = (struct record_segment){.epoch = c->segment[i].epoch,
                                           .bytes = c->segment[i].bytes,
                                           .crc = c->segment[i].crc};
    h->crc = journal_record_crc(h);
}

static void commit_written(struct disk_op *op, int64_t result)
{
    struct commit_write *w = (struct commit_write *)op;
    struct group *g = op->owner;
    struct commit *c = &g->journal.commit;

    w->busy = false;
    c->busy--;
    if (w->op.durable)
        c->sync_ns = g->now_ns;
    if (result < 0 && !c->error && !mutant(MUTANT_IGNORE_WRITE_ERROR))
        c->error = (int)result;
}

/* A record that is one write needs no flush behind it where the device has forced unit access,
 * or no cache. Elsewhere the kernel flushes behind the write, in a thread of its own that has to
 * be scheduled: that costs more than our flush as soon as processors are busy. */
static bool durable(const struct group *g)
{
    return g->config.journal_direct && g->config.journal_fua && small(&g->journal.commit);
}

/* Writes bytes at a position, up to the ring's end; returns how many, 0: no slot free. */
static uint64_t write_piece(struct group *g, uint8_t *from, uint64_t lsn, uint64_t bytes)
{
    struct journal *j = &g->journal;
    struct commit *c = &j->commit;
    uint64_t to_end = j->ring_bytes - lsn % j->ring_bytes;

    if (bytes > to_end)
        bytes = to_end;
    for (uint32_t i = 0; i < JOURNAL_WRITES_MAX; i++) {
        struct commit_write *w = &c->write[i];

        if (w->busy)
            continue;
        w->busy = true;
        w->iov = (struct iovec){.iov_base = from, .iov_len = bytes};
        w->op = (struct disk_op){.opcode = DISK_WRITE, .file = DISK_JOURNAL,
                                 .offset = journal_offset(j, lsn), .bytes = bytes,
                                 .iov = &w->iov, .iov_count = 1, .durable = durable(g) && !mutant(MUTANT_NO_COMMIT_SYNC),
                                 .done = commit_written, .owner = g};
        c->busy++;
        g->stats.journal_bytes += bytes;
        disk_submit(g->disk, &w->op);
        return bytes;
    }
    return 0;
}

/* How many checked segments from `at` lie together in the arena and in the record. */
static uint32_t run_length(const struct commit *c, uint32_t at)
{
    uint32_t n = 1;

    while (at + n < c->checked && n < JOURNAL_WRITE_MAX / SEGMENT_BYTES &&
           c->segment[at + n].segment == c->segment[at].segment + n &&
           page_round_up(c->segment[at + n - 1].bytes) == SEGMENT_BYTES)
        n++;
    return n;
}

/* The segments of a small record, behind its header. */
static bool copy_segments(struct group *g)
{
    struct commit *c = &g->journal.commit;

    if (c->checked < c->segments || c->written == c->segments)
        return false;
    for (; c->written < c->segments; c->written++) {
        const struct commit_segment *s = &c->segment[c->written];

        memcpy(c->header + (s->lsn - g->journal.tail_lsn), arena_segment(&g->arena, s->segment),
               page_round_up(s->bytes));
    }
    return true;
}

static bool write_segments(struct group *g)
{
    struct commit *c = &g->journal.commit;
    bool moved = false;

    /* A run that crosses the ring's end takes two slots. */
    while (c->written < c->checked && c->busy + 2 <= JOURNAL_WRITES_MAX && !c->error) {
        uint32_t n = run_length(c, c->written);
        const struct commit_segment *first = &c->segment[c->written];
        const struct commit_segment *last = first + n - 1;
        uint64_t bytes = last->lsn + page_round_up(last->bytes) - first->lsn;
        uint8_t *from = arena_segment(&g->arena, first->segment);
        uint64_t some = write_piece(g, from, first->lsn, bytes);

        if (some < bytes)
            write_piece(g, from + some, first->lsn + some, bytes - some);
        c->written += n;
        moved = true;
    }
    return moved;
}

static bool write_header(struct group *g)
{
    struct journal *j = &g->journal;
    struct commit *c = &j->commit;
    uint64_t bytes = small(c) ? c->record_bytes : record_header_bytes(c->segments), some;

    if (c->header_written || c->checked < c->segments || c->written < c->segments ||
        c->busy + 2 > JOURNAL_WRITES_MAX || c->error)
        return false;
    fill_header(g);
    crash_point("commit-before-header");
    some = write_piece(g, c->header, j->tail_lsn, bytes);
    if (some < bytes)
        write_piece(g, c->header + some, j->tail_lsn + some, bytes - some);
    c->header_written = true;
    return true;
}

/* ---- The file under us ----------------------------------------------------------------- */

/* -ENOENT: it was removed; -ENODATA: it was cut. What is written then is found by no start,
 * so it is no commit. A simulated journal has no file. */
static int file_lost(const struct group *g)
{
    struct stat st;

    if (fstat(g->config.journal_fd, &st) || !S_ISREG(st.st_mode))
        return 0;
    if (st.st_nlink == 0 && g->journal.has_name)
        return -ENOENT;
    return (uint64_t)st.st_size < g->journal.file_bytes ? -ENODATA : 0;
}

void journal_file_known(struct group *g)
{
    struct stat st;

    g->journal.has_name = fstat(g->config.journal_fd, &st) == 0 && st.st_nlink > 0;
}

static void mended(struct group *g, int error)
{
    g->journal.mending--;
    if (error && !g->journal.commit.error)
        g->journal.commit.error = error;
}

/* A file that was cut has lost superblocks and records. Once apply has brought the arena's
 * copy of those into the images, an empty ring and fresh superblocks are all it needs. */
static int mend(struct group *g)
{
    struct journal *j = &g->journal;
    int error = -posix_fallocate(g->config.journal_fd, 0, (off_t)j->file_bytes);

    group_io_error(g, TROUBLE_COMMIT, CORE_NO_DISK, error ? error : -ENODATA,
                   error ? "the journal's file was cut, allocating it anew"
                         : "the journal's file was cut and is allocated anew");
    for (uint32_t slot = 0; slot < JOURNAL_SUPER_SLOTS && !error; slot++) {
        j->mending++;
        journal_super_save(g, 0, mended);
    }
    return error;
}

/* True: the commit may write. False: it waits, or has failed. */
static bool file_ready(struct group *g)
{
    struct journal *j = &g->journal;
    int error = file_lost(g);

    if (j->mending > 0)
        return false;
    if (error == -ENODATA && j->pending_count > 0)
        return false;
    if (error == -ENODATA)
        error = mend(g);
    if (error)
        j->commit.error = error;
    if (j->commit.error)
        j->commit.phase = COMMIT_FINISHED;
    return j->mending == 0 && !j->commit.error;
}

static void commit_synced(struct group *g, int error)
{
    struct commit *c = &g->journal.commit;

    if (!error)
        error = file_lost(g);
    crash_point("commit-after-sync");
    if (!mutant(MUTANT_IGNORE_SYNC_ERROR))
        c->error = error;
    c->phase = COMMIT_FINISHED;
}

/* Segments in the spill file were written from its mapping after they had been checked: they
 * count if the file had all of them to the end. They are the last ones, in order of place. */
static bool sources_whole(struct group *g)
{
    const struct commit *c = &g->journal.commit;
    int error = 0;

    if (c->segments > 0 && c->segment[c->segments - 1].segment >= g->arena.segments)
        error = spill_look(g);
    if (error)
        spill_fails_commit(g, error);
    return !error;
}

static void commit_sync(struct group *g)
{
    struct commit *c = &g->journal.commit;

    c->phase = COMMIT_SYNC;
    c->sync_ns = g->now_ns;
    if (mutant(MUTANT_NO_COMMIT_SYNC)) {
        c->phase = COMMIT_FINISHED;
        return;
    }
    crash_point("commit-before-sync");
    sync_start(g, &c->sync);
}

/* Sets the state of the commit's epochs. */
static void mark(struct group *g, enum core_epoch_state state, bool frozen)
{
    const struct commit *c = &g->journal.commit;

    for (uint32_t i = 0; i < g->epochs; i++) {
        struct epoch *e = g->epoch[i];

        if (e->id >= c->first && e->id <= c->last) {
            e->state = state;
            e->frozen = frozen;
            pack_look(g);
        }
    }
}

void journal_commit_begin(struct group *g, uint64_t last)
{
    struct commit *c = &g->journal.commit;

    check(c->phase == COMMIT_IDLE && last > g->committed);
    c->first = 0;
    for (uint32_t i = 0; i < g->epochs && !c->first; i++)
        if (g->epoch[i]->state == CORE_EPOCH_SEALED)
            c->first = g->epoch[i]->id;
    check(c->first && c->first <= last);
    c->last = last;
    c->error = 0;
    c->checked = c->written = c->busy = 0;
    c->header_written = c->job_busy = c->damaged = c->spill_lost = false;
    c->start_ns = g->now_ns;
    c->phase = COMMIT_JOBS;
    mark(g, CORE_EPOCH_COMMITTING, true);
}

static bool jobs_over(const struct group *g)
{
    const struct commit *c = &g->journal.commit;

    for (uint32_t i = 0; i < g->epochs; i++)
        if (g->epoch[i]->id >= c->first && g->epoch[i]->id <= c->last && g->epoch[i]->jobs)
            return false;
    return true;
}

bool journal_step(struct group *g)
{
    struct journal *j = &g->journal;
    struct commit *c = &j->commit;
    bool moved = false;

    switch (c->phase) {
    case COMMIT_JOBS:
        if (!jobs_over(g))
            return false;
        c->error = lay_out(g);
        c->phase = c->error ? COMMIT_FINISHED : COMMIT_SPACE;
        return true;
    case COMMIT_SPACE: /* waits for apply to move the head */
        if (c->record_bytes > j->ring_bytes - journal_used(j) ||
            j->pending_count == CORE_EPOCHS_MAX)
            return false;
        if (!file_ready(g))
            return c->phase == COMMIT_FINISHED;
        c->phase = COMMIT_WRITE;
        c->write_ns = g->now_ns;
        sync_prepare(g, &c->sync, commit_synced);
        return true;
    case COMMIT_WRITE:
        moved |= checksum_step(g);
        moved |= small(c) ? copy_segments(g) : write_segments(g);
        moved |= write_header(g);
        if ((c->busy == 0 || mutant(MUTANT_SYNC_BEFORE_WRITES)) && !c->job_busy &&
            (c->error || c->header_written)) {
            if (c->error || !sources_whole(g))
                c->phase = COMMIT_FINISHED;
            else if (durable(g))
                commit_synced(g, 0);
            else
                commit_sync(g);
            return true;
        }
        return moved;
    default:
        return false;
    }
}

int journal_commit_end(struct group *g)
{
    struct journal *j = &g->journal;
    struct commit *c = &j->commit;
    const struct record_header *h = (const struct record_header *)c->header;

    check(c->phase == COMMIT_FINISHED);
    c->phase = COMMIT_IDLE;
    if (c->error) {
        mark(g, CORE_EPOCH_SEALED, false);
        j->tail_suspect = j->tail_suspect || c->header_written;
        return c->error;
    }
    j->tail_suspect = false;
    j->tail_lsn += c->record_bytes;
    j->pending[(j->pending_first + j->pending_count++) % CORE_EPOCHS_MAX] =
        (struct journal_pending){.lsn_end = j->tail_lsn, .epoch_last = c->last};
    if (h->epoch_limit > j->epoch_limit)
        j->epoch_limit = h->epoch_limit;
    if (j->super_limit < j->epoch_limit)
        j->super_limit = j->epoch_limit;
    g->committed = c->last;
    crash_point("commit-before-arena");
    __atomic_store_n(&g->arena.header->committed, c->last, __ATOMIC_RELEASE);
    crash_point("commit-before-answer");
    mark(g, CORE_EPOCH_COMMITTED, true);
    g->stats.commits++;
    g->stats.commit_ns_last = g->now_ns - c->start_ns;
    metrics_add(&g->metrics, METRICS_COMMIT_PREPARE, c->write_ns - c->start_ns, 1);
    metrics_add(&g->metrics, METRICS_COMMIT_WRITE, c->sync_ns - c->write_ns, 1);
    metrics_add(&g->metrics, METRICS_COMMIT_FLUSH, g->now_ns - c->sync_ns, 1);
    metrics_add(&g->metrics, METRICS_COMMIT, g->stats.commit_ns_last, 1);
    return 0;
}

/* ---- Voiding the tail ----------------------------------------------------------------- */

static void void_finish(struct group *g, int error)
{
    if (!error)
        g->journal.tail_suspect = false;
    g->journal.void_done(g, error);
}

static void void_written(struct disk_op *op, int64_t result)
{
    struct group *g = op->owner;

    if (result < 0) {
        void_finish(g, (int)result);
        return;
    }
    sync_start(g, &g->journal.void_sync);
}

void journal_void(struct group *g, void (*done)(struct group *g, int error))
{
    struct journal *j = &g->journal;

    j->void_done = done;
    sync_prepare(g, &j->void_sync, void_finish);
    j->void_iov = (struct iovec){.iov_base = j->void_page, .iov_len = PAGE};
    j->void_op = (struct disk_op){.opcode = DISK_WRITE, .file = DISK_JOURNAL,
                                  .offset = journal_offset(j, j->tail_lsn), .bytes = PAGE,
                                  .iov = &j->void_iov, .iov_count = 1, .done = void_written,
                                  .owner = g};
    disk_submit(g->disk, &j->void_op);
}
