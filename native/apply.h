/* apply.h - committed epochs into the images, behind everybody's back.
 *
 * Oldest records first, as many at once as are small enough: what waits while one run is at
 * work is one run afterwards. A run goes through its epochs in passes. A pass: zero ranges, in
 * their order; then the newest version of each sector that no newer range covers, sorted by disk
 * and place, neighbours as one write. Memory does not grow with an epoch: of a large one the index
 * is walked once for each piece of it. After the passes fdatasync of the images, once; then the
 * superblock moves the journal's head, then the epochs are freed. Doing any of it twice is
 * harmless. Helpers sort, and expand frames into staging buffers; the reactor writes these.
 * Meanwhile the next commits go into the journal.
 *
 * Owner: the reactor thread. Errors: the first one stops the run; what is in flight is
 * awaited, the error stands in the group's status, and the run begins again a second later:
 * after a failed flush nothing may be assumed written.
 * Limits: writes in flight, few while the guest waits for reads of an image; bytes a second, if
 * the configuration says so, but not at a stop.
 */
#ifndef EPOCHD_APPLY_H
#define EPOCHD_APPLY_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "core.h"
#include "disk.h"
#include "ranges.h"
#include "worker.h"

struct group;
struct epoch;

#ifndef APPLY_BATCH_BLOCKS        /* the simulator has smaller ones, see tests/sim */
#define APPLY_BATCH_BLOCKS 256u   /* blocks of one staging buffer: writes up to 1 MiB */
#endif
#define APPLY_BATCHES 4u          /* in flight */
#define APPLY_ZERO_BYTES (1ull << 30) /* of one fallocate */
#define APPLY_WRITES_MAX (APPLY_BATCH_BLOCKS * 4) /* a block has at most 4 runs of sectors */
#define APPLY_DEPTH 64u           /* writes in flight */
#define APPLY_DEPTH_SHARED 8u     /* the same while the guest reads an image */
#ifndef APPLY_PASS_SLOTS
#define APPLY_PASS_SLOTS 65536u   /* slots of a pass, and of a run, unless one epoch has more */
#endif
#define APPLY_PASS_EPOCHS 64u
#ifndef APPLY_PIECE_BLOCKS
#define APPLY_PIECE_BLOCKS 393216u /* entries sorted at once: 6 MiB; more come in pieces */
#endif
#ifndef APPLY_BURST_BYTES
#define APPLY_BURST_BYTES (1u << 20)  /* with a limit: at once, after a pause */
#endif

enum apply_phase {
    APPLY_IDLE, APPLY_JOBS, APPLY_ZEROES, APPLY_SORT, APPLY_BLOCKS, APPLY_SYNC, APPLY_SUPER,
    APPLY_SUPER_RETRY
};

enum batch_state { BATCH_FREE, BATCH_READ, BATCH_EXPAND, BATCH_WRITE };

/* Sectors of a block, and the frame that has their newest version. */
struct apply_entry {
    uint64_t place;              /* disk << 48 | block */
    arena_loc loc;
    uint16_t rank;               /* of its epoch, counted from the pass's oldest */
    uint8_t mask;
};
_Static_assert(sizeof(struct apply_entry) == 16, "an eighth of an index's line for each block");

/* A block of a batch: its entries, whose masks have no sector twice. */
struct apply_block {
    uint64_t place;
    uint64_t first;
    uint8_t entries, mask;
};

struct apply_write {
    struct disk_op op;
    struct iovec iov;
};

struct apply_batch {
    struct job job;
    struct apply *apply;
    enum batch_state state;
    struct apply_block *block;   /* APPLY_BATCH_BLOCKS */
    uint32_t blocks, next;       /* next: the first one that is not being written yet */
    uint32_t busy;               /* operations in flight */
    uint8_t *buffer;             /* APPLY_BATCH_BLOCKS blocks, page-aligned */
    struct apply_write *write;   /* APPLY_WRITES_MAX */
    uint32_t writes;
    int error;
    bool spill_lost;             /* that is the error: the spill file has not got a frame */
};

struct apply {
    enum apply_phase phase;
    struct group *group;
    uint32_t records;            /* of the run */
    uint64_t last;               /* epoch of the run */
    uint32_t epochs;             /* of the run: the group's oldest */
    uint32_t first, end;         /* of these, the pass's; end excluded */
    struct job sort;
    bool sorted;
    struct apply_entry *entry;   /* a piece of the pass, sorted */
    uint64_t entries, entries_max;
    uint64_t next;               /* first entry not yet in a batch */
    uint64_t from, rest;         /* place of the piece, and of the one behind it */
    uint32_t at, part;           /* epoch, and part of it, whose ranges are in hand ... */
    struct range_extent range;   /* ... the one of them ... */
    uint64_t range_done;         /* ... and blocks of it that are done */
    uint32_t busy;               /* zero or sync operations, or the sorting job */
    uint32_t writing;            /* writes of batches in flight */
    struct apply_write zero;     /* the zero operation in flight */
    bool zero_by_writes;         /* the file system has no fallocate for this range */
    uint64_t zero_bytes;
    struct disk_op *sync;        /* one a disk */
    struct apply_batch batch[APPLY_BATCHES];
    int error;
    uint32_t error_disk;
    bool spill_lost;             /* the error's cause is the spill file, not the image */
    uint64_t retry_ns;           /* not before; 0: no wait */
    double credit;               /* with a limit: bytes that may be written, as of ... */
    uint64_t credit_ns;
    uint64_t wait_ns;            /* with a limit: nothing may be written before; 0: no wait */
    uint64_t start_ns, sync_ns;  /* when the run, and its flush, began */
    uint8_t *zeroes;             /* a staging buffer that stays zero */
};

int apply_init(struct group *g);
void apply_free(struct group *g);
bool apply_step(struct group *g);
/* When apply_step() is due again without any completion, in ns; 0: never. */
uint64_t apply_timer(const struct group *g);

static inline uint32_t apply_disk(uint64_t place)
{
    return (uint32_t)(place >> 48);
}
static inline uint64_t apply_place_block(uint64_t place)
{
    return place & ((1ull << 48) - 1);
}

/* apply_sort.c: the helper's job that makes entry[], from a->from on as many as there is room for;
 * a->rest: where the next piece begins, UINT64_MAX: there is none. */
void apply_sort(struct job *job, struct worker *w);

#endif
