/* recover.c - group_open(): from whatever journal and arena there are to a running group.
 *
 * Start and restart are this one path. The table of cases is in native/RECOVERY.md; in short:
 * the superblock says where the records begin; records that are whole are committed; with
 * the arena of this boot at hand their epochs, and the sealed and open ones, are in it;
 * without it they are read back from the journal, and what was not committed is gone.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "checksum.h"
#include "crash.h"
#include "group.h"
#include "mutant.h"

typedef unsigned long long ull;

#define SCAN_BYTES 1048576u

struct recovery {
    struct group *g;
    struct journal_super super;
    bool fresh;                 /* the arena is new */
    uint8_t *buffer;            /* SCAN_BYTES, page-aligned */
    uint64_t epoch_limit;       /* the highest seen */
    bool torn_header;           /* a header for the tail's position is there, its data not */
    uint64_t last_lsn;          /* of the newest record ... */
    uint64_t last_bytes;        /* ... 0: none */
    uint64_t torn_last;         /* its newest epoch */
    uint32_t take_from;         /* no segment below is free */
    uint32_t super_bad;         /* slots of superblocks that cannot be read */
    uint64_t replaced_last;     /* newest epoch of which the arena had something else; 0: none */
    bool recommit;              /* acknowledged epochs that the journal has lost */
    char *text;
};

__attribute__((format(printf, 3, 4)))
static int refuse(struct recovery *r, int error, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(r->text, CORE_TEXT_MAX, format, args);
    va_end(args);
    return error;
}

static int transfer(struct group *g, enum disk_opcode opcode, uint64_t offset, void *at,
                    uint64_t bytes)
{
    struct iovec iov = {.iov_base = at, .iov_len = bytes};
    struct disk_op op = {.opcode = opcode, .file = DISK_JOURNAL, .offset = offset, .bytes = bytes,
                         .iov = &iov, .iov_count = 1};
    int64_t result = disk_run(g->disk, &op);

    return result < 0 ? (int)result : 0;
}

static int flush(struct group *g)
{
    struct disk_op op = {.opcode = DISK_SYNC, .file = DISK_JOURNAL};
    int64_t result = disk_run(g->disk, &op);

    return result < 0 ? (int)result : 0;
}

static int ring_transfer(struct recovery *r, enum disk_opcode opcode, uint64_t lsn, void *at,
                         uint64_t bytes)
{
    struct journal *j = &r->g->journal;
    uint64_t to_end = j->ring_bytes - lsn % j->ring_bytes;
    uint64_t first = bytes < to_end ? bytes : to_end;
    int error = transfer(r->g, opcode, journal_offset(j, lsn), at, first);

    if (!error && first < bytes)
        error = transfer(r->g, opcode, journal_offset(j, lsn + first), (uint8_t *)at + first,
                         bytes - first);
    if (error)
        return refuse(r, error, "journal: %s at offset %llu failed: %s",
                      opcode == DISK_READ ? "reading" : "writing",
                      (ull)journal_offset(j, lsn), strerror(-error));
    return 0;
}

static int ring_read(struct recovery *r, uint64_t lsn, void *to, uint64_t bytes)
{
    return ring_transfer(r, DISK_READ, lsn, to, bytes);
}

/* ---- Superblock ----------------------------------------------------------------------- */

static bool super_valid(const struct journal_super *s)
{
    return s->magic == JOURNAL_MAGIC && s->version == JOURNAL_VERSION &&
           s->crc == journal_super_crc(s) && s->disks <= JOURNAL_DISKS_MAX &&
           s->head_lsn % PAGE == 0 && journal_ring_bytes(s->file_bytes) > 0;
}

static bool never_written(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, PAGE - 1) == 0;
}

/* One that cannot be read may be newer than the newest that can: its head may be further on,
 * ids may have been reserved in it, and "clean" of the older one may be over. */
