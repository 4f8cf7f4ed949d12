/* writer.h - what one reactor changes while it serves its rings: its parts of the epochs, and
 * what it has taken aside for them.
 *
 * Disk d is served by reactor d % writers, which writes into its own part of the open epoch:
 * an index of these disks' blocks, and raw segments with their frames. So reactors share
 * nothing that they change in a round, but for counts of dead frames (arena.h) and the list of
 * free segments, which has a lock. All else of the group changes only while no reactor is in a
 * round: in group_step(), and what it calls. What a round finds for the group to do is noted
 * here, and group_step() sees to it: writer_ask() calls for that.
 *
 * A round takes new segments from the writer's own stock, so that epoch_room() is a promise
 * without a lock; writer_round() fills it up before the round. A request for which the stock is
 * too small waits for the next round; one for which the arena is, is held (group_hold()).
 *
 * With one writer there is no stock and nothing to note: it does at once what it finds, and
 * takes segments from the arena.
 *
 * Owner: the reactor, within its rounds; the group's between them. Memory that the indexes may
 * take is divided evenly among the writers. A segment that an earlier start has filled may hold
 * frames of several writers' disks: their dead are counted with atomic operations therefore.
 */
#ifndef EPOCHD_WRITER_H
#define EPOCHD_WRITER_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "expand.h"
#include "ranges.h"

struct group;
struct epoch;
struct epoch_part;

#define WRITER_STOCK 4u         /* segments that it has aside, unless the arena is small */

struct writer {
    struct group *group;
    struct epoch_part *open;    /* of the open epoch, this writer's */
    uint32_t number;
    bool shared;                /* there are others */
    bool batching;              /* see epoch_batch_begin() */
    uint64_t seq;               /* of the next frame */
    uint64_t expected_blocks;   /* size hint for the next epoch's index */
    struct index_memory index_memory; /* of its parts */
    struct expander expand;     /* the reactor's */
    uint8_t *scratch;           /* BLOCK_BYTES */
    uint64_t zero_frames;       /* written */

    /* With several writers only. */
    uint32_t stock, stock_count; /* segments set aside, linked by arena.next */
    uint32_t stock_usual, stock_want;
    bool asked;                 /* something of this is new: */
    bool look;                  /* the packer may have work, the arena less room */
    bool granted;               /* a held request has what it waits for, and has not run yet */
    uint32_t worn;              /* segments whose `dead` has come to worn_at, by look_next */
    int fault;                  /* the spill file has lost something: -errno */
    uint64_t held_blocks;       /* the largest request that is held; 0: none ... */
    uint64_t held_now;          /* ... of this round so far */
} __attribute__((aligned(64)));

/* Once at the start; index_limit: of all writers together. */
int writer_init(struct group *g, uint32_t number, uint64_t index_limit);
void writer_free(struct writer *w);
/* With the arena's segments counted and frames numbered from g->seq on. */
void writers_begin(struct group *g);

/* Takes segments from the arena as far as there are more than the reserved ones. */
void writer_refill(struct writer *w);

/* Before each round. */
static inline void writer_round(struct writer *w)
{
    if (unlikely(w->stock_count < w->stock_want))
        writer_refill(w);
    w->held_now = 0;
}

/* ... and after it. */
static inline void writer_round_over(struct writer *w)
{
    if (likely(!w->shared))
        return;
    w->held_blocks = w->held_now;
    w->granted = false;
}

/* The next one; epoch_room() has promised it. */
uint32_t writer_segment(struct writer *w);

/* Within a round: group_step() is due. */
void writer_ask(struct writer *w);
/* A segment was taken: the packer may have work, and pressure is told before a write waits. */
void writer_look(struct writer *w);
/* `dead` of the segment has come to worn_at. */
void writer_worn(struct writer *w, uint32_t segment);
/* A frame of the spill file is not whole. */
void writer_fault(struct writer *w, int error);
/* A request that touches so many blocks does not fit into the stock: the next writer_round() is
 * to fill it up so far. */
void writer_want(struct writer *w, uint64_t blocks);
/* It has not: the request is held. */
void writer_hold(struct writer *w, uint64_t blocks);

/* Segments that all of them have aside. */
uint32_t writers_stock(const struct group *g);
/* At the beginning of group_step(): sees to what the writers have noted. */
void writers_serve(struct group *g);
/* At its end: gives held requests the room that it has made. */
void writers_grant(struct group *g);

#endif
