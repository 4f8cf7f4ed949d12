/* The packer: what it counts is what the index says, it wakes for work only, and it never does
 * much at once.
 */
#include "support.h"

#define BLOCKS 2048u                /* of disk 0 */

static uint8_t block_data[BLOCK_BYTES];

static void write_block_of(struct bench *b, uint64_t block, uint64_t value)
{
    memset(block_data, (int)(value % 250 + 1), sizeof(block_data)); /* shrinks */
    assert_int_equal(bench_write(b, 0, block * BLOCK_SECTORS, block_data, BLOCK_BYTES), 0);
}

static void write_random(struct bench *b, struct dice *d, uint64_t block)
{
    dice_fill(d, block_data, sizeof(block_data));
    assert_int_equal(bench_write(b, 0, block * BLOCK_SECTORS, block_data, BLOCK_BYTES), 0);
}

/* Ranges that came with the segment's frames. */
static uint32_t ranges_of(const struct group *g, uint32_t segment)
{
    struct epoch *e = epoch_by_id(g, g->arena.desc[segment].epoch);
    uint32_t tail = arena_tail(&g->arena, segment), offset = 0, at = 0, count = 0;
    const struct frame_header *h;

    for (; e && (h = arena_frame_next(&g->arena, segment, tail, &offset)); at = offset) {
        arena_loc loc = arena_loc_of(segment, at);

        if (h->kind == FRAME_ZERO && h->blocks > 1)
            count += ranges_repoint(&epoch_index(e, h->disk)->ranges, h->disk, h->block,
                                    h->block + h->blocks, loc, loc);
    }
    return count;
}

/* Live slots and ranges of each segment, counted from the indexes. */
static void counts_are_right(const struct group *g)
{
    uint32_t *slots = calloc(g->arena.segments, sizeof(*slots));

    check(slots);
    for (uint32_t i = 0; i < g->epochs * g->writers; i++) {
        const struct epoch *e = g->epoch[i / g->writers];
        struct index_cursor at = {0};
        const struct index_slot *s;

        while ((s = index_next(&e->part[i % g->writers].index, &at)))
            slots[arena_loc_segment(s->loc)]++;
    }
    for (uint32_t i = 0; i < g->arena.segments; i++) {
        const struct segment_use *u = &g->arena.use[i];

        if (g->arena.desc[i].state != SEGMENT_FREE)
            assert_int_equal(u->slots - u->dead, slots[i] + ranges_of(g, i));
    }
    free(slots);
}

static void counts_follow_the_index(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);

    for (uint32_t turn = 0; turn < 20000; turn++) {
        uint64_t block = dice_below(&d, BLOCKS), what = dice_below(&d, 100);

        if (!epoch_room(&b->group->writer[0], EPOCH_ZERO_ROOM)) {
            assert_int_equal(bench_verb(b, VERB_SEAL)->result, 0);
            assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
        }
        if (what < 50)
            write_block_of(b, block, turn);
        else if (what < 80)
            write_random(b, &d, block);
        else if (what < 90)
            group_step(b->group);
        else if (what < 99)
            assert_int_equal(epoch_zero(b->group, 0, block * BLOCK_SECTORS,
                                        BLOCK_SECTORS * (1 + dice_below(&d, BLOCKS - block) % 64),
                                        0), 0);
        else if (dice_below(&d, 4) == 0)
            assert_int_equal(bench_verb(b, VERB_SEAL)->result, 0);
        if (turn % 1000 == 0) {
            bench_settle(b);
            counts_are_right(b->group);
        }
        if (turn % 5000 == 4999) {
            bench_kill(b);
            assert_int_equal(bench_open(b), 0);
            counts_are_right(b->group);
        }
    }
}