static int read_super(struct recovery *r)
{
    struct journal *j = &r->g->journal;
    bool found = false;

    for (uint32_t slot = 0; slot < JOURNAL_SUPER_SLOTS; slot++) {
        const struct journal_super *s = (const struct journal_super *)r->buffer;

        if (transfer(r->g, DISK_READ, (uint64_t)slot * JOURNAL_SUPER_STRIDE, r->buffer, PAGE)) {
            r->super_bad++;
            continue;
        }
        if (!super_valid(s)) {
            r->super_bad += !never_written(r->buffer);
            continue;
        }
        if (!found || s->super_seq > r->super.super_seq) {
            r->super = *s;
            found = true;
        }
    }
    if (!found)
        return refuse(r, -EINVAL, "journal: no superblock can be read; it is damaged, or "
                                  "not a journal of this version");
    memcpy(j->group, r->super.group, sizeof(j->group));
    j->file_bytes = r->super.file_bytes;
    j->ring_bytes = journal_ring_bytes(j->file_bytes);
    j->super_seq = r->super.super_seq;
    j->head_lsn = j->free_lsn = j->tail_lsn = r->super.head_lsn;
    j->head_applied = r->super.applied;
    if (r->super_bad) {
        r->super.clean = 0;
        r->super.epoch_limit += JOURNAL_EPOCH_STEP;
    }
    j->epoch_limit = j->super_limit = r->epoch_limit = r->super.epoch_limit;
    r->g->mode = r->super.mode;
    r->g->generation = r->super.generation;
    r->g->applied = r->g->committed = r->super.applied;
    return 0;
}

/* The images must be those that the frames in journal and arena were written for. */
static int check_disks(struct recovery *r)
{
    struct journal *j = &r->g->journal;
    const core_config *config = &r->g->config;

    if (r->super.disks != config->disks)
        return refuse(r, -EINVAL, "journal: it belongs to a group of %u disks, this one has %u",
                      r->super.disks, config->disks);
    j->disks = config->disks;
    for (uint32_t i = 0; i < config->disks; i++) {
        const struct journal_disk *was = &r->super.disk[i];
        const core_disk_config *now = &config->disk[i];

        if (strncmp(was->name, now->name, sizeof(was->name)) != 0)
            return refuse(r, -EINVAL, "journal: its disk %u is \"%.31s\", not \"%.31s\"", i,
                          was->name, now->name);
        if (was->identity != now->identity)
            return refuse(r, -EINVAL, "journal: it belongs to another image of disk \"%.31s\" "
                          "(inode %llu, this one is %llu); use that image, or remove the "
                          "journal to give up what it holds", now->name, (ull)was->identity,
                          (ull)now->identity);
        if (now->size_bytes < was->size_bytes)
            return refuse(r, -EINVAL, "journal: the image of disk \"%.31s\" has shrunk from %llu "
                          "to %llu bytes", now->name, (ull)was->size_bytes,
                          (ull)now->size_bytes);
        j->disk[i] = *was;
        j->disk[i].size_bytes = now->size_bytes;
    }
    return 0;
}

/* ---- Records -------------------------------------------------------------------------- */

static bool header_valid(const struct journal *j, const struct record_header *h, uint64_t lsn)
{
    return h->magic == RECORD_MAGIC && h->version == JOURNAL_VERSION && h->lsn == lsn &&
           memcmp(h->group, j->group, sizeof(h->group)) == 0 &&
           h->header_bytes == record_header_bytes(h->segments) &&
           h->record_bytes >= h->header_bytes && h->record_bytes <= j->ring_bytes &&
           h->record_bytes % PAGE == 0 && h->segments <= h->record_bytes / PAGE &&
           h->epoch_first <= h->epoch_last;
}

