/* epoch.h - the epochs of a group: what was written in which, and what a read sees.
 *
 *     OPEN --seal--> SEALED --commit--> COMMITTED --apply--> freed
 *       \______________\___discard___> freed
 *
 * Owner: the group's. Epochs are kept oldest first; the last one is open. Of the open one each
 * writer changes its own part, within its rounds (writer.h); reads go to the disk's part of
 * each. A helper job pins its epoch (`jobs`); an epoch dropped meanwhile goes with its last job.
 * Errors: -ENOMEM (index), -EIO (a frame that does not expand), -EFAULT (guest memory vanished
 * under the copy). Running out of arena, or of
 * memory that the index may take, is not an error: ask epoch_room() first, then the write
 * cannot run out.
 */
#ifndef EPOCHD_EPOCH_H
#define EPOCHD_EPOCH_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "core.h"
#include "index.h"
#include "span.h"
#include "worker.h"

struct group;
struct writer;

/* Segments of one epoch, linked by arena.next and arena.previous. */
struct segment_list {
    uint32_t first, last, count;
};

/* What one writer has put into it: blocks of its disks only. A restart may find all raw segments
 * in the first part. */
struct epoch_part {
    struct epoch *epoch;
    struct index index;
    struct arena_cursor raw;
    struct segment_list raw_list;  /* RAW, not looked at by the packer yet */
    uint64_t logical_bytes;        /* guest bytes that the index stands for, ranges aside */
    uint64_t stored_bytes;         /* of frames that were written here */
    struct index_memory grave;     /* counts what freeing a large index gives back */
} __attribute__((aligned(64)));

struct epoch {
    uint64_t id;
    enum core_epoch_state state;
    struct arena_cursor packed;
    struct segment_list kept_list; /* PACKED, and RAW ones that are not worth packing */
    struct segment_list worn_list; /* of those, the ones that are half dead: see pack.h */
    struct segment_list spill_list; /* kept in the spill file */
    struct segment_list spill_worn_list;
    uint64_t stored_bytes;         /* of frames: this and the parts' are the sum */
    uint32_t jobs;                 /* helper jobs that use its segments or index */
    bool adopted;                  /* its frames were in the arena at the start */
    bool frozen;                   /* no more packing: a commit or an apply reads it */
    bool dropped;
    struct job burial;             /* frees a large index */
    struct group *group;
    struct epoch_part part[];      /* one a writer */
};

/* An index of more slots is freed by the helper: giving back its pages takes long. */
#define EPOCH_INDEX_LARGE 100000u

void segment_list_init(struct segment_list *l);
void segment_list_append(struct arena *a, struct segment_list *l, uint32_t segment);
uint32_t segment_list_pop(struct arena *a, struct segment_list *l);
void segment_list_remove(struct arena *a, struct segment_list *l, uint32_t segment);

/* A new open epoch behind all others; NULL without memory. */
struct epoch *epoch_create(struct group *g, uint64_t id);
/* Takes it out of the group and frees it, or leaves that to its last job. */
void epoch_drop(struct group *g, struct epoch *e);
/* A helper job is over. */
void epoch_job_done(struct group *g, struct epoch *e);

struct epoch *epoch_open(const struct group *g);
struct epoch *epoch_by_id(const struct group *g, uint64_t id);
uint32_t epoch_segments(const struct epoch *e);
static inline bool epoch_empty(const struct epoch *e)
{
    return epoch_segments(e) == 0;
}
/* Sums over the parts: guest bytes, bytes of frames, slots and bytes of the index. */
uint64_t epoch_logical_bytes(const struct epoch *e);
uint64_t epoch_stored_bytes(const struct epoch *e);
uint64_t epoch_slots(const struct epoch *e);
uint64_t epoch_index_bytes(const struct epoch *e);
/* That of the disk's writer, and its index. */
struct epoch_part *epoch_part(const struct epoch *e, uint32_t disk);
struct index *epoch_index(const struct epoch *e, uint32_t disk);

/* A request for the block comes next: gets what it will look up under way to the cache. */
void epoch_expect(const struct writer *w, uint32_t disk, uint64_t block);

/* Where the open epoch has a frame of the block; NULL: it has none, or only zeroes. A hint. */
const uint8_t *epoch_frame(const struct writer *w, uint32_t disk, uint64_t block);

/* A writer's round. Between begin and end, frames are not shown one by one: publish shows all so
 * far, and must come before any of their requests is answered. Nothing else may look at the
 * arena then. */
void epoch_batch_begin(struct writer *w);
void epoch_batch_publish(struct writer *w);
void epoch_batch_end(struct writer *w);

/* Is there room in arena and index for a request that touches `blocks` blocks? */
bool epoch_room(const struct writer *w, uint64_t blocks);
/* Segments that it may need behind the one that is being filled. */
uint32_t epoch_room_more(const struct writer *w, uint64_t blocks);
/* The free segments with which there surely is. */
uint32_t epoch_room_segments(uint64_t blocks);

/* One guest write into the open epoch: bytes (a multiple of 512) from the cursor. */
int epoch_write(struct group *g, uint32_t disk, uint64_t sector, struct span_cursor *from,
                uint64_t bytes);
/* Sectors become zero; flags: FRAME_UNMAP or 0. For epoch_room() that is so many blocks. */
int epoch_zero(struct group *g, uint32_t disk, uint64_t sector, uint64_t sectors, uint32_t flags);
#define EPOCH_ZERO_ROOM 3u

/* What the guest sees of one block, without the image: looks for the sectors in `want`,
 * newest epoch first. Returns the sectors found, or -EIO. They are in `out` (BLOCK_BYTES,
 * each at its place), or, when all of `want` is one stored run, *direct points at them. */
int epoch_read(struct group *g, uint32_t disk, uint64_t block, uint8_t want, uint8_t *out,
               const uint8_t **direct);

/* For recovery (reindex.c): enters frames that already lie in the epoch's segments, in seq
 * order. -EILSEQ: bytes that are no frame, or of no disk, or of another epoch's time. -ENOKEY:
 * a frame names a dictionary that is not there. */
int epoch_reindex(struct group *g, struct epoch *e);
/* Points the block's slot at a newer frame, or makes blocks a zero range of that frame; counts
 * what dies. */
void epoch_point(struct writer *w, struct epoch_part *p, struct index_slot *s, arena_loc loc,
                 uint8_t mask);
int epoch_put_range(struct writer *w, struct epoch_part *p, uint32_t disk, uint64_t first,
                    uint64_t end, uint32_t flags, arena_loc loc);

#endif
