/* pack_job.c - the helper's part of packing: the frames of one segment, compressed or copied. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "checksum.h"
#include "crash.h"
#include "group.h"

/* ---- Writing frames ---------------------------------------------------------------------- */

static bool fits(const struct pack *p, const struct arena_cursor *at, uint32_t payload)
{
    return p->spare_used || arena_fits(at, payload);
}

/* A commit may have the other helper complete the source's checksums meanwhile. */
static struct frame_header header_of(const struct frame_header *h)
{
    struct frame_header to;

    memcpy((uint8_t *)&to + sizeof(to.crc), (const uint8_t *)h + sizeof(h->crc),
           sizeof(to) - sizeof(to.crc));
    to.crc = __atomic_load_n(&h->crc, __ATOMIC_RELAXED);
    return to;
}

/* Appends a frame with this header; seq: of a cluster's members, else NULL. */
static arena_loc store(struct pack *p, struct arena_cursor *at, const struct frame_header *h,
                       const uint64_t *seq, const void *payload)
{
    uint32_t seqs = seq ? h->blocks * (uint32_t)sizeof(*seq) : 0;
    struct frame_header *to;

    if (!arena_fits(at, h->payload_bytes)) {
        check(!p->spare_used); /* nothing grows, so one segment takes all of the source */
        p->spare_used = true;
        *at = (struct arena_cursor){.segment = p->spare};
    }
    to = arena_frame_begin(&p->group->arena, at);
    *to = header_of(h);
    if (seq)
        memcpy(to + 1, seq, seqs);
    memcpy((uint8_t *)(to + 1) + seqs, payload, h->payload_bytes - seqs);
    if (!to->crc) /* a copy keeps its own: what has changed since is found by it */
        to->crc = frame_crc(to);
    p->stored += frame_bytes(h->payload_bytes);
    return arena_frame_end(&p->group->arena, at);
}

static void moved(struct pack *p, const struct frame_header *h, arena_loc old, arena_loc new)
{
    check(p->moves < PACK_FRAMES_MAX * 2);
    p->move[p->moves++] = (struct pack_move){
        .block = h->block, .blocks = h->blocks, .disk = h->disk, .old = old, .new = new,
        .range = h->kind == FRAME_ZERO && h->blocks > 1};
}

static void copy(struct pack *p, struct arena_cursor *at, arena_loc loc)
{
    const struct frame_header *h = pack_frame(p, loc);

    moved(p, h, loc, store(p, at, h, NULL, h + 1));
}

/* 0: it does not shrink to `room`. */
static uint32_t squeeze(struct worker *w, const void *from, uint32_t bytes, uint8_t *to,
                        uint32_t room)
{
    size_t got = ZSTD_compress2(w->compress, to, room, from, bytes);

    return ZSTD_isError(got) ? 0 : (uint32_t)got;
}

/* ---- Raw frames -------------------------------------------------------------------------- */

static arena_loc loc_of(const struct pack *p, const struct frame_header *h)
{
    return (arena_loc)((uint64_t)((const uint8_t *)h - p->group->arena.data) / FRAME_ALIGN);
}

static void keep_raw(struct pack *p, struct arena_cursor *at, const struct frame_header *h)
{
    copy(p, at, loc_of(p, h));
    p->raw++;
    p->bytes_in += h->payload_bytes;
    p->bytes_out += h->payload_bytes;
}

/* What does not shrink by an eighth is not worth expanding again. */
static uint32_t worth(uint32_t bytes)
{
    return bytes - bytes / 8;
}

static void pack_one(struct pack *p, struct worker *w, struct arena_cursor *at,
                     const struct frame_header *h)
{
    struct frame_header to = header_of(h);
    uint32_t bytes = squeeze(w, h + 1, h->payload_bytes, p->squeezed, worth(h->payload_bytes));

    if (!bytes) {
        keep_raw(p, at, h);
        return;
    }
    to.crc = 0;
    to.kind = FRAME_ZSTD;
    to.payload_bytes = bytes;
    moved(p, h, loc_of(p, h), store(p, at, &to, NULL, p->squeezed));
    p->compressed++;
    p->bytes_in += h->payload_bytes;
    p->bytes_out += bytes;
}

