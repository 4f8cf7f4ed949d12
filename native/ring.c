/* ring.c - see ring.h. */
#include "ring.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "crash.h"
#include "reactor.h"

typedef unsigned long long ull;

#define F_INDIRECT (1ull << VIRTIO_RING_F_INDIRECT_DESC)
#define F_EVENT_IDX (1ull << VIRTIO_RING_F_EVENT_IDX)

/* One load each from memory that the guest may change meanwhile. */
#define load_once(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define store_once(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)

uint64_t inflight_queue_bytes(uint32_t queue_size)
{
    uint64_t bytes = sizeof(struct inflight_queue) +
                     (uint64_t)queue_size * sizeof(struct inflight_desc);

    return (bytes + 63) & ~63ull;
}

/* ---- Life ------------------------------------------------------------------------------ */

void ring_init(struct ring *r, struct blk *b, uint32_t index)
{
    memset(r, 0, sizeof(*r));
    r->blk = b;
    r->index = index;
    r->kick_fd = -1;
}

void ring_reset(struct ring *r)
{
    bool listed;

    blk_unwatch(r);
    if (r->kick_fd >= 0)
        close(r->kick_fd);
    notifier_close(r->call);
    notifier_close(r->err);
    free(r->resubmit);
    listed = r->to_publish;
    ring_init(r, r->blk, r->index);
    r->to_publish = listed; /* the reactor's list still names it */
}

void ring_break(struct ring *r, const char *format, ...)
{
    va_list args;

    if (r->broken)
        return;
    va_start(args, format);
    vsnprintf(r->reason, sizeof(r->reason), format, args);
    va_end(args);
    r->broken = true;
    r->running = false;
    if (r->err)
        notifier_signal(r->err);
    blk_ring_broken(r);
}

void ring_resolve(struct ring *r)
{
    const struct memory *m = r->blk->memory;
    uint64_t n = r->size;

    r->desc = NULL;
    r->avail = NULL;
    r->used = NULL;
    if (!m || !r->has_addr || n == 0)
        return;
    /* Both rings end in the 16-bit event index. */
    r->desc = (void *)memory_at_user(m, r->desc_user, n * sizeof(struct vring_desc));
    r->avail = (void *)memory_at_user(m, r->avail_user, 4 + n * 2 + 2);
    r->used = (void *)memory_at_user(m, r->used_user, 4 + n * sizeof(struct vring_used_elem) + 2);
    /* A region at an odd address or offset can misalign what looks aligned. */
    if ((uintptr_t)r->desc % 16 || (uintptr_t)r->avail % 2 || (uintptr_t)r->used % 4)
        ring_break(r, "rings at %#llx, %#llx, %#llx are not aligned to 16, 2 and 4 bytes in "
                   "memory", (ull)r->desc_user, (ull)r->avail_user, (ull)r->used_user);
    else if (r->desc && r->avail && r->used)
        return;
    else if (r->kicked)
        ring_break(r, "ring addresses %#llx, %#llx, %#llx are outside of the guest's memory",
                   (ull)r->desc_user, (ull)r->avail_user, (ull)r->used_user);
    /* All or none: a request in flight that is answered needs both rings. */
    r->desc = NULL;
    r->avail = NULL;
    r->used = NULL;
}

/* ---- In-flight region ------------------------------------------------------------------- */

struct found {
    uint64_t counter;
    uint16_t head;
};

static int by_counter(const void *a, const void *b)
{
    uint64_t x = ((const struct found *)a)->counter, y = ((const struct found *)b)->counter;

    return x < y ? -1 : x > y;
}

/* The last batch was shown to the driver but not taken out of the region: do it now. */
static void finish_batch(struct ring *r)
{
    struct inflight_queue *q = r->record;
    uint16_t n = (uint16_t)(r->used_idx - q->used_idx), head = q->last_batch_head;

    for (uint16_t i = 0; i < n && head < r->record_size && i < r->size; i++) {
        q->desc[head].inflight = 0;
        head = q->desc[head].next;
    }
    q->used_idx = r->used_idx;
}

