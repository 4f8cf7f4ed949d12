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
    if (l->count == 0)
        l->first = segment;
    else
        a->next[l->last] = segment;
    a->previous[segment] = l->last;
    l->last = segment;
    /* Other writers look whether the open epoch is empty. */
    __atomic_store_n(&l->count, l->count + 1, __ATOMIC_RELAXED);
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

/* The writers go on in this one. Older epochs' frames have lower numbers, whoever wrote them. */
static void open_parts(struct group *g, struct epoch *e)
{
    uint64_t seq = 0;

    for (uint32_t i = 0; i < g->writers; i++)
        seq = g->writer[i].seq > seq ? g->writer[i].seq : seq;
    for (uint32_t i = 0; i < g->writers; i++) {
        struct writer *w = &g->writer[i];
        struct epoch_part *p = &e->part[i];

        p->epoch = e;
        index_init(&p->index, &w->index_memory);
        p->raw.segment = SEGMENT_NONE;
        segment_list_init(&p->raw_list);
        w->expected_blocks = w->open ? w->open->index.used : 0;
        w->open = p;
        w->seq = seq;
    }
}

struct epoch *epoch_create(struct group *g, uint64_t id)
{
    size_t bytes = sizeof(struct epoch) + g->writers * sizeof(struct epoch_part);
    struct epoch *e;

    check(g->epochs < CORE_EPOCHS_MAX);
    e = aligned_alloc(_Alignof(struct epoch), bytes);
    if (!e)
        return NULL;
    memset(e, 0, bytes);
    e->id = id;
    e->state = CORE_EPOCH_OPEN;
    e->group = g;
    e->packed.segment = SEGMENT_NONE;
    open_parts(g, e);
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
    bool trim = e->adopted && epoch_index_bytes(e) >= TRIM_BYTES;

    for (uint32_t i = 0; i < e->group->writers; i++)
        index_free(&e->part[i].index);
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
    struct group *g = e->group;

    for (uint32_t i = 0; i < g->writers; i++)
        index_memory_count(&g->writer[i].index_memory, e->part[i].grave.used);
    g->burials--;
    free(e);
}

static void destroy(struct group *g, struct epoch *e)
{
    for (uint32_t i = 0; i < g->writers; i++)
        segment_list_free(&g->arena, &e->part[i].raw_list);
    segment_list_free(&g->arena, &e->kept_list);
    segment_list_free(&g->arena, &e->worn_list);
    segment_list_free(&g->arena, &e->spill_list);
    segment_list_free(&g->arena, &e->spill_worn_list);
    pack_look(g);
    if (epoch_slots(e) > EPOCH_INDEX_LARGE && g->worker.outstanding < WORKER_RING) {
        for (uint32_t i = 0; i < g->writers; i++)
            e->part[i].index.memory = &e->part[i].grave;
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

uint32_t epoch_segments(const struct epoch *e)
{
    uint32_t segments = e->kept_list.count + e->worn_list.count + e->spill_list.count +
                        e->spill_worn_list.count + merge_holds(e->group, e);

    for (uint32_t i = 0; i < e->group->writers; i++)
        segments += __atomic_load_n(&e->part[i].raw_list.count, __ATOMIC_RELAXED);
    return segments;
}

uint64_t epoch_logical_bytes(const struct epoch *e)
{
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < e->group->writers; i++)
        bytes += e->part[i].logical_bytes;
    return bytes;
}

uint64_t epoch_stored_bytes(const struct epoch *e)
{
    uint64_t bytes = e->stored_bytes; /* below zero while the packer is ahead */

    for (uint32_t i = 0; i < e->group->writers; i++)
        bytes += e->part[i].stored_bytes;
    return bytes;
}

uint64_t epoch_slots(const struct epoch *e)
{
    uint64_t slots = 0;

    for (uint32_t i = 0; i < e->group->writers; i++)
        slots += e->part[i].index.used;
    return slots;
}

uint64_t epoch_index_bytes(const struct epoch *e)
{
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < e->group->writers; i++)
        bytes += index_bytes(&e->part[i].index);
    return bytes;
}

struct epoch_part *epoch_part(const struct epoch *e, uint32_t disk)
{
    return (struct epoch_part *)&e->part[group_writer(e->group, disk)->number];
}

struct index *epoch_index(const struct epoch *e, uint32_t disk)
{
    return &epoch_part(e, disk)->index;
}

/* ---- Writing -------------------------------------------------------------------------- */

void epoch_expect(const struct writer *w, uint32_t disk, uint64_t block)
{
    index_prefetch(&w->open->index, disk, block);
}

const uint8_t *epoch_frame(const struct writer *w, uint32_t disk, uint64_t block)
{
    const struct index_slot *s = index_find(&w->open->index, disk, block);

    return s && s->mask ? (const uint8_t *)arena_frame(&w->group->arena, s->loc) : NULL;
}

