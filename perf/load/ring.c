/* ring.c - see ring.h: what is done seldom. */
#include "ring.h"

#include <stddef.h>
#include <string.h>
#include <unistd.h>

static void link_slot(struct ring *r, const load_config *config, const load_queue_config *queue,
                      uint32_t i)
{
    struct slot *s = &r->slot[i];
    uint64_t at = config->guest + queue->slots + (uint64_t)i * sizeof(*s);
    uint16_t first = queue->indirect ? 0 : (uint16_t)(3 * i);
    struct vring_desc *table = queue->indirect ? s->table : &r->desc[3 * i];

    memset(s, 0, sizeof(*s));
    table[0] = (struct vring_desc){.addr = at + offsetof(struct slot, header),
                                   .len = sizeof(s->header), .flags = VRING_DESC_F_NEXT,
                                   .next = (uint16_t)(first + 1)};
    table[1] = (struct vring_desc){.flags = VRING_DESC_F_NEXT, .next = (uint16_t)(first + 2)};
    table[2] = (struct vring_desc){.addr = at + offsetof(struct slot, status), .len = 1,
                                   .flags = VRING_DESC_F_WRITE};
    if (queue->indirect)
        r->desc[i] = (struct vring_desc){.addr = at + offsetof(struct slot, table),
                                         .len = sizeof(s->table),
                                         .flags = VRING_DESC_F_INDIRECT};
}

void ring_init(struct ring *r, const load_config *config, const load_queue_config *queue)
{
    *r = (struct ring){
        .desc = (void *)(config->memory + queue->desc),
        .avail = (void *)(config->memory + queue->avail),
        .used = (void *)(config->memory + queue->used),
        .slot = (void *)(config->memory + queue->slots),
        .mask = queue->size - 1,
        .stride = queue->indirect ? 1 : 3,
        .event_idx = queue->event_idx,
        .kick_fd = queue->kick_fd,
        .call_fd = queue->call_fd,
    };
    r->used_event = &r->avail->ring[queue->size];
    r->avail_event = (uint16_t *)&r->used->ring[queue->size];
    for (uint32_t i = 0; i < config->depth; i++)
        link_slot(r, config, queue, i);
    ring_want_calls(r, false);
}

void ring_want_calls(struct ring *r, bool wanted)
{
    if (r->event_idx) {
        r->quiet_at = r->used_seen;
        ring_store(r->used_event, (uint16_t)(wanted ? r->used_seen : r->used_seen - 0x4000));
    } else {
        ring_store(&r->avail->flags, wanted ? 0 : VRING_AVAIL_F_NO_INTERRUPT);
    }
    if (wanted)
        __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the wish is out before we look again */
}

void ring_kick(const struct ring *r)
{
    uint64_t one = 1;

    if (write(r->kick_fd, &one, sizeof(one)) < 0) {
        /* EAGAIN: the counter is full, the device has kicks enough */
    }
}
