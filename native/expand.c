/* expand.c - see expand.h. */
#include "expand.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "checksum.h"

int expander_start(struct expander *x, struct dictionaries *d)
{
    memset(x, 0, sizeof(*x));
    x->dictionaries = d;
    x->context = ZSTD_createDCtx();
    x->block = aligned_alloc(PAGE, BLOCK_BYTES);
    x->frame = malloc(sizeof(*x->frame) + CLUSTER_BYTES);
    x->cluster = aligned_alloc(PAGE, EXPAND_CLUSTERS * CLUSTER_BYTES);
    return x->context && x->block && x->frame && x->cluster ? 0 : -ENOMEM;
}

void expander_stop(struct expander *x)
{
    ZSTD_freeDCtx(x->context);
    free(x->block);
    free(x->frame);
    free(x->cluster);
    memset(x, 0, sizeof(*x));
}

const struct frame_header *frame_get(struct expander *x, const struct arena *a, arena_loc loc)
{
    const struct frame_header *h = arena_frame(a, loc);
    uint32_t room = SEGMENT_BYTES - (uint32_t)((uint64_t)loc * FRAME_ALIGN % SEGMENT_BYTES);

    if (likely(!arena_spilled(a, loc)))
        return h;
    memcpy(x->frame, h, sizeof(*h));
    if (!frame_plausible(x->frame, room))
        return NULL;
    memcpy(x->frame + 1, h + 1, x->frame->payload_bytes);
    return x->frame->crc == frame_crc(x->frame) ? x->frame : NULL;
}

static bool unzstd(struct expander *x, const void *from, uint32_t bytes, uint8_t *to, uint32_t want)
{
    bool any = __atomic_load_n(&x->dictionaries->count, __ATOMIC_ACQUIRE) > 0;
    uint32_t id = any ? ZSTD_getDictID_fromFrame(from, bytes) : 0;
    const struct dictionary *d = id ? dictionary_by_id(x->dictionaries, id) : NULL;

    x->expanded_bytes += want;
    return ZSTD_decompress_usingDDict(x->context, to, want, from, bytes, d ? d->expand : NULL) ==
           want;
}

/* Where the cluster is kept, or the place that was not used for longest. */
static uint32_t find(const struct expander *x, arena_loc loc, uint32_t generation, bool *hit)
{
    uint32_t oldest = 0;

    for (uint32_t i = 0; i < EXPAND_CLUSTERS; i++) {
        *hit = x->loc[i] == loc && x->generation[i] == generation;
        if (*hit)
            return i;
        if (x->used[i] < x->used[oldest])
            oldest = i;
    }
    return oldest;
}

const uint8_t *cluster_expand(struct expander *x, const struct arena *a, arena_loc loc,
                              const struct frame_header *h)
{
    uint32_t generation = a->use[arena_loc_segment(loc)].generation;
    uint32_t seqs = h->blocks * (uint32_t)sizeof(uint64_t), i;
    uint8_t *to;
    bool hit;

    i = find(x, loc, generation, &hit);
    to = x->cluster + (uint64_t)i * CLUSTER_BYTES;
    x->used[i] = ++x->turn;
    if (hit) {
        x->hits++;
        return to;
    }
    x->misses++;
    x->generation[i] = 0;
    if (!unzstd(x, (const uint8_t *)(h + 1) + seqs, h->payload_bytes - seqs, to,
                h->blocks * BLOCK_BYTES))
        return NULL;
    x->loc[i] = loc;
    x->generation[i] = generation;
    return to;
}

/* The wanted ones of the masked sectors, which lie one behind the other. */
static void scatter(uint8_t *out, uint8_t want, uint8_t mask, const uint8_t *sectors)
{
    if (likely((want & mask) == MASK_FULL)) {
        memcpy(out, sectors, BLOCK_BYTES);
        return;
    }
    for (uint32_t i = 0; i < BLOCK_SECTORS; i++) {
        if (want & 1u << i)
            memcpy(out + i * SECTOR_BYTES, sectors, SECTOR_BYTES);
        if (mask & 1u << i)
            sectors += SECTOR_BYTES;
    }
}

/* A whole frame of the file may yet be an older one of that place. */
static bool covers(const struct frame_header *h, uint64_t block, uint8_t want)
{
    return block >= h->block && block - h->block < h->blocks && !(want & ~h->mask);
}

int frame_expand(struct expander *x, const struct arena *a, arena_loc loc, uint64_t block,
                 uint8_t want, uint8_t *out)
{
    const struct frame_header *h = frame_get(x, a, loc);
    const uint8_t *from = (const uint8_t *)(h + 1);

    if (unlikely(arena_spilled(a, loc)) && (!h || !covers(h, block, want)))
        return -EIO;
    if (h->kind == FRAME_ZSTD || h->kind == FRAME_CLUSTER)
        x->wanted_bytes += mask_bytes(want);
    switch (h->kind) {
    case FRAME_ZERO:
        for (uint32_t i = 0; i < BLOCK_SECTORS; i++)
            if (want & 1u << i)
                memset(out + i * SECTOR_BYTES, 0, SECTOR_BYTES);
        return 0;
    case FRAME_ZSTD:
        if (h->mask == MASK_FULL && want == MASK_FULL)
            return unzstd(x, from, h->payload_bytes, out, BLOCK_BYTES) ? 0 : -EIO;
        if (!unzstd(x, from, h->payload_bytes, x->block, mask_bytes(h->mask)))
            return -EIO;
        from = x->block;
        break;
    case FRAME_CLUSTER:
        from = cluster_expand(x, a, loc, h);
        if (!from)
            return -EIO;
        from += (block - h->block) * BLOCK_BYTES;
        break;
    }
    scatter(out, want, h->mask, from);
    return 0;
}
