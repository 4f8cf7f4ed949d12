/* group.c - see group.h. */
#include "group.h"

#include <errno.h>
#include <sched.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

int group_start(struct group *g, int notify_fd, bool inline_jobs)
{
    int error = worker_start(&g->worker, &g->dictionaries, notify_fd, inline_jobs, false);

    if (!error)
        error = worker_start(&g->packer, &g->dictionaries, notify_fd, inline_jobs, true);
    return error;
}

void group_close(struct group *g)
{
    while (g->burials > 0)
        if (!worker_reap(&g->worker))
            sched_yield();
    worker_stop(&g->worker);
    worker_stop(&g->packer);
    checkpoint_free(g);
    while (g->epochs > 0) {
        struct epoch *e = g->epoch[--g->epochs];

        for (uint32_t i = 0; i < g->writers; i++)
            index_free(&e->part[i].index); /* the segments stay in the arena */
        free(e);
    }
    apply_free(g);
    pack_free(g);
    merge_free(g);
    journal_free(&g->journal);
    for (uint32_t i = 0; i < g->writers; i++)
        writer_free(&g->writer[i]);
    arena_detach(&g->arena);
    dictionaries_free(&g->dictionaries);
}

uint64_t group_index_used(const struct group *g)
{
    int64_t used = 0;

    for (uint32_t i = 0; i < g->writers; i++)
        used += g->writer[i].index_memory.used + g->writer[i].open->index.growth;
    return (uint64_t)used;
}

uint64_t group_index_limit(const struct group *g)
{
    return (uint64_t)g->writer[0].index_memory.limit * g->writers;
}

uint64_t group_written(const struct group *g)
{
    uint64_t written = 0;

    for (uint32_t i = 0; i < g->writers; i++)
        written += g->writer[i].seq;
    return written;
}

uint64_t group_zero_frames(const struct group *g)
{
    uint64_t frames = 0;

    for (uint32_t i = 0; i < g->writers; i++)
        frames += g->writer[i].zero_frames;
    return frames;
}

bool group_step(struct group *g)
{
    bool moved;

    if (unlikely(g->writers > 1))
        writers_serve(g); /* first: what they have noted is as of their last rounds */
    moved = worker_reap(&g->worker) > 0;
    moved |= worker_reap(&g->packer) > 0;
    moved |= checkpoint_step(g);
    moved |= journal_step(g);
    moved |= apply_step(g);
    moved |= pack_step(g);
    moved |= spill_step(g);
    if (unlikely(g->writers > 1))
        writers_grant(g);
    return moved;
}

static uint64_t earlier(uint64_t a, uint64_t b)
{
    if (a == 0 || b == 0)
        return a + b;
    return a < b ? a : b;
}

uint64_t group_timer(const struct group *g)
{
    const struct checkpoint *c = &g->checkpoint;
    uint64_t commit = g->mode == CORE_ACTIVE ? c->retry_ns : 0;

    /* These may have passed with nothing left to repeat: no reason to wake again. */
    if (commit <= g->now_ns)
        commit = 0;
    commit = earlier(commit, g->spill.retry_ns > g->now_ns ? g->spill.retry_ns : 0);
    return earlier(apply_timer(g),
                   earlier(earlier(commit, pack_timer(g)),
                           c->limit_retry_ns > g->now_ns ? c->limit_retry_ns : 0));
}

void group_emit(struct group *g, core_event *event)
{
    if (g->event)
        g->event(g->event_owner, event);
}

void group_log(struct group *g, int level, const char *format, ...)
{
    core_event event = {.type = CORE_EVENT_LOG, .disk = CORE_NO_DISK, .value = (uint64_t)level};
    va_list args;

    va_start(args, format);
    vsnprintf(event.text, sizeof(event.text), format, args);
    va_end(args);
    group_emit(g, &event);
}

_Static_assert(CORE_ERROR_MAX >= TROUBLES * (CORE_TEXT_MAX + 1), "all of them, with \"; \"");

static void join_troubles(struct group *g)
{
    size_t at = 0;

    g->error[0] = '\0';
    for (uint32_t i = 0; i < TROUBLES; i++)
        if (g->trouble[i][0])
            at += (size_t)snprintf(g->error + at, sizeof(g->error) - at, "%s%s", at ? "; " : "",
                                   g->trouble[i]);
}

void group_io_works(struct group *g, enum group_trouble kind)
{
    if (!g->trouble[kind][0])
        return;
    group_log(g, LOG_INFO, "works again: %.200s", g->trouble[kind]);
    g->trouble[kind][0] = '\0';
    join_troubles(g);
}

void group_io_error(struct group *g, enum group_trouble kind, uint32_t disk, int error,
                    const char *what)
{
    core_event event = {.type = CORE_EVENT_IO_ERROR, .disk = disk, .result = error};

    if (disk < g->config.disks)
        snprintf(event.text, sizeof(event.text), "%s of disk \"%s\": %s", what,
                 g->config.disk[disk].name, strerror(-error));
    else
        snprintf(event.text, sizeof(event.text), "%s: %s", what, strerror(-error));
    memcpy(g->trouble[kind], event.text, sizeof(g->trouble[kind]));
    join_troubles(g);
    group_emit(g, &event);
}

void group_hold(struct writer *w, uint64_t blocks)
{
    struct group *g = w->group;
    bool by_index = !index_room(&w->open->index, blocks);

    spill_hold(g, epoch_room_segments(blocks));
    /* If it is for a moment only, it is not told: the disk will make room. */
    group_pressure(g, by_index || !spill_may_help(g));
}

/* Of the writer's share that is fullest. */
static uint64_t index_percent(const struct group *g)
{
    uint64_t most = 0;

    for (uint32_t i = 0; i < g->writers; i++) {
        const struct writer *w = &g->writer[i];
        uint64_t used = (uint64_t)(w->index_memory.used + w->open->index.growth);
        uint64_t percent = used * 100 / (uint64_t)w->index_memory.limit;

        most = percent > most ? percent : most;
    }
    return most;
}

uint32_t group_limit_percent(const struct group *g)
{
    uint64_t index = index_percent(g);
    uint32_t arena = group_pressure_percent(g);

    return index > arena ? index > 100 ? 100 : (uint32_t)index : arena;
}

void group_pressure(struct group *g, bool held)
{
    static const uint32_t marks[] = {50, 75, 90};
    uint32_t percent = group_limit_percent(g), mark = 0;
    core_event event = {.type = CORE_EVENT_PRESSURE, .disk = CORE_NO_DISK};

    for (uint32_t i = 0; i < sizeof(marks) / sizeof(marks[0]); i++)
        if (percent >= marks[i])
            mark = marks[i];
    if (held)
        mark = 100;
    if (mark > g->pressure_told) {
        event.value = percent;
        event.first = held;
        group_emit(g, &event);
    }
    /* Going down is told by the next crossing upwards; ten percent below the mark, so that
     * use around a mark is not a stream of events. */
    if (mark > g->pressure_told || percent + 10 <= g->pressure_told)
        g->pressure_told = mark;
}
