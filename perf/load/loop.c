/* loop.c - see loop.h. One pass looks at each queue: takes what is done, submits as many new
 * requests, reads the clock once for each of the two. */
#include "loop.h"

#include <stdio.h>
#include <unistd.h>

#define SPINS_BEFORE_RELAX 2048u /* a pause costs exactness, no pause costs a sibling thread */
#define SPINS_PER_LOOK 64u       /* idle passes between looks at the clock */
#define SLEEP_MS 50

/* ---- Errors ----------------------------------------------------------------------------- */

void loop_fail(struct load *l, const char *text)
{
    pthread_mutex_lock(&l->text_lock);
    if (!l->state.text[0])
        snprintf(l->state.text, sizeof(l->state.text), "%s", text);
    pthread_mutex_unlock(&l->text_lock);
}

static void broken(load *l, const struct queue *q, const char *what)
{
    char text[LOAD_TEXT_MAX];

    snprintf(text, sizeof(text), "queue %u of disk %u: the back end broke the ring's rules: %s",
             q->index, q->disk, what);
    loop_fail(l, text);
    l->broken = true;
}

static const char *op_names[LOAD_OPS] = {"read", "write", "write-zeroes", "discard"};

static void failed(load *l, const struct queue *q, const struct flight *f, uint8_t status)
{
    char text[LOAD_TEXT_MAX];
    const char *name = status == VIRTIO_BLK_S_IOERR    ? "IOERR"
                       : status == VIRTIO_BLK_S_UNSUPP ? "UNSUPP"
                                                       : "not a status";

    snprintf(text, sizeof(text), "%s of %u bytes at sector %llu of disk %u ended with status "
             "%u (%s)", op_names[f->op], l->config.block_bytes,
             (unsigned long long)(l->disk[q->disk].sector +
                                  f->block * (l->config.block_bytes / 512)),
             q->disk, status, name);
    loop_fail(l, text);
    ADD(l->state.errors, 1);
}

/* ---- Taking what is done ---------------------------------------------------------------- */

ALWAYS_INLINE void record(load *l, unsigned op, uint64_t ns)
{
    load_state *s = &l->state;
    uint64_t *counter = &l->histogram[op * l->config.counts + loop_counter_of(&l->config, ns)];

    ADD(*counter, 1);
    ADD(s->ios[op], 1);
    ADD(s->sum_ns[op], ns);
    if (ns < s->min_ns[op])
        s->min_ns[op] = ns;
    if (ns > s->max_ns[op])
        s->max_ns[op] = ns;
}

/* Time goes on to `now`. */
static void advance(load *l, uint64_t now)
{
    l->now = now;
    if (l->ramping && now >= l->ramp_end) {
        l->ramping = false;
        loop_reset_counts(l);
        l->series[0] = 0;
        l->begin = l->last_done = now;
        l->interval_end = now + l->interval_ticks;
    }
    while (now >= l->interval_end && l->interval + 1 < l->work.intervals) {
        l->interval++;
        l->interval_end += l->interval_ticks;
    }
    if (now >= l->deadline)
        l->closing = true;
}

static void check_data(load *l, const struct queue *q, const struct flight *f, uint32_t slot)
{
    char text[LOAD_TEXT_MAX];
    const uint8_t *data = l->config.memory + q->buffers + (uint64_t)slot * l->config.buffer_bytes;

    switch (verify_check(l->verify, q->disk, f->block, data, text)) {
    case VERIFY_RIGHT:
        ADD(l->state.verified, 1);
        break;
    case VERIFY_UNKNOWN:
        ADD(l->state.unknown, 1);
        break;
    case VERIFY_WRONG:
        loop_fail(l, text);
        ADD(l->state.verify_errors, 1);
    }
}

static __attribute__((noinline)) void finish_verify(load *l, const struct queue *q,
                                                    const struct flight *f, uint32_t slot,
                                                    uint8_t status)
{
    if (f->op == LOAD_READ && status == VIRTIO_BLK_S_OK)
        check_data(l, q, f, slot);
    verify_give(l->verify, q->disk, f->block, f->op, status == VIRTIO_BLK_S_OK);
}