/* Reads the whole header at the position; *out is NULL when there is none that counts. */
static int read_header(struct recovery *r, uint64_t lsn, struct record_header **out)
{
    struct journal *j = &r->g->journal;
    struct record_header *h = (struct record_header *)r->buffer;
    uint8_t *copy;
    uint32_t bytes;
    int error;

    *out = NULL;
    error = ring_read(r, lsn, r->buffer, PAGE);
    if (error || !header_valid(j, h, lsn))
        return error;
    bytes = h->header_bytes;
    copy = aligned_alloc(PAGE, bytes);
    if (!copy)
        return refuse(r, -ENOMEM, "no memory for a journal record's header");
    error = ring_read(r, lsn, copy, bytes);
    h = (struct record_header *)copy;
    if (error || !header_valid(j, h, lsn) || h->header_bytes != bytes ||
        h->crc != journal_record_crc(h)) {
        free(copy);
        return error;
    }
    *out = h;
    return 0;
}

/* Are these the frames that the record's table speaks of? */
static bool frames_whole(const uint8_t *at, uint32_t bytes, uint32_t want, uint32_t disks,
                         const uint64_t *blocks_max)
{
    uint32_t offset = 0, crc = 0;

    while (offset < bytes) {
        const struct frame_header *h = (const struct frame_header *)(at + offset);

        if (!frame_plausible(h, bytes - offset) || h->disk >= disks ||
            h->block + h->blocks > blocks_max[h->disk])
            return false;
        if (h->crc != frame_crc(h) && !mutant(MUTANT_SKIP_FRAME_CRC))
            return false;
        crc = checksum_crc32c(crc, h, sizeof(*h));
        offset += frame_bytes(h->payload_bytes);
    }
    return crc == want || mutant(MUTANT_SKIP_TABLE_CRC);
}

/* Segments of the arena that hold the record's epochs, from `at` on; SEGMENT_NONE: no more. */
static uint32_t segment_of_record(const struct arena *a, const struct record_header *h,
                                  uint32_t at)
{
    for (; at < arena_segments_all(a); at++) {
        const struct segment_desc *d = &a->desc[at];

        if (d->state != SEGMENT_FREE && d->tail > 0 && d->epoch >= h->epoch_first &&
            d->epoch <= h->epoch_last)
            return at;
    }
    return SEGMENT_NONE;
}

/* The lowest free one, in RAM first: a record's segments lie in the arena in the order of its table. */
static uint32_t take_segment(struct recovery *r, uint64_t epoch)
{
    const struct arena *a = &r->g->arena;

    for (; r->take_from < arena_segments_all(a); r->take_from++)
        if (a->desc[r->take_from].state == SEGMENT_FREE) {
            a->desc[r->take_from] = (struct segment_desc){.epoch = epoch, .state = SEGMENT_PACKED};
            return r->take_from++;
        }
    return SEGMENT_NONE;
}

static int spill_write(struct recovery *r, uint32_t segment, uint64_t bytes)
{
    struct iovec iov = {.iov_base = r->buffer, .iov_len = bytes};
    struct disk_op op = {.opcode = DISK_WRITE, .file = DISK_SPILL, .bytes = bytes, .iov = &iov,
                         .iov_count = 1, .offset = arena_spill_offset(&r->g->arena, segment)};
    int64_t result = disk_run(r->g->disk, &op);

    return result < 0 ? refuse(r, (int)result, "spill file: writing failed: %s",
                               strerror((int)-result)) : 0;
}

/* Where the data of a record goes or what it is compared with. */
enum data_use { DATA_COMPARE, DATA_INTO_ARENA };

/* Reads the record's segments. *whole: all checksums fit. *same (COMPARE): the arena holds
 * just that. */
