/* reactor.h - the thread that owns rings, group and disk I/O; and how the control thread
 * talks to it.
 *
 * Commands: a locked list and an eventfd. Events: a locked list and another eventfd. Neither
 * lock is taken while requests are served. Busy, the reactor polls rings and completions;
 * after a spin without work, at most spin_us, it asks the drivers for kicks and sleeps in
 * io_uring, which also waits for the eventfds. Where work comes seldom it spins less: that would
 * only cost more than the sleep.
 */
#ifndef EPOCHD_REACTOR_H
#define EPOCHD_REACTOR_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "blk.h"
#include "disk_uring.h"
#include "group.h"
#include "ring.h"

enum command_kind {
    /* of the group */
    COMMAND_VERB = 1, COMMAND_QUERY_STATUS, COMMAND_QUERY_EPOCHS, COMMAND_QUERY_DISK, COMMAND_EXIT,
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
#define SETTLE_NS 500000000ull    /* at the end, for what is in flight */
#define SLEEP_POLLED_NS 200000ull /* with a ring that has no kick descriptor */

struct reactor {
    struct group group;
    struct disk_uring *uring;
    struct blk blk[CORE_DISKS_MAX];
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
    int wake_fd;                  /* control or helper thread -> reactor */
    int event_fd;                 /* reactor -> control thread */
    pthread_mutex_t command_lock;
    struct command *command_first, *command_last;
    uint32_t commands;            /* in the list; read without the lock */
    pthread_mutex_t event_lock;
    struct event_node *event_first, *event_last;
    uint32_t events;              /* in the list; read without the lock */
    uint32_t events_lost;         /* the reactor's */
    pthread_mutex_t query_lock;
    pthread_cond_t query_done;
};

struct core {
    struct reactor reactor;
};

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
void reactor_emit(struct reactor *r, const core_event *event);
void reactor_done(struct reactor *r, const struct command *c, int64_t result, uint64_t value,
                  const char *text);
void reactor_running_changed(struct reactor *r);

#endif
