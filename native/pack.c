/* pack.c - see pack.h: the reactor's part, what to pack and when. */
#include "pack.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "crash.h"
#include "group.h"

int pack_init(struct group *g)
{
    struct pack *p = &g->pack;

    p->group = g;
    segment_list_init(&p->dead_list);
    p->frame = calloc(PACK_FRAMES_MAX, sizeof(*p->frame));
    p->block = calloc(PACK_BLOCKS_MAX, sizeof(*p->block));
    p->move = calloc(PACK_FRAMES_MAX * 2, sizeof(*p->move));
    p->plain = malloc(CLUSTER_BYTES);
    p->squeezed = malloc(CLUSTER_BYTES);
    p->copy = g->config.spill_bytes > 0 ? malloc(SEGMENT_BYTES) : NULL;
    if (g->config.spill_bytes > 0 && !p->copy)
        return -ENOMEM;
    return p->frame && p->block && p->move && p->plain && p->squeezed ? 0 : -ENOMEM;
}

void pack_free(struct group *g)
{
    struct pack *p = &g->pack;

    free(p->frame);
    free(p->block);
    free(p->move);
    free(p->plain);
    free(p->squeezed);
    free(p->copy);
    memset(p, 0, sizeof(*p));
}

/* ---- What is dead ------------------------------------------------------------------------ */

/* A kept segment that nothing is added to any more: from now on it may be worn. */
static void watch(struct group *g, struct epoch *e, uint32_t segment)
{
    struct segment_use *u = &g->arena.use[segment];

    u->worn_at = u->slots / 2 > 0 ? u->slots / 2 : 1;
    if (u->dead >= u->worn_at || u->slots == 0)
        pack_worn(g, e, segment);
}

void pack_worn(struct group *g, struct epoch *e, uint32_t segment)
{
    bool ram = segment < g->arena.segments;
    struct segment_list *kept_list = ram ? &e->kept_list : &e->spill_list;
    struct segment_list *worn_list = ram ? &e->worn_list : &e->spill_worn_list;
    struct segment_use *u = &g->arena.use[segment];

    if (u->dead < u->slots && !u->worn) {
        segment_list_remove(&g->arena, kept_list, segment);
        segment_list_append(&g->arena, worn_list, segment);
        u->worn = true;
        pack_look(g);
    }
    if (u->dead < u->slots) {
        u->worn_at = u->slots;
        return;
    }
    segment_list_remove(&g->arena, u->worn ? worn_list : kept_list, segment);
    segment_list_append(&g->arena, &g->pack.dead_list, segment);
    e->stored_bytes -= arena_tail(&g->arena, segment);
    g->stats.dropped_frames += u->dead;
}

void pack_keep(struct group *g, struct epoch *e, uint32_t segment)
{
    segment_list_append(&g->arena, segment < g->arena.segments ? &e->kept_list : &e->spill_list,
                        segment);
    g->arena.use[segment].worn = false;
    watch(g, e, segment);
}

void pack_recounted(struct group *g, struct epoch *e)
{
    struct segment_list kept = e->kept_list, spilled = e->spill_list;

    segment_list_init(&e->kept_list);
    segment_list_init(&e->spill_list);
    while (kept.count > 0)
        pack_keep(g, e, segment_list_pop(&g->arena, &kept));
    while (spilled.count > 0)
        pack_keep(g, e, segment_list_pop(&g->arena, &spilled));
}

/* ---- After the job ----------------------------------------------------------------------- */

static void finish(struct group *g, struct pack *p, struct epoch *e)
{
    if (!p->spare_used)
        arena_segment_free(&g->arena, p->spare);
    p->phase = PACK_IDLE;
    pack_look(g);
    merge_look(g);
    epoch_job_done(g, e);
}

