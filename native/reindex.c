/* reindex.c - epoch_reindex(): the index of an epoch from the frames in its segments.
 *
 * Frames come in no order of time: the packer moves them about, and a kill may have left two
 * copies of one. Their seq is the order; equal ones say the same. A radix sort, since a restart
 * of a full arena must not keep a guest waiting: millions of frames take tenths of a second.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "group.h"
#include "mutant.h"

/* A block's version, or that of a run of zero blocks. */
struct seen {
    uint64_t seq;
    uint64_t block;
    arena_loc loc;
    uint8_t disk, mask;
    uint8_t run;            /* blocks, or RANGE */
    uint8_t flags;
};
_Static_assert(sizeof(struct seen) == 24, "millions of them");
#define RANGE 0u
_Static_assert(ZERO_SLOTS_MAX < 256 && CLUSTER_BLOCKS < 256, "run");

struct all_seen {
    struct seen *at;
    uint64_t count, max;
};

static int add(struct all_seen *all, struct seen one)
{
    if (all->count == all->max) {
        uint64_t more = all->max ? all->max * 2 : 4096;
        struct seen *grown = realloc(all->at, more * sizeof(*grown));

        if (!grown)
            return -ENOMEM;
        all->at = grown;
        all->max = more;
    }
    all->at[all->count++] = one;
    return 0;
}

static int add_frame(struct all_seen *all, const struct frame_header *h, arena_loc loc)
{
    struct seen one = {.seq = h->seq, .block = h->block, .loc = loc, .disk = h->disk,
                       .mask = h->mask, .flags = h->flags};
    int error = 0;

    if (h->kind != FRAME_CLUSTER) {
        one.run = h->blocks > ZERO_SLOTS_MAX ? RANGE : (uint8_t)h->blocks;
        return add(all, one);
    }
    one.run = 1;
    for (uint32_t i = 0; i < h->blocks && !error; i++) {
        one.seq = cluster_seq(h)[i];
        one.block = h->block + i;
        error = add(all, one);
    }
    return error;
}

/* Is all of the frame on a disk of the group? Applied, it would go beyond the image. */
static bool on_disk(const struct group *g, const struct frame_header *h)
{
    uint64_t end = (h->block + h->blocks - 1) * BLOCK_SECTORS + 32 -
                   (uint32_t)__builtin_clz(h->mask);

    return h->disk < g->config.disks && end * SECTOR_BYTES <= g->config.disk[h->disk].size_bytes;
}

static int collect(struct group *g, struct epoch *e, const struct segment_list *l,
                   struct all_seen *all)
{
    for (uint32_t n = 0, segment = l->first; n < l->count; n++, segment = g->arena.next[segment]) {
        uint32_t tail = arena_tail(&g->arena, segment), offset = 0, at = 0;
        struct frame_header *h;

        while ((h = arena_frame_next(&g->arena, segment, tail, &offset))) {
            int error = on_disk(g, h) ? add_frame(all, h, arena_loc_of(segment, at)) : -EILSEQ;

            if (error)
                return error;
            at = offset;
        }
        if (offset != tail)
            return -EILSEQ; /* below a published tail all frames are whole */
        e->stored_bytes += tail;
    }
    return 0;
}

#define DIGIT_BITS 11u
#define DIGITS (1u << DIGIT_BITS)

/* One pass of the sort, stable. */
static void sort_digit(const struct seen *from, struct seen *to, uint64_t count, uint64_t least,
                       uint32_t shift)
{
    uint64_t place[DIGITS] = {0}, sum = 0;

    for (uint64_t i = 0; i < count; i++)
        place[(from[i].seq - least) >> shift & (DIGITS - 1)]++;
    for (uint32_t d = 0; d < DIGITS; d++) {
        uint64_t here = place[d];

        place[d] = sum;
        sum += here;
    }
    for (uint64_t i = 0; i < count; i++)
        to[place[(from[i].seq - least) >> shift & (DIGITS - 1)]++] = from[i];
}

/* By seq, oldest first. */
static int sort(struct all_seen *all)
{
    uint64_t least = UINT64_MAX, most = 0;
    bool sorted = true;
    struct seen *other;

    for (uint64_t i = 0; i < all->count; i++) {
        uint64_t seq = all->at[i].seq;

        sorted = sorted && seq >= most;
        least = seq < least ? seq : least;
        most = seq > most ? seq : most;
    }
    if (sorted)
        return 0;
    other = malloc(all->count * sizeof(*other));
    if (!other)
        return -ENOMEM;
    for (uint32_t shift = 0; shift < 64 && (most - least) >> shift > 0; shift += DIGIT_BITS) {
        struct seen *from = all->at;

        sort_digit(from, other, all->count, least, shift);
        all->at = other;
        other = from;
    }
    free(other);
    return 0;
}

static int enter(struct group *g, struct epoch *e, const struct seen *s)
{
    if (s->run == RANGE) {
        const struct frame_header *h = arena_frame(&g->arena, s->loc);

        g->arena.use[arena_loc_segment(s->loc)].slots++; /* never dies */
        return epoch_put_range(g, e, h->disk, h->block, h->block + h->blocks, h->flags);
    }
    for (uint32_t i = 0; i < s->run; i++) {
        struct index_slot *slot = index_slot(&e->index, s->disk, s->block + i, 0);

        if (!slot)
            return -ENOMEM;
        epoch_point(g, e, slot, s->loc, s->mask);
    }
    return 0;
}

#define AHEAD 8u /* lookups under way at once */

static int enter_all(struct group *g, struct epoch *e, const struct all_seen *all)
{
    int error = index_reserve(&e->index, all->count);

    for (uint64_t i = 0; i < all->count && !error; i++) {
        if (i + AHEAD < all->count)
            index_prefetch(&e->index, all->at[i + AHEAD].disk, all->at[i + AHEAD].block);
        error = enter(g, e, &all->at[i]);
    }
    return error;
}

int epoch_reindex(struct group *g, struct epoch *e)
{
    struct all_seen all = {0};
    int error;

    error = collect(g, e, &e->raw_list, &all);
    if (!error)
        error = collect(g, e, &e->kept_list, &all);
    if (!error)
        error = sort(&all);
    if (!error && all.count > 0) {
        if (all.at[0].seq < g->seq) /* written before an older epoch's: not of this epoch */
            error = -EILSEQ;
        if (all.at[all.count - 1].seq >= g->seq && !mutant(MUTANT_FORGET_SEQ))
            g->seq = all.at[all.count - 1].seq + 1;
        if (!error)
            error = enter_all(g, e, &all);
    }
    free(all.at);
    if (!error && !e->frozen)
        pack_recounted(g, e);
    return error;
}
