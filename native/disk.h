/* disk.h - the seam: every byte to and from a disk passes here.
 *
 * submit() takes an operation and returns; reap() delivers completions by calling
 * op->done() on the calling thread. The operation, its iovecs and its buffers belong to the
 * disk layer until then. Order: none between operations in flight; a SYNC covers only
 * operations whose completion was delivered before the SYNC was submitted. A durable WRITE is
 * a WRITE and a SYNC of its own bytes, for less.
 * Result: bytes transferred as asked, 0 for SYNC, ZERO and PUNCH, or a negative errno. A
 * transfer that stays short is -EIO.
 *
 * Implementations: disk_uring.c (the real one); the tests' simulator has its own.
 */
#ifndef EPOCHD_DISK_H
#define EPOCHD_DISK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

enum disk_opcode {
    DISK_READ = 1,
    DISK_WRITE,
    DISK_SYNC,  /* fdatasync */
    DISK_ZERO,  /* offset, bytes read as zeroes, space stays allocated */
    DISK_PUNCH, /* the same, space given back */
};

#define DISK_JOURNAL 0u            /* file numbers: the journal, then the images */
#define DISK_IMAGE(n) ((n) + 1u)
#define DISK_SPILL 33u             /* behind the last image that a group may have */

struct disk_op {
    enum disk_opcode opcode;
    uint32_t file;
    uint64_t offset;
    uint64_t bytes;                /* of the whole transfer */
    struct iovec *iov;             /* READ, WRITE; may be changed by the disk layer */
    uint32_t iov_count;
    bool durable;                  /* WRITE: its completion means that it is on stable storage */
    void (*done)(struct disk_op *op, int64_t result);
    void *owner;                   /* for done() */
    struct disk_op *next;          /* the disk layer's, and so is the rest */
    uint64_t moved;                /* bytes done so far */
    bool later;                    /* of the second seam, see disk_uring.h */
    int64_t result;
};

struct disk {
    void (*submit)(struct disk *d, struct disk_op *op);
    /* Delivers what has completed; with wait it blocks for at least one completion while
     * any operation is in flight. Returns how many it delivered. */
    uint32_t (*reap)(struct disk *d, bool wait);
};

static inline void disk_submit(struct disk *d, struct disk_op *op)
{
    d->submit(d, op);
}

static inline uint32_t disk_reap(struct disk *d, bool wait)
{
    return d->reap(d, wait);
}

/* Submits one operation and waits for it; for recovery only. */
int64_t disk_run(struct disk *d, struct disk_op *op);

#endif