/* Nothing was gained: take the output back, keep the source as it is. */
static void undo(struct group *g, struct pack *p, struct epoch *e)
{
    if (p->spare_used)
        g->arena.desc[p->spare].tail = 0;
    if (e->packed.segment != SEGMENT_NONE)
        __atomic_store_n(&g->arena.desc[e->packed.segment].tail, e->packed.tail, __ATOMIC_RELEASE);
    p->spare_used = false;
    if (e->frozen && !p->reclaim) { /* a commit may read it: it stays, dead or alive */
        segment_list_append(&g->arena, &p->part->raw_list, p->source);
    } else if (p->incompressible) {
        g->stats.incompressible_frames += p->frames;
        p->streak++;
        pack_keep(g, e, p->source);
    } else if (p->reclaim) {
        pack_keep(g, e, p->source);
    } else {
        segment_list_append(&g->arena, &p->part->raw_list, p->source);
    }
    finish(g, p, e);
}

static void done(struct job *job)
{
    struct pack *p = job->owner;
    struct group *g = p->group;
    struct epoch *e = p->epoch;

    g->stats.compress_ns += p->ns;
    if (p->incompressible || p->cancel || e->dropped) {
        undo(g, p, e);
        return;
    }
    if (p->spare_used)
        segment_list_append(&g->arena, &e->kept_list, p->spare);
    p->next = 0;
    p->phase = PACK_ADOPT;
}

uint32_t pack_repoint(struct group *g, struct epoch *e, const struct pack_move *f)
{
    struct segment_use *u = &g->arena.use[arena_loc_segment(f->new)];
    uint32_t before = u->slots;

    if (f->range) {
        u->slots += ranges_repoint(&epoch_index(e, f->disk)->ranges, f->disk, f->block,
                                   f->block + f->blocks, f->old, f->new);
        return u->slots - before;
    }
    for (uint32_t i = 0; i < f->blocks; i++) {
        struct index_slot *s = index_find(epoch_index(e, f->disk), f->disk, f->block + i);

        if (s && s->mask && s->loc == f->old) {
            s->loc = f->new;
            u->slots++;
        }
    }
    return u->slots - before;
}

/* The source has no slots any more. */
static void adopted(struct group *g, struct pack *p, struct epoch *e)
{
    uint32_t before = e->packed.segment;

    e->packed = p->out;
    if (p->spare_used && before != SEGMENT_NONE)
        watch(g, e, before);
    e->stored_bytes += p->stored;
    e->stored_bytes -= arena_tail(&g->arena, p->source);
    crash_point("pack-before-free");
    arena_segment_free(&g->arena, p->source);
    g->stats.compressed_frames += p->compressed;
    g->stats.incompressible_frames += p->raw;
    g->stats.clusters += p->clusters;
    if (p->dictionary)
        g->stats.dictionary_frames += p->compressed;
    g->stats.pack_bytes_in += p->bytes_in;
    g->stats.pack_bytes_out += p->bytes_out;
    if (p->compressed > 0)
        p->streak = 0;
    finish(g, p, e);
}

static uint32_t piece_end(const struct pack *p)
{
    return p->moves - p->next < PACK_PIECE ? p->moves : p->next + PACK_PIECE;
}

static void adopt_piece(struct group *g, struct pack *p, struct epoch *e)
{
    uint32_t end = piece_end(p);

    if (!e->dropped) {
        for (uint32_t i = p->next; i < end; i++)
            index_prefetch(epoch_index(e, p->move[i].disk), p->move[i].disk, p->move[i].block);
        for (uint32_t i = p->next; i < end; i++)
            pack_repoint(g, e, &p->move[i]);
    }
    p->next = end;
    if (end == p->moves)
        adopted(g, p, e);
}

/* ---- Before the job ---------------------------------------------------------------------- */

static void start_job(struct group *g, struct pack *p)
{
    p->job = (struct job){.run = pack_run, .done = done, .owner = p};
    check(worker_submit(&g->packer, &p->job, false));
    p->phase = PACK_JOB;
}

