/* blk.h - the virtio block device of one disk: requests, and the front end's state.
 *
 * A write is copied into the open epoch and answered at once; a read takes what the epochs
 * hold and fetches the rest from the image straight into guest memory. A write that does
 * not fit the arena is not taken from the ring: the ring is held until there is room.
 *
 * Owner: the disk's reactor. Virtio 1.2 section 5.2; where it leaves a choice, the status
 * values are those of QEMU's own server.
 */
#ifndef EPOCHD_BLK_H
#define EPOCHD_BLK_H

#include <stdbool.h>
#include <stdint.h>

#include "checkpoint.h"
#include "core.h"
#include "disk.h"
#include "memory.h"
#include "metrics.h"
#include "ring.h"

struct reactor;
struct command;

#define BLK_F_FLUSH (1ull << 9)
#define BLK_F_LOG_ALL (1ull << 26)
#define BLK_F_PROTOCOL_FEATURES (1ull << 30)

/* A request that could not be answered at once. */
struct request {
    struct blk *blk;
    struct ring *ring;
    struct request *next, **link;  /* the blk's list */
    struct flush_waiter waiter;
    bool waits_flush;
    bool unreachable;              /* its status byte is in no memory any more */
    uint16_t head;
    uint8_t status;
    uint32_t parts;                /* image reads in flight, plus one while they are started */
    uint32_t in_count;
    uint64_t in_bytes;
    enum metrics_stage stage;      /* what its wait is counted as, from fetched_ns on */
    uint64_t fetched_ns;
    struct metrics_trace trace;    /* fetched_ns 0: not traced */
    struct span in[];              /* device-writable, status byte last */
};

struct blk_stats {
    uint64_t reads, writes, flushes, discards, write_zeroes, get_ids;
    uint64_t read_bytes, write_bytes, errors, unsupported, rejected, broken, held;
};

struct blk {
    struct reactor *reactor;
    struct group *group;
    struct writer *writer;
    uint32_t disk;
    const core_disk_config *config;
    uint64_t sectors;
    uint64_t features;             /* as negotiated */
    struct memory *memory;         /* NULL: no front end */
    struct dirty_log log_store;
    struct dirty_log *log;         /* NULL: not logging */
    struct mapping *inflight_map;
    uint32_t inflight_queues, inflight_size;
    uint64_t inflight_offset;
    struct ring ring[CORE_QUEUES_MAX];
    struct request *requests;      /* not answered yet */
    uint32_t reads_busy;           /* image reads that target guest memory */
    bool paused;                   /* rings wait for a command that needs them quiet */
    bool lost_told;
    uint64_t reject_told_ns;       /* the last event about a rejected request ... */
    uint64_t rejects_untold;       /* ... and requests rejected since */
    uint64_t stop_since_ns;        /* a stop waits since then for what may never come; 0: none */
    struct command *command_first, *command_last;
    struct blk_stats stats;
};

/* Of the reactor that serves the disk. */
void blk_init(struct blk *b, struct reactor *r, uint32_t disk);
void blk_free(struct blk *b);

/* Copies the request's header out of the chain, and gets the index bucket under way. */
void blk_expect(struct blk *b, struct chain *c);
/* The request is next but one: gets the data that it reads under way. */
void blk_look_ahead(struct blk *b, const struct chain *c);
/* Carries the request out; false: it is not taken, the ring is held until there is room. */
bool blk_execute(struct ring *r, const struct chain *c);

/* The ring's next request has no room still: the group hears of it (again, for others may have
 * taken what was made free for it). */
void blk_hold(struct ring *r);

/* A VMM's main loop stands still until its stop is answered: so long a stop waits for a journal
 * that fails, or for room in the arena; what needs them is then answered with IOERR. */
#define BLK_STOP_WAIT_NS 5000000000ull
/* Ends the waiting for commits of the ring's requests; returns how many there were. */
uint32_t blk_fail_flushes(struct ring *r);
/* When such a stop has waited long enough; 0: there is none. */
uint64_t blk_timer(const struct blk *b);

/* Commands from the control thread, in order; step: true when one was carried out. */
void blk_command(struct blk *b, struct command *c);
bool blk_step(struct blk *b);

/* Counts a request that asks for what cannot be, and tells why; not of each in a flood. */
void blk_reject(struct blk *b, uint32_t queue, const char *format, ...)
    __attribute__((format(printf, 3, 4), cold));

void blk_query(const struct blk *b, core_disk_info *out);

/* Called by ring.c. */
void blk_watch(struct ring *r);
void blk_unwatch(struct ring *r);
void blk_ring_broken(struct ring *r);
void blk_running_changed(struct blk *b);

#endif
