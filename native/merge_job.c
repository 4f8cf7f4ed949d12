/* merge_job.c - the helper's part of merging: the living blocks of many segments, by place. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "checksum.h"
#include "crash.h"
#include "group.h"

static bool ended(const struct merge *m)
{
    return __atomic_load_n(&m->cancel, __ATOMIC_RELAXED) ||
           __atomic_load_n(&m->stop, __ATOMIC_RELAXED);
}

/* ---- Writing frames ---------------------------------------------------------------------- */

/* Room for so much payload, of which the first block has this place; false: there is none left. */
static bool room(struct merge *m, uint32_t payload, uint64_t place)
{
    if (!arena_fits(&m->to, payload)) {
        if (m->used == m->outputs)
            return false;
        m->to = (struct arena_cursor){.segment = m->output[m->used]};
        m->first[m->used++] = place;
    }
    return true;
}

/* As pack_job.c's. seq: of a cluster's members, else NULL. */
static arena_loc store(struct merge *m, const struct frame_header *h, const uint64_t *seq,
                       const void *payload)
{
    uint32_t seqs = seq ? h->blocks * (uint32_t)sizeof(*seq) : 0;
    struct frame_header *to = arena_frame_begin(&m->group->arena, &m->to);

    *to = *h;
    if (seq)
        memcpy(to + 1, seq, seqs);
    memcpy((uint8_t *)(to + 1) + seqs, payload, h->payload_bytes - seqs);
    if (!to->crc)
        to->crc = frame_crc(to);
    m->stored += frame_bytes(h->payload_bytes);
    m->last[m->used - 1] = ((uint64_t)h->disk << 48 | h->block) + h->blocks - 1;
    return arena_frame_end(&m->group->arena, &m->to);
}

static void moved(struct merge *m, uint64_t place, uint32_t blocks, bool range, arena_loc old,
                  arena_loc new)
{
    check(m->moves < MERGE_BLOCKS_MAX);
    m->move[m->moves++] = (struct pack_move){
        .disk = (uint8_t)(place >> 48), .block = place & ((1ull << 48) - 1), .blocks = blocks,
        .old = old, .new = new, .range = range};
}

/* The frame as it is; of a cluster, b may be the first of its members. */
static bool copy(struct merge *m, const struct merge_block *b)
{
    const struct frame_header *h = arena_frame(&m->group->arena, b->loc);

    if (!room(m, h->payload_bytes, b->place))
        return false;
    moved(m, (uint64_t)h->disk << 48 | h->block, h->blocks, h->kind == FRAME_ZERO && h->blocks > 1, b->loc,
          store(m, h, NULL, h + 1));
    return true;
}

/* All that is at m->plain, of which so much counts; 0: that does not shrink by an eighth. */
static uint32_t squeeze(struct worker *w, struct merge *m, uint32_t bytes, uint32_t counts)
{
    size_t got = ZSTD_compress2(w->compress, m->squeezed, counts - counts / 8, m->plain, bytes);

    return ZSTD_isError(got) ? 0 : (uint32_t)got;
}

/* ---- Neighbours -------------------------------------------------------------------------- */

static bool of_cluster(const struct merge *m, const struct merge_block *b)
{
    return arena_frame(&m->group->arena, b->loc)->kind == FRAME_CLUSTER;
}

/* Block i of b, which lies expanded at `from`, in a frame of its own. */
static bool put_alone(struct merge *m, struct worker *w, const struct merge_block *b,
                      const uint8_t *from)
{
    struct frame_header h = {.disk = (uint8_t)(b->place >> 48), .kind = FRAME_RAW, .blocks = 1,
                             .block = b->place & ((1ull << 48) - 1), .mask = MASK_FULL,
                             .seq = b->seq, .payload_bytes = BLOCK_BYTES};
    uint32_t bytes;

    memmove(m->plain, from, BLOCK_BYTES);
    bytes = squeeze(w, m, BLOCK_BYTES, BLOCK_BYTES);
    if (bytes > 0) {
        h.kind = FRAME_ZSTD;
        h.payload_bytes = bytes;
    }
    if (!room(m, h.payload_bytes, b->place))
        return false;
    moved(m, b->place, 1, false, b->loc, store(m, &h, NULL, bytes > 0 ? m->squeezed : m->plain));
    return true;
}