static int read_data(struct recovery *r, const struct record_header *h, enum data_use use,
                     bool *whole, bool *same)
{
    const struct record_segment *table = (const struct record_segment *)(h + 1);
    struct group *g = r->g;
    uint64_t lsn = h->lsn + h->header_bytes, blocks_max[CORE_DISKS_MAX];
    uint32_t there = 0;
    int error;

    *same = true;
    for (uint32_t i = 0; i < g->config.disks; i++)
        blocks_max[i] = (g->config.disk[i].size_bytes + BLOCK_BYTES - 1) / BLOCK_BYTES;
    *whole = false;
    for (uint32_t i = 0; i < h->segments; i++) {
        uint64_t padded = page_round_up(table[i].bytes);
        uint8_t *to = r->buffer;
        uint32_t segment = SEGMENT_NONE;

        if (table[i].bytes == 0 || table[i].bytes > SEGMENT_BYTES ||
            table[i].epoch < h->epoch_first || table[i].epoch > h->epoch_last ||
            lsn + padded > h->lsn + h->record_bytes)
            return 0;
        if (use == DATA_INTO_ARENA) {
            segment = take_segment(r, table[i].epoch);
            if (segment == SEGMENT_NONE)
                return refuse(r, -ENOSPC, "arena: too small for the committed epochs in the "
                              "journal; start with --arena-size of at least %llu, or with the "
                              "spill file that it had", (ull)(g->arena.bytes * 2));
            if (segment < g->arena.segments)
                to = arena_segment(&g->arena, segment);
        }
        error = ring_read(r, lsn, to, padded);
        if (error)
            return error;
        if (!frames_whole(to, table[i].bytes, table[i].crc, g->config.disks, blocks_max))
            return 0; /* segments taken so far are given back by the caller */
        if (segment != SEGMENT_NONE && to == r->buffer)
            error = spill_write(r, segment, padded);
        if (error)
            return error;
        if (segment != SEGMENT_NONE) {
            g->arena.desc[segment].tail = table[i].bytes;
        } else if (*same) {
            there = segment_of_record(&g->arena, h, there);
            *same = there != SEGMENT_NONE && g->arena.desc[there].epoch == table[i].epoch &&
                    g->arena.desc[there].tail == table[i].bytes &&
                    memcmp(arena_segment(&g->arena, there), to, table[i].bytes) == 0;
            there++;
        }
        lsn += padded;
    }
    if (use == DATA_COMPARE && *same)
        *same = segment_of_record(&g->arena, h, there) == SEGMENT_NONE;
    *whole = lsn == h->lsn + h->record_bytes;
    return 0;
}

static int epochs_of_record(struct recovery *r, const struct record_header *h)
{
    struct group *g = r->g;
    struct journal *j = &g->journal;

    if (h->epoch_last - h->epoch_first >= CORE_EPOCHS_MAX - g->epochs - 1 ||
        h->epoch_first <= g->committed)
        return refuse(r, -EINVAL, "journal: record of epochs %llu..%llu does not follow %llu",
                      (ull)h->epoch_first, (ull)h->epoch_last, (ull)g->committed);
    for (uint64_t id = h->epoch_first; id <= h->epoch_last; id++) {
        struct epoch *e = epoch_create(g, id);

        if (!e)
            return refuse(r, -ENOMEM, "no memory for epoch %llu", (ull)id);
        e->state = CORE_EPOCH_COMMITTED;
        e->frozen = true;
    }
    r->last_lsn = h->lsn;
    r->last_bytes = h->record_bytes;
    j->tail_lsn += h->record_bytes;
    j->pending[j->pending_count++] =
        (struct journal_pending){.lsn_end = j->tail_lsn, .epoch_last = h->epoch_last};
    g->committed = h->epoch_last;
    if (h->epoch_limit > r->epoch_limit)
        r->epoch_limit = h->epoch_limit;
    return 0;
}

static void give_back(struct recovery *r, const struct record_header *h)
{
    struct arena *a = &r->g->arena;

    for (uint32_t i = 0; i < arena_segments_all(a); i++)
        if (a->desc[i].epoch >= h->epoch_first && a->desc[i].epoch <= h->epoch_last)
            a->desc[i].state = SEGMENT_FREE;
    r->take_from = 0;
}

/* The record's epochs in the arena, as the record has them. That one is right: it is whole and
 * was acknowledged. Something else in the arena was changed from outside, unless the record was
 * made without what was dead. */
