/* apply.c - see apply.h. */
#include "apply.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "crash.h"
#include "group.h"
#include "mutant.h"

#define BATCH_BYTES (APPLY_BATCH_BLOCKS * BLOCK_BYTES)

int apply_init(struct group *g)
{
    struct apply *a = &g->apply;

    a->group = g;
    a->sync = calloc(g->config.disks, sizeof(*a->sync));
    a->zeroes = aligned_alloc(PAGE, BATCH_BYTES);
    if (!a->sync || !a->zeroes)
        return -ENOMEM;
    memset(a->zeroes, 0, BATCH_BYTES);
    for (uint32_t i = 0; i < APPLY_BATCHES; i++) {
        struct apply_batch *b = &a->batch[i];

        b->apply = a;
        b->buffer = aligned_alloc(PAGE, BATCH_BYTES);
        b->write = calloc(APPLY_WRITES_MAX, sizeof(*b->write));
        if (!b->buffer || !b->write)
            return -ENOMEM;
    }
    return 0;
}

void apply_free(struct group *g)
{
    struct apply *a = &g->apply;

    free(a->sync);
    free(a->zeroes);
    free(a->entry);
    for (uint32_t i = 0; i < APPLY_BATCHES; i++) {
        free(a->batch[i].buffer);
        free(a->batch[i].write);
    }
    memset(a, 0, sizeof(*a));
}

static void fail(struct apply *a, uint32_t disk, int error)
{
    if (a->error)
        return;
    a->error = error;
    a->error_disk = disk;
}

/* ---- Zero ranges ----------------------------------------------------------------------- */

static void zero_done(struct disk_op *op, int64_t result)
{
    struct apply *a = op->owner;

    a->busy--;
    if (result == -EOPNOTSUPP && op->opcode != DISK_WRITE) {
        a->zero_by_writes = true;
        return;
    }
    if (result < 0)
        fail(a, op->file - DISK_IMAGE(0), (int)result);
    a->range_done += a->zero_bytes / BLOCK_BYTES;
    if (op->opcode == DISK_WRITE)
        a->group->stats.image_bytes += a->zero_bytes;
}

static void sort_begin(struct apply *a, uint64_t from)
{
    a->phase = APPLY_SORT;
    a->sorted = false;
    a->from = from;
}

/* One piece of the current range at a time: fallocate is cheap, its fallback is rare. */
static bool zero_step(struct group *g)
{
    struct apply *a = &g->apply;
    const struct range_extent *r = &a->range;
    uint64_t bytes;

    if (a->busy && !mutant(MUTANT_ZEROES_UNORDERED))
        return false;
    if (a->range_done == r->end - r->first && !a->error) {
        a->range_done = 0;
        a->zero_by_writes = false;
        if (ranges_next(&a->epoch->index.ranges, &a->range))
            return true;
        a->range = (struct range_extent){0};
    }
    if (r->end == 0 || a->error) {
        sort_begin(a, 0);
        return true;
    }
    bytes = (r->end - r->first - a->range_done) * BLOCK_BYTES;
    if (bytes > APPLY_ZERO_BYTES)
        bytes = APPLY_ZERO_BYTES;
    if (a->zero_by_writes && bytes > BATCH_BYTES)
        bytes = BATCH_BYTES;
    a->zero_bytes = bytes;
    a->zero.iov = (struct iovec){.iov_base = a->zeroes, .iov_len = bytes};
    a->zero.op = (struct disk_op){
        .opcode = a->zero_by_writes ? DISK_WRITE : r->flags & FRAME_UNMAP ? DISK_PUNCH : DISK_ZERO,
        .file = DISK_IMAGE(r->disk), .offset = (r->first + a->range_done) * BLOCK_BYTES,
        .bytes = bytes, .iov = &a->zero.iov, .iov_count = 1, .done = zero_done, .owner = a};
    a->busy++;
    disk_submit(g->disk, &a->zero.op);
    return true;
}

