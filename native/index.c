/* index.c - see index.h. */
#include "index.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS_MIN 64u          /* of a table of one shard: 4 KiB */
#define SHARD_BUCKETS_MIN 4u

static void free_shards(struct index_shard *shard, uint32_t shards)
{
    for (uint32_t i = 0; shard && i < shards; i++)
        free(shard[i].bucket);
    free(shard);
}

void index_free(struct index *x)
{
    free_shards(x->shard, x->shards);
    free(x->range);
    memset(x, 0, sizeof(*x));
}

uint64_t index_bytes(const struct index *x)
{
    uint64_t bytes = x->ranges_max * sizeof(struct index_range);

    for (uint32_t i = 0; i < x->shards; i++)
        bytes += sizeof(struct index_shard) + x->shard[i].buckets * sizeof(struct index_bucket);
    return bytes;
}

struct index_slot *index_next(const struct index *x, struct index_cursor *at)
{
    for (; at->shard < x->shards; at->shard++, at->bucket = 0)
        for (; at->bucket < x->shard[at->shard].buckets; at->bucket++, at->slot = 0) {
            struct index_bucket *b = &x->shard[at->shard].bucket[at->bucket];

            while (at->slot < b->count)
                if (b->slot[at->slot++].mask)
                    return &b->slot[at->slot - 1];
        }
    return NULL;
}

/* The slot, or NULL and the bucket where it would be added. */
static inline struct index_slot *find(const struct index_shard *s, uint32_t home, uint32_t disk,
                                      uint64_t block, struct index_bucket **place)
{
    uint32_t low = (uint32_t)block, b = home;
    uint16_t high = (uint16_t)(block >> 32);

    for (;; b = b + 1 == s->buckets ? 0 : b + 1) {
        struct index_bucket *bucket = &s->bucket[b];

        for (uint32_t i = 0; i < bucket->count; i++) {
            struct index_slot *slot = &bucket->slot[i];

            if (slot->block_low == low && slot->block_high == high && slot->disk == disk)
                return slot;
        }
        if (bucket->count < INDEX_BUCKET_SLOTS) {
            *place = bucket;
            return NULL;
        }
    }
}

struct index_slot *index_find(const struct index *x, uint32_t disk, uint64_t block)
{
    uint64_t hash = index_hash(disk, block);
    const struct index_shard *s;
    struct index_bucket *place;

    if (x->shards == 0)
        return NULL;
    s = index_shard_of(x, hash);
    return find(s, index_home(x, s, hash), disk, block, &place);
}

/* ---- Growing --------------------------------------------------------------------------- */

static int shard_create(struct index_shard *s, uint32_t buckets)
{
    s->bucket = aligned_alloc(sizeof(*s->bucket), buckets * sizeof(*s->bucket));
    if (!s->bucket)
        return -ENOMEM;
    memset(s->bucket, 0, buckets * sizeof(*s->bucket));
    s->buckets = buckets;
    s->used = 0;
    return 0;
}

/* Slots of an old table into the new shards, which have room. */
static void move_slots(struct index *x, const struct index_shard *from)
{
    for (uint32_t b = 0; b < from->buckets; b++)
        for (uint32_t i = 0; i < from->bucket[b].count; i++) {
            const struct index_slot *slot = &from->bucket[b].slot[i];
            uint64_t block = index_slot_block(slot), hash = index_hash(slot->disk, block);
            struct index_shard *s = index_shard_of(x, hash);
            struct index_bucket *place;

            if (!slot->mask) /* emptied slots end here */
                continue;
            check(!find(s, index_home(x, s, hash), slot->disk, block, &place));
            place->slot[place->count++] = *slot;
            s->used++;
            x->used++;
        }
}

/* At most four of five slots of all buckets are used: longer runs of full buckets cost
 * more misses, a lower bound more memory. */
static inline bool full(const struct index_shard *s)
{
    return s->used >= s->buckets * 4;
}

static int grow_shard(struct index *x, struct index_shard *s)
{
    struct index_shard old = *s;
    int error = shard_create(s, old.buckets + old.buckets / 2);

    if (error) {
        *s = old;
        return error;
    }
    x->used -= old.used;
    move_slots(x, &old);
    free(old.bucket);
    return 0;
}

/* How many slots of the old table go to each of the new shards: a guest may have chosen its
 * blocks so that they are far from even. */
static void count_slots(const struct index *old, uint32_t shards, uint32_t *count)
{
    struct index_cursor at = {0};
    const struct index_slot *s;

    while ((s = index_next(old, &at)))
        count[index_hash(s->disk, index_slot_block(s)) >> (64 - INDEX_SHARD_BITS) &
              (shards - 1)]++;
}