static void recover_inflight(struct ring *r)
{
    struct inflight_queue *q = r->record;
    struct found *found;
    uint32_t count = 0;

    if (q->version != 1) { /* new: zeroed by whoever made it */
        q->version = 1;
        q->desc_num = r->record_size;
        q->used_idx = r->used_idx;
        return;
    }
    finish_batch(r);
    found = calloc(r->record_size, sizeof(*found));
    free(r->resubmit);
    r->resubmit = calloc(r->record_size, sizeof(*r->resubmit));
    if (!found || !r->resubmit) {
        free(found);
        ring_break(r, "no memory for the requests in flight");
        return;
    }
    for (uint16_t i = 0; i < r->record_size && i < r->size; i++) {
        if (!q->desc[i].inflight)
            continue;
        found[count++] = (struct found){.counter = q->desc[i].counter, .head = i};
        if (q->desc[i].counter >= r->counter)
            r->counter = q->desc[i].counter + 1;
    }
    qsort(found, count, sizeof(*found), by_counter);
    for (uint32_t i = 0; i < count; i++)
        r->resubmit[i] = found[i].head;
    free(found);
    r->resubmits = count;
    r->resubmit_next = 0;
    /* What is neither used nor in flight was never taken. */
    r->last_avail = (uint16_t)(r->used_idx + count);
}

static void record_take(struct ring *r, uint16_t head)
{
    if (r->record && head < r->record_size) {
        r->record->desc[head].counter = r->counter++;
        __atomic_store_n(&r->record->desc[head].inflight, 1, __ATOMIC_RELEASE);
    }
}

static void record_untake(struct ring *r, uint16_t head)
{
    if (r->record && head < r->record_size)
        __atomic_store_n(&r->record->desc[head].inflight, 0, __ATOMIC_RELEASE);
}

/* ---- Starting and stopping -------------------------------------------------------------- */

void ring_update(struct ring *r)
{
    const struct blk *b = r->blk;
    bool enabled = r->enabled || !(b->features & BLK_F_PROTOCOL_FEATURES);
    bool run = r->desc && r->avail && r->used && r->kicked && enabled && !r->broken &&
               !r->stopping;

    if (run == r->running)
        return;
    r->running = run;
    if (!run) {
        blk_running_changed(r->blk);
        return;
    }
    r->held = false;
    if (r->fresh) {
        r->fresh = false;
        r->used_idx = r->published = load_once(&r->used->idx);
        r->called_valid = false;
        r->resubmits = r->resubmit_next = 0; /* of an earlier start */
        if (r->record)
            recover_inflight(r);
    }
    ring_want_kicks(r, false);
    blk_watch(r);
    blk_running_changed(r->blk);
}

/* ---- Kicks and calls -------------------------------------------------------------------- */

void ring_log(struct ring *r, uint64_t guest, uint64_t bytes)
{
    /* An unmarked page would be stale after a migration, with nobody the wiser. */
    if (!dirty_log_mark(r->blk->log, guest, bytes))
        ring_break(r, "the dirty log of %llu bytes does not cover guest address %#llx",
                   (ull)r->blk->log->bytes, (ull)guest);
}

static void log_used(struct ring *r, uint64_t offset, uint64_t bytes)
{
    if (r->blk->log && r->addr_flags & VHOST_VRING_LOG)
        ring_log(r, r->used_guest + offset, bytes);
}

void ring_want_kicks(struct ring *r, bool want)
{
    if (!r->running)
        return;
    if (r->blk->features & F_EVENT_IDX) {
        uint16_t *avail_event = (uint16_t *)&r->used->ring[r->size];

        /* Unwanted: the event index is left behind and no kick crosses it. */
        if (!want)
            return;
        store_once(avail_event, r->last_avail);
        log_used(r, 4 + (uint64_t)r->size * sizeof(struct vring_used_elem), 2);
    } else {
        store_once(&r->used->flags, (uint16_t)(want ? 0 : VRING_USED_F_NO_NOTIFY));
        log_used(r, 0, 2);
    }
}

