/* clock.h - a monotonic clock that costs a few nanoseconds: the time stamp counter where it runs
 * at a constant rate, the system's clock elsewhere. Ticks are compared and subtracted only. */
#ifndef EPOCHD_LOAD_CLOCK_H
#define EPOCHD_LOAD_CLOCK_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "wide.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <x86intrin.h>
#endif

struct clock {
    bool tsc;
    double ticks_per_ns;
    uint64_t ns_per_tick_q32;     /* the inverse, 32 bits of fraction */
};

static inline uint64_t clock_system_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline uint64_t clock_ticks(const struct clock *c)
{
#if defined(__x86_64__)
    if (c->tsc)
        return __rdtsc();
#endif
    (void)c;
    return clock_system_ns();
}

static inline uint64_t clock_ns(const struct clock *c, uint64_t ticks)
{
    return (uint64_t)((u128)ticks * c->ns_per_tick_q32 >> 32);
}

static inline uint64_t clock_from_ns(const struct clock *c, uint64_t ns)
{
    return (uint64_t)((double)ns * c->ticks_per_ns);
}

/* Takes 20 ms to measure the counter's rate. */
void clock_init(struct clock *c);

static inline void clock_relax(void)
{
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

#endif
