/* spill.c - see spill.h. */
#include "spill.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>

#include "checksum.h"
#include "crash.h"
#include "group.h"

typedef unsigned long long ull;

/* ---- The file ------------------------------------------------------------------------- */

static bool in_use(const struct arena *a)
{
    for (uint32_t i = a->segments; i < arena_segments_all(a); i++)
        if (a->desc[i].state != SEGMENT_FREE)
            return true;
    return false;
}

static int header_transfer(struct group *g, enum disk_opcode opcode, struct spill_header *page,
                           char *text)
{
    struct iovec iov = {.iov_base = page, .iov_len = PAGE};
    struct disk_op op = {.opcode = opcode, .file = DISK_SPILL, .bytes = PAGE, .iov = &iov,
                         .iov_count = 1};
    int64_t result = disk_run(g->disk, &op);

    if (result >= 0)
        return 0;
    snprintf(text, CORE_TEXT_MAX, "spill file: %s its first page failed: %s",
             opcode == DISK_READ ? "reading" : "writing", strerror((int)-result));
    return (int)result;
}

/* The id is new each time: an older copy of the file is not taken for this one. */
static int make_ours(struct group *g, struct spill_header *page, char *text)
{
    struct arena_header *h = g->arena.header;

    memset(page, 0, sizeof(*page));
    page->magic = SPILL_MAGIC;
    page->version = SPILL_VERSION;
    page->segment_bytes = SEGMENT_BYTES;
    page->segments = h->spill_segments;
    memcpy(page->group, h->group, sizeof(page->group));
    if (getrandom(page->id, sizeof(page->id), 0) != (ssize_t)sizeof(page->id)) {
        snprintf(text, CORE_TEXT_MAX, "spill file: no random numbers: %s", strerror(errno));
        return -EIO;
    }
    memcpy(h->spill_id, page->id, sizeof(h->spill_id));
    return header_transfer(g, DISK_WRITE, page, text);
}

static int check_ours(struct group *g, struct spill_header *page, char *text)
{
    const struct arena_header *h = g->arena.header;
    const char *wrong = NULL;
    int error = header_transfer(g, DISK_READ, page, text);

    if (error)
        return error;
    if (page->magic != SPILL_MAGIC)
        wrong = "is no spill file";
    else if (page->version != SPILL_VERSION || page->segment_bytes != SEGMENT_BYTES)
        wrong = "was written by another version of this agent";
    else if (memcmp(page->group, h->group, sizeof(page->group)) != 0)
        wrong = "belongs to another consistency group";
    else if (memcmp(page->id, h->spill_id, sizeof(page->id)) != 0 ||
             page->segments != h->spill_segments)
        wrong = "is not the one that the arena was using";
    if (!wrong)
        return 0;
    snprintf(text, CORE_TEXT_MAX, "spill file: it %s, and epochs in the arena need theirs; give "
             "that back, or remove the arena from /dev/shm to give up what is not committed",
             wrong);
    return -EINVAL;
}

int spill_look(const struct group *g)
{
    struct stat st;

    if (arena_spill_lost(&g->arena))
        return -EIO;
    if (fstat(g->config.spill_fd, &st))
        return -errno;
    return (uint64_t)st.st_size < arena_spill_file_bytes(g->arena.spill_segments) ? -ENODATA : 0;
}

static bool named(const struct group *g)
{
    struct stat st;

    return fstat(g->config.spill_fd, &st) == 0 && st.st_nlink > 0;
}

int spill_open(struct group *g, char *text)
{
    struct spill_header *page;
    int error;

    if (g->arena.spill_segments == 0)
        return 0;
    error = spill_look(g);
    if (error) {
        snprintf(text, CORE_TEXT_MAX, "spill file: it has not the %llu bytes that it should have",
                 (ull)arena_spill_file_bytes(g->arena.spill_segments));
        return error;
    }
    page = aligned_alloc(PAGE, PAGE);
    if (!page) {
        snprintf(text, CORE_TEXT_MAX, "spill file: no memory");
        return -ENOMEM;
    }
    error = in_use(&g->arena) ? check_ours(g, page, text) : make_ours(g, page, text);
    free(page);
    g->spill.has_name = named(g);
    return error;
}

