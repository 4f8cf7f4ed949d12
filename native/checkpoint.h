/* checkpoint.h - the verbs: seal, commit, discard, promote, stop; and what active mode does
 * by itself.
 *
 * Verbs are carried out in order of arrival, one at a time; only seals overtake commits
 * that wait, because the VM's pause waits for them. Each verb is answered by one event with
 * its token.
 *
 * Owner: the reactor thread. Errors: -EINVAL and -ENOENT for what was asked wrongly,
 * -EBUSY at a limit, an I/O errno for what failed; always with a sentence.
 */
#ifndef EPOCHD_CHECKPOINT_H
#define EPOCHD_CHECKPOINT_H

#include <stdbool.h>
#include <stdint.h>

struct group;

enum verb_kind { VERB_SEAL = 1, VERB_COMMIT, VERB_DISCARD, VERB_PROMOTE, VERB_STOP };

struct verb {
    enum verb_kind kind;
    uint64_t token;
    uint64_t epoch;      /* COMMIT */
    bool newest;         /* COMMIT: whatever is sealed */
    bool started;        /* its slow part is under way */
    uint64_t arrived_ns;
    struct verb *next;
};

/* Somebody (a guest's FLUSH) who waits until an epoch is durable; active mode only. */
struct flush_waiter {
    uint64_t epoch;
    void (*done)(struct flush_waiter *waiter);
    struct flush_waiter *next;
};

struct checkpoint {
    struct verb *first, *last;
    bool limit_busy;          /* more epoch ids are being reserved */
    int limit_error;          /* of the last try; 0: it went well */
    uint64_t limit_retry_ns;  /* after an error: not again before */
    bool committing;          /* a commit was begun, by a verb or by active mode */
    int commit_error;         /* of the last one that ended */
    bool voiding, saving;     /* I/O of the verb at the head */
    bool saved_once;          /* PROMOTE: its superblock is durable, the copy is not */
    bool io_over;
    int io_error;
    uint64_t drop_first, drop_last; /* PROMOTE and DISCARD: what was dropped */
    uint64_t retry_ns;        /* active mode, after a failed commit */
    struct flush_waiter *waiters;
    bool stopped;             /* for good: nothing is sealed or committed any more */
};

/* Takes the verb (copied). */
int checkpoint_submit(struct group *g, const struct verb *verb);
bool checkpoint_step(struct group *g);
/* The agent is to stop, and waits for the images. */
bool checkpoint_stopping(const struct group *g);
void checkpoint_free(struct group *g);

/* True when all that the guest has been told is written is durable already; else the
 * waiter is called back once it is, from checkpoint_step(). Standby mode: always true. These two
 * any writer may call within its round. */
bool checkpoint_flush(struct group *g, struct flush_waiter *waiter);
/* ... and forgets a waiter. */
void checkpoint_unflush(struct group *g, struct flush_waiter *waiter);

#endif
