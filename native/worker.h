/* worker.h - a helper thread for what would hold up the rings.
 *
 * A group has two. One does what a commit or an apply waits for: checksums, sorting, filling
 * apply buffers. The other one compresses, in the background: it is nice(10) and SCHED_BATCH,
 * so that on a machine with few processors it takes what the guest and the reactor leave. A
 * thread cannot be both: without privilege a nice value only goes up.
 *
 * The reactor submits and reaps; job->run() happens on the helper, job->done() on the
 * reactor. Urgent jobs overtake the others. Both directions are single-producer
 * single-consumer rings; a full ring makes worker_submit() return false. Without a thread
 * (`inline_jobs`, for the simulator) jobs run in worker_reap(), in order of submission.
 */
#ifndef EPOCHD_WORKER_H
#define EPOCHD_WORKER_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <zstd.h>

#include "expand.h"

#define WORKER_RING 64u

struct worker;

struct job {
    void (*run)(struct job *job, struct worker *w);
    void (*done)(struct job *job);
    void *owner;
};

struct job_ring {
    struct job *slot[WORKER_RING];
    _Alignas(64) uint32_t head; /* next to take: the consumer's */
    _Alignas(64) uint32_t tail; /* next to fill: the producer's */
};

struct worker {
    struct job_ring urgent, normal, finished;
    uint32_t outstanding;       /* reactor's: submitted, not reaped */
    _Alignas(64) uint32_t sleeping;
    uint32_t stop;
    int wake_fd;                /* wakes the helper */
    int notify_fd;              /* wakes the reactor */
    bool inline_jobs, background;
    bool started;
    pthread_t thread;
    ZSTD_CCtx *compress;        /* the helper's */
    struct squeezer squeezer;   /* the helper's */
    struct expander expand;     /* the helper's */
};

/* notify_fd: the reactor's eventfd, -1 with inline_jobs. */
int worker_start(struct worker *w, struct dictionaries *d, int notify_fd, bool inline_jobs,
                 bool background);
void worker_stop(struct worker *w);
bool worker_submit(struct worker *w, struct job *job, bool urgent);
uint32_t worker_reap(struct worker *w);
/* Has worker_reap() something to do? */
static inline bool worker_ready(const struct worker *w)
{
    return w->outstanding > 0 &&
           w->finished.head != __atomic_load_n(&w->finished.tail, __ATOMIC_ACQUIRE);
}

#endif
