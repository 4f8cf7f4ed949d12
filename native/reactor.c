/* reactor.c - see reactor.h: the loop. */
#include "reactor.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define WAKE_TAG 0u

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- Events ------------------------------------------------------------------------------ */

/* Answers always get through; the rest is bounded, should Python not keep up. */
void reactor_emit(struct reactor *r, const core_event *event)
{
    struct event_node *n;
    uint64_t one = 1;
    bool drop = event->type != CORE_EVENT_DONE &&
                __atomic_load_n(&r->events, __ATOMIC_RELAXED) >= EVENTS_MAX;

    n = drop ? NULL : malloc(sizeof(*n));
    if (!n) {
        check(event->type != CORE_EVENT_DONE);
        r->events_lost++;
        return;
    }
    n->event = *event;
    n->next = NULL;
    pthread_mutex_lock(&r->event_lock);
    if (r->event_last)
        r->event_last->next = n;
    else
        r->event_first = n;
    r->event_last = n;
    __atomic_add_fetch(&r->events, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&r->event_lock);
    if (write(r->event_fd, &one, sizeof(one)) < 0) {
        /* EAGAIN: it is readable already */
    }
}

void reactor_done(struct reactor *r, const struct command *c, int64_t result, uint64_t value,
                  const char *text)
{
    core_event event = {.type = CORE_EVENT_DONE, .disk = c->disk, .token = c->token,
                        .result = result, .value = value};

    if (text)
        snprintf(event.text, sizeof(event.text), "%s", text);
    reactor_emit(r, &event);
}

/* ---- Commands ----------------------------------------------------------------------------- */

static void query_dictionaries(const struct group *g, core_status *out)
{
    const struct dictionary *newest = dictionary_newest(&g->dictionaries);

    out->dictionary = newest ? newest->id : 0;
    out->dictionary_bytes = newest ? newest->bytes : 0;
    out->dictionaries = __atomic_load_n(&g->dictionaries.count, __ATOMIC_RELAXED);
    out->dictionary_frames = g->stats.dictionary_frames;
}

static void query_status(struct reactor *r, core_status *out)
{
    struct group *g = &r->group;
    const struct arena *a = &g->arena;
    const struct epoch *open = epoch_open(g);

    memset(out, 0, sizeof(*out));
    out->mode = g->mode;
    out->generation = g->generation;
    out->open = open->id;
    out->committed = g->committed;
    out->applied = g->applied;
    out->arena_size = (uint64_t)(a->segments - GROUP_RESERVED_SEGMENTS) * SEGMENT_BYTES;
    out->arena_used = (uint64_t)(a->segments - group_free(g)) * SEGMENT_BYTES;
    if (out->arena_used > out->arena_size)
        out->arena_used = out->arena_size; /* packing is using its reserve */
    out->spill_size = (uint64_t)a->spill_segments * SEGMENT_BYTES;
    out->spill_used = (uint64_t)arena_spill_used(a) * SEGMENT_BYTES;
    out->spill_fault = (uint32_t)-g->spill.fault;
    out->journal_size = g->journal.ring_bytes;
    out->journal_used = journal_used(&g->journal);
    out->index_size = group_index_limit(g);
    out->index_used = group_index_used(g);
    for (uint32_t i = 0; i < g->epochs; i++) {
        const struct epoch *e = g->epoch[i];

        out->index_bytes += epoch_index_bytes(e);
        out->logical_bytes += epoch_logical_bytes(e);
        out->stored_bytes += epoch_stored_bytes(e);
        if (e->state == CORE_EPOCH_SEALED || e->state == CORE_EPOCH_COMMITTING) {
            if (!out->sealed_first)
                out->sealed_first = e->id;
            out->sealed_last = e->id;
        }
    }
    for (uint32_t d = 0; d < g->config.disks; d++) {
        out->clients += r->blk[d].memory != NULL;
        for (uint32_t q = 0; q < CORE_QUEUES_MAX; q++)
            out->held_requests += r->blk[d].ring[q].held;
    }
    out->pressure = group_pressure_percent(g);
    out->direct_journal = (uint32_t)g->config.journal_direct;
    out->commits = g->stats.commits;
    out->applies = g->stats.applies;
    out->discards = g->stats.discards;
    out->seals = g->stats.seals;
    out->compressed_frames = g->stats.compressed_frames;
    out->incompressible_frames = g->stats.incompressible_frames;
    out->zero_frames = group_zero_frames(g);
    out->dropped_frames = g->stats.dropped_frames;
    out->compress_ns = g->stats.compress_ns;
    out->pack_bytes_in = g->stats.pack_bytes_in;
    out->pack_bytes_out = g->stats.pack_bytes_out;
    out->clusters = g->stats.clusters;
    for (uint32_t i = 0; i < g->writers; i++) {
        const struct expander *x = &g->writer[i].expand;

        out->wanted_bytes += x->wanted_bytes;
        out->expanded_bytes += x->expanded_bytes;
        out->cluster_hits += x->hits;
        out->cluster_misses += x->misses;
    }
    out->pack_queue = pack_queue(g);
    out->pack_level = g->pack.level;
    query_dictionaries(g, out);
    out->commit_ns_last = g->stats.commit_ns_last;
    out->seal_ns_last = g->stats.seal_ns_last;
    out->apply_ns_last = g->stats.apply_ns_last;
    out->journal_bytes_written = g->stats.journal_bytes;
    out->image_bytes_written = g->stats.image_bytes;
    out->spill_bytes_written = g->stats.spill_bytes;
    memcpy(out->error, g->error, sizeof(out->error));
}

