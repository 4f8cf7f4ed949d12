/* check.h - assertions for our own bugs, in every build. Hostile or broken input never gets
 * here: it is rejected with an errno or a request status. And hints for compiler and processor. */
#ifndef EPOCHD_CHECK_H
#define EPOCHD_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define check(condition)                                                                  \
    do {                                                                                  \
        if (__builtin_expect(!(condition), 0)) {                                          \
            fprintf(stderr, "epochd: assertion failed: %s (%s:%d)\n", #condition,         \
                    __FILE__, __LINE__);                                                  \
            abort();                                                                      \
        }                                                                                 \
    } while (0)

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Gets a line under way to the cache; any address will do. The empty statement is an effect: GCC
 * takes a function that does nothing but prefetch for one without any, and drops its calls. */
static inline void prefetch(const void *line)
{
    __builtin_prefetch(line);
    __asm__ volatile("");
}

#endif
