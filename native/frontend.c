/* frontend.c - what a front end asks of a blk device besides requests: memory, rings,
 * features; see blk.h. Commands are carried out in order; one that needs quiet rings waits
 * for the requests in flight, and those behind it wait with it.
 *
 * Owner: the reactor thread.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "reactor.h"

#define REJECT_TELL_NS 10000000ull /* a disk tells of so few: an event costs memory */
#define WATCH_TAG(b, q) (1u + (b)->disk * CORE_QUEUES_MAX + (q))

void blk_init(struct blk *b, struct reactor *r, uint32_t disk)
{
    memset(b, 0, sizeof(*b));
    b->reactor = r;
    b->group = r->group;
    b->writer = r->writer;
    b->disk = disk;
    b->config = &r->group->config.disk[disk];
    b->sectors = b->config->size_bytes / SECTOR_BYTES;
    for (uint32_t i = 0; i < CORE_QUEUES_MAX; i++)
        ring_init(&b->ring[i], b, i);
}

/* ---- Called by ring.c -------------------------------------------------------------------- */

void blk_watch(struct ring *r)
{
    if (r->kick_fd >= 0 && !r->watched)
        disk_uring_watch(r->blk->reactor->uring, r->kick_fd, WATCH_TAG(r->blk, r->index));
    r->watched = r->kick_fd >= 0;
}

void blk_unwatch(struct ring *r)
{
    if (r->watched)
        disk_uring_unwatch(r->blk->reactor->uring, WATCH_TAG(r->blk, r->index));
    r->watched = false;
}

void blk_ring_broken(struct ring *r)
{
    core_event event = {.type = CORE_EVENT_RING_BROKEN, .disk = r->blk->disk, .value = r->index};

    r->blk->stats.rejected++;
    r->blk->stats.broken++;
    memcpy(event.text, r->reason, sizeof(event.text));
    reactor_emit(r->blk->reactor->core, &event);
    blk_running_changed(r->blk);
}

void blk_reject(struct blk *b, uint32_t queue, const char *format, ...)
{
    uint64_t now = b->reactor->now_ns;
    core_event event = {.type = CORE_EVENT_REJECTED, .disk = b->disk, .value = queue};
    va_list args;

    b->stats.rejected++;
    if (b->reject_told_ns && now - b->reject_told_ns < REJECT_TELL_NS) {
        b->rejects_untold++;
        return;
    }
    event.first = b->rejects_untold;
    b->rejects_untold = 0;
    b->reject_told_ns = now;
    va_start(args, format);
    vsnprintf(event.text, sizeof(event.text), format, args);
    va_end(args);
    reactor_emit(b->reactor->core, &event);
}

void blk_running_changed(struct blk *b)
{
    reactor_running_changed(b->reactor);
}

/* ---- Quiet --------------------------------------------------------------------------------- */

static void publish_all(struct blk *b)
{
    for (uint32_t i = 0; i < CORE_QUEUES_MAX; i++)
        ring_publish(&b->ring[i]);
}

static void pause_rings(struct blk *b, bool pause)
{
    b->paused = pause;
    for (uint32_t i = 0; i < CORE_QUEUES_MAX; i++) {
        struct ring *r = &b->ring[i];

        r->stopping = pause;
        if (!pause)
            ring_resolve(r);
        ring_update(r);
    }
}

/* Requests that wait for a flush of a front end that is gone are not answered any more. */
static void abandon(struct blk *b)
{
    struct request *q = b->requests, *next;

    for (; q; q = next) {
        next = q->next;
        if (!q->waits_flush)
            continue;
        checkpoint_unflush(b->group, &q->waiter);
        *q->link = q->next;
        if (q->next)
            q->next->link = q->link;
        q->ring->inflight--;
        free(q);
    }
}

/* ---- Commands ------------------------------------------------------------------------------ */

static void drop_log(struct blk *b)
{
    mapping_free(b->log_store.mapping);
    memset(&b->log_store, 0, sizeof(b->log_store));
    b->log = NULL;
}