/* Without compression and far from pressure, too. */
static void what_is_wholly_overwritten_is_freed(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    struct dice d = dice_new(__func__);
    uint32_t used;

    g->config.compress_level = 0;
    for (uint32_t turn = 0; turn < 30; turn++)
        for (uint64_t block = 0; block < BLOCKS / 4; block++) {
            if (block % 64 == 0)
                group_step(g);
            write_random(b, &d, block);
        }
    bench_settle(b);
    used = g->arena.segments - g->arena.free_count;
    assert_true(used <= 2 * (BLOCKS / 4 / SEGMENT_FRAMES_MIN + 1) + 2 + g->arena.segments / 16);
    counts_are_right(g);
}

/* The same blocks made zero again and again, written in between or not: an arena of 16 MiB would
 * be full of 32-byte frames many times over. */
static void repeated_zero_ranges_do_not_fill_the_arena(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    struct dice d = dice_new(__func__);

    for (uint32_t turn = 0; turn < 2 * SEGMENT_BYTES * g->arena.segments / 32; turn++) {
        uint64_t block = dice_below(&d, 64) * 16, blocks = 2 + dice_below(&d, 40);

        if (turn % 64 == 0)
            group_step(g);
        if (turn % 1024 == 0)
            write_random(b, &d, block + 1);
        assert_true(epoch_room(&g->writer[0], EPOCH_ZERO_ROOM));
        assert_int_equal(epoch_zero(g, 0, block * BLOCK_SECTORS, blocks * BLOCK_SECTORS, 0), 0);
    }
    bench_settle(b);
    assert_true(group_pressure_percent(g) < 50);
    assert_true(epoch_open(g)->part[0].index.ranges.count <= 400);
    counts_are_right(g);
    bench_kill(b);
    assert_int_equal(bench_open(b), 0);
    counts_are_right(b->group);
}

/* Half dead segments are copied together before the arena is full. */
static void worn_segments_are_copied_under_pressure(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    struct dice d = dice_new(__func__);
    uint64_t held = 0;

    g->config.compress_level = 0;
    for (uint32_t turn = 0; turn < 20 * BLOCKS; turn++) {
        if (turn % 16 == 0)
            bench_settle(b);
        held += !epoch_room(&g->writer[0], 1);
        write_random(b, &d, dice_below(&d, BLOCKS));
    }
    assert_int_equal(held, 0); /* 8 MiB of blocks in 16 MiB of arena */
    counts_are_right(g);
}

/* Text-like, and of this block and version only. */
static void fill_text(uint8_t *to, uint64_t block, uint64_t version)
{
    static const char *const word[] = {"epoch ", "seal ", "commit ", "journal ", "frame ", "\n  "};
    uint64_t state = block * 1000003 + version + 1;
    uint32_t n = (uint32_t)snprintf((char *)to, BLOCK_BYTES, "%llu.%llu:",
                                    (unsigned long long)block, (unsigned long long)version);

    while (n < BLOCK_BYTES) {
        const char *w = word[(state >> 40) % 6];

        for (; *w && n < BLOCK_BYTES; n++)
            to[n] = (uint8_t)*w++;
        state = state * 6364136223846793005u + 1442695040888963407u;
    }
}

static void write_text(struct bench *b, uint64_t block, uint64_t version)
{
    fill_text(block_data, block, version);
    assert_int_equal(bench_write(b, 0, block * BLOCK_SECTORS, block_data, BLOCK_BYTES), 0);
}

static void text_is(struct bench *b, uint64_t block, uint64_t version)
{
    uint8_t in[BLOCK_BYTES];

    bench_read(b, 0, block * BLOCK_SECTORS, in, sizeof(in));
    fill_text(block_data, block, version);
    assert_memory_equal(in, block_data, sizeof(in));
}

static void seal_and_pack(struct bench *b)
{
    assert_int_equal(bench_verb(b, VERB_SEAL)->result, 0);
    bench_settle(b);
    counts_are_right(b->group);
}

