/* pack.h - compression behind the write path.
 *
 * A full RAW segment goes to the helper as a whole, with the list of its frames that are
 * still the newest; the helper compresses them into PACKED segments of the same epoch; back
 * on the reactor the index is pointed at the new frames and the RAW segment is freed. What
 * was overwritten meanwhile is left behind. A segment whose first frames do not shrink is
 * kept as it is. Killed in between, both copies exist with the same seq: either will do.
 *
 * Segments that were kept are looked at again when memory is short and at least a segment's
 * worth of frames was overwritten since: one that is half dead or more is copied together.
 *
 * Owner: the reactor thread; the job in flight is the helper's. One job at a time.
 */
#ifndef EPOCHD_PACK_H
#define EPOCHD_PACK_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "worker.h"

struct group;
struct epoch;

#define PACK_FRAMES_MAX (SEGMENT_BYTES / sizeof(struct frame_header))
#define PACK_PROBE 4u           /* frames to try before a segment is called incompressible */
/* Segments left alone at the end of the open epoch while memory is ample: what is written
 * again soon need not be compressed first. */
#define PACK_LAG 8u

struct pack_frame {
    arena_loc old, new;
    bool moved;
};

struct pack {
    struct job job;
    struct group *group;
    bool busy;
    struct epoch *epoch;
    uint32_t source;
    struct arena_cursor out;    /* the epoch's PACKED segment, goes on in `spare` */
    uint32_t out_tail;          /* out.tail at the start, to undo */
    uint32_t spare;
    bool spare_used;
    bool copy_only;             /* frames are moved as they are */
    bool incompressible;
    uint64_t bytes_out;
    uint64_t compressed, raw;   /* frames */
    uint64_t ns;
    uint32_t frames;
    uint64_t live_bytes;        /* of those frames */
    uint64_t dead;              /* frames left behind */
    struct pack_frame *frame;   /* PACK_FRAMES_MAX */
};

int pack_init(struct group *g);
void pack_free(struct group *g);
bool pack_step(struct group *g);

#endif