static void choose_log(struct blk *b)
{
    b->log = b->features & BLK_F_LOG_ALL && b->log_store.bits ? &b->log_store : NULL;
}

static void bind_inflight(struct blk *b)
{
    uint64_t stride = inflight_queue_bytes(b->inflight_size);

    for (uint32_t i = 0; i < CORE_QUEUES_MAX; i++) {
        struct ring *r = &b->ring[i];

        r->record = NULL;
        if (!b->inflight_map || i >= b->inflight_queues)
            continue;
        r->record = (struct inflight_queue *)((uint8_t *)b->inflight_map->base +
                                              b->inflight_offset + i * stride);
        r->record_size = (uint16_t)b->inflight_size;
    }
}

/* Requests that wait for a flush have their status byte to write still: in the new table. */
static void move_requests(struct blk *b)
{
    for (struct request *q = b->requests; q; q = q->next) {
        struct span *last = &q->in[q->in_count - 1]; /* spans are never empty */
        uint64_t got, at = last->guest + last->bytes - 1;
        uint8_t *status = b->memory ? memory_at(b->memory, at, 1, &got) : NULL;

        q->unreachable = !status;
        if (status)
            last->ptr = status - (last->bytes - 1);
    }
}

static bool do_memory(struct blk *b, struct command *c)
{
    if (!b->paused)
        pause_rings(b, true);
    if (b->reads_busy)
        return false;
    publish_all(b);
    memory_free(b->memory);
    b->memory = c->memory;
    b->lost_told = false;
    move_requests(b);
    pause_rings(b, false);
    reactor_done(b->reactor, c, 0, 0, NULL);
    return true;
}

static bool do_reset(struct blk *b, struct command *c)
{
    if (!b->paused) {
        /* Nothing may be answered any more: the front end does not look. */
        b->paused = true;
        for (uint32_t i = 0; i < CORE_QUEUES_MAX; i++) {
            b->ring[i].stopping = true;
            ring_update(&b->ring[i]);
            b->ring[i].used = NULL;
        }
    }
    abandon(b);
    if (b->requests)
        return false;
    for (uint32_t i = 0; i < CORE_QUEUES_MAX; i++)
        ring_reset(&b->ring[i]);
    drop_log(b);
    mapping_free(b->inflight_map);
    b->inflight_map = NULL;
    b->inflight_queues = 0;
    memory_free(b->memory);
    b->memory = NULL;
    b->features = 0;
    b->paused = false;
    b->lost_told = false;
    b->stop_since_ns = 0;
    reactor_done(b->reactor, c, 0, 0, NULL);
    return true;
}

uint64_t blk_timer(const struct blk *b)
{
    uint64_t at = b->stop_since_ns + BLK_STOP_WAIT_NS;

    return b->stop_since_ns && at > b->reactor->now_ns ? at : 0;
}

/* The clock runs from the first stop that had to wait; the VMM's other queues share it. */
static bool waited_enough(struct blk *b)
{
    if (!b->stop_since_ns)
        b->stop_since_ns = b->reactor->now_ns;
    return b->reactor->now_ns - b->stop_since_ns >= BLK_STOP_WAIT_NS;
}

static void tell_given_up(struct ring *r)
{
    struct group *g = r->blk->group;

    if (r->given_up)
        group_log(g, LOG_ERROR, "disk \"%s\": virtqueue %u was stopped with %u requests that "
                  "could not be finished in %llu s: answered with an I/O error (%.100s)",
                  r->blk->config->name, r->index, r->given_up,
                  BLK_STOP_WAIT_NS / 1000000000ull, g->error[0] ? g->error : "the arena is full");
    r->given_up = 0;
    r->give_up = false;
}

