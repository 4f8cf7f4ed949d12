/* spill.h - what RAM has no room for: full segments of open and sealed epochs move to a file.
 *
 * Guest writes always go to RAM. When RAM runs short, the oldest full segments are written to
 * the spill file, from where they lie and past the page cache; once that is done, the index
 * points into the file's mapping (arena.h) and the segment in RAM is free. So a guest that
 * writes faster than the disk is held for the length of a disk write now and then, the reactor
 * never waits, no dirty pages pile up, and RAM is taken again as soon as it is free. The packer
 * comes first: mostly it is compressed segments that move. Nothing moves back: a commit or a
 * discard frees it, and pack.h copies together what was overwritten since.
 *
 * Killed in between, both copies exist with the same seq: either will do. The file needs no
 * flush: an arena does not outlive the host's kernel, and caches live as long.
 *
 * Every frame in the file has its crc and is checked on each use; the file is outside of our
 * control. What it has lost is an error (-EIO) of the read or commit that needs it, told once;
 * from then on nothing more is moved there.
 *
 * Owner: the reactor thread, which looks at PACK_PIECE frames a step; checksums are the
 * helper's. Errors: a failed write leaves the segment in RAM, is told, and tried again after
 * GROUP_RETRY_NS.
 * Not done here: creating, sizing and removing the file (agent/storage.py).
 */
#ifndef EPOCHD_SPILL_H
#define EPOCHD_SPILL_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "core.h"
#include "disk.h"
#include "worker.h"

_Static_assert(DISK_SPILL == DISK_IMAGE(CORE_DISKS_MAX), "behind the last image");

struct group;
struct epoch;

#define SPILL_MOVES 8u          /* segments on their way at once */
#ifndef SPILL_FREE_MIN          /* the simulator has fewer, see tests/sim */
#define SPILL_FREE_MIN 8u       /* RAM segments that are kept free for the guest ... */
#endif
#define SPILL_FREE_SHARE 8u     /* ... or this part of all, if that is more */

struct spill_move {
    struct job job;             /* completes the checksums */
    struct disk_op op;
    struct iovec iov;
    struct group *group;
    struct epoch *epoch;
    uint32_t from, to, tail;
    uint32_t offset;            /* frames before it are shown in their new place */
    bool busy;
    bool written;
};

struct spill {
    struct spill_move move[SPILL_MOVES];
    uint32_t busy;
    uint32_t held_want;         /* free RAM segments that a held request needs; 0: none */
    bool has_name;              /* the file can be found by a name, or could at the start */
    bool told;                  /* that it began */
    bool stuck;                 /* RAM is short and nothing can move */
    bool held_told;             /* that a request waits all the same */
    int fault;                  /* the file is not what it was: used no more */
    uint64_t retry_ns;
};

/* For recovery, with the arena attached: is it the arena's file? One that has nothing in use
 * becomes it. A sentence in `text` on error. */
int spill_open(struct group *g, char *text);

/* Advances; true: call again. */
bool spill_step(struct group *g);

/* A request waits until so many RAM segments are free. */
void spill_hold(struct group *g, uint32_t segments);
/* May room still come from moving segments? */
bool spill_may_help(const struct group *g);

/* A read of several blocks: has the disk read at once what of it has spilled, rather than one
 * block after the other as the read comes to them. */
void spill_prefetch(const struct group *g, uint32_t disk, uint64_t first, uint64_t last);
/* Has the file lost anything? 0 or -errno, by looking at it. */
int spill_look(const struct group *g);
/* Somebody met a frame that is not whole: tells it, once. */
void spill_fault(struct group *g, int error);

#endif
