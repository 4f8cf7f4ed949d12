/* index.h - block -> newest frame, for one epoch.
 *
 * A hash table of 12-byte slots, five to a cache line, so that a lookup costs about one
 * cache miss; and a tree of zero ranges (ranges.h), so that a DISCARD costs one entry, however
 * long. A slot wins over a range: putting a range empties the slots that it covers.
 *
 * A table that has outgrown INDEX_SHARD_SLOTS is cut into shards by the top bits of the hash,
 * and each grows on its own: no write pays for moving more than its shard, so the cost of
 * the worst write stays flat while the epoch grows.
 *
 * Owner: the reactor thread; a frozen index (its epoch is being applied) may be read by a
 * helper. Memory: private, 16 to 24 bytes a block with a slot, and 4 KiB at least; counted in
 * the group's struct index_memory. index_bytes() is what it takes, `growth` what it may take at
 * once to grow, old and new tables side by side.
 * Errors: -ENOMEM (NULL from index_slot()), before anything has changed.
 */
#ifndef EPOCHD_INDEX_H
#define EPOCHD_INDEX_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "ranges.h"

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

#define INDEX_SHARD_BITS 8u
#define INDEX_SHARDS (1u << INDEX_SHARD_BITS)
#define INDEX_SHARD_SLOTS 16384u /* a table of one shard has at most so many */

struct index_shard {
    struct index_bucket *bucket;
    uint32_t buckets;
    uint32_t used;          /* slots */
};
_Static_assert(sizeof(struct index_shard) == 16, "four to a cache line");

struct index {
    struct index_memory *memory;
    struct index_shard *shard; /* NULL: nothing was ever put */
    uint32_t shards;        /* 0, 1 or INDEX_SHARDS */
    uint32_t shift;         /* bits of the hash that choose the shard: 0 or INDEX_SHARD_BITS */
    uint64_t used;          /* slots */
    uint64_t bytes;         /* of the shards */
    int64_t growth;         /* see index_room() */
    uint32_t largest;       /* buckets of the largest shard that there was */
    struct ranges ranges;
};

static inline uint64_t index_slot_block(const struct index_slot *s)
{
    return (uint64_t)s->block_high << 32 | s->block_low;
}

/* An empty one; it takes nothing yet. */
void index_init(struct index *x, struct index_memory *m);
void index_free(struct index *x);

static inline uint64_t index_bytes(const struct index *x)
{
    return x->bytes + x->ranges.bytes;
}

/* Does what a request of so many blocks may add surely fit below the limit? Its shards may all
 * have to grow by half, one of them while the old one is still there; all its blocks may belong
 * to one shard, which a guest can choose; a small table is cut into shards, or ranges are cut. */
#define INDEX_ROOM_BLOCK 64
#define INDEX_ROOM_MORE 262144
static inline bool index_room(const struct index *x, uint64_t blocks)
{
    return x->growth + (int64_t)blocks * INDEX_ROOM_BLOCK + INDEX_ROOM_MORE <= x->memory->left;
}

/* Where the block's slot would be: hash, then shard, then bucket of the shard. */
static inline uint64_t index_hash(uint32_t disk, uint64_t block)
{
    uint64_t h = (block | (uint64_t)disk << 48) * 0x9e3779b97f4a7c15ull;

    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93ull;
    return h ^ h >> 32;
}

static inline struct index_shard *index_shard_of(const struct index *x, uint64_t hash)
{
    return &x->shard[hash >> (64 - INDEX_SHARD_BITS) & (x->shards - 1)];
}

/* In order of the hash: growing a shard keeps the order, so moving its slots walks both
 * tables from front to back. */
static inline uint32_t index_home(const struct index *x, const struct index_shard *s, uint64_t hash)
{
    return (uint32_t)((hash << x->shift >> 32) * s->buckets >> 32);
}

/* Gets the block's bucket under way to the cache. */
static inline void index_prefetch(const struct index *x, uint32_t disk, uint64_t block)
{
    uint64_t hash = index_hash(disk, block);

    if (x->shard) {
        const struct index_shard *s = index_shard_of(x, hash);

        prefetch(&s->bucket[index_home(x, s, hash)]);
    }
}

/* The slot of a block, or NULL. */
struct index_slot *index_find(const struct index *x, uint32_t disk, uint64_t block);

/* The slot of a block, a fresh one (mask 0) if it has none; NULL: no memory. It is valid until
 * the next slot is added. `expected`: how many blocks an empty index should have room for. */
struct index_slot *index_slot(struct index *x, uint32_t disk, uint64_t block, uint64_t expected);

/* Makes an empty index large enough for so many slots; but not with more than a quarter of what
 * the limit leaves. */
int index_reserve(struct index *x, uint64_t expected);

/* Points the block at a frame; the mask replaces the old one. */
int index_put(struct index *x, uint32_t disk, uint64_t block, arena_loc loc, uint8_t mask);

/* All slots that are in use: *at starts as a zeroed cursor; NULL at the end. */
struct index_cursor {
    uint32_t shard, bucket, slot;
};
struct index_slot *index_next(const struct index *x, struct index_cursor *at);

/* Blocks first..end-1 are zero from now on, by the frame `loc`. */
struct index_watch {
    void (*emptied)(void *owner, const struct index_slot *s); /* a slot that was in use */
    ranges_changed *changed;
};
int index_put_range(struct index *x, uint32_t disk, uint64_t first, uint64_t end, uint32_t flags,
                    arena_loc loc, const struct index_watch *watch, void *owner);

static inline bool index_in_range(const struct index *x, uint32_t disk, uint64_t block)
{
    return unlikely(x->ranges.root != NULL) && ranges_cover(&x->ranges, disk, block);
}

#endif