/* Takes what is used; returns how many. */
static uint32_t reap(load *l, struct queue *q)
{
    uint32_t n = ring_used(&q->ring), in_flight = l->config.depth - q->free_count;
    uint64_t now;

    if (n == 0)
        return 0;
    now = clock_ticks(&l->clock);
    advance(l, now);
    if (n > in_flight) {
        broken(l, q, "more is used than was available");
        return 0;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t slot = ring_take(&q->ring);
        struct flight *f;
        uint8_t status;

        if (slot >= l->config.depth || !q->flight[slot].busy) {
            broken(l, q, "a request is used that was not in flight");
            return 0;
        }
        f = &q->flight[slot];
        status = __atomic_load_n(&q->ring.slot[slot].status, __ATOMIC_RELAXED);
        if (l->verify)
            finish_verify(l, q, f, slot, status);
        if (status == VIRTIO_BLK_S_OK)
            record(l, f->op, clock_ns(&l->clock, now - f->start));
        else
            failed(l, q, f, status);
        f->busy = 0;
        q->free[q->free_count++] = (uint16_t)slot;
    }
    ring_stay_quiet(&q->ring);
    ADD(l->series[l->interval], n);
    l->last_done = now;
    ADD(l->state.in_flight, -n);
    return n;
}

/* ---- Submitting ------------------------------------------------------------------------- */

/* The next request in the queue's order; false: its block is busy. */
static bool choose(load *l, struct queue *q, int *op, uint64_t *block)
{
    if (!q->holds) {
        q->held_op = choose_op(&q->choose);
        q->held_block = choose_block(&q->choose);
    }
    q->holds = l->verify && !verify_take(l->verify, q->disk, q->held_block);
    *op = q->held_op;
    *block = q->held_block;
    return !q->holds;
}

/* Guest address of the data: straight from the pool, or stamped in the slot's own buffer. */
ALWAYS_INLINE uint64_t write_data(load *l, struct queue *q, uint32_t slot, uint64_t block)
{
    const load_config *c = &l->config;
    uint64_t next = q->pool_next, from, to;

    if (c->in_place)
        next = block % c->pool_blocks;
    else if (++q->pool_next == c->pool_blocks)
        q->pool_next = 0;
    from = c->pool + next * c->block_bytes;
    if (!l->verify)
        return c->guest + from;
    to = q->buffers + (uint64_t)slot * c->buffer_bytes;
    memcpy(c->memory + to, c->memory + from, c->block_bytes);
    verify_stamp(l->verify, q->disk, block, c->memory + to);
    return c->guest + to;
}

static const uint32_t op_types[LOAD_OPS] = {VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
                                            VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD};

ALWAYS_INLINE void place(load *l, struct queue *q, uint32_t slot, int op, uint64_t block)
{
    const load_config *c = &l->config;
    struct slot *s = &q->ring.slot[slot];
    struct vring_desc *data = q->ring.stride == 1 ? &s->table[1] : &q->ring.desc[3 * slot + 1];
    uint64_t sector = l->disk[q->disk].sector + block * (c->block_bytes / 512);

    s->status = 0xff;
    s->header.type = op_types[op];
    if (op == LOAD_READ || op == LOAD_WRITE) {
        s->header.sector = sector;
        data->addr = op == LOAD_WRITE
                         ? write_data(l, q, slot, block)
                         : c->guest + q->buffers + (uint64_t)slot * c->buffer_bytes;
        data->len = c->block_bytes;
        data->flags = op == LOAD_WRITE ? VRING_DESC_F_NEXT : VRING_DESC_F_NEXT | VRING_DESC_F_WRITE;
    } else {
        s->header.sector = 0;
        s->segment = (struct virtio_blk_discard_write_zeroes){
            .sector = sector, .num_sectors = c->block_bytes / 512};
        data->addr = c->guest + (uint64_t)((uint8_t *)&s->segment - c->memory);
        data->len = sizeof(s->segment);
        data->flags = VRING_DESC_F_NEXT;
    }
    q->flight[slot].op = (uint8_t)op;
    q->flight[slot].block = block;
    q->flight[slot].busy = 1;
    ring_add(&q->ring, slot);
}

/* With a rate, when the queue's next request is due: the queues' turns are interleaved. */
static uint64_t due(const load *l, const struct queue *q)
{
    double turn = (double)q->due_count + (double)q->index / l->queue_count;

    return l->started + (uint64_t)(turn * l->ticks_per_due);
}

