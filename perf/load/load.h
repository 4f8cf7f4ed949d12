/* load.h - everything that Python sees of the load generator's loop.
 *
 * A `load` is the driver's side of some virtqueues of vhost-user-blk back ends: it keeps
 * `depth` requests in flight on each, and records how long each took. The rings and buffers lie in
 * one piece of shared memory that the caller made, and the back ends run the rings already.
 *
 * Threads: load_run() is called by one thread at a time and stays in it until the run is over.
 * load_stop(), load_abort() and load_peek() may be called by others meanwhile.
 *
 * Errors: load_create() returns NULL with a sentence in `text`. load_run() returns how the run
 * ended (LOAD_ENDED and so on); for all but the first two load_peek() has a sentence.
 *
 * Lifetimes: memory and descriptors stay the caller's and must outlive the load.
 *
 * Not done here: any message to a back end, the making of data, percentiles.
 *
 * The part between the two cdef marks is read by cffi (native/build_ffi.py) as it is.
 */
#ifndef EPOCHD_LOAD_H
#define EPOCHD_LOAD_H

#include <stdint.h>

/* cdef-begin */
#define LOAD_READ 0
#define LOAD_WRITE 1
#define LOAD_ZERO 2
#define LOAD_DISCARD 3
#define LOAD_OPS 4

#define LOAD_SEQUENTIAL 0
#define LOAD_RANDOM 1
#define LOAD_ZIPF 2

#define LOAD_ENDED 0             /* did what it was to do */
#define LOAD_STOPPED 1           /* load_stop() */
#define LOAD_FAILED 2            /* too many requests failed, or data was wrong too often */
#define LOAD_LOST 3              /* load_abort(), or a back end that is stuck or breaks the rules */

#define LOAD_SLOT_BYTES 128      /* shared memory of a request, without its data */
#define LOAD_STAMP_BYTES 32      /* shortest block that can be verified is 512 */
#define LOAD_TEXT_MAX 256

typedef struct load load;

typedef struct {                 /* one virtqueue; places are offsets in the shared memory */
    uint32_t disk;
    uint32_t size;               /* entries: a power of two; depth fit in, or 3 * depth if direct */
    int event_idx, indirect;     /* as negotiated */
    int kick_fd, call_fd;
    uint64_t desc, avail, used;
    uint64_t slots;              /* depth * LOAD_SLOT_BYTES */
    uint64_t buffers;            /* depth * buffer_bytes */
} load_queue_config;

typedef struct {                 /* what of a disk is used */
    uint64_t sector;             /* the first one, in units of 512 bytes */
    uint64_t blocks;             /* in units of block_bytes; at least one */
} load_disk_config;

typedef struct {
    uint8_t *memory;             /* the shared memory as it is mapped here */
    uint64_t guest;              /* the guest address of its first byte */
    uint32_t depth;              /* requests in flight on each queue */
    uint32_t block_bytes;        /* of every request; a multiple of 512 */
    uint32_t buffer_bytes;       /* distance of a queue's buffers, at least block_bytes */
    uint64_t pool, pool_blocks;  /* data for writes: offset; blocks of block_bytes */
    int in_place;                /* block n gets the pool's block n, not the next in turn */
    int verify;                  /* stamp what is written, check what is read */
    uint32_t run_id;             /* with verify: tells the stamps of this load from others' */
    /* HdrHistogram's layout of its counters, in nanoseconds. */
    uint32_t unit_magnitude, half_magnitude, counts;
    uint64_t sub_bucket_mask;
} load_config;

typedef struct {
    uint32_t weight[LOAD_OPS];   /* chances of the operations, relative; their sum < 2^31 */
    int pattern;
    double theta;                /* of LOAD_ZIPF; more than 0 */
    uint64_t seed;
    uint64_t ios;                /* requests in all, or 0: no limit */
    int once;                    /* each queue goes once through its part of the disk */
    int written_only;            /* with once and verify: leaves out what is not known */
    int lockstep;                /* the next requests only when all earlier ones are done */
    int sleep;                   /* wait for calls instead of polling */
    double rate;                 /* requests a second in all, or 0: as fast as can be */
    uint64_t duration_ns;        /* or 0: no limit */
    uint64_t ramp_ns;            /* what is done before is not counted */
    uint64_t stuck_ns;           /* nothing done for so long: give up */
    uint64_t interval_ns;        /* of the series */
    uint64_t intervals;          /* the last one takes all that comes later */
    uint32_t errors_max;         /* give up after so many */
} load_workload;

typedef struct {                 /* as it is now; during a run, a glance */
    uint64_t ios[LOAD_OPS];      /* done well */
    uint64_t min_ns[LOAD_OPS], max_ns[LOAD_OPS], sum_ns[LOAD_OPS];
    uint64_t ns;                 /* from the start, or the end of the ramp, to the last one done */
    uint64_t errors;             /* requests with another status than OK */
    uint64_t verify_errors;      /* blocks with wrong data */
    uint64_t verified, unknown;  /* blocks that were right; of which nothing was known */
    uint64_t kicks, calls;       /* sent; taken while sleeping */
    uint32_t in_flight;
    char text[LOAD_TEXT_MAX];    /* the first error */
} load_state;

load *load_create(const load_config *config, const load_disk_config *disks, uint32_t disk_count,
                  const load_queue_config *queues, uint32_t queue_count, char *text);
void load_free(load *l);

int load_run(load *l, const load_workload *w);
/* Submits nothing more, waits for what is in flight. Also for a run that has not begun yet. */
void load_stop(load *l);
/* Ends the run at once: the back end is gone. No run can follow. */
void load_abort(load *l, const char *text);

void load_peek(load *l, load_state *out);
/* `counts` counters of each operation, one after the other; and the done ones of each interval. */
const uint64_t *load_histogram(const load *l);
const uint64_t *load_series(const load *l);

/* For tests. The counter of a latency; and `count` blocks that a workload would choose from
 * `blocks` ones. */
uint32_t load_counter_of(const load_config *config, uint64_t ns);
void load_draw(int pattern, double theta, uint64_t seed, uint64_t blocks, uint64_t *out,
               uint64_t count);
/* cdef-end */

#endif
