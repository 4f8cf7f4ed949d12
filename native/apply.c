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
        b->block = calloc(APPLY_BATCH_BLOCKS, sizeof(*b->block));
        if (!b->buffer || !b->write || !b->block)
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
        free(a->batch[i].block);
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

/* ---- A limit of bytes a second -------------------------------------------------------- */

/* May something be written now? A stop does not wait for the limit. */
static bool allowed(struct group *g)
{
    struct apply *a = &g->apply;
    double rate = (double)g->config.apply_rate, most = rate / 16;

    a->wait_ns = 0;
    if (rate == 0 || checkpoint_stopping(g))
        return true;
    if (most < APPLY_BURST_BYTES)
        most = APPLY_BURST_BYTES;
    a->credit += (double)(g->now_ns - a->credit_ns) * rate / 1e9;
    a->credit_ns = g->now_ns;
    if (a->credit > most)
        a->credit = most;
    if (a->credit > 0)
        return true;
    a->wait_ns = g->now_ns + 1 + (uint64_t)(-a->credit / rate * 1e9);
    return false;
}

/* A write may be larger than the credit: the next one waits until that is paid back. */
static void spend(struct group *g, uint64_t bytes)
{
    g->stats.image_bytes += bytes;
    g->apply.credit -= (double)bytes;
}

uint64_t apply_timer(const struct group *g)
{
    const struct apply *a = &g->apply;

    return a->retry_ns ? a->retry_ns : a->wait_ns;
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
}

static void zero_submit(struct group *g, const struct range_extent *r)
{
    struct apply *a = &g->apply;
    uint64_t bytes = (r->end - r->first - a->range_done) * BLOCK_BYTES;

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
    if (a->zero_by_writes)
        spend(g, bytes);
    a->busy++;
    disk_submit(g->disk, &a->zero.op);
}

static void sort_begin(struct apply *a, uint64_t from)
{
    a->phase = APPLY_SORT;
    a->sorted = false;
    a->from = from;
    a->rest = UINT64_MAX;
}

/* One piece of a range at a time: fallocate is cheap, its fallback is rare. */
static bool zero_step(struct group *g)
{
    struct apply *a = &g->apply;

    if (a->busy && !mutant(MUTANT_ZEROES_UNORDERED))
        return false;
    if (a->at == a->end || a->error) {
        sort_begin(a, 0);
        return true;
    }
    if (a->range_done == a->range.end - a->range.first) {
        a->range_done = 0;
        a->zero_by_writes = false;
        if (!ranges_next(&g->epoch[a->at]->part[a->part].index.ranges, &a->range)) {
            a->at += ++a->part == g->writers;
            a->part %= g->writers;
            a->range = (struct range_extent){0};
        }
        return true;
    }
    if (a->zero_by_writes && !allowed(g))
        return false;
    zero_submit(g, &a->range);
    return true;
}

/* ---- Sorting --------------------------------------------------------------------------- */

static void sort_done(struct job *job)
{
    struct apply *a = job->owner;

    a->busy--;
    a->sorted = true;
}

static bool make_room(struct group *g)
{
    struct apply *a = &g->apply;
    uint64_t slots = 0;

    for (uint32_t i = a->first; i < a->end; i++)
        slots += epoch_slots(g->epoch[i]);
    if (slots > APPLY_PIECE_BLOCKS)
        slots = APPLY_PIECE_BLOCKS;
    if (a->entries_max < slots) {
        free(a->entry);
        a->entry = malloc(slots * sizeof(*a->entry));
        a->entries_max = a->entry ? slots : 0;
    }
    return a->entries_max >= slots;
}