static int bring_in(struct recovery *r, const struct record_header *h, bool *whole)
{
    bool same;
    int error;

    if (r->fresh) {
        error = read_data(r, h, DATA_INTO_ARENA, whole, &same);
    } else {
        error = read_data(r, h, DATA_COMPARE, whole, &same);
        if (error || !*whole || same)
            return error;
        give_back(r, h);
        error = read_data(r, h, DATA_INTO_ARENA, whole, &same);
        if (h->epoch_last > r->g->arena.header->condensed)
            r->replaced_last = h->epoch_last;
    }
    if (!error && !*whole)
        give_back(r, h);
    return error;
}

/* With the arena it is known what the images hold. When the superblock that says so is lost,
 * the older one's head is at records whose epochs are gone from the arena, or half gone: they
 * must not be applied from there again. */
static int skip_applied(struct recovery *r)
{
    struct group *g = r->g;
    struct journal *j = &g->journal;
    uint64_t applied = g->arena.header->applied;

    while (!r->fresh && g->applied < applied) {
        struct record_header *h;
        int error = read_header(r, j->head_lsn, &h);

        if (error)
            return error;
        if (!h || h->epoch_last > applied) {
            free(h);
            return refuse(r, -EBADMSG, "journal: its newest superblock cannot be read: the images "
                          "hold epoch %llu, and the way from %llu to there is overwritten; nothing "
                          "was changed", (ull)applied, (ull)g->applied);
        }
        j->head_lsn += h->record_bytes;
        j->head_applied = g->applied = g->committed = h->epoch_last;
        if (h->epoch_limit > r->epoch_limit)
            r->epoch_limit = h->epoch_limit;
        free(h);
    }
    j->free_lsn = j->tail_lsn = j->head_lsn;
    return 0;
}

static int read_records(struct recovery *r)
{
    struct journal *j = &r->g->journal;
    int error = 0;
    bool whole = true;

    while (!error && whole && journal_used(j) < j->ring_bytes) {
        struct record_header *h;

        error = read_header(r, j->tail_lsn, &h);
        if (error || !h)
            return error;
        if (!r->fresh && h->epoch_last > r->g->arena.header->committed &&
            !mutant(MUTANT_BELIEVE_RECORD)) {
            /* Never acknowledged: its flush may have failed, and what the cache shows need
             * not be on the medium. Its epochs are in the arena, sealed. */
            free(h);
            return 0;
        }
        error = bring_in(r, h, &whole);
        if (!error && whole)
            error = epochs_of_record(r, h);
        if (!error && !whole) {
            r->torn_header = true;
            r->torn_last = h->epoch_last;
        }
        free(h);
    }
    return error;
}

/* Without the arena, an unreadable record is a commit that was in flight only if nothing
 * follows it. A record behind it was written after it had been acknowledged: damage. */
static int search_behind_tail(struct recovery *r)
{
    struct journal *j = &r->g->journal;
    uint64_t end = j->head_lsn + j->ring_bytes;

    for (uint64_t lsn = j->tail_lsn; lsn < end; lsn += SCAN_BYTES) {
        uint64_t bytes = end - lsn < SCAN_BYTES ? end - lsn : SCAN_BYTES;
        int error = ring_read(r, lsn, r->buffer, bytes);

        if (error)
            return error;
        for (uint64_t at = 0; at < bytes; at += PAGE) {
            const struct record_header *h = (const struct record_header *)(r->buffer + at);

            if (lsn + at > j->tail_lsn && header_valid(j, h, lsn + at))
                return refuse(r, -EBADMSG, "journal: damaged at offset %llu: epochs "
                              "%llu..%llu are recorded behind it, so an acknowledged epoch "
                              "is lost; nothing was changed",
                              (ull)journal_offset(j, j->tail_lsn), (ull)h->epoch_first,
                              (ull)h->epoch_last);
        }
    }
    return 0;
}

