/* Merging: neighbours that were written far apart come together when the guest is idle, nothing of
 * it shows to a reader, and it stands back for everybody else.
 */
#include "support.h"

#define BLOCKS 4096u                /* of disk 0 */

static uint8_t data[BLOCK_BYTES];
static uint32_t version[BLOCKS];

/* Text that the neighbours have, too. */
static void fill(uint8_t *to, uint64_t block, uint32_t v)
{
    struct dice d = {.state = block / 8 * 31 + 7};
    uint32_t at = (uint32_t)snprintf((char *)to, BLOCK_BYTES, "%llu.%u:", (unsigned long long)block,
                                     v);

    while (at < BLOCK_BYTES) {
        char word[24];
        int n = snprintf(word, sizeof(word), "%llx ", (unsigned long long)dice_below(&d, 1u << 20));

        for (int i = 0; i < n && at < BLOCK_BYTES; i++)
            to[at++] = (uint8_t)word[i];
    }
}

static void write_one(struct bench *b, uint64_t block)
{
    fill(data, block, ++version[block]);
    assert_int_equal(bench_write(b, 0, block * BLOCK_SECTORS, data, BLOCK_BYTES), 0);
}

/* A sector of each block, all of some. */
static void all_is_there(struct bench *b)
{
    uint8_t in[BLOCK_BYTES];

    for (uint64_t i = 0; i < BLOCKS; i++) {
        uint64_t bytes = i % 16 == 5 ? BLOCK_BYTES : SECTOR_BYTES;

        bench_read(b, 0, i * BLOCK_SECTORS, in, bytes);
        memset(data, 0, sizeof(data));
        if (version[i])
            fill(data, i, version[i]);
        assert_memory_equal(in, data, bytes);
    }
}

/* Live slots of each segment, counted from the index. */
static void counts_are_right(const struct group *g)
{
    uint32_t *slots = calloc(g->arena.segments, sizeof(*slots));

    check(slots);
    for (uint32_t i = 0; i < g->epochs; i++)
        for (uint32_t n = 0; n < g->writers; n++) {
            struct index_cursor at = {0};
            const struct index_slot *s;

            while ((s = index_next(&g->epoch[i]->part[n].index, &at)))
                slots[arena_loc_segment(s->loc)]++;
        }
    for (uint32_t i = 0; i < g->arena.segments; i++)
        if (g->arena.desc[i].state != SEGMENT_FREE)
            assert_int_equal(g->arena.use[i].slots - g->arena.use[i].dead, slots[i]);
    free(slots);
}

/* As many blocks as there are, anywhere: two thirds of them are met. */
static void write_anywhere(struct bench *b, struct dice *d)
{
    for (uint32_t i = 0; i < BLOCKS; i++) {
        write_one(b, dice_below(d, BLOCKS));
        if (i % 256 == 0)
            bench_settle(b);
    }
    bench_settle(b);
}

static void idle(struct bench *b)
{
    for (uint32_t i = 0; i < 4; i++) {
        b->group->now_ns += 2 * MERGE_IDLE_NS;
        bench_settle(b);
    }
    assert_int_equal(b->group->merge.phase, MERGE_IDLE);
}

static uint64_t used(const struct group *g)
{
    return (uint64_t)(g->arena.segments - g->arena.free_count) * SEGMENT_BYTES;
}

static void neighbours_come_together_when_it_is_idle(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    uint64_t before;

    write_anywhere(b, &d);
    bench_verb(b, VERB_SEAL);
    bench_settle(b);
    before = used(b->group);
    assert_int_equal(b->group->stats.merges, 0);
    idle(b);
    assert_true(b->group->stats.merges > 0);
    assert_true(b->group->stats.merged_blocks > BLOCKS / 2);
    assert_true(used(b->group) < before * 3 / 4);
    counts_are_right(b->group);
    all_is_there(b);
    before = b->group->stats.merges;
    idle(b); /* and that was it */
    assert_int_equal(b->group->stats.merges, before);
    assert_int_equal(group_timer(b->group), 0);
    assert_int_equal(b->group->merge.waiting, 0);
}

/* A read of one block expands eight at most, gaps counted. */
static void a_reader_pays_for_one_cluster(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    const struct expander *x = &b->group->writer[0].expand;
    uint64_t wanted, expanded;

    write_anywhere(b, &d);
    bench_verb(b, VERB_SEAL);
    idle(b);
    wanted = x->wanted_bytes;
    expanded = x->expanded_bytes;
    all_is_there(b); /* sector by sector, in order */
    assert_true(x->wanted_bytes > wanted);
    wanted = x->wanted_bytes - wanted;
    /* A cluster is expanded once for its readers; what is alone for each sector. */
    assert_true(x->expanded_bytes - expanded < wanted * 8);
    assert_true(x->misses <= b->group->stats.clusters);
}

