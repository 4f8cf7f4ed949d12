/* merge.c - see merge.h: the reactor's part, what to merge and when. */
#include "merge.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "crash.h"
#include "group.h"

#define TIGHT_PERCENT 75u
#define LONE_SHARE 4u           /* of the blocks; when fewer than so many are alone, leave it */
#define MERGE_LEVEL 9           /* half as much time again as level 6, 1 % fewer bytes */

int merge_init(struct group *g)
{
    struct merge *m = &g->merge;

    m->group = g;
    m->look = true;
    m->frame = calloc(MERGE_BLOCKS_MAX, sizeof(*m->frame));
    m->block = calloc(MERGE_BLOCKS_MAX, sizeof(*m->block));
    m->move = calloc(MERGE_BLOCKS_MAX, sizeof(*m->move));
    m->plain = malloc(CLUSTER_BYTES);
    m->squeezed = malloc(CLUSTER_BYTES);
    return m->frame && m->block && m->move && m->plain && m->squeezed ? 0 : -ENOMEM;
}

void merge_free(struct group *g)
{
    struct merge *m = &g->merge;

    free(m->frame);
    free(m->block);
    free(m->move);
    free(m->plain);
    free(m->squeezed);
    memset(m, 0, sizeof(*m));
}

void merge_look(struct group *g)
{
    g->merge.look = true;
}

uint32_t merge_holds(const struct group *g, const struct epoch *e)
{
    const struct merge *m = &g->merge;

    return m->phase > MERGE_CHOOSE && m->epoch == e ? m->sources : 0;
}

/* ---- When -------------------------------------------------------------------------------- */

/* Segments that a job may take now: as many as there is room for beside the guest. */
static uint32_t affordable(const struct group *g)
{
    uint32_t spare = 2 + g->arena.segments / MERGE_ROOM_SHARE;
    uint32_t room = g->arena.free_count > spare ? g->arena.free_count - spare : 0;

    return room < MERGE_SOURCES_MAX ? room : MERGE_SOURCES_MAX;
}

uint64_t merge_timer(const struct group *g)
{
    const struct merge *m = &g->merge;

    if (likely(!m->look) || m->phase != MERGE_IDLE || m->quiet_ns == 0 ||
        g->config.compress_level == 0)
        return 0;
    return m->quiet_ns +
           (group_pressure_percent(g) >= TIGHT_PERCENT ? PACK_IDLE_NS : MERGE_IDLE_NS);
}

bool merge_due(const struct group *g)
{
    uint64_t at = merge_timer(g);

    return at > 0 && g->now_ns >= at;
}

static void look_from_start(struct merge *m)
{
    m->at = m->fresh = m->sorted = m->done = m->fresh_kept = m->sorted_kept = 0;
    m->id = 0;
}

bool merge_begin(struct group *g)
{
    struct merge *m = &g->merge;
    uint64_t written = group_written(g);

    if (written != m->written || m->quiet_ns == 0) {
        m->written = written;
        m->quiet_ns = g->now_ns;
    }
    if (!m->look || g->now_ns < merge_timer(g))
        return false;
    m->look = false;
    if (g->config.compress_level == 0 || affordable(g) < MERGE_SOURCES_MIN)
        return false;
    look_from_start(m);
    m->phase = MERGE_CHOOSE;
    return true;
}

/* ---- What -------------------------------------------------------------------------------- */

/* Keeps the MERGE_SOURCES_MAX + 1 lowest. */
static void add_sorted(struct merge *m, uint64_t first, uint32_t segment)
{
    uint32_t at = m->sorted_kept;

    if (at <= MERGE_SOURCES_MAX)
        m->sorted_kept++;
    else if (first < m->sorted_one[--at].first)
        ;
    else
        return;
    for (; at > 0 && m->sorted_one[at - 1].first > first; at--)
        m->sorted_one[at] = m->sorted_one[at - 1];
    m->sorted_one[at] = (struct merge_candidate){.first = first, .segment = segment};
}

