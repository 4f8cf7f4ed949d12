/* metrics.c - see metrics.h. */
#include "metrics.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "reactor.h"

#define SUMMED_EPOCHS_MAX 4u  /* more are added up for every 64th picture only */

static uint64_t clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- Life ------------------------------------------------------------------------------------ */

int metrics_open(struct metrics *m, int fd, const uint8_t group[16], const char *name,
                 const char *control)
{
    struct metrics_page *p = mmap(NULL, sizeof(*p), PROT_READ | PROT_WRITE,
                                  MAP_SHARED | MAP_POPULATE, fd, 0);

    if (p == MAP_FAILED)
        return -errno;
    p->version = METRICS_VERSION;
    p->pid = (uint32_t)getpid();
    p->page_bytes = sizeof(*p);
    p->started_ns = clock_ns();
    memcpy(p->group, group, sizeof(p->group));
    snprintf(p->name, sizeof(p->name), "%s", name);
    snprintf(p->control, sizeof(p->control), "%s", control);
    m->page = p;
    m->writers = 1;
    m->until_trace = METRICS_TRACE_EVERY;
    return 0;
}

void metrics_share(struct metrics *m, const struct metrics *first, uint32_t number,
                   uint32_t writers)
{
    m->page = first->page;
    m->number = number;
    m->writers = writers;
    m->until_trace = METRICS_TRACE_EVERY;
    if (m->page)
        m->page->reactors = writers;
}

void metrics_close(struct metrics *m)
{
    if (m->page)
        munmap(m->page, sizeof(*m->page));
    m->page = NULL;
}

/* ---- Traces ---------------------------------------------------------------------------------- */

static uint32_t since(const struct metrics_trace *t, uint64_t now)
{
    uint64_t ns = now - t->fetched_ns;

    return ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns;
}

void metrics_trace_begin(struct metrics *m, uint64_t fetched_ns, const struct metrics_trace *about)
{
    m->until_trace = METRICS_TRACE_EVERY;
    if (!m->page)
        return;
    m->trace = *about;
    m->trace.fetched_ns = fetched_ns;
    m->trace.begun_ns = since(&m->trace, clock_ns());
    m->tracing = true;
}

/* Each writer has slots of its own. */
static struct metrics_trace *trace_slot(const struct metrics *m, uint64_t n)
{
    uint32_t slots = METRICS_TRACES / m->writers;

    return &m->page->trace[m->number * slots + n % slots];
}

/* Into the next slot, whose `number` stays 0 until the end of the round. */
static void put_trace(struct metrics *m, const struct metrics_trace *trace)
{
    struct metrics_trace *slot = trace_slot(m, m->traced++);

    __atomic_store_n(&slot->number, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE); /* 0 is out before the rest changes */
    memcpy(&slot->fetched_ns, &trace->fetched_ns,
           sizeof(*slot) - offsetof(struct metrics_trace, fetched_ns));
    m->unpublished++;
}

void metrics_trace_end(struct metrics *m, uint8_t status)
{
    m->tracing = false;
    m->trace.copied_ns = since(&m->trace, clock_ns());
    m->trace.status = status;
    put_trace(m, &m->trace);
}

void metrics_trace_wait(struct metrics *m, struct metrics_trace *trace)
{
    *trace = (struct metrics_trace){0};
    if (!m->tracing)
        return;
    m->tracing = false;
    *trace = m->trace;
    trace->copied_ns = since(trace, clock_ns());
    trace->waited = 1;
}

void metrics_trace_late(struct metrics *m, struct metrics_trace *trace, uint8_t status)
{
    if (trace->fetched_ns == 0)
        return;
    trace->status = status;
    put_trace(m, trace);
}

void metrics_late(struct metrics *m, enum metrics_stage stage, uint64_t fetched_ns,
                  uint64_t now_ns)
{
    if (now_ns == fetched_ns) /* within one round: the round's clock says nothing */
        now_ns = clock_ns();
    metrics_add(m, stage, now_ns - fetched_ns, 1);
}

/* ---- Rounds ---------------------------------------------------------------------------------- */

__attribute__((noinline)) static void publish_traces(struct metrics *m, uint64_t now_ns)
{
    for (; m->unpublished > 0; m->unpublished--) {
        uint64_t place = m->traced - m->unpublished;
        struct metrics_trace *t = trace_slot(m, place);

        t->published_ns = since(t, now_ns);
        if (!t->waited) {
            metrics_add(m, METRICS_REQUEST_WAIT, t->begun_ns, 1);
            metrics_add(m, METRICS_REQUEST_COPY, t->copied_ns - t->begun_ns, 1);
            metrics_add(m, METRICS_REQUEST_PUBLISH, t->published_ns - t->copied_ns, 1);
        }
        __atomic_store_n(&t->number, place * m->writers + m->number + 1, __ATOMIC_RELEASE);
        metrics_grow(m, &m->page->traced, 1);
    }
}

