/* arena.c - a start on an arena whose header, segment table or frames were changed.
 *
 * The input names a history (history.h) and changes to the shared memory. group_open() must
 * refuse with a reason, or come up consistent: each segment free or in exactly one epoch,
 * each index entry inside of a frame, and everything that a guest and a controller can do
 * works or is answered with an error. Frames have no checksum before they are committed, so
 * changed contents may pass; nothing may be written beyond an image because of them.
 */
#include <stdlib.h>
#include <string.h>

#include "history.h"

static struct history history[HISTORIES];
static uint32_t data_offset;

/* ---- Changes ---------------------------------------------------------------------------- */

static uint64_t place(struct input *in, const struct history *h)
{
    uint8_t how = input_8(in);
    uint64_t at = input_n(in, 2);
    const struct segment_desc *desc = (const struct segment_desc *)(h->arena + PAGE);
    uint32_t segment = how % HISTORY_SEGMENTS, offset = 0;

    if (how < 48)
        return at % 2240;
    if (how < 128)
        return PAGE + at % (HISTORY_SEGMENTS * sizeof(*desc));
    /* A frame's header; the tail itself when there are fewer. */
    for (uint32_t n = at >> 5 & 63; n > 0 && offset < desc[segment].tail; n--)
        offset += frame_bytes(((const struct frame_header *)(h->arena + data_offset +
                                                             segment * SEGMENT_BYTES + offset))
                                  ->payload_bytes);
    return data_offset + (uint64_t)segment * SEGMENT_BYTES + offset +
           (how & 64 ? at & 31 : at & 4095);
}

static void change(struct input *in, const struct history *h)
{
    static const uint64_t special[] = {0, 1, UINT64_MAX, SEGMENT_BYTES, SEGMENT_BYTES + 32,
                                       1ull << 31, 1ull << 47, CORE_EPOCHS_MAX};
    uint8_t op = input_8(in), *arena = history_arena();
    uint64_t at = place(in, h), value, n = 1u << (op >> 3 & 3);

    if (at + 4096 > HISTORY_ARENA_BYTES)
        return;
    switch (op & 7) {
    case 0:
        arena[at] ^= (uint8_t)(1u << (op >> 5));
        break;
    case 1:
    case 2:
        value = input_n(in, (uint32_t)n);
        memcpy(arena + at, &value, n);
        break;
    case 3:
        value = special[op >> 5];
        memcpy(arena + at, &value, n);
        break;
    case 4:
        memset(arena + at, 0, 16u << (op >> 5));
        break;
    case 5:
        value = place(in, h);
        if (value + 4096 <= HISTORY_ARENA_BYTES)
            memmove(arena + at, arena + value, 16u << (op >> 5));
        break;
    case 6: /* add to what is there */
        memcpy(&value, arena + at, 8);
        value += (uint64_t)(int64_t)(int8_t)input_8(in);
        memcpy(arena + at, &value, n);
        break;
    case 7:
        memset(arena + at, 0xff, 16u << (op >> 5 & 3));
        break;
    }
}

/* ---- Consistent ----------------------------------------------------------------------------- */

static void count_list(const struct group *g, const struct segment_list *l, uint32_t *owners)
{
    uint32_t segment = l->first;

    for (uint32_t n = 0; n < l->count; n++, segment = g->arena.next[segment]) {
        if (segment >= g->arena.segments)
            finding("a list names segment %u of %u", segment, g->arena.segments);
        owners[segment]++;
    }
    if (l->count && segment != SEGMENT_NONE)
        finding("a list of %u segments goes on", l->count);
}

static void check_index(const struct group *g, const struct index *x)
{
    struct index_cursor at = {0};
    const struct index_slot *s;

    while ((s = index_next(x, &at))) {
        if (arena_loc_segment(s->loc) >= g->arena.segments || s->disk >= g->config.disks)
            finding("an index entry of disk %u at place %#x", s->disk, s->loc);
        if (index_slot_block(s) * BLOCK_BYTES >= g->config.disk[s->disk].size_bytes)
            finding("an index entry for block %llu, behind the end of disk %u",
                    (unsigned long long)index_slot_block(s), s->disk);
    }
}

