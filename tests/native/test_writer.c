/* writer.h: parts of epochs, stocks of segments, and what writers leave to the group. */
#include "support.h"

#define BLOCKS 2048u

static int setup(void **state)
{
    struct bench *b = bench_new(BLOCKS * BLOCK_BYTES, BLOCKS * BLOCK_BYTES, 1);

    bench_kill(b);
    b->config.reactors = 2;
    assert_int_equal(bench_open(b), 0);
    *state = b;
    return 0;
}

static int put(struct bench *b, uint32_t disk, uint64_t block, uint8_t value)
{
    uint8_t data[BLOCK_BYTES];

    for (uint32_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(value + i * 7 + i / 13 * value);
    if (!bench_room(b, disk, 3))
        return -ENOSPC;
    return bench_write(b, disk, block * BLOCK_SECTORS, data, sizeof(data));
}

static uint32_t in_lists(const struct group *g)
{
    uint32_t count = g->pack.dead_list.count;

    for (uint32_t i = 0; i < g->epochs; i++)
        count += epoch_segments(g->epoch[i]);
    return count;
}

/* Each segment is free, set aside, or in one list. */
static void no_segment_is_lost(struct bench *b)
{
    const struct group *g = b->group;

    bench_settle(b);
    assert_int_equal(g->arena.free_count + writers_stock(g) + in_lists(g), g->arena.segments);
}

static void disks_have_parts_of_their_own(void **state)
{
    struct bench *b = *state;
    const struct epoch *e = epoch_open(b->group);

    assert_int_equal(b->group->writers, 2);
    for (uint32_t i = 0; i < 100; i++)
        assert_int_equal(put(b, 0, i, 1), 0);
    for (uint32_t i = 0; i < 10; i++)
        assert_int_equal(put(b, 1, i, 2), 0);
    assert_int_equal(e->part[0].index.used, 100);
    assert_int_equal(e->part[1].index.used, 10);
    assert_int_not_equal(e->part[0].raw.segment, e->part[1].raw.segment);
    assert_int_equal(epoch_slots(e), 110);
    assert_int_equal(epoch_logical_bytes(e), 110 * BLOCK_BYTES);
    no_segment_is_lost(b);
}

static void no_more_reactors_than_disks(void **state)
{
    struct bench *b = *state;

    bench_kill(b);
    b->config.reactors = CORE_REACTORS_MAX;
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->writers, BENCH_DISKS);
}

/* One part is far ahead with its numbers; what is written into the next epoch comes after all of
 * the last one, or a restart would refuse it. */
static void later_epochs_have_higher_numbers(void **state)
{
    struct bench *b = *state;

    for (uint32_t i = 0; i < 200; i++)
        assert_int_equal(put(b, 0, i % 50, (uint8_t)i), 0);
    assert_int_equal(bench_verb(b, VERB_SEAL)->result, 0);
    assert_int_equal(put(b, 1, 0, 9), 0);
    bench_kill(b);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->epochs, 2);
    assert_int_equal(epoch_open(b->group)->part[1].index.used, 1);
    assert_int_equal(b->group->epoch[0]->part[0].index.used, 50);
}

/* Segments that one writer has filled with frames of both disks, overwritten by two. */
static void mixed_segments_die_by_both_hands(void **state)
{
    struct bench *b = *state;
    struct group *g;
    uint32_t used;

    bench_kill(b);
    b->config.reactors = 1;
    b->config.compress_level = 0;
    assert_int_equal(bench_open(b), 0);
    for (uint32_t i = 0; i < 1000; i++)
        assert_int_equal(put(b, i % 2, i / 2, (uint8_t)i), 0);
    bench_kill(b);
    b->config.reactors = 2;
    assert_int_equal(bench_open(b), 0);
    g = b->group;
    bench_settle(b);
    used = g->arena.segments - group_free(g);
    for (uint32_t turn = 0; turn < 4; turn++)
        for (uint32_t i = 0; i < 1000; i++) {
            assert_int_equal(put(b, i % 2, i / 2, (uint8_t)(i + turn)), 0);
            if (i % 64 == 0)
                bench_settle(b);
        }
    no_segment_is_lost(b);
    assert_true(g->arena.segments - group_free(g) <= used + 10);
    for (uint32_t i = 0; i < 1000; i++)
        assert_int_equal(epoch_read(g, i % 2, i / 2, MASK_FULL, (uint8_t[BLOCK_BYTES]){0},
                                    &(const uint8_t *){NULL}), MASK_FULL);
    assert_int_equal(bench_verb(b, VERB_SEAL)->result, 0);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    no_segment_is_lost(b);
}

