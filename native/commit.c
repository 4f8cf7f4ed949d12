/* commit.c - see journal.h: all sealed epochs up to one become a record.
 *
 * What to read is collected; where enough of it is dead, the helper finds out what is alive
 * (condense.h); that gives the record's layout. Then piece after piece of the record is checked
 * by the helper, and copied where it is not written from where it lies, and written.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "checksum.h"
#include "crash.h"
#include "group.h"
#include "mutant.h"

/* ---- What to read ------------------------------------------------------------------------ */

static int reserve(struct commit *c)
{
    uint32_t max = c->sources_max ? c->sources_max * 2 : 64;
    struct commit_source *source = realloc(c->source, max * sizeof(*source));
    struct commit_segment *segment;

    if (!source)
        return -ENOMEM;
    c->source = source;
    segment = realloc(c->segment, max * sizeof(*segment));
    if (!segment)
        return -ENOMEM;
    c->segment = segment;
    c->sources_max = max;
    return 0;
}

static int add_source(struct group *g, const struct epoch *e, uint32_t segment, bool growing)
{
    struct commit *c = &g->journal.commit;
    /* Behind the cursor there may be frames that the packer is not done with. */
    uint32_t bytes = segment == e->packed.segment ? e->packed.tail
                                                  : arena_tail(&g->arena, segment);
    int error = c->sources == c->sources_max ? reserve(c) : 0;

    if (error || bytes == 0)
        return error;
    c->source[c->sources++] = (struct commit_source){
        .segment = segment, .bytes = bytes, .epoch = e->id, .verify = e->adopted,
        .copy = segment >= g->arena.segments || (growing && segment == e->packed.segment)};
    return 0;
}

static int add_list(struct group *g, const struct epoch *e, const struct segment_list *l,
                    bool growing)
{
    int error = 0;

    for (uint32_t n = 0, s = l->first; n < l->count && !error; n++, s = g->arena.next[s])
        error = add_source(g, e, s, growing);
    return error;
}

/* All segments of the epoch; the packer's source, in case that it is at work on one, too: what
 * comes of that is not used. */
static int add_epoch(struct group *g, struct epoch *e)
{
    struct commit *c = &g->journal.commit;
    uint32_t packing = pack_borrow(g, e);
    bool growing = packing != SEGMENT_NONE;
    int error = growing ? add_source(g, e, packing, false) : 0;

    c->condense.epoch[c->condense.epochs++] = e;
    c->differs |= growing;
    for (uint32_t i = 0; i < g->writers && !error; i++)
        error = add_list(g, e, &e->part[i].raw_list, growing);
    if (!error)
        error = add_list(g, e, &e->kept_list, growing);
    if (!error)
        error = add_list(g, e, &e->worn_list, growing);
    if (!error)
        error = add_list(g, e, &e->spill_list, growing);
    return error ? error : add_list(g, e, &e->spill_worn_list, growing);
}

static int collect(struct group *g)
{
    struct commit *c = &g->journal.commit;
    int error = 0;

    c->sources = c->segments = c->condense.epochs = 0;
    for (uint32_t i = 0; i < g->epochs && !error; i++)
        if (g->epoch[i]->id >= c->first && g->epoch[i]->id <= c->last)
            error = add_epoch(g, g->epoch[i]);
    return error;
}

static int by_place(const void *a, const void *b)
{
    const struct commit_source *x = a, *y = b;

    return x->segment < y->segment ? -1 : x->segment > y->segment;
}

static int by_epoch(const void *a, const void *b)
{
    const struct commit_source *x = a, *y = b;

    if (x->epoch != y->epoch)
        return x->epoch < y->epoch ? -1 : 1;
    return by_place(a, b);
}

static void sort_sources(struct commit *c, int (*order)(const void *a, const void *b))
{
    if (c->sources > 1)
        qsort(c->source, c->sources, sizeof(*c->source), order);
}

/* ---- The record -------------------------------------------------------------------------- */

uint32_t journal_record_crc(const struct record_header *h)
{
    static const uint32_t zero;
    const uint8_t *p = (const uint8_t *)h;
    size_t at = offsetof(struct record_header, crc), behind = at + sizeof(zero);
    uint32_t crc = checksum_crc32c(0, p, at);

    crc = checksum_crc32c(crc, &zero, sizeof(zero));
    return checksum_crc32c(crc, p + behind, h->header_bytes - behind);
}

static bool small(const struct commit *c)
{
    return c->record_bytes <= JOURNAL_SMALL_BYTES;
}

