/* sim_disk.h - a disk behind the seam (native/disk.h) that keeps its files in memory, and
 * does to them what a real one may do. It is deliberately nastier than any real one.
 *
 * Each file has two contents: `durable`, what the medium holds, and `current`, what a read
 * sees (medium and cache). A write reaches `current` when it completes; it reaches `durable`
 * when a SYNC completes that was submitted after the write's completion was delivered, or at
 * once when the write was asked to be durable.
 * Operations in flight complete in any order. At a crash (sim_disk_fork()) each write that is
 * not durable is lost, whole, or torn at 512 bytes, independently of all others.
 *
 * Faults, when asked for: EIO and ENOSPC, after which any part of the write may have been
 * done; a failed SYNC, after which any part of what it covered may be durable, later
 * SYNCs do not cover it, and reads may show old or new data.
 *
 * It also holds the core to the seam's contract: no access outside of the file, no
 * misalignment, no two writes in flight to the same place, no write's buffer changed while it
 * is in flight. A breach is a failure of the run (`breach`).
 *
 * The spill file is a plain one, for it means nothing after a power cut. But what the core reads
 * of its mapping may be something else the next time: a write to another file must not come from
 * there.
 *
 * The journal file is kept without the gap between superblocks and ring.
 */
#ifndef SIM_DISK_H
#define SIM_DISK_H

#include "core.h"
#include "disk.h"
#include "rng.h"

#define SIM_PAGE 4096u
#define SIM_FLYING_MAX 128u
#define SIM_WRITES_MAX 16384u
#define SIM_FILES_MAX 4u
#define SIM_LOG_MAX 96u

/* Contents of a file. Equal versions mean equal pages, wherever they are: copying a store
 * copies only pages that differ. */
struct store {
    uint8_t *data;
    uint64_t *version;
    uint32_t pages;
};

struct sim_file {
    uint64_t bytes;              /* of `data`; a file's last page may be partly used */
    uint32_t align;
    struct store durable, current;
};

/* A write that may be lost. */
struct sim_write {
    uint32_t file;
    uint64_t at, bytes;          /* in `data` of the store */
    uint64_t done;               /* moment of completion; 0: in flight */
    uint8_t *data;               /* NULL: zeroes */
    bool durable;                /* not lost, but over an older one that may be */
};

struct sim_flying {
    struct disk_op *op;
    struct sim_write *write;     /* WRITE, ZERO, PUNCH */
    uint64_t submitted;          /* moment */
};

struct sim_event {
    uint8_t kind;                /* 's'ubmitted, 'c'ompleted */
    uint8_t opcode;
    uint8_t file;
    uint64_t offset, bytes;
    int64_t result;
};

struct sim_disk {
    struct disk disk;
    struct sim_file file[SIM_FILES_MAX];
    uint32_t files;
    struct sim_flying flying[SIM_FLYING_MAX];
    uint32_t flying_count;
    struct sim_write *write[SIM_WRITES_MAX]; /* not durable, oldest completion first, then those
                                                in flight */
    uint32_t writes;
    uint64_t moment;
    uint64_t changes;            /* counts everything that makes another crash state */
    struct rng rng;
    uint32_t fault_percent;      /* of writes and syncs */
    uint32_t faults;             /* injected so far */
    bool no_fallocate;           /* ZERO and PUNCH: -EOPNOTSUPP */
    bool sync_lies;              /* mutation: SYNC does nothing */
    uint8_t *spill;              /* the spill file: not ours, and never a matter of flushes */
    uint64_t spill_bytes;
    const uint8_t *mapped;       /* where the core has its segments mapped, NULL: nowhere */
    uint64_t mapped_bytes;
    const char *breach;
    void (*point)(void *owner, const char *what);
    void *owner;
    struct sim_event log[SIM_LOG_MAX];
    uint64_t logged;
};

/* How a crash treats the writes that are not durable. */
struct sim_outcome {
    bool host;                   /* false: only the agent died, the cache lives */
    uint64_t whole;              /* bit n: write n is done; used when torn_seed is 0 */
    uint64_t torn_seed;          /* else: lost, whole or torn at random */
};

/* files: sizes in bytes of journal (superblocks and ring) and images. */
void sim_disk_init(struct sim_disk *d, const uint64_t *bytes, const uint32_t *align,
                   uint32_t files);
void sim_disk_free(struct sim_disk *d);

/* `to` becomes what is left of `from` after the crash; same geometry. */
void sim_disk_fork(struct sim_disk *to, const struct sim_disk *from,
                   const struct sim_outcome *outcome);

/* Place of a file offset in the store, or UINT64_MAX. */
uint64_t sim_disk_place(const struct sim_disk *d, uint32_t file, uint64_t offset);
/* Puts bytes on the medium and in the cache; for tests that prepare a state. */
void sim_disk_poke(struct sim_disk *d, uint32_t file, uint64_t offset, const void *data,
                   uint64_t bytes);

#endif
