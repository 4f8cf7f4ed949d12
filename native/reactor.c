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
void reactor_emit(struct core *c, const core_event *event)
{
    struct event_node *n;
    uint64_t one = 1;
    bool drop = event->type != CORE_EVENT_DONE &&
                __atomic_load_n(&c->events, __ATOMIC_RELAXED) >= EVENTS_MAX;

    n = drop ? NULL : malloc(sizeof(*n));
    if (!n) {
        check(event->type != CORE_EVENT_DONE);
        __atomic_add_fetch(&c->events_lost, 1, __ATOMIC_RELAXED);
        return;
    }
    n->event = *event;
    n->next = NULL;
    pthread_mutex_lock(&c->event_lock);
    if (c->event_last)
        c->event_last->next = n;
    else
        c->event_first = n;
    c->event_last = n;
    __atomic_add_fetch(&c->events, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&c->event_lock);
    if (write(c->event_fd, &one, sizeof(one)) < 0) {
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
    reactor_emit(r->core, &event);
}

/* ---- Several reactors ------------------------------------------------------------------------ */

static void wake_up(const struct reactor *r)
{
    uint64_t one = 1;

    if (write(r->wake_fd, &one, sizeof(one)) < 0) {
        /* EAGAIN: it is readable already */
    }
}

void reactor_called(void *core)
{
    const struct reactor *leader = &((struct core *)core)->reactor[0];

    /* Either we see it asleep, or it sees that the group is asked for. */
    if (__atomic_load_n(&leader->asleep, __ATOMIC_SEQ_CST))
        wake_up(leader);
}

void reactor_wake(void *core, uint32_t number)
{
    ((struct core *)core)->reactor[number].nudged = true;
}

static void close_gate(struct reactor *r)
{
    if (unlikely(r->leads))
        gate_close(&r->core->gate);
}

/* With it closed: whoever has got something to do meanwhile is told, should he be asleep. */
static void open_gate(struct reactor *r)
{
    struct core *c = r->core;

    if (likely(!r->leads))
        return;
    for (uint32_t i = 1; i < c->reactors; i++) {
        struct reactor *f = &c->reactor[i];

        if ((f->nudged || f->news_count > 0) && __atomic_load_n(&f->asleep, __ATOMIC_RELAXED))
            wake_up(f);
    }
    gate_open(&c->gate);
}

/* Is anything there for group_step()? Each look at it costs the others a wait. */
static bool group_due(const struct reactor *r)
{
    const struct group *g = r->group;

    return r->again || __atomic_load_n(&g->asked, __ATOMIC_SEQ_CST) || worker_ready(&g->worker) ||
           worker_ready(&g->packer) || disk_uring_ready(r->uring) ||
           (r->timer && r->now_ns >= r->timer) || r->now_ns >= r->look_ns;
}

/* One step, then requests again: none waits for long. */
static bool step_group(struct reactor *r, bool due)
{
    struct group *g = r->group;

    if (likely(!r->leads))
        return !r->follows && group_step(g);
    if (!due)
        return false;
    close_gate(r);
    r->again = disk_reap(g->disk, false) > 0;
    r->again |= group_step(g);
    if (__atomic_load_n(&r->core->picture, __ATOMIC_RELAXED))
        metrics_publish(r->core);
    r->timer = group_timer(g);
    open_gate(r);
    r->look_ns = r->now_ns + LOOK_NS;
    return r->again;
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

static void query_status(struct core *c, core_status *out)
{
    struct group *g = &c->group;
    const struct arena *a = &g->arena;
    const struct epoch *open = epoch_open(g);

    memset(out, 0, sizeof(*out));
    out->mode = g->mode;
    out->reactors = c->reactors;
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
        out->clients += c->blk[d].memory != NULL;
        for (uint32_t q = 0; q < CORE_QUEUES_MAX; q++)
            out->held_requests += c->blk[d].ring[q].held && c->blk[d].ring[q].held_told;
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
    out->merges = g->stats.merges;
    out->merged_blocks = g->stats.merged_blocks;
    out->merge_bytes_in = g->stats.merge_bytes_in;
    out->merge_bytes_out = g->stats.merge_bytes_out;
    out->merge_queue = g->merge.waiting;
    query_dictionaries(g, out);
    out->commit_ns_last = g->stats.commit_ns_last;
    out->seal_ns_last = g->stats.seal_ns_last;
    out->apply_ns_last = g->stats.apply_ns_last;
    out->journal_bytes_written = g->stats.journal_bytes;
    out->image_bytes_written = g->stats.image_bytes;
    out->spill_bytes_written = g->stats.spill_bytes;
    memcpy(out->error, g->error, sizeof(out->error));
}

static int64_t query_epochs(const struct core *c, core_epoch_info *out, uint32_t max)
{
    const struct group *g = &c->group;
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
    struct core *core = r->core;

    pthread_mutex_lock(&core->query_lock);
    c->result = result;
    c->answered = true;
    pthread_cond_broadcast(&core->query_done);
    pthread_mutex_unlock(&core->query_lock);
}

static void take_verb(struct reactor *r, struct command *c)
{
    int error;

    c->verb.token = c->token;
    error = checkpoint_submit(r->group, &c->verb);
    r->again = true;
    if (error)
        reactor_done(r, c, error, 0, "no memory to queue the command");
    free(c);
}

static void take_command(struct reactor *r, struct command *c)
{
    int64_t count;

    switch (c->kind) {
    case COMMAND_VERB:
        take_verb(r, c);
        break;
    case COMMAND_QUERY_STATUS:
        close_gate(r);
        query_status(r->core, c->out);
        open_gate(r);
        answer_query(r, c, 0);
        break;
    case COMMAND_QUERY_EPOCHS:
        close_gate(r);
        count = query_epochs(r->core, c->out, c->max);
        open_gate(r);
        answer_query(r, c, count);
        break;
    case COMMAND_QUERY_DISK:
        blk_query(&r->core->blk[c->disk], c->out);
        answer_query(r, c, 0);
        break;
    case COMMAND_QUERY_IDLE:
        close_gate(r);
        count = r->group->checkpoint.stopped && r->group->epochs == 1 &&
                epoch_empty(epoch_open(r->group));
        open_gate(r);
        answer_query(r, c, count);
        break;
    case COMMAND_EXIT:
        r->exit = true;
        free(c);
        break;
    default:
        blk_command(&r->core->blk[c->disk], c);
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

/* The next one of the reactor's disks. */
static uint32_t next_disk(const struct reactor *r, uint32_t disk)
{
    return disk + r->group->writers;
}

void reactor_running_changed(struct reactor *r)
{
    r->running_count = 0;
    r->polled_ring = false;
    for (uint32_t d = r->number; d < r->group->config.disks; d = next_disk(r, d))
        for (uint32_t q = 0; q < CORE_QUEUES_MAX; q++) {
            struct ring *ring = &r->core->blk[d].ring[q];

            if (!ring->running)
                continue;
            r->running[r->running_count++] = ring;
            r->polled_ring |= ring->kick_fd < 0;
        }
}

static bool poll_rings(struct reactor *r)
{
    uint32_t done = 0;

    epoch_batch_begin(r->writer);
    /* A ring that breaks leaves the list: walk it from the end. */
    for (uint32_t i = r->running_count; i-- > 0;) {
        if (i >= r->running_count)
            continue;
        done += ring_poll(r->running[i], POLL_BUDGET);
    }
    epoch_batch_end(r->writer);
    return done > 0;
}

static bool publish_rings(struct reactor *r)
{
    bool any = r->news_count > 0;

    for (uint32_t i = 0; i < r->news_count; i++) {
        r->news[i]->to_publish = false;
        ring_publish(r->news[i]);
    }
    r->news_count = 0;
    return any;
}

/* The leader's or the only one's at once; others ask for it. */
static void show(struct reactor *r)
{
    if (unlikely(r->follows)) {
        r->metrics.publish_ns = r->now_ns + METRICS_PUBLISH_NS;
        if (!r->unseen || !r->metrics.page)
            return;
        __atomic_store_n(&r->core->picture, 1, __ATOMIC_RELAXED);
        writer_ask(r->writer);
        return;
    }
    close_gate(r);
    metrics_publish(r->core);
    r->metrics.publish_ns = r->group->metrics.publish_ns;
    open_gate(r);
}

/* The only look at the clock. It ends the round before: all that it answered is shown to the
 * drivers by now. */
static void begin_round(struct reactor *r, bool moved)
{
    uint64_t now = now_ns();

    if (moved)
        metrics_round_over(&r->metrics, now - r->now_ns, now);
    r->unseen |= moved;
    r->now_ns = now;
    if (likely(!r->follows))
        r->group->now_ns = now;
    if (unlikely(now >= r->metrics.publish_ns))
        show(r);
}

static bool step(struct reactor *r)
{
    bool moved = take_commands(r);

    if (likely(!moved)) /* a verb has waited for a round already */
        moved = poll_rings(r);
    moved |= disk_reap(r->disk, false) > 0;
    moved |= step_group(r, r->leads && group_due(r));
    for (uint32_t d = r->number; d < r->group->config.disks; d = next_disk(r, d))
        while (blk_step(&r->core->blk[d]))
            moved = true;
    moved |= publish_rings(r);
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

static uint64_t sleep_timer(const struct reactor *r)
{
    uint64_t timer = r->follows ? 0 : r->leads ? r->timer : group_timer(r->group);

    for (uint32_t d = r->number; d < r->group->config.disks; d = next_disk(r, d)) {
        uint64_t at = blk_timer(&r->core->blk[d]);

        if (at && (!timer || at < timer))
            timer = at;
    }
    return timer;
}

/* Says that it sleeps; false: something has come up. A follower is within its round still, and the
 * leader looks at `asleep` with the gate closed: none of the two misses the other. */
static bool fall_asleep(struct reactor *r)
{
    bool work;

    if (r->leads && step_group(r, true)) /* whatever group_due() may not have seen */
        return false;
    work = want_kicks(r, true) || __atomic_load_n(&r->commands, __ATOMIC_ACQUIRE) || r->nudged ||
           r->news_count > 0;
    r->slept = true;
    if (work)
        return false;
    show(r);
    __atomic_exchange_n(&r->asleep, 1, __ATOMIC_SEQ_CST);
    if (r->leads && __atomic_load_n(&r->group->asked, __ATOMIC_SEQ_CST)) {
        __atomic_store_n(&r->asleep, 0, __ATOMIC_RELAXED);
        return false;
    }
    return true;
}

/* timeout: ns, 0: none. */
static void sleep_until_work(struct reactor *r, uint64_t timeout)
{
    struct core *c = r->core;

    if (__atomic_sub_fetch(&c->awake, 1, __ATOMIC_SEQ_CST) == 0)
        metrics_sleeping(&c->group.metrics, true);
    if (r->polled_ring && (!timeout || timeout > SLEEP_POLLED_NS))
        timeout = SLEEP_POLLED_NS;
    disk_uring_sleep(r->uring, timeout);
    __atomic_store_n(&r->asleep, 0, __ATOMIC_RELAXED);
    __atomic_add_fetch(&c->awake, 1, __ATOMIC_SEQ_CST);
    metrics_sleeping(&c->group.metrics, false);
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

static void enter(struct reactor *r)
{
    if (unlikely(r->follows))
        gate_enter(&r->core->gate, r->number - 1);
    if (unlikely(r->slept))
        want_kicks(r, false);
    r->slept = false;
}

static void leave(struct reactor *r)
{
    if (unlikely(r->follows))
        gate_leave(&r->core->gate, r->number - 1);
}

void *reactor_main(void *arg)
{
    struct reactor *r = arg;
    uint64_t most_ns = (uint64_t)r->group->config.spin_us * 1000, spin_ns = most_ns, slept_ns = 0,
             last_work;
    bool moved = false;

    prctl(PR_SET_NAME, "reactor");
    disk_uring_watch(r->uring, r->wake_fd, WAKE_TAG);
    __atomic_add_fetch(&r->core->awake, 1, __ATOMIC_SEQ_CST);
    last_work = now_ns();
    while (!r->exit) {
        bool idle, sleeping;
        uint64_t timer, began;

        enter(r);
        r->metrics.asleep_ns += slept_ns;
        slept_ns = 0;
        begin_round(r, moved);
        r->nudged = false;
        moved = step(r);
        idle = !moved && r->now_ns - last_work >= spin_ns;
        sleeping = idle && fall_asleep(r);
        timer = sleeping ? sleep_timer(r) : 0;
        began = r->now_ns;
        leave(r);
        if (moved)
            last_work = began;
        if (sleeping)
            sleep_until_work(r, timer > began ? timer - began : timer > 0);
        if (idle) {
            last_work = now_ns();
            slept_ns = last_work - began;
            spin_ns = reactor_spin(spin_ns, most_ns, slept_ns);
        }
    }
    settle(r);
    return NULL;
}
