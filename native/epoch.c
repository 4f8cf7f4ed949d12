/* epoch.c - see epoch.h. */
#include "epoch.h"

#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#include "crash.h"
#include "group.h"
#include "mutant.h"

/* ---- Segments of an epoch ------------------------------------------------------------- */

void segment_list_init(struct segment_list *l)
{
    *l = (struct segment_list){.first = SEGMENT_NONE, .last = SEGMENT_NONE};
}

void segment_list_append(struct arena *a, struct segment_list *l, uint32_t segment)
{
    a->next[segment] = SEGMENT_NONE;
    if (l->count++ == 0)
        l->first = segment;
    else
        a->next[l->last] = segment;
    a->previous[segment] = l->last;
    l->last = segment;
}

uint32_t segment_list_pop(struct arena *a, struct segment_list *l)
{
    uint32_t segment = l->first;

    segment_list_remove(a, l, segment);
    return segment;
}

void segment_list_remove(struct arena *a, struct segment_list *l, uint32_t segment)
{
    uint32_t next = a->next[segment], previous = a->previous[segment];

    check(l->count > 0);
    l->count--;
    if (segment == l->first)
        l->first = next;
    else
        a->next[previous] = next;
    if (segment == l->last)
        l->last = previous;
    else
        a->previous[next] = previous;
}

static void segment_list_free(struct arena *a, struct segment_list *l)
{
    while (l->count > 0)
        arena_segment_free(a, segment_list_pop(a, l));
}

/* ---- Life of an epoch ----------------------------------------------------------------- */

struct epoch *epoch_create(struct group *g, uint64_t id)
{
    struct epoch *e;

    check(g->epochs < CORE_EPOCHS_MAX);
    e = calloc(1, sizeof(*e));
    if (!e)
        return NULL;
    e->id = id;
    e->state = CORE_EPOCH_OPEN;
    index_init(&e->index, &g->index_memory);
    e->raw.segment = SEGMENT_NONE;
    e->packed.segment = SEGMENT_NONE;
    segment_list_init(&e->raw_list);
    segment_list_init(&e->kept_list);
    segment_list_init(&e->worn_list);
    segment_list_init(&e->spill_list);
    segment_list_init(&e->spill_worn_list);
    g->epoch[g->epochs++] = e;
    pack_look(g);
    return e;
}

/* An index that the start has made lies in the heap of the thread that started, below what others
 * took since: without being asked, malloc would keep it. Takes a millisecond, once a start. */
#define TRIM_BYTES 1048576u

static void free_index(struct epoch *e)
{
    bool trim = e->adopted && index_bytes(&e->index) >= TRIM_BYTES;

    index_free(&e->index);
    if (trim)
        malloc_trim(0);
}

static void bury(struct job *job, struct worker *w)
{
    (void)w;
    free_index(job->owner);
}

static void buried(struct job *job)
{
    struct epoch *e = job->owner;

    index_memory_count(&e->group->index_memory, e->grave.used);
    e->group->burials--;
    free(e);
}

static void destroy(struct group *g, struct epoch *e)
{
    segment_list_free(&g->arena, &e->raw_list);
    segment_list_free(&g->arena, &e->kept_list);
    segment_list_free(&g->arena, &e->worn_list);
    segment_list_free(&g->arena, &e->spill_list);
    segment_list_free(&g->arena, &e->spill_worn_list);
    pack_look(g);
    if (e->index.used > EPOCH_INDEX_LARGE && g->worker.outstanding < WORKER_RING) {
        e->group = g;
        e->index.memory = &e->grave;
        e->burial = (struct job){.run = bury, .done = buried, .owner = e};
        check(worker_submit(&g->worker, &e->burial, false));
        g->burials++;
        return;
    }
    free_index(e);
    free(e);
}

void epoch_drop(struct group *g, struct epoch *e)
{
    uint32_t i = 0;

    while (g->epoch[i] != e) {
        i++;
        check(i < g->epochs);
    }
    memmove(&g->epoch[i], &g->epoch[i + 1], (g->epochs - i - 1) * sizeof(g->epoch[0]));
    g->epochs--;
    e->dropped = true;
    if (e->jobs == 0)
        destroy(g, e);
}