static int64_t query_epochs(const struct reactor *r, core_epoch_info *out, uint32_t max)
{
    const struct group *g = &r->group;
    uint32_t n = 0;

    for (; n < g->epochs && n < max; n++) {
        const struct epoch *e = g->epoch[n];

        out[n] = (core_epoch_info){.id = e->id, .state = e->state, .blocks = epoch_slots(e),
                                   .segments = epoch_segments(e),
                                   .logical_bytes = epoch_logical_bytes(e),
                                   .stored_bytes = epoch_stored_bytes(e),
                                   .index_bytes = epoch_index_bytes(e)};
    }
    return n;
}

static void answer_query(struct reactor *r, struct command *c, int64_t result)
{
    pthread_mutex_lock(&r->query_lock);
    c->result = result;
    c->answered = true;
    pthread_cond_broadcast(&r->query_done);
    pthread_mutex_unlock(&r->query_lock);
}

static void take_verb(struct reactor *r, struct command *c)
{
    int error;

    c->verb.token = c->token;
    error = checkpoint_submit(&r->group, &c->verb);
    if (error)
        reactor_done(r, c, error, 0, "no memory to queue the command");
    free(c);
}

static void take_command(struct reactor *r, struct command *c)
{
    switch (c->kind) {
    case COMMAND_VERB:
        take_verb(r, c);
        break;
    case COMMAND_QUERY_STATUS:
        query_status(r, c->out);
        answer_query(r, c, 0);
        break;
    case COMMAND_QUERY_EPOCHS:
        answer_query(r, c, query_epochs(r, c->out, c->max));
        break;
    case COMMAND_QUERY_DISK:
        blk_query(&r->blk[c->disk], c->out);
        answer_query(r, c, 0);
        break;
    case COMMAND_EXIT:
        r->exit = true;
        free(c);
        break;
    default:
        blk_command(&r->blk[c->disk], c);
    }
}

static bool take_commands(struct reactor *r)
{
    struct command *c, *next;

    if (likely(__atomic_load_n(&r->commands, __ATOMIC_ACQUIRE) == 0))
        return false;
    pthread_mutex_lock(&r->command_lock);
    c = r->command_first;
    r->command_first = r->command_last = NULL;
    __atomic_store_n(&r->commands, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&r->command_lock);
    for (; c; c = next) {
        next = c->next;
        take_command(r, c);
    }
    return true;
}

/* ---- The loop ----------------------------------------------------------------------------- */

void reactor_running_changed(struct reactor *r)
{
    r->running_count = 0;
    r->polled_ring = false;
    for (uint32_t d = 0; d < r->group.config.disks; d++)
        for (uint32_t q = 0; q < CORE_QUEUES_MAX; q++) {
            struct ring *ring = &r->blk[d].ring[q];

            if (!ring->running)
                continue;
            r->running[r->running_count++] = ring;
            r->polled_ring |= ring->kick_fd < 0;
        }
}