/* Is it in one of its epoch's lists? worn_at: those in flight elsewhere, and the one being
 * filled, have none. */
static bool may_take(const struct group *g, const struct merge *m, uint32_t segment)
{
    const struct segment_desc *d = &g->arena.desc[segment];
    const struct segment_use *u = &g->arena.use[segment];

    return d->state == SEGMENT_PACKED && u->worn_at != UINT32_MAX && u->dead < u->slots &&
           (m->id == 0 || d->epoch == m->id);
}

/* One job merges segments of one epoch: the first that has any. */
static void look_at(struct group *g, struct merge *m, uint32_t segment)
{
    const struct segment_use *u = &g->arena.use[segment];

    if (!may_take(g, m, segment))
        return;
    if (m->id == 0) {
        const struct epoch *e = epoch_by_id(g, g->arena.desc[segment].epoch);

        if (!e || e->frozen)
            return;
        m->id = e->id;
    }
    if (u->sweep == 0) {
        if (m->fresh_kept < MERGE_SOURCES_MAX)
            m->fresh_one[m->fresh_kept++] = (struct merge_candidate){.segment = segment};
        m->fresh++;
    } else if (u->sweep == m->sweep && u->merged) {
        m->done++;
    } else {
        add_sorted(m, u->first, segment);
        m->sorted++;
    }
}

static bool enough_new(const struct merge *m)
{
    uint32_t quarter = (m->fresh + m->sorted + m->done) / 4;

    return m->fresh >= (quarter > MERGE_SOURCES_MIN ? quarter : MERGE_SOURCES_MIN);
}

/* Out of its list, from now on in none. */
static void take(struct group *g, struct merge *m, uint32_t segment)
{
    struct segment_use *u = &g->arena.use[segment];

    segment_list_remove(&g->arena, u->worn ? &m->epoch->worn_list : &m->epoch->kept_list, segment);
    u->worn_at = UINT32_MAX;
    m->source[m->sources++] = segment;
}

/* Blocks are bounded, too. */
static bool take_all(struct group *g, struct merge *m, const struct merge_candidate *from,
                     uint32_t count, uint32_t max, uint32_t *blocks)
{
    for (uint32_t i = 0; i < count; i++) {
        const struct segment_use *u = &g->arena.use[from[i].segment];

        if (!may_take(g, m, from[i].segment))
            continue; /* it was written over since */
        if (m->sources == max || *blocks + u->slots - u->dead > MERGE_BLOCKS_MAX) {
            m->boundary = from[i].first;
            return false;
        }
        *blocks += u->slots - u->dead;
        take(g, m, from[i].segment);
    }
    return true;
}

static void take_sources(struct group *g, struct merge *m)
{
    uint32_t max = affordable(g), blocks = 0;
    bool all_fresh = m->fresh == m->fresh_kept;

    m->sources = 0;
    m->boundary = UINT64_MAX;
    if (m->fresh + m->sorted > max && m->fresh >= MERGE_SOURCES_MIN) {
        take_all(g, m, m->fresh_one, m->fresh_kept, max, &blocks);
        m->boundary = 0; /* all that comes of it is sorted, no more */
        return;
    }
    if (!take_all(g, m, m->fresh_one, m->fresh_kept, max, &blocks) || !all_fresh) {
        m->boundary = 0;
        return;
    }
    take_all(g, m, m->sorted_one, m->sorted_kept, max, &blocks);
}