/* ---- Sorting --------------------------------------------------------------------------- */

static uint64_t place(const struct index_slot *s)
{
    return (uint64_t)s->disk << 48 | index_slot_block(s);
}

static int by_place(const void *a, const void *b)
{
    uint64_t p = place(a), q = place(b);

    return p < q ? -1 : p > q;
}

static void sort_entries(struct apply *a)
{
    if (a->entries > 1)
        qsort(a->entry, a->entries, sizeof(*a->entry), by_place);
}

/* The first blocks from `from` on, as many as there is room for: when it is full, the second half
 * is left for the next piece. */
static void sort_run(struct job *job, struct worker *w)
{
    struct apply *a = job->owner;
    const struct index *x = &a->epoch->index;
    struct index_cursor at = {0};
    const struct index_slot *s;

    (void)w;
    a->entries = 0;
    a->rest = UINT64_MAX;
    while ((s = index_next(x, &at))) {
        if (place(s) < a->from || place(s) >= a->rest)
            continue;
        if (a->entries == a->entries_max) {
            sort_entries(a);
            a->entries /= 2;
            a->rest = place(&a->entry[a->entries]);
        }
        if (place(s) < a->rest)
            a->entry[a->entries++] = *s;
    }
    sort_entries(a);
}

static void sort_done(struct job *job)
{
    struct apply *a = job->owner;

    a->busy--;
    a->sorted = true;
}

static bool sort_step(struct group *g)
{
    struct apply *a = &g->apply;
    uint64_t wanted;

    if (a->busy)
        return false;
    if (a->sorted || a->error) {
        a->phase = APPLY_BLOCKS;
        a->next = 0;
        if (a->error)
            a->entries = 0;
        return true;
    }
    wanted = a->epoch->index.used < APPLY_PIECE_BLOCKS ? a->epoch->index.used : APPLY_PIECE_BLOCKS;
    if (a->entries_max < wanted) {
        free(a->entry);
        a->entry = malloc(wanted * sizeof(*a->entry));
        a->entries_max = a->entry ? wanted : 0;
        if (!a->entry) {
            fail(a, CORE_NO_DISK, -ENOMEM);
            return true;
        }
    }
    a->sort = (struct job){.run = sort_run, .done = sort_done, .owner = a};
    if (!worker_submit(&g->worker, &a->sort, true))
        return false;
    a->busy++;
    return true;
}

/* ---- Blocks ---------------------------------------------------------------------------- */

static void batch_expand(struct job *job, struct worker *w)
{
    struct apply_batch *b = job->owner;
    struct apply *a = b->apply;

    for (uint32_t i = 0; i < b->blocks && !b->error; i++) {
        const struct index_slot *s = &a->entry[b->first + i];

        b->error = frame_expand(&w->expand, &a->group->arena, s->loc, index_slot_block(s),
                                s->mask, b->buffer + (uint64_t)i * BLOCK_BYTES);
        b->spill_lost = b->error && arena_spilled(&a->group->arena, s->loc);
    }
}

static void batch_expanded(struct job *job)
{
    struct apply_batch *b = job->owner;

    if (b->spill_lost)
        spill_fault(b->apply->group, b->error);
    b->apply->spill_lost |= b->spill_lost;
    if (b->error)
        fail(b->apply, b->apply->entry[b->first].disk, b->error);
    b->busy--;
}

static void batch_moved(struct disk_op *op, int64_t result)
{
    struct apply_batch *b = op->owner;

    b->busy--;
    if (result < 0)
        fail(b->apply, op->file - DISK_IMAGE(0), (int)result);
}

