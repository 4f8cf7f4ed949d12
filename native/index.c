/* index.c - see index.h. */
#include "index.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS_MIN 64u          /* of a table of one shard: 4 KiB */
#define SHARD_BUCKETS_MIN 4u
#define INDEX_BYTES_EXPECTED (sizeof(struct index_bucket) / 4) /* of a slot */

void index_init(struct index *x, struct index_memory *m)
{
    *x = (struct index){.memory = m};
}

static void count(struct index *x, int64_t bytes)
{
    x->bytes += (uint64_t)bytes;
    x->growth = (int64_t)(x->bytes / 2 + x->largest * sizeof(struct index_bucket));
    index_memory_count(x->memory, bytes);
}

static void free_shards(struct index *x, struct index_shard *shard, uint32_t shards)
{
    int64_t bytes = (int64_t)(shards * sizeof(*shard));

    for (uint32_t i = 0; i < shards; i++) {
        bytes += (int64_t)(shard[i].buckets * sizeof(struct index_bucket));
        free(shard[i].bucket);
    }
    free(shard);
    count(x, -bytes);
}

void index_free(struct index *x)
{
    if (x->shard)
        free_shards(x, x->shard, x->shards);
    check(x->bytes == 0);
    ranges_free(&x->ranges, x->memory);
    index_init(x, x->memory);
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

static int shard_create(struct index *x, struct index_shard *s, uint32_t buckets)
{
    uint64_t bytes = buckets * sizeof(*s->bucket);

    s->bucket = aligned_alloc(sizeof(*s->bucket), bytes);
    if (!s->bucket)
        return -ENOMEM;
    memset(s->bucket, 0, bytes);
    s->buckets = buckets;
    s->used = 0;
    if (buckets > x->largest)
        x->largest = buckets;
    count(x, (int64_t)bytes);
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
    int error = shard_create(x, s, old.buckets + old.buckets / 2);

    if (error) {
        *s = old;
        return error;
    }
    x->used -= old.used;
    move_slots(x, &old);
    free(old.bucket);
    count(x, -(int64_t)(old.buckets * sizeof(*old.bucket)));
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
    struct index_shard *old = x->shard, *more = calloc(shards, sizeof(*more));
    uint32_t slots[INDEX_SHARDS] = {0}, old_shards = x->shards;

    if (!more)
        return -ENOMEM;
    count_slots(x, shards, slots);
    count(x, (int64_t)(shards * sizeof(*more)));
    x->largest = 0;
    for (uint32_t i = 0; i < shards; i++) {
        uint32_t least = slots[i] / 4 + SHARD_BUCKETS_MIN;

        if (shard_create(x, &more[i], least > buckets ? least : buckets)) {
            x->largest = old ? old->buckets : 0;
            free_shards(x, more, shards);
            return -ENOMEM;
        }
    }
    x->shard = more;
    x->shards = shards;
    x->shift = shards > 1 ? INDEX_SHARD_BITS : 0;
    x->used = 0;
    for (uint32_t i = 0; i < old_shards; i++)
        move_slots(x, &old[i]);
    if (old)
        free_shards(x, old, old_shards);
    return 0;
}

int index_reserve(struct index *x, uint64_t expected)
{
    uint64_t left = x->memory->left > 0 ? (uint64_t)x->memory->left : 0, buckets;

    if (x->shards > 0)
        return 0;
    if (expected > left / 4 / INDEX_BYTES_EXPECTED)
        expected = left / 4 / INDEX_BYTES_EXPECTED;
    buckets = expected / 4 + 1;
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

int index_put_range(struct index *x, uint32_t disk, uint64_t first, uint64_t end, uint32_t flags,
                    arena_loc loc, const struct index_watch *watch, void *owner)
{
    int error = ranges_put(&x->ranges, x->memory, disk, first, end, flags, loc, watch->changed,
                           owner);

    if (!error)
        empty_slots(x, disk, first, end, watch->emptied, owner);
    return error;
}