static bool do_stop(struct blk *b, struct command *c)
{
    struct ring *r = &b->ring[c->queue];
    bool gone = false;

    for (const struct command *later = c->next; later; later = later->next)
        gone |= later->kind == COMMAND_RESET;
    if (gone)
        abandon(b); /* nobody waits for these flushes */
    else if (r->running && r->resubmit_next < r->resubmits) {
        /* taken before we started: they have to be answered */
        if (r->held && waited_enough(b)) {
            r->give_up = true;
            r->held = false;
        }
        return false;
    }
    r->stopping = true;
    ring_update(r);
    if (r->inflight && waited_enough(b) && b->group->trouble[TROUBLE_COMMIT][0])
        r->given_up += blk_fail_flushes(r);
    if (r->inflight)
        return false;
    ring_publish(r);
    tell_given_up(r);
    blk_unwatch(r);
    if (r->kick_fd >= 0)
        close(r->kick_fd);
    notifier_close(r->call);
    r->call = NULL;
    r->kick_fd = -1;
    r->kicked = r->stopping = r->broken = false;
    r->held = false;
    reactor_done(b->reactor, c, 0, r->last_avail, NULL);
    return true;
}

static void do_kick(struct blk *b, struct command *c)
{
    struct ring *r = &b->ring[c->queue];

    blk_unwatch(r);
    if (r->kick_fd >= 0)
        close(r->kick_fd);
    r->kick_fd = c->fd;
    r->fresh = r->fresh || !r->kicked;
    r->kicked = true;
    b->stop_since_ns = 0;
    ring_resolve(r);
    if (r->running)
        blk_watch(r);
    ring_update(r);
    blk_running_changed(b);
    reactor_done(b->reactor, c, 0, 0, NULL);
}

/* The new descriptor in place of the old one; false: there is none now, the command failed. */
static bool replace(struct blk *b, struct command *c, struct notifier **to)
{
    int error = 0;

    notifier_close(*to);
    *to = NULL;
    if (c->fd >= 0)
        error = notifier_open(to, c->fd);
    if (error)
        reactor_done(b->reactor, c, error, 0, "the eventfd cannot be registered with io_uring");
    return !error;
}

static void do_call(struct blk *b, struct command *c)
{
    struct ring *r = &b->ring[c->queue];

    if (!replace(b, c, &r->call))
        return;
    /* What was finished while there was no descriptor would wait for ever. */
    ring_call(r);
    reactor_done(b->reactor, c, 0, 0, NULL);
}

static void do_size(struct blk *b, struct command *c)
{
    struct ring *r = &b->ring[c->queue];
    uint64_t n = c->value;

    if (n == 0 || n > CORE_QUEUE_SIZE_MAX || (n & (n - 1))) {
        reactor_done(b->reactor, c, -EINVAL, 0, "the size of a virtqueue is a power of two up to 1024");
        return;
    }
    if (r->running) {
        reactor_done(b->reactor, c, -EBUSY, 0, "the virtqueue is running");
        return;
    }
    r->size = (uint32_t)n;
    ring_resolve(r);
    ring_update(r);
    reactor_done(b->reactor, c, 0, 0, NULL);
}

static void do_addr(struct blk *b, struct command *c)
{
    struct ring *r = &b->ring[c->queue];

    r->addr_flags = c->flags;
    r->used_guest = c->log;
    if (!r->running) { /* a running ring only changes what it logs */
        r->desc_user = c->desc;
        r->avail_user = c->avail;
        r->used_user = c->used;
        r->has_addr = true;
        ring_resolve(r);
        ring_update(r);
    } else if (r->desc_user != c->desc || r->avail_user != c->avail || r->used_user != c->used) {
        reactor_done(b->reactor, c, -EBUSY, 0, "the virtqueue is running: its rings cannot move");
        return;
    }
    reactor_done(b->reactor, c, 0, 0, NULL);
}