/* Bytes behind the last frame. */
static inline uint64_t room_here(const struct epoch_part *p)
{
    return p->raw.segment != SEGMENT_NONE ? SEGMENT_BYTES - p->raw.tail : 0;
}

uint32_t epoch_room_more(const struct writer *w, uint64_t blocks)
{
    uint64_t here = room_here(w->open);

    if (blocks * FRAME_BYTES_MAX <= here)
        return 0;
    return (uint32_t)((blocks - here / FRAME_BYTES_MAX + SEGMENT_FRAMES_MIN - 1) /
                      SEGMENT_FRAMES_MIN);
}

bool epoch_room(const struct writer *w, uint64_t blocks)
{
    const struct epoch_part *p = w->open;

    if (unlikely(!index_room(&p->index, blocks)))
        return false;
    if (likely(blocks * FRAME_BYTES_MAX <= room_here(p)))
        return true;
    if (w->shared)
        return w->stock_count >= epoch_room_more(w, blocks);
    return w->group->arena.free_count >= epoch_room_more(w, blocks) + GROUP_RESERVED_SEGMENTS;
}

uint32_t epoch_room_segments(uint64_t blocks)
{
    return (uint32_t)((blocks + SEGMENT_FRAMES_MIN - 1) / SEGMENT_FRAMES_MIN) +
           GROUP_RESERVED_SEGMENTS;
}

/* The next frame's header, in a new segment when this one is full. */
static struct frame_header *begin(struct writer *w, struct epoch_part *p, uint32_t payload_bytes)
{
    struct group *g = w->group;

    if (unlikely(!arena_fits(&p->raw, payload_bytes))) {
        uint32_t segment = writer_segment(w);

        check(segment != SEGMENT_NONE); /* epoch_room() was asked */
        if (p->raw.segment != SEGMENT_NONE)
            arena_publish(&g->arena, &p->raw);
        arena_segment_begin(&g->arena, segment, p->epoch->id, SEGMENT_RAW);
        segment_list_append(&g->arena, &p->raw_list, segment);
        p->raw = (struct arena_cursor){.segment = segment};
        writer_look(w);
    }
    return arena_frame_begin(&g->arena, &p->raw);
}

/* The frame at the cursor, which has this header, is filled. */
static inline arena_loc end(struct writer *w, struct epoch_part *p, const struct frame_header *h)
{
    arena_loc loc;

    p->stored_bytes += frame_bytes(h->payload_bytes);
    crash_point("frame-before-tail");
    loc = arena_frame_close(&p->raw, h->payload_bytes);
    if (!w->batching)
        arena_publish(&w->group->arena, &p->raw);
    return loc;
}

void epoch_batch_begin(struct writer *w)
{
    writer_round(w);
    w->batching = true;
}

void epoch_batch_publish(struct writer *w)
{
    const struct arena *a = &w->group->arena;
    const struct arena_cursor *at = &w->open->raw;

    if (at->segment != SEGMENT_NONE && a->desc[at->segment].tail != at->tail)
        arena_publish(a, at);
}

void epoch_batch_end(struct writer *w)
{
    epoch_batch_publish(w);
    w->batching = false;
    writer_round_over(w);
}

/* A slot's frame is not the newest any more. With several writers the one that makes `dead` come
 * to the mark notes it: the mark stays until the group has looked. */
static void slot_dies(struct writer *w, struct epoch_part *p, arena_loc old)
{
    uint32_t segment = arena_loc_segment(old);
    struct segment_use *u = &w->group->arena.use[segment];

    if (unlikely(w->shared)) {
        if (__atomic_add_fetch(&u->dead, 1, __ATOMIC_RELAXED) == u->worn_at)
            writer_worn(w, segment);
    } else if (unlikely(++u->dead >= u->worn_at)) {
        pack_worn(w->group, p->epoch, segment);
    }
}

static inline void slot_more(const struct writer *w, arena_loc loc)
{
    struct segment_use *u = &w->group->arena.use[arena_loc_segment(loc)];

    if (unlikely(w->shared))
        __atomic_add_fetch(&u->slots, 1, __ATOMIC_RELAXED);
    else
        u->slots++;
}

/* Points the slot at the new frame. */
static inline void repoint(struct writer *w, struct epoch_part *p, struct index_slot *s,
                           arena_loc loc, uint8_t mask)
{
    arena_loc old = s->loc;
    uint8_t had = s->mask;

    crash_point("frame-before-index");
    p->logical_bytes += (uint64_t)mask_bytes(mask) - mask_bytes(had);
    s->loc = loc;
    s->mask = mask;
    slot_more(w, loc);
    if (had)
        slot_dies(w, p, old);
}

