/* What a guest reads is what it wrote: epochs against plain arrays, with everything that goes
 * on behind them (seals, commits, packing, apply, discards, kills and power cuts).
 */
#include "support.h"

#define SIZE0 (2u << 20)
#define SIZE1 ((1u << 20) + 3 * 512) /* its last block is not whole */
#define SEALED_MAX 8u

static const uint32_t size[BENCH_DISKS] = {SIZE0, SIZE1};

struct state {
    uint8_t *disk[BENCH_DISKS];
};

struct model {
    struct state now, committed, sealed[SEALED_MAX];
    uint64_t sealed_id[SEALED_MAX];
    uint32_t seals;
};

static void state_init(struct state *s)
{
    for (uint32_t i = 0; i < BENCH_DISKS; i++) {
        s->disk[i] = calloc(1, size[i]);
        check(s->disk[i]);
    }
}

static void state_copy(struct state *to, const struct state *from)
{
    for (uint32_t i = 0; i < BENCH_DISKS; i++)
        memcpy(to->disk[i], from->disk[i], size[i]);
}

static void state_free(struct state *s)
{
    for (uint32_t i = 0; i < BENCH_DISKS; i++)
        free(s->disk[i]);
}

static struct model *model_new(void)
{
    struct model *m = calloc(1, sizeof(*m));

    check(m);
    state_init(&m->now);
    state_init(&m->committed);
    for (uint32_t i = 0; i < SEALED_MAX; i++)
        state_init(&m->sealed[i]);
    return m;
}

static void model_free(struct model *m)
{
    state_free(&m->now);
    state_free(&m->committed);
    for (uint32_t i = 0; i < SEALED_MAX; i++)
        state_free(&m->sealed[i]);
    free(m);
}

static void same(struct bench *b, const struct model *m, uint32_t disk, uint64_t sector,
                 uint64_t bytes)
{
    uint8_t *in = malloc(bytes);

    check(in);
    bench_read(b, disk, sector, in, bytes);
    assert_memory_equal(in, m->now.disk[disk] + sector * SECTOR_BYTES, bytes);
    free(in);
}

static void all_the_same(struct bench *b, const struct model *m)
{
    for (uint32_t i = 0; i < BENCH_DISKS; i++)
        same(b, m, i, 0, size[i]);
}

static void images_are(struct bench *b, const struct state *s)
{
    for (uint32_t i = 0; i < BENCH_DISKS; i++)
        assert_memory_equal(b->disk.file[DISK_IMAGE(i)], s->disk[i], size[i]);
}

/* Sectors sector..sector+count-1, often few, at times many, at times at the very end. */
static void place(struct dice *d, uint32_t disk, uint64_t *sector, uint64_t *count)
{
    uint64_t sectors = size[disk] / SECTOR_BYTES;

    *sector = dice_below(d, sectors + 1);
    *count = dice_below(d, dice_below(d, 4) ? 20 : 1500);
    if (*count > sectors - *sector)
        *count = sectors - *sector;
}

static void write_some(struct bench *b, struct model *m, struct dice *d)
{
    uint32_t disk = (uint32_t)dice_below(d, BENCH_DISKS);
    uint64_t sector, count;
    uint8_t *at;

    place(d, disk, &sector, &count);
    if (!bench_room(b, disk, count / BLOCK_SECTORS + 2))
        return;
    at = m->now.disk[disk] + sector * SECTOR_BYTES;
    if (dice_below(d, 6) == 0)
        memset(at, 0, count * SECTOR_BYTES);
    else if (dice_below(d, 2))
        dice_fill(d, at, count * SECTOR_BYTES);
    else
        memset(at, (int)dice_next(d), count * SECTOR_BYTES); /* shrinks */
    assert_int_equal(bench_write(b, disk, sector, at, count * SECTOR_BYTES), 0);
}

static void zero_some(struct bench *b, struct model *m, struct dice *d)
{
    uint32_t disk = (uint32_t)dice_below(d, BENCH_DISKS);
    uint64_t sector, count;

    place(d, disk, &sector, &count);
    if (!bench_room(b, disk, EPOCH_ZERO_ROOM))
        return;
    memset(m->now.disk[disk] + sector * SECTOR_BYTES, 0, count * SECTOR_BYTES);
    assert_int_equal(epoch_zero(b->group, disk, sector, count,
                                (uint32_t)dice_below(d, 2) * FRAME_UNMAP), 0);
}

static void model_seal(struct bench *b, struct model *m)
{
    if (m->seals == SEALED_MAX)
        return;
    state_copy(&m->sealed[m->seals], &m->now);
    m->sealed_id[m->seals++] = bench_verb(b, VERB_SEAL)->value;
}