static struct frame_header cluster_header(const struct frame_header *first, uint32_t blocks,
                                          const uint64_t *seq, uint32_t bytes)
{
    struct frame_header h = {.kind = FRAME_CLUSTER, .block = first->block, .blocks = blocks,
                             .disk = first->disk, .mask = MASK_FULL,
                             .payload_bytes = blocks * (uint32_t)sizeof(*seq) + bytes};

    for (uint32_t i = 0; i < blocks; i++)
        h.seq = seq[i] > h.seq ? seq[i] : h.seq;
    return h;
}

/* Neighbours b[0..n-1]: one cluster, when that pays and there is room; else halves, or one by
 * one. */
static void pack_neighbours(struct pack *p, struct worker *w, struct arena_cursor *at,
                            const struct pack_block *b, uint32_t n)
{
    uint64_t seq[CLUSTER_BLOCKS];
    struct frame_header h;
    uint32_t bytes;
    arena_loc loc;

    if (n == 1) {
        pack_one(p, w, at, b->frame);
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        memcpy(p->plain + i * BLOCK_BYTES, b[i].frame + 1, BLOCK_BYTES);
        seq[i] = b[i].seq;
    }
    bytes = squeeze(w, p->plain, n * BLOCK_BYTES, p->squeezed, worth(n * BLOCK_BYTES));
    if (!bytes) {
        for (uint32_t i = 0; i < n; i++)
            keep_raw(p, at, b[i].frame);
        return;
    }
    h = cluster_header(b->frame, n, seq, bytes);
    if (!fits(p, at, h.payload_bytes)) {
        pack_neighbours(p, w, at, b, n / 2);
        pack_neighbours(p, w, at, b + n / 2, n - n / 2);
        return;
    }
    loc = store(p, at, &h, seq, p->squeezed);
    for (uint32_t i = 0; i < n; i++)
        moved(p, b[i].frame, loc_of(p, b[i].frame), loc);
    p->compressed += n;
    p->clusters++;
    p->bytes_in += n * BLOCK_BYTES;
    p->bytes_out += bytes;
}

static int by_place(const void *a, const void *b)
{
    const struct pack_block *x = a, *y = b;

    if (x->place != y->place)
        return x->place < y->place ? -1 : 1;
    return x->seq < y->seq ? -1 : x->seq > y->seq;
}

/* Blocks by place; of several versions the newest, the others are dead. */
static void sort_blocks(struct pack *p)
{
    uint32_t n = 0;

    if (p->blocks > 1)
        qsort(p->block, p->blocks, sizeof(*p->block), by_place);
    for (uint32_t i = 0; i < p->blocks; i++)
        if (i + 1 == p->blocks || p->block[i + 1].place != p->block[i].place)
            p->block[n++] = p->block[i];
    p->blocks = n;
}

/* Do a few blocks from all over the segment shrink, one at least? */
static bool probe(struct pack *p, struct worker *w)
{
    for (uint32_t i = 0; i < PACK_PROBE; i++) {
        const struct pack_block *b = &p->block[(uint64_t)i * p->blocks / PACK_PROBE];

        if (squeeze(w, b->frame + 1, BLOCK_BYTES, p->squeezed, worth(BLOCK_BYTES)))
            return true;
    }
    return false;
}

static bool cancelled(const struct pack *p)
{
    return __atomic_load_n(&p->cancel, __ATOMIC_RELAXED);
}

static void pack_blocks(struct pack *p, struct worker *w, struct arena_cursor *at)
{
    bool tried = false;
    uint32_t n;

    for (uint32_t i = 0; i < p->blocks && !cancelled(p); i += n) {
        for (n = 1; n < CLUSTER_BLOCKS && i + n < p->blocks &&
                    p->block[i + n].place == p->block[i].place + n; n++)
            ;
        /* At once when the last segment was no good, else when this one begins badly. */
        if (!tried && p->blocks >= PACK_PROBE && p->compressed == 0 &&
            (p->streak > 0 || p->raw >= PACK_PROBE)) {
            tried = true;
            if (!probe(p, w)) {
                p->incompressible = true;
                return;
            }
        }
        pack_neighbours(p, w, at, &p->block[i], n);
    }
}

/* ---- Worn clusters ----------------------------------------------------------------------- */

