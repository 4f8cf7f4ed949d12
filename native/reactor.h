/* reactor.h - the threads that own rings and disk I/O, the first of them the group, too; and how
 * the control thread talks to them.
 *
 * Commands: a locked list and an eventfd for each reactor. Events: one locked list and an eventfd
 * for all. No lock is taken while requests are served. Busy, a reactor polls rings and
 * completions; after a spin without work, at most spin_us, it asks the drivers for kicks and
 * sleeps in io_uring, which also waits for the eventfds. Where work comes seldom it spins less:
 * that would only cost more than the sleep.
 *
 * Several reactors: disk d is number d % reactors's alone: its rings, commands, image reads, and
 * its part of each epoch (writer.h). Number 0 leads: it alone changes the group, and closes the
 * gate (gate.h) while it does, so that the others, whose whole rounds pass the gate, see it
 * change only between rounds. That makes a seal a cut through all disks: a write that was
 * answered before another one began is in no later epoch than that one. The leader closes only
 * when there is something to do: a verb, a finished job or I/O of the group, a timer, or what a
 * round has noted for the group, which sets group.asked and wakes the leader.
 *
 * Sleeping: a reactor says `asleep` within its round, when it has looked at all that may wake it;
 * the leader, with the gate closed, wakes who is asleep and has answers to show or room for a
 * held request. The leader looks at group.asked after it has said so. With one reactor there
 * is neither gate nor asking.
 */
#ifndef EPOCHD_REACTOR_H
#define EPOCHD_REACTOR_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "blk.h"
#include "disk_uring.h"
#include "gate.h"
#include "group.h"
#include "ring.h"

enum command_kind {
    /* of the group */
    COMMAND_VERB = 1, COMMAND_QUERY_STATUS, COMMAND_QUERY_EPOCHS, COMMAND_QUERY_IDLE,
    COMMAND_EXIT,                 /* of a reactor */
    COMMAND_QUERY_DISK,
    /* of a disk's front end */
    COMMAND_MEMORY, COMMAND_LOG, COMMAND_INFLIGHT, COMMAND_FEATURES, COMMAND_SIZE, COMMAND_ADDR,
    COMMAND_BASE, COMMAND_KICK, COMMAND_CALL, COMMAND_ERR, COMMAND_ENABLE, COMMAND_STOP,
    COMMAND_RESET
};

struct command {
    enum command_kind kind;
    uint64_t token;
    uint32_t disk, queue;
    struct verb verb;
    struct memory *memory;
    struct mapping *mapping;
    uint64_t offset, bytes;
    uint32_t queues, queue_size;
    uint64_t value;               /* features, size, base, enable */
    uint32_t flags;
    uint64_t desc, avail, used, log;
    int fd;
    void *out;                    /* queries */
    uint32_t max;
    int64_t result;
    bool answered;
    struct command *next;
};

struct event_node {
    core_event event;
    struct event_node *next;
};

#define EVENTS_MAX 4096u          /* of the kinds that may be dropped */
#define SPIN_NS_MIN 5000u         /* where spinning did not pay lately */
#define POLL_BUDGET 64u           /* requests a ring a round */
#define RINGS_MAX (CORE_DISKS_MAX * CORE_QUEUES_MAX)
#define LOOK_NS 1000000ull        /* busy, the leader of several looks after the group anyway */
#define SETTLE_NS 500000000ull    /* at the end, for what is in flight */
#define SLEEP_POLLED_NS 200000ull /* with a ring that has no kick descriptor */

struct reactor {
    struct core *core;
    struct group *group;
    struct writer *writer;
    uint32_t number;
    bool follows;                 /* it is not the first */
    bool leads;                   /* it is, and there are others */
    uint64_t now_ns;              /* CLOCK_MONOTONIC, as of this round */
    struct disk_uring *uring;
    struct disk *disk;            /* for reads of images */
    struct metrics metrics;       /* its requests' */
    struct ring *running[RINGS_MAX];
    uint32_t running_count;
    bool polled_ring;             /* one of them has no kick descriptor */
    struct chain chain[CHAINS_AHEAD]; /* of the request in hand, and of those after it */
    struct ring *news[RINGS_MAX]; /* rings with answers that their drivers do not see yet */
    uint32_t news_count;
    const uint8_t *ahead;         /* what the request behind the one in hand will read, or NULL */
    uint8_t *block;               /* one block, for reads */
    pthread_t thread;
    bool started, exit;
    bool unsettled;               /* ended with I/O in flight: free nothing */
    bool nudged;                  /* the leader has done something for it */
    bool slept;                   /* kicks were wanted */
    bool unseen;                  /* it has done something since the last picture */
    bool again;                   /* the leader's: group_step() has more to do */
    uint64_t look_ns;             /* the leader's: when to look after the group anyway ... */
    uint64_t timer;               /* ... and group_timer(), as of its last look */
    uint32_t asleep;              /* atomic; set within a round */
    int wake_fd;                  /* other threads -> reactor */
    pthread_mutex_t command_lock;
    struct command *command_first, *command_last;
    uint32_t commands;            /* in the list; read without the lock */
} __attribute__((aligned(64)));

struct core {
    struct group group;
    struct gate gate;             /* places: of the reactors but the first */
    struct blk blk[CORE_DISKS_MAX];
    int event_fd;                 /* reactors -> control thread */
    pthread_mutex_t event_lock;
    struct event_node *event_first, *event_last;
    uint32_t events;              /* in the list; read without the lock */
    uint32_t events_lost;         /* atomic */
    pthread_mutex_t query_lock;
    pthread_cond_t query_done;
    uint32_t awake;               /* atomic: reactors that are */
    uint32_t picture;             /* atomic: a follower's counters are to be shown */
    uint32_t reactors;
    struct reactor reactor[];
};

/* All of it but group and descriptors; NULL without memory. */
struct core *core_alloc(uint32_t reactors);
void core_free(struct core *c);

/* The spin before the next sleep, after one that was so long: all of it when it would have met
 * the work that ended the sleep, else half of the last one. */
static inline uint64_t reactor_spin(uint64_t spin_ns, uint64_t most_ns, uint64_t slept_ns)
{
    uint64_t least = most_ns < SPIN_NS_MIN ? most_ns : SPIN_NS_MIN;

    if (slept_ns < most_ns)
        return most_ns;
    return spin_ns / 2 > least ? spin_ns / 2 : least;
}

void *reactor_main(void *arg);
/* From any thread. */
void reactor_emit(struct core *c, const core_event *event);
void reactor_done(struct reactor *r, const struct command *c, int64_t result, uint64_t value,
                  const char *text);
void reactor_running_changed(struct reactor *r);
/* group.call and group.wake: see group.h. */
void reactor_called(void *core);
void reactor_wake(void *core, uint32_t number);

#endif
