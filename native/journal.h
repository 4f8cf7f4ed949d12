/* journal.h - the write-ahead journal: superblock, record ring, commit (commit.c).
 *
 * The durable commit record is the only commit point. A commit writes the segments of its
 * epochs from where they lie in the arena, or copies of what is alive in them (condense.h), and a
 * header that covers them by checksum; waits for all completions; then fdatasync; then
 * acknowledges. A small record is one durable write instead. Nothing orders the writes among
 * themselves: a record that is not whole has a wrong checksum and does not count.
 *
 * Owner: the reactor thread. Errors: any failed write or flush fails the commit as a whole;
 * the epochs are sealed again and a repeat writes everything anew, since after a failed
 * flush nothing may be assumed written. What stands at the tail then may be a whole record
 * all the same: a discard has to void it first (journal_void()).
 * -EILSEQ: a frame that was in the arena at the start does not fit its checksum.
 * docs: native/RECOVERY.md has the fault model and the recovery table.
 */
#ifndef EPOCHD_JOURNAL_H
#define EPOCHD_JOURNAL_H

#include <stdbool.h>
#include <stdint.h>

#include "condense.h"
#include "disk.h"
#include "epoch.h"
#include "format.h"
#include "worker.h"

struct group;

#ifndef JOURNAL_EPOCH_STEP       /* the simulator has fewer, see tests/sim */
#define JOURNAL_EPOCH_STEP 4096u /* ids reserved at once */
#endif
#define JOURNAL_WRITE_MAX (4u * SEGMENT_BYTES) /* neighbours written as one */
#define JOURNAL_PIECES 16u       /* in flight, each with a buffer of that size, which takes memory
                                    once it is used */
#ifndef JOURNAL_SMALL_BYTES      /* the simulator has smaller ones, see tests/sim */
#define JOURNAL_SMALL_BYTES 131072u  /* a record up to this is copied together: one write */
#endif
#define JOURNAL_INLINE_BYTES 262144u /* up to this, checksums are not worth a helper */

/* A record that the images lack still. */
struct journal_pending {
    uint64_t lsn_end, epoch_last;
};

/* Flushes of the journal: one at a time, in turn. The kernel tells of a failed write-back
 * once, to whichever flush comes first, and that one may be somebody else's: so a flush only
 * counts for writes that no failed flush has come between. */
struct journal_sync {
    void (*done)(struct group *g, int error);
    uint32_t failures;             /* journal.sync_failures when its writes began */
    struct journal_sync *next;     /* waits for its turn */
};

/* A segment each, where they lie apart, and one of them behind the ring's end. */
#define COMMIT_PIECE_WRITES (JOURNAL_WRITE_MAX / SEGMENT_BYTES + 1)

/* Neighbours in the record on their way: the helper checks them, and copies those that are not
 * written from where they lie; then they are written. */
struct commit_piece {
    struct job job;
    struct group *group;
    uint32_t first, end;           /* segments of the record; end excluded */
    uint8_t *buffer;               /* its own, JOURNAL_WRITE_MAX */
    uint8_t *to;                   /* where copies go */
    uint32_t writes;
    uint32_t busy;                 /* the job, or writes in flight; 0: free */
    bool damaged;                  /* a frame's checksum was wrong */
    bool spill_lost;               /* in the spill file */
    struct commit_write {
        struct disk_op op;
        struct iovec iov;
        struct commit_piece *piece;
    } write[COMMIT_PIECE_WRITES];
};

enum commit_phase {
    COMMIT_IDLE, COMMIT_JOBS, COMMIT_CONDENSE, COMMIT_SPACE, COMMIT_WRITE, COMMIT_SYNC,
    COMMIT_FINISHED
};

