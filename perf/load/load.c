/* load.c - see load.h: setting up, beginning and ending runs, and what others see of them. The
 * loop itself is in loop.c. */
#include "load.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "loop.h"

/* ---- Setting up ------------------------------------------------------------------------- */

/* Shares the requests out, so that the queues' counts do not depend on timing. */
static void share(load *l)
{
    for (uint32_t i = 0; i < l->queue_count; i++) {
        struct queue *q = &l->queue[i];
        uint64_t quota = l->work.ios ? l->work.ios / l->queue_count +
                                           (i < l->work.ios % l->queue_count)
                                     : UINT64_MAX;

        choose_init(&q->choose, &l->work, i, l->disk[q->disk].blocks, q->part,
                    l->queues_per_disk);
        q->left = quota;
        if (l->work.once && q->choose.end - q->choose.begin < quota)
            q->left = q->choose.end - q->choose.begin;
        q->holds = false;
        q->due_count = 0;
        q->pool_next = i * (l->config.pool_blocks / l->queue_count);
    }
}

static void start_clock(load *l)
{
    const load_workload *w = &l->work;
    uint64_t now = clock_ticks(&l->clock);

    l->ramping = w->ramp_ns > 0;
    l->ramp_end = now + clock_from_ns(&l->clock, w->ramp_ns);
    l->deadline = w->duration_ns ? l->ramp_end + clock_from_ns(&l->clock, w->duration_ns)
                                 : UINT64_MAX;
    l->started = l->begin = l->last_done = l->now = now;
    l->interval = 0;
    l->interval_ticks = clock_from_ns(&l->clock, w->interval_ns);
    l->interval_end = l->ramping ? UINT64_MAX : now + l->interval_ticks;
    l->stuck_ticks = clock_from_ns(&l->clock, w->stuck_ns);
    l->ticks_per_due = w->rate > 0 ? 1e9 / w->rate * l->clock.ticks_per_ns * l->queue_count : 0;
}

static bool prepare(load *l, const load_workload *w)
{
    uint64_t *series = calloc(w->intervals, sizeof(*series));

    if (!series) {
        loop_fail(l, "no memory for the run");
        return false;
    }
    free(l->series);
    l->series = series;
    l->work = *w;
    l->closing = false;
    pthread_mutex_lock(&l->text_lock);
    memset(&l->state, 0, l->aborted ? offsetof(load_state, text) : sizeof(l->state));
    pthread_mutex_unlock(&l->text_lock);
    loop_reset_counts(l);
    share(l);
    start_clock(l);
    return true;
}

static int how_it_ended(load *l)
{
    bool stopped = loop_asked_to_stop(l);
    uint64_t count;

    if (loop_lost(l)) {
        __atomic_store_n(&l->aborted, true, __ATOMIC_RELEASE);
        return LOAD_LOST;
    }
    __atomic_store_n(&l->stop, false, __ATOMIC_RELAXED);
    if (read(l->stop_fd, &count, sizeof(count)) < 0) {
        /* EAGAIN: nobody stopped it */
    }
    if (loop_too_bad(l))
        return LOAD_FAILED;
    return stopped ? LOAD_STOPPED : LOAD_ENDED;
}

int load_run(load *l, const load_workload *w)
{
    struct pollfd *fds;

    if (loop_lost(l))
        return LOAD_LOST;
    fds = calloc(l->queue_count + 1, sizeof(*fds));
    if (!fds || !prepare(l, w)) {
        free(fds);
        loop_fail(l, "no memory for the run");
        return LOAD_FAILED;
    }
    loop_run(l, fds);
    free(fds);
    ADD(l->state.ns, clock_ns(&l->clock, l->last_done - l->begin));
    return how_it_ended(l);
}

void load_stop(load *l)
{
    uint64_t one = 1;

    __atomic_store_n(&l->stop, true, __ATOMIC_RELAXED);
    if (write(l->stop_fd, &one, sizeof(one)) < 0) {
        /* EAGAIN: it was stopped often enough */
    }
}