static void what_is_merged_outlives_a_kill_and_is_committed(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);

    write_anywhere(b, &d);
    bench_verb(b, VERB_SEAL);
    idle(b);
    write_anywhere(b, &d); /* the next epoch lies over it */
    assert_true(b->group->stats.merges > 0);
    for (uint32_t pass = 0; pass < 3; pass++) {
        all_is_there(b);
        if (pass == 0) {
            bench_kill(b);
            assert_int_equal(bench_open(b), 0);
            counts_are_right(b->group);
            idle(b); /* nobody knows what was merged: all is looked at anew */
            counts_are_right(b->group);
        } else if (pass == 1) {
            bench_verb(b, VERB_SEAL);
            assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
            bench_settle(b);
            assert_int_equal(b->group->epochs, 1);
        }
    }
}

/* Of the journal alone, holes and all. */
static void it_comes_back_from_the_journal(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);

    write_anywhere(b, &d);
    bench_verb(b, VERB_SEAL);
    idle(b);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO; /* apply must wait */
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    bench_kill(b);
    bench_forget_arena(b);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = 0;
    assert_int_equal(bench_open(b), 0);
    all_is_there(b);
    bench_settle(b);
    assert_int_equal(b->group->applied, b->group->committed);
    all_is_there(b);
}

/* Writes, commits and discards come in the middle of all its phases. */
static void everybody_else_comes_first(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    uint32_t met[MERGE_ADOPT + 1] = {0};

    for (uint32_t turn = 0; turn < 6; turn++) {
        struct group *g = b->group;

        for (uint32_t i = 0; i < BLOCKS / 2; i++) {
            write_one(b, dice_below(&d, BLOCKS));
            if (i % 256 == 0)
                bench_settle(b);
        }
        if (dice_below(&d, 2))
            bench_verb(b, VERB_SEAL);
        bench_settle(b);
        g->now_ns += 2 * MERGE_IDLE_NS;
        for (uint64_t steps = 1 + dice_below(&d, 300); steps > 0; steps--)
            group_step(g);
        met[g->merge.phase]++;
        for (uint32_t i = 0; i < 20; i++)
            write_one(b, dice_below(&d, BLOCKS));
        if (turn % 3 == 0) {
            bench_verb(b, VERB_SEAL);
            assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
            assert_int_equal(g->merge.phase > MERGE_CHOOSE && g->merge.epoch->frozen, 0);
        } else if (turn % 3 == 1) {
            bench_kill(b);
            assert_int_equal(bench_open(b), 0);
        }
        counts_are_right(b->group);
        all_is_there(b);
    }
    assert_true(met[MERGE_GATHER] + met[MERGE_ADOPT] > 0);
}

static void the_dropped_epoch_takes_its_merge_along(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    struct group *g = b->group;

    write_anywhere(b, &d);
    g->now_ns += 2 * MERGE_IDLE_NS;
    for (uint32_t i = 0; g->merge.phase != MERGE_ADOPT && i < 10000; i++)
        group_step(g);
    assert_int_equal(g->merge.phase, MERGE_ADOPT);
    bench_verb(b, VERB_DISCARD);
    bench_settle(b);
    assert_true(g->arena.segments - g->arena.free_count <= 1);
    memset(version, 0, sizeof(version));
    all_is_there(b);
}

/* Sequential data are clusters already. */
static void what_is_good_is_left_alone(void **state)
{
    struct bench *b = *state;

    for (uint32_t i = 0; i < BLOCKS; i++) {
        write_one(b, i);
        if (i % 256 == 255)
            bench_settle(b);
    }
    bench_verb(b, VERB_SEAL);
    idle(b);
    assert_int_equal(b->group->stats.merged_blocks, 0);
    assert_int_equal(b->group->stats.merges, 0);
    all_is_there(b);
}

static int setup(void **state)
{
    struct bench *b = bench_new(BLOCKS * BLOCK_BYTES, 1u << 20, 1);

    memset(version, 0, sizeof(version));
    *state = b;
    return 0;
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, bench_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(neighbours_come_together_when_it_is_idle),
        CASE(a_reader_pays_for_one_cluster),
        CASE(what_is_merged_outlives_a_kill_and_is_committed),
        CASE(it_comes_back_from_the_journal),
        CASE(everybody_else_comes_first),
        CASE(the_dropped_epoch_takes_its_merge_along),
        CASE(what_is_good_is_left_alone),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
