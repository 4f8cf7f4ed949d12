/* pack.c - see pack.h. */
#include "pack.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "checksum.h"
#include "crash.h"
#include "group.h"

int pack_init(struct group *g)
{
    segment_list_init(&g->pack.dead_list);
    g->pack.frame = calloc(PACK_FRAMES_MAX, sizeof(*g->pack.frame));
    return g->pack.frame ? 0 : -ENOMEM;
}

void pack_free(struct group *g)
{
    free(g->pack.frame);
    g->pack.frame = NULL;
}

/* ---- On the helper -------------------------------------------------------------------- */

/* The next frame's header in the output; goes over to the spare segment when full. */
static struct frame_header *out_begin(struct pack *p, struct arena_cursor *at, uint32_t payload)
{
    if (!arena_fits(at, payload)) {
        check(!p->spare_used); /* no frame grows, so one segment takes all of the source */
        p->spare_used = true;
        *at = (struct arena_cursor){.segment = p->spare};
    }
    return arena_frame_begin(&p->group->arena, at);
}

static void pack_one(struct pack *p, struct worker *w, struct arena_cursor *at,
                     struct pack_frame *f)
{
    const struct frame_header *from = arena_frame(&p->group->arena, f->old);
    struct frame_header *to = out_begin(p, at, from->payload_bytes);
    uint8_t *payload = (uint8_t *)(to + 1);

    *to = *from;
    if (from->kind == FRAME_RAW && !p->copy_only) {
        /* One FRAME_ALIGN less than raw, or it is not worth expanding again. */
        size_t room = from->payload_bytes - FRAME_ALIGN;
        size_t bytes = ZSTD_compressCCtx(w->compress, payload, room, from + 1,
                                         from->payload_bytes, p->group->config.compress_level);
        if (ZSTD_isError(bytes)) {
            memcpy(payload, from + 1, from->payload_bytes);
            p->raw++;
        } else {
            to->kind = FRAME_ZSTD;
            to->payload_bytes = (uint32_t)bytes;
            p->compressed++;
        }
    } else {
        memcpy(payload, from + 1, from->payload_bytes);
    }
    to->crc = frame_crc(to);
    p->bytes_out += frame_bytes(to->payload_bytes);
    f->new = arena_frame_end(&p->group->arena, at);
    f->block = to->block;
    f->blocks = to->blocks;
    f->disk = to->disk;
}

/* All frames of the source, dead or alive. */
static void take_all(struct pack *p)
{
    const struct arena *a = &p->group->arena;
    uint32_t tail = arena_tail(a, p->source), offset = 0, at = 0;

    while (arena_frame_next(a, p->source, tail, &offset)) {
        p->frame[p->frames++].old = arena_loc_of(p->source, at);
        at = offset;
    }
}

static void run(struct job *job, struct worker *w)
{
    struct pack *p = job->owner;
    struct arena_cursor at = p->out;
    struct timespec start, stop;

    clock_gettime(CLOCK_MONOTONIC, &start);
    if (!p->gathered)
        take_all(p);
    for (uint32_t i = 0; i < p->frames; i++) {
        if (__atomic_load_n(&p->cancel, __ATOMIC_RELAXED))
            break;
        pack_one(p, w, &at, &p->frame[i]);
        if (p->raw == PACK_PROBE && p->compressed == 0) {
            p->incompressible = true;
            break;
        }
    }
    p->out = at;
    crash_point("pack-before-index");
    clock_gettime(CLOCK_MONOTONIC, &stop);
    p->ns = (uint64_t)(stop.tv_sec - start.tv_sec) * 1000000000u + (uint64_t)stop.tv_nsec -
            (uint64_t)start.tv_nsec;
}

/* ---- What is dead ------------------------------------------------------------------------ */

/* A kept segment that nothing is added to any more: from now on it may be worn. */
static void watch(struct group *g, struct epoch *e, uint32_t segment)
{
    struct segment_use *u = &g->arena.use[segment];

    u->worn_at = u->slots / 2 > 0 ? u->slots / 2 : 1;
    if (u->dead >= u->worn_at || u->slots == 0)
        pack_worn(g, e, segment);
}

