/* The block index against plain arrays, and its promise about memory. */
#include "support.h"

#include "index.h"

#define BYTES_A_BLOCK 24u

static struct index_memory memory = {.limit = 1ll << 40, .left = 1ll << 40};

/* What index_put_range() tells. */
struct told {
    uint64_t emptied, cut, gone;
};

static void emptied(void *owner, const struct index_slot *s)
{
    struct told *t = owner;

    assert_true(s->mask != 0);
    t->emptied++;
}

static void changed(void *owner, arena_loc loc, bool gone)
{
    struct told *t = owner;

    (void)loc;
    t->gone += gone;
    t->cut += !gone;
}

static const struct index_watch watch = {.emptied = emptied, .changed = changed};

static void put_range(struct index *x, uint32_t disk, uint64_t first, uint64_t end, uint32_t flags,
                      arena_loc loc, struct told *t)
{
    assert_int_equal(index_put_range(x, disk, first, end, flags, loc, &watch, t), 0);
}

/* All that was taken has been counted, and is given back. */
static void end(struct index *x)
{
    assert_true((uint64_t)memory.used >= index_bytes(x));
    index_free(x);
    index_memory_free(&memory);
    assert_int_equal(memory.used, 0);
}

static void a_million_blocks_are_found_again(void **state)
{
    const uint64_t count = 1000000;
    struct dice d = dice_new(__func__);
    uint64_t first = d.state;
    struct index x = {.memory = &memory};

    (void)state;
    for (uint64_t n = 1; n <= count; n++) {
        uint64_t block = dice_next(&d) >> 16; /* 48 bits */

        assert_int_equal(index_put(&x, n % 32, block, (arena_loc)n, MASK_FULL), 0);
        if (n >= 4096 && (n & (n - 1)) == 0)
            assert_true(index_bytes(&x) <= n * BYTES_A_BLOCK);
    }
    assert_true(index_bytes(&x) <= count * BYTES_A_BLOCK);
    d.state = first;
    for (uint64_t n = 1; n <= count; n++) {
        uint64_t block = dice_next(&d) >> 16;
        const struct index_slot *s = index_find(&x, n % 32, block);

        assert_non_null(s);
        assert_int_equal(s->loc, n);
        assert_null(index_find(&x, (n + 1) % 32, block));
    }
    end(&x);
}

/* At every size, not only at powers of two: growth must not overshoot. */
static void memory_stays_in_its_budget(void **state)
{
    struct index x = {.memory = &memory};

    (void)state;
    for (uint64_t n = 1; n <= 200000; n++) {
        assert_int_equal(index_put(&x, 0, n, 1, MASK_FULL), 0);
        if (n >= 4096)
            assert_true(index_bytes(&x) <= n * BYTES_A_BLOCK);
    }
    end(&x);
}

static void the_newest_frame_of_a_block_is_kept(void **state)
{
    struct dice d = dice_new(__func__);
    struct index x = {.memory = &memory};
    static arena_loc loc[3][500];
    static uint8_t mask[3][500];

    (void)state;
    memset(mask, 0, sizeof(mask));
    for (uint32_t turn = 0; turn < 50000; turn++) {
        uint32_t disk = (uint32_t)dice_below(&d, 3), block = (uint32_t)dice_below(&d, 500);
        const struct index_slot *s = index_find(&x, disk, block);

        assert_int_equal(s ? s->mask : 0, mask[disk][block]);
        if (s)
            assert_int_equal(s->loc, loc[disk][block]);
        loc[disk][block] = turn;
        mask[disk][block] = (uint8_t)(1 + dice_below(&d, 255));
        assert_int_equal(index_put(&x, disk, block, turn, mask[disk][block]), 0);
    }
    assert_true(x.used <= 1500);
    end(&x);
}

#define MODEL_BLOCKS 400u

enum { NOTHING, SLOT, RANGE, RANGE_UNMAP };

/* What is walked: sorted, disjoint, no two that should be one, and all of it. */
static void compare_ranges(const struct index *x, uint8_t model[2][MODEL_BLOCKS])
{
    struct range_extent at = {0}, before = {.disk = UINT32_MAX};
    uint64_t walked[2][MODEL_BLOCKS] = {{0}};

    for (; ranges_next(&x->ranges, &at); before = at) {
        assert_true(at.first < at.end);
        if (before.disk == at.disk)
            assert_true(before.end < at.first || (before.end == at.first && before.flags != at.flags));
        for (uint64_t block = at.first; block < at.end; block++) {
            uint8_t is = model[at.disk][block];

            walked[at.disk][block]++;
            assert_true(is == SLOT || is == (at.flags ? RANGE_UNMAP : RANGE));
        }
    }
    for (uint32_t disk = 0; disk < 2; disk++)
        for (uint64_t block = 0; block < MODEL_BLOCKS; block++)
            assert_int_equal(walked[disk][block], index_in_range(x, disk, block));
}