static void batch_submit(struct group *g, struct apply_batch *b, enum disk_opcode opcode,
                         uint32_t disk, uint64_t sector, uint8_t *at, uint64_t bytes)
{
    struct apply_write *w = &b->write[b->writes++];

    check(b->writes <= APPLY_WRITES_MAX);
    w->iov = (struct iovec){.iov_base = at, .iov_len = bytes};
    w->op = (struct disk_op){.opcode = opcode, .file = DISK_IMAGE(disk),
                             .offset = sector * SECTOR_BYTES, .bytes = bytes, .iov = &w->iov,
                             .iov_count = 1, .done = batch_moved, .owner = b};
    b->busy++;
    if (opcode == DISK_WRITE)
        g->stats.image_bytes += bytes;
    disk_submit(g->disk, &w->op);
}

/* Does this block need its other sectors from the image first? */
static bool needs_read(const struct group *g, const struct index_slot *s)
{
    return s->mask != MASK_FULL && g->config.disk[s->disk].logical_block_bytes > SECTOR_BYTES;
}

static void batch_read(struct group *g, struct apply_batch *b)
{
    for (uint32_t i = 0; i < b->blocks; i++) {
        const struct index_slot *s = &g->apply.entry[b->first + i];

        if (needs_read(g, s))
            batch_submit(g, b, DISK_READ, s->disk, index_slot_block(s) * BLOCK_SECTORS,
                         b->buffer + (uint64_t)i * BLOCK_BYTES, BLOCK_BYTES);
    }
}

/* One block's masked sectors, run by run. */
static void write_sectors(struct group *g, struct apply_batch *b, const struct index_slot *s,
                          uint8_t *buffer)
{
    uint32_t at = 0, n;

    while (at < BLOCK_SECTORS) {
        if (!(s->mask & 1u << at)) {
            at++;
            continue;
        }
        for (n = 1; at + n < BLOCK_SECTORS && (s->mask & 1u << (at + n)); n++)
            ;
        batch_submit(g, b, DISK_WRITE, s->disk, index_slot_block(s) * BLOCK_SECTORS + at,
                     buffer + at * SECTOR_BYTES, (uint64_t)n * SECTOR_BYTES);
        at += n;
    }
}

static bool whole(const struct group *g, const struct index_slot *s)
{
    return s->mask == MASK_FULL || needs_read(g, s);
}

static void batch_write(struct group *g, struct apply_batch *b)
{
    const struct index_slot *entry = &g->apply.entry[b->first];
    uint32_t i = 0, n;

    b->writes = 0;
    while (i < b->blocks) {
        uint8_t *from = b->buffer + (uint64_t)i * BLOCK_BYTES;

        if (!whole(g, &entry[i])) {
            write_sectors(g, b, &entry[i], from);
            i++;
            continue;
        }
        for (n = 1; i + n < b->blocks && whole(g, &entry[i + n]) &&
                    entry[i + n].disk == entry[i].disk &&
                    index_slot_block(&entry[i + n]) == index_slot_block(&entry[i]) + n;
             n++)
            ;
        batch_submit(g, b, DISK_WRITE, entry[i].disk, index_slot_block(&entry[i]) * BLOCK_SECTORS,
                     from, (uint64_t)n * BLOCK_BYTES);
        i += n;
    }
}

static bool batch_step(struct group *g, struct apply_batch *b)
{
    struct apply *a = &g->apply;

    if (b->busy)
        return false;
    if (a->error && b->state != BATCH_FREE) {
        b->state = BATCH_FREE;
        return true;
    }
    switch (b->state) {
    case BATCH_FREE:
        if (a->next == a->entries || a->error)
            return false;
        b->first = (uint32_t)a->next;
        b->blocks = a->entries - a->next < APPLY_BATCH_BLOCKS ? (uint32_t)(a->entries - a->next)
                                                              : APPLY_BATCH_BLOCKS;
        a->next += b->blocks;
        b->writes = 0;
        b->error = 0;
        b->spill_lost = false;
        b->state = BATCH_READ;
        batch_read(g, b);
        return true;
    case BATCH_READ:
        b->job = (struct job){.run = batch_expand, .done = batch_expanded, .owner = b};
        if (!worker_submit(&g->worker, &b->job, true))
            return false;
        b->busy++;
        b->state = BATCH_EXPAND;
        return true;
    case BATCH_EXPAND:
        b->state = BATCH_WRITE;
        batch_write(g, b);
        return true;
    case BATCH_WRITE:
        b->state = BATCH_FREE;
        return true;
    }
    return false;
}

