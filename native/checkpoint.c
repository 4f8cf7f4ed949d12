/* checkpoint.c - see checkpoint.h. */
#include "checkpoint.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "crash.h"
#include "group.h"
#include "mutant.h"

#define ACTIVE_COMMIT_PERCENT 50u /* of arena or index: active mode commits by itself */

typedef unsigned long long ull;

/* ---- Answers --------------------------------------------------------------------------- */

/* Ends the verb at the head. */
static void answer(struct group *g, core_event *event)
{
    struct checkpoint *c = &g->checkpoint;
    struct verb *v = c->first;

    event->type = CORE_EVENT_DONE;
    event->disk = CORE_NO_DISK;
    event->token = v->token;
    c->first = v->next;
    if (!c->first)
        c->last = NULL;
    free(v);
    c->voiding = c->saving = c->saved_once = c->io_over = false;
    c->io_error = 0;
    c->drop_first = c->drop_last = 0;
    group_emit(g, event);
}

static void answer_value(struct group *g, uint64_t value)
{
    core_event event = {.value = value};

    answer(g, &event);
}

__attribute__((format(printf, 3, 4)))
static void answer_error(struct group *g, int error, const char *format, ...)
{
    core_event event = {.result = error};
    va_list args;

    va_start(args, format);
    vsnprintf(event.text, sizeof(event.text), format, args);
    va_end(args);
    answer(g, &event);
}

/* ---- Epoch ids ------------------------------------------------------------------------- */

static void limit_saved(struct group *g, int error)
{
    g->checkpoint.limit_busy = false;
    g->checkpoint.limit_error = error;
    g->checkpoint.limit_retry_ns = error ? g->now_ns + GROUP_RETRY_NS : 0;
    if (error)
        group_io_error(g, TROUBLE_SUPER, CORE_NO_DISK, error, "reserving epoch ids in the journal");
    else
        group_io_works(g, TROUBLE_SUPER);
}

/* May one more epoch be opened? Ids are reserved on disk before they are used. */
static bool id_ready(struct group *g)
{
    uint64_t next = epoch_open(g)->id + 1;
    struct checkpoint *c = &g->checkpoint;
    struct journal *j = &g->journal;

    if (next + JOURNAL_EPOCH_STEP / 4 >= j->epoch_limit && !c->limit_busy &&
        g->now_ns >= c->limit_retry_ns) {
        c->limit_busy = true;
        journal_super_save(g, next + JOURNAL_EPOCH_STEP, limit_saved);
    }
    return next < j->epoch_limit || mutant(MUTANT_ID_BEFORE_LIMIT);
}

/* id_ready() is false, and waiting does not help: answers the verb at the head. */
static bool ids_refused(struct group *g, const char *verb)
{
    struct checkpoint *c = &g->checkpoint;

    if (c->limit_busy || !c->limit_error)
        return false;
    answer_error(g, c->limit_error, "%s: no epoch id is left, and reserving more in the journal "
                 "failed: %s; repeat the command once the cause is gone", verb,
                 strerror(-c->limit_error));
    return true;
}

/* ---- Seal ------------------------------------------------------------------------------ */

static struct epoch *newest_sealed(const struct group *g)
{
    const struct epoch *open = epoch_open(g);

    for (uint32_t i = g->epochs; i-- > 0;)
        if (g->epoch[i] != open && (g->epoch[i]->state == CORE_EPOCH_SEALED ||
                                    g->epoch[i]->state == CORE_EPOCH_COMMITTING))
            return g->epoch[i];
    return NULL;
}

static uint32_t live_after_seal(const struct group *g)
{
    return g->epochs + 1;
}

/* Closes the open epoch and opens the next. O(1): nothing is copied, nothing waits. */
static int seal(struct group *g)
{
    struct epoch *old = epoch_open(g), *fresh;
    core_event event = {.type = CORE_EVENT_SEALED, .disk = CORE_NO_DISK, .value = old->id};

    fresh = epoch_create(g, old->id + 1);
    if (!fresh)
        return -ENOMEM;
    old->state = CORE_EPOCH_SEALED;
    crash_point("seal-before-store");
    __atomic_store_n(&g->arena.header->open, fresh->id, __ATOMIC_RELEASE);
    crash_point("seal-after-store");
    g->stats.seals++;
    group_emit(g, &event);
    return 0;
}

