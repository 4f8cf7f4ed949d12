/* writer.c - see writer.h. */
#include "writer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "group.h"

#define STOCK_SHARE 8u /* the usual stocks of all together have at most this part of the arena */

int writer_init(struct group *g, uint32_t number, uint64_t index_limit)
{
    struct writer *w = &g->writer[number];

    *w = (struct writer){.group = g, .number = number, .shared = g->writers > 1, .seq = 1,
                         .stock = SEGMENT_NONE, .worn = SEGMENT_NONE};
    index_memory_init(&w->index_memory, index_limit / g->writers);
    w->scratch = aligned_alloc(PAGE, BLOCK_BYTES);
    return expander_start(&w->expand, &g->dictionaries) || !w->scratch ? -ENOMEM : 0;
}

void writer_free(struct writer *w)
{
    if (!w->group)
        return;
    index_memory_free(&w->index_memory);
    expander_stop(&w->expand);
    free(w->scratch);
    memset(w, 0, sizeof(*w));
}

void writers_begin(struct group *g)
{
    uint32_t usual = g->arena.segments / STOCK_SHARE / g->writers;

    for (uint32_t i = 0; g->writers > 1 && i < g->writers; i++) {
        g->writer[i].stock_usual = usual < WRITER_STOCK ? usual : WRITER_STOCK;
        g->writer[i].stock_want = g->writer[i].stock_usual;
    }
    for (uint32_t i = 0; i < g->writers; i++)
        g->writer[i].seq = g->seq;
}

/* ---- Segments ------------------------------------------------------------------------------ */

/* All that is wanted, or, where that is more than there is, the usual. */
void writer_refill(struct writer *w)
{
    struct group *g = w->group;
    struct arena *a = &g->arena;
    uint32_t free;

    pthread_mutex_lock(&g->free_lock);
    free = a->free_count > GROUP_RESERVED_SEGMENTS ? a->free_count - GROUP_RESERVED_SEGMENTS : 0;
    if (w->stock_want > w->stock_count + free)
        w->stock_want = w->stock_usual;
    for (; w->stock_count < w->stock_want && free > 0; free--) {
        uint32_t segment = arena_segment_reserve(a);

        a->next[segment] = w->stock;
        w->stock = segment;
        w->stock_count++;
    }
    pthread_mutex_unlock(&g->free_lock);
    w->stock_want = w->stock_usual;
}

uint32_t writer_segment(struct writer *w)
{
    uint32_t segment = w->stock;

    if (!w->shared)
        return arena_segment_reserve(&w->group->arena);
    check(w->stock_count > 0);
    w->stock = w->group->arena.next[segment];
    w->stock_count--;
    return segment;
}

uint32_t writers_stock(const struct group *g)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < g->writers; i++)
        count += g->writer[i].stock_count;
    return count;
}

static void give_back(struct writer *w)
{
    while (w->stock_count > 0)
        arena_segment_unreserve(&w->group->arena, writer_segment(w));
}

void writer_want(struct writer *w, uint64_t blocks)
{
    uint32_t more = epoch_room_more(w, blocks);

    if (more > w->stock_want)
        w->stock_want = more;
}

/* ---- What the group is asked for ------------------------------------------------------------ */

void writer_ask(struct writer *w)
{
    struct group *g = w->group;

    if (w->asked)
        return;
    w->asked = true;
    __atomic_store_n(&g->asked, 1, __ATOMIC_SEQ_CST);
    if (g->call)
        g->call(g->event_owner);
}

void writer_look(struct writer *w)
{
    if (w->shared) {
        w->look = true;
        writer_ask(w);
        return;
    }
    pack_look(w->group);
    group_pressure(w->group, false);
}

void writer_worn(struct writer *w, uint32_t segment)
{
    w->group->arena.use[segment].look_next = w->worn;
    w->worn = segment;
    writer_ask(w);
}

void writer_fault(struct writer *w, int error)
{
    if (w->shared) {
        w->fault = error;
        writer_ask(w);
        return;
    }
    spill_fault(w->group, error);
}

void writer_hold(struct writer *w, uint64_t blocks)
{
    if (!w->shared) {
        group_hold(w, blocks);
        return;
    }
    writer_want(w, blocks);
    if (blocks > w->held_now)
        w->held_now = blocks;
    if (blocks > w->held_blocks)
        writer_ask(w);
}

/* ---- In group_step() -------------------------------------------------------------------------- */

static void serve_worn(struct writer *w)
{
    struct group *g = w->group;

    while (w->worn != SEGMENT_NONE) {
        uint32_t segment = w->worn;
        struct segment_use *u = &g->arena.use[segment];

        w->worn = u->look_next;
        if (u->dead >= u->worn_at)
            pack_worn(g, epoch_by_id(g, g->arena.desc[segment].epoch), segment);
    }
}

/* Room for its largest request: from the arena, or what others have aside and need not have. */
static bool grant(struct writer *w)
{
    struct group *g = w->group;

    if (!epoch_room(w, w->held_blocks)) {
        for (uint32_t i = 0; i < g->writers; i++)
            if (!g->writer[i].granted && &g->writer[i] != w)
                give_back(&g->writer[i]);
        writer_want(w, w->held_blocks);
        writer_refill(w);
    }
    if (!epoch_room(w, w->held_blocks)) {
        give_back(w);
        return false;
    }
    w->held_blocks = 0;
    w->granted = true;
    if (g->wake)
        g->wake(g->event_owner, w->number);
    return true;
}

void writers_grant(struct group *g)
{
    for (uint32_t i = 0; i < g->writers; i++)
        if (g->writer[i].held_blocks)
            grant(&g->writer[i]);
}

void writers_serve(struct group *g)
{
    bool look = false;

    __atomic_store_n(&g->asked, 0, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < g->writers; i++) {
        struct writer *w = &g->writer[i];

        look |= w->look;
        w->look = w->asked = false;
        if (w->fault)
            spill_fault(g, w->fault);
        w->fault = 0;
        serve_worn(w);
    }
    if (look) {
        pack_look(g);
        group_pressure(g, false);
    }
    for (uint32_t i = 0; i < g->writers; i++)
        if (g->writer[i].held_blocks && !grant(&g->writer[i]))
            group_hold(&g->writer[i], g->writer[i].held_blocks);
}
