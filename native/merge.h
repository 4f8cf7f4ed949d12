/* merge.h - neighbours that were written far apart in time come together.
 *
 * The packer compresses a raw segment at a time, so of random writes hardly two neighbours meet
 * and most blocks are compressed alone. When the guest is idle, or memory is tight, many packed
 * segments of an epoch are merged: their living blocks, by place, become clusters of those of
 * the same eight places, gaps left out, compressed at a higher level. Clusters that are whole, what did not shrink, and
 * frames of a part of a block or of zeroes are copied as they are.
 *
 * Of more segments than one job takes (MERGE_SOURCES_MAX) the first jobs make sorted ones, the
 * next ones merge those of neighbouring places, from the lowest on. That is one sweep; after it
 * there is nothing to do until a quarter of the segments are new.
 *
 * A job takes the room for all its output beforehand, and starts only if enough is left for the
 * guest. It ends early when raw segments wait for the packer: what has been merged until then
 * counts. A commit ends it at once, and all stays as it was. Killed in between, both copies are
 * there with the same seq: either will do.
 *
 * Owner: as of pack.h, whose helper runs the jobs, either a merge or a pack at a time; steps on
 * the reactor are as small. Not done here: segments in the spill file, and those left raw.
 */
#ifndef EPOCHD_MERGE_H
#define EPOCHD_MERGE_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "pack.h"

#define MERGE_SOURCES_MAX 64u
#define MERGE_OUTPUTS_MAX (MERGE_SOURCES_MAX + 2) /* frames that end before a segment does */
#define MERGE_LOOK 256u         /* entries of the segment table in one step on the reactor */
#ifndef MERGE_SOURCES_MIN       /* the simulator has smaller ones, see tests/sim */
#define MERGE_SOURCES_MIN 8u    /* fewer new ones are not worth a sweep */
#define MERGE_BLOCKS_MAX 16384u /* of a job; 64 MiB of the guest's */
#define MERGE_ROOM_SHARE 16u    /* of the arena: left free for the guest */
#define MERGE_IDLE_NS 100000000u
#endif

/* A block of the sources, or (`whole`) a frame that is copied as it is. */
struct merge_block {
    uint64_t place;             /* disk << 48 | block */
    uint64_t seq;
    arena_loc loc;
    bool whole;
};

/* A segment that may be merged. */
struct merge_candidate {
    uint64_t first;             /* place */
    uint32_t segment;
};

enum merge_phase { MERGE_IDLE, MERGE_CHOOSE, MERGE_GATHER, MERGE_JOB, MERGE_ADOPT };

struct merge {
    bool look;                  /* segments are there that have not been looked at */
    uint64_t written;           /* by the guest, when last looked ... */
    uint64_t quiet_ns;          /* ... and since when it has been that */
    uint32_t sweep;             /* number of this or the last one, from 1 on */
    bool sweeping;
    uint32_t waiting;           /* segments of this sweep that are not done */
    uint32_t jobs_left;         /* of this sweep */

    struct job job;
    struct group *group;
    enum merge_phase phase;
    uint64_t id;                /* of the epoch, while choosing; 0: none yet */
    struct epoch *epoch;
    int level;
    bool dictionary;
    uint32_t stop, cancel;      /* atomic: finish early; it is for nothing */

    /* Choosing. */
    uint32_t at;                /* next segment to look at */
    uint32_t fresh, sorted, done; /* so many were seen */
    uint32_t fresh_kept, sorted_kept;
    struct merge_candidate fresh_one[MERGE_SOURCES_MAX];
    struct merge_candidate sorted_one[MERGE_SOURCES_MAX + 1]; /* lowest places first */

    uint32_t sources, source[MERGE_SOURCES_MAX];
    uint64_t boundary;          /* places from here on have neighbours elsewhere */
    uint32_t gathered, offset;  /* source and byte to go on at */
    uint32_t alive, lone;       /* blocks; of those, not in a cluster that is good as it is */
    uint32_t outputs, used;     /* taken; of those, begun */
    uint32_t output[MERGE_OUTPUTS_MAX];
    uint64_t first[MERGE_OUTPUTS_MAX], last[MERGE_OUTPUTS_MAX]; /* places in them */
    struct arena_cursor to;
    uint32_t frames, blocks, moves, next;
    struct pack_source *frame;  /* MERGE_BLOCKS_MAX, as all of these */
    struct merge_block *block;
    struct pack_move *move;
    uint8_t *plain, *squeezed;  /* CLUSTER_BYTES each, the helper's */
    uint64_t stored, bytes_in, bytes_out, clusters, merged, ns;
};

int merge_init(struct group *g);
void merge_free(struct group *g);
/* Something new was packed. */
void merge_look(struct group *g);
/* The packer has nothing to do: is there anything here? True: it has begun, merge_step() is due. */
bool merge_begin(struct group *g);
/* When merge_begin() is to be asked again, in ns; 0: not before something happens. */
uint64_t merge_timer(const struct group *g);
/* ... and that time has come. */
bool merge_due(const struct group *g);
/* As pack_step(), while merge.phase is not MERGE_IDLE. */
bool merge_step(struct group *g);
/* Segments that the job has taken out of the epoch's lists. */
uint32_t merge_holds(const struct group *g, const struct epoch *e);
/* The helper's part, merge_job.c. merge_settled(): so many blocks of the frame being alive, there
 * is hardly anything to gain. */
bool merge_settled(const struct frame_header *h, uint8_t alive);
void merge_run(struct job *job, struct worker *w);

#endif
