/* ring.h - one split virtqueue: descriptor chains in, used elements out.
 *
 * Virtio 1.2 section 2.7; the in-flight region is the vhost-user specification's split
 * layout. Everything in guest memory is read once into a copy and the copy is checked. A
 * chain or index that cannot be right breaks the ring: it stops, with the reason kept;
 * nothing else stops.
 *
 * Owner: the reactor thread. Not done here: what a request means (blk.h), packed rings.
 */
#ifndef EPOCHD_RING_H
#define EPOCHD_RING_H

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>

#include "core.h"
#include "notifier.h"
#include "span.h"

struct blk;

#define CHAIN_SPANS_MAX (CORE_QUEUE_SIZE_MAX + 64u) /* a buffer may cross regions */
#define CHAINS_AHEAD 4u          /* prepared at once, that of the request in hand included */
#define SHOW_EVERY 16u           /* see take() */
#define VHOST_VRING_LOG 1u       /* flag of SET_VRING_ADDR: used ring is logged */

/* In-flight region, one a queue (vhost-user "split virtqueue" layout). */
struct inflight_desc {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;
    uint64_t counter;
};
_Static_assert(sizeof(struct inflight_desc) == 16, "vhost-user layout");
struct inflight_queue {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct inflight_desc desc[];
};
_Static_assert(sizeof(struct inflight_queue) == 16, "vhost-user layout");
uint64_t inflight_queue_bytes(uint32_t queue_size);

/* A request's buffers: what the device reads, then what it writes. */
struct chain {
    uint16_t head;
    struct virtio_blk_outhdr header; /* copied once, if out_bytes has so many */
    struct span out[CHAIN_SPANS_MAX]; /* device-readable */
    struct span in[CHAIN_SPANS_MAX];  /* device-writable */
    uint32_t out_count, in_count;
    uint64_t out_bytes, in_bytes;
    struct vring_desc table[CORE_QUEUE_SIZE_MAX]; /* copy of an indirect table */
};

struct ring {
    struct blk *blk;
    uint32_t index;
    uint32_t size;
    bool has_addr;
    uint32_t addr_flags;
    uint64_t desc_user, avail_user, used_user, used_guest; /* used_guest: for the log */
    struct vring_desc *desc;      /* NULL: not resolved */
    struct vring_avail *avail;
    struct vring_used *used;
    uint16_t last_avail;          /* next entry of the available ring to take */
    uint16_t used_idx;            /* next entry of the used ring to fill */
    uint16_t published;           /* used->idx as the driver sees it */
    uint16_t called_at;           /* used_idx at the last interrupt decision */
    bool called_valid;
    int kick_fd;                  /* -1: none */
    struct notifier *call, *err;  /* NULL: none */
    bool watched;                 /* the sleeper waits for kick_fd */
    bool kicked;                  /* SET_VRING_KICK came: the ring is started */
    bool fresh;                   /* not yet run since it was started */
    bool enabled, running, broken, stopping;
    bool to_call;                 /* more is published than the driver was called for */
    bool to_publish;              /* in the reactor's list of rings that have news */
    bool held;                    /* the next request waits for room in the arena ... */
    bool held_told;               /* ... not only in its writer's stock */
    uint64_t held_blocks;
    uint32_t given_up;            /* requests that a stop answered with IOERR */
    bool give_up;                 /* resubmits that find no room are among them */
    uint32_t inflight;            /* requests taken and not answered yet */
    struct inflight_queue *record; /* NULL: no in-flight region */
    uint16_t record_size;
    uint16_t batch[CORE_QUEUE_SIZE_MAX]; /* heads answered and not published yet */
    uint32_t batched;
    uint64_t counter;
    uint16_t *resubmit;           /* heads found in flight at start, oldest first */
    uint32_t resubmits, resubmit_next;
    uint64_t requests, kicks, calls;
    char reason[CORE_TEXT_MAX];
};

void ring_init(struct ring *r, struct blk *b, uint32_t index);
/* Everything back to the start; closes descriptors. */
void ring_reset(struct ring *r);

/* Looks up the ring's addresses in the current memory table. */
void ring_resolve(struct ring *r);
/* Starts or pauses the ring as its state says; called after each change of it. */
void ring_update(struct ring *r);

/* Takes up to `budget` requests. Returns how many. */
uint32_t ring_poll(struct ring *r, uint32_t budget);
/* Answers a request: len bytes were written to its device-writable buffers. */
void ring_push(struct ring *r, uint16_t head, uint32_t len);
/* Shows the driver what was pushed, and calls it if it wants. */
void ring_publish(struct ring *r);

/* Has the driver something for us that we could take? */
bool ring_has_work(const struct ring *r);
/* Asks the driver for kicks (before sleeping) or not. */
void ring_want_kicks(struct ring *r, bool want);

/* Fills c from the chain at head; false: the ring is broken now. */
bool ring_chain(struct ring *r, uint16_t head, struct chain *c);

/* Marks guest memory as written by us in the dirty log, which must be there. */
void ring_log(struct ring *r, uint64_t guest, uint64_t bytes);

void ring_break(struct ring *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
void ring_call(struct ring *r);

#endif