/* What reads back now must read back after a power cut too. A flush that failed before this
 * start may have left it in a cache that calls it clean, so a flush alone proves nothing.
 * Without the arena, which knows what was acknowledged, the newest record is written once
 * more, byte for byte the same, so that a crash in between cannot hurt it; older records had
 * been acknowledged before it began. The superblock is written anew in any case, in a slot of
 * its own (save_super()). */
static int make_durable(struct recovery *r)
{
    struct group *g = r->g;
    uint64_t bytes = r->fresh && !mutant(MUTANT_NO_RECOVERY_REWRITE) ? r->last_bytes : 0;
    int error = 0;

    for (uint64_t at = 0; at < bytes && !error; at += SCAN_BYTES) {
        uint64_t some = bytes - at < SCAN_BYTES ? bytes - at : SCAN_BYTES;

        error = ring_transfer(r, DISK_READ, r->last_lsn + at, r->buffer, some);
        if (!error)
            error = ring_transfer(r, DISK_WRITE, r->last_lsn + at, r->buffer, some);
    }
    if (!error)
        error = flush(g);
    if (error)
        return refuse(r, error, "journal: writing it anew failed: %s", strerror(-error));
    return 0;
}

/* A torn record must not become whole by what is written over its data later; nor may one
 * come to light that the cache has hidden since a failed flush. With the arena, what stands at
 * the tail was never acknowledged and its epochs are sealed: from here on that is so, and
 * a reboot must not turn it into a commit that nobody repeated. */
static int void_tail(struct recovery *r)
{
    struct journal *j = &r->g->journal;
    int error;

    if (journal_used(j) == j->ring_bytes)
        return 0; /* the tail is the head: a record that counts */
    memset(r->buffer, 0, PAGE);
    error = transfer(r->g, DISK_WRITE, journal_offset(j, j->tail_lsn), r->buffer, PAGE);
    if (!error)
        error = flush(r->g);
    if (error)
        return refuse(r, error, "journal: voiding a torn record failed: %s", strerror(-error));
    return 0;
}

/* ---- Epochs in the arena --------------------------------------------------------------- */

/* A discard is remembered before it is one: storing `base` makes it so. One that a kill has
 * kept from it never was, and its epochs may be committed yet. */
static void forget_unborn_discards(struct arena_header *h)
{
    for (uint32_t i = 0; i < ARENA_DISCARDED_MAX; i++)
        if (h->discarded[i].last >= h->base)
            h->discarded[i].first = h->discarded[i].last = 0;
}

static int create_uncommitted(struct recovery *r)
{
    struct group *g = r->g;
    struct arena_header *h = g->arena.header;

    if (h->base > h->open) /* a discard was under way: finish it */
        h->open = h->base;
    forget_unborn_discards(h);
    if (h->open <= g->committed || h->open - g->committed > UINT32_MAX ||
        h->base == 0)
        return refuse(r, -EINVAL, "arena: its open epoch %llu does not go with the journal, "
                      "which has committed %llu; remove it from /dev/shm to give up what is "
                      "not committed", (ull)h->open, (ull)g->committed);
    for (uint64_t id = h->base > g->committed ? h->base : g->committed + 1; id <= h->open; id++) {
        struct epoch *e;

        if (g->epochs == CORE_EPOCHS_MAX)
            return refuse(r, -EINVAL, "arena: more than %u epochs", CORE_EPOCHS_MAX);
        e = epoch_create(g, id);
        if (!e)
            return refuse(r, -ENOMEM, "no memory for epoch %llu", (ull)id);
        e->state = id == h->open ? CORE_EPOCH_OPEN : CORE_EPOCH_SEALED;
    }
    if (h->committed > g->committed)
        r->recommit = true;
    return 0;
}

