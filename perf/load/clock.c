/* clock.c - see clock.h. */
#include "clock.h"

#define CALIBRATE_NS 20000000u

static bool constant_counter(void)
{
#if defined(__x86_64__)
    unsigned a, b, c, d;

    /* Invariant TSC: same rate in all power states. */
    return __get_cpuid(0x80000007, &a, &b, &c, &d) && d & 1u << 8;
#else
    return false;
#endif
}

/* Both clocks at one moment; of several tries the one with the least between the two reads. */
static void both(const struct clock *c, uint64_t *ticks, uint64_t *ns)
{
    uint64_t best = UINT64_MAX;

    for (int i = 0; i < 16; i++) {
        uint64_t before = clock_ticks(c), now = clock_system_ns(), after = clock_ticks(c);

        if (after - before < best) {
            best = after - before;
            *ticks = before + best / 2;
            *ns = now;
        }
    }
}

void clock_init(struct clock *c)
{
    struct timespec pause = {.tv_nsec = CALIBRATE_NS};
    uint64_t ticks0, ns0, ticks1, ns1;

    c->tsc = constant_counter();
    c->ticks_per_ns = 1;
    if (c->tsc) {
        both(c, &ticks0, &ns0);
        nanosleep(&pause, NULL);
        both(c, &ticks1, &ns1);
        c->ticks_per_ns = (double)(ticks1 - ticks0) / (double)(ns1 - ns0);
    }
    c->ns_per_tick_q32 = (uint64_t)(4294967296.0 / c->ticks_per_ns);
}