bool ring_has_work(const struct ring *r)
{
    if (!r->running)
        return false;
    if (r->held && r->held_told && !epoch_room(r->blk->writer, r->held_blocks))
        return false;
    /* More than the ring holds comes from a driver that breaks the rules; it waits. */
    return r->resubmit_next < r->resubmits ||
           (r->inflight < r->size &&
            __atomic_load_n(&r->avail->idx, __ATOMIC_ACQUIRE) != r->last_avail);
}

void ring_call(struct ring *r)
{
    if (!r->call)
        return;
    r->calls++;
    notifier_signal(r->call);
}

static bool call_wanted(struct ring *r)
{
    uint16_t before = r->called_at, now = r->published, event;
    bool valid = r->called_valid;

    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* our index is out before we read its wish */
    r->called_at = now;
    r->called_valid = true;
    if (!(r->blk->features & F_EVENT_IDX))
        return !(load_once(&r->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
    event = load_once(&r->avail->ring[r->size]);
    return !valid || vring_need_event(event, now, before);
}

/* ---- Used ring -------------------------------------------------------------------------- */

static void has_news(struct ring *r)
{
    struct reactor *reactor = r->blk->reactor;

    r->to_publish = true;
    reactor->news[reactor->news_count++] = r;
}

/* Lets the driver see what was pushed, for it may be looking; it is not called yet. */
static void show(struct ring *r)
{
    if (r->published == r->used_idx || !r->used)
        return;
    epoch_batch_publish(r->blk->writer);
    __atomic_store_n(&r->used->idx, r->used_idx, __ATOMIC_RELEASE);
    r->published = r->used_idx;
    log_used(r, 2, 2);
    crash_point("publish-before-clear");
    if (r->record) {
        /* Killed before this line, the next agent ends the batch by used_idx. */
        for (uint32_t i = 0; i < r->batched; i++)
            r->record->desc[r->batch[i]].inflight = 0;
        crash_point("clear-before-used");
        __atomic_store_n(&r->record->used_idx, r->used_idx, __ATOMIC_RELEASE);
    }
    r->batched = 0;
    r->to_call = true;
}

void ring_push(struct ring *r, uint16_t head, uint32_t len)
{
    uint32_t at = r->used_idx & (r->size - 1);

    if (!r->to_publish)
        has_news(r);
    store_once(&r->used->ring[at].id, head);
    store_once(&r->used->ring[at].len, len);
    log_used(r, 4 + (uint64_t)at * sizeof(struct vring_used_elem), sizeof(struct vring_used_elem));
    r->used_idx++;
    if (r->record && head < r->record_size) {
        if (r->batched == CORE_QUEUE_SIZE_MAX)
            show(r);
        r->record->desc[head].next = r->record->last_batch_head;
        r->record->last_batch_head = head;
        r->batch[r->batched++] = head;
    }
    crash_point("push-before-publish");
}

void ring_publish(struct ring *r)
{
    show(r);
    if (!r->to_call || !r->used)
        return;
    r->to_call = false;
    if (call_wanted(r))
        ring_call(r);
}

/* ---- Descriptor chains ------------------------------------------------------------------ */

static struct vring_desc copy_desc(const struct vring_desc *d)
{
    return (struct vring_desc){.addr = load_once(&d->addr), .len = load_once(&d->len),
                               .flags = load_once(&d->flags), .next = load_once(&d->next)};
}

/* A buffer that is not in one piece, or not in the region of the latest lookup. */
static bool add_pieces(struct ring *r, const struct vring_desc *d, struct span *to,
                       uint32_t *count)
{
    uint64_t guest = d->addr, left = d->len;

    if (guest + left < guest) {
        ring_break(r, "descriptor of %llu bytes at %#llx wraps", (ull)left, (ull)guest);
        return false;
    }
    while (left > 0) {
        uint64_t got;
        uint8_t *ptr = memory_at(r->blk->memory, guest, left, &got);

        if (!ptr) {
            ring_break(r, "descriptor at %#llx, %u bytes, is outside of the guest's memory",
                       (ull)d->addr, d->len);
            return false;
        }
        if (*count == CHAIN_SPANS_MAX) {
            ring_break(r, "descriptor chain has more than %u pieces", CHAIN_SPANS_MAX);
            return false;
        }
        to[(*count)++] = (struct span){.ptr = ptr, .guest = guest, .bytes = got};
        guest += got;
        left -= got;
    }
    return true;
}

static inline bool add_spans(struct ring *r, struct chain *c, const struct vring_desc *d)
{
    bool in = d->flags & VRING_DESC_F_WRITE;
    struct span *to = in ? c->in : c->out;
    uint32_t *count = in ? &c->in_count : &c->out_count;
    uint8_t *ptr = memory_near(r->blk->memory, d->addr, d->len);

    if (unlikely(!in && c->in_count > 0)) {
        ring_break(r, "a device-readable descriptor follows a device-writable one");
        return false;
    }
    if (likely(ptr && d->len > 0 && *count < CHAIN_SPANS_MAX))
        to[(*count)++] = (struct span){.ptr = ptr, .guest = d->addr, .bytes = d->len};
    else if (!add_pieces(r, d, to, count))
        return false;
    *(in ? &c->in_bytes : &c->out_bytes) += d->len;
    return true;
}

/* Copies an indirect table; returns its length in descriptors, 0: broken. */
static uint32_t copy_table(struct ring *r, struct chain *c, const struct vring_desc *d)
{
    uint64_t guest = d->addr, left = d->len;
    uint8_t *to = (uint8_t *)c->table;
    const uint8_t *from;

    if (left == 0 || left % sizeof(struct vring_desc) || left > sizeof(c->table)) {
        ring_break(r, "indirect table of %u bytes: must be 1 to %u descriptors of 16", d->len,
                   CORE_QUEUE_SIZE_MAX);
        return 0;
    }
    from = memory_near(r->blk->memory, guest, left);
    if (likely(from && left == 3 * sizeof(struct vring_desc))) { /* header, data, status */
        memcpy(to, from, 3 * sizeof(struct vring_desc));
        return 3;
    }
    while (left > 0) {
        uint64_t got;

        from = memory_at(r->blk->memory, guest, left, &got);
        if (!from || guest + left < guest) {
            ring_break(r, "indirect table at %#llx is outside of the guest's memory",
                       (ull)d->addr);
            return 0;
        }
        memcpy(to, from, got);
        to += got;
        guest += got;
        left -= got;
    }
    return d->len / (uint32_t)sizeof(struct vring_desc);
}

bool ring_chain(struct ring *r, uint16_t head, struct chain *c)
{
    const struct vring_desc *table = r->desc;
    uint32_t size = r->size, seen = 0, at = head;
    bool indirect = false;

    c->head = head;
    c->out_count = c->in_count = 0;
    c->out_bytes = c->in_bytes = 0;
    for (;;) {
        struct vring_desc d;

        if (at >= size) {
            ring_break(r, "descriptor %u is outside of the table of %u", at, size);
            return false;
        }
        if (seen++ == size) {
            ring_break(r, "descriptor chain from %u loops", head);
            return false;
        }
        d = copy_desc(&table[at]);
        if (d.flags & VRING_DESC_F_INDIRECT) {
            if (!(r->blk->features & F_INDIRECT)) {
                ring_break(r, "indirect descriptor %u though the feature was not negotiated", at);
                return false;
            }
            if (indirect || d.flags & VRING_DESC_F_NEXT) {
                ring_break(r, "indirect descriptor %u is nested or has a next one", at);
                return false;
            }
            size = copy_table(r, c, &d);
            if (size == 0)
                return false;
            table = c->table;
            indirect = true;
            at = seen = 0;
            continue;
        }
        if (!add_spans(r, c, &d))
            return false;
        if (!(d.flags & VRING_DESC_F_NEXT))
            return true;
        at = d.next;
    }
}

/* ---- Taking requests -------------------------------------------------------------------- */

/* Copies the chain and gets what its request will touch under way to the cache; false: the
 * ring is broken now. */
static bool prepare(struct ring *r, uint16_t head, struct chain *c)
{
    if (unlikely(head >= r->size)) {
        ring_break(r, "available ring names descriptor %u of %u", head, r->size);
        return false;
    }
    if (unlikely(!ring_chain(r, head, c)))
        return false;
    if (unlikely(c->in_bytes == 0)) {
        ring_break(r, "request at descriptor %u has no byte for its status", head);
        return false;
    }
    prefetch(c->in[c->in_count - 1].ptr); /* where the status goes */
    blk_expect(r->blk, c);
    return true;
}

static bool poll_resubmits(struct ring *r)
{
    struct chain *c = r->blk->reactor->chain;

    while (r->resubmit_next < r->resubmits && r->running) {
        if (!prepare(r, r->resubmit[r->resubmit_next], c) || !blk_execute(r, c))
            return false;
        r->requests++;
        r->resubmit_next++;
        crash_point("resubmit");
    }
    return r->running;
}

static inline uint16_t available(const struct ring *r, uint32_t ahead)
{
    return load_once(&r->avail->ring[(r->last_avail + ahead) & (r->size - 1)]);
}

/* The driver has just written these lines on another processor. A head is a hint here, its
 * table may be anywhere: only what lies in guest memory is touched. */
static void fetch_ahead(const struct ring *r, uint32_t ahead)
{
    uint16_t head = available(r, ahead);
    const uint8_t *table;

    if (unlikely(head >= r->size))
        return;
    table = memory_near(r->blk->memory, load_once(&r->desc[head].addr), 64);
    if (table) {
        prefetch(table);
        prefetch(table + 63);
    }
}

/* Chains are prepared ahead of the request in hand. While its data is copied, the next one's
 * table and index bucket arrive, and one before that what the index points at.
 *
 * A short round may be all that the driver has in flight: it sees the first half early and
 * makes new requests while the other half is served. A driver with more has work anyway. */
static uint32_t take(struct ring *r, uint32_t count)
{
    struct chain *chain = r->blk->reactor->chain;
    uint32_t done = 0, ready = 0;
    bool good = true;

    while (r->inflight < r->size) {
        struct chain *now = &chain[done % CHAINS_AHEAD];

        for (; good && ready < count && ready < done + CHAINS_AHEAD; ready += good) {
            if (ready + 1 < count)
                fetch_ahead(r, ready - done + 1);
            good = prepare(r, available(r, ready - done), &chain[ready % CHAINS_AHEAD]);
        }
        if (ready == done)
            break;
        if (ready > done + 1)
            blk_look_ahead(r->blk, &chain[(done + 1) % CHAINS_AHEAD]);
        record_take(r, now->head);
        crash_point("take-before-run");
        if (!blk_execute(r, now)) {
            record_untake(r, now->head);
            break;
        }
        r->requests++;
        r->last_avail++;
        if (++done % SHOW_EVERY == 0 && count <= 2 * SHOW_EVERY)
            show(r);
    }
    return done;
}

uint32_t ring_poll(struct ring *r, uint32_t budget)
{
    uint16_t avail, waiting;

    if (!r->running)
        return 0;
    if (unlikely(r->held) && !epoch_room(r->blk->writer, r->held_blocks)) {
        blk_hold(r);
        return 0;
    }
    r->held = false;
    if (unlikely(r->resubmit_next < r->resubmits) && !poll_resubmits(r))
        return 0;
    avail = __atomic_load_n(&r->avail->idx, __ATOMIC_ACQUIRE);
    waiting = (uint16_t)(avail - r->last_avail);
    if (waiting == 0)
        return 0;
    if (unlikely(waiting > r->size)) {
        ring_break(r, "available index jumps from %u to %u in a ring of %u", r->last_avail, avail,
                   r->size);
        return 0;
    }
    return take(r, waiting < budget ? waiting : budget);
}