/* A new set of shards, each with so many buckets or what it needs, takes over what there is. */
static int reshard(struct index *x, uint32_t shards, uint32_t buckets)
{
    uint32_t count[INDEX_SHARDS] = {0};
    struct index old = *x;

    count_slots(&old, shards, count);
    x->shard = calloc(shards, sizeof(*x->shard));
    x->shards = shards;
    for (uint32_t i = 0; x->shard && i < shards; i++) {
        uint32_t least = count[i] / 4 + SHARD_BUCKETS_MIN;

        if (shard_create(&x->shard[i], least > buckets ? least : buckets)) {
            free_shards(x->shard, i);
            x->shard = NULL;
        }
    }
    if (!x->shard) {
        *x = old;
        return -ENOMEM;
    }
    x->shift = shards > 1 ? INDEX_SHARD_BITS : 0;
    x->used = 0;
    for (uint32_t i = 0; i < old.shards; i++)
        move_slots(x, &old.shard[i]);
    free_shards(old.shard, old.shards);
    return 0;
}

int index_reserve(struct index *x, uint64_t expected)
{
    uint64_t buckets = expected / 4 + 1;

    if (x->shards > 0)
        return 0;
    if (expected <= INDEX_SHARD_SLOTS)
        return reshard(x, 1, buckets < BUCKETS_MIN ? BUCKETS_MIN : (uint32_t)buckets);
    return reshard(x, INDEX_SHARDS, (uint32_t)(buckets / INDEX_SHARDS + SHARD_BUCKETS_MIN));
}

/* The hash's shard is full. */
static int make_room(struct index *x, uint64_t hash)
{
    struct index_shard *s = index_shard_of(x, hash);

    if (x->shards == 1 && s->used >= INDEX_SHARD_SLOTS)
        return reshard(x, INDEX_SHARDS, s->buckets * 5 / 4 / INDEX_SHARDS);
    return grow_shard(x, s);
}

struct index_slot *index_slot(struct index *x, uint32_t disk, uint64_t block, uint64_t expected)
{
    uint64_t hash = index_hash(disk, block);
    struct index_slot *slot;
    struct index_bucket *place;
    struct index_shard *s;

    if (unlikely(x->shards == 0) && index_reserve(x, expected))
        return NULL;
    s = index_shard_of(x, hash);
    slot = find(s, index_home(x, s, hash), disk, block, &place);
    if (slot)
        return slot;
    while (unlikely(full(s))) { /* a shard of a table just cut may be, too */
        if (make_room(x, hash))
            return NULL;
        s = index_shard_of(x, hash);
        find(s, index_home(x, s, hash), disk, block, &place);
    }
    slot = &place->slot[place->count++];
    *slot = (struct index_slot){.block_low = (uint32_t)block, .disk = (uint8_t)disk,
                                .block_high = (uint16_t)(block >> 32)};
    s->used++;
    x->used++;
    return slot;
}

int index_put(struct index *x, uint32_t disk, uint64_t block, arena_loc loc, uint8_t mask)
{
    struct index_slot *s = index_slot(x, disk, block, 0);

    if (!s)
        return -ENOMEM;
    s->loc = loc;
    s->mask = mask;
    return 0;
}

/* ---- Zero ranges ------------------------------------------------------------------------ */

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

typedef void emptied_fn(void *owner, const struct index_slot *s);

static void empty_slot(struct index_slot *s, emptied_fn *emptied, void *owner)
{
    if (!s || !s->mask)
        return;
    emptied(owner, s);
    s->mask = 0;
}

static void empty_slots(struct index *x, uint32_t disk, uint64_t first, uint64_t end,
                        emptied_fn *emptied, void *owner)
{
    struct index_cursor at = {0};
    struct index_slot *s;

    if (end - first < x->used / 2) {
        for (uint64_t block = first; block < end; block++)
            empty_slot(index_find(x, disk, block), emptied, owner);
        return;
    }
    while ((s = index_next(x, &at)))
        if (s->disk == disk && index_slot_block(s) >= first && index_slot_block(s) < end)
            empty_slot(s, emptied, owner);
}

static void range_insert(struct index *x, uint32_t at, struct index_range r)
{
    memmove(&x->range[at + 1], &x->range[at], (x->ranges - at) * sizeof(r));
    x->range[at] = r;
    x->ranges++;
}

int index_put_range(struct index *x, uint32_t disk, uint64_t first, uint64_t end, uint32_t flags,
                    emptied_fn *emptied, void *owner)
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
    empty_slots(x, disk, first, end, emptied, owner);
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