static bool start(struct group *g, struct merge *m)
{
    m->epoch = epoch_by_id(g, m->id);
    if (!m->epoch || m->epoch->frozen)
        return false; /* gone while we were looking */
    take_sources(g, m);
    if (m->sources == 0)
        return false;
    m->jobs_left--;
    m->outputs = m->used = 0;
    while (m->outputs < m->sources + 2 && g->arena.free_count > 0)
        m->output[m->outputs++] = arena_segment_take(&g->arena, m->epoch->id, SEGMENT_PACKED);
    m->to = (struct arena_cursor){.segment = SEGMENT_NONE};
    m->gathered = m->offset = m->frames = m->blocks = m->moves = m->next = m->alive = m->lone = 0;
    m->stored = m->bytes_in = m->bytes_out = m->clusters = m->merged = m->ns = 0;
    m->stop = m->cancel = 0;
    m->level = g->config.compress_level > MERGE_LEVEL ? g->config.compress_level : MERGE_LEVEL;
    m->epoch->jobs++;
    m->phase = MERGE_GATHER;
    return true;
}

/* All segments were looked at: begin, go on with, or end a sweep. */
static bool choose(struct group *g, struct merge *m)
{
    m->phase = MERGE_IDLE;
    if (!m->sweeping && enough_new(m)) {
        m->sweeping = true;
        m->sweep++; /* what was done in the last one is only sorted now */
        m->jobs_left = 4 + (m->fresh + m->sorted + m->done) / 4;
        look_from_start(m);
        m->phase = MERGE_CHOOSE;
        return true;
    }
    m->waiting = m->fresh + m->sorted;
    if (m->jobs_left == 0 || (m->sorted == 0 && !enough_new(m)))
        m->sweeping = false;
    if (m->sweeping && start(g, m))
        return true;
    m->sweeping = false;
    m->waiting = 0;
    return false;
}

static bool look_piece(struct group *g, struct merge *m)
{
    uint32_t end = m->at + MERGE_LOOK;

    if (end > g->arena.segments)
        end = g->arena.segments;
    for (; m->at < end; m->at++)
        look_at(g, m, m->at);
    return end < g->arena.segments || choose(g, m);
}

/* ---- The job ----------------------------------------------------------------------------- */

/* Into the lists what lives on; unless it was stopped, this sweep is through with it. */
static void give_back_sources(struct group *g, struct merge *m, struct epoch *e)
{
    for (uint32_t i = 0; i < m->sources; i++) {
        struct segment_use *u = &g->arena.use[m->source[i]];

        if (u->dead >= u->slots) {
            e->stored_bytes -= arena_tail(&g->arena, m->source[i]);
            arena_segment_free(&g->arena, m->source[i]);
            continue;
        }
        if (!m->stop && !m->cancel) {
            u->sweep = m->sweep;
            u->merged = true;
        }
        pack_keep(g, e, m->source[i]);
    }
    m->sources = 0;
}

static void finish(struct group *g, struct merge *m, struct epoch *e)
{
    give_back_sources(g, m, e);
    m->phase = MERGE_IDLE;
    m->look = true;
    pack_look(g);
    epoch_job_done(g, e);
}

static void undo(struct group *g, struct merge *m)
{
    for (uint32_t i = 0; i < m->outputs; i++)
        arena_segment_free(&g->arena, m->output[i]);
    finish(g, m, m->epoch);
}

static void done(struct job *job)
{
    struct merge *m = job->owner;
    struct group *g = m->group;

    g->stats.compress_ns += m->ns;
    if (m->cancel || m->epoch->dropped) {
        undo(g, m);
        return;
    }
    m->phase = MERGE_ADOPT;
}

static void repoint(struct group *g, struct epoch *e, const struct pack_move *f)
{
    uint32_t moved = pack_repoint(g, e, f);

    g->arena.use[arena_loc_segment(f->old)].dead += moved;
}

/* Which of the output is final. What others may have neighbours of is not, nor a last segment that
 * is nearly empty and may be filled up by the next job. One at least is, so that a sweep comes to
 * its end. */
static void mark(struct group *g, struct merge *m)
{
    for (uint32_t i = 0; i < m->used; i++) {
        struct segment_use *u = &g->arena.use[m->output[i]];
        bool last = i + 1 == m->used && m->to.tail < SEGMENT_BYTES / 2 &&
                    m->boundary < UINT64_MAX;

        u->first = m->first[i];
        u->sweep = m->sweep;
        u->merged = (m->last[i] < m->boundary && !last) || (i == 0 && m->boundary > 0);
    }
}

