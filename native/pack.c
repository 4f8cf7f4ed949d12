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
    f->moved = true;
}

static void run(struct job *job, struct worker *w)
{
    struct pack *p = job->owner;
    struct arena_cursor at = p->out;
    struct timespec start, stop;

    clock_gettime(CLOCK_MONOTONIC, &start);
    for (uint32_t i = 0; i < p->frames; i++) {
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

/* ---- On the reactor ------------------------------------------------------------------- */

/* Nothing was gained: take the output back, keep the source as it is. */
static void undo(struct group *g, struct pack *p, struct epoch *e)
{
    if (p->spare_used) {
        g->arena.desc[p->spare].tail = 0;
        p->out = e->packed;
    }
    if (e->packed.segment != SEGMENT_NONE)
        __atomic_store_n(&g->arena.desc[e->packed.segment].tail, e->packed.tail, __ATOMIC_RELEASE);
    p->spare_used = false;
    segment_list_append(&g->arena, &e->kept_list, p->source);
    g->stats.incompressible_frames += p->frames;
}

static void repoint(struct epoch *e, const struct pack_frame *f, const struct frame_header *h)
{
    if (h->blocks > ZERO_SLOTS_MAX)
        return; /* a range, which has no place */
    for (uint32_t i = 0; i < h->blocks; i++) {
        struct index_slot *s = index_find(&e->index, h->disk, h->block + i);

        if (s && s->loc == f->old)
            s->loc = f->new;
    }
}

static void adopt(struct group *g, struct pack *p, struct epoch *e)
{
    for (uint32_t i = 0; i < p->frames; i++)
        repoint(e, &p->frame[i], arena_frame(&g->arena, p->frame[i].new));
    if (p->spare_used)
        segment_list_append(&g->arena, &e->kept_list, p->spare);
    e->packed = p->out;
    e->stored_bytes += p->bytes_out;
    e->stored_bytes -= arena_tail(&g->arena, p->source);
    crash_point("pack-before-free");
    arena_segment_free(&g->arena, p->source);
    g->stats.compressed_frames += p->compressed;
    g->stats.incompressible_frames += p->raw;
}

static void done(struct job *job)
{
    struct pack *p = job->owner;
    struct group *g = p->group;
    struct epoch *e = p->epoch;

    p->busy = false;
    g->stats.compress_ns += p->ns;
    if (p->incompressible)
        undo(g, p, e);
    else
        adopt(g, p, e);
    if (!p->spare_used)
        arena_segment_free(&g->arena, p->spare);
    epoch_job_done(g, e);
}

/* Frames of the source that the index still points at. */
static void gather(struct group *g, struct pack *p, struct epoch *e)
{
    uint32_t tail = arena_tail(&g->arena, p->source), offset = 0, at = 0;
    struct frame_header *h;

    p->frames = 0;
    p->live_bytes = 0;
    while ((h = arena_frame_next(&g->arena, p->source, tail, &offset))) {
        arena_loc loc = arena_loc_of(p->source, at);
        const struct index_slot *s = NULL;

        if (h->blocks == 1)
            s = index_find(&e->index, h->disk, h->block);
        if (h->blocks > 1 || (s && s->mask && s->loc == loc)) {
            p->frame[p->frames++] = (struct pack_frame){.old = loc};
            p->live_bytes += offset - at;
        } else {
            p->dead++;
        }
        at = offset;
    }
}

#define RECLAIM_PERCENT 75u

static bool may_pack(const struct group *g, const struct epoch *e)
{
    uint32_t lag = 0;

    if (e->frozen || e->raw_list.count == 0)
        return false;
    if (e->state == CORE_EPOCH_OPEN)
        lag = group_pressure_percent(g) < 25 ? PACK_LAG : 1;
    return e->raw_list.count > lag;
}

/* Under pressure a pass over the kept segments begins when it can gain something. */
static bool may_reclaim(const struct group *g, struct epoch *e)
{
    if (e->frozen || e->kept_list.count == 0)
        return false;
    if (e->reclaim_left == 0 && group_pressure_percent(g) >= RECLAIM_PERCENT &&
        e->overwritten - e->reclaim_mark >= SEGMENT_FRAMES_MIN) {
        e->reclaim_left = e->kept_list.count;
        e->reclaim_mark = e->overwritten;
    }
    return e->reclaim_left > 0;
}

static void start_job(struct group *g, struct pack *p, struct epoch *e)
{
    p->job = (struct job){.run = run, .done = done, .owner = p};
    p->out = e->packed;
    p->spare = arena_segment_take(&g->arena, e->id, SEGMENT_PACKED);
    p->spare_used = p->incompressible = false;
    p->bytes_out = p->compressed = p->raw = p->ns = 0;
    check(worker_submit(&g->worker, &p->job, false));
    p->busy = true;
    e->jobs++;
}

/* The segment is out of its list: free it, copy it together, compress it or keep it. */
static void take_source(struct group *g, struct pack *p, struct epoch *e)
{
    uint32_t tail = arena_tail(&g->arena, p->source);

    p->dead = 0;
    if (p->source == e->packed.segment) { /* the output is not its own source */
        segment_list_append(&g->arena, &e->kept_list, p->source);
        return;
    }
    gather(g, p, e);
    if (p->frames == 0) {
        e->stored_bytes -= tail;
        arena_segment_free(&g->arena, p->source);
    } else if (p->copy_only && p->live_bytes > tail / 2) {
        segment_list_append(&g->arena, &e->kept_list, p->source);
        return; /* its dead frames stay */
    } else {
        start_job(g, p, e);
    }
    g->stats.dropped_frames += p->dead;
}

bool pack_step(struct group *g)
{
    struct pack *p = &g->pack;
    struct epoch *e = NULL;

    if (p->busy || g->arena.free_count == 0 || g->worker.outstanding == WORKER_RING)
        return false;
    for (uint32_t i = 0; i < g->epochs && !e; i++)
        if (may_pack(g, g->epoch[i]) || may_reclaim(g, g->epoch[i]))
            e = g->epoch[i];
    if (!e)
        return false;
    p->group = g;
    p->epoch = e;
    p->copy_only = g->config.compress_level == 0;
    if (may_pack(g, e)) {
        p->source = segment_list_pop(&g->arena, &e->raw_list);
        if (p->source == e->raw.segment)
            e->raw.segment = SEGMENT_NONE;
    } else {
        p->source = segment_list_pop(&g->arena, &e->kept_list);
        p->copy_only = true;
        e->reclaim_left--;
    }
    take_source(g, p, e);
    return true;
}
