/* The block index against plain arrays, and its promise about memory. */
#include "support.h"

#include "index.h"

#define BYTES_A_BLOCK 24u

static void emptied(void *owner, const struct index_slot *s)
{
    assert_true(s->mask != 0);
    ++*(uint64_t *)owner;
}

static void a_million_blocks_are_found_again(void **state)
{
    const uint64_t count = 1000000;
    struct dice d = dice_new(__func__);
    uint64_t first = d.state;
    struct index x = {0};

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
    index_free(&x);
}

/* At every size, not only at powers of two: growth must not overshoot. */
static void memory_stays_in_its_budget(void **state)
{
    struct index x = {0};

    (void)state;
    for (uint64_t n = 1; n <= 200000; n++) {
        assert_int_equal(index_put(&x, 0, n, 1, MASK_FULL), 0);
        if (n >= 4096)
            assert_true(index_bytes(&x) <= n * BYTES_A_BLOCK);
    }
    index_free(&x);
}

static void the_newest_frame_of_a_block_is_kept(void **state)
{
    struct dice d = dice_new(__func__);
    struct index x = {0};
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
    index_free(&x);
}

#define MODEL_BLOCKS 400u

enum { NOTHING, SLOT, RANGE, RANGE_UNMAP };

/* The list of ranges: sorted, disjoint, no two that should be one. */
static void ranges_in_order(const struct index *x)
{
    for (uint32_t i = 0; i < x->ranges; i++) {
        const struct index_range *a = &x->range[i], *b = a + 1;

        assert_true(a->first < a->end);
        if (i + 1 == x->ranges || b->disk != a->disk)
            continue;
        assert_true(a->end <= b->first);
        assert_false(a->end == b->first && a->flags == b->flags);
    }
}

static void compare(const struct index *x, uint8_t model[2][MODEL_BLOCKS])
{
    ranges_in_order(x);
    for (uint32_t disk = 0; disk < 2; disk++)
        for (uint64_t block = 0; block < MODEL_BLOCKS; block++) {
            const struct index_slot *s = index_find(x, disk, block);
            bool slot = s && s->mask;

            assert_int_equal(slot, model[disk][block] == SLOT);
            if (!slot)
                assert_int_equal(index_in_range(x, disk, block), model[disk][block] != NOTHING);
        }
    for (uint32_t i = 0; i < x->ranges; i++)
        for (uint64_t block = x->range[i].first; block < x->range[i].end; block++) {
            uint8_t is = model[x->range[i].disk][block];

            assert_true(is == SLOT || is == (x->range[i].flags ? RANGE_UNMAP : RANGE));
        }
}

static void ranges_split_and_merge_like_an_array(void **state)
{
    struct dice d = dice_new(__func__);

    (void)state;
    for (uint32_t run = 0; run < 60; run++) {
        uint8_t model[2][MODEL_BLOCKS] = {{0}};
        struct index x = {0};

        for (uint32_t turn = 0; turn < 150; turn++) {
            uint32_t disk = (uint32_t)dice_below(&d, 2);
            uint64_t first = dice_below(&d, MODEL_BLOCKS);

            if (dice_below(&d, 3) == 0) {
                assert_int_equal(index_put(&x, disk, first, turn, MASK_FULL), 0);
                model[disk][first] = SLOT;
            } else {
                uint64_t end = first + 1 + dice_below(&d, MODEL_BLOCKS - first);
                uint32_t flags = (uint32_t)dice_below(&d, 2) * FRAME_UNMAP;
                uint64_t gone = 0, slots = 0;

                if (end - first > 40 && dice_below(&d, 4))
                    end = first + 40;
                for (uint64_t block = first; block < end; block++)
                    slots += model[disk][block] == SLOT;
                assert_int_equal(index_put_range(&x, disk, first, end, flags, emptied, &gone), 0);
                assert_int_equal(gone, slots);
                memset(&model[disk][first], flags ? RANGE_UNMAP : RANGE, end - first);
            }
            compare(&x, model);
        }
        index_free(&x);
    }
}

/* A whole disk of 2^40 blocks over a small table: the table is walked, not the blocks. */
static void a_huge_range_empties_what_it_covers(void **state)
{
    struct index x = {0};
    uint64_t gone = 0;

    (void)state;
    for (uint64_t block = 0; block < 1000; block++)
        assert_int_equal(index_put(&x, block % 2, block << 30, 1, MASK_FULL), 0);
    assert_int_equal(index_put_range(&x, 1, 0, 1ull << 40, 0, emptied, &gone), 0);
    assert_int_equal(gone, 500);
    for (uint64_t block = 0; block < 1000; block++) {
        const struct index_slot *s = index_find(&x, block % 2, block << 30);

        assert_int_equal(s && s->mask, block % 2 == 0);
    }
    index_free(&x);
}

static void growing_forgets_emptied_slots(void **state)
{
    struct index x = {0};
    uint64_t gone = 0;

    (void)state;
    for (uint64_t round = 0; round < 50; round++) {
        for (uint64_t block = 0; block < 1000; block++)
            assert_int_equal(index_put(&x, 0, round * 1000 + block, 1, MASK_FULL), 0);
        assert_int_equal(index_put_range(&x, 0, 0, (round + 1) * 1000, 0, emptied, &gone), 0);
    }
    assert_int_equal(gone, 50 * 1000);
    assert_int_equal(x.ranges, 1);
    assert_true(index_bytes(&x) < 50 * 1000 * BYTES_A_BLOCK);
    index_free(&x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_million_blocks_are_found_again),
        cmocka_unit_test(memory_stays_in_its_budget),
        cmocka_unit_test(the_newest_frame_of_a_block_is_kept),
        cmocka_unit_test(ranges_split_and_merge_like_an_array),
        cmocka_unit_test(a_huge_range_empties_what_it_covers),
        cmocka_unit_test(growing_forgets_emptied_slots),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
