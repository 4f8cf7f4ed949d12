/* gate.c - see gate.h. */
#include "gate.h"

#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SPINS 200u /* a round is over in microseconds, unless its thread has lost its processor */

enum { OPEN, CLOSED, CLOSED_AWAITED }; /* awaited: somebody sleeps until it opens */

static bool spin(uint32_t *turn)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    return ++*turn < SPINS;
}

static void await_open(struct gate *g)
{
    uint32_t turn = 0, closed;

    while ((closed = __atomic_load_n(&g->closed, __ATOMIC_ACQUIRE)) != OPEN) {
        if (spin(&turn))
            continue;
        if (closed == CLOSED_AWAITED ||
            __atomic_compare_exchange_n(&g->closed, &closed, CLOSED_AWAITED, false,
                                        __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            syscall(SYS_futex, &g->closed, FUTEX_WAIT_PRIVATE, CLOSED_AWAITED, NULL, NULL, 0);
    }
}

void gate_wait(struct gate *g, struct gate_place *p)
{
    do {
        __atomic_store_n(&p->state, GATE_WAITING, __ATOMIC_SEQ_CST);
        await_open(g);
        __atomic_exchange_n(&p->state, GATE_ENTERING, __ATOMIC_SEQ_CST);
    } while (__atomic_load_n(&g->closed, __ATOMIC_SEQ_CST) != OPEN);
    __atomic_store_n(&p->state, GATE_INSIDE, __ATOMIC_RELEASE);
}

static void wait_while(const struct gate *g, uint32_t states)
{
    for (uint32_t i = 0; i < g->places; i++) {
        uint32_t turn = 0;

        while (__atomic_load_n(&g->place[i].state, __ATOMIC_SEQ_CST) & states)
            if (!spin(&turn))
                sched_yield();
    }
}

void gate_close(struct gate *g)
{
    wait_while(g, GATE_WAITING | GATE_ENTERING); /* their turn, since it was open last */
    __atomic_exchange_n(&g->closed, CLOSED, __ATOMIC_SEQ_CST);
    wait_while(g, GATE_INSIDE | GATE_ENTERING);
}

void gate_open(struct gate *g)
{
    if (__atomic_exchange_n(&g->closed, OPEN, __ATOMIC_ACQ_REL) == CLOSED_AWAITED)
        syscall(SYS_futex, &g->closed, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}