uint8_t pack_alive_in(const struct epoch *e, const struct frame_header *h, arena_loc loc)
{
    uint32_t blocks = h->kind == FRAME_CLUSTER ? h->blocks : 1;
    const struct index *x = epoch_index(e, h->disk);
    uint8_t bits = 0;

    if (h->kind == FRAME_ZERO && h->blocks > 1)
        return ranges_left(&x->ranges, h->disk, h->block, h->block + h->blocks, loc);
    for (uint32_t i = 0; i < blocks; i++) {
        const struct index_slot *s = index_find(x, h->disk, h->block + i);

        if (s && s->mask && s->loc == loc)
            bits |= (uint8_t)(1u << i);
    }
    return bits;
}

const struct frame_header *pack_frame(const struct pack *p, arena_loc loc)
{
    if (likely(!p->spilled))
        return arena_frame(&p->group->arena, loc);
    return (struct frame_header *)(p->copy + (uint64_t)loc * FRAME_ALIGN % SEGMENT_BYTES);
}

/* The next frames of the source: those alive are taken. */
static void gather_piece(struct group *g, struct pack *p, struct epoch *e)
{
    uint32_t tail = arena_tail(&g->arena, p->source), at = p->source_offset, n = 0;
    uint8_t *from = p->spilled ? p->copy : arena_segment(&g->arena, p->source);
    struct pack_source piece[PACK_PIECE];
    const struct frame_header *h;

    while (n < PACK_PIECE && (h = frame_next(from, tail, &p->source_offset))) {
        for (uint32_t i = 0; i < h->blocks && i < CLUSTER_BLOCKS; i++)
            index_prefetch(epoch_index(e, h->disk), h->disk, h->block + i);
        piece[n++].loc = arena_loc_of(p->source, at);
        at = p->source_offset;
    }
    for (uint32_t i = 0; i < n; i++) {
        piece[i].alive = pack_alive_in(e, pack_frame(p, piece[i].loc), piece[i].loc);
        if (piece[i].alive)
            p->frame[p->frames++] = piece[i];
        else
            g->stats.dropped_frames++;
    }
    if (n == PACK_PIECE && p->source_offset < tail)
        return;
    p->gathered = true;
    start_job(g, p);
}

/* On the helper: the disk is waited for here, not on the reactor. */
static void read_spilled(struct job *job, struct worker *w)
{
    struct pack *p = job->owner;
    const struct arena *a = &p->group->arena;
    uint32_t tail = arena_tail(a, p->source), bytes;

    for (uint32_t at = 0; at < tail && !p->damaged; at += bytes) {
        const struct frame_header *h = frame_get(&w->expand, a, arena_loc_of(p->source, at));

        bytes = h ? frame_bytes(h->payload_bytes) : 0;
        p->damaged = bytes == 0 || at + bytes > tail;
        if (!p->damaged)
            memcpy(p->copy + at, h, sizeof(*h) + h->payload_bytes);
    }
}

static void spilled_read(struct job *job)
{
    struct pack *p = job->owner;

    p->phase = PACK_GATHER;
    if (!p->damaged)
        return;
    spill_fault(p->group, -EIO);
    undo(p->group, p, p->epoch);
}

static void start_read(struct group *g, struct pack *p)
{
    p->job = (struct job){.run = read_spilled, .done = spilled_read, .owner = p};
    check(worker_submit(&g->packer, &p->job, false));
    p->phase = PACK_READ;
}

static void begin(struct group *g, struct pack *p, struct epoch *e)
{
    p->epoch = e;
    p->out = e->packed;
    p->spare = arena_segment_take(&g->arena, e->id, SEGMENT_PACKED);
    p->spare_used = p->incompressible = p->gathered = p->damaged = false;
    p->bytes_in = p->bytes_out = p->stored = p->compressed = p->raw = p->clusters = p->ns = 0;
    p->frames = p->blocks = p->moves = p->source_offset = p->cancel = 0;
    e->jobs++;
}

/* ---- What, and when ---------------------------------------------------------------------- */