/* Submits what may be; returns how many. */
static uint32_t submit(load *l, struct queue *q)
{
    uint32_t n = 0;
    bool kick;

    while (q->free_count && q->left) {
        uint32_t slot = q->free[q->free_count - 1];
        uint64_t block;
        int op;

        if (l->work.rate > 0 && due(l, q) > l->now)
            break;
        if (l->work.written_only) {
            q->left--;
            if (!verify_known(l->verify, q->disk, q->choose.next)) {
                q->choose.next++;
                continue;
            }
            q->left++;
        }
        if (!choose(l, q, &op, &block))
            break;
        q->free_count--;
        place(l, q, slot, op, block);
        if (l->work.rate > 0) {
            /* From when it should have gone, so that a stall counts for all it delayed. */
            q->flight[slot].start = due(l, q);
            q->due_count++;
        }
        q->left--;
        q->batch[n++] = (uint16_t)slot;
    }
    if (n == 0)
        return 0;
    if (!(l->work.rate > 0)) {
        uint64_t now = clock_ticks(&l->clock);

        for (uint32_t i = 0; i < n; i++)
            q->flight[q->batch[i]].start = now;
    }
    kick = ring_publish(&q->ring);
    ADD(l->state.in_flight, n);
    if (kick) {
        ring_kick(&q->ring);
        ADD(l->state.kicks, 1);
    }
    return n;
}

/* ---- The loop --------------------------------------------------------------------------- */

static bool exhausted(const load *l)
{
    for (uint32_t i = 0; i < l->queue_count; i++)
        if (l->queue[i].left)
            return false;
    return true;
}

/* Nothing to do in this pass: look at the clock now and then. */
static void idle(load *l, uint32_t spins)
{
    if (spins > SPINS_BEFORE_RELAX)
        clock_relax();
    if (spins % SPINS_PER_LOOK)
        return;
    advance(l, clock_ticks(&l->clock));
    if (l->state.in_flight && l->now > l->last_done && l->now - l->last_done > l->stuck_ticks) {
        char text[LOAD_TEXT_MAX];

        snprintf(text, sizeof(text), "no request was done for %.1f s, %u are in flight",
                 (double)l->work.stuck_ns / 1e9, l->state.in_flight);
        loop_fail(l, text);
        l->broken = true;
    } else if (!l->state.in_flight) {
        l->last_done = l->now; /* waiting for a due time is not being stuck */
    }
}

static int wait_ms(const load *l)
{
    uint64_t soonest = l->deadline;

    if (l->work.rate > 0)
        for (uint32_t i = 0; i < l->queue_count; i++)
            if (l->queue[i].free_count && l->queue[i].left && due(l, &l->queue[i]) < soonest)
                soonest = due(l, &l->queue[i]);
    if (soonest <= l->now)
        return 0;
    soonest = clock_ns(&l->clock, soonest - l->now) / 1000000;
    return soonest < SLEEP_MS ? (int)soonest : SLEEP_MS;
}

/* Sleeps until a queue calls, something is due or the run is to stop; for SLEEP_MS at most. */
static void sleep_for_calls(load *l, struct pollfd *fds)
{
    bool found = false;
    int ready = 0;

    for (uint32_t i = 0; i < l->queue_count; i++) {
        ring_want_calls(&l->queue[i].ring, true);
        found = found || ring_used(&l->queue[i].ring);
        fds[i] = (struct pollfd){.fd = l->queue[i].ring.call_fd, .events = POLLIN};
    }
    fds[l->queue_count] = (struct pollfd){.fd = l->stop_fd, .events = POLLIN};
    if (!found)
        ready = poll(fds, l->queue_count + 1, loop_asked_to_stop(l) ? 1 : wait_ms(l));
    for (uint32_t i = 0; i < l->queue_count; i++) {
        uint64_t count;

        ring_want_calls(&l->queue[i].ring, false);
        if (ready > 0 && fds[i].revents && read(fds[i].fd, &count, sizeof(count)) > 0)
            ADD(l->state.calls, count);
    }
}

void loop_run(struct load *l, struct pollfd *fds)
{
    uint32_t spins = 0;

    while (!loop_lost(l)) {
        uint32_t moved = 0;
        bool go;

        if (l->work.rate > 0)
            advance(l, clock_ticks(&l->clock));
        for (uint32_t i = 0; i < l->queue_count; i++)
            moved += reap(l, &l->queue[i]);
        go = !l->closing && !loop_asked_to_stop(l) && !loop_too_bad(l);
        if (go && !(l->work.lockstep && l->state.in_flight))
            for (uint32_t i = 0; i < l->queue_count; i++)
                moved += submit(l, &l->queue[i]);
        if (moved) {
            spins = 0;
            continue;
        }
        if (!l->state.in_flight && (!go || exhausted(l)))
            return;
        if (l->work.sleep) {
            sleep_for_calls(l, fds);
            spins = SPINS_PER_LOOK - 1; /* then look at the clock */
        }
        idle(l, ++spins);
    }
}