static bool seal_verb(struct group *g)
{
    struct verb *v = g->checkpoint.first;
    struct timespec now;
    uint64_t id = epoch_open(g)->id;
    int error;

    if (live_after_seal(g) >= CORE_EPOCHS_MAX) {
        answer_error(g, -EBUSY, "epoch %llu cannot be sealed: %u epochs are waiting already; "
                     "commit or discard first", (ull)id, g->epochs - 1);
        return true;
    }
    if (!id_ready(g))
        return ids_refused(g, "seal");
    error = seal(g);
    clock_gettime(CLOCK_MONOTONIC, &now);
    g->stats.seal_ns_last =
        (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec - v->arrived_ns;
    metrics_add(&g->metrics, METRICS_SEAL, g->stats.seal_ns_last, 1);
    if (error)
        answer_error(g, error, "epoch %llu cannot be sealed: %s", (ull)id, strerror(-error));
    else
        answer_value(g, id);
    return true;
}

/* ---- Commit ---------------------------------------------------------------------------- */

static bool was_discarded(const struct group *g, uint64_t id)
{
    const struct arena_header *h = g->arena.header;

    for (uint32_t i = 0; i < ARENA_DISCARDED_MAX; i++)
        if (h->discarded[i].first && id >= h->discarded[i].first && id <= h->discarded[i].last)
            return true;
    return false;
}

/* Answers what needs no commit or cannot have one; false: go on. */
static bool commit_refused(struct group *g, const struct verb *v)
{
    const struct epoch *open = epoch_open(g), *e = epoch_by_id(g, v->epoch);

    if (v->newest && !newest_sealed(g)) {
        answer_value(g, g->committed);
        return true;
    }
    if (v->newest || (e && e != open && e->state != CORE_EPOCH_COMMITTED))
        return false;
    if (v->epoch == 0)
        answer_error(g, -EINVAL, "epoch 0 does not exist: ids begin at 1");
    else if (was_discarded(g, v->epoch))
        answer_error(g, -ENOENT, "epoch %llu was discarded: nothing of it is left to commit",
                     (ull)v->epoch);
    else if (v->epoch <= g->committed)
        answer_value(g, g->committed);
    else if (v->epoch == open->id)
        answer_error(g, -EINVAL, "epoch %llu is open: seal it before committing it",
                     (ull)v->epoch);
    else if (v->epoch > open->id)
        answer_error(g, -ENOENT, "epoch %llu does not exist: the open epoch is %llu",
                     (ull)v->epoch, (ull)open->id);
    else
        answer_error(g, -ENOENT, "epoch %llu is unknown: it was discarded or lost with the "
                     "arena; committed is %llu, open is %llu", (ull)v->epoch,
                     (ull)g->committed, (ull)open->id);
    return true;
}

static bool commit_verb(struct group *g)
{
    struct checkpoint *c = &g->checkpoint;
    struct verb *v = c->first;
    struct journal *j = &g->journal;

    if (c->committing)
        return false;
    if (v->started && c->commit_error == -EFBIG) {
        answer_error(g, -EFBIG, "commit up to epoch %llu needs %llu bytes of journal, it has "
                     "%llu: commit fewer epochs at once or restart with a larger --journal-size",
                     (ull)v->epoch, (ull)j->commit.record_bytes, (ull)j->ring_bytes);
        return true;
    }
    if (v->started && c->commit_error && j->commit.spill_lost) {
        answer_error(g, c->commit_error, "commit up to epoch %llu: the spill file has lost part "
                     "of it: %s; the epoch cannot be committed any more, only discarded",
                     (ull)v->epoch, strerror(-c->commit_error));
        return true;
    }
    if (v->started && c->commit_error == -EILSEQ) {
        answer_error(g, -EILSEQ, "commit up to epoch %llu: data in the arena was changed from "
                     "outside since an earlier start; nothing was committed, only epoch-discard "
                     "helps", (ull)v->epoch);
        return true;
    }
    if (v->started && c->commit_error) {
        answer_error(g, c->commit_error, "commit up to epoch %llu: writing the journal failed: "
                     "%s; the epoch stays sealed, repeat the command once the cause is gone",
                     (ull)v->epoch, strerror(-c->commit_error));
        return true;
    }
    if (v->started) {
        answer_value(g, g->committed);
        return true;
    }
    if (commit_refused(g, v))
        return true;
    if (v->newest)
        v->epoch = newest_sealed(g)->id;
    v->started = true;
    c->committing = true;
    journal_commit_begin(g, v->epoch);
    return true;
}

static void wake_waiters(struct group *g)
{
    struct flush_waiter **at = &g->checkpoint.waiters;

    while (*at) {
        struct flush_waiter *w = *at;

        if (w->epoch <= g->committed || g->mode != CORE_ACTIVE) {
            *at = w->next;
            w->done(w);
        } else {
            at = &w->next;
        }
    }
}

static void commit_over(struct group *g)
{
    struct checkpoint *c = &g->checkpoint;
    core_event event = {.type = CORE_EVENT_COMMITTED, .disk = CORE_NO_DISK};

    c->committing = false;
    c->commit_error = journal_commit_end(g);
    if (c->commit_error) {
        c->retry_ns = g->now_ns + GROUP_RETRY_NS;
        if (!g->journal.commit.spill_lost) /* that was told */
            group_io_error(g, TROUBLE_COMMIT, CORE_NO_DISK, c->commit_error,
                           c->commit_error == -EILSEQ ? "committing: a frame was changed in the "
                                                        "arena"
                                                      : "writing the journal");
        return;
    }
    group_io_works(g, TROUBLE_COMMIT);
    c->retry_ns = 0;
    event.value = g->committed;
    group_emit(g, &event);
    wake_waiters(g);
}

/* ---- Discard and promote --------------------------------------------------------------- */

static void remember_discard(struct group *g, uint64_t first, uint64_t last)
{
    struct arena_header *h = g->arena.header;
    uint64_t at = h->discarded_next % ARENA_DISCARDED_MAX;

    h->discarded[at].first = first;
    h->discarded[at].last = last;
    h->discarded_next = at + 1;
}

/* Drops all that is not committed. Storing `base` is the point of no return: an agent that
 * starts on this arena finishes what comes behind it. */
static int drop(struct group *g)
{
    struct checkpoint *c = &g->checkpoint;
    struct arena_header *h = g->arena.header;
    struct epoch *open = epoch_open(g), *fresh;
    core_event event = {.type = CORE_EVENT_DISCARDED, .disk = CORE_NO_DISK};
    uint64_t first = 0;

    for (uint32_t i = 0; i < g->epochs && !first; i++)
        if (g->epoch[i]->state < CORE_EPOCH_COMMITTING)
            first = g->epoch[i]->id;
    if (first == open->id && epoch_empty(open))
        return 0; /* asked again: the answer is the same */
    fresh = epoch_create(g, open->id + 1);
    if (!fresh)
        return -ENOMEM;
    remember_discard(g, first, open->id);
    crash_point("discard-before-base");
    __atomic_store_n(&h->base, fresh->id, __ATOMIC_RELEASE);
    crash_point("discard-before-open");
    __atomic_store_n(&h->open, fresh->id, __ATOMIC_RELEASE);
    crash_point("discard-before-free");
    c->drop_first = event.first = first;
    c->drop_last = event.last = open->id;
    event.value = g->committed;
    for (uint32_t i = g->epochs - 1; i-- > 0;)
        if (g->epoch[i]->state < CORE_EPOCH_COMMITTING)
            epoch_drop(g, g->epoch[i]);
    g->stats.discards++;
    group_emit(g, &event);
    group_pressure(g, false);
    return 0;
}

static void head_io_over(struct group *g, int error)
{
    g->checkpoint.io_over = true;
    g->checkpoint.io_error = error;
}

/* The common part: true when nothing uncommitted is left; false: waits, or has answered. */
static bool dropped(struct group *g, const char *verb)
{
    struct checkpoint *c = &g->checkpoint;
    int error;

    if (c->first->started)
        return true;
    if (c->committing)
        return false;
    if (!id_ready(g)) {
        ids_refused(g, verb);
        return false;
    }
    if (g->journal.tail_suspect && !c->voiding && !mutant(MUTANT_NO_VOID_ON_DISCARD)) {
        c->voiding = true;
        journal_void(g, head_io_over);
        return false;
    }
    if (c->voiding && !c->io_over)
        return false;
    if (c->io_error) {
        answer_error(g, c->io_error, "%s: an earlier commit failed and its record cannot be "
                     "taken back in the journal: %s; repeat the command once the cause is gone",
                     verb, strerror(-c->io_error));
        return false;
    }
    c->io_over = false;
    error = drop(g);
    if (error) {
        answer_error(g, error, "%s: %s", verb, strerror(-error));
        return false;
    }
    c->first->started = true;
    return true;
}

static bool discard_verb(struct group *g)
{
    struct checkpoint *c = &g->checkpoint;
    struct verb *v = c->first;
    core_event event = {0};

    if (g->mode == CORE_ACTIVE) {
        answer_error(g, -EINVAL, "discard: this agent was promoted and serves the surviving VM; "
                     "what it has written is not for discarding");
        return true;
    }
    if (!dropped(g, "discard"))
        return c->first != v;
    event.first = c->drop_first;
    event.last = c->drop_last;
    event.value = g->committed;
    answer(g, &event);
    return true;
}

static bool promote_verb(struct group *g)
{
    struct checkpoint *c = &g->checkpoint;
    struct verb *v = c->first;

    if (!c->saving && g->mode == CORE_ACTIVE) {
        answer_value(g, g->generation);
        return true;
    }
    if (!c->saving && !dropped(g, "promote"))
        return c->first != v;
    if (!c->saving) {
        c->saving = true;
        g->mode = CORE_ACTIVE;
        g->generation++;
        journal_super_save(g, 0, head_io_over);
        return true;
    }
    if (!c->io_over)
        return false;
    if (c->io_error && !c->saved_once) {
        g->mode = CORE_STANDBY;
        g->generation--;
        wake_waiters(g); /* of the moment in between */
        answer_error(g, c->io_error, "promote: writing the journal failed: %s; repeat the "
                     "command once the cause is gone", strerror(-c->io_error));
        return true;
    }
    if (!c->saved_once) {
        /* Once more, in another slot: should the first become unreadable, the superblock
         * before it would make this agent a standby again without a word. */
        c->saved_once = true;
        c->io_over = false;
        journal_super_save(g, 0, head_io_over);
        return true;
    }
    if (c->io_error)
        group_log(g, LOG_WARNING, "promote: the second copy of the superblock failed: %s; the "
                  "first is durable", strerror(-c->io_error));
    answer_value(g, g->generation);
    return true;
}

/* ---- Active mode ----------------------------------------------------------------------- */

static void lock_waiters(struct group *g, bool lock)
{
    if (g->writers == 1)
        return;
    if (lock)
        pthread_mutex_lock(&g->waiter_lock);
    else
        pthread_mutex_unlock(&g->waiter_lock);
}

bool checkpoint_flush(struct group *g, struct flush_waiter *waiter)
{
    const struct epoch *open = epoch_open(g), *sealed = newest_sealed(g);

    if (g->mode != CORE_ACTIVE)
        return true;
    if (!epoch_empty(open))
        waiter->epoch = open->id;
    else if (sealed)
        waiter->epoch = sealed->id;
    else
        return true;
    lock_waiters(g, true);
    waiter->next = g->checkpoint.waiters;
    g->checkpoint.waiters = waiter;
    lock_waiters(g, false);
    return false;
}

void checkpoint_unflush(struct group *g, struct flush_waiter *waiter)
{
    struct flush_waiter **at = &g->checkpoint.waiters;

    lock_waiters(g, true);
    while (*at && *at != waiter)
        at = &(*at)->next;
    if (*at)
        *at = waiter->next;
    lock_waiters(g, false);
}

/* Seals and commits what there is, for waiting flushes, for room, or before the end. */
static bool commit_by_itself(struct group *g, bool stopping)
{
    struct checkpoint *c = &g->checkpoint;
    struct epoch *sealed;

    if (g->mode != CORE_ACTIVE || c->committing || g->now_ns < c->retry_ns)
        return false;
    if (!c->waiters && !stopping && group_limit_percent(g) < ACTIVE_COMMIT_PERCENT)
        return false;
    if (!epoch_empty(epoch_open(g))) {
        if (live_after_seal(g) >= CORE_EPOCHS_MAX || !id_ready(g) || seal(g))
            return false;
    }
    sealed = newest_sealed(g);
    if (!sealed)
        return false;
    c->retry_ns = 0;
    c->committing = true;
    journal_commit_begin(g, sealed->id);
    return true;
}

/* ---- Stop ------------------------------------------------------------------------------ */

static bool all_empty(const struct group *g)
{
    return g->epochs == 1 && epoch_empty(epoch_open(g));
}

bool checkpoint_stopping(const struct group *g)
{
    return g->checkpoint.first && g->checkpoint.first->kind == VERB_STOP;
}

/* Brings what is committed into the images; sealed and open epochs stay in the arena. */
static bool stop_verb(struct group *g)
{
    struct checkpoint *c = &g->checkpoint;
    bool stuck = g->apply.retry_ns != 0 || (g->mode == CORE_ACTIVE && c->retry_ns != 0);

    if (c->saving) {
        if (!c->io_over)
            return false;
        c->stopped = true;
        if (c->io_error)
            answer_error(g, c->io_error, "stopped, with everything in the images; the journal's "
                         "last superblock could not be written: %s; the next start goes on from "
                         "the one before", strerror(-c->io_error));
        else
            answer_value(g, 0);
        return true;
    }
    if (c->committing)
        return false;
    if (commit_by_itself(g, true))
        return true;
    if (!stuck && (g->journal.pending_count > 0 ||
                   (g->mode == CORE_ACTIVE && !all_empty(g))))
        return false;
    if (stuck && g->apply.phase != APPLY_IDLE && g->apply.phase != APPLY_SUPER_RETRY)
        return false;
    if (stuck) {
        c->stopped = true;
        answer_error(g, -EIO, "stopped: what is committed but not in the images stays in arena "
                     "and journal and is applied at the next start; standing: %s", g->error);
        return true;
    }
    if (all_empty(g) && !c->limit_busy) {
        c->saving = true; /* the next start goes on with this id */
        g->journal.clean = true;
        journal_super_save(g, epoch_open(g)->id, head_io_over);
        return true;
    }
    c->stopped = true;
    answer_value(g, 0);
    return true;
}

/* ---- Queue ----------------------------------------------------------------------------- */

int checkpoint_submit(struct group *g, const struct verb *verb)
{
    struct checkpoint *c = &g->checkpoint;
    struct verb *v = malloc(sizeof(*v));
    struct verb **at = &c->first;
    bool only_commits = true;

    if (!v)
        return -ENOMEM;
    *v = *verb;
    v->next = NULL;
    v->started = false;
    while (*at && (*at)->kind == VERB_SEAL)
        at = &(*at)->next;
    for (const struct verb *i = *at; i; i = i->next)
        only_commits &= i->kind == VERB_COMMIT;
    if (v->kind == VERB_SEAL && only_commits && *at) {
        /* Overtakes: to the head, behind other seals, where it is carried out at once. A
         * commit in progress has its epochs already and does not mind. */
        v->next = *at;
        *at = v;
    } else if (c->last) {
        c->last->next = v;
        c->last = v;
    } else {
        c->first = c->last = v;
    }
    return 0;
}

void checkpoint_free(struct group *g)
{
    struct checkpoint *c = &g->checkpoint;

    while (c->first) {
        struct verb *v = c->first;

        c->first = v->next;
        free(v);
    }
    c->last = NULL;
}

/* The last superblock says that nothing comes behind it: so nothing may. */
static bool refuse_stopped(struct group *g)
{
    if (!g->checkpoint.first)
        return false;
    answer_error(g, -ESHUTDOWN, "the agent has stopped; start it and repeat the command");
    return true;
}

bool checkpoint_step(struct group *g)
{
    struct checkpoint *c = &g->checkpoint;
    bool moved = false;

    if (g->journal.commit.phase == COMMIT_FINISHED) {
        commit_over(g);
        moved = true;
    }
    if (c->stopped)
        return refuse_stopped(g) || moved;
    if (!c->first)
        return commit_by_itself(g, false) || moved;
    switch (c->first->kind) {
    case VERB_SEAL:
        return seal_verb(g) || moved;
    case VERB_COMMIT:
        return commit_verb(g) || moved;
    case VERB_DISCARD:
        return discard_verb(g) || moved;
    case VERB_PROMOTE:
        return promote_verb(g) || moved;
    case VERB_STOP:
        return stop_verb(g) || moved;
    }
    return moved;
}