/* Every source as it is, in order of place, so that neighbours are one write. */
static void take_all(struct commit *c)
{
    sort_sources(c, by_place);
    for (c->segments = 0; c->segments < c->sources; c->segments++) {
        const struct commit_source *s = &c->source[c->segments];

        c->segment[c->segments] = (struct commit_segment){.epoch = s->epoch, .bytes = s->bytes,
                                                          .source = c->segments};
    }
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

static int lay_out(struct group *g)
{
    struct journal *j = &g->journal;
    struct commit *c = &j->commit;
    uint64_t bytes = record_header_bytes(c->segments);
    int error;

    for (uint32_t i = 0; i < c->segments; i++) {
        c->segment[i].lsn = j->tail_lsn + bytes;
        bytes += page_round_up(c->segment[i].bytes);
    }
    c->record_bytes = bytes;
    error = reserve_header(c);
    if (!error && bytes > j->ring_bytes)
        error = -EFBIG;
    if (!error && c->differs && g->arena.header->condensed < c->last)
        __atomic_store_n(&g->arena.header->condensed, c->last, __ATOMIC_RELEASE);
    return error;
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

/* ---- Condensing -------------------------------------------------------------------------- */

static void condense_job(struct job *job, struct worker *w)
{
    struct group *g = job->owner;

    (void)w;
    condense_run(&g->journal.commit.condense, &g->journal.commit, &g->arena);
}

static void condensed(struct job *job)
{
    struct group *g = job->owner;
    struct commit *c = &g->journal.commit;

    c->job_busy = false;
    c->differs |= c->condense.done;
    if (c->condense.damaged)
        c->error = -EILSEQ;
    else if (!c->condense.done)
        take_all(c);
    if (!c->error)
        c->error = lay_out(g);
    c->phase = c->error ? COMMIT_FINISHED : COMMIT_SPACE;
}

static bool condense_step(struct group *g)
{
    struct commit *c = &g->journal.commit;

    if (c->job_busy)
        return false;
    c->job = (struct job){.run = condense_job, .done = condensed, .owner = g};
    c->job_busy = worker_submit(&g->worker, &c->job, true);
    return c->job_busy;
}

/* All jobs that change the commit's segments are over: lays the record out. */
static void begin_record(struct group *g)
{
    struct commit *c = &g->journal.commit;

    c->error = collect(g);
    if (!c->error && condense_worth(&g->arena, c)) {
        sort_sources(c, by_epoch);
        c->phase = COMMIT_CONDENSE;
        return;
    }
    if (!c->error) {
        take_all(c);
        c->error = lay_out(g);
    }
    c->phase = c->error ? COMMIT_FINISHED : COMMIT_SPACE;
}

/* ---- Checking and copying ---------------------------------------------------------------- */

/* Completes the frames' own checksums and folds the headers into the segment's. False: a
 * frame that an earlier agent left has changed since it got its checksum. */
static bool check_source(struct arena *a, const struct commit_source *from,
                         struct commit_segment *s)
{
    uint32_t offset = 0;
    struct frame_header *h;

    s->crc = 0;
    while ((h = arena_frame_next(a, from->segment, s->bytes, &offset))) {
        if (h->crc == 0) /* the packer may be reading it */
            __atomic_store_n(&h->crc, frame_crc(h), __ATOMIC_RELAXED);
        else if (from->verify && h->crc != frame_crc(h))
            return false;
        s->crc = checksum_crc32c(s->crc, h, sizeof(*h));
    }
    check(offset == s->bytes);
    return true;
}

/* The copy of a segment in the spill file, whose frames have their checksums all. */
static bool check_copy(struct commit_segment *s, uint8_t *copy)
{
    uint32_t offset = 0;
    const struct frame_header *h;

    s->crc = 0;
    while ((h = frame_next(copy, s->bytes, &offset))) {
        if (h->crc != frame_crc(h))
            return false;
        s->crc = checksum_crc32c(s->crc, h, sizeof(*h));
    }
    return offset == s->bytes;
}

static bool copied(const struct commit *c, const struct commit_segment *s)
{
    return small(c) || s->condensed ||
           (c->source[s->source].copy && !mutant(MUTANT_SPILL_UNCOPIED));
}

static void check_segment(struct group *g, struct commit_piece *p, struct commit_segment *s)
{
    struct commit *c = &g->journal.commit;
    const struct commit_source *from = &c->source[s->source];
    uint8_t *to = p->to + (s->lsn - c->segment[p->first].lsn);
    uint8_t *at = arena_segment(&g->arena, from->segment);

    if (s->condensed) {
        p->damaged |= !condense_copy(&c->condense, c, &g->arena, s, to);
    } else if (from->segment >= g->arena.segments) {
        if (copied(c, s))
            memcpy(to, at, s->bytes);
        p->spill_lost |= !check_copy(s, copied(c, s) ? to : at);
    } else {
        p->damaged |= !check_source(&g->arena, from, s);
        if (copied(c, s))
            memcpy(to, at, s->bytes);
    }
    if (copied(c, s))
        memset(to + s->bytes, 0, page_round_up(s->bytes) - s->bytes);
}

static void check_piece(struct job *job, struct worker *w)
{
    struct commit_piece *p = job->owner;

    (void)w;
    for (uint32_t i = p->first; i < p->end; i++)
        check_segment(p->group, p, &p->group->journal.commit.segment[i]);
}

/* ---- Pieces ------------------------------------------------------------------------------ */

static void piece_over(struct commit_piece *p)
{
    if (--p->busy == 0)
        p->group->journal.commit.busy--;
}

static void piece_written(struct disk_op *op, int64_t result)
{
    struct commit_write *w = (struct commit_write *)op;
    struct group *g = w->piece->group;
    struct commit *c = &g->journal.commit;

    if (op->durable)
        c->sync_ns = g->now_ns;
    if (result < 0 && !c->error && !mutant(MUTANT_IGNORE_WRITE_ERROR))
        c->error = (int)result;
    piece_over(w->piece);
}

/* A record that is one write needs no flush behind it where the device has forced unit access,
 * or no cache. Elsewhere the kernel flushes behind the write, in a thread of its own that has to
 * be scheduled: that costs more than our flush as soon as processors are busy. */
static bool durable(const struct group *g)
{
    return g->config.journal_direct && g->config.journal_fua && small(&g->journal.commit);
}

static void write_part(struct commit_piece *p, uint8_t *from, uint64_t lsn, uint64_t bytes)
{
    struct group *g = p->group;
    struct commit_write *w = &p->write[p->writes++];

    check(p->writes <= COMMIT_PIECE_WRITES);
    w->piece = p;
    w->iov = (struct iovec){.iov_base = from, .iov_len = bytes};
    w->op = (struct disk_op){.opcode = DISK_WRITE, .file = DISK_JOURNAL,
                             .offset = journal_offset(&g->journal, lsn), .bytes = bytes,
                             .iov = &w->iov, .iov_count = 1, .done = piece_written,
                             .durable = durable(g) && !mutant(MUTANT_NO_COMMIT_SYNC)};
    p->busy++;
    g->stats.journal_bytes += bytes;
    disk_submit(g->disk, &w->op);
}

/* Around the ring's end, too. */
static void write_run(struct commit_piece *p, uint8_t *from, uint64_t lsn, uint64_t bytes)
{
    const struct journal *j = &p->group->journal;
    uint64_t to_end = j->ring_bytes - lsn % j->ring_bytes;

    write_part(p, from, lsn, bytes < to_end ? bytes : to_end);
    if (bytes > to_end)
        write_part(p, from + to_end, lsn + to_end, bytes - to_end);
}

static uint8_t *source_at(struct commit_piece *p, const struct commit_segment *s)
{
    return arena_segment(&p->group->arena, p->group->journal.commit.source[s->source].segment);
}

/* Copies are one write; of the others those that lie together in the arena, too. */
static void write_piece(struct commit_piece *p)
{
    const struct commit *c = &p->group->journal.commit;
    const struct commit_segment *s = &c->segment[p->first], *end = &c->segment[p->end];
    bool copies = copied(c, s);
    uint64_t bytes;

    for (const struct commit_segment *first = s; s < end; first = s) {
        uint8_t *from = copies ? p->to : source_at(p, first);

        for (bytes = page_round_up(s->bytes), s++;
             s < end && (copies || source_at(p, s) == from + bytes); s++)
            bytes += page_round_up(s->bytes);
        write_run(p, from, first->lsn, bytes);
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

static void piece_checked(struct job *job)
{
    struct commit_piece *p = job->owner;
    struct commit *c = &p->group->journal.commit;

    if (p->spill_lost)
        spill_fails_commit(p->group, -EIO);
    else if (p->damaged && !c->error)
        c->error = -EILSEQ;
    c->checked += p->end - p->first;
    if (!c->error && !small(c))
        write_piece(p);
    piece_over(p);
}

/* How many segments from `at` on are one piece: all of a small record; else a buffer's worth, all
 * copied or none. */
static uint32_t run_length(const struct commit *c, uint32_t at)
{
    const struct commit_segment *s = c->segment, *first = &s[at];
    bool copies = copied(c, first);
    uint32_t n = 1;

    if (small(c))
        return c->segments - at;
    while (at + n < c->segments && copied(c, &s[at + n]) == copies &&
           (copies || n < JOURNAL_WRITE_MAX / SEGMENT_BYTES) &&
           s[at + n].lsn + page_round_up(s[at + n].bytes) - first->lsn <= JOURNAL_WRITE_MAX)
        n++;
    return n;
}

/* The first one free: its buffer is the likeliest to be in a cache. */
static struct commit_piece *free_piece(struct commit *c)
{
    for (uint32_t i = 0; i < JOURNAL_PIECES; i++)
        if (c->piece[i].busy == 0)
            return &c->piece[i];
    return NULL;
}

static void prepare_piece(struct group *g, struct commit_piece *p)
{
    struct commit *c = &g->journal.commit;
    const struct commit_segment *first = &c->segment[c->taken];

    p->first = c->taken;
    p->end = p->first + run_length(c, p->first);
    p->damaged = p->spill_lost = false;
    p->writes = 0;
    p->job = (struct job){.run = check_piece, .done = piece_checked, .owner = p};
    p->to = small(c) ? c->header + (first->lsn - g->journal.tail_lsn) : p->buffer;
}

/* Few bytes are not worth a helper. */
static bool start_piece(struct group *g, struct commit_piece *p)
{
    struct commit *c = &g->journal.commit;
    bool here = c->record_bytes <= JOURNAL_INLINE_BYTES + PAGE;

    prepare_piece(g, p);
    if (!here && !worker_submit(&g->worker, &p->job, true))
        return false;
    c->taken = p->end;
    c->busy++;
    p->busy = 1;
    if (here) {
        check_piece(&p->job, NULL);
        piece_checked(&p->job);
    }
    return true;
}

static bool pieces_step(struct group *g)
{
    struct commit *c = &g->journal.commit;
    struct commit_piece *p;
    bool moved = false;

    while (c->taken < c->segments && !c->error && (p = free_piece(c)) && start_piece(g, p))
        moved = true;
    return moved;
}

static bool write_header(struct group *g)
{
    struct journal *j = &g->journal;
    struct commit *c = &j->commit;
    uint64_t bytes = small(c) ? c->record_bytes : record_header_bytes(c->segments);

    if (c->header_written || c->checked < c->segments || c->error)
        return false;
    fill_header(g);
    crash_point("commit-before-header");
    c->busy++;
    c->header_piece.writes = 0;
    write_run(&c->header_piece, c->header, j->tail_lsn, bytes);
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

/* ---- A commit's way ---------------------------------------------------------------------- */

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
    journal_sync_start(g, &c->sync);
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
    c->taken = c->checked = c->busy = 0;
    c->header_written = c->job_busy = c->spill_lost = c->differs = false;
    c->start_ns = g->now_ns;
    c->phase = COMMIT_JOBS;
    mark(g, CORE_EPOCH_COMMITTING, true);
}

/* Segments on their way to the spill file, or packed ones that are being shown. What the packer is
 * just compressing is not waited for: on a busy machine it may not come to run for long. */
static bool jobs_over(const struct group *g)
{
    const struct commit *c = &g->journal.commit;

    for (uint32_t i = 0; i < g->epochs; i++) {
        const struct epoch *e = g->epoch[i];

        if (e->id >= c->first && e->id <= c->last && e->jobs > pack_may_borrow(g, e))
            return false;
    }
    return true;
}

static bool write_step(struct group *g)
{
    struct commit *c = &g->journal.commit;
    bool moved = pieces_step(g);

    moved |= write_header(g);
    if ((c->busy > 0 && !mutant(MUTANT_SYNC_BEFORE_WRITES)) || (!c->error && !c->header_written))
        return moved;
    if (c->error)
        c->phase = COMMIT_FINISHED;
    else if (durable(g))
        commit_synced(g, 0);
    else
        commit_sync(g);
    return true;
}

bool journal_step(struct group *g)
{
    struct journal *j = &g->journal;
    struct commit *c = &j->commit;

    switch (c->phase) {
    case COMMIT_JOBS:
        if (!jobs_over(g))
            return false;
        begin_record(g);
        return true;
    case COMMIT_CONDENSE:
        return condense_step(g);
    case COMMIT_SPACE: /* waits for apply to move the head */
        if (c->record_bytes > j->ring_bytes - journal_used(j) ||
            j->pending_count == CORE_EPOCHS_MAX)
            return false;
        if (!file_ready(g))
            return c->phase == COMMIT_FINISHED;
        c->phase = COMMIT_WRITE;
        c->write_ns = g->now_ns;
        journal_sync_prepare(g, &c->sync, commit_synced);
        return true;
    case COMMIT_WRITE:
        return write_step(g);
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
    condense_end(&c->condense);
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
