/* index.h - block -> newest frame, for one epoch.
 *
 * A hash table of 12-byte slots, five to a cache line, so that a lookup costs about one
 * cache miss; and a sorted list of zero ranges, so that a DISCARD of a whole disk costs one
 * entry. A slot wins over a range: putting a range empties the slots that it covers.
 *
 * Owner: the reactor thread; a frozen index (its epoch is being applied) may be read by a
 * helper. Memory: private, 16 to 24 bytes a block, and 4 KiB at least.
 * Errors: -ENOMEM from index_put() and index_put_range(), before anything has changed.
 */
#ifndef EPOCHD_INDEX_H
#define EPOCHD_INDEX_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"

struct index_slot {
    uint32_t block_low;
    uint32_t loc;           /* arena_loc of the frame */
    uint16_t block_high;
    uint8_t disk;
    uint8_t mask;           /* sectors that the frame carries; 0: none (any more) */
};
_Static_assert(sizeof(struct index_slot) == 12, "five fit a cache line");

#define INDEX_BUCKET_SLOTS 5

struct index_bucket {
    struct index_slot slot[INDEX_BUCKET_SLOTS];
    uint32_t count;         /* filled from slot 0; a full bucket continues in the next */
};
_Static_assert(sizeof(struct index_bucket) == 64, "one cache line");

struct index_range {
    uint64_t first, end;    /* blocks, end excluded */
    uint32_t disk;
    uint32_t flags;         /* FRAME_UNMAP or 0 */
};

struct index {
    struct index_bucket *bucket;
    uint64_t buckets;       /* 0: nothing was ever put */
    uint64_t used;          /* slots */
    struct index_range *range; /* sorted by disk, first; disjoint */
    uint32_t ranges, ranges_max;
};

static inline uint64_t index_slot_block(const struct index_slot *s)
{
    return (uint64_t)s->block_high << 32 | s->block_low;
}

void index_free(struct index *x);
uint64_t index_bytes(const struct index *x);

/* The slot of a block, or NULL. */
struct index_slot *index_find(const struct index *x, uint32_t disk, uint64_t block);

/* Makes room for one more slot, so that the next index_put() cannot fail. */
int index_reserve(struct index *x, uint64_t expected);

/* Points the block at a frame; the mask replaces the old one. */
int index_put(struct index *x, uint32_t disk, uint64_t block, arena_loc loc, uint8_t mask);

/* Blocks first..end-1 are zero from now on. */
int index_put_range(struct index *x, uint32_t disk, uint64_t first, uint64_t end, uint32_t flags);

bool index_in_range(const struct index *x, uint32_t disk, uint64_t block);

#endif