/* In whatever order they come, and a reader of all of them expands each cluster once. */
static void neighbours_become_clusters(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    uint64_t blocks = 8 * SEGMENT_FRAMES_MIN, misses;

    for (uint64_t i = 0; i < blocks; i++)
        write_text(b, (i ^ 5) < blocks ? i ^ 5 : i, 0);
    seal_and_pack(b);
    assert_true(g->stats.clusters >= blocks / CLUSTER_BLOCKS);
    assert_true(g->stats.clusters <= blocks / CLUSTER_BLOCKS * 5 / 4);
    misses = g->writer[0].expand.misses;
    for (uint64_t i = 0; i < blocks; i++)
        text_is(b, i, 0);
    assert_true(g->writer[0].expand.misses - misses <= g->stats.clusters);
}

static void lone_blocks_do_not(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;

    for (uint64_t i = 0; i < BLOCKS; i += 2)
        write_text(b, i, 0);
    seal_and_pack(b);
    assert_int_equal(g->stats.clusters, 0);
    assert_int_equal(g->stats.compressed_frames, BLOCKS / 2);
}

/* Members of packed clusters are overwritten whole, in part and by zeroes, over a kill, until
 * the images have it. */
static void members_live_on_their_own(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    uint64_t version[BLOCKS] = {0};
    uint8_t now[BLOCK_BYTES], in[BLOCK_BYTES];
    uint64_t cut = BLOCKS; /* the block that was written in part */

    for (uint64_t i = 0; i < BLOCKS; i++)
        write_text(b, i, 0);
    b->group->now_ns += 10 * PACK_IDLE_NS;
    bench_settle(b);
    b->group->now_ns += 10 * PACK_IDLE_NS;
    bench_settle(b); /* the guest pauses: the open epoch is packed, too */
    assert_true(b->group->stats.clusters > BLOCKS / CLUSTER_BLOCKS * 3 / 4);
    for (uint64_t turn = 1; turn < BLOCKS; turn++) {
        uint64_t block = dice_below(&d, BLOCKS);

        write_text(b, block, version[block] = turn);
        cut = block == cut ? BLOCKS : cut;
    }
    do
        cut = dice_below(&d, BLOCKS);
    while (version[cut] != 0); /* in its cluster still */
    fill_text(now, cut, 0);
    memset(now + 3 * SECTOR_BYTES, 7, SECTOR_BYTES);
    assert_int_equal(bench_write(b, 0, cut * BLOCK_SECTORS + 3, now + 3 * SECTOR_BYTES,
                                 SECTOR_BYTES), 0);
    seal_and_pack(b);
    for (uint32_t pass = 0; pass < 3; pass++) {
        for (uint64_t i = 0; i < BLOCKS; i++)
            if (i != cut)
                text_is(b, i, version[i]);
        bench_read(b, 0, cut * BLOCK_SECTORS, in, sizeof(in));
        assert_memory_equal(in, now, sizeof(in));
        if (pass == 0) {
            bench_kill(b);
            assert_int_equal(bench_open(b), 0);
            counts_are_right(b->group);
        } else if (pass == 1) {
            assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
            bench_settle(b);
            assert_int_equal(b->group->epochs, 1);
        }
    }
}

static const struct frame_header *some_cluster(const struct arena *a)
{
    for (uint32_t i = 0; i < a->segments; i++) {
        uint32_t offset = 0;
        const struct frame_header *h;

        while (a->desc[i].state != SEGMENT_FREE &&
               (h = arena_frame_next(a, i, arena_tail(a, i), &offset)))
            if (h->kind == FRAME_CLUSTER)
                return h;
    }
    fail_msg("no cluster");
    return NULL;
}

/* An expander that keeps nothing must not take that for the first frame of a restart's arena. */
static void the_first_frame_may_be_a_cluster(void **state)
{
    struct bench *b = *state;
    const struct frame_header *h;
    uint8_t out[BLOCK_BYTES];
    struct arena *a;

    for (uint64_t i = 0; i < SEGMENT_FRAMES_MIN; i++)
        write_text(b, i, 0);
    seal_and_pack(b);
    bench_kill(b);
    assert_int_equal(bench_open(b), 0);
    a = &b->group->arena;
    h = some_cluster(a);
    memmove(arena_frame(a, 0), h, frame_bytes(h->payload_bytes));
    h = arena_frame(a, 0);
    assert_int_equal(frame_expand(&b->group->writer[0].expand, a, 0, h->block, MASK_FULL, out), 0);
    fill_text(block_data, h->block, 0);
    assert_memory_equal(out, block_data, sizeof(out));
}