void epoch_point(struct writer *w, struct epoch_part *p, struct index_slot *s, arena_loc loc,
                 uint8_t mask)
{
    repoint(w, p, s, loc, mask);
}

struct emptying {
    struct writer *w;
    struct epoch_part *p;
};

static void slot_emptied(void *owner, const struct index_slot *s)
{
    struct emptying *m = owner;

    m->p->logical_bytes -= mask_bytes(s->mask);
    slot_dies(m->w, m->p, s->loc);
}

/* A frame counts once for each of its ranges. */
static void range_changed(void *owner, arena_loc loc, bool gone)
{
    struct emptying *m = owner;

    if (gone)
        slot_dies(m->w, m->p, loc);
    else
        slot_more(m->w, loc);
}

int epoch_put_range(struct writer *w, struct epoch_part *p, uint32_t disk, uint64_t first,
                    uint64_t end, uint32_t flags, arena_loc loc)
{
    static const struct index_watch watch = {.emptied = slot_emptied, .changed = range_changed};
    struct emptying m = {.w = w, .p = p};
    int error = index_put_range(&p->index, disk, first, end, flags, loc, &watch, &m);

    if (!error)
        slot_more(w, loc);
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
static void lost(struct writer *w, arena_loc loc)
{
    if (arena_spilled(&w->group->arena, loc))
        writer_fault(w, -EIO);
}

/* Part of a block: the frame carries what this epoch has of the block already and the new
 * sectors, so that a block needs one frame an epoch. Leaves all in w->scratch. */
static int merge(struct writer *w, struct epoch_part *p, const struct index_slot *s, uint32_t disk,
                 uint64_t block, uint8_t mask, struct span_cursor *from, uint8_t *merged_mask)
{
    uint8_t have = s->mask;
    int error;

    if (!have && index_in_range(&p->index, disk, block)) {
        memset(w->scratch, 0, BLOCK_BYTES);
        have = MASK_FULL;
    } else if (have & ~mask) {
        error = frame_expand(&w->expand, &w->group->arena, s->loc, block, have & ~mask,
                             w->scratch);
        if (error) {
            lost(w, s->loc);
            return error;
        }
    }
    for (uint32_t i = 0; i < BLOCK_SECTORS; i++)
        if (mask & 1u << i)
            span_read(from, w->scratch + i * SECTOR_BYTES, SECTOR_BYTES);
    *merged_mask = have | mask;
    return 0;
}

static inline struct frame_header header(struct writer *w, uint32_t disk, uint64_t block,
                                         uint8_t mask)
{
    return (struct frame_header){.kind = FRAME_RAW, .seq = w->seq++, .block = block, .blocks = 1,
                                 .disk = (uint8_t)disk, .mask = mask,
                                 .payload_bytes = mask_bytes(mask)};
}


/* The payload is in its place, its header is not. Zeroes are stored as nothing. */
static void finish(struct writer *w, struct epoch_part *p, struct frame_header *at,
                   struct frame_header *h, struct index_slot *s)
{
    if (is_zero((const uint8_t *)(at + 1), h->payload_bytes)) {
        h->kind = FRAME_ZERO;
        h->payload_bytes = 0;
        w->zero_frames++;
    }
    *at = *h;
    repoint(w, p, s, end(w, p, h), h->mask);
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
static inline int write_block(struct writer *w, struct epoch_part *p, uint32_t disk,
                              uint64_t block, struct span_cursor *from)
{
    uint32_t faults = span_faults_now();
    struct index_slot *s = index_slot(&p->index, disk, block, w->expected_blocks);
    struct frame_header *at, h;
    uint64_t got;
    bool streamed;

    if (unlikely(!s))
        return -ENOMEM;
    at = begin(w, p, BLOCK_BYTES);
    h = header(w, disk, block, MASK_FULL);
    streamed = may_stream(from);
    if (likely(streamed))
        copy_frame((uint8_t *)at, &h, span_piece(from, BLOCK_BYTES, &got));
    else
        span_read(from, at + 1, BLOCK_BYTES);
    if (unlikely(span_faults_now() != faults))
        return -EFAULT; /* the guest's memory vanished under the copy: publish nothing */
    if (likely(streamed))
        repoint(w, p, s, end(w, p, &h), MASK_FULL);
    else
        finish(w, p, at, &h, s);
    return 0;
}

/* Part of a block. */
static int write_part(struct writer *w, struct epoch_part *p, uint32_t disk, uint64_t block,
                      uint8_t mask, struct span_cursor *from)
{
    uint32_t faults = span_faults_now();
    struct index_slot *s = index_slot(&p->index, disk, block, w->expected_blocks);
    struct frame_header *at, h;
    uint8_t *payload, carried;
    int error = s ? merge(w, p, s, disk, block, mask, from, &carried) : -ENOMEM;

    if (unlikely(error))
        return error;
    at = begin(w, p, BLOCK_BYTES);
    h = header(w, disk, block, carried);
    payload = (uint8_t *)(at + 1);
    for (uint32_t i = 0; i < BLOCK_SECTORS; i++)
        if (carried & 1u << i) {
            memcpy(payload, w->scratch + i * SECTOR_BYTES, SECTOR_BYTES);
            payload += SECTOR_BYTES;
        }
    if (unlikely(span_faults_now() != faults))
        return -EFAULT;
    finish(w, p, at, &h, s);
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
    struct writer *w = group_writer(g, disk);
    struct epoch_part *p = w->open;

    if (sectors == 0) /* legal; a frame of no sectors is not */
        return 0;
    for (uint64_t block = sector / BLOCK_SECTORS; block * BLOCK_SECTORS < sector + sectors; block++) {
        uint8_t mask = block_mask(block, sector, sectors);
        int error = likely(mask == MASK_FULL) ? write_block(w, p, disk, block, from)
                                              : write_part(w, p, disk, block, mask, from);

        if (unlikely(error))
            return error;
    }
    return 0;
}

/* Whole blocks become zero: one frame; a slot for one, a range for more. */
static int zero_blocks(struct writer *w, struct epoch_part *p, uint32_t disk, uint64_t block,
                       uint64_t blocks, uint32_t flags)
{
    struct index_slot *s = NULL;
    struct frame_header *at;
    arena_loc loc;
    int error;

    if (blocks == 1) {
        s = index_slot(&p->index, disk, block, w->expected_blocks);
        if (!s)
            return -ENOMEM;
    }
    at = begin(w, p, 0);
    if (blocks > 1) {
        loc = arena_loc_of(p->raw.segment, p->raw.tail);
        error = epoch_put_range(w, p, disk, block, block + blocks, flags, loc);
        if (error)
            return error;
    }
    *at = (struct frame_header){.kind = FRAME_ZERO, .seq = w->seq++, .block = block,
                                .blocks = (uint32_t)blocks, .disk = (uint8_t)disk,
                                .mask = MASK_FULL, .flags = (uint8_t)flags};
    loc = end(w, p, at);
    w->zero_frames++;
    if (s)
        repoint(w, p, s, loc, MASK_FULL);
    return 0;
}

int epoch_zero(struct group *g, uint32_t disk, uint64_t sector, uint64_t sectors, uint32_t flags)
{
    static uint8_t zeroes[BLOCK_BYTES];
    struct writer *w = group_writer(g, disk);
    struct epoch_part *p = w->open;
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

        error = write_part(w, p, disk, block, block_mask(block, sector, sectors), &from);
    }
    if (!error && first < last)
        error = zero_blocks(w, p, disk, first, last - first, flags);
    if (!error && end_sector % BLOCK_SECTORS && last >= first) {
        struct span_cursor from = span_start(&span, 1);

        error = write_part(w, p, disk, last, block_mask(last, sector, sectors), &from);
    }
    return error;
}

/* ---- Reading -------------------------------------------------------------------------- */

/* All of the block, when that lies somewhere as it is; else NULL. */
static const uint8_t *whole_block(struct writer *w, arena_loc loc, uint64_t block, uint8_t want,
                                  int *error)
{
    const struct arena *a = &w->group->arena;
    const struct frame_header *h = arena_frame(a, loc);
    const uint8_t *cluster;

    if (unlikely(arena_spilled(a, loc)) || h->mask != MASK_FULL)
        return NULL; /* what lies in the file may go away at any time */
    if (h->kind == FRAME_RAW)
        return (const uint8_t *)(h + 1);
    if (h->kind != FRAME_CLUSTER)
        return NULL;
    cluster = cluster_expand(&w->expand, a, loc, h);
    if (!cluster) {
        *error = -EIO;
        return NULL;
    }
    w->expand.wanted_bytes += mask_bytes(want);
    return cluster + (block - h->block) * BLOCK_BYTES;
}

int epoch_read(struct group *g, uint32_t disk, uint64_t block, uint8_t want, uint8_t *out,
               const uint8_t **direct)
{
    struct writer *w = group_writer(g, disk);
    uint8_t found = 0;
    int error = 0;

    *direct = NULL;
    for (uint32_t i = g->epochs; i-- > 0 && found != want;) {
        const struct index *x = &g->epoch[i]->part[w->number].index;
        const struct index_slot *s = index_find(x, disk, block);
        uint8_t here = s ? s->mask & want & ~found : 0;

        if (here) {
            const uint8_t *at = here == want ? whole_block(w, s->loc, block, want, &error) : NULL;

            if (at) {
                *direct = at + (uint32_t)__builtin_ctz(want) * SECTOR_BYTES;
                return want;
            }
            if (error || frame_expand(&w->expand, &g->arena, s->loc, block, here, out)) {
                lost(w, s->loc);
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