static int adopt_segments(struct recovery *r)
{
    struct group *g = r->g;
    struct arena *a = &g->arena;

    for (uint32_t i = 0; i < arena_segments_all(a); i++) {
        struct segment_desc *d = &a->desc[i];
        struct epoch *e;

        if (d->state == SEGMENT_FREE)
            continue;
        if (d->state > SEGMENT_PACKED || d->tail > SEGMENT_BYTES)
            return refuse(r, -EINVAL, "arena: the entry of segment %u is damaged", i);
        e = epoch_by_id(g, d->epoch);
        if (!e || d->tail == 0) {
            d->state = SEGMENT_FREE; /* discarded, applied, or just taken */
            continue;
        }
        e->adopted = !r->fresh;
        segment_list_append(a, i >= a->segments ? &e->spill_list :
                            d->state == SEGMENT_RAW ? &e->part[0].raw_list : &e->kept_list, i);
    }
    arena_collect_free(a);
    for (uint32_t i = 0; i < g->epochs; i++) {
        int error = epoch_reindex(g, g->epoch[i]);

        if (error == -ENOKEY)
            return refuse(r, error, "frames of epoch %llu were compressed with dictionary %08x, "
                          "which is not there", (ull)g->epoch[i]->id, g->dictionary_missing);
        if (error)
            return refuse(r, error, "arena: frames of epoch %llu cannot be read: %s",
                          (ull)g->epoch[i]->id, strerror(-error));
    }
    writers_begin(g);
    return 0;
}

static int begin_fresh(struct recovery *r)
{
    struct group *g = r->g;
    struct arena_header *h = g->arena.header;
    uint64_t open = r->epoch_limit > g->committed ? r->epoch_limit : g->committed + 1;

    if (mutant(MUTANT_REUSE_IDS))
        open = g->committed + 1;

    if (!epoch_create(g, open))
        return refuse(r, -ENOMEM, "no memory for epoch %llu", (ull)open);
    h->base = h->open = open;
    return 0;
}

/* ---- All of it ------------------------------------------------------------------------- */

static int save_super(struct recovery *r)
{
    struct journal *j = &r->g->journal;
    uint64_t limit = epoch_open(r->g)->id + JOURNAL_EPOCH_STEP;
    int error;

    crash_point("recover-before-super");
    j->super_limit = r->epoch_limit > limit ? r->epoch_limit : limit;
    j->super_seq++;
    journal_super_fill(r->g, j->super);
    error = transfer(r->g, DISK_WRITE, j->super_seq % JOURNAL_SUPER_SLOTS * JOURNAL_SUPER_STRIDE,
                     j->super, PAGE);
    if (!error)
        error = flush(r->g);
    if (error)
        return refuse(r, error, "journal: writing the superblock failed: %s", strerror(-error));
    j->epoch_limit = j->super_limit;
    return 0;
}

static int recover(struct recovery *r)
{
    struct group *g = r->g;
    int error;

    journal_file_known(g);
    error = read_super(r);
    if (!error)
        error = check_disks(r);
    if (error)
        return error;
    error = arena_attach(&g->arena, g->config.arena_fd, g->config.arena_bytes, g->config.spill_fd,
                         g->config.spill_bytes, g->journal.group, g->config.boot_id, &r->fresh,
                         r->text);
    if (!error)
        error = spill_open(g, r->text);
    if (error)
        return error;
    error = skip_applied(r);
    if (!error)
        error = read_records(r);
    if (!error && r->fresh && !r->super.clean)
        error = search_behind_tail(r);
    if (!error)
        error = make_durable(r);
    if (!error)
        error = r->fresh ? begin_fresh(r) : create_uncommitted(r);
    if (!error)
        error = adopt_segments(r);
    if (!error)
        error = save_super(r);
    /* Not before: the superblock that we read may be in a cache only, and the tail by it a
     * record that counts by the one on the medium. */
    if (!error && !(r->fresh && r->super.clean) && !mutant(MUTANT_NO_VOID_ON_RECOVERY))
        error = void_tail(r);
    return error;
}

