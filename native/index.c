/* index.c - see index.h. */
#include "index.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS_MIN 64u

__extension__ typedef unsigned __int128 wide;

/* Position in order of the hash: growing the table keeps the order, so moving its slots
 * walks both tables from front to back. */
static uint64_t home(const struct index *x, uint32_t disk, uint64_t block)
{
    uint64_t h = (block | (uint64_t)disk << 48) * 0x9e3779b97f4a7c15ull;

    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93ull;
    h ^= h >> 32;
    return (uint64_t)(((wide)h * x->buckets) >> 64);
}

void index_free(struct index *x)
{
    free(x->bucket);
    free(x->range);
    memset(x, 0, sizeof(*x));
}

uint64_t index_bytes(const struct index *x)
{
    return x->buckets * sizeof(struct index_bucket) + x->ranges_max * sizeof(struct index_range);
}

struct index_slot *index_find(const struct index *x, uint32_t disk, uint64_t block)
{
    uint32_t low = (uint32_t)block;
    uint16_t high = (uint16_t)(block >> 32);
    uint64_t b;

    if (x->buckets == 0)
        return NULL;
    for (b = home(x, disk, block);; b = b + 1 == x->buckets ? 0 : b + 1) {
        struct index_bucket *bucket = &x->bucket[b];

        for (uint32_t i = 0; i < bucket->count; i++) {
            struct index_slot *s = &bucket->slot[i];
            if (s->block_low == low && s->block_high == high && s->disk == disk)
                return s;
        }
        if (bucket->count < INDEX_BUCKET_SLOTS)
            return NULL;
    }
}

/* Appends a slot that is not there yet; the table has room. */
static void add(struct index *x, const struct index_slot *s)
{
    uint64_t b = home(x, s->disk, index_slot_block(s));

    while (x->bucket[b].count == INDEX_BUCKET_SLOTS)
        b = b + 1 == x->buckets ? 0 : b + 1;
    x->bucket[b].slot[x->bucket[b].count++] = *s;
    x->used++;
}

static int grow(struct index *x, uint64_t buckets)
{
    struct index old = *x;
    struct index_bucket *fresh;

    fresh = aligned_alloc(64, buckets * sizeof(*fresh));
    if (!fresh)
        return -ENOMEM;
    memset(fresh, 0, buckets * sizeof(*fresh));
    x->bucket = fresh;
    x->buckets = buckets;
    x->used = 0;
    for (uint64_t b = 0; b < old.buckets; b++)
        for (uint32_t i = 0; i < old.bucket[b].count; i++)
            if (old.bucket[b].slot[i].mask) /* emptied slots end here */
                add(x, &old.bucket[b].slot[i]);
    free(old.bucket);
    return 0;
}

/* At most four of five slots of all buckets are used: longer runs of full buckets cost
 * more misses, a lower bound more memory. */
int index_reserve(struct index *x, uint64_t expected)
{
    uint64_t buckets;

    if (likely(x->used + 1 <= x->buckets * 4))
        return 0;
    buckets = x->buckets + x->buckets / 2;
    if (x->buckets == 0)
        buckets = expected / 4 + 1;
    return grow(x, buckets < BUCKETS_MIN ? BUCKETS_MIN : buckets);
}

int index_put(struct index *x, uint32_t disk, uint64_t block, arena_loc loc, uint8_t mask)
{
    struct index_slot *s = index_find(x, disk, block);
    struct index_slot fresh;
    int error;

    if (s) {
        s->loc = loc;
        s->mask = mask;
        return 0;
    }
    error = index_reserve(x, 0);
    if (error)
        return error;
    fresh = (struct index_slot){.block_low = (uint32_t)block, .block_high = (uint16_t)(block >> 32),
                                .disk = (uint8_t)disk, .loc = loc, .mask = mask};
    add(x, &fresh);
    return 0;
}

/* First range that ends behind the block: the one that can hold it. */
static uint32_t range_position(const struct index *x, uint32_t disk, uint64_t block)
{
    uint32_t low = 0, high = x->ranges;

    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        const struct index_range *r = &x->range[mid];

        if (r->disk < disk || (r->disk == disk && r->end <= block))
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

bool index_in_range(const struct index *x, uint32_t disk, uint64_t block)
{
    uint32_t i;

    if (likely(x->ranges == 0))
        return false;
    i = range_position(x, disk, block);
    return i < x->ranges && x->range[i].disk == disk && x->range[i].first <= block;
}

static void empty_slots(struct index *x, uint32_t disk, uint64_t first, uint64_t end)
{
    if (end - first < x->buckets * 2) {
        for (uint64_t block = first; block < end; block++) {
            struct index_slot *s = index_find(x, disk, block);
            if (s)
                s->mask = 0;
        }
        return;
    }
    for (uint64_t b = 0; b < x->buckets; b++)
        for (uint32_t i = 0; i < x->bucket[b].count; i++) {
            struct index_slot *s = &x->bucket[b].slot[i];
            uint64_t block = index_slot_block(s);
            if (s->disk == disk && block >= first && block < end)
                s->mask = 0;
        }
}

static void range_insert(struct index *x, uint32_t at, struct index_range r)
{
    memmove(&x->range[at + 1], &x->range[at], (x->ranges - at) * sizeof(r));
    x->range[at] = r;
    x->ranges++;
}

int index_put_range(struct index *x, uint32_t disk, uint64_t first, uint64_t end, uint32_t flags)
{
    struct index_range put = {.first = first, .end = end, .disk = disk, .flags = flags};
    uint32_t at, last;

    if (x->ranges + 2 > x->ranges_max) { /* the new one, and one that it splits */
        uint32_t max = x->ranges_max ? x->ranges_max * 2 : 16;
        struct index_range *more = realloc(x->range, max * sizeof(*more));
        if (!more)
            return -ENOMEM;
        x->range = more;
        x->ranges_max = max;
    }
    empty_slots(x, disk, first, end);
    at = range_position(x, disk, first);
    if (at < x->ranges && x->range[at].disk == disk && x->range[at].first < first) {
        struct index_range right = x->range[at];

        x->range[at].end = first; /* keep what is left of the new range */
        at++;
        if (right.end > end) {
            right.first = end;
            range_insert(x, at, right);
        }
    }
    last = at;
    while (last < x->ranges && x->range[last].disk == disk && x->range[last].end <= end)
        last++;
    if (last < x->ranges && x->range[last].disk == disk && x->range[last].first < end)
        x->range[last].first = end;
    memmove(&x->range[at], &x->range[last], (x->ranges - last) * sizeof(put));
    x->ranges -= last - at;
    /* Neighbours with the same flags become one: a walk of DISCARDs stays one entry. */
    if (at > 0 && x->range[at - 1].disk == disk && x->range[at - 1].end == first &&
        x->range[at - 1].flags == flags) {
        x->range[--at].end = end;
    } else {
        range_insert(x, at, put);
    }
    if (at + 1 < x->ranges && x->range[at + 1].disk == disk && x->range[at + 1].first == end &&
        x->range[at + 1].flags == flags) {
        x->range[at].end = x->range[at + 1].end;
        memmove(&x->range[at + 1], &x->range[at + 2], (x->ranges - at - 2) * sizeof(put));
        x->ranges--;
    }
    return 0;
}