/* A request that the stock is too small for has room after the next round's refill; it is not
 * held. One that the arena is too small for takes what others have aside. */
static void stocks_go_where_they_are_needed(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    uint64_t most;

    epoch_batch_begin(&g->writer[1]);
    epoch_batch_end(&g->writer[1]);
    assert_true(g->writer[1].stock_count > 0);
    assert_true(bench_room(b, 0, 20 * SEGMENT_FRAMES_MIN));
    assert_int_equal(g->writer[0].held_blocks, 0);
    assert_int_equal(bench_count(b, CORE_EVENT_PRESSURE), 0);

    most = (uint64_t)(g->arena.segments - GROUP_RESERVED_SEGMENTS) * SEGMENT_FRAMES_MIN;
    assert_false(bench_room(b, 0, most)); /* the other one has some aside */
    bench_settle(b);
    assert_int_equal(g->writer[1].stock_count, 0);
    assert_true(epoch_room(&g->writer[0], most));
    assert_false(bench_room(b, 1, 1)); /* not taken back before it was used */
    bench_settle(b);
    assert_true(epoch_room(&g->writer[0], most));
    assert_true(bench_room(b, 0, most));
    bench_settle(b);
    assert_true(bench_room(b, 1, 1)); /* now it is */
    no_segment_is_lost(b);
}

static void a_full_arena_holds_both_and_frees_both(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    uint32_t full[2] = {0};

    b->group->config.compress_level = 0;
    for (uint64_t i = 0; full[0] < 3 || full[1] < 3; i++) {
        uint32_t disk = (uint32_t)(i % 2);

        assert_true(i < 4 * BLOCKS);
        if (put(b, disk, i / 2 % BLOCKS, (uint8_t)i) == -ENOSPC) {
            full[disk]++;
            bench_settle(b);
            if (full[disk] < 3 && epoch_room(&g->writer[disk], 3))
                full[disk] = 0; /* what the other one had aside */
        }
    }
    assert_true(group_limit_percent(g) >= 90);
    assert_true(bench_count(b, CORE_EVENT_PRESSURE) > 0);
    no_segment_is_lost(b);
    assert_int_equal(bench_verb(b, VERB_DISCARD)->result, 0);
    assert_int_equal(put(b, 0, 0, 1), 0);
    assert_int_equal(put(b, 1, 0, 1), 0);
    no_segment_is_lost(b);
}

/* Each has its share of the memory, however much the other one takes. */
static void index_memory_is_shared_out(void **state)
{
    struct bench *b = *state;
    const struct group *g = b->group;

    assert_int_equal(group_index_limit(g), 2 * CORE_INDEX_BYTES_MIN);
    for (uint32_t i = 0; i < BLOCKS; i++)
        assert_int_equal(put(b, 0, i, 0), 0);
    assert_true(g->writer[0].index_memory.used > 0);
    assert_int_equal(g->writer[1].index_memory.used, 0);
    assert_int_equal(g->writer[1].index_memory.left, CORE_INDEX_BYTES_MIN);
    assert_int_equal(bench_verb(b, VERB_DISCARD)->result, 0);
    bench_settle(b);
    assert_int_equal(g->writer[0].index_memory.left,
                     CORE_INDEX_BYTES_MIN - g->writer[0].index_memory.used);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, bench_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(disks_have_parts_of_their_own),
        CASE(no_more_reactors_than_disks),
        CASE(later_epochs_have_higher_numbers),
        CASE(mixed_segments_die_by_both_hands),
        CASE(stocks_go_where_they_are_needed),
        CASE(a_full_arena_holds_both_and_frees_both),
        CASE(index_memory_is_shared_out),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