static void tell(struct recovery *r)
{
    struct group *g = r->g;

    if (r->fresh && r->torn_header)
        group_log(g, LOG_WARNING, "the commit up to epoch %llu was in flight at the crash and "
                  "is void", (ull)r->torn_last);
    if (g->journal.pending_count)
        group_log(g, LOG_INFO, "recovered: %u committed records are to be applied, up to epoch "
                  "%llu", g->journal.pending_count, (ull)g->committed);
    if (!r->fresh)
        group_log(g, LOG_INFO, "reattached the arena: open epoch %llu, committed %llu, %llu of "
                  "%u segments used", (ull)epoch_open(g)->id, (ull)g->committed,
                  (ull)(g->arena.segments - g->arena.free_count), g->arena.segments);
    if (g->config.reactors > g->writers)
        group_log(g, LOG_WARNING, "%u reactors are more than the %u disks: %u are started, each "
                  "disk has one", g->config.reactors, g->config.disks, g->writers);
    if (r->super_bad)
        group_log(g, LOG_WARNING, "journal: %u superblocks cannot be read; the newest of the "
                  "others is used", r->super_bad);
    if (r->replaced_last)
        group_log(g, LOG_ERROR, "the arena did not hold the committed epochs up to %llu as the "
                  "journal does: it was changed from outside; they were read from the journal",
                  (ull)r->replaced_last);
    if (r->recommit)
        group_log(g, LOG_ERROR, "the journal has lost acknowledged epochs up to %llu; they are "
                  "in the arena still and are committed anew",
                  (ull)g->arena.header->committed);
}

/* The smallest arenas are the tests'. */
static uint64_t index_limit(const core_config *config, uint32_t writers)
{
    uint64_t share = config->arena_bytes / CORE_INDEX_SHARE;
    uint64_t least = (uint64_t)writers * CORE_INDEX_BYTES_MIN;

    if (config->index_bytes)
        return config->index_bytes;
    return share > least ? share : least;
}

/* A writer without a disk would have nothing to do. */
static int open_writers(struct group *g)
{
    uint32_t writers = g->config.reactors ? g->config.reactors : 1;
    int error = 0;

    writers = writers < g->config.disks ? writers : g->config.disks;
    pthread_mutex_init(&g->free_lock, NULL);
    pthread_mutex_init(&g->waiter_lock, NULL);
    g->writers = writers < CORE_REACTORS_MAX ? writers : CORE_REACTORS_MAX;
    for (uint32_t i = 0; i < g->writers && !error; i++)
        error = writer_init(g, i, index_limit(&g->config, g->writers));
    return error;
}

static int load_dictionaries(struct group *g, const core_config *config, char *text)
{
    int error = 0;

    for (uint32_t i = 0; i < config->dictionaries && !error; i++)
        error = dictionaries_add(&g->dictionaries, &config->dictionary[i], text);
    return error;
}

int group_open(struct group *g, const core_config *config, struct disk *disk, char *text)
{
    struct recovery r = {.g = g, .text = text};
    struct verb again = {.kind = VERB_COMMIT};
    int error;

    g->config = *config;
    g->disk = disk;
    g->seq = 1;
    g->worker.wake_fd = g->packer.wake_fd = -1; /* not started yet */
    r.buffer = aligned_alloc(PAGE, SCAN_BYTES);
    if (open_writers(g) || !r.buffer || journal_init(g) ||
        apply_init(g) || pack_init(g) || merge_init(g))
        error = refuse(&r, -ENOMEM, "no memory to start");
    else
        error = load_dictionaries(g, config, text);
    if (!error)
        error = recover(&r);
    free(r.buffer);
    if (error) {
        group_close(g);
        return error;
    }
    if (r.recommit) {
        again.epoch = g->arena.header->committed;
        checkpoint_submit(g, &again);
    }
    crash_point("recover-before-arena");
    g->arena.header->applied = g->applied;
    g->arena.header->committed = r.recommit ? g->arena.header->committed : g->committed;
    __atomic_store_n(&g->arena.header->magic, ARENA_MAGIC, __ATOMIC_RELEASE);
    tell(&r);
    return 0;
}
