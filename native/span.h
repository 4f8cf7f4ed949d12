/* span.h - scattered guest bytes, and a cursor over them. Plain memory as far as this file
 * knows; whoever made the spans (memory.c) has checked that they lie in guest memory. */
#ifndef EPOCHD_SPAN_H
#define EPOCHD_SPAN_H

#include <stdint.h>
#include <string.h>

#include "check.h"

struct span {
    uint8_t *ptr;
    uint64_t guest;     /* guest physical address, for the dirty log */
    uint64_t bytes;
};

/* Counts this thread's accesses to guest memory that had no memory behind them (memory.c); a copy
 * during which it moves has copied zeroes. A signal handler counts, so the variable must be there
 * before the thread has used it: hence the model. */
extern _Thread_local uint32_t span_faults __attribute__((tls_model("initial-exec")));
static inline uint32_t span_faults_now(void)
{
    return __atomic_load_n(&span_faults, __ATOMIC_ACQUIRE);
}

struct span_cursor {
    const struct span *span;
    uint32_t count, at;
    uint64_t offset;    /* in span[at] */
};

static inline struct span_cursor span_start(const struct span *span, uint32_t count)
{
    return (struct span_cursor){.span = span, .count = count};
}

static inline uint64_t span_bytes(const struct span *span, uint32_t count)
{
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < count; i++)
        bytes += span[i].bytes;
    return bytes;
}

/* Bytes that follow in one piece, and where they are. */
static inline uint64_t span_left(struct span_cursor *c, const uint8_t **at)
{
    while (c->at < c->count && c->offset == c->span[c->at].bytes) {
        c->at++;
        c->offset = 0;
    }
    check(c->at < c->count);
    *at = c->span[c->at].ptr + c->offset;
    return c->span[c->at].bytes - c->offset;
}

/* The next contiguous piece, at most `bytes` long; advances. The caller never asks for more
 * than span_bytes() in total. */
static inline uint8_t *span_piece(struct span_cursor *c, uint64_t bytes, uint64_t *got)
{
    const struct span *s;
    uint8_t *ptr;

    while (c->at < c->count && c->offset == c->span[c->at].bytes) {
        c->at++;
        c->offset = 0;
    }
    check(c->at < c->count);
    s = &c->span[c->at];
    ptr = s->ptr + c->offset;
    *got = s->bytes - c->offset < bytes ? s->bytes - c->offset : bytes;
    c->offset += *got;
    return ptr;
}

static inline void span_read(struct span_cursor *c, void *to, uint64_t bytes)
{
    uint8_t *p = to;

    while (bytes > 0) {
        uint64_t got;
        const uint8_t *from = span_piece(c, bytes, &got);
        memcpy(p, from, got);
        p += got;
        bytes -= got;
    }
}

static inline void span_write(struct span_cursor *c, const void *from, uint64_t bytes)
{
    const uint8_t *p = from;

    while (bytes > 0) {
        uint64_t got;
        uint8_t *to = span_piece(c, bytes, &got);
        memcpy(to, p, got);
        p += got;
        bytes -= got;
    }
}

static inline void span_zero(struct span_cursor *c, uint64_t bytes)
{
    while (bytes > 0) {
        uint64_t got;
        uint8_t *to = span_piece(c, bytes, &got);
        memset(to, 0, got);
        bytes -= got;
    }
}

#endif