/* One by one: those of clusters anew, others as they are. */
static bool put_each(struct merge *m, struct worker *w, const struct merge_block *b, uint32_t n)
{
    uint8_t one[BLOCK_BYTES];

    for (uint32_t i = 0; i < n; i++) {
        bool good = of_cluster(m, &b[i])
                        ? frame_expand(&w->expand, &m->group->arena, b[i].loc,
                                       b[i].place & ((1ull << 48) - 1), MASK_FULL, one) == 0 &&
                              put_alone(m, w, &b[i], one)
                        : copy(m, &b[i]);

        if (!good)
            return false;
    }
    return true;
}

static bool put_cluster(struct merge *m, const struct merge_block *b, uint32_t n, uint32_t span,
                        uint32_t bytes)
{
    struct frame_header h = {.disk = (uint8_t)(b->place >> 48), .kind = FRAME_CLUSTER,
                             .block = b->place & ((1ull << 48) - 1), .blocks = span,
                             .mask = MASK_FULL};
    uint64_t seq[CLUSTER_BLOCKS] = {0};
    arena_loc loc;

    for (uint32_t i = 0; i < n; i++) {
        seq[b[i].place - b->place] = b[i].seq;
        h.seq = b[i].seq > h.seq ? b[i].seq : h.seq;
    }
    h.payload_bytes = span * (uint32_t)sizeof(*seq) + bytes;
    if (!room(m, h.payload_bytes, b->place))
        return false;
    loc = store(m, &h, seq, m->squeezed);
    for (uint32_t i = 0; i < n; i++)
        moved(m, b[i].place, 1, false, b[i].loc, loc);
    m->clusters++;
    m->merged += n;
    return true;
}

/* Bytes that the blocks take now. */
static uint32_t stored_now(const struct merge *m, const struct merge_block *b, uint32_t n,
                           bool *raw)
{
    uint32_t bytes = 0;

    *raw = true;
    for (uint32_t i = 0; i < n; i++) {
        const struct frame_header *h = arena_frame(&m->group->arena, b[i].loc);

        bytes += frame_bytes(h->payload_bytes);
        if (h->kind == FRAME_CLUSTER)
            bytes -= frame_bytes(h->payload_bytes) -
                     frame_bytes(h->payload_bytes) / (uint32_t)__builtin_popcount(cluster_members(h));
        *raw &= h->kind == FRAME_RAW;
    }
    return bytes;
}

/* Are these just the members of one cluster? */
static bool unchanged(const struct merge *m, const struct merge_block *b, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++)
        if (b[i].loc != b->loc)
            return false;
    return of_cluster(m, b) &&
           n == (uint32_t)__builtin_popcount(cluster_members(arena_frame(&m->group->arena, b->loc)));
}

/* All of b[0..n-1] side by side, zeroes where there is none. */
static bool expand(struct merge *m, struct worker *w, const struct merge_block *b, uint32_t n,
                   uint32_t span)
{
    memset(m->plain, 0, span * BLOCK_BYTES);
    for (uint32_t i = 0; i < n; i++)
        if (frame_expand(&w->expand, &m->group->arena, b[i].loc, b[i].place & ((1ull << 48) - 1),
                         MASK_FULL, m->plain + (b[i].place - b->place) * BLOCK_BYTES))
            return false;
    return true;
}

