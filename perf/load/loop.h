/* loop.h - the state of a load, and the loop that keeps its queues busy.
 *
 * All of it belongs to the thread in load_run(), except what is said to be set by others.
 * `state` is written by that thread alone and read by load_peek() meanwhile. */
#ifndef EPOCHD_LOAD_LOOP_H
#define EPOCHD_LOAD_LOOP_H

#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "choose.h"
#include "clock.h"
#include "load.h"
#include "ring.h"
#include "verify.h"

struct flight {
    uint64_t start;              /* ticks: published, or due */
    uint64_t block;
    uint8_t op, busy;
};

struct queue {
    struct ring ring;
    struct chooser choose;
    struct flight *flight;       /* one a slot */
    uint16_t *free, *batch;      /* slots: stack of the idle ones; just submitted */
    uint32_t free_count;
    uint32_t disk, part, index;
    uint64_t left;               /* requests still to submit */
    uint64_t due_count;          /* with a rate: how many were due so far */
    uint64_t pool_next;
    bool holds;                  /* chosen, and waiting for its block (verify) */
    int held_op;
    uint64_t held_block;
    uint64_t buffers;            /* offset in the shared memory */
};

struct load {
    load_config config;
    load_disk_config *disk;
    uint32_t disk_count, queue_count, queues_per_disk;
    struct queue *queue;
    struct verify *verify;       /* NULL: no verifying */
    struct clock clock;
    load_workload work;
    uint64_t *histogram;         /* LOAD_OPS * config.counts */
    uint64_t *series;
    load_state state;            /* single writer: the loop */
    pthread_mutex_t text_lock;
    bool stop, aborted;          /* set by other threads */
    bool closing, broken, ramping;
    int stop_fd;
    uint64_t now, started, begin, last_done, deadline, ramp_end; /* begin: of counting */
    uint64_t interval_end, interval, interval_ticks;
    uint64_t stuck_ticks;
    double ticks_per_due;        /* of one queue */
};

/* Of `state` and the counters, which load_peek() reads meanwhile. */
#define ADD(place, n) __atomic_store_n(&(place), (place) + (n), __ATOMIC_RELAXED)

/* HdrHistogram's place of a value. */
ALWAYS_INLINE uint32_t loop_counter_of(const load_config *c, uint64_t ns)
{
    uint32_t bucket = 64u - (uint32_t)__builtin_clzll(ns | c->sub_bucket_mask) -
                      c->unit_magnitude - (c->half_magnitude + 1);
    uint64_t sub = ns >> (bucket + c->unit_magnitude);
    uint64_t at = ((uint64_t)(bucket + 1) << c->half_magnitude) + sub - (1ull << c->half_magnitude);

    return at < c->counts ? (uint32_t)at : c->counts - 1;
}

static inline void loop_reset_counts(load *l)
{
    memset(l->histogram, 0, LOAD_OPS * sizeof(uint64_t) * l->config.counts);
    memset(l->state.ios, 0, sizeof(l->state.ios));
    memset(l->state.max_ns, 0, sizeof(l->state.max_ns));
    memset(l->state.sum_ns, 0, sizeof(l->state.sum_ns));
    memset(l->state.min_ns, 0xff, sizeof(l->state.min_ns));
    l->state.kicks = l->state.calls = 0;
}

static inline bool loop_asked_to_stop(const load *l)
{
    return __atomic_load_n(&l->stop, __ATOMIC_RELAXED);
}

static inline bool loop_lost(const load *l)
{
    return l->broken || __atomic_load_n(&l->aborted, __ATOMIC_ACQUIRE);
}

static inline bool loop_too_bad(const load *l)
{
    return l->state.errors + l->state.verify_errors >= l->work.errors_max;
}

/* Keeps the first text of a run. */
void loop_fail(struct load *l, const char *text);
/* Until the work is done, stopped or lost; fds: one a queue and one more. */
void loop_run(struct load *l, struct pollfd *fds);

#endif