/* ---- Using what lies there ------------------------------------------------------------- */

void spill_prefetch(const struct group *g, uint32_t disk, uint64_t first, uint64_t last)
{
    uint8_t *from = NULL, *to = NULL; /* pages to ask for: frames of neighbours are neighbours */
    arena_loc before = UINT32_MAX;

    for (uint64_t block = first; block <= last; block++)
        for (uint32_t i = g->epochs; i-- > 0;) {
            const struct index_slot *s = index_find(epoch_index(g->epoch[i], disk), disk, block);
            const struct frame_header *h;
            uint8_t *at;

            if (!s || !s->mask)
                continue;
            if (!arena_spilled(&g->arena, s->loc))
                break;
            h = arena_frame(&g->arena, s->loc);
            at = (uint8_t *)((uintptr_t)h & ~(uintptr_t)(PAGE - 1));
            if (!from || at < from || at > to) {
                if (from)
                    madvise(from, (size_t)(to - from), MADV_WILLNEED);
                from = at;
            }
            /* The header would tell, but looking at it may wait for the disk. */
            to = (uint8_t *)page_round_up((uintptr_t)h + (s->loc == before ? CLUSTER_BYTES
                                                                           : FRAME_BYTES_MAX));
            before = s->loc;
            break;
        }
    if (from)
        madvise(from, (size_t)(to - from), MADV_WILLNEED);
}

void spill_fault(struct group *g, int error)
{
    struct spill *s = &g->spill;

    if (s->fault)
        return;
    s->fault = error;
    group_io_error(g, TROUBLE_SPILL, CORE_NO_DISK, error, error == -ENOENT
                   ? "the spill file was removed and takes no more; commit or discard what is in "
                     "it before the agent stops"
                   : "the spill file was cut, changed or cannot be read, and takes no more; "
                     "uncommitted epochs that need it can only be discarded");
}

/* ---- One segment's way ------------------------------------------------------------------ */

static void move_end(struct spill_move *m)
{
    struct spill *s = &m->group->spill;

    m->busy = false;
    s->busy--;
    epoch_job_done(m->group, m->epoch);
}

/* It stays in RAM, or goes with its epoch. */
static void move_cancel(struct spill_move *m)
{
    struct group *g = m->group;

    pack_keep(g, m->epoch, m->from);
    arena_spill_give_back(&g->arena, m->to);
    move_end(m);
}

static void repoint(struct spill_move *m, const struct frame_header *h, uint32_t at)
{
    struct arena *a = &m->group->arena;
    arena_loc old = arena_loc_of(m->from, at);

    if (h->kind == FRAME_ZERO && h->blocks > 1) {
        a->use[m->to].slots += ranges_repoint(&epoch_index(m->epoch, h->disk)->ranges, h->disk,
                                              h->block, h->block + h->blocks, old,
                                              arena_loc_of(m->to, at));
        return;
    }
    for (uint32_t i = 0; i < h->blocks; i++) {
        struct index_slot *s = index_find(epoch_index(m->epoch, h->disk), h->disk,
                                          h->block + i);

        if (s && s->mask && s->loc == old) {
            s->loc = arena_loc_of(m->to, at);
            a->use[m->to].slots++;
        }
    }
}

static void adopted(struct spill_move *m)
{
    struct group *g = m->group;

    crash_point("spill-before-free");
    arena_segment_free(&g->arena, m->from);
    pack_keep(g, m->epoch, m->to);
    pack_look(g);
    move_end(m);
}

/* Shows the next frames in their new place. */
static void adopt_piece(struct spill_move *m)
{
    struct arena *a = &m->group->arena;
    uint32_t at = m->offset;

    for (uint32_t n = 0; n < PACK_PIECE && m->offset < m->tail && !m->epoch->dropped; n++) {
        struct frame_header *h = arena_frame_next(a, m->from, m->tail, &m->offset);

        check(h); /* in RAM, and below a tail of ours */
        repoint(m, h, at);
        at = m->offset;
    }
    if (m->offset == m->tail || m->epoch->dropped)
        adopted(m);
}