/* b[0..n-1] are of the same eight places. False: there is no more room, or one does not expand. */
static bool put(struct merge *m, struct worker *w, const struct merge_block *b, uint32_t n)
{
    uint32_t span = (uint32_t)(b[n - 1].place - b->place) + 1, bytes, before, after;
    bool raw;

    if (unchanged(m, b, n))
        return copy(m, b);
    before = stored_now(m, b, n, &raw);
    if (n == 1 || raw) /* what did not shrink alone hardly does together */
        return put_each(m, w, b, n);
    if (!expand(m, w, b, n, span))
        return false;
    bytes = squeeze(w, m, span * BLOCK_BYTES, n * BLOCK_BYTES);
    after = frame_bytes(bytes + span * (uint32_t)sizeof(uint64_t));
    if (bytes == 0 || after >= before || after > SEGMENT_BYTES)
        return put_each(m, w, b, n);
    m->bytes_in += before;
    m->bytes_out += after;
    return put_cluster(m, b, n, span, bytes);
}

/* ---- The job ----------------------------------------------------------------------------- */

/* Not whole blocks, or a cluster with next to all that it can have. */
static bool leave(const struct frame_header *h, uint8_t alive)
{
    if (h->mask != MASK_FULL || h->kind == FRAME_ZERO)
        return true;
    return h->kind == FRAME_CLUSTER && __builtin_popcount(alive) >= (int)CLUSTER_BLOCKS - 1;
}

bool merge_settled(const struct frame_header *h, uint8_t alive)
{
    if (h->kind != FRAME_CLUSTER)
        return h->mask != MASK_FULL || h->kind == FRAME_ZERO;
    return __builtin_popcount(alive) >= (int)CLUSTER_BLOCKS / 2 && alive == cluster_members(h);
}

static void collect(struct merge *m)
{
    for (uint32_t i = 0; i < m->frames; i++) {
        const struct pack_source *f = &m->frame[i];
        const struct frame_header *h = arena_frame(&m->group->arena, f->loc);
        uint64_t place = (uint64_t)h->disk << 48 | h->block;

        /* What is not what it was must go on being found by its checksum. */
        if (leave(h, f->alive) || h->crc != frame_crc(h)) {
            m->block[m->blocks++] = (struct merge_block){.place = place, .loc = f->loc,
                                                         .whole = true};
            continue;
        }
        for (uint32_t n = 0; n < h->blocks; n++)
            if (f->alive >> n & 1)
                m->block[m->blocks++] = (struct merge_block){
                    .place = place + n, .loc = f->loc,
                    .seq = h->kind == FRAME_CLUSTER ? cluster_seq(h)[n] : h->seq};
    }
}

static int by_place(const void *a, const void *b)
{
    const struct merge_block *x = a, *y = b;

    return x->place < y->place ? -1 : x->place > y->place;
}

static uint32_t neighbours(const struct merge_block *b, uint32_t left)
{
    uint32_t n = 1;

    while (n < left && !b[n].whole &&
           b[n].place / CLUSTER_BLOCKS == b->place / CLUSTER_BLOCKS)
        n++;
    return n;
}

void merge_run(struct job *job, struct worker *w)
{
    struct merge *m = job->owner;
    struct timespec start, stop;
    bool good = true;
    uint32_t n;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
    m->dictionary = squeezer_use(&w->squeezer, &m->group->dictionaries, w->compress, m->level);
    collect(m);
    qsort(m->block, m->blocks, sizeof(*m->block), by_place);
    for (uint32_t i = 0; i < m->blocks && good && !ended(m); i += n) {
        n = m->block[i].whole ? 1 : neighbours(&m->block[i], m->blocks - i);
        good = m->block[i].whole ? copy(m, &m->block[i]) : put(m, w, &m->block[i], n);
    }
    crash_point("merge-before-index");
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &stop);
    m->ns = (uint64_t)(stop.tv_sec - start.tv_sec) * 1000000000u + (uint64_t)stop.tv_nsec -
            (uint64_t)start.tv_nsec;
}