/* The living members without the dead ones; false: that would gain nothing. */
static bool pack_alive(struct pack *p, struct worker *w, struct arena_cursor *at, arena_loc loc,
                       uint8_t alive)
{
    const struct frame_header *old = pack_frame(p, loc);
    const uint8_t *plain = old->crc == frame_crc(old)
                               ? cluster_expand(&w->expand, &p->group->arena, loc, old) : NULL;
    struct frame_header h[CLUSTER_BLOCKS / 2 + 1];
    uint32_t first[CLUSTER_BLOCKS / 2 + 1], runs = 0, used = 0, total = 0, n, bytes;

    for (uint32_t i = 0; plain && i < old->blocks; i += n) {
        const uint64_t *seq = cluster_seq(old) + i;

        for (n = 1; i + n < old->blocks && (alive >> (i + n) & 1) == (alive >> i & 1); n++)
            ;
        if (!(alive >> i & 1))
            continue;
        bytes = squeeze(w, plain + i * BLOCK_BYTES, n * BLOCK_BYTES, p->squeezed + used,
                        worth(n * BLOCK_BYTES));
        if (!bytes)
            return false;
        h[runs] = cluster_header(old, n, seq, bytes);
        h[runs].block = old->block + i;
        if (n == 1) {
            h[runs].kind = FRAME_ZSTD;
            h[runs].payload_bytes = bytes;
        }
        total += frame_bytes(h[runs].payload_bytes);
        used += bytes;
        first[runs++] = i;
    }
    if (!plain || total >= frame_bytes(old->payload_bytes))
        return false;
    used = 0;
    for (uint32_t i = 0; i < runs; i++) {
        const uint64_t *seq = h[i].blocks > 1 ? cluster_seq(old) + first[i] : NULL;

        moved(p, &h[i], loc, store(p, at, &h[i], seq, p->squeezed + used));
        used += h[i].payload_bytes - (seq ? h[i].blocks * (uint32_t)sizeof(*seq) : 0);
    }
    return true;
}

static bool partly_dead(const struct frame_header *h, uint8_t alive)
{
    if (h->kind != FRAME_CLUSTER)
        return false;
    return (~alive & ((1u << h->blocks) - 1)) != 0;
}

/* ---- The job ----------------------------------------------------------------------------- */

/* All frames of the source, dead or alive. */
static void take_all(struct pack *p)
{
    const struct arena *a = &p->group->arena;
    uint32_t tail = arena_tail(a, p->source), offset = 0, at = 0;

    while (arena_frame_next(a, p->source, tail, &offset)) {
        p->frame[p->frames++] = (struct pack_source){.loc = arena_loc_of(p->source, at),
                                                     .alive = UINT8_MAX};
        at = offset;
    }
}

static void pack_frames(struct pack *p, struct worker *w, struct arena_cursor *at)
{
    for (uint32_t i = 0; i < p->frames && !cancelled(p); i++) {
        const struct pack_source *f = &p->frame[i];
        const struct frame_header *h = pack_frame(p, f->loc);

        if (p->reclaim) {
            if (!partly_dead(h, f->alive) || !pack_alive(p, w, at, f->loc, f->alive))
                copy(p, at, f->loc);
        } else if (h->kind == FRAME_RAW && h->mask == MASK_FULL) {
            check(p->blocks < PACK_BLOCKS_MAX);
            p->block[p->blocks++] = (struct pack_block){
                .place = (uint64_t)h->disk << 48 | h->block, .seq = h->seq, .frame = h};
        } else if (h->kind == FRAME_RAW) {
            pack_one(p, w, at, h);
        } else {
            copy(p, at, f->loc);
        }
    }
}

void pack_run(struct job *job, struct worker *w)
{
    struct pack *p = job->owner;
    struct arena_cursor at = p->out;
    struct timespec start, stop;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
    p->dictionary = squeezer_use(&w->squeezer, &p->group->dictionaries, w->compress, p->level);
    if (!p->gathered)
        take_all(p);
    pack_frames(p, w, &at);
    sort_blocks(p);
    pack_blocks(p, w, &at);
    p->out = at;
    crash_point("pack-before-index");
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &stop);
    p->ns = (uint64_t)(stop.tv_sec - start.tv_sec) * 1000000000u + (uint64_t)stop.tv_nsec -
            (uint64_t)start.tv_nsec;
}
