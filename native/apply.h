/* apply.h - committed epochs into the images, behind everybody's back.
 *
 * Oldest record first, its epochs one after the other: zero ranges, then the blocks, sorted
 * by disk and place, neighbours as one write. Memory does not grow with the epoch: the index is
 * walked once for each piece of it. Helpers sort, and expand frames into staging
 * buffers; the reactor writes these. Then fdatasync of the images, then the superblock moves
 * the journal's head, then the epochs are freed. Doing any of it twice is harmless.
 *
 * Owner: the reactor thread. Errors: the first one stops the run; what is in flight is
 * awaited, the error stands in the group's status, and the record is applied again from its
 * start a second later: after a failed flush nothing may be assumed written.
 * Not done here: merging several records into one pass.
 */
#ifndef EPOCHD_APPLY_H
#define EPOCHD_APPLY_H

#include <stdbool.h>
#include <stdint.h>

#include "disk.h"
#include "index.h"
#include "worker.h"

struct group;
struct epoch;

#ifndef APPLY_BATCH_BLOCKS        /* the simulator has smaller ones, see tests/sim */
#define APPLY_BATCH_BLOCKS 256u   /* blocks of one staging buffer: writes up to 1 MiB */
#endif
#define APPLY_BATCHES 4u          /* in flight */
#ifndef APPLY_PIECE_BLOCKS
#define APPLY_PIECE_BLOCKS 524288u /* sorted at once: 6 MiB; more come in pieces */
#endif
#define APPLY_ZERO_BYTES (1ull << 30) /* of one fallocate */
#define APPLY_WRITES_MAX (APPLY_BATCH_BLOCKS * 4) /* a block has at most 4 runs of sectors */

enum apply_phase {
    APPLY_IDLE, APPLY_JOBS, APPLY_ZEROES, APPLY_SORT, APPLY_BLOCKS, APPLY_SYNC, APPLY_SUPER,
    APPLY_SUPER_RETRY
};

enum batch_state { BATCH_FREE, BATCH_READ, BATCH_EXPAND, BATCH_WRITE };

struct apply_write {
    struct disk_op op;
    struct iovec iov;
};

struct apply_batch {
    struct job job;
    struct apply *apply;
    enum batch_state state;
    uint32_t first, blocks;      /* entries of the sorted list */
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
    struct job sort;
    bool sorted;
    struct epoch *epoch;         /* the one in hand */
    uint64_t last;               /* of the record */
    struct index_slot *entry;    /* sorted: a piece of the epoch's blocks */
    uint64_t entries, entries_max;
    uint64_t next;               /* first entry not yet in a batch */
    uint64_t from, rest;         /* place of the piece, and of the one behind it */
    struct range_extent range;   /* of zeroes, in hand */
    uint64_t range_done;         /* blocks of it */
    uint32_t busy;               /* zero or sync operations in flight */
    struct apply_write zero;     /* the zero operation in flight */
    bool zero_by_writes;         /* the file system has no fallocate for this range */
    uint64_t zero_bytes;
    struct disk_op *sync;        /* one a disk */
    struct apply_batch batch[APPLY_BATCHES];
    int error;
    uint32_t error_disk;
    bool spill_lost;             /* the error's cause is the spill file, not the image */
    uint64_t retry_ns;           /* not before; 0: no wait */
    uint64_t start_ns, sync_ns;  /* when the record, and its flush, began */
    uint8_t *zeroes;             /* a staging buffer that stays zero */
};

int apply_init(struct group *g);
void apply_free(struct group *g);
bool apply_step(struct group *g);

#endif
