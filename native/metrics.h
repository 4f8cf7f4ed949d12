/* metrics.h - what the agent is doing, in a shared-memory page that others may read while it
 * works, or hangs, or when it is dead: counters, latencies by stage, traces of requests.
 *
 * Owner: each reactor has one of these for its requests, the group one for what it does itself;
 * all write one page, and never read it. No lock, no system call and no allocation after
 * metrics_open(). The leader alone makes the picture of counters, with all others outside of
 * their rounds. Cost: requests are counted one by one, in
 * private memory; latencies are taken by the clock that the reactor reads once a round
 * anyway, for all answers of the round at once; one request in METRICS_TRACE_EVERY has stamps
 * of its own. The picture of counters is made anew every METRICS_PUBLISH_NS.
 *
 * Without metrics_open() (the tests' benches, the simulator) everything here does nothing.
 * The layout is in format.h.
 */
#ifndef EPOCHD_METRICS_H
#define EPOCHD_METRICS_H

#include <stdbool.h>
#include <stdint.h>

#include "check.h"
#include "format.h"

#define METRICS_PUBLISH_NS 10000000ull
#define METRICS_ROUND_STAGES 3u     /* METRICS_WRITE, _READ_HIT, _ZERO */

struct metrics {
    struct metrics_page *page;      /* NULL: not opened */
    uint32_t number, writers;       /* of so many that share the page's histograms */
    uint32_t answered[METRICS_ROUND_STAGES]; /* in this round */
    uint32_t unpublished;           /* traces of this round, in page->trace */
    uint32_t until_trace;           /* requests until the next traced one */
    bool tracing;                   /* the request in hand is traced, in `trace` */
    struct metrics_trace trace;
    uint64_t traced;
    uint64_t publish_ns;            /* when the next picture is due */
    uint64_t busy_ns, asleep_ns, batches;
};

/* ---- Histograms ----------------------------------------------------------------------------- */

static inline uint32_t metrics_bucket(uint64_t ns)
{
    uint32_t top, bucket;

    if (ns < 1u << METRICS_SUB_BITS)
        return (uint32_t)ns;
    top = 63 - (uint32_t)__builtin_clzll(ns);
    bucket = ((top - METRICS_SUB_BITS + 1) << METRICS_SUB_BITS) +
             ((uint32_t)(ns >> (top - METRICS_SUB_BITS)) & ((1u << METRICS_SUB_BITS) - 1));
    return bucket < METRICS_BUCKETS ? bucket : METRICS_BUCKETS - 1;
}

/* Smallest value of a bucket; the bucket ends where the next begins. */
static inline uint64_t metrics_bucket_low(uint32_t bucket)
{
    uint32_t power = bucket >> METRICS_SUB_BITS;

    if (power <= 1)
        return bucket;
    return (uint64_t)((1u << METRICS_SUB_BITS) + (bucket & ((1u << METRICS_SUB_BITS) - 1)))
           << (power - 1);
}

/* One writer: a plain sum, stored as one word. */
static inline void metrics_grow(const struct metrics *m, uint64_t *at, uint64_t by)
{
    if (likely(m->writers == 1))
        __atomic_store_n(at, *at + by, __ATOMIC_RELAXED);
    else
        __atomic_add_fetch(at, by, __ATOMIC_RELAXED);
}

/* `count` events took `ns` each. */
static inline void metrics_add(struct metrics *m, enum metrics_stage stage, uint64_t ns,
                               uint64_t count)
{
    if (likely(m->page))
        metrics_grow(m, &m->page->stage[stage].bucket[metrics_bucket(ns)], count);
}

/* ---- Requests ------------------------------------------------------------------------------- */

/* Is the request in hand one of those that are traced? */
static inline bool metrics_trace_due(struct metrics *m)
{
    return --m->until_trace == 0;
}

/* about: what the request is. */
void metrics_trace_begin(struct metrics *m, uint64_t fetched_ns, const struct metrics_trace *about);
/* The traced request is answered ... */
void metrics_trace_end(struct metrics *m, uint8_t status);
/* ... or goes on: if the one in hand is traced, the trace is its own from here on (else one
 * with fetched_ns 0) until it is answered. */
void metrics_trace_wait(struct metrics *m, struct metrics_trace *trace);
void metrics_trace_late(struct metrics *m, struct metrics_trace *trace, uint8_t status);

/* A request was answered in this round: METRICS_WRITE, _READ_HIT or _ZERO. */
static inline void metrics_answered(struct metrics *m, enum metrics_stage stage)
{
    m->answered[stage]++;
}

/* A request that had to wait is answered. */
void metrics_late(struct metrics *m, enum metrics_stage stage, uint64_t fetched_ns,
                  uint64_t now_ns);

/* ---- Rounds --------------------------------------------------------------------------------- */

/* At the start of a round, after one that did something: how long that one took. */
void metrics_round_over(struct metrics *m, uint64_t ns, uint64_t now_ns);

struct core;
/* Makes the picture of counters anew; the leader's. */
void metrics_publish(struct core *c);

/* All reactors do, or one does not. */
static inline void metrics_sleeping(struct metrics *m, bool sleeping)
{
    if (m->page)
        __atomic_store_n(&m->page->sleeping, sleeping, __ATOMIC_RELAXED);
}

/* ---- Life ----------------------------------------------------------------------------------- */

/* Maps sizeof(struct metrics_page) bytes of fd, which holds nothing yet. Negative errno. */
int metrics_open(struct metrics *m, int fd, const uint8_t group[16], const char *name,
                 const char *control);
/* Another writer of the same page; number 0 is the one that was opened. */
void metrics_share(struct metrics *m, const struct metrics *first, uint32_t number,
                   uint32_t writers);
void metrics_close(struct metrics *m);

#endif
