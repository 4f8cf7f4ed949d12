/* reindex.c - epoch_reindex(): the index of an epoch from the frames in its segments.
 *
 * Frames come in no order of time: the packer moves them about, and a kill may have left two
 * copies of one. Their seq is the order; equal ones say the same. A radix sort in place, since a
 * restart of a full arena must not keep a guest waiting, nor need more memory than the index.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "group.h"
#include "mutant.h"

/* A block's version, or that of a run of zero blocks. */
struct seen {
    uint64_t seq;
    arena_loc loc;
    uint32_t member;        /* of a cluster */
};
_Static_assert(sizeof(struct seen) == 16, "less than the index, for millions of blocks");

struct all_seen {
    struct seen *at;        /* NULL: only counted */
    uint64_t count, max;
};

/* Is all of the frame on a disk of the group? Applied, it would go beyond the image. */
static bool on_disk(const struct group *g, const struct frame_header *h)
{
    uint64_t end = (h->block + h->blocks - 1) * BLOCK_SECTORS + 32 -
                   (uint32_t)__builtin_clz(h->mask);

    return h->disk < g->config.disks && end * SECTOR_BYTES <= g->config.disk[h->disk].size_bytes;
}

/* False: there are more than were counted, so the spill file has changed under us. */
static bool add_frame(struct all_seen *all, const struct frame_header *h, arena_loc loc)
{
    uint32_t members = h->kind == FRAME_CLUSTER ? h->blocks : 1;

    for (uint32_t i = 0; i < members; i++) {
        uint64_t seq = h->kind == FRAME_CLUSTER ? cluster_seq(h)[i] : h->seq;

        if (seq == 0)
            continue; /* a hole */
        if (all->at && all->count == all->max)
            return false;
        if (all->at)
            all->at[all->count] = (struct seen){.seq = seq, .loc = loc, .member = i};
        all->count++;
    }
    return true;
}

/* Can it be expanded? Asked when frames are counted: later nobody can be told in time. */
static bool dictionary_there(struct group *g, const struct frame_header *h)
{
    uint32_t id = frame_dictionary(h);
    struct dictionary *d = id ? dictionary_by_id(&g->dictionaries, id) : NULL;

    if (d)
        d->named = true;
    else if (id)
        g->dictionary_missing = id;
    return d || !id;
}

static int collect_list(struct group *g, const struct segment_list *l, struct all_seen *all)
{
    for (uint32_t n = 0, segment = l->first; n < l->count; n++, segment = g->arena.next[segment]) {
        uint32_t tail = arena_tail(&g->arena, segment), at = 0;

        if (!all->at) /* one call instead of a page fault a frame; no harm where it is unknown */
            madvise(arena_segment(&g->arena, segment), page_round_up(tail), MADV_POPULATE_READ);
        while (at < tail) {
            arena_loc loc = arena_loc_of(segment, at);
            const struct frame_header *h = frame_get(&g->writer[0].expand, &g->arena, loc);

            if (!h || !frame_plausible(h, tail - at) || !on_disk(g, h) || !add_frame(all, h, loc))
                return -EILSEQ; /* below a published tail all frames are whole */
            if (!all->at && !dictionary_there(g, h))
                return -ENOKEY;
            at += frame_bytes(h->payload_bytes);
        }
    }
    return 0;
}

static int collect(struct group *g, struct epoch *e, struct all_seen *all)
{
    int error = collect_list(g, &e->part[0].raw_list, all);

    if (!error)
        error = collect_list(g, &e->kept_list, all);
    return error ? error : collect_list(g, &e->spill_list, all);
}

/* ---- By seq, oldest first ------------------------------------------------------------------ */

#define FEW 32u

static void sort_few(struct seen *s, uint64_t count)
{
    for (uint64_t i = 1; i < count; i++) {
        struct seen one = s[i];
        uint64_t at = i;

        for (; at > 0 && s[at - 1].seq > one.seq; at--)
            s[at] = s[at - 1];
        s[at] = one;
    }
}

/* By the byte at `shift` in place ("American flag"), then each of its parts by the next one. */
static void sort_from(struct seen *s, uint64_t count, uint64_t least, uint32_t shift)
{
    uint64_t next[256] = {0}, end[256], sum = 0;

    if (count <= FEW) {
        sort_few(s, count);
        return;
    }
    for (uint64_t i = 0; i < count; i++)
        next[(s[i].seq - least) >> shift & 255]++;
    for (uint32_t d = 0; d < 256; d++) {
        uint64_t here = next[d];

        next[d] = sum;
        sum += here;
        end[d] = sum;
    }
    for (uint32_t d = 0; d < 256; d++)
        while (next[d] < end[d]) {
            struct seen one = s[next[d]];
            uint32_t to;

            while ((to = (one.seq - least) >> shift & 255) != d) {
                struct seen other = s[next[to]];

                s[next[to]++] = one;
                one = other;
            }
            s[next[d]++] = one;
        }
    for (uint32_t d = 0; shift > 0 && d < 256; d++) {
        uint64_t first = d > 0 ? end[d - 1] : 0;

        sort_from(s + first, end[d] - first, least, shift - 8);
    }
}