void epoch_job_done(struct group *g, struct epoch *e)
{
    check(e->jobs > 0);
    if (--e->jobs == 0 && e->dropped)
        destroy(g, e);
}

struct epoch *epoch_open(const struct group *g)
{
    return g->epoch[g->epochs - 1];
}

struct epoch *epoch_by_id(const struct group *g, uint64_t id)
{
    for (uint32_t i = g->epochs; i-- > 0;)
        if (g->epoch[i]->id == id)
            return g->epoch[i];
    return NULL;
}

/* ---- Writing -------------------------------------------------------------------------- */

void epoch_expect(const struct group *g, uint32_t disk, uint64_t block)
{
    index_prefetch(&epoch_open(g)->index, disk, block);
}

void epoch_fetch(const struct group *g, uint32_t disk, uint64_t block)
{
    const struct index_slot *s = index_find(&epoch_open(g)->index, disk, block);
    const uint8_t *at;

    if (!s || !s->mask)
        return;
    at = (const uint8_t *)arena_frame(&g->arena, s->loc);
    for (uint32_t i = 0; i < FRAME_BYTES_MAX; i += 64)
        prefetch(at + i);
}

bool epoch_room(const struct group *g, uint64_t blocks)
{
    const struct epoch *e = g->epoch[g->epochs - 1];
    uint64_t here = e->raw.segment != SEGMENT_NONE ? SEGMENT_BYTES - e->raw.tail : 0, segments;

    if (unlikely(!index_room(&e->index, blocks)))
        return false;
    if (likely(blocks * FRAME_BYTES_MAX <= here))
        return true;
    segments = (blocks - here / FRAME_BYTES_MAX + SEGMENT_FRAMES_MIN - 1) / SEGMENT_FRAMES_MIN;
    return g->arena.free_count >= segments + GROUP_RESERVED_SEGMENTS;
}

uint32_t epoch_room_segments(uint64_t blocks)
{
    return (uint32_t)((blocks + SEGMENT_FRAMES_MIN - 1) / SEGMENT_FRAMES_MIN) +
           GROUP_RESERVED_SEGMENTS;
}

/* The next frame's header, in a new segment when this one is full. */
static struct frame_header *begin(struct group *g, struct epoch *e, uint32_t payload_bytes)
{
    if (unlikely(!arena_fits(&e->raw, payload_bytes))) {
        uint32_t segment = arena_segment_take(&g->arena, e->id, SEGMENT_RAW);

        check(segment != SEGMENT_NONE); /* epoch_room() was asked */
        if (e->raw.segment != SEGMENT_NONE)
            arena_publish(&g->arena, &e->raw);
        segment_list_append(&g->arena, &e->raw_list, segment);
        e->raw = (struct arena_cursor){.segment = segment};
        pack_look(g);
        group_pressure(g, false); /* told before a write has to wait */
    }
    return arena_frame_begin(&g->arena, &e->raw);
}

/* The frame at the cursor, which has this header, is filled. */
static inline arena_loc end(struct group *g, struct epoch *e, const struct frame_header *h)
{
    arena_loc loc;

    e->stored_bytes += frame_bytes(h->payload_bytes);
    crash_point("frame-before-tail");
    loc = arena_frame_close(&e->raw, h->payload_bytes);
    if (!g->batching)
        arena_publish(&g->arena, &e->raw);
    return loc;
}

void epoch_batch_begin(struct group *g)
{
    g->batching = true;
}

void epoch_batch_publish(struct group *g)
{
    const struct arena_cursor *at = &epoch_open(g)->raw;

    if (at->segment != SEGMENT_NONE && g->arena.desc[at->segment].tail != at->tail)
        arena_publish(&g->arena, at);
}

void epoch_batch_end(struct group *g)
{
    epoch_batch_publish(g);
    g->batching = false;
}

/* A slot's frame is not the newest any more. */
static void slot_dies(struct group *g, struct epoch *e, arena_loc old)
{
    uint32_t segment = arena_loc_segment(old);
    struct segment_use *u = &g->arena.use[segment];

    if (unlikely(++u->dead >= u->worn_at))
        pack_worn(g, e, segment);
}

