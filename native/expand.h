/* expand.h - from a frame to the sectors it stands for.
 *
 * An expander belongs to one thread: zstd's context, and the clusters that were expanded last,
 * so that reading a hot cluster block by block expands it once. No allocation after the start.
 * A frame in the spill file is copied before it is looked at, and its crc is checked on the
 * copy: the file may change at any time, and its pages may be gone.
 * Errors: -EIO, the frame does not expand to what its header says, or the spill file has it
 * not any more (spill_fault() is the caller's).
 * Not done here: checksums of frames in RAM (journal.c, recover.c), which frame is newest
 * (index.h).
 */
#ifndef EPOCHD_EXPAND_H
#define EPOCHD_EXPAND_H

#include <stdint.h>
#include <zstd.h>

#include "arena.h"
#include "dictionary.h"

#define EXPAND_CLUSTERS 16u /* kept, 32 KiB each */

struct expander {
    ZSTD_DCtx *context;
    struct dictionaries *dictionaries;    /* the group's */
    uint8_t *block;                       /* one, for parts of blocks */
    struct frame_header *frame;           /* one of the spill file, at most CLUSTER_BYTES */
    uint8_t *cluster;                     /* EXPAND_CLUSTERS x CLUSTER_BYTES */
    arena_loc loc[EXPAND_CLUSTERS];
    uint32_t generation[EXPAND_CLUSTERS]; /* of the segment then; 0: nothing kept here */
    uint64_t used[EXPAND_CLUSTERS];       /* turn of the last use */
    uint64_t turn;
    uint64_t hits, misses;                /* of clusters */
    uint64_t wanted_bytes, expanded_bytes; /* of compressed frames: asked for; by zstd */
};

int expander_start(struct expander *x, struct dictionaries *d);
void expander_stop(struct expander *x);

/* The frame at loc: in RAM where it lies; of the spill file a copy that is whole, good until
 * the next call of any function here. NULL: the file has not got it. */
const struct frame_header *frame_get(struct expander *x, const struct arena *a, arena_loc loc);

/* The wanted sectors of the block, which the frame at loc carries, to their places in out
 * (BLOCK_BYTES). */
int frame_expand(struct expander *x, const struct arena *a, arena_loc loc, uint64_t block,
                 uint8_t want, uint8_t *out);

/* All blocks of the cluster at loc, good until the next call; NULL: it does not expand. h: as
 * frame_get() gave it. */
const uint8_t *cluster_expand(struct expander *x, const struct arena *a, arena_loc loc,
                              const struct frame_header *h);

#endif