static void check_group(const struct group *g)
{
    uint32_t owners[HISTORY_SEGMENTS] = {0};

    if (g->arena.segments != HISTORY_SEGMENTS)
        finding("%u segments", g->arena.segments);
    for (uint32_t i = 0; i < g->epochs; i++) {
        if (i > 0 && g->epoch[i]->id <= g->epoch[i - 1]->id)
            finding("epoch %llu after %llu", (unsigned long long)g->epoch[i]->id,
                    (unsigned long long)g->epoch[i - 1]->id);
        for (uint32_t n = 0; n < g->writers; n++) {
            count_list(g, &g->epoch[i]->part[n].raw_list, owners);
            check_index(g, &g->epoch[i]->part[n].index);
        }
        count_list(g, &g->epoch[i]->kept_list, owners);
        count_list(g, &g->epoch[i]->worn_list, owners);
    }
    count_list(g, &g->pack.dead_list, owners);
    for (uint32_t i = 0; i < g->arena.free_count; i++)
        owners[g->arena.free_stack[i]]++;
    for (uint32_t i = 0; i < HISTORY_SEGMENTS; i++)
        if (owners[i] != 1)
            finding("segment %u is in %u places", i, owners[i]);
}

static void read_all(const struct history *h, struct group *g)
{
    uint8_t data[BLOCK_BYTES];

    for (uint32_t d = 0; d < HISTORY_DISKS; d++)
        for (uint64_t b = 0; b * BLOCK_BYTES < h->image_bytes[d]; b++)
            history_read(h, g, d, b, data);
}

/* ---- Use -------------------------------------------------------------------------------------- */

static uint32_t answers;

static void event(void *owner, const core_event *e)
{
    (void)owner;
    answers += e->type == CORE_EVENT_DONE;
}

static void verb(struct history *h, struct group *g, enum verb_kind kind)
{
    struct verb v = {.kind = kind, .newest = true};
    uint32_t before = answers;

    checkpoint_submit(g, &v);
    for (uint32_t i = 0; i < 4 && answers == before; i++) {
        seam_settle(g, &h->seam);
        g->now_ns += 2 * GROUP_RETRY_NS;
    }
}

static void use(struct history *h, struct group *g, uint8_t how)
{
    read_all(h, g);
    seam_settle(g, &h->seam);
    read_all(h, g);
    history_write(g, 0, 1, how);
    if (epoch_room(&g->writer[0], EPOCH_ZERO_ROOM))
        epoch_zero(g, 1, 3, 100, 0);
    verb(h, g, VERB_SEAL);
    if (how & 1)
        verb(h, g, VERB_COMMIT);
    if (how & 2)
        verb(h, g, VERB_DISCARD);
    if (how & 4)
        verb(h, g, VERB_PROMOTE);
    history_write(g, 0, 2, how);
    read_all(h, g);
    verb(h, g, VERB_STOP);
    check_group(g);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct group g;
    struct input in = {.at = data, .end = data + bytes};
    struct history *h = &history[input_8(&in) % HISTORIES];
    uint8_t how = input_8(&in);
    char text[CORE_TEXT_MAX] = "";

    if (!history[0].states) {
        for (uint32_t i = 0; i < HISTORIES; i++)
            history_make(&history[i], (enum history_kind)i);
        data_offset = ((const struct arena_header *)history[0].arena)->data_offset;
    }
    memcpy(history_arena(), h->arena, HISTORY_ARENA_BYTES);
    for (uint32_t i = 0; i < 24 && !input_over(&in); i++)
        change(&in, h);
    if (history_open(h, &g, text)) {
        if (!text[0])
            finding("refused without a reason");
    } else {
        g.event = event;
        check_group(&g);
        use(h, &g, how);
        seam_drop(&h->seam);
        group_close(&g);
    }
    seam_restore(&h->seam);
    return 0;
}