/* Points the slot at the new frame. */
static inline void repoint(struct group *g, struct epoch *e, struct index_slot *s, arena_loc loc,
                           uint8_t mask)
{
    arena_loc old = s->loc;
    uint8_t had = s->mask;

    crash_point("frame-before-index");
    e->logical_bytes += (uint64_t)mask_bytes(mask) - mask_bytes(had);
    s->loc = loc;
    s->mask = mask;
    g->arena.use[arena_loc_segment(loc)].slots++;
    if (had)
        slot_dies(g, e, old);
}

void epoch_point(struct group *g, struct epoch *e, struct index_slot *s, arena_loc loc,
                 uint8_t mask)
{
    repoint(g, e, s, loc, mask);
}

struct emptying {
    struct group *g;
    struct epoch *e;
};

static void slot_emptied(void *owner, const struct index_slot *s)
{
    struct emptying *m = owner;

    m->e->logical_bytes -= mask_bytes(s->mask);
    slot_dies(m->g, m->e, s->loc);
}

/* A frame counts once for each of its ranges. */
static void range_changed(void *owner, arena_loc loc, bool gone)
{
    struct emptying *m = owner;
    struct segment_use *u = &m->g->arena.use[arena_loc_segment(loc)];

    if (gone) {
        slot_dies(m->g, m->e, loc);
        return;
    }
    if (u->worn_at == u->slots && u->slots > 1)
        u->worn_at++; /* on the worn list until all is dead */
    u->slots++;
}

int epoch_put_range(struct group *g, struct epoch *e, uint32_t disk, uint64_t first, uint64_t end,
                    uint32_t flags, arena_loc loc)
{
    static const struct index_watch watch = {.emptied = slot_emptied, .changed = range_changed};
    struct emptying m = {.g = g, .e = e};
    int error = index_put_range(&e->index, disk, first, end, flags, loc, &watch, &m);

    if (!error)
        g->arena.use[arena_loc_segment(loc)].slots++;
    return error;
}

/* All zero? Data rarely is, and then its first bytes tell. */
static bool is_zero(const uint8_t *p, uint32_t bytes)
{
    uint64_t first[2];

    memcpy(first, p, sizeof(first));
    return (first[0] | first[1]) == 0 && memcmp(p, p + 16, bytes - 16) == 0;
}

/* A frame did not expand. */
static void lost(struct group *g, arena_loc loc)
{
    if (arena_spilled(&g->arena, loc))
        spill_fault(g, -EIO);
}

/* Part of a block: the frame carries what this epoch has of the block already and the new
 * sectors, so that a block needs one frame an epoch. Leaves all in g->scratch. */
static int merge(struct group *g, struct epoch *e, const struct index_slot *s, uint32_t disk,
                 uint64_t block, uint8_t mask, struct span_cursor *from, uint8_t *merged_mask)
{
    uint8_t have = s->mask;
    int error;

    if (!have && index_in_range(&e->index, disk, block)) {
        memset(g->scratch, 0, BLOCK_BYTES);
        have = MASK_FULL;
    } else if (have & ~mask) {
        error = frame_expand(&g->expand, &g->arena, s->loc, block, have & ~mask, g->scratch);
        if (error) {
            lost(g, s->loc);
            return error;
        }
    }
    for (uint32_t i = 0; i < BLOCK_SECTORS; i++)
        if (mask & 1u << i)
            span_read(from, g->scratch + i * SECTOR_BYTES, SECTOR_BYTES);
    *merged_mask = have | mask;
    return 0;
}

static inline struct frame_header header(struct group *g, uint32_t disk, uint64_t block,
                                         uint8_t mask)
{
    return (struct frame_header){.kind = FRAME_RAW, .seq = g->seq++, .block = block, .blocks = 1,
                                 .disk = (uint8_t)disk, .mask = mask,
                                 .payload_bytes = mask_bytes(mask)};
}


/* The payload is in its place, its header is not. Zeroes are stored as nothing. */
static void finish(struct group *g, struct epoch *e, struct frame_header *at,
                   struct frame_header *h, struct index_slot *s)
{
    if (is_zero((const uint8_t *)(at + 1), h->payload_bytes)) {
        h->kind = FRAME_ZERO;
        h->payload_bytes = 0;
        g->stats.zero_frames++;
    }
    *at = *h;
    repoint(g, e, s, end(g, e, h), h->mask);
}