void load_abort(load *l, const char *text)
{
    pthread_mutex_lock(&l->text_lock);
    if (!l->state.text[0])
        snprintf(l->state.text, sizeof(l->state.text), "%s", text);
    __atomic_store_n(&l->aborted, true, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&l->text_lock);
    load_stop(l);
}

void load_peek(load *l, load_state *out)
{
    const uint64_t *from = (const uint64_t *)&l->state;
    uint64_t *to = (uint64_t *)out;

    for (size_t i = 0; i < offsetof(load_state, in_flight) / sizeof(*from); i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    out->in_flight = __atomic_load_n(&l->state.in_flight, __ATOMIC_RELAXED);
    pthread_mutex_lock(&l->text_lock);
    memcpy(out->text, l->state.text, sizeof(out->text));
    pthread_mutex_unlock(&l->text_lock);
}

const uint64_t *load_histogram(const load *l)
{
    return l->histogram;
}

const uint64_t *load_series(const load *l)
{
    return l->series;
}

uint32_t load_counter_of(const load_config *config, uint64_t ns)
{
    return loop_counter_of(config, ns);
}

/* ---- Life ------------------------------------------------------------------------------- */

static bool queue_init(load *l, uint32_t i, const load_queue_config *config)
{
    struct queue *q = &l->queue[i];
    uint32_t depth = l->config.depth;

    q->disk = config->disk;
    q->index = i;
    q->buffers = config->buffers;
    for (uint32_t earlier = 0; earlier < i; earlier++)
        q->part += l->queue[earlier].disk == q->disk;
    q->flight = calloc(depth, sizeof(*q->flight));
    q->free = calloc(depth, sizeof(*q->free));
    q->batch = calloc(depth, sizeof(*q->batch));
    if (!q->flight || !q->free || !q->batch)
        return false;
    while (q->free_count < depth) { /* the first slot on top */
        q->free[q->free_count] = (uint16_t)(depth - 1 - q->free_count);
        q->free_count++;
    }
    ring_init(&q->ring, &l->config, config);
    return true;
}

/* False: no memory. */
static bool fill(load *l, const load_disk_config *disks, const load_queue_config *queues)
{
    l->disk = calloc(l->disk_count, sizeof(*l->disk));
    l->queue = calloc(l->queue_count, sizeof(*l->queue));
    l->histogram = calloc(LOAD_OPS * l->config.counts, sizeof(*l->histogram));
    l->series = calloc(1, sizeof(*l->series));
    if (!l->disk || !l->queue || !l->histogram || !l->series)
        return false;
    memcpy(l->disk, disks, l->disk_count * sizeof(*disks));
    for (uint32_t i = 0; i < l->queue_count; i++)
        if (!queue_init(l, i, &queues[i]))
            return false;
    if (l->config.verify)
        l->verify = verify_create(&l->config, disks, l->disk_count);
    return l->verify || !l->config.verify;
}

load *load_create(const load_config *config, const load_disk_config *disks, uint32_t disk_count,
                  const load_queue_config *queues, uint32_t queue_count, char *text)
{
    load *l = calloc(1, sizeof(*l));

    if (!l) {
        snprintf(text, LOAD_TEXT_MAX, "no memory");
        return NULL;
    }
    l->config = *config;
    l->disk_count = disk_count;
    l->queue_count = queue_count;
    l->queues_per_disk = queue_count / disk_count;
    pthread_mutex_init(&l->text_lock, NULL);
    clock_init(&l->clock);
    l->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (l->stop_fd < 0 || !fill(l, disks, queues)) {
        snprintf(text, LOAD_TEXT_MAX, "no memory or descriptor: %s", strerror(errno));
        load_free(l);
        return NULL;
    }
    return l;
}

void load_free(load *l)
{
    if (!l)
        return;
    for (uint32_t i = 0; l->queue && i < l->queue_count; i++) {
        free(l->queue[i].flight);
        free(l->queue[i].free);
        free(l->queue[i].batch);
    }
    if (l->stop_fd >= 0)
        close(l->stop_fd);
    verify_free(l->verify);
    pthread_mutex_destroy(&l->text_lock);
    free(l->queue);
    free(l->disk);
    free(l->histogram);
    free(l->series);
    free(l);
}