void pack_worn(struct group *g, struct epoch *e, uint32_t segment)
{
    struct segment_use *u = &g->arena.use[segment];
    bool worn = u->worn_at == u->slots && u->slots > 1;

    if (u->dead < u->slots) {
        segment_list_remove(&g->arena, &e->kept_list, segment);
        segment_list_append(&g->arena, &e->worn_list, segment);
        u->worn_at = u->slots;
        pack_look(g);
        return;
    }
    segment_list_remove(&g->arena, worn ? &e->worn_list : &e->kept_list, segment);
    segment_list_append(&g->arena, &g->pack.dead_list, segment);
    e->stored_bytes -= arena_tail(&g->arena, segment);
    g->stats.dropped_frames += u->dead;
}

static void keep(struct group *g, struct epoch *e, uint32_t segment)
{
    segment_list_append(&g->arena, &e->kept_list, segment);
    watch(g, e, segment);
}

void pack_recounted(struct group *g, struct epoch *e)
{
    struct segment_list l = e->kept_list;

    segment_list_init(&e->kept_list);
    while (l.count > 0)
        keep(g, e, segment_list_pop(&g->arena, &l));
}

/* ---- After the job ----------------------------------------------------------------------- */

static void finish(struct group *g, struct pack *p, struct epoch *e)
{
    if (!p->spare_used)
        arena_segment_free(&g->arena, p->spare);
    p->phase = PACK_IDLE;
    pack_look(g);
    epoch_job_done(g, e);
}

/* Nothing was gained: take the output back, keep the source as it is. */
static void undo(struct group *g, struct pack *p, struct epoch *e)
{
    if (p->spare_used)
        g->arena.desc[p->spare].tail = 0;
    if (e->packed.segment != SEGMENT_NONE)
        __atomic_store_n(&g->arena.desc[e->packed.segment].tail, e->packed.tail, __ATOMIC_RELEASE);
    p->spare_used = false;
    if (p->incompressible) {
        g->stats.incompressible_frames += p->frames;
        keep(g, e, p->source);
    } else if (p->reclaim) {
        keep(g, e, p->source);
    } else {
        segment_list_append(&g->arena, &e->raw_list, p->source);
    }
    finish(g, p, e);
}

static void done(struct job *job)
{
    struct pack *p = job->owner;
    struct group *g = p->group;
    struct epoch *e = p->epoch;

    g->stats.compress_ns += p->ns;
    if (p->incompressible || p->cancel || e->dropped) {
        undo(g, p, e);
        return;
    }
    if (p->spare_used)
        segment_list_append(&g->arena, &e->kept_list, p->spare);
    p->next = 0;
    p->phase = PACK_ADOPT;
}

static void repoint(struct group *g, struct epoch *e, const struct pack_frame *f)
{
    struct segment_use *u = &g->arena.use[arena_loc_segment(f->new)];

    if (f->blocks > ZERO_SLOTS_MAX) {
        u->slots++; /* a range, which has no place */
        return;
    }
    for (uint32_t i = 0; i < f->blocks; i++) {
        struct index_slot *s = index_find(&e->index, f->disk, f->block + i);

        if (s && s->mask && s->loc == f->old) {
            s->loc = f->new;
            u->slots++;
        }
    }
}

/* The source has no slots any more. */
static void adopted(struct group *g, struct pack *p, struct epoch *e)
{
    uint32_t before = e->packed.segment;

    e->packed = p->out;
    if (p->spare_used && before != SEGMENT_NONE)
        watch(g, e, before);
    e->stored_bytes += p->bytes_out;
    e->stored_bytes -= arena_tail(&g->arena, p->source);
    crash_point("pack-before-free");
    arena_segment_free(&g->arena, p->source);
    g->stats.compressed_frames += p->compressed;
    g->stats.incompressible_frames += p->raw;
    finish(g, p, e);
}

static uint32_t piece_end(const struct pack *p)
{
    return p->frames - p->next < PACK_PIECE ? p->frames : p->next + PACK_PIECE;
}

static void adopt_piece(struct group *g, struct pack *p, struct epoch *e)
{
    uint32_t end = piece_end(p);

    if (!e->dropped) {
        for (uint32_t i = p->next; i < end; i++)
            index_prefetch(&e->index, p->frame[i].disk, p->frame[i].block);
        for (uint32_t i = p->next; i < end; i++)
            repoint(g, e, &p->frame[i]);
    }
    p->next = end;
    if (end == p->frames)
        adopted(g, p, e);
}

/* ---- Before the job ---------------------------------------------------------------------- */

static void start_job(struct group *g, struct pack *p)
{
    p->job = (struct job){.run = run, .done = done, .owner = p};
    check(worker_submit(&g->worker, &p->job, false));
    p->phase = PACK_JOB;
}

