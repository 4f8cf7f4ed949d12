/* pack.h - compression behind the write path.
 *
 * A full RAW segment goes to the packer, a helper thread in the background. It compresses the
 * frames into PACKED segments of the same epoch: whole blocks that are neighbours become one
 * cluster, others are compressed one by one. Back on the reactor the index is pointed at the
 * new frames and the RAW segment is freed. What was overwritten meanwhile is left behind. A
 * segment of which samples do not shrink is kept as it is; after a few of those most are not
 * even tried. Killed in between, both copies exist with the same seq: either will do.
 *
 * When: a sealed epoch at once. The open one stays raw for a while, for what is hot is written
 * again soon: the less room there is, the shorter, and when the guest pauses, all of it.
 *
 * What dies is counted where it happens (struct segment_use in arena.h). A kept segment of
 * which nothing is left is freed in the next step; a half dead one goes to the epoch's worn
 * list, and is copied together when memory is short. A copy never is larger than its source:
 * a cluster whose living members do not compress well without the others stays whole.
 *
 * The same counts hold in the spill file (spill.h): a dead segment there is free at once, and a
 * worn one is copied back to RAM when the file is short, to move again when it is full. The
 * helper reads it first. A copy without the right checksum is not used: the file has lost it.
 *
 * A commit freezes its epochs. It does not wait for the job in flight, which may not come to run
 * for long: it reads the source, and what the job has made is undone.
 *
 * Owner: the group's; the job in flight is the helper's. One job at a time. A step
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
#define PACK_BLOCKS_MAX (SEGMENT_FRAMES_MIN + 1) /* whole raw blocks in a segment */
#define PACK_PROBE 4u           /* blocks to try before a segment is called incompressible */
#define PACK_PIECE 32u          /* frames of one step on the reactor */
#ifndef PACK_IDLE_NS
#define PACK_IDLE_NS 5000000u   /* without a write for so long, the guest pauses */
#endif

/* A frame of the source. */
struct pack_source {
    arena_loc loc;
    uint8_t alive;              /* of a cluster: a bit for each member */
};
_Static_assert(CLUSTER_BLOCKS <= 8, "alive has a bit for each");

/* A frame that was written, and what it replaces. */
struct pack_move {
    uint64_t block;
    arena_loc old, new;
    uint32_t blocks;
    uint8_t disk;
    bool range;                 /* of zero blocks */
};

/* A whole raw block of the source. */
struct pack_block {
    uint64_t place;             /* disk << 48 | block */
    uint64_t seq;
    const struct frame_header *frame;
};

enum pack_phase { PACK_IDLE, PACK_READ, PACK_GATHER, PACK_JOB, PACK_ADOPT };

struct pack {
    struct segment_list dead_list; /* to be freed, once the write that did it is over */
    bool look;                  /* something has changed since there was nothing to do */
    bool paused;                /* the guest has not written for a while */
    uint64_t check_ns;          /* when to see whether it pauses; 0: never */
    uint64_t check_seq;         /* group_written() then */
    uint32_t streak, skipped;   /* incompressible segments in a row; of those not tried */
    int level;                  /* zstd's, of this job */

    struct job job;
    struct group *group;
    enum pack_phase phase;
    struct epoch *epoch;
    struct epoch_part *part;    /* the source is of its raw segments; NULL: it is a kept one */
    uint32_t source, source_offset;
    struct arena_cursor out;    /* the epoch's PACKED segment, goes on in `spare` */
    uint32_t spare;
    bool spare_used;
    bool reclaim;               /* the source was worn: frames are moved as they are */
    bool gathered;              /* frame[] has the source's frames that are alive */
    bool spilled;               /* the source lies in the spill file ... */
    bool damaged;               /* ... and is not whole */
    bool incompressible;
    bool dictionary;            /* it compresses with one */
    uint32_t cancel;            /* atomic: what becomes of it is not wanted */
    uint64_t bytes_in, bytes_out; /* of payload compressed, and what became of it */
    uint64_t stored;            /* bytes of frames written */
    uint64_t compressed, raw, clusters; /* blocks, blocks, frames */
    uint64_t ns;
    uint32_t frames, blocks, moves, next; /* next: the first move that is not adopted yet */
    struct pack_source *frame;  /* PACK_FRAMES_MAX */
    struct pack_block *block;   /* PACK_BLOCKS_MAX */
    struct pack_move *move;     /* PACK_FRAMES_MAX * 2: a cluster may fall apart */
    uint8_t *plain, *squeezed;  /* CLUSTER_BYTES each, the helper's */
    uint8_t *copy;              /* SEGMENT_BYTES: a source in the spill file, checked; NULL:
                                   there is no spill file */
};

/* Which blocks of the frame does the index still find in it? 0: it is dead. */
uint8_t pack_alive_in(const struct epoch *e, const struct frame_header *h, arena_loc loc);
/* Lets the index find them in the new frame; returns how many slots and ranges that were. */
uint32_t pack_repoint(struct group *g, struct epoch *e, const struct pack_move *f);
/* A frame of the source, wherever that is looked at. */
const struct frame_header *pack_frame(const struct pack *p, arena_loc loc);

int pack_init(struct group *g);
void pack_free(struct group *g);
/* True: it has done something, call it again, but let guest requests go first. */
bool pack_step(struct group *g);
/* When pack_step() is due again, in ns; 0: when something has changed. */
uint64_t pack_timer(const struct group *g);

/* 1: the packer is at work on a segment of the epoch, and a commit need not wait for that. */
uint32_t pack_may_borrow(const struct group *g, const struct epoch *e);
/* That segment, which is in no list: it stays as it is, what the packer makes of it is dropped.
 * SEGMENT_NONE: there is none. */
uint32_t pack_borrow(struct group *g, const struct epoch *e);

/* Raw segments that wait for the packer, those aside that are left raw for now. */
uint32_t pack_queue(const struct group *g);

/* Something has changed that may give the packer work. */
#define pack_look(g) ((void)((g)->pack.look = true))
/* `dead` of a segment has come to `worn_at`. */
void pack_worn(struct group *g, struct epoch *e, uint32_t segment);
/* A full segment goes to the epoch's kept ones, to those of the spill file if it lies there. */
void pack_keep(struct group *g, struct epoch *e, uint32_t segment);
/* The epoch's frames were counted anew (recovery). */
void pack_recounted(struct group *g, struct epoch *e);
/* The helper's part, pack_job.c. */
void pack_run(struct job *job, struct worker *w);

#endif
