/* pack.h - compression behind the write path.
 *
 * A full RAW segment goes to the helper as a whole, with the list of its frames that are
 * still the newest; the helper compresses them into PACKED segments of the same epoch; back
 * on the reactor the index is pointed at the new frames and the RAW segment is freed. What
 * was overwritten meanwhile is left behind. A segment whose first frames do not shrink is
 * kept as it is. Killed in between, both copies exist with the same seq: either will do.
 *
 * What dies is counted where it happens (struct segment_use in arena.h). A kept segment of
 * which nothing is left is freed in the next step; a half dead one goes to the epoch's worn list,
 * and is copied together when memory is short.
 *
 * Owner: the reactor thread; the job in flight is the helper's. One job at a time. A step
 * looks at PACK_PIECE frames at most, so that no guest request waits for a whole segment.
 */
#ifndef EPOCHD_PACK_H
#define EPOCHD_PACK_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "epoch.h"
#include "worker.h"

struct group;

#define PACK_FRAMES_MAX (SEGMENT_BYTES / sizeof(struct frame_header))
#define PACK_PROBE 4u           /* frames to try before a segment is called incompressible */
/* Segments left alone at the end of the open epoch while memory is ample: what is written
 * again soon need not be compressed first. */
#define PACK_LAG 8u

#define PACK_PIECE 32u          /* frames of one step on the reactor */

struct pack_frame {
    uint64_t block;
    arena_loc old, new;
    uint32_t blocks;
    uint8_t disk;
};

enum pack_phase { PACK_IDLE, PACK_GATHER, PACK_JOB, PACK_ADOPT };

struct pack {
    struct job job;
    struct group *group;
    enum pack_phase phase;
    struct segment_list dead_list; /* to be freed, once the write that did it is over */
    bool look;                  /* something has changed since there was nothing to do */
    struct epoch *epoch;
    uint32_t source, source_offset;
    struct arena_cursor out;    /* the epoch's PACKED segment, goes on in `spare` */
    uint32_t out_tail;          /* out.tail at the start, to undo */
    uint32_t spare;
    bool spare_used;
    bool copy_only;             /* frames are moved as they are */
    bool reclaim;               /* the source was worn */
    bool gathered;              /* frame[] has the source's frames that are alive */
    bool incompressible;
    uint32_t cancel;            /* atomic: a commit waits for the epoch */
    uint64_t bytes_out;
    uint64_t compressed, raw;   /* frames */
    uint64_t ns;
    uint32_t frames, next;      /* next: the first that is not adopted yet */
    struct pack_frame *frame;   /* PACK_FRAMES_MAX */
};

int pack_init(struct group *g);
void pack_free(struct group *g);
/* True: it has done something, call it again, but let guest requests go first. */
bool pack_step(struct group *g);

/* Something has changed that may give the packer work. */
#define pack_look(g) ((void)((g)->pack.look = true))
/* `dead` of a segment has come to `worn_at`. */
void pack_worn(struct group *g, struct epoch *e, uint32_t segment);
/* The epoch's frames were counted anew (recovery). */
void pack_recounted(struct group *g, struct epoch *e);

#endif
