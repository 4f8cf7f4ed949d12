/* gate.h - many pass, each through a place of its own; one may close it and be alone then.
 *
 * The reactors' rounds pass; what changes the group closes. Passing costs one atomic exchange on
 * a line that nobody else writes. Closing waits until all are out, which is a round at most;
 * those who found it closed pass once before it is closed again, however often that is.
 *
 * Owner: gate_close() and gate_open() are one thread's, and each place is one thread's. Who is
 * inside never closes. Who finds it closed for longer than a few microseconds sleeps until it
 * opens; who closes gives the processor away while somebody is inside who has none.
 */
#ifndef EPOCHD_GATE_H
#define EPOCHD_GATE_H

#include <stdbool.h>
#include <stdint.h>

#include "check.h"

#define GATE_PLACES 8u

/* Bits, to ask for several at once. ENTERING: it has waited, and looks once more. */
enum gate_state { GATE_OUT = 0, GATE_INSIDE = 1, GATE_WAITING = 2, GATE_ENTERING = 4 };

struct gate_place {
    uint32_t state;             /* enum gate_state */
} __attribute__((aligned(64)));

struct gate {
    uint32_t closed __attribute__((aligned(64))); /* 0: open */
    uint32_t places;            /* in use */
    struct gate_place place[GATE_PLACES];
};

/* Found closed: waits, and passes. */
void gate_wait(struct gate *g, struct gate_place *p);

static inline void gate_enter(struct gate *g, uint32_t place)
{
    struct gate_place *p = &g->place[place];

    /* One order of all: either we see it closed, or the one who closes sees us. */
    __atomic_exchange_n(&p->state, GATE_INSIDE, __ATOMIC_SEQ_CST);
    if (unlikely(__atomic_load_n(&g->closed, __ATOMIC_SEQ_CST)))
        gate_wait(g, p);
}

static inline void gate_leave(struct gate *g, uint32_t place)
{
    __atomic_store_n(&g->place[place].state, GATE_OUT, __ATOMIC_RELEASE);
}

void gate_close(struct gate *g);
void gate_open(struct gate *g);

#endif