static bool sort_step(struct group *g)
{
    struct apply *a = &g->apply;

    if (a->busy)
        return false;
    if (a->sorted || a->error) {
        a->phase = APPLY_BLOCKS;
        a->next = 0;
        if (a->error)
            a->entries = 0;
        return true;
    }
    if (!make_room(g)) {
        fail(a, CORE_NO_DISK, -ENOMEM);
        return true;
    }
    a->sort = (struct job){.run = apply_sort, .done = sort_done, .owner = a};
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
    const struct arena *arena = &a->group->arena;

    for (uint32_t i = 0; i < b->blocks; i++) {
        const struct apply_block *block = &b->block[i];

        for (uint32_t n = 0; n < block->entries; n++) {
            const struct apply_entry *e = &a->entry[block->first + n];

            b->error = frame_expand(&w->expand, arena, e->loc, apply_place_block(e->place),
                                    e->mask, b->buffer + (uint64_t)i * BLOCK_BYTES);
            if (b->error) {
                b->spill_lost = arena_spilled(arena, e->loc);
                return;
            }
        }
    }
}

static void batch_expanded(struct job *job)
{
    struct apply_batch *b = job->owner;

    if (b->spill_lost)
        spill_fault(b->apply->group, b->error);
    b->apply->spill_lost |= b->spill_lost;
    if (b->error)
        fail(b->apply, apply_disk(b->block[0].place), b->error);
    b->busy--;
}

static void batch_moved(struct disk_op *op, int64_t result)
{
    struct apply_batch *b = op->owner;

    b->busy--;
    b->apply->writing--;
    if (result < 0)
        fail(b->apply, op->file - DISK_IMAGE(0), (int)result);
}

static void batch_submit(struct group *g, struct apply_batch *b, enum disk_opcode opcode,
                         uint64_t place, uint32_t sector, uint8_t *at, uint64_t bytes)
{
    struct apply_write *w = &b->write[b->writes++];

    check(b->writes <= APPLY_WRITES_MAX);
    w->iov = (struct iovec){.iov_base = at, .iov_len = bytes};
    w->op = (struct disk_op){
        .opcode = opcode, .file = DISK_IMAGE(apply_disk(place)),
        .offset = apply_place_block(place) * BLOCK_BYTES + sector * SECTOR_BYTES, .bytes = bytes,
        .iov = &w->iov, .iov_count = 1, .done = batch_moved, .owner = b};
    b->busy++;
    b->apply->writing++;
    if (opcode == DISK_WRITE)
        spend(g, bytes);
    disk_submit(g->disk, &w->op);
}

/* Does this block need its other sectors from the image first? */
static bool needs_read(const struct group *g, const struct apply_block *b)
{
    return b->mask != MASK_FULL &&
           g->config.disk[apply_disk(b->place)].logical_block_bytes > SECTOR_BYTES;
}

static void batch_read(struct group *g, struct apply_batch *b)
{
    for (uint32_t i = 0; i < b->blocks; i++)
        if (needs_read(g, &b->block[i]))
            batch_submit(g, b, DISK_READ, b->block[i].place, 0,
                         b->buffer + (uint64_t)i * BLOCK_BYTES, BLOCK_BYTES);
}

/* One block's masked sectors, run by run. */
static void write_sectors(struct group *g, struct apply_batch *b, const struct apply_block *block,
                          uint8_t *buffer)
{
    uint32_t at = 0, n;

    while (at < BLOCK_SECTORS) {
        if (!(block->mask & 1u << at)) {
            at++;
            continue;
        }
        for (n = 1; at + n < BLOCK_SECTORS && (block->mask & 1u << (at + n)); n++)
            ;
        batch_submit(g, b, DISK_WRITE, block->place, at, buffer + at * SECTOR_BYTES,
                     (uint64_t)n * SECTOR_BYTES);
        at += n;
    }
}

static bool whole(const struct group *g, const struct apply_block *b)
{
    return b->mask == MASK_FULL || needs_read(g, b);
}