void metrics_round_over(struct metrics *m, uint64_t ns, uint64_t now_ns)
{
    m->busy_ns += ns;
    if (likely(m->page && (m->answered[0] | m->answered[1] | m->answered[2]))) {
        uint32_t bucket = metrics_bucket(ns);

        for (uint32_t i = 0; i < METRICS_ROUND_STAGES; i++)
            if (m->answered[i])
                metrics_grow(m, &m->page->stage[i].bucket[bucket], m->answered[i]);
        m->batches++;
    }
    memset(m->answered, 0, sizeof(m->answered));
    if (unlikely(m->unpublished > 0))
        publish_traces(m, now_ns);
}

/* ---- The picture ----------------------------------------------------------------------------- */

static void picture_group(const struct group *g, struct metrics_state *s)
{
    const struct arena *a = &g->arena;

    s->mode = g->mode;
    s->generation = g->generation;
    s->open = epoch_open(g)->id;
    s->committed = g->committed;
    s->applied = g->applied;
    s->epochs = g->epochs;
    s->arena_bytes = (uint64_t)(a->segments - GROUP_RESERVED_SEGMENTS) * SEGMENT_BYTES;
    s->arena_used = (uint64_t)(a->segments - group_free(g)) * SEGMENT_BYTES;
    if (s->arena_used > s->arena_bytes)
        s->arena_used = s->arena_bytes; /* packing is using its reserve */
    s->arena_percent = group_pressure_percent(g);
    s->index_size = group_index_limit(g);
    s->index_used = group_index_used(g);
    s->journal_bytes = g->journal.ring_bytes;
    s->journal_used = journal_used(&g->journal);
    s->seals = g->stats.seals;
    s->commits = g->stats.commits;
    s->applies = g->stats.applies;
    s->discards = g->stats.discards;
    s->compressed_frames = g->stats.compressed_frames;
    s->incompressible_frames = g->stats.incompressible_frames;
    s->zero_frames = group_zero_frames(g);
    s->dropped_frames = g->stats.dropped_frames;
    s->compress_ns = g->stats.compress_ns;
    s->journal_written = g->stats.journal_bytes;
    s->image_written = g->stats.image_bytes;
    memcpy(s->error, g->error, sizeof(s->error));
    if (g->epochs > SUMMED_EPOCHS_MAX && s->version % 128 != 1)
        return; /* the last sums stand */
    s->logical_bytes = s->stored_bytes = s->index_bytes = 0;
    for (uint32_t i = 0; i < g->epochs; i++) {
        s->logical_bytes += epoch_logical_bytes(g->epoch[i]);
        s->stored_bytes += epoch_stored_bytes(g->epoch[i]);
        s->index_bytes += epoch_index_bytes(g->epoch[i]);
    }
}

static void picture_disk(const struct blk *b, struct metrics_disk *d)
{
    const struct blk_stats *s = &b->stats;

    memcpy(d->name, b->config->name, sizeof(d->name));
    d->reads = s->reads;
    d->writes = s->writes;
    d->flushes = s->flushes;
    d->discards = s->discards;
    d->write_zeroes = s->write_zeroes;
    d->read_bytes = s->read_bytes;
    d->write_bytes = s->write_bytes;
    d->errors = s->errors;
    d->unsupported = s->unsupported;
    d->rejected = s->rejected;
    d->held = s->held;
    d->connected = b->memory != NULL;
    memset(d->queue, 0, sizeof(d->queue));
}

static void picture_queue(const struct ring *r, struct metrics_queue *q)
{
    *q = (struct metrics_queue){.requests = r->requests, .kicks = r->kicks, .calls = r->calls,
                                .size = r->size, .inflight = r->inflight, .running = 1,
                                .held = r->held && r->held_told};
}

static void picture_reactor(struct reactor *r, struct metrics_state *s)
{
    s->busy_ns += r->metrics.busy_ns;
    s->asleep_ns += r->metrics.asleep_ns;
    if (r->follows && __atomic_load_n(&r->asleep, __ATOMIC_RELAXED)) /* since its last round */
        s->asleep_ns += r->group->now_ns > r->now_ns ? r->group->now_ns - r->now_ns : 0;
    s->batches += r->metrics.batches;
    r->unseen = false;
    for (uint32_t i = 0; i < r->running_count; i++) {
        const struct ring *ring = r->running[i];

        picture_queue(ring, &s->disk[ring->blk->disk].queue[ring->index]);
    }
}

void metrics_publish(struct core *c)
{
    struct group *g = &c->group;
    struct metrics *m = &g->metrics;
    struct metrics_state *s;
    uint64_t version;

    m->publish_ns = g->now_ns + METRICS_PUBLISH_NS;
    __atomic_store_n(&c->picture, 0, __ATOMIC_RELAXED);
    if (!m->page)
        return;
    s = &m->page->state;
    version = s->version;
    __atomic_store_n(&s->version, version + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    s->updated_ns = g->now_ns;
    s->busy_ns = s->asleep_ns = s->batches = 0;
    s->disks = g->config.disks;
    picture_group(g, s);
    for (uint32_t i = 0; i < g->config.disks; i++)
        picture_disk(&c->blk[i], &s->disk[i]);
    for (uint32_t i = 0; i < c->reactors; i++)
        picture_reactor(&c->reactor[i], s);
    __atomic_store_n(&s->version, version + 2, __ATOMIC_RELEASE);
    if (m->page->magic == 0)
        __atomic_store_n(&m->page->magic, METRICS_MAGIC, __ATOMIC_RELEASE);
}
