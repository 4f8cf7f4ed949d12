/* memory.h - guest memory of one front end: address translation and the dirty log.
 *
 * The tables are built by the control thread (mapping is slow) and handed to the reactor,
 * which owns them from then on and frees them. Everything in guest memory is hostile and may
 * change at any time: callers copy before they check.
 *
 * A region whose file shrinks under us raises SIGBUS on access; the handler puts anonymous
 * pages in its place and sets `lost`, on which the reactor breaks off that front end.
 */
#ifndef EPOCHD_MEMORY_H
#define EPOCHD_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core.h"

/* One shared mapping of a file that may shrink: a front end's, or the spill file's. */
struct mapping {
    void *base;
    uint64_t bytes;
    uint32_t *lost;             /* set by the SIGBUS handler, in a table of its own */
};

struct memory_region {
    uint64_t guest, user, bytes;
    uint8_t *host;
    struct mapping *mapping;
};

struct memory {
    uint32_t count, last;       /* last: the region that the latest lookup hit */
    struct memory_region region[CORE_REGIONS_MAX]; /* sorted by guest address */
};

/* Bitmap of guest pages written (VHOST_F_LOG_ALL), one bit a 4 KiB page. */
struct dirty_log {
    struct mapping *mapping;
    uint8_t *bits;
    uint64_t bytes;
};

/* Once a process: the SIGBUS handler. */
int memory_handle_sigbus(void);

/* A mapping that somebody else made: the handler knows it from here to the end of the watch.
 * False: too many are known. */
bool mapping_watch(struct mapping *m);
void mapping_unwatch(struct mapping *m);

int mapping_create(int fd, uint64_t bytes, struct mapping **out, char *text);
void mapping_free(struct mapping *m);
bool mapping_lost(const struct mapping *m);

int memory_create(const core_region *regions, uint32_t count, struct memory **out, char *text);
void memory_free(struct memory *m);
bool memory_lost(const struct memory *m);

/* Host address of a guest physical address, NULL outside of memory. *got: how many of
 * `bytes` lie contiguously from there. */
uint8_t *memory_at(struct memory *m, uint64_t guest, uint64_t bytes, uint64_t *got);

/* The same for what lies wholly in the region of the latest lookup, as nearly all does; NULL:
 * it does not, ask memory_at(). */
static inline uint8_t *memory_near(const struct memory *m, uint64_t guest, uint64_t bytes)
{
    const struct memory_region *r = &m->region[m->last];
    uint64_t at = guest - r->guest;

    return at < r->bytes && bytes <= r->bytes - at ? r->host + at : NULL;
}
/* Host address of a front end's user address; all of `bytes` must lie in one region. */
uint8_t *memory_at_user(const struct memory *m, uint64_t user, uint64_t bytes);

/* Marks guest pages as written; false: the bitmap does not cover them all. */
bool dirty_log_mark(const struct dirty_log *log, uint64_t guest, uint64_t bytes);

#endif