static bool blocks_step(struct group *g)
{
    struct apply *a = &g->apply;
    bool moved = false, all_free = true;

    for (uint32_t i = 0; i < APPLY_BATCHES; i++) {
        moved |= batch_step(g, &a->batch[i]);
        all_free &= a->batch[i].state == BATCH_FREE;
    }
    return moved || (all_free && (a->next == a->entries || a->error));
}

/* ---- One record ------------------------------------------------------------------------ */

static void begin_epoch(struct apply *a, struct epoch *e)
{
    a->epoch = e;
    a->phase = APPLY_JOBS;
    a->range = (struct range_extent){0};
    a->range_done = 0;
    a->zero_by_writes = false;
}

static struct epoch *next_epoch(const struct group *g, uint64_t after, uint64_t last)
{
    if (mutant(MUTANT_APPLY_BACKWARDS)) {
        struct epoch *e = NULL;

        for (uint32_t i = 0; i < g->epochs; i++)
            if (g->epoch[i]->id <= last && (after == g->applied || g->epoch[i]->id < after))
                e = g->epoch[i];
        return e;
    }
    for (uint32_t i = 0; i < g->epochs; i++)
        if (g->epoch[i]->id > after && g->epoch[i]->id <= last)
            return g->epoch[i];
    return NULL;
}

static void sync_done(struct disk_op *op, int64_t result)
{
    struct apply *a = op->owner;

    a->busy--;
    if (result < 0 && !mutant(MUTANT_IGNORE_IMAGE_ERROR))
        fail(a, op->file - DISK_IMAGE(0), (int)result);
}

static void sync_images(struct group *g)
{
    struct apply *a = &g->apply;

    a->phase = APPLY_SYNC;
    a->sync_ns = g->now_ns;
    metrics_add(&g->metrics, METRICS_APPLY_WRITE, a->sync_ns - a->start_ns, 1);
    crash_point("apply-before-sync");
    for (uint32_t i = 0; i < g->config.disks; i++) {
        if (g->config.disk[i].read_only || mutant(MUTANT_NO_IMAGE_SYNC))
            continue;
        a->sync[i] = (struct disk_op){.opcode = DISK_SYNC, .file = DISK_IMAGE(i),
                                      .done = sync_done, .owner = a};
        a->busy++;
        disk_submit(g->disk, &a->sync[i]);
    }
}

static void give_up(struct group *g)
{
    struct apply *a = &g->apply;

    if (a->spill_lost)
        group_io_error(g, TROUBLE_IMAGES, CORE_NO_DISK, a->error,
                       "applying: the spill file has lost part of a committed epoch, which the "
                       "journal has: stop the agent, remove the arena from /dev/shm, start it; "
                       "only uncommitted epochs are lost with that");
    else
        group_io_error(g, TROUBLE_IMAGES, a->error_disk, a->error,
                       "writing a committed epoch to the image");
    a->spill_lost = false;
    a->error = 0;
    a->retry_ns = g->now_ns + GROUP_RETRY_NS;
    a->phase = APPLY_IDLE;
}