/* Commits the first n sealed epochs of the model. */
static void model_commit(struct bench *b, struct model *m, uint32_t n)
{
    const core_event *answer;
    struct state first;

    if (n == 0)
        return;
    b->events = 0;
    answer = bench_answer(b, bench_submit(b, VERB_COMMIT, m->sealed_id[n - 1], false));
    assert_non_null(answer);
    assert_int_equal(answer->result, 0);
    assert_int_equal(answer->value, m->sealed_id[n - 1]);
    state_copy(&m->committed, &m->sealed[n - 1]);
    for (uint32_t i = 0; i < n; i++) { /* rotate */
        first = m->sealed[0];
        memmove(&m->sealed[0], &m->sealed[1], (SEALED_MAX - 1) * sizeof(first));
        m->sealed[SEALED_MAX - 1] = first;
        memmove(&m->sealed_id[0], &m->sealed_id[1], (SEALED_MAX - 1) * sizeof(uint64_t));
    }
    m->seals -= n;
}

static void model_discard(struct bench *b, struct model *m)
{
    assert_int_equal(bench_verb(b, VERB_DISCARD)->result, 0);
    state_copy(&m->now, &m->committed);
    m->seals = 0;
}

static void one_step(struct bench *b, struct model *m, struct dice *d)
{
    uint32_t disk = (uint32_t)dice_below(d, BENCH_DISKS);
    uint64_t sector, count;

    switch (dice_below(d, 40)) {
    case 0:
        model_seal(b, m);
        break;
    case 1:
        model_commit(b, m, (uint32_t)dice_below(d, m->seals + 1));
        break;
    case 2:
        if (dice_below(d, 4) == 0)
            model_discard(b, m);
        break;
    case 3:
        bench_settle(b); /* packing, apply */
        break;
    case 4:
        if (dice_below(d, 3) == 0) {
            bench_kill(b);
            assert_int_equal(bench_open(b), 0);
            all_the_same(b, m);
        }
        break;
    case 5:
        if (dice_below(d, 10) == 0) {
            bench_kill(b);
            bench_forget_arena(b);
            assert_int_equal(bench_open(b), 0);
            state_copy(&m->now, &m->committed);
            m->seals = 0;
            all_the_same(b, m);
        }
        break;
    case 6: case 7: case 8: case 9: case 10:
        zero_some(b, m, d);
        break;
    case 11: case 12: case 13: case 14: case 15: case 16:
        place(d, disk, &sector, &count);
        same(b, m, disk, sector, count * SECTOR_BYTES);
        break;
    default:
        write_some(b, m, d);
    }
}

static void run_against_the_model(const char *test, int level, uint32_t reactors, uint32_t steps)
{
    struct dice d = dice_new(test);
    struct bench *b = bench_new(SIZE0, SIZE1, level);

    struct model *m = model_new();
    bench_kill(b);
    b->config.reactors = reactors;
    assert_int_equal(bench_open(b), 0);
    for (uint32_t turn = 0; turn < steps; turn++) {
        if (reactors > 1) /* of the next start */
            b->config.reactors = 1 + (uint32_t)dice_below(&d, reactors);
        one_step(b, m, &d);
        if (group_pressure_percent(b->group) > 90) {
            model_seal(b, m);
            model_commit(b, m, m->seals);
            bench_settle(b);
        }
    }
    all_the_same(b, m);
    model_seal(b, m);
    model_commit(b, m, m->seals);
    bench_settle(b);
    all_the_same(b, m);
    images_are(b, &m->committed);
    images_are(b, &m->now);
    bench_end(b);
    model_free(m);
    free(b);
}

static void reads_follow_the_model_compressed(void **state)
{
    (void)state;
    run_against_the_model(__func__, 1, 1, 6000);
}

static void reads_follow_the_model_uncompressed(void **state)
{
    (void)state;
    run_against_the_model(__func__, 0, 1, 6000);
}

/* Two parts an epoch, and now and then a start with one. */
static void reads_follow_the_model_with_two_reactors(void **state)
{
    (void)state;
    run_against_the_model(__func__, 1, 2, 6000);
}

static int setup(void **state)
{
    *state = bench_new(8u << 20, 1u << 20, 1);
    return 0;
}

/* Every first and last sector of a write in three blocks, over data that is there. */
static void parts_of_blocks_are_merged(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    uint8_t now[3 * BLOCK_BYTES], in[3 * BLOCK_BYTES], data[3 * BLOCK_BYTES];

    dice_fill(&d, now, sizeof(now));
    assert_int_equal(bench_write(b, 0, 0, now, sizeof(now)), 0);
    for (uint64_t first = 0; first < 24; first++)
        for (uint64_t end = first; end <= 24; end++) {
            uint64_t bytes = (end - first) * SECTOR_BYTES;

            if ((first + end) % 3 == 0) {
                assert_int_equal(epoch_zero(b->group, 0, first, end - first, 0), 0);
                memset(now + first * SECTOR_BYTES, 0, bytes);
            } else {
                dice_fill(&d, data, bytes);
                assert_int_equal(bench_write(b, 0, first, data, bytes), 0);
                memcpy(now + first * SECTOR_BYTES, data, bytes);
            }
            bench_read(b, 0, 0, in, sizeof(in));
            assert_memory_equal(in, now, sizeof(in));
            if (end % 8 == 3)
                bench_settle(b); /* parts get packed too */
        }
    bench_kill(b);
    assert_int_equal(bench_open(b), 0);
    bench_read(b, 0, 0, in, sizeof(in));
    assert_memory_equal(in, now, sizeof(in));
}