static void sort(struct all_seen *all)
{
    uint64_t least = UINT64_MAX, most = 0;
    bool sorted = true;

    for (uint64_t i = 0; i < all->count; i++) {
        uint64_t seq = all->at[i].seq;

        sorted = sorted && seq >= most;
        least = seq < least ? seq : least;
        most = seq > most ? seq : most;
    }
    if (!sorted)
        sort_from(all->at, all->count, least,
                  (63 - (uint32_t)__builtin_clzll((most - least) | 1)) / 8 * 8);
}

/* ---- Into the index ------------------------------------------------------------------------ */

/* A frame that was collected, to look at; of the spill file a copy, for it may have changed. */
static const struct frame_header *seen_frame(struct group *g, const struct seen *s,
                                             struct frame_header *copy)
{
    const struct frame_header *h = arena_frame(&g->arena, s->loc);

    if (!arena_spilled(&g->arena, s->loc))
        return h;
    *copy = *h;
    return frame_plausible(copy, SEGMENT_BYTES) && on_disk(g, copy) && s->member < copy->blocks
               ? copy : NULL;
}

static int enter(struct group *g, struct epoch *e, const struct seen *s)
{
    struct frame_header copy;
    const struct frame_header *h = seen_frame(g, s, &copy);
    struct epoch_part *p;
    struct index_slot *slot;
    struct writer *w;
    uint32_t blocks;

    if (!h)
        return -EIO;
    w = group_writer(g, h->disk);
    p = &e->part[w->number];
    blocks = h->kind == FRAME_CLUSTER ? 1 : h->blocks;
    if (blocks > 1)
        return epoch_put_range(w, p, h->disk, h->block, h->block + blocks, h->flags, s->loc);
    slot = index_slot(&p->index, h->disk, h->block + s->member, 0);
    if (!slot)
        return -ENOMEM;
    epoch_point(w, p, slot, s->loc, h->mask);
    return 0;
}

#define AHEAD 8u /* lookups under way at once */

/* One entry's frame, and a nearer one's slot, under way to the cache. */
static void prepare(struct group *g, struct epoch *e, const struct all_seen *all, uint64_t i)
{
    const struct frame_header *h;

    if (i + 2 * AHEAD < all->count)
        prefetch(arena_frame(&g->arena, all->at[i + 2 * AHEAD].loc));
    if (i + AHEAD >= all->count)
        return;
    h = arena_frame(&g->arena, all->at[i + AHEAD].loc);
    index_prefetch(epoch_index(e, h->disk), h->disk, h->block + all->at[i + AHEAD].member);
}

static int enter_all(struct group *g, struct epoch *e, const struct all_seen *all)
{
    int error = 0;

    for (uint32_t i = 0; i < g->writers && !error; i++)
        error = index_reserve(&e->part[i].index, all->count / g->writers);

    for (uint64_t i = 0; i < all->count && !error; i++) {
        prepare(g, e, all, i);
        error = enter(g, e, &all->at[i]);
    }
    return error;
}

static int enter_epoch(struct group *g, struct epoch *e, struct all_seen *all)
{
    int error = collect(g, e, all);
    uint64_t last;

    if (error)
        return error;
    if (all->count == 0)
        return -EILSEQ;
    sort(all);
    if (all->at[0].seq < g->seq) /* written before an older epoch's: not of this epoch */
        return -EILSEQ;
    last = all->at[all->count - 1].seq;
    if (last >= g->seq && !mutant(MUTANT_FORGET_SEQ))
        g->seq = last + 1;
    return enter_all(g, e, all);
}

static void count_stored(struct group *g, struct epoch *e, const struct segment_list *l)
{
    for (uint32_t n = 0, segment = l->first; n < l->count; n++, segment = g->arena.next[segment])
        e->stored_bytes += arena_tail(&g->arena, segment);
}

int epoch_reindex(struct group *g, struct epoch *e)
{
    struct all_seen all = {0};
    int error = collect(g, e, &all);

    count_stored(g, e, &e->part[0].raw_list);
    count_stored(g, e, &e->kept_list);
    count_stored(g, e, &e->spill_list);
    if (!error && all.count > 0) {
        all.at = malloc(all.count * sizeof(*all.at));
        all.max = all.count;
        all.count = 0;
        error = all.at ? enter_epoch(g, e, &all) : -ENOMEM;
        free(all.at);
    }
    if (!error && !e->frozen)
        pack_recounted(g, e);
    return error;
}
