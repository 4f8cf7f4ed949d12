/* world.h - one host: simulated disk, arena, the real group on top, and the model beside it.
 *
 * A crash copies what survives into the world below (world_crash()) and starts the real
 * recovery there; the world above goes on as if nothing had happened. So every state in
 * which a crash can leave the files is looked at within one run, and the world below can
 * crash again while it recovers.
 */
#ifndef SIM_WORLD_H
#define SIM_WORLD_H

#include <stdio.h>

#include "group.h"
#include "model.h"
#include "sim_disk.h"

#define SIM_DEPTH 4u             /* crash, crash in recovery, ... */
#define SIM_SEGMENTS 14u
#define SIM_SPILL_SEGMENTS 8u

enum crash_kind {
    CRASH_HOST,                  /* power cut: arena and caches are gone */
    CRASH_AGENT,                 /* kill -9: arena and caches stay */
    CRASH_AGENT_NO_ARENA,        /* and somebody removed the arena */
    CRASH_AGENT_EARLY,           /* kill -9 before a new arena was complete */
    CRASH_KINDS
};
extern const char *const crash_names[CRASH_KINDS];

/* How a run is set up; all from its seed. */
struct setup {
    uint64_t bytes[MODEL_DISKS_MAX];
    uint32_t disks;
    uint32_t reactors;           /* parts of an epoch; all in one thread here */
    uint64_t ring_bytes;
    uint32_t segments;           /* of the arena */
    uint32_t spill_segments;     /* 0: there is no spill file */
    int compress_level;
    bool dictionary;
    uint32_t fault_percent;
    bool no_fallocate;
    uint64_t apply_rate;
    bool journal_fua;
    bool sync_lies;
};

struct sim {
    struct world *world[SIM_DEPTH];
    struct rng pick;             /* which crashes are looked at */
    uint32_t reactors;           /* of the run's setup */
    uint32_t crash_percent;      /* of the points of the world on top */
    uint32_t nested_percent;     /* of the points below */
    uint32_t subsets_max;        /* writes up to which all subsets are tried; then samples */
    uint32_t samples;
    uint64_t states, states_max; /* recovered and checked */
    uint64_t kinds[CRASH_KINDS];
    uint64_t nested, points, faults, commits, clusters, spilled, with_dictionary, merges;
    uint64_t deadline;           /* states at which this run's crashes stop being looked at */
    bool failed;
    uint32_t failed_depth;
    char failure[1024];
};

struct world {
    struct group group;
    bool up;
    core_config config;
    struct sim_disk disk;
    int arena_fd, spill_fd;
    uint8_t *spill;              /* our own mapping of that file */
    uint64_t arena_bytes;
    uint8_t *arena;              /* our own mapping of it */
    struct model model;
    struct rng rng;              /* scheduling */
    uint64_t now;
    uint32_t depth;
    struct sim *sim;
    uint64_t seen;               /* disk.changes + steps at the last crash that was looked at */
    bool opening;                /* inside of group_open() */
    bool retried;                /* faults made an answer an error */
    uint64_t changes;            /* of arena and model */
    uint32_t waiting;            /* verbs not answered */
    uint32_t flushes;            /* flush waiters not called back */
    int64_t last_result;         /* of the last verb answered */
    uint64_t last_value;
    char text[CORE_TEXT_MAX];
};

struct sim *sim_new(void);
void sim_free(struct sim *s);
__attribute__((format(printf, 2, 3)))
void sim_fail(struct world *w, const char *format, ...);

/* Fresh images, formatted journal, no arena; then opens. */
void world_begin(struct sim *s, const struct setup *setup, uint64_t seed);
void world_end(struct world *w);

/* Recovery and start; the checks of what it came up with. false: failed. */
bool world_open(struct world *w, enum crash_kind after);
void world_close(struct world *w);

/* One round of the core; true: something moved. */
bool world_step(struct world *w);
/* Until nothing moves any more; faults must be off for it to be sure to end. */
void world_drain(struct world *w);

/* The guest and the controller. false: no room, nothing done. */
bool world_write(struct world *w, uint32_t disk, uint32_t sector, uint32_t sectors, bool zeroes);
bool world_zero(struct world *w, uint32_t disk, uint32_t sector, uint32_t sectors, bool unmap);
void world_verb(struct world *w, enum verb_kind kind, uint64_t epoch);
void world_flush(struct world *w);

/* Do all reads see the open image? */
void world_check_reads(struct world *w);
/* Do medium and cache of all images hold the committed image? */
void world_check_images(struct world *w);

/* The world below becomes what is left of this one. */
struct world *world_crash(struct world *w, enum crash_kind kind, const struct sim_outcome *o);
/* Crash, recovery, all checks, apply, checks again; counts a state. */
void world_try(struct world *w, enum crash_kind kind, const struct sim_outcome *o);
/* Tries the crashes that are due at this point. */
void world_point(struct world *w);

#endif