/* The quick ones. */
static void do_now(struct blk *b, struct command *c)
{
    struct ring *r = &b->ring[c->queue];

    switch (c->kind) {
    case COMMAND_LOG:
        drop_log(b);
        b->log_store = (struct dirty_log){
            .mapping = c->mapping, .bytes = c->bytes,
            .bits = c->mapping ? (uint8_t *)c->mapping->base + c->offset : NULL};
        choose_log(b);
        break;
    case COMMAND_INFLIGHT:
        publish_all(b); /* what is pushed is noted in the old region, by its size */
        mapping_free(b->inflight_map);
        b->inflight_map = c->mapping;
        b->inflight_offset = c->offset;
        b->inflight_queues = c->queues;
        b->inflight_size = c->queue_size;
        bind_inflight(b);
        break;
    case COMMAND_FEATURES:
        b->features = c->value;
        choose_log(b);
        for (uint32_t i = 0; i < CORE_QUEUES_MAX; i++)
            ring_update(&b->ring[i]);
        break;
    case COMMAND_BASE:
        r->last_avail = (uint16_t)c->value;
        break;
    case COMMAND_ERR:
        if (!replace(b, c, &r->err))
            return;
        break;
    case COMMAND_ENABLE:
        r->enabled = c->value != 0;
        ring_update(r);
        break;
    default:
        check(false);
    }
    reactor_done(b->reactor, c, 0, 0, NULL);
}

void blk_command(struct blk *b, struct command *c)
{
    c->next = NULL;
    if (b->command_last)
        b->command_last->next = c;
    else
        b->command_first = c;
    b->command_last = c;
}

static bool carry_out(struct blk *b, struct command *c)
{
    switch (c->kind) {
    case COMMAND_MEMORY:
        return do_memory(b, c);
    case COMMAND_RESET:
        return do_reset(b, c);
    case COMMAND_STOP:
        return do_stop(b, c);
    case COMMAND_KICK:
        do_kick(b, c);
        return true;
    case COMMAND_CALL:
        do_call(b, c);
        return true;
    case COMMAND_SIZE:
        do_size(b, c);
        return true;
    case COMMAND_ADDR:
        do_addr(b, c);
        return true;
    default:
        do_now(b, c);
        return true;
    }
}

bool blk_step(struct blk *b)
{
    struct command *c = b->command_first;
    core_event lost = {.type = CORE_EVENT_MEMORY_LOST, .disk = b->disk};

    if (!b->lost_told && (memory_lost(b->memory) || mapping_lost(b->log_store.mapping) ||
                          mapping_lost(b->inflight_map))) {
        b->lost_told = true;
        reactor_emit(b->reactor->core, &lost);
    }
    if (!c || !carry_out(b, c))
        return false;
    b->command_first = c->next;
    if (!b->command_first)
        b->command_last = NULL;
    free(c);
    return true;
}

void blk_free(struct blk *b)
{
    struct command *c;

    while ((c = b->command_first)) {
        b->command_first = c->next;
        free(c);
    }
    while (b->requests) { /* they wait for flushes; reads are over */
        struct request *q = b->requests;

        b->requests = q->next;
        free(q);
    }
    for (uint32_t i = 0; i < CORE_QUEUES_MAX; i++) {
        b->ring[i].watched = false; /* the ring that watches is gone */
        ring_reset(&b->ring[i]);
    }
    drop_log(b);
    mapping_free(b->inflight_map);
    memory_free(b->memory);
}

void blk_query(const struct blk *b, core_disk_info *out)
{
    const struct blk_stats *s = &b->stats;

    memset(out, 0, sizeof(*out));
    out->size_bytes = b->config->size_bytes;
    out->reads = s->reads;
    out->writes = s->writes;
    out->flushes = s->flushes;
    out->discards = s->discards;
    out->write_zeroes = s->write_zeroes;
    out->get_ids = s->get_ids;
    out->read_bytes = s->read_bytes;
    out->write_bytes = s->write_bytes;
    out->errors = s->errors;
    out->unsupported = s->unsupported;
    out->rejected = s->rejected;
    out->broken = s->broken;
    out->held = s->held;
    for (uint32_t i = 0; i < CORE_QUEUES_MAX; i++) {
        const struct ring *r = &b->ring[i];
        core_queue_info *q = &out->queue[i];

        q->size = r->size;
        q->configured = r->desc && r->avail && r->used;
        q->enabled = r->enabled;
        q->running = r->running;
        q->broken = r->broken;
        q->requests = r->requests;
        q->kicks = r->kicks;
        q->calls = r->calls;
        q->inflight = r->inflight;
        memcpy(q->reason, r->reason, sizeof(q->reason));
    }
}