static bool poll_rings(struct reactor *r)
{
    uint32_t done = 0;

    epoch_batch_begin(&r->group.writer[0]);
    /* A ring that breaks leaves the list: walk it from the end. */
    for (uint32_t i = r->running_count; i-- > 0;) {
        if (i >= r->running_count)
            continue;
        done += ring_poll(r->running[i], POLL_BUDGET);
    }
    epoch_batch_end(&r->group.writer[0]);
    return done > 0;
}

static void publish_rings(struct reactor *r)
{
    for (uint32_t i = 0; i < r->news_count; i++) {
        r->news[i]->to_publish = false;
        ring_publish(r->news[i]);
    }
    r->news_count = 0;
}

/* The only look at the clock. It ends the round before: all that it answered is shown to the
 * drivers by now. */
static void begin_round(struct reactor *r, bool moved)
{
    uint64_t now = now_ns();

    if (moved)
        metrics_round_over(&r->group.metrics, now - r->group.now_ns, now);
    r->group.now_ns = now;
    if (unlikely(now >= r->group.metrics.publish_ns))
        metrics_publish(r);
}

static bool step(struct reactor *r)
{
    bool moved = take_commands(r);

    moved |= poll_rings(r);
    moved |= disk_reap(r->group.disk, false) > 0;
    moved |= group_step(&r->group); /* one step, then requests again: none waits for long */
    for (uint32_t d = 0; d < r->group.config.disks; d++)
        while (blk_step(&r->blk[d]))
            moved = true;
    publish_rings(r);
    return moved;
}

static bool want_kicks(struct reactor *r, bool want)
{
    bool work = false;

    /* From the end, as in poll_rings(): a dirty log that falls short breaks the ring, and
     * none of the others may be passed over, or it would sleep through its kick. */
    for (uint32_t i = r->running_count; i-- > 0;)
        if (i < r->running_count)
            ring_want_kicks(r->running[i], want);
    if (want) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the wish is out before we look again */
        for (uint32_t i = 0; i < r->running_count; i++)
            work |= ring_has_work(r->running[i]);
    }
    return work;
}

static void sleep_until_work(struct reactor *r)
{
    uint64_t timer = group_timer(&r->group), timeout = 0;

    for (uint32_t d = 0; d < r->group.config.disks; d++) {
        uint64_t at = blk_timer(&r->blk[d]);

        if (at && (!timer || at < timer))
            timer = at;
    }
    if (want_kicks(r, true) || __atomic_load_n(&r->commands, __ATOMIC_ACQUIRE)) {
        want_kicks(r, false);
        return;
    }
    metrics_publish(r);
    metrics_sleeping(&r->group.metrics, true);
    if (timer)
        timeout = timer > r->group.now_ns ? timer - r->group.now_ns : 1;
    if (r->polled_ring && (!timeout || timeout > SLEEP_POLLED_NS))
        timeout = SLEEP_POLLED_NS;
    disk_uring_sleep(r->uring, timeout);
    metrics_sleeping(&r->group.metrics, false);
    want_kicks(r, false);
}

/* What is in flight uses our buffers: give it a moment. A disk that does not answer is not
 * waited for; then nothing of the core is freed, the process is about to end. */
static void settle(struct reactor *r)
{
    uint64_t until = now_ns() + SETTLE_NS;

    while (disk_uring_in_flight(r->uring) > 0 && now_ns() < until) {
        disk_uring_sleep(r->uring, SETTLE_NS / 50);
        disk_uring_discard(r->uring);
    }
    r->unsettled = disk_uring_in_flight(r->uring) > 0;
    if (!r->unsettled)
        disk_uring_release(r->uring);
}

void *reactor_main(void *arg)
{
    struct reactor *r = arg;
    uint64_t most_ns = (uint64_t)r->group.config.spin_us * 1000, spin_ns = most_ns, last_work;
    bool moved = false;

    prctl(PR_SET_NAME, "reactor");
    disk_uring_watch(r->uring, r->wake_fd, WAKE_TAG);
    last_work = now_ns();
    while (!r->exit) {
        begin_round(r, moved);
        moved = step(r);
        if (moved)
            last_work = r->group.now_ns;
        else if (r->group.now_ns - last_work >= spin_ns) {
            sleep_until_work(r);
            last_work = now_ns();
            r->group.metrics.asleep_ns += last_work - r->group.now_ns;
            spin_ns = reactor_spin(spin_ns, most_ns, last_work - r->group.now_ns);
        }
    }
    settle(r);
    return NULL;
}