/* The batch's next block, and those that are written with it. */
static void write_next(struct group *g, struct apply_batch *b)
{
    const struct apply_block *block = &b->block[b->next];
    uint8_t *from = b->buffer + (uint64_t)b->next * BLOCK_BYTES;
    uint32_t n = 1;

    if (!whole(g, block)) {
        write_sectors(g, b, block, from);
    } else {
        while (b->next + n < b->blocks && whole(g, &block[n]) &&
               block[n].place == block->place + n)
            n++;
        batch_submit(g, b, DISK_WRITE, block->place, 0, from, (uint64_t)n * BLOCK_BYTES);
    }
    b->next += n;
}

/* How many writes at once: a guest that waits for a read of the image waits for them, too. */
static uint32_t depth(const struct group *g)
{
    return __atomic_load_n(&g->reads_busy, __ATOMIC_RELAXED) > 0 ? APPLY_DEPTH_SHARED : APPLY_DEPTH;
}

static bool batch_write(struct group *g, struct apply_batch *b)
{
    bool moved = false;

    while (b->next < b->blocks && g->apply.writing < depth(g) && allowed(g)) {
        write_next(g, b);
        moved = true;
    }
    return moved;
}

/* The next blocks of the pass. */
static void batch_fill(struct apply *a, struct apply_batch *b)
{
    b->blocks = b->next = b->writes = 0;
    b->error = 0;
    b->spill_lost = false;
    for (; a->next < a->entries; a->next++) {
        const struct apply_entry *e = &a->entry[a->next];
        struct apply_block *block = b->blocks ? &b->block[b->blocks - 1] : NULL;

        if (block && block->place == e->place) {
            block->entries++;
            block->mask |= e->mask;
            continue;
        }
        if (b->blocks == APPLY_BATCH_BLOCKS)
            return;
        b->block[b->blocks++] = (struct apply_block){.place = e->place, .first = a->next,
                                                     .entries = 1, .mask = e->mask};
    }
}

static bool batch_step(struct group *g, struct apply_batch *b)
{
    struct apply *a = &g->apply;

    if (b->state == BATCH_WRITE && !a->error && b->next < b->blocks)
        return batch_write(g, b);
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
        batch_fill(a, b);
        b->state = BATCH_READ;
        batch_read(g, b);
        return true;
    case BATCH_READ:
        b->writes = 0;
        b->job = (struct job){.run = batch_expand, .done = batch_expanded, .owner = b};
        if (!worker_submit(&g->worker, &b->job, true))
            return false;
        b->busy++;
        b->state = BATCH_EXPAND;
        return true;
    case BATCH_EXPAND:
        b->state = BATCH_WRITE;
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
    bool moved = false;

    for (uint32_t i = 0; i < APPLY_BATCHES; i++)
        moved |= batch_step(g, &a->batch[i]);
    return moved;
}

static bool blocks_over(const struct apply *a)
{
    for (uint32_t i = 0; i < APPLY_BATCHES; i++)
        if (a->batch[i].state != BATCH_FREE)
            return false;
    return a->next == a->entries || a->error;
}

/* ---- A run ----------------------------------------------------------------------------- */

/* The run's next epochs, from `first`, as one pass: the first one, and what is small enough. */
static void begin_pass(struct group *g, uint32_t first)
{
    struct apply *a = &g->apply;
    uint64_t slots = 0;

    a->first = a->at = a->end = first;
    while (a->end < a->epochs && a->end - first < APPLY_PASS_EPOCHS) {
        slots += epoch_slots(g->epoch[a->end]);
        if (slots > APPLY_PASS_SLOTS && a->end > first)
            break;
        a->end++;
    }
    a->part = 0;
    a->range = (struct range_extent){0};
    a->range_done = 0;
    a->zero_by_writes = false;
    a->phase = APPLY_JOBS;
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
    a->wait_ns = 0;
    a->retry_ns = g->now_ns + GROUP_RETRY_NS;
    a->phase = APPLY_IDLE;
}