static void compare(const struct index *x, uint8_t model[2][MODEL_BLOCKS])
{
    compare_ranges(x, model);
    for (uint32_t disk = 0; disk < 2; disk++)
        for (uint64_t block = 0; block < MODEL_BLOCKS; block++) {
            const struct index_slot *s = index_find(x, disk, block);
            bool slot = s && s->mask;

            assert_int_equal(slot, model[disk][block] == SLOT);
            if (!slot)
                assert_int_equal(index_in_range(x, disk, block), model[disk][block] != NOTHING);
        }
}

static void slots_and_ranges_are_like_an_array(void **state)
{
    struct dice d = dice_new(__func__);

    (void)state;
    for (uint32_t run = 0; run < 60; run++) {
        uint8_t model[2][MODEL_BLOCKS] = {{0}};
        struct index x = {.memory = &memory};

        for (uint32_t turn = 0; turn < 150; turn++) {
            uint32_t disk = (uint32_t)dice_below(&d, 2);
            uint64_t first = dice_below(&d, MODEL_BLOCKS);

            if (dice_below(&d, 3) == 0) {
                assert_int_equal(index_put(&x, disk, first, turn, MASK_FULL), 0);
                model[disk][first] = SLOT;
            } else {
                uint64_t last = first + 1 + dice_below(&d, MODEL_BLOCKS - first);
                uint32_t flags = (uint32_t)dice_below(&d, 2) * FRAME_UNMAP;
                struct told told = {0};
                uint64_t slots = 0;

                if (last - first > 40 && dice_below(&d, 4))
                    last = first + 40;
                for (uint64_t block = first; block < last; block++)
                    slots += model[disk][block] == SLOT;
                put_range(&x, disk, first, last, flags, turn, &told);
                assert_int_equal(told.emptied, slots);
                memset(&model[disk][first], flags ? RANGE_UNMAP : RANGE, last - first);
            }
            compare(&x, model);
        }
        end(&x);
    }
}

/* ---- Very many ranges -------------------------------------------------------------------- */

#define MANY_BLOCKS 300000u
#define MANY_FRAMES 120000u

/* Per block the frame that it is in, per frame how many ranges of it are left. */
struct many {
    struct ranges ranges;
    uint32_t in[MANY_BLOCKS];
    int32_t left[MANY_FRAMES + 1];
    uint64_t first[MANY_FRAMES + 1], last[MANY_FRAMES + 1];
};

static void many_changed(void *owner, arena_loc loc, bool gone)
{
    struct many *m = owner;

    assert_true(m->left[loc] > 0);
    m->left[loc] += gone ? -1 : 1;
}

static void many_put(struct many *m, uint32_t frame, uint64_t first, uint64_t last)
{
    assert_int_equal(ranges_put(&m->ranges, &memory, 3, first, last, 0, frame, many_changed, m), 0);
    m->left[frame]++;
    m->first[frame] = first;
    m->last[frame] = last;
    for (uint64_t block = first; block < last; block++)
        m->in[block] = frame;
}

/* Every frame has as many ranges as the blocks say, and is found exactly while it has any. */
static void many_compare(struct many *m, uint32_t frames)
{
    uint64_t pieces = 0;
    int32_t *counted = calloc(MANY_FRAMES + 1, sizeof(*counted));

    assert_non_null(counted);
    for (uint64_t block = 0; block < MANY_BLOCKS; block++) {
        assert_int_equal(ranges_cover(&m->ranges, 3, block), m->in[block] != 0);
        if (m->in[block] && (block == 0 || m->in[block - 1] != m->in[block])) {
            counted[m->in[block]]++;
            pieces++;
        }
    }
    assert_int_equal(m->ranges.count, pieces);
    for (uint32_t frame = 1; frame <= frames; frame++) {
        assert_int_equal(m->left[frame], counted[frame]);
        if (m->last[frame] - m->first[frame] < RANGES_LOOK_MAX)
            assert_int_equal(ranges_left(&m->ranges, 3, m->first[frame], m->last[frame], frame),
                             counted[frame] > 0);
        assert_int_equal(ranges_repoint(&m->ranges, 3, m->first[frame], m->last[frame], frame,
                                        frame), counted[frame]);
    }
    free(counted);
}