#define RECLAIM_PERCENT 75u
#define BEHIND_SHARE 8u       /* behind: so much of the arena waits to be packed */
#define LEVEL_BEHIND (-3)     /* when there is no time: a tenth more bytes than level 1 */
#define LEVEL_EASY 3          /* when there is: a fifth more time, 3 % fewer bytes */
#define LEVEL_TIGHT 5         /* ... and room is short: two and a half times, 6 % */
#define LEVEL_EASY_DICTIONARY DICTIONARY_LEVEL_MIN
#define LEVEL_TIGHT_DICTIONARY 7
#define EASY_QUEUE 2u         /* segments: the packer keeps up */
#define TIGHT_PERCENT 50u
#define STREAK_SKIP 4u        /* so many incompressible segments in a row: try one in four */

/* Segments at the end of each part of the epoch that are left alone. */
static uint32_t lag(const struct group *g, const struct epoch *e)
{
    uint32_t percent = group_pressure_percent(g);

    if (e->state != CORE_EPOCH_OPEN)
        return 0;
    if (g->pack.paused || percent >= 50)
        return 1;
    return 1 + g->arena.segments / (percent < 25 ? 16 : 64) / g->writers;
}

/* The part that has most to pack; NULL: none has. */
static struct epoch_part *may_pack(const struct group *g, struct epoch *e)
{
    uint32_t most = lag(g, e);
    struct epoch_part *part = NULL;

    for (uint32_t i = 0; i < g->writers; i++)
        if (e->part[i].raw_list.count > most) {
            part = &e->part[i];
            most = part->raw_list.count;
        }
    return part;
}

static bool may_reclaim(const struct group *g, const struct epoch *e)
{
    return e->worn_list.count > 0 && group_pressure_percent(g) >= RECLAIM_PERCENT;
}

/* While the file is short of room, and what it has can be believed. */
static bool may_reclaim_spilled(const struct group *g, const struct epoch *e)
{
    return e->spill_worn_list.count > 0 && !g->spill.fault &&
           g->arena.spill_free_count < g->arena.spill_segments / 4 + 1;
}

/* A worn segment's job copies, that does not take long; spilled ones are read from a disk. */
uint32_t pack_may_borrow(const struct group *g, const struct epoch *e)
{
    const struct pack *p = &g->pack;

    return p->phase == PACK_JOB && p->epoch == e && !p->reclaim;
}

uint32_t pack_borrow(struct group *g, const struct epoch *e)
{
    if (!pack_may_borrow(g, e))
        return SEGMENT_NONE;
    __atomic_store_n(&g->pack.cancel, 1, __ATOMIC_RELAXED);
    return g->pack.source;
}

uint32_t pack_queue(const struct group *g)
{
    uint32_t queue = 0;

    for (uint32_t i = 0; i < g->epochs; i++) {
        const struct epoch *e = g->epoch[i];
        uint32_t left = lag(g, e);

        for (uint32_t n = 0; !e->frozen && n < g->writers; n++)
            if (e->part[n].raw_list.count > left)
                queue += e->part[n].raw_list.count - left;
    }
    return queue;
}

/* A writer that is faster than the packer needs room soon. Where the packer keeps up, time is
 * cheap: the more so the shorter the room. */
static int level(const struct group *g)
{
    int normal = g->config.compress_level, high;
    bool tight = group_pressure_percent(g) >= TIGHT_PERCENT;
    uint32_t queue = pack_queue(g);

    if (tight && queue > g->arena.segments / BEHIND_SHARE)
        return LEVEL_BEHIND;
    if (!g->pack.paused && queue > EASY_QUEUE)
        return normal;
    if (dictionary_newest(&g->dictionaries))
        high = tight ? LEVEL_TIGHT_DICTIONARY : LEVEL_EASY_DICTIONARY;
    else
        high = tight ? LEVEL_TIGHT : LEVEL_EASY;
    return normal < high ? high : normal;
}

/* Not worth a try: compression is off, nothing is alive, or nothing has shrunk for long. */
static bool hopeless(struct group *g, struct pack *p, const struct segment_use *u)
{
    if (g->config.compress_level == 0 || u->dead == u->slots)
        return true;
    if (p->streak < STREAK_SKIP || ++p->skipped % 4 == 0)
        return false;
    g->stats.incompressible_frames += u->slots;
    return true;
}