struct commit {
    enum commit_phase phase;
    uint64_t first, last;          /* epochs */
    struct commit_source *source;
    struct commit_segment *segment; /* as many at most */
    uint32_t sources, sources_max, segments;
    struct condense condense;
    struct job job;                /* condensing */
    bool job_busy;
    uint32_t taken;                /* segments that are in a piece, or were */
    uint32_t checked;              /* segments whose checksums are done */
    uint32_t busy;                 /* pieces */
    bool header_written;
    bool differs;                  /* the record is not just what lies in the arena */
    bool spill_lost;               /* why it fails */
    uint8_t *header;               /* record_header and table; a small record whole */
    uint64_t header_max;
    uint64_t record_bytes;
    int error;
    uint64_t start_ns, write_ns, sync_ns; /* when it began, and these phases of it */
    uint8_t *buffers;
    struct commit_piece piece[JOURNAL_PIECES];
    struct commit_piece header_piece;
    struct journal_sync sync;
};

/* Somebody who waits until the superblock is durable. */
struct super_waiter {
    void (*done)(struct group *g, int error);
    uint64_t version;
};
#define SUPER_WAITERS_MAX 8u

struct journal {
    uint64_t ring_bytes, file_bytes;
    uint64_t head_lsn;             /* first record that the images lack ... */
    uint64_t head_applied;         /* ... and the last epoch before it: what is saved next */
    uint64_t free_lsn;             /* head_lsn as it is durable: below it may be overwritten */
    uint64_t tail_lsn;
    uint64_t epoch_limit;          /* durable: ids below may be used */
    uint64_t super_seq;
    uint8_t group[16];
    struct journal_disk disk[JOURNAL_DISKS_MAX];
    uint32_t disks;
    bool clean;                    /* the page to be written is a clean stop's */
    struct journal_pending pending[CORE_EPOCHS_MAX];
    uint32_t pending_first, pending_count;
    bool tail_suspect;             /* a failed commit may have left a whole record */
    bool has_name;                 /* the file can be found by a name, or could at the start */
    uint32_t mending;              /* superblocks of a cut file that are being written */
    struct commit commit;
    struct journal_super *super;   /* the page being written */
    uint64_t super_version, super_writing;
    bool super_busy;
    bool limit_pending;
    struct super_waiter waiter[SUPER_WAITERS_MAX];
    uint32_t waiters;
    uint64_t super_limit;          /* epoch_limit in the page being written */
    struct disk_op sync_op;
    struct journal_sync *sync_first, *sync_last; /* the first one is in flight */
    uint32_t sync_failures;
    struct disk_op super_op;
    struct iovec super_iov;
    struct journal_sync super_sync;
    struct disk_op void_op;
    struct journal_sync void_sync;
    struct iovec void_iov;
    uint8_t *void_page;
    void (*void_done)(struct group *g, int error);
};

int journal_init(struct group *g);
void journal_free(struct journal *j);

/* Byte in the file where the position lies. */
static inline uint64_t journal_offset(const struct journal *j, uint64_t lsn)
{
    return JOURNAL_LOG_OFFSET + lsn % j->ring_bytes;
}
static inline uint64_t journal_used(const struct journal *j)
{
    return j->tail_lsn - j->free_lsn;
}
uint64_t journal_ring_bytes(uint64_t file_bytes);

/* Before the first of the writes that a flush is to cover; and when they all have completed. */
void journal_sync_prepare(struct group *g, struct journal_sync *s,
                          void (*done)(struct group *g, int error));
void journal_sync_start(struct group *g, struct journal_sync *s);

/* Superblock. fill: the page as of now. save: write it and tell `done` when it is durable. */
void journal_super_fill(struct group *g, struct journal_super *page);
uint32_t journal_super_crc(const struct journal_super *page);
void journal_super_save(struct group *g, uint64_t epoch_limit,
                        void (*done)(struct group *g, int error));

/* commit.c. To be called at the start: a file that loses its name later is no journal any more. */
void journal_file_known(struct group *g);
/* Commit all sealed epochs up to `last`. The outcome is in commit.phase (COMMIT_FINISHED)
 * and commit.error; journal_commit_end() takes note of it. */
void journal_commit_begin(struct group *g, uint64_t last);
int journal_commit_end(struct group *g);
bool journal_step(struct group *g);

/* Makes sure that no whole record stands at the tail. */
void journal_void(struct group *g, void (*done)(struct group *g, int error));

uint32_t journal_record_crc(const struct record_header *h);

#endif
