/* ranges.h - runs of zero blocks in one epoch: disjoint ranges in order, and for each the frame
 * that it came with, so that it is known when nothing is left of a frame.
 *
 * A B+ tree with nodes of 4 KiB: looking up, adding and cutting cost a few hundred
 * nanoseconds however many there are; what a range covers goes leaf by leaf. Nodes are never
 * joined, only freed when empty, so memory never exceeds what the most ranges needed: 16 to 32
 * bytes each, and a node at least.
 *
 * Owner: the reactor thread. Nodes come out of a struct index_memory, which all epochs of a
 * group share. Errors: -ENOMEM, before anything has changed.
 */
#ifndef EPOCHD_RANGES_H
#define EPOCHD_RANGES_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"

/* Private memory of a group's indexes. Counted where it is taken and given back; nobody is
 * refused here: see epoch_room(). */
struct index_memory {
    int64_t limit, used, left;  /* bytes; left: what may still be used, below 0 after a start
                                   with a lower limit */
    void *spare;                /* nodes put aside, so that adding cannot fail half-way */
    uint32_t spares;
};

void index_memory_init(struct index_memory *m, uint64_t limit);

/* Counts bytes that were taken, or given back (below 0). */
static inline void index_memory_count(struct index_memory *m, int64_t bytes)
{
    m->used += bytes;
    m->left -= bytes;
}

/* No index is left that uses it. */
void index_memory_free(struct index_memory *m);

struct range {
    uint64_t key;               /* flags << 56 | disk << 48 | first block */
    uint32_t blocks;
    arena_loc loc;              /* of the frame */
};
_Static_assert(sizeof(struct range) == 16, "254 to a node");

struct ranges {
    struct range_node *root;    /* NULL: none */
    uint32_t height;            /* levels */
    uint64_t count, bytes;
};

/* Of neighbouring ranges with the same flags. */
struct range_extent {
    uint64_t first, end;        /* blocks, end excluded */
    uint32_t disk, flags;
};

/* Told of each range that is cut in two (its frame now has one range more), and of each that is
 * gone. */
typedef void ranges_changed(void *owner, arena_loc loc, bool gone);

void ranges_free(struct ranges *r, struct index_memory *m);

/* Blocks first..end-1 (fewer than 2^32) are in that frame from now on. */
int ranges_put(struct ranges *r, struct index_memory *m, uint32_t disk, uint64_t first,
               uint64_t end, uint32_t flags, arena_loc loc, ranges_changed *changed, void *owner);

bool ranges_cover(const struct ranges *r, uint32_t disk, uint64_t block);

/* The ranges that lie in first..end-1 and came with the frame `old` are in the frame `new` now;
 * returns how many. */
uint32_t ranges_repoint(struct ranges *r, uint32_t disk, uint64_t first, uint64_t end,
                        arena_loc old, arena_loc new);

/* Is any of them left? It looks at so many only; true when that does not tell. */
bool ranges_left(const struct ranges *r, uint32_t disk, uint64_t first, uint64_t end,
                 arena_loc loc);
#define RANGES_LOOK_MAX 512u

/* What comes behind *x, in order; *x starts as zeroes. Very many neighbours come in pieces. */
bool ranges_next(const struct ranges *r, struct range_extent *x);

/* The frames that there is anything left of; one that was cut comes once for each part. */
void ranges_each(const struct ranges *r, void (*found)(void *owner, arena_loc loc), void *owner);

#endif