/* A whole block in one piece whose first bytes are not zero: what nearly every write is. */
static inline bool may_stream(struct span_cursor *from)
{
    const uint8_t *at;
    uint64_t first;

    if (span_left(from, &at) < BLOCK_BYTES)
        return false;
    memcpy(&first, at, sizeof(first));
    return first != 0; /* should they change now, zeroes are stored in full: no harm */
}

/* One whole block from the cursor into the open epoch. */
static inline int write_block(struct group *g, struct epoch *e, uint32_t disk, uint64_t block,
                              struct span_cursor *from)
{
    uint32_t faults = span_faults_now();
    struct index_slot *s = index_slot(&e->index, disk, block, g->expected_blocks);
    struct frame_header *at, h;
    uint64_t got;
    bool streamed;

    if (unlikely(!s))
        return -ENOMEM;
    at = begin(g, e, BLOCK_BYTES);
    h = header(g, disk, block, MASK_FULL);
    streamed = may_stream(from);
    if (likely(streamed))
        copy_frame((uint8_t *)at, &h, span_piece(from, BLOCK_BYTES, &got));
    else
        span_read(from, at + 1, BLOCK_BYTES);
    if (unlikely(span_faults_now() != faults))
        return -EFAULT; /* the guest's memory vanished under the copy: publish nothing */
    if (likely(streamed))
        repoint(g, e, s, end(g, e, &h), MASK_FULL);
    else
        finish(g, e, at, &h, s);
    return 0;
}

/* Part of a block. */
static int write_part(struct group *g, struct epoch *e, uint32_t disk, uint64_t block,
                      uint8_t mask, struct span_cursor *from)
{
    uint32_t faults = span_faults_now();
    struct index_slot *s = index_slot(&e->index, disk, block, g->expected_blocks);
    struct frame_header *at, h;
    uint8_t *payload, carried;
    int error = s ? merge(g, e, s, disk, block, mask, from, &carried) : -ENOMEM;

    if (unlikely(error))
        return error;
    at = begin(g, e, BLOCK_BYTES);
    h = header(g, disk, block, carried);
    payload = (uint8_t *)(at + 1);
    for (uint32_t i = 0; i < BLOCK_SECTORS; i++)
        if (carried & 1u << i) {
            memcpy(payload, g->scratch + i * SECTOR_BYTES, SECTOR_BYTES);
            payload += SECTOR_BYTES;
        }
    if (unlikely(span_faults_now() != faults))
        return -EFAULT;
    finish(g, e, at, &h, s);
    return 0;
}

/* The sectors of `block` that sector..sector+sectors-1 touches. */
static uint8_t block_mask(uint64_t block, uint64_t sector, uint64_t sectors)
{
    uint64_t base = block * BLOCK_SECTORS;
    uint32_t first = sector > base ? (uint32_t)(sector - base) : 0;
    uint32_t last = sector + sectors < base + BLOCK_SECTORS ? (uint32_t)(sector + sectors - base)
                                                            : BLOCK_SECTORS;

    return (uint8_t)((1u << last) - (1u << first));
}

int epoch_write(struct group *g, uint32_t disk, uint64_t sector, struct span_cursor *from,
                uint64_t bytes)
{
    uint64_t sectors = bytes / SECTOR_BYTES;
    struct epoch *e = epoch_open(g);

    if (sectors == 0) /* legal; a frame of no sectors is not */
        return 0;
    for (uint64_t block = sector / BLOCK_SECTORS; block * BLOCK_SECTORS < sector + sectors; block++) {
        uint8_t mask = block_mask(block, sector, sectors);
        int error = likely(mask == MASK_FULL) ? write_block(g, e, disk, block, from)
                                              : write_part(g, e, disk, block, mask, from);

        if (unlikely(error))
            return error;
    }
    return 0;
}