/* The promise of epoch_room(): what it allowed fits, down to the last segment. */
static void room_that_was_promised_is_there(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    static uint8_t data[200 * BLOCK_BYTES];
    uint64_t refused = 0;

    while (refused < 2000) {
        uint64_t sectors = 1 + dice_below(&d, sizeof(data) / SECTOR_BYTES - 8);
        uint64_t sector = dice_below(&d, (8u << 20) / SECTOR_BYTES - sectors);

        if (!epoch_room(&b->group->writer[0], sectors / BLOCK_SECTORS + 2)) {
            refused++;
            continue;
        }
        dice_fill(&d, data, 64);
        assert_int_equal(bench_write(b, 0, sector, data, sectors * SECTOR_BYTES), 0);
        assert_true(b->group->arena.free_count >= GROUP_RESERVED_SEGMENTS);
    }
    assert_false(epoch_room(&b->group->writer[0], SEGMENT_FRAMES_MIN * 2));
    assert_int_equal(bench_verb(b, VERB_DISCARD)->result, 0);
    assert_true(epoch_room(&b->group->writer[0], SEGMENT_FRAMES_MIN * 2));
}

/* Segments and index of a dropped epoch live until its job is back. */
static void a_dropped_epoch_goes_with_its_last_job(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    struct dice d = dice_new(__func__);
    static uint8_t data[4u << 20];
    struct epoch *e = epoch_open(g);
    uint32_t segments = g->arena.segments;

    dice_fill(&d, data, sizeof(data));
    assert_int_equal(bench_write(b, 0, 0, data, sizeof(data)), 0);
    while (e->jobs == 0)
        assert_true(pack_step(g)); /* the job is with the helper now */
    assert_non_null(epoch_create(g, e->id + 1));
    epoch_drop(g, e);
    assert_null(epoch_by_id(g, e->id));
    assert_true(g->arena.free_count < segments);
    while (g->packer.outstanding > 0)
        worker_reap(&g->packer);
    assert_int_equal(g->arena.free_count, segments);
}

static void packing_shrinks_and_drops_what_was_overwritten(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    static uint8_t data[1u << 20], in[1u << 20];
    uint64_t raw;

    for (uint32_t turn = 0; turn < 8; turn++) {
        for (uint32_t i = 0; i < sizeof(data); i++)
            data[i] = (uint8_t)(turn + 1 + i / 512);
        assert_int_equal(bench_write(b, 0, 0, data, sizeof(data)), 0);
    }
    raw = epoch_stored_bytes(epoch_open(g));
    assert_int_equal(bench_verb(b, VERB_SEAL)->result, 0);
    bench_settle(b);
    assert_true(epoch_stored_bytes(g->epoch[0]) < raw / 20);
    assert_true(g->stats.dropped_frames >= 7 * 256 / 2);
    assert_int_equal(epoch_slots(g->epoch[0]), 256);
    bench_read(b, 0, 0, in, sizeof(in));
    assert_memory_equal(in, data, sizeof(in));
}

/* A request of no sectors must leave nothing, wherever it points. */
static void nothing_written_is_nothing_stored(void **state)
{
    struct bench *b = *state;

    for (uint64_t sector = 0; sector < 10; sector++) {
        assert_int_equal(bench_write(b, 0, sector, NULL, 0), 0);
        assert_int_equal(epoch_zero(b->group, 0, sector, 0, 0), 0);
    }
    assert_true(epoch_empty(epoch_open(b->group)));
}

/* Frames keep their place and their order of writing in the bytes that survive the agent. */
static void the_newest_write_wins_after_a_kill(void **state)
{
    struct bench *b = *state;
    uint8_t data[BLOCK_BYTES], in[BLOCK_BYTES];

    for (uint32_t turn = 1; turn <= 500; turn++) {
        memset(data, (int)turn, sizeof(data));
        assert_int_equal(bench_write(b, 0, 8 * (turn % 3), data, sizeof(data)), 0);
        if (turn % 50 == 0) {
            bench_settle(b);
            bench_kill(b);
            assert_int_equal(bench_open(b), 0);
            bench_read(b, 0, 8 * (turn % 3), in, sizeof(in));
            assert_memory_equal(in, data, sizeof(in));
        }
    }
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, bench_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_follow_the_model_compressed),
        cmocka_unit_test(reads_follow_the_model_uncompressed),
        cmocka_unit_test(reads_follow_the_model_with_two_reactors),
        CASE(parts_of_blocks_are_merged),
        CASE(room_that_was_promised_is_there),
        CASE(a_dropped_epoch_goes_with_its_last_job),
        CASE(packing_shrinks_and_drops_what_was_overwritten),
        CASE(nothing_written_is_nothing_stored),
        CASE(the_newest_write_wins_after_a_kill),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