static void written(struct disk_op *op, int64_t result)
{
    struct spill_move *m = op->owner;
    struct group *g = m->group;
    struct spill *s = &g->spill;

    if (result < 0) {
        if (!s->retry_ns)
            group_io_error(g, TROUBLE_SPILL, CORE_NO_DISK, (int)result, "writing the spill file");
        s->retry_ns = g->now_ns + GROUP_RETRY_NS;
    }
    if (result < 0 || m->epoch->dropped) {
        move_cancel(m);
        return;
    }
    if (!s->fault)
        group_io_works(g, TROUBLE_SPILL);
    g->stats.spill_bytes += op->bytes;
    crash_point("spill-before-publish");
    arena_spill_publish(&g->arena, m->to, m->epoch->id, m->tail);
    crash_point("spill-before-index");
    m->written = true;
}

static void checked(struct job *job)
{
    struct spill_move *m = job->owner;
    struct group *g = m->group;

    if (m->epoch->dropped) {
        move_cancel(m);
        return;
    }
    m->iov = (struct iovec){.iov_base = arena_segment(&g->arena, m->from),
                            .iov_len = page_round_up(m->tail)};
    m->op = (struct disk_op){.opcode = DISK_WRITE, .file = DISK_SPILL,
                             .offset = arena_spill_offset(&g->arena, m->to),
                             .bytes = m->iov.iov_len, .iov = &m->iov, .iov_count = 1,
                             .done = written, .owner = m};
    disk_submit(g->disk, &m->op);
}

/* On the helper. */
static void check_frames(struct job *job, struct worker *w)
{
    struct spill_move *m = job->owner;
    uint32_t offset = 0;
    struct frame_header *h;

    (void)w;
    while ((h = arena_frame_next(&m->group->arena, m->from, m->tail, &offset)))
        if (h->crc == 0)
            h->crc = frame_crc(h);
}

/* ---- Which ones ------------------------------------------------------------------------- */

static uint32_t wanted(const struct group *g)
{
    uint32_t want = g->arena.segments / SPILL_FREE_SHARE;

    if (want < SPILL_FREE_MIN)
        want = SPILL_FREE_MIN;
    return g->spill.held_want > want ? g->spill.held_want : want;
}

static bool has_raw(const struct group *g, const struct epoch *e)
{
    for (uint32_t i = 0; i < g->writers; i++)
        if (e->part[i].raw_list.count > 0)
            return true;
    return false;
}

/* The packer's output is left alone while it may grow. */
static bool may_move(const struct group *g, const struct epoch *e, uint32_t segment)
{
    bool packing = g->pack.phase != PACK_IDLE && g->pack.epoch == e;

    if (packing && segment == g->pack.spare)
        return false;
    return segment != e->packed.segment ||
           (e->state != CORE_EPOCH_OPEN && !has_raw(g, e) && !packing);
}

static uint32_t pop_kept(struct group *g, struct epoch *e)
{
    uint32_t segment;

    for (uint32_t n = e->kept_list.count < 3 ? e->kept_list.count : 3; n > 0; n--) {
        segment = segment_list_pop(&g->arena, &e->kept_list);
        if (may_move(g, e, segment)) {
            if (segment == e->packed.segment)
                e->packed = (struct arena_cursor){.segment = SEGMENT_NONE};
            return segment;
        }
        segment_list_append(&g->arena, &e->kept_list, segment);
    }
    return SEGMENT_NONE;
}

/* Not packed yet, but the packer is slower than the guest. */
static uint32_t pop_raw(struct group *g, struct epoch *e)
{
    for (uint32_t i = 0; i < g->writers; i++) {
        struct epoch_part *p = &e->part[i];

        if (p->raw_list.count > 0 && p->raw_list.first != p->raw.segment)
            return segment_list_pop(&g->arena, &p->raw_list);
    }
    return SEGMENT_NONE;
}

