/* apply_sort.c - what a pass of apply writes: of all sectors in its epochs the newest version,
 * in order of place. The helper's part; the epochs are frozen, so nobody changes their indexes. */
#include <stdlib.h>

#include "group.h"
#include "mutant.h"

/* By place; of one block the newest epoch first. */
static int by_place(const void *a, const void *b)
{
    const struct apply_entry *x = a, *y = b;

    if (x->place != y->place)
        return x->place < y->place ? -1 : 1;
    if (mutant(MUTANT_APPLY_BACKWARDS))
        return x->rank < y->rank ? -1 : 1;
    return x->rank > y->rank ? -1 : 1;
}

static bool has_ranges(const struct epoch *e)
{
    for (uint32_t i = 0; i < e->group->writers; i++)
        if (e->part[i].index.ranges.root)
            return true;
    return false;
}

/* Ranks of the pass's epochs that have zero ranges, newest first. */
static uint32_t with_ranges(const struct apply *a, uint16_t *rank)
{
    uint32_t n = 0;

    for (uint32_t i = a->end; i-- > a->first;)
        if (has_ranges(a->group->epoch[i]))
            rank[n++] = (uint16_t)(i - a->first);
    return n;
}

/* Is the block zeroed as a whole by an epoch newer than `rank`? */
static bool covered(const struct apply *a, const uint16_t *ranged, uint32_t count, uint32_t rank,
                    const struct index_slot *s)
{
    for (uint32_t i = 0; i < count && ranged[i] > rank; i++)
        if (index_in_range(epoch_index(a->group->epoch[a->first + ranged[i]], s->disk), s->disk,
                           index_slot_block(s)))
            return !mutant(MUTANT_MERGE_OLDER_THAN_ZEROES);
    return false;
}

/* Takes away what a newer epoch has written. */
static void drop_older(struct apply *a)
{
    uint64_t kept = 0, place = 0;
    uint8_t have = 0;

    for (uint64_t i = 0; i < a->entries; i++) {
        struct apply_entry e = a->entry[i];

        if (i == 0 || e.place != place)
            have = 0;
        else if (have && mutant(MUTANT_MERGE_DROPS_PARTS))
            continue;
        place = e.place;
        e.mask &= (uint8_t)~have;
        have |= e.mask;
        if (e.mask)
            a->entry[kept++] = e;
    }
    a->entries = kept;
}

static void sort(struct apply *a)
{
    if (a->entries > 1)
        qsort(a->entry, a->entries, sizeof(*a->entry), by_place);
    drop_older(a);
}

/* entry[] is full: what is older goes, and if that is not half of it, the second half of the
 * blocks is left for the next piece. */
static void make_room(struct apply *a)
{
    uint64_t keep = a->entries_max / 2;

    sort(a);
    if (a->entries <= keep)
        return;
    a->rest = a->entry[keep].place;
    while (keep > 0 && a->entry[keep - 1].place == a->rest)
        keep--;
    check(keep > 0); /* a block has eight entries at most */
    a->entries = keep;
}

static void collect(struct apply *a, const struct index *x, uint32_t rank, const uint16_t *ranged,
                    uint32_t count)
{
    struct index_cursor at = {0};
    const struct index_slot *s;

    while ((s = index_next(x, &at))) {
        uint64_t place = (uint64_t)s->disk << 48 | index_slot_block(s);

        if (place < a->from || place >= a->rest || covered(a, ranged, count, rank, s))
            continue;
        if (a->entries == a->entries_max)
            make_room(a);
        if (place < a->rest)
            a->entry[a->entries++] = (struct apply_entry){
                .place = place, .loc = s->loc, .rank = (uint16_t)rank, .mask = s->mask};
    }
}

void apply_sort(struct job *job, struct worker *w)
{
    struct apply *a = job->owner;
    uint16_t ranged[APPLY_PASS_EPOCHS];
    uint32_t count = with_ranges(a, ranged);

    (void)w;
    a->entries = 0;
    for (uint32_t rank = 0; rank < a->end - a->first; rank++)
        for (uint32_t i = 0; i < a->group->writers; i++)
            collect(a, &a->group->epoch[a->first + rank]->part[i].index, rank, ranged, count);
    sort(a);
}
