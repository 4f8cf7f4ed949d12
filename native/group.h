/* group.h - one consistency group: its arena, epochs, journal and apply, with nothing of
 * rings or threads, so that the tests' simulator can run it on a simulated disk.
 *
 * Owner: one thread, the first reactor (before that the thread that opens it, in the simulator
 * the test). It calls group_step() after completions, jobs, verbs and calls of writers until it
 * returns false, and keeps now_ns current. With several writers the others are between their
 * rounds meanwhile, and while completions of the group's disk are delivered.
 */
#ifndef EPOCHD_GROUP_H
#define EPOCHD_GROUP_H

#include <stdbool.h>
#include <stdint.h>

#include "apply.h"
#include "arena.h"
#include "checkpoint.h"
#include "core.h"
#include "dictionary.h"
#include "disk.h"
#include "epoch.h"
#include "expand.h"
#include "journal.h"
#include "merge.h"
#include "metrics.h"
#include "pack.h"
#include "spill.h"
#include "worker.h"
#include "writer.h"

/* Never given to guest writes: packing needs an output segment most when all is full. */
#define GROUP_RESERVED_SEGMENTS 2u
#define GROUP_RETRY_NS 1000000000ull /* after an I/O error that nobody waits for */

/* What fails, each until a success of its own kind. */
enum group_trouble { TROUBLE_COMMIT, TROUBLE_SUPER, TROUBLE_IMAGES, TROUBLE_SPILL, TROUBLES };

struct group_stats {
    uint64_t seals, commits, applies, discards;
    uint64_t compressed_frames, incompressible_frames, dropped_frames;
    uint64_t compress_ns, commit_ns_last, seal_ns_last, apply_ns_last;
    uint64_t journal_bytes, image_bytes, spill_bytes;
    uint64_t clusters, pack_bytes_in, pack_bytes_out, dictionary_frames;
    uint64_t merges, merged_blocks, merge_bytes_in, merge_bytes_out;
};

struct group {
    core_config config;
    struct disk *disk;
    struct arena arena;
    struct writer writer[CORE_REACTORS_MAX];
    uint32_t writers;
    uint32_t asked;             /* atomic: a writer has something for group_step() */
    pthread_mutex_t free_lock;  /* of the arena's free segments, for writers in their rounds */
    pthread_mutex_t waiter_lock; /* of checkpoint.waiters, likewise */
    struct epoch *epoch[CORE_EPOCHS_MAX]; /* oldest first; the last one is open */
    uint32_t epochs;
    uint32_t burials;           /* dropped epochs whose index the helper is freeing */
    uint32_t mode;              /* enum core_mode */
    uint64_t generation;
    uint64_t committed;         /* newest durable epoch */
    uint64_t applied;           /* newest epoch wholly in the images */
    uint64_t seq;               /* recovery: of the next frame */
    uint32_t reads_busy;        /* atomic: guest reads that wait for an image */
    uint64_t now_ns;            /* CLOCK_MONOTONIC, as of this round */
    struct dictionaries dictionaries;
    uint32_t dictionary_missing; /* epoch_reindex() gave -ENOKEY: which */
    struct worker worker, packer; /* what somebody waits for; compression */
    struct journal journal;
    struct apply apply;
    struct pack pack;
    struct merge merge;
    struct spill spill;
    struct checkpoint checkpoint;
    struct group_stats stats;
    struct metrics metrics;     /* opened and closed by the core */
    uint32_t pressure_told;     /* percent of the last ARENA_PRESSURE, 0 below all marks */
    char trouble[TROUBLES][CORE_TEXT_MAX]; /* standing I/O errors; "": none */
    char error[CORE_ERROR_MAX]; /* all of them, for people */
    void (*event)(void *owner, const core_event *event);
    void (*call)(void *owner);  /* `asked` is set: group_step() is due; NULL: it is called anyway */
    void (*wake)(void *owner, uint32_t writer); /* its held requests have room; NULL: as above */
    void *event_owner;
};

/* Opens journal and arena on the given seam and recovers; see recover.c for the table. */
int group_open(struct group *g, const core_config *config, struct disk *disk, char *text);
/* Starts the helpers. */
int group_start(struct group *g, int notify_fd, bool inline_jobs);
void group_close(struct group *g);

/* Advances whatever can advance; true: call again. */
bool group_step(struct group *g);
/* When group_step() is due again without any completion, in ns; 0: never. */
uint64_t group_timer(const struct group *g);

/* Events towards Python. */
void group_emit(struct group *g, core_event *event);
void group_log(struct group *g, int level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void group_io_error(struct group *g, enum group_trouble kind, uint32_t disk, int error,
                    const char *what);
/* A success: the error of that kind, if any, stands no more. */
void group_io_works(struct group *g, enum group_trouble kind);

/* A request of that writer that touches so many blocks waits for room. */
void group_hold(struct writer *w, uint64_t blocks);
/* Compares arena and index with the marks and tells about a new one. */
void group_pressure(struct group *g, bool held);

/* The writer that serves the disk. */
static inline struct writer *group_writer(struct group *g, uint32_t disk)
{
    return &g->writer[likely(g->writers == 1) ? 0 : disk % g->writers];
}

/* RAM segments that nothing is in. */
static inline uint32_t group_free(const struct group *g)
{
    return g->arena.free_count + (likely(g->writers == 1) ? 0 : writers_stock(g));
}

/* Of the arena: what packing can help against. */
static inline uint32_t group_pressure_percent(const struct group *g)
{
    const struct arena *a = &g->arena;

    return (uint32_t)((uint64_t)(a->segments - group_free(g)) * 100 / a->segments);
}

/* Memory of the indexes, with what the open epoch's may need at once to grow: more than the limit
 * only after a start with a lower one. */
uint64_t group_index_used(const struct group *g);
uint64_t group_index_limit(const struct group *g);

/* Frames that were written so far; only the difference to an earlier call says something. */
uint64_t group_written(const struct group *g);
/* Of all writers, where each has its own. */
uint64_t group_zero_frames(const struct group *g);

/* Of arena or index, whichever is nearer to its limit: at 100 writes are held, or nearly so. */
uint32_t group_limit_percent(const struct group *g);

#define LOG_DEBUG 10
#define LOG_INFO 20
#define LOG_WARNING 30
#define LOG_ERROR 40

#endif