/* Clusters of which most is dead lose it when memory is short. */
static void worn_clusters_are_cut_down(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    struct dice d = dice_new(__func__);
    uint64_t blocks = BLOCKS - 64, dropped;
    uint32_t used;

    for (uint64_t i = 0; i < blocks; i++)
        write_text(b, i, 0);
    g->now_ns += 10 * PACK_IDLE_NS;
    bench_settle(b);
    g->now_ns += 10 * PACK_IDLE_NS;
    bench_settle(b);
    for (uint64_t i = 0; i < blocks; i++)
        if (i % CLUSTER_BLOCKS > 1)
            write_random(b, &d, i);
    bench_settle(b);
    assert_true(epoch_open(g)->worn_list.count > 0);
    used = epoch_open(g)->worn_list.count;
    dropped = g->stats.clusters;
    while (group_pressure_percent(g) < 75) /* nothing of it is dead */
        arena_segment_take(&g->arena, 0, SEGMENT_PACKED);
    pack_look(g);
    bench_settle(b);
    assert_true(epoch_open(g)->worn_list.count < used);
    assert_true(g->stats.clusters >= dropped);
    counts_are_right(g);
    for (uint64_t i = 0; i < blocks; i++)
        if (i % CLUSTER_BLOCKS <= 1)
            text_is(b, i, 0);
}

/* After some incompressible segments most are not tried, until one shrinks. */
static void what_does_not_shrink_is_hardly_tried(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    struct dice d = dice_new(__func__);

    for (uint64_t i = 0; i < 24 * SEGMENT_FRAMES_MIN; i++)
        write_random(b, &d, i);
    seal_and_pack(b);
    assert_int_equal(g->stats.compressed_frames, 0);
    assert_in_range(g->pack.streak, 5, 12);
    for (uint64_t i = 0; i < 8 * SEGMENT_FRAMES_MIN; i++)
        write_text(b, i, 1);
    seal_and_pack(b);
    assert_int_equal(g->pack.streak, 0);
    assert_true(g->stats.compressed_frames >= 4 * SEGMENT_FRAMES_MIN);
    for (uint64_t i = 0; i < 8 * SEGMENT_FRAMES_MIN; i++)
        text_is(b, i, 1);
}

/* Fills a share of the arena with raw text, seals it, and returns the first job's level. */
static int level_at(struct bench *b, uint32_t percent, bool paused)
{
    struct group *g = b->group;
    uint64_t block = 0;

    while (group_pressure_percent(g) < percent)
        write_random(b, &(struct dice){.state = block}, block % BLOCKS), block++;
    assert_non_null(epoch_create(g, epoch_open(g)->id + 1));
    g->epoch[0]->state = CORE_EPOCH_SEALED;
    g->pack.paused = paused;
    g->pack.check_seq = paused ? group_written(g) : 0;
    while (g->pack.phase == PACK_IDLE)
        assert_true(pack_step(g));
    return g->pack.level;
}

static void the_level_follows_room_and_time(void **state)
{
    static const struct {
        uint32_t percent;
        bool paused;
        int level;
    } want[] = {
        {3, false, 3},   /* nothing else waits */
        {20, false, 1},  /* a queue: as configured */
        {20, true, 3},   /* nobody writes */
        {60, false, -3}, /* room is needed now */
    };

    bench_end(*state);
    for (uint32_t i = 0; i < sizeof(want) / sizeof(want[0]); i++) {
        bench_start(*state, BLOCKS * BLOCK_BYTES, 1u << 20, 1);
        assert_int_equal(level_at(*state, want[i].percent, want[i].paused), want[i].level);
        bench_end(*state);
    }
    bench_start(*state, BLOCKS * BLOCK_BYTES, 1u << 20, 1);
}

