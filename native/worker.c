/* worker.c - see worker.h. */
#include "worker.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "check.h"
#include "format.h"

#define BACKGROUND_NICE 10

static bool ring_push(struct job_ring *r, struct job *job)
{
    uint32_t tail = r->tail;

    if (tail - __atomic_load_n(&r->head, __ATOMIC_ACQUIRE) == WORKER_RING)
        return false;
    r->slot[tail % WORKER_RING] = job;
    __atomic_store_n(&r->tail, tail + 1, __ATOMIC_RELEASE);
    return true;
}

static struct job *ring_pop(struct job_ring *r)
{
    uint32_t head = r->head;
    struct job *job;

    if (head == __atomic_load_n(&r->tail, __ATOMIC_ACQUIRE))
        return NULL;
    job = r->slot[head % WORKER_RING];
    __atomic_store_n(&r->head, head + 1, __ATOMIC_RELEASE);
    return job;
}

static struct job *next_job(struct worker *w)
{
    struct job *job = ring_pop(&w->urgent);

    return job ? job : ring_pop(&w->normal);
}

static void wake(int fd)
{
    uint64_t one = 1;

    while (write(fd, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

/* Where it is refused the thread competes as any other: slower, not wrong. */
static void step_back(void)
{
    struct sched_param none = {0};

    sched_setscheduler(0, SCHED_BATCH, &none);
    setpriority(PRIO_PROCESS, (id_t)gettid(), BACKGROUND_NICE);
}

static void *helper(void *arg)
{
    struct worker *w = arg;
    uint64_t count;

    if (w->background)
        step_back();
    prctl(PR_SET_NAME, w->background ? "packer" : "helper");
    while (!__atomic_load_n(&w->stop, __ATOMIC_ACQUIRE)) {
        struct job *job = next_job(w);

        if (!job) {
            /* Say "sleeping", then look again: a job submitted in between is either seen
             * here or its submitter sees the flag and writes the eventfd. */
            __atomic_store_n(&w->sleeping, 1, __ATOMIC_SEQ_CST);
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            job = next_job(w);
            if (!job) {
                while (read(w->wake_fd, &count, sizeof(count)) < 0 && errno == EINTR)
                    ;
                continue;
            }
            __atomic_store_n(&w->sleeping, 0, __ATOMIC_RELAXED);
        }
        job->run(job, w);
        check(ring_push(&w->finished, job)); /* no more jobs exist than slots */
        wake(w->notify_fd);
    }
    return NULL;
}

int worker_start(struct worker *w, struct dictionaries *d, int notify_fd, bool inline_jobs,
                 bool background)
{
    int error;

    memset(w, 0, sizeof(*w));
    w->inline_jobs = inline_jobs;
    w->background = background;
    w->notify_fd = notify_fd;
    w->wake_fd = -1;
    w->compress = ZSTD_createCCtx();
    error = expander_start(&w->expand, d);
    if (!w->compress)
        error = -ENOMEM;
    if (!error && !inline_jobs) {
        w->wake_fd = eventfd(0, EFD_CLOEXEC);
        if (w->wake_fd < 0)
            error = -errno;
        else
            error = -pthread_create(&w->thread, NULL, helper, w);
        w->started = !error;
    }
    if (error)
        worker_stop(w);
    return error;
}

void worker_stop(struct worker *w)
{
    if (w->started) {
        __atomic_store_n(&w->stop, 1, __ATOMIC_RELEASE);
        wake(w->wake_fd);
        pthread_join(w->thread, NULL);
    }
    if (w->wake_fd >= 0)
        close(w->wake_fd);
    ZSTD_freeCCtx(w->compress);
    squeezer_free(&w->squeezer);
    expander_stop(&w->expand);
    memset(w, 0, sizeof(*w));
    w->wake_fd = -1;
}

bool worker_submit(struct worker *w, struct job *job, bool urgent)
{
    /* `finished` holds WORKER_RING: never let more jobs exist. */
    if (w->outstanding == WORKER_RING || !ring_push(urgent ? &w->urgent : &w->normal, job))
        return false;
    w->outstanding++;
    if (w->inline_jobs)
        return true;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&w->sleeping, __ATOMIC_RELAXED) &&
        __atomic_exchange_n(&w->sleeping, 0, __ATOMIC_SEQ_CST))
        wake(w->wake_fd);
    return true;
}

uint32_t worker_reap(struct worker *w)
{
    uint32_t reaped = 0;
    struct job *job;

    if (w->outstanding == 0)
        return 0;
    if (w->inline_jobs) {
        job = next_job(w);
        if (job) {
            job->run(job, w);
            check(ring_push(&w->finished, job));
        }
    }
    while ((job = ring_pop(&w->finished))) {
        w->outstanding--;
        job->done(job);
        reaped++;
    }
    return reaped;
}