static void many_ranges_know_their_frames(void **state)
{
    struct dice d = dice_new(__func__);
    struct many *m = calloc(1, sizeof(*m));

    (void)state;
    assert_non_null(m);
    for (uint32_t frame = 1; frame <= MANY_FRAMES; frame++) {
        uint64_t blocks = dice_below(&d, 2000) ? 2 + dice_below(&d, 4) : 1 + dice_below(&d, 60000);
        uint64_t first = dice_below(&d, MANY_BLOCKS - blocks);

        many_put(m, frame, first, first + blocks);
        if (frame % 20000 == 0)
            many_compare(m, frame);
    }
    many_put(m, 1, 0, MANY_BLOCKS);
    assert_int_equal(m->ranges.count, 1);
    assert_true(m->ranges.bytes <= 4096);
    ranges_free(&m->ranges, &memory);
    index_memory_free(&memory);
    assert_int_equal(memory.used, 0);
    free(m);
}

/* In order, and never together: full nodes, 16 bytes a range and hardly more. */
static void ranges_in_order_are_packed(void **state)
{
    struct index x = {.memory = &memory};
    struct told told = {0};

    (void)state;
    for (uint64_t n = 0; n < 200000; n++)
        put_range(&x, 1, n * 3, n * 3 + 2, 0, (arena_loc)n, &told);
    assert_int_equal(x.ranges.count, 200000);
    assert_true(index_bytes(&x) < 200000 * 17);
    assert_int_equal(told.cut + told.gone, 0);
    end(&x);
}

/* The same blocks again and again: nothing grows. */
static void a_repeated_range_takes_one_place(void **state)
{
    struct index x = {.memory = &memory};
    struct told told = {0};

    (void)state;
    for (uint32_t n = 0; n < 100000; n++)
        put_range(&x, 0, 1000, 2000, FRAME_UNMAP, n, &told);
    assert_int_equal(x.ranges.count, 1);
    assert_int_equal(told.gone, 99999);
    assert_true(index_bytes(&x) <= 4096);
    end(&x);
}

/* A whole disk over a small table: the table is walked, not the blocks. */
static void a_huge_range_empties_what_it_covers(void **state)
{
    struct index x = {.memory = &memory};
    struct told told = {0};

    (void)state;
    for (uint64_t block = 0; block < 1000; block++)
        assert_int_equal(index_put(&x, block % 2, block << 21, 1, MASK_FULL), 0);
    put_range(&x, 1, 0, 1ull << 31, 0, 2, &told);
    assert_int_equal(told.emptied, 500);
    for (uint64_t block = 0; block < 1000; block++) {
        const struct index_slot *s = index_find(&x, block % 2, block << 21);

        assert_int_equal(s && s->mask, block % 2 == 0);
    }
    end(&x);
}

/* What index_room() has allowed stays below the limit, at every instant: also when a guest has
 * chosen its blocks so that they all belong to one shard. */
static void allowed_growth_stays_below_the_limit(void **state)
{
    struct index_memory small;

    (void)state;
    index_memory_init(&small, CORE_INDEX_BYTES_MIN);
    for (uint32_t skewed = 0; skewed < 2; skewed++) {
        struct index x = {.memory = &small};
        uint64_t block = 0;
        int64_t most = 0;

        while (index_room(&x, 1000)) {
            for (uint32_t n = 0; n < 1000; n++, block++) {
                while (skewed && index_hash(0, block) >> 56 != 7)
                    block++;
                assert_int_equal(index_put(&x, 0, block, 1, MASK_FULL), 0);
                most = small.used > most ? small.used : most;
                assert_true(small.used <= small.limit);
            }
        }
        assert_true(x.used > 20000);
        assert_true(most > small.limit / 4);
        index_free(&x);
        assert_int_equal(small.used, 0);
    }
}

static void growing_forgets_emptied_slots(void **state)
{
    struct index x = {.memory = &memory};
    struct told told = {0};

    (void)state;
    for (uint64_t round = 0; round < 50; round++) {
        for (uint64_t block = 0; block < 1000; block++)
            assert_int_equal(index_put(&x, 0, round * 1000 + block, 1, MASK_FULL), 0);
        put_range(&x, 0, 0, (round + 1) * 1000, 0, 1, &told);
    }
    assert_int_equal(told.emptied, 50 * 1000);
    assert_int_equal(x.ranges.count, 1);
    assert_true(index_bytes(&x) < 50 * 1000 * BYTES_A_BLOCK);
    end(&x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_million_blocks_are_found_again),
        cmocka_unit_test(memory_stays_in_its_budget),
        cmocka_unit_test(the_newest_frame_of_a_block_is_kept),
        cmocka_unit_test(slots_and_ranges_are_like_an_array),
        cmocka_unit_test(many_ranges_know_their_frames),
        cmocka_unit_test(ranges_in_order_are_packed),
        cmocka_unit_test(a_repeated_range_takes_one_place),
        cmocka_unit_test(allowed_growth_stays_below_the_limit),
        cmocka_unit_test(a_huge_range_empties_what_it_covers),
        cmocka_unit_test(growing_forgets_emptied_slots),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