/* The epoch's next segment: to be compressed, or worn and to be copied together. */
static void take_source(struct group *g, struct pack *p, struct epoch *e)
{
    struct segment_use *u;

    p->part = may_pack(g, e);
    p->reclaim = !p->part;
    p->spilled = p->reclaim && !may_reclaim(g, e);
    p->source = segment_list_pop(&g->arena, p->spilled ? &e->spill_worn_list :
                                 p->reclaim ? &e->worn_list : &p->part->raw_list);
    if (p->part && p->source == p->part->raw.segment)
        p->part->raw.segment = SEGMENT_NONE;
    u = &g->arena.use[p->source];
    if (!p->reclaim && hopeless(g, p, u)) {
        pack_keep(g, e, p->source); /* and free it, when all is dead */
        return;
    }
    u->worn_at = UINT32_MAX;
    p->level = level(g);
    begin(g, p, e);
    if (p->spilled) {
        start_read(g, p);
        return;
    }
    p->phase = PACK_GATHER;
    if (u->dead <= u->slots / 8) /* a few dead frames cost less than looking for them */
        start_job(g, p);
}

/* Is it time to see whether the guest pauses? */
static void check_pause(struct group *g, struct pack *p)
{
    uint64_t written = group_written(g);
    uint32_t most = 0;

    p->paused = written == p->check_seq && (p->paused || g->now_ns >= p->check_ns);
    p->check_ns = 0;
    for (uint32_t i = 0; i < g->writers; i++)
        if (epoch_open(g)->part[i].raw_list.count > most)
            most = epoch_open(g)->part[i].raw_list.count;
    if (p->paused || most < 2)
        return;
    p->check_seq = written;
    p->check_ns = g->now_ns + PACK_IDLE_NS;
}

static bool choose(struct group *g, struct pack *p)
{
    struct epoch *chosen = NULL;

    p->look = false;
    check_pause(g, p);
    for (uint32_t i = 0; i < g->epochs && !chosen; i++) {
        struct epoch *e = g->epoch[i];

        if (e->frozen)
            continue;
        if (may_pack(g, e) || may_reclaim(g, e) || may_reclaim_spilled(g, e))
            chosen = e;
    }
    if (!chosen)
        return merge_begin(g);
    p->look = true;
    if (g->arena.free_count == 0 || g->packer.outstanding == WORKER_RING)
        return false;
    take_source(g, p, chosen);
    return true;
}

uint64_t pack_timer(const struct group *g)
{
    uint64_t pause = g->pack.phase == PACK_IDLE ? g->pack.check_ns : 0, merge = merge_timer(g);

    if (merge <= g->now_ns) /* the next thing to happen lets it begin */
        return pause;
    return pause > 0 && pause < merge ? pause : merge;
}

bool pack_step(struct group *g)
{
    struct pack *p = &g->pack;

    while (unlikely(p->dead_list.count > 0))
        arena_segment_free(&g->arena, segment_list_pop(&g->arena, &p->dead_list));
    switch (p->phase) {
    case PACK_IDLE:
        if (unlikely(g->merge.phase != MERGE_IDLE))
            return merge_step(g);
        if (likely(!p->look) && (p->check_ns == 0 || g->now_ns < p->check_ns) && !merge_due(g))
            return false;
        return choose(g, p);
    case PACK_READ:
        return false;
    case PACK_GATHER:
        if (p->epoch->frozen || p->epoch->dropped)
            undo(g, p, p->epoch);
        else if (g->packer.outstanding < WORKER_RING)
            gather_piece(g, p, p->epoch);
        return true;
    case PACK_JOB:
        if (p->epoch->frozen || p->epoch->dropped)
            __atomic_store_n(&p->cancel, 1, __ATOMIC_RELAXED);
        return false;
    case PACK_ADOPT:
        adopt_piece(g, p, p->epoch);
        return true;
    }
    return false;
}