/* Is the index's newest frame of these blocks still this one? */
static bool alive(const struct epoch *e, const struct frame_header *h, arena_loc loc)
{
    const struct index_slot *s;

    if (h->blocks > 1)
        return true;
    s = index_find(&e->index, h->disk, h->block);
    return s && s->mask && s->loc == loc;
}

/* The next frames of the source: those alive are taken. */
static void gather_piece(struct group *g, struct pack *p, struct epoch *e)
{
    uint32_t tail = arena_tail(&g->arena, p->source), n = 0;
    const struct frame_header *piece[PACK_PIECE], *h;

    while (n < PACK_PIECE && (h = arena_frame_next(&g->arena, p->source, tail, &p->source_offset))) {
        index_prefetch(&e->index, h->disk, h->block);
        piece[n++] = h;
    }
    for (uint32_t i = 0; i < n; i++) {
        arena_loc loc = arena_loc_of(
            p->source, (uint32_t)((const uint8_t *)piece[i] - arena_segment(&g->arena, p->source)));

        if (alive(e, piece[i], loc))
            p->frame[p->frames++].old = loc;
        else
            g->stats.dropped_frames++;
    }
    if (n == PACK_PIECE && p->source_offset < tail)
        return;
    p->gathered = true;
    start_job(g, p);
}

#define RECLAIM_PERCENT 75u

static bool may_pack(const struct group *g, const struct epoch *e)
{
    uint32_t lag = 0;

    if (e->state == CORE_EPOCH_OPEN)
        lag = group_pressure_percent(g) < 25 ? PACK_LAG : 1;
    return e->raw_list.count > lag;
}

static bool may_reclaim(const struct group *g, const struct epoch *e)
{
    return e->worn_list.count > 0 && group_pressure_percent(g) >= RECLAIM_PERCENT;
}

static void begin(struct group *g, struct pack *p, struct epoch *e)
{
    p->group = g;
    p->epoch = e;
    p->out = e->packed;
    p->spare = arena_segment_take(&g->arena, e->id, SEGMENT_PACKED);
    p->spare_used = p->incompressible = p->gathered = false;
    p->bytes_out = p->compressed = p->raw = p->ns = 0;
    p->frames = p->source_offset = p->cancel = 0;
    e->jobs++;
}

/* The epoch's next segment: to be compressed, or worn and to be copied together. */
static void take_source(struct group *g, struct pack *p, struct epoch *e)
{
    const struct segment_use *u;

    p->reclaim = !may_pack(g, e);
    p->copy_only = p->reclaim;
    p->source = segment_list_pop(&g->arena, p->reclaim ? &e->worn_list : &e->raw_list);
    if (p->source == e->raw.segment)
        e->raw.segment = SEGMENT_NONE;
    u = &g->arena.use[p->source];
    if (!p->reclaim && (g->config.compress_level == 0 || u->dead == u->slots)) {
        keep(g, e, p->source); /* and free it, when all is dead */
        return;
    }
    g->arena.use[p->source].worn_at = UINT32_MAX;
    begin(g, p, e);
    p->phase = PACK_GATHER;
    if (u->dead <= u->slots / 8) /* a few dead frames cost less than looking for them */
        start_job(g, p);
}

static bool choose(struct group *g, struct pack *p)
{
    p->look = false;
    for (uint32_t i = 0; i < g->epochs; i++) {
        struct epoch *e = g->epoch[i];

        if (e->frozen || (!may_pack(g, e) && !may_reclaim(g, e)))
            continue;
        p->look = true;
        if (g->arena.free_count == 0 || g->worker.outstanding == WORKER_RING)
            return false;
        take_source(g, p, e);
        return true;
    }
    return false;
}

bool pack_step(struct group *g)
{
    struct pack *p = &g->pack;

    while (unlikely(p->dead_list.count > 0))
        arena_segment_free(&g->arena, segment_list_pop(&g->arena, &p->dead_list));
    switch (p->phase) {
    case PACK_IDLE:
        return p->look && choose(g, p);
    case PACK_GATHER:
        if (p->epoch->frozen || p->epoch->dropped)
            undo(g, p, p->epoch);
        else if (g->worker.outstanding < WORKER_RING)
            gather_piece(g, p, p->epoch);
        return true;
    case PACK_JOB:
        if (p->epoch->frozen)
            __atomic_store_n(&p->cancel, 1, __ATOMIC_RELAXED);
        return false;
    case PACK_ADOPT:
        adopt_piece(g, p, p->epoch);
        return true;
    }
    return false;
}
