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

int journal_init(struct group *g)
{
    struct journal *j = &g->journal;
    struct commit *c = &j->commit;

    j->super = aligned_alloc(PAGE, PAGE);
    j->void_page = aligned_alloc(PAGE, PAGE);
    c->buffers = aligned_alloc(PAGE, (uint64_t)JOURNAL_PIECES * JOURNAL_WRITE_MAX);
    if (!j->super || !j->void_page || !c->buffers)
        return -ENOMEM;
    memset(j->void_page, 0, PAGE);
    c->header_piece.group = g;
    for (uint32_t i = 0; i < JOURNAL_PIECES; i++) {
        c->piece[i].group = g;
        c->piece[i].buffer = c->buffers + (uint64_t)i * JOURNAL_WRITE_MAX;
    }
    return 0;
}

void journal_free(struct journal *j)
{
    free(j->super);
    free(j->void_page);
    free(j->commit.source);
    free(j->commit.segment);
    free(j->commit.header);
    free(j->commit.buffers);
    condense_end(&j->commit.condense);
    memset(j, 0, sizeof(*j));
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

void journal_sync_prepare(struct group *g, struct journal_sync *s,
                          void (*done)(struct group *g, int error))
{
    *s = (struct journal_sync){.done = done, .failures = g->journal.sync_failures};
}

void journal_sync_start(struct group *g, struct journal_sync *s)
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
    journal_sync_start(g, &g->journal.super_sync);
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
    journal_sync_prepare(g, &j->super_sync, super_finish);
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
    journal_sync_start(g, &g->journal.void_sync);
}

void journal_void(struct group *g, void (*done)(struct group *g, int error))
{
    struct journal *j = &g->journal;

    j->void_done = done;
    journal_sync_prepare(g, &j->void_sync, void_finish);
    j->void_iov = (struct iovec){.iov_base = j->void_page, .iov_len = PAGE};
    j->void_op = (struct disk_op){.opcode = DISK_WRITE, .file = DISK_JOURNAL,
                                  .offset = journal_offset(j, j->tail_lsn), .bytes = PAGE,
                                  .iov = &j->void_iov, .iov_count = 1, .done = void_written,
                                  .owner = g};
    disk_submit(g->disk, &j->void_op);
}