static void head_moved(struct group *g, int error)
{
    struct apply *a = &g->apply;
    core_event event = {.type = CORE_EVENT_APPLIED, .disk = CORE_NO_DISK, .value = a->last};

    if (error) { /* the images are right; only the superblock is asked for again */
        group_io_error(g, TROUBLE_SUPER, CORE_NO_DISK, error, "moving the journal's head");
        a->retry_ns = g->now_ns + GROUP_RETRY_NS;
        a->phase = APPLY_SUPER_RETRY;
        return;
    }
    a->retry_ns = 0;
    crash_point("apply-before-free");
    g->applied = a->last;
    __atomic_store_n(&g->arena.header->applied, a->last, __ATOMIC_RELEASE);
    g->journal.free_lsn = g->journal.head_lsn;
    g->journal.pending_first = (g->journal.pending_first + 1) % CORE_EPOCHS_MAX;
    g->journal.pending_count--;
    while (g->epochs > 0 && g->epoch[0]->id <= a->last)
        epoch_drop(g, g->epoch[0]);
    g->stats.applies++;
    g->stats.apply_ns_last = g->now_ns - a->start_ns;
    metrics_add(&g->metrics, METRICS_APPLY, g->stats.apply_ns_last, 1);
    group_io_works(g, TROUBLE_SUPER);
    a->phase = APPLY_IDLE;
    group_emit(g, &event);
    group_pressure(g, false);
}

/* For the mutant below. */
static inline void ignore(struct group *g, int error)
{
    (void)g;
    (void)error;
}

static bool begin_record(struct group *g)
{
    struct apply *a = &g->apply;
    const struct journal *j = &g->journal;

    if (j->pending_count == 0 || g->now_ns < a->retry_ns)
        return false;
    a->retry_ns = 0;
    a->start_ns = g->now_ns;
    a->last = j->pending[j->pending_first].epoch_last;
    if (mutant(MUTANT_HEAD_BEFORE_APPLY)) {
        g->journal.head_lsn = j->pending[j->pending_first].lsn_end;
        g->journal.head_applied = a->last;
        journal_super_save(g, 0, ignore);
    }
    begin_epoch(a, next_epoch(g, g->applied, a->last));
    check(a->epoch);
    return true;
}

bool apply_step(struct group *g)
{
    struct apply *a = &g->apply;
    struct journal *j = &g->journal;
    struct epoch *next;

    switch (a->phase) {
    case APPLY_IDLE:
        return begin_record(g);
    case APPLY_JOBS:
        if (a->epoch->jobs)
            return false;
        a->phase = APPLY_ZEROES;
        return true;
    case APPLY_ZEROES:
        return zero_step(g);
    case APPLY_SORT:
        return sort_step(g);
    case APPLY_BLOCKS:
        if (!blocks_step(g))
            return false;
        for (uint32_t i = 0; i < APPLY_BATCHES; i++)
            if (a->batch[i].state != BATCH_FREE)
                return true;
        if (a->next < a->entries && !a->error)
            return true;
        if (a->rest != UINT64_MAX && !a->error) {
            sort_begin(a, a->rest);
            return true;
        }
        next = next_epoch(g, a->epoch->id, a->last);
        if (a->error)
            give_up(g);
        else if (next)
            begin_epoch(a, next);
        else
            sync_images(g);
        return true;
    case APPLY_SYNC:
        if (a->busy)
            return false;
        if (a->error) {
            give_up(g);
            return true;
        }
        metrics_add(&g->metrics, METRICS_APPLY_FLUSH, g->now_ns - a->sync_ns, 1);
        group_io_works(g, TROUBLE_IMAGES);
        j->head_lsn = j->pending[j->pending_first].lsn_end;
        j->head_applied = a->last;
        a->phase = APPLY_SUPER;
        if (mutant(MUTANT_REUSE_BEFORE_HEAD))
            j->free_lsn = j->head_lsn;
        crash_point("apply-before-super");
        journal_super_save(g, 0, head_moved);
        return true;
    case APPLY_SUPER:
        return false;
    case APPLY_SUPER_RETRY:
        if (g->now_ns < a->retry_ns)
            return false;
        a->phase = APPLY_SUPER;
        journal_super_save(g, 0, head_moved);
        return true;
    }
    return false;
}
