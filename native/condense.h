/* condense.h - which frames of a commit count, and how its record is made of them.
 *
 * What was overwritten before the commit need not be written. Of each epoch the index names the
 * frames that are alive; of several epochs in one commit, which become durable together or not
 * at all, a block's newest version is enough. A segment that is mostly alive is written as it
 * is, from where it lies; of the others the living frames are copied together, epoch by epoch, in
 * the order of their places, into private buffers. Neither arena nor index changes. A record never
 * has more segments of an epoch than the arena, so the arena always has room to read it back.
 *
 * What lies in the spill file is always copied and checked as a copy, all of it: the file may
 * change at any time.
 *
 * Owner: the commit in progress (journal.h). condense_run() and condense_copy() are the helper's:
 * the commit's epochs are frozen, so nobody changes their indexes or frames.
 * Errors: without memory nothing is left out. A frame that cannot be one, or whose checksum is wrong:
 * false, the commit fails.
 */
#ifndef EPOCHD_CONDENSE_H
#define EPOCHD_CONDENSE_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "core.h"

struct epoch;
struct commit;

#ifndef CONDENSE_BYTES_MIN            /* the simulator has smaller ones, see tests/sim */
#define CONDENSE_BYTES_MIN 1048576u   /* a smaller commit is written as it is */
#endif
#define CONDENSE_DEAD_SHARE 8u        /* one epoch: if a part of its bytes is dead */
#define CONDENSE_MERGE_SLOTS 1048576u /* several: their versions are compared up to so many */
#define CONDENSE_NONE UINT32_MAX
#define SEGMENT_UNITS (SEGMENT_BYTES / FRAME_ALIGN)

/* A segment of the arena that the commit reads. */
struct commit_source {
    uint64_t epoch;
    uint32_t segment, bytes;
    bool verify;                /* frames that have a checksum must have the right one */
    bool copy;                  /* not to be written from where it lies */
};

/* A segment of its record. */
struct commit_segment {
    uint64_t epoch, lsn;
    uint32_t bytes, crc;
    uint32_t source;            /* all of it; or, condensed, what is alive from there on ... */
    uint32_t unit;              /* ... beginning here, in FRAME_ALIGN */
    bool condensed;
};

struct condense {
    struct epoch *epoch[CORE_EPOCHS_MAX]; /* of the commit, oldest first */
    uint32_t epochs;
    uint32_t *source_of;        /* by segment; CONDENSE_NONE: not of this commit, or spilled */
    uint64_t *alive;            /* a bit for each unit of the sources, one after the other */
    bool done;                  /* segment[] is made, and smaller than the sources */
    bool damaged;
};

/* On the reactor: may it be worth looking? */
bool condense_worth(const struct arena *a, const struct commit *c);
/* Makes c->segment[] of c->source[], which are sorted by epoch and place. */
void condense_run(struct condense *d, struct commit *c, const struct arena *a);
/* One condensed segment's frames to `to`, with their checksums, and its own. */
bool condense_copy(const struct condense *d, const struct commit *c, const struct arena *a,
                   struct commit_segment *s, uint8_t *to);
/* What condense_run() took. */
void condense_end(struct condense *d);

#endif
