/* ring.h - the driver's side of one split virtqueue (virtio 1.2, 2.7), for virtio-blk requests.
 *
 * Every request is three descriptors: header, data (or the segment of a zero or discard), status.
 * Slot i belongs to head i (indirect) or 3 * i (direct); all that does not change from
 * request to request is written once, by ring_init. Inline, because it is the whole cost of the
 * load generator.
 *
 * The device is polled: the driver asks for no calls except in ring_want_calls. It kicks only
 * when the device asks (EVENT_IDX or VRING_USED_F_NO_NOTIFY). */
#ifndef EPOCHD_LOAD_RING_H
#define EPOCHD_LOAD_RING_H

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>

#include "load.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* What a request needs in shared memory besides its data. The device writes the second half
 * only, so that the two sides do not fight for the first one's cache line. */
struct slot {
    struct vring_desc table[3];
    struct virtio_blk_outhdr header;
    struct virtio_blk_discard_write_zeroes segment;
    uint8_t unused[32];
    uint8_t status, padding[15];
};
_Static_assert(sizeof(struct slot) == LOAD_SLOT_BYTES, "two cache lines");

struct ring {
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint16_t *used_event, *avail_event; /* beyond the two rings */
    struct slot *slot;
    uint32_t mask, stride;       /* stride: descriptors of a slot in the main table */
    uint16_t avail_idx, published, used_seen, quiet_at;
    bool event_idx;
    int kick_fd, call_fd;
};

ALWAYS_INLINE uint16_t ring_load(const uint16_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

ALWAYS_INLINE void ring_store(uint16_t *p, uint16_t value)
{
    __atomic_store_n(p, value, __ATOMIC_RELAXED);
}

/* How many are used and not taken yet. */
ALWAYS_INLINE uint16_t ring_used(const struct ring *r)
{
    return (uint16_t)(__atomic_load_n(&r->used->idx, __ATOMIC_ACQUIRE) - r->used_seen);
}

/* The slot of the next used element; anything at or above depth is the device's fault. */
ALWAYS_INLINE uint32_t ring_take(struct ring *r)
{
    uint32_t head = r->used->ring[r->used_seen++ & r->mask].id;

    if (r->stride == 1)
        return head;
    return head % r->stride ? UINT32_MAX : head / r->stride;
}

/* Puts a slot, whose table is as it shall be, into the available ring; not yet visible. */
ALWAYS_INLINE void ring_add(struct ring *r, uint32_t slot)
{
    r->avail->ring[r->avail_idx++ & r->mask] = (uint16_t)(slot * r->stride);
}

/* Shows the device what was added. True: it wants a kick. */
ALWAYS_INLINE bool ring_publish(struct ring *r)
{
    uint16_t before = r->published;

    __atomic_store_n(&r->avail->idx, r->avail_idx, __ATOMIC_RELEASE);
    r->published = r->avail_idx;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the index is out before we read the wish */
    if (r->event_idx)
        return vring_need_event(ring_load(r->avail_event), r->avail_idx, before);
    return !(ring_load(&r->used->flags) & VRING_USED_F_NO_NOTIFY);
}

/* Keeps the event index so far behind that no call crosses it; called now and then. */
ALWAYS_INLINE void ring_stay_quiet(struct ring *r)
{
    if (r->event_idx && (uint16_t)(r->used_seen - r->quiet_at) >= 0x2000) {
        r->quiet_at = r->used_seen;
        ring_store(r->used_event, (uint16_t)(r->used_seen - 0x4000));
    }
}

void ring_init(struct ring *r, const load_config *config, const load_queue_config *queue);
/* wanted: the device shall call for the next one used. Then look again before sleeping. */
void ring_want_calls(struct ring *r, bool wanted);
void ring_kick(const struct ring *r);

#endif