static void adopted(struct group *g, struct merge *m)
{
    struct epoch *e = m->epoch;

    mark(g, m);
    e->stored_bytes += m->stored;
    crash_point("merge-before-free");
    for (uint32_t i = 0; i < m->outputs; i++) {
        if (i < m->used)
            pack_keep(g, e, m->output[i]);
        else
            arena_segment_free(&g->arena, m->output[i]);
    }
    g->stats.merges++;
    g->stats.merged_blocks += m->merged;
    g->stats.merge_bytes_in += m->bytes_in;
    g->stats.merge_bytes_out += m->bytes_out;
    g->stats.clusters += m->clusters;
    if (m->dictionary)
        g->stats.dictionary_frames += m->merged;
    finish(g, m, e);
}

static void adopt_piece(struct group *g, struct merge *m)
{
    uint32_t end = m->moves - m->next < PACK_PIECE ? m->moves : m->next + PACK_PIECE;
    struct epoch *e = m->epoch;

    if (!e->dropped) {
        for (uint32_t i = m->next; i < end; i++)
            index_prefetch(epoch_index(e, m->move[i].disk), m->move[i].disk, m->move[i].block);
        for (uint32_t i = m->next; i < end; i++)
            repoint(g, e, &m->move[i]);
    }
    m->next = end;
    if (end == m->moves)
        adopted(g, m);
}

/* The next frames of the sources: those alive are taken. */
static void gather_piece(struct group *g, struct merge *m)
{
    uint32_t segment = m->source[m->gathered], tail = arena_tail(&g->arena, segment);
    uint32_t n = 0;

    while (n < PACK_PIECE && m->offset < tail) {
        uint32_t at = m->offset;
        const struct frame_header *h = arena_frame_next(&g->arena, segment, tail, &m->offset);
        uint8_t alive;

        if (!h) { /* it is damaged: leave the rest of it alone */
            m->offset = tail;
            break;
        }
        alive = pack_alive_in(m->epoch, h, arena_loc_of(segment, at));
        m->alive += (uint32_t)__builtin_popcount(alive);
        m->lone += merge_settled(h, alive) ? 0 : (uint32_t)__builtin_popcount(alive);
        if (alive && m->frames < MERGE_BLOCKS_MAX)
            m->frame[m->frames++] = (struct pack_source){.loc = arena_loc_of(segment, at),
                                                         .alive = alive};
        n++;
    }
    if (m->offset < tail)
        return;
    m->offset = 0;
    if (++m->gathered < m->sources)
        return;
    if (m->lone < m->alive / LONE_SHARE) {
        undo(g, m);
        return;
    }
    m->job = (struct job){.run = merge_run, .done = done, .owner = m};
    check(worker_submit(&g->packer, &m->job, false));
    m->phase = MERGE_JOB;
}

bool merge_step(struct group *g)
{
    struct merge *m = &g->merge;
    bool over = m->phase > MERGE_CHOOSE && (m->epoch->frozen || m->epoch->dropped);

    switch (m->phase) {
    case MERGE_IDLE:
        return false;
    case MERGE_CHOOSE:
        return look_piece(g, m);
    case MERGE_GATHER:
        if (over) {
            m->cancel = 1;
            undo(g, m);
        } else if (g->packer.outstanding < WORKER_RING)
            gather_piece(g, m);
        return true;
    case MERGE_JOB:
        if (over)
            __atomic_store_n(&m->cancel, 1, __ATOMIC_RELAXED);
        else if (pack_queue(g) > 0)
            __atomic_store_n(&m->stop, 1, __ATOMIC_RELAXED);
        return false;
    case MERGE_ADOPT:
        adopt_piece(g, m);
        return true;
    }
    return false;
}