/* Nothing new: a step that does nothing. */
static void there_is_nothing_to_do_until_something_changes(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;

    for (uint64_t block = 0; block < 20 * SEGMENT_FRAMES_MIN + 1; block++)
        write_block_of(b, block, block);
    bench_settle(b);
    assert_false(g->pack.look);
    write_block_of(b, 0, 1);
    assert_false(pack_step(g));
    for (uint64_t block = 0; block < SEGMENT_FRAMES_MIN; block++)
        write_block_of(b, block, block);
    assert_true(g->pack.look);
}

/* A step moves a few frames; reads between two steps are right. */
static void a_step_is_a_few_frames(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    uint8_t in[BLOCK_BYTES];
    uint64_t steps = 0;

    for (uint64_t block = 0; block < 4 * SEGMENT_FRAMES_MIN; block++)
        write_block_of(b, block, block);
    for (uint64_t block = 0; block < 4 * SEGMENT_FRAMES_MIN; block += 3)
        write_block_of(b, block, block + 7);
    assert_int_equal(bench_verb(b, VERB_SEAL)->result, 0);
    write_block_of(b, 0, 0);
    while (pack_step(g) || worker_reap(&g->packer) > 0) {
        uint64_t block = 1 + steps++ * 5 % (4 * SEGMENT_FRAMES_MIN - 1);

        bench_read(b, 0, block * BLOCK_SECTORS, in, sizeof(in));
        memset(block_data, (int)((block % 3 ? block : block + 7) % 250 + 1), sizeof(block_data));
        assert_memory_equal(in, block_data, sizeof(in));
    }
    assert_true(g->stats.compressed_frames > 0 || steps > 4 * SEGMENT_FRAMES_MIN / PACK_PIECE);
}

/* A commit does not wait until a segment is compressed. */
static void a_commit_ends_packing_in_the_middle(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    uint8_t in[BLOCK_BYTES];
    struct epoch *e = epoch_open(g);

    for (uint64_t block = 0; block < 4 * SEGMENT_FRAMES_MIN; block++)
        write_block_of(b, block, block);
    for (uint64_t block = 0; block < SEGMENT_FRAMES_MIN; block += 2)
        write_block_of(b, block, block);
    assert_non_null(epoch_create(g, e->id + 1));
    e->state = CORE_EPOCH_SEALED;
    while (g->pack.phase != PACK_GATHER)
        assert_true(pack_step(g) || worker_reap(&g->packer) > 0);
    journal_commit_begin(g, e->id);
    assert_true(pack_step(g));
    assert_int_equal(g->pack.phase, PACK_IDLE);
    assert_int_equal(e->jobs, 0);
    counts_are_right(g);
    for (uint64_t block = 0; block < 4 * SEGMENT_FRAMES_MIN; block++) {
        bench_read(b, 0, block * BLOCK_SECTORS, in, sizeof(in));
        memset(block_data, (int)(block % 250 + 1), sizeof(block_data));
        assert_memory_equal(in, block_data, sizeof(in));
    }
}

static int setup(void **state)
{
    *state = bench_new(BLOCKS * BLOCK_BYTES, 1u << 20, 1);
    return 0;
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, bench_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(counts_follow_the_index),
        CASE(what_is_wholly_overwritten_is_freed),
        CASE(repeated_zero_ranges_do_not_fill_the_arena),
        CASE(worn_segments_are_copied_under_pressure),
        CASE(neighbours_become_clusters),
        CASE(lone_blocks_do_not),
        CASE(members_live_on_their_own),
        CASE(the_first_frame_may_be_a_cluster),
        CASE(worn_clusters_are_cut_down),
        CASE(what_does_not_shrink_is_hardly_tried),
        CASE(the_level_follows_room_and_time),
        CASE(there_is_nothing_to_do_until_something_changes),
        CASE(a_step_is_a_few_frames),
        CASE(a_commit_ends_packing_in_the_middle),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