/* Whole blocks become zero: one frame; a slot for one, a range for more. */
static int zero_blocks(struct group *g, struct epoch *e, uint32_t disk, uint64_t block,
                       uint64_t blocks, uint32_t flags)
{
    struct index_slot *s = NULL;
    struct frame_header *at;
    arena_loc loc;
    int error;

    if (blocks == 1) {
        s = index_slot(&e->index, disk, block, g->expected_blocks);
        if (!s)
            return -ENOMEM;
    }
    at = begin(g, e, 0);
    if (blocks > 1) {
        loc = arena_loc_of(e->raw.segment, e->raw.tail);
        error = epoch_put_range(g, e, disk, block, block + blocks, flags, loc);
        if (error)
            return error;
    }
    *at = (struct frame_header){.kind = FRAME_ZERO, .seq = g->seq++, .block = block,
                                .blocks = (uint32_t)blocks, .disk = (uint8_t)disk,
                                .mask = MASK_FULL, .flags = (uint8_t)flags};
    loc = end(g, e, at);
    g->stats.zero_frames++;
    if (s)
        repoint(g, e, s, loc, MASK_FULL);
    return 0;
}

int epoch_zero(struct group *g, uint32_t disk, uint64_t sector, uint64_t sectors, uint32_t flags)
{
    static uint8_t zeroes[BLOCK_BYTES];
    struct epoch *e = epoch_open(g);
    uint64_t end_sector = sector + sectors;
    uint64_t first = (sector + BLOCK_SECTORS - 1) / BLOCK_SECTORS;
    uint64_t last = end_sector / BLOCK_SECTORS;
    struct span span = {.ptr = zeroes, .bytes = BLOCK_BYTES};
    int error = 0;

    if (sectors == 0)
        return 0;
    if (sector % BLOCK_SECTORS) {
        struct span_cursor from = span_start(&span, 1);
        uint64_t block = sector / BLOCK_SECTORS;

        error = write_part(g, e, disk, block, block_mask(block, sector, sectors), &from);
    }
    if (!error && first < last)
        error = zero_blocks(g, e, disk, first, last - first, flags);
    if (!error && end_sector % BLOCK_SECTORS && last >= first) {
        struct span_cursor from = span_start(&span, 1);

        error = write_part(g, e, disk, last, block_mask(last, sector, sectors), &from);
    }
    return error;
}

/* ---- Reading -------------------------------------------------------------------------- */

/* All of the block, when that lies somewhere as it is; else NULL. */
static const uint8_t *whole_block(struct group *g, arena_loc loc, uint64_t block, uint8_t want,
                                  int *error)
{
    const struct frame_header *h = arena_frame(&g->arena, loc);
    const uint8_t *cluster;

    if (unlikely(arena_spilled(&g->arena, loc)) || h->mask != MASK_FULL)
        return NULL; /* what lies in the file may go away at any time */
    if (h->kind == FRAME_RAW)
        return (const uint8_t *)(h + 1);
    if (h->kind != FRAME_CLUSTER)
        return NULL;
    cluster = cluster_expand(&g->expand, &g->arena, loc, h);
    if (!cluster) {
        *error = -EIO;
        return NULL;
    }
    g->expand.wanted_bytes += mask_bytes(want);
    return cluster + (block - h->block) * BLOCK_BYTES;
}

int epoch_read(struct group *g, uint32_t disk, uint64_t block, uint8_t want, uint8_t *out,
               const uint8_t **direct)
{
    uint8_t found = 0;
    int error = 0;

    *direct = NULL;
    for (uint32_t i = g->epochs; i-- > 0 && found != want;) {
        struct index *x = &g->epoch[i]->index;
        const struct index_slot *s = index_find(x, disk, block);
        uint8_t here = s ? s->mask & want & ~found : 0;

        if (here) {
            const uint8_t *at = here == want ? whole_block(g, s->loc, block, want, &error) : NULL;

            if (at) {
                *direct = at + (uint32_t)__builtin_ctz(want) * SECTOR_BYTES;
                return want;
            }
            if (error || frame_expand(&g->expand, &g->arena, s->loc, block, here, out)) {
                lost(g, s->loc);
                return -EIO;
            }
            found |= here;
        }
        if (found != want && index_in_range(x, disk, block)) {
            for (uint32_t n = 0; n < BLOCK_SECTORS; n++)
                if (want & ~found & 1u << n)
                    memset(out + n * SECTOR_BYTES, 0, SECTOR_BYTES);
            found = want;
        }
    }
    return found;
}
