/* choose.h - which block and which operation comes next: a function of the seed alone.
 *
 * Each queue has a `chooser` of its own, so that its order does not depend on timing. Random
 * numbers: SplitMix64 (Steele, Lea, Flood 2014). Zipf: rejection-inversion (Hoermann and Derflinger
 * 1996), which needs no table and takes any exponent above 0; ranks are spread over the
 * region by a multiplication modulo its size, so that hot blocks are no neighbours. */
#ifndef EPOCHD_LOAD_CHOOSE_H
#define EPOCHD_LOAD_CHOOSE_H

#include <stdbool.h>
#include <stdint.h>

#include "load.h"
#include "wide.h"

struct zipf {
    double theta, h_first, h_last, shortcut;
    uint64_t blocks, spread;
};

struct chooser {
    int pattern;
    uint64_t state;               /* of the random numbers */
    uint64_t blocks;
    uint64_t next, begin, end;    /* of the sequential part */
    int only;                     /* the one operation, or -1: by chance */
    uint64_t below[LOAD_OPS];     /* a draw of 32 bits below this: this operation */
    struct zipf zipf;
};

static inline uint64_t choose_random(struct chooser *c)
{
    uint64_t z = c->state += 0x9e3779b97f4a7c15u;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

void zipf_init(struct zipf *z, uint64_t blocks, double theta);
uint64_t zipf_block(struct chooser *c);

static inline uint64_t choose_block(struct chooser *c)
{
    if (c->pattern == LOAD_RANDOM)
        return (uint64_t)((u128)choose_random(c) * c->blocks >> 64);
    if (c->pattern == LOAD_ZIPF)
        return zipf_block(c);
    if (c->next == c->end)
        c->next = c->begin;
    return c->next++;
}

static inline int choose_op(struct chooser *c)
{
    uint64_t draw;
    int op = 0;

    if (c->only >= 0)
        return c->only;
    draw = choose_random(c) >> 32;
    while (draw >= c->below[op])
        op++;
    return op;
}

/* stream: which of the independent sequences of one seed. The chooser goes sequentially through
 * part `part` of `parts` equal ones. */
void choose_init(struct chooser *c, const load_workload *w, uint64_t stream, uint64_t blocks,
                 uint64_t part, uint64_t parts);

#endif