static const struct journal_pending *pending(const struct journal *j, uint32_t n)
{
    return &j->pending[(j->pending_first + n) % CORE_EPOCHS_MAX];
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
    g->journal.pending_first = (g->journal.pending_first + a->records) % CORE_EPOCHS_MAX;
    g->journal.pending_count -= a->records;
    while (g->epochs > 0 && g->epoch[0]->id <= a->last)
        epoch_drop(g, g->epoch[0]);
    g->stats.applies += a->records;
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

static uint32_t epochs_up_to(const struct group *g, uint64_t last)
{
    uint32_t n = 0;

    while (n < g->epochs && g->epoch[n]->id <= last)
        n++;
    return n;
}

/* The oldest record, and those behind it that fit into the same pass. */
static void choose_records(struct group *g)
{
    struct apply *a = &g->apply;
    const struct journal *j = &g->journal;
    uint32_t n = 0, end;
    uint64_t slots = 0;

    a->records = a->epochs = 0;
    while (a->records < j->pending_count) {
        end = epochs_up_to(g, pending(j, a->records)->epoch_last);
        while (n < end)
            slots += epoch_slots(g->epoch[n++]);
        if (a->records > 0 && (slots > APPLY_PASS_SLOTS || end > APPLY_PASS_EPOCHS))
            break;
        a->epochs = end;
        a->last = pending(j, a->records++)->epoch_last;
    }
}

static bool begin_run(struct group *g)
{
    struct apply *a = &g->apply;
    struct journal *j = &g->journal;

    if (j->pending_count == 0 || g->now_ns < a->retry_ns)
        return false;
    a->retry_ns = 0;
    a->start_ns = g->now_ns;
    choose_records(g);
    check(a->epochs > 0 && g->epoch[0]->id > g->applied);
    if (mutant(MUTANT_HEAD_BEFORE_APPLY)) {
        j->head_lsn = pending(j, a->records - 1)->lsn_end;
        j->head_applied = a->last;
        journal_super_save(g, 0, ignore);
    }
    begin_pass(g, 0);
    return true;
}

static bool jobs_over(const struct group *g)
{
    for (uint32_t i = g->apply.first; i < g->apply.end; i++)
        if (g->epoch[i]->jobs)
            return false;
    return true;
}

static void end_pass(struct group *g)
{
    struct apply *a = &g->apply;

    if (a->error)
        give_up(g);
    else if (a->rest != UINT64_MAX)
        sort_begin(a, a->rest);
    else if (a->end < a->epochs)
        begin_pass(g, a->end);
    else
        sync_images(g);
}

static void images_synced(struct group *g)
{
    struct apply *a = &g->apply;
    struct journal *j = &g->journal;

    metrics_add(&g->metrics, METRICS_APPLY_FLUSH, g->now_ns - a->sync_ns, 1);
    group_io_works(g, TROUBLE_IMAGES);
    j->head_lsn = pending(j, a->records - 1)->lsn_end;
    j->head_applied = a->last;
    a->phase = APPLY_SUPER;
    if (mutant(MUTANT_REUSE_BEFORE_HEAD))
        j->free_lsn = j->head_lsn;
    crash_point("apply-before-super");
    journal_super_save(g, 0, head_moved);
}

bool apply_step(struct group *g)
{
    struct apply *a = &g->apply;

    switch (a->phase) {
    case APPLY_IDLE:
        return begin_run(g);
    case APPLY_JOBS:
        if (!jobs_over(g))
            return false;
        a->phase = APPLY_ZEROES;
        return true;
    case APPLY_ZEROES:
        return zero_step(g);
    case APPLY_SORT:
        return sort_step(g);
    case APPLY_BLOCKS:
        if (blocks_step(g))
            return true;
        if (!blocks_over(a))
            return false;
        end_pass(g);
        return true;
    case APPLY_SYNC:
        if (a->busy)
            return false;
        if (a->error)
            give_up(g);
        else
            images_synced(g);
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