/* Oldest epochs first; those that a commit or an apply reads stay where they are. */
static uint32_t choose(struct group *g, struct epoch **of)
{
    bool hurry = g->arena.free_count + g->spill.busy < wanted(g) / 2;
    uint32_t segment = SEGMENT_NONE;

    for (uint32_t raw = 0; raw <= hurry; raw++)
        for (uint32_t i = 0; i < g->epochs && segment == SEGMENT_NONE; i++) {
            *of = g->epoch[i];
            if (!(*of)->frozen)
                segment = raw ? pop_raw(g, *of) : pop_kept(g, *of);
        }
    return segment;
}

static bool may_start(struct group *g)
{
    struct spill *s = &g->spill;
    int error;

    if (s->fault || g->config.spill_closed || g->now_ns < s->retry_ns ||
        g->arena.spill_free_count == 0)
        return false;
    s->retry_ns = 0;
    error = spill_look(g);
    if (!error && s->has_name && !named(g))
        error = -ENOENT;
    if (error)
        spill_fault(g, error);
    return !error;
}

static bool move_start(struct group *g, struct spill_move *m)
{
    struct epoch *e;
    uint32_t segment = choose(g, &e);

    if (segment == SEGMENT_NONE)
        return false;
    *m = (struct spill_move){.group = g, .epoch = e, .from = segment, .busy = true,
                             .tail = arena_tail(&g->arena, segment),
                             .to = arena_spill_take(&g->arena)};
    g->arena.use[segment].worn_at = UINT32_MAX; /* it is in no list */
    m->job = (struct job){.run = check_frames, .done = checked, .owner = m};
    g->spill.busy++;
    e->jobs++;
    check(worker_submit(&g->worker, &m->job, true));
    return true;
}

/* ---- Telling ----------------------------------------------------------------------------- */

static bool tell(struct group *g)
{
    struct spill *s = &g->spill;
    uint32_t used = arena_spill_used(&g->arena);
    core_event event = {.type = CORE_EVENT_SPILL, .disk = CORE_NO_DISK,
                        .value = (uint64_t)used * SEGMENT_BYTES, .first = used > 0};

    if (s->told == (used > 0))
        return false;
    s->told = used > 0;
    if (!used)
        madvise(g->arena.spill.base, g->arena.spill.bytes, MADV_DONTNEED); /* its page tables */
    group_emit(g, &event);
    return true;
}

void spill_hold(struct group *g, uint32_t segments)
{
    if (segments > g->spill.held_want)
        g->spill.held_want = segments;
}

bool spill_may_help(const struct group *g)
{
    return g->arena.spill_segments > 0 && !g->spill.stuck;
}

/* A request that was told to wait for the disk waits for a commit now. */
static void set_stuck(struct group *g, bool stuck)
{
    struct spill *s = &g->spill;

    s->stuck = stuck;
    if (!stuck || s->held_want <= g->arena.free_count) {
        s->held_told = false;
    } else if (!s->held_told) {
        s->held_told = true;
        group_pressure(g, true);
    }
}

bool spill_step(struct group *g)
{
    struct spill *s = &g->spill;
    const struct arena *a = &g->arena;
    bool moved;

    if (likely(a->spill_segments == 0))
        return false;
    moved = tell(g);
    for (uint32_t i = 0; i < SPILL_MOVES; i++)
        if (s->move[i].busy && s->move[i].written) {
            adopt_piece(&s->move[i]);
            moved = true;
        }
    if (s->held_want <= a->free_count)
        s->held_want = 0;
    for (uint32_t i = 0; i < SPILL_MOVES && a->free_count + s->busy < wanted(g); i++) {
        if (s->move[i].busy)
            continue;
        if (g->worker.outstanding == WORKER_RING || !may_start(g) || !move_start(g, &s->move[i]))
            break;
        moved = true;
    }
    set_stuck(g, a->free_count < wanted(g) && s->busy == 0);
    return moved;
}
