/* condense.c - see condense.h. */
#include "condense.h"

#include <stdlib.h>
#include <string.h>

#include "checksum.h"
#include "group.h"
#include "mutant.h"

bool condense_worth(const struct arena *a, const struct commit *c)
{
    uint64_t all = 0, dead = 0;

    for (uint32_t i = 0; i < c->sources; i++) {
        const struct commit_source *s = &c->source[i];
        const struct segment_use *u = &a->use[s->segment];

        if (s->segment >= a->segments || u->slots == 0)
            continue;
        all += s->bytes;
        dead += (uint64_t)s->bytes * u->dead / u->slots;
    }
    if (all < CONDENSE_BYTES_MIN)
        return false;
    return c->condense.epochs > 1 || dead >= all / CONDENSE_DEAD_SHARE;
}

/* ---- What is alive ----------------------------------------------------------------------- */

static void mark(struct condense *d, arena_loc loc)
{
    uint32_t source = d->source_of[loc / SEGMENT_UNITS];
    uint64_t bit = (uint64_t)source * SEGMENT_UNITS + loc % SEGMENT_UNITS;

    if (source != CONDENSE_NONE)
        d->alive[bit / 64] |= 1ull << bit % 64;
}

static void mark_range(void *owner, arena_loc loc)
{
    mark(owner, loc);
}

/* Is the block zeroed as a whole by an epoch of the commit behind that one? */
static bool zeroed_later(const struct condense *d, uint32_t epoch, const struct index_slot *s)
{
    for (uint32_t i = epoch + 1; i < d->epochs; i++)
        if (index_in_range(epoch_index(d->epoch[i], s->disk), s->disk, index_slot_block(s)))
            return true;
    return false;
}

/* Does the slot have sectors that no newer epoch has? newest: masks of those; NULL: they are not
 * compared. */
static bool counts(const struct condense *d, uint32_t epoch, const struct index_slot *s,
                   struct index *newest)
{
    struct index_slot *seen;
    uint8_t have;

    if (!newest || zeroed_later(d, epoch, s))
        return !newest;
    seen = index_slot(newest, s->disk, index_slot_block(s), 0);
    if (!seen)
        return true; /* no memory */
    have = seen->mask;
    seen->mask |= s->mask;
    if (have && mutant(MUTANT_CONDENSE_DROPS_PARTS))
        return false;
    return (s->mask & ~have) != 0;
}

static void mark_index(struct condense *d, uint32_t epoch, const struct index *x,
                       struct index *newest)
{
    struct index_cursor at = {0};
    const struct index_slot *s;

    while ((s = index_next(x, &at)))
        if (counts(d, epoch, s, newest))
            mark(d, s->loc);
    if (!mutant(MUTANT_CONDENSE_WITHOUT_RANGES))
        ranges_each(&x->ranges, mark_range, d);
}

static void mark_epoch(struct condense *d, uint32_t epoch, struct index *newest)
{
    const struct epoch *e = d->epoch[epoch];

    for (uint32_t i = 0; i < e->group->writers; i++)
        mark_index(d, epoch, &e->part[i].index, newest);
}

/* Newest first: what an older epoch has of a block only counts where no newer one has it. */
static void mark_all(struct condense *d)
{
    struct index_memory memory;
    struct index newest;
    uint64_t slots = 0;
    bool merge;

    for (uint32_t i = 0; i < d->epochs; i++)
        slots += epoch_slots(d->epoch[i]);
    merge = d->epochs > 1 && slots <= CONDENSE_MERGE_SLOTS;
    index_memory_init(&memory, INT64_MAX);
    index_init(&newest, &memory);
    for (uint32_t n = 0; n < d->epochs; n++) {
        uint32_t epoch = mutant(MUTANT_CONDENSE_KEEPS_OLDEST) ? n : d->epochs - 1 - n;

        mark_epoch(d, epoch, merge ? &newest : NULL);
    }
    index_free(&newest);
    index_memory_free(&memory);
}

/* ---- Layout ------------------------------------------------------------------------------ */

/* The next living frame's unit in the source at `unit` or behind it; SEGMENT_UNITS: none. */
static uint32_t next_alive(const struct condense *d, uint32_t source, uint32_t unit)
{
    const uint64_t *word = d->alive + (uint64_t)source * (SEGMENT_UNITS / 64);

    while (unit < SEGMENT_UNITS) {
        uint64_t bits = word[unit / 64] >> unit % 64;

        if (bits)
            return unit + (uint32_t)__builtin_ctzll(bits);
        unit = (unit / 64 + 1) * 64;
    }
    return SEGMENT_UNITS;
}

static uint8_t *frame_at(const struct arena *a, const struct commit_source *s, uint32_t unit)
{
    return arena_segment(a, s->segment) + (uint64_t)unit * FRAME_ALIGN;
}

/* A copy of the living frame's header; 0: it cannot be one. Else the frame's size. */
static uint32_t header_of(const struct arena *a, const struct commit_source *s, uint32_t unit,
                          struct frame_header *h)
{
    uint32_t offset = unit * FRAME_ALIGN;

    if (offset + sizeof(*h) > s->bytes)
        return 0;
    memcpy(h, frame_at(a, s, unit), sizeof(*h));
    return frame_plausible(h, s->bytes - offset) ? frame_bytes(h->payload_bytes) : 0;
}

static uint32_t living_bytes(struct condense *d, const struct commit *c, const struct arena *a,
                             uint32_t source)
{
    const struct commit_source *s = &c->source[source];
    struct frame_header h;
    uint32_t sum = 0, bytes;

    for (uint32_t u = 0; (u = next_alive(d, source, u)) < SEGMENT_UNITS; u++)
        __builtin_prefetch(frame_at(a, s, u));
    for (uint32_t u = 0; (u = next_alive(d, source, u)) < SEGMENT_UNITS; u++) {
        bytes = header_of(a, s, u, &h);
        d->damaged |= bytes == 0;
        sum += bytes;
    }
    return sum;
}

/* Appends the source's living frames to the last segment, or to new ones behind it. */
static void lay_out_frames(struct condense *d, struct commit *c, const struct arena *a,
                           uint32_t source)
{
    const struct commit_source *s = &c->source[source];
    struct commit_segment *to = c->segments ? &c->segment[c->segments - 1] : NULL;
    struct frame_header h;

    if (to && (!to->condensed || to->epoch != s->epoch))
        to = NULL;
    for (uint32_t u = 0; (u = next_alive(d, source, u)) < SEGMENT_UNITS; u++) {
        uint32_t bytes = header_of(a, s, u, &h);

        if (!to || to->bytes + bytes > SEGMENT_BYTES) {
            to = &c->segment[c->segments++];
            *to = (struct commit_segment){.epoch = s->epoch, .source = source, .unit = u,
                                          .condensed = true};
        }
        to->bytes += bytes;
    }
}

static void lay_out(struct condense *d, struct commit *c, const struct arena *a)
{
    c->segments = 0;
    for (uint32_t i = 0; i < c->sources && !d->damaged; i++) {
        const struct commit_source *s = &c->source[i];
        bool ram = s->segment < a->segments;
        uint32_t living = ram ? living_bytes(d, c, a, i) : s->bytes;

        if (living >= s->bytes - s->bytes / CONDENSE_DEAD_SHARE)
            c->segment[c->segments++] =
                (struct commit_segment){.epoch = s->epoch, .source = i, .bytes = s->bytes};
        else if (!d->damaged)
            lay_out_frames(d, c, a, i);
        d->done |= living < s->bytes;
    }
}

void condense_run(struct condense *d, struct commit *c, const struct arena *a)
{
    uint32_t all = arena_segments_all(a);

    d->done = d->damaged = false;
    d->source_of = malloc(all * sizeof(*d->source_of));
    d->alive = calloc((uint64_t)c->sources * (SEGMENT_UNITS / 64), sizeof(*d->alive));
    if (!d->source_of || !d->alive)
        return;
    memset(d->source_of, 0xff, all * sizeof(*d->source_of));
    for (uint32_t i = 0; i < c->sources; i++)
        if (c->source[i].segment < a->segments)
            d->source_of[c->source[i].segment] = i;
    mark_all(d);
    lay_out(d, c, a);
}

void condense_end(struct condense *d)
{
    free(d->source_of);
    free(d->alive);
    d->source_of = NULL;
    d->alive = NULL;
}

/* ---- Copying ----------------------------------------------------------------------------- */

/* The next living frame from *source and *unit on. */
static bool find(const struct condense *d, const struct commit *c, uint32_t *source,
                 uint32_t *unit)
{
    while (*source < c->sources) {
        *unit = next_alive(d, *source, *unit);
        if (*unit < SEGMENT_UNITS)
            return true;
        ++*source;
        *unit = 0;
    }
    return false;
}

/* Its checksum, or whether that is right. */
static bool complete(struct frame_header *h, bool verify)
{
    if (h->crc == 0)
        h->crc = frame_crc(h);
    else if (verify)
        return h->crc == frame_crc(h);
    return true;
}

bool condense_copy(const struct condense *d, const struct commit *c, const struct arena *a,
                   struct commit_segment *s, uint8_t *to)
{
    uint32_t source = s->source, unit = s->unit;

    s->crc = 0;
    for (uint32_t at = 0; at < s->bytes;) {
        struct frame_header *h = (struct frame_header *)(to + at);
        const struct commit_source *from;
        const uint8_t *frame;
        uint32_t bytes;

        if (!find(d, c, &source, &unit))
            return false;
        from = &c->source[source];
        frame = frame_at(a, from, unit++);
        bytes = header_of(a, from, unit - 1, h);
        if (bytes == 0 || bytes > s->bytes - at)
            return false;
        if (find(d, c, &source, &unit))
            for (uint32_t i = 0; i < 4; i++) /* the rest the processor sees coming */
                __builtin_prefetch(frame_at(a, &c->source[source], unit) + i * 64);
        memcpy(h + 1, frame + sizeof(*h), bytes - sizeof(*h));
        if (!complete(h, from->verify))
            return false;
        s->crc = checksum_crc32c(s->crc, h, sizeof(*h));
        at += bytes;
    }
    return true;
}
