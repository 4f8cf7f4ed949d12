/* Commits that leave out what is dead: the record has what is alive, all of it, and every start
 * comes up with the same, with the arena and without. */
#include "support.h"

#include "checksum.h"

#define BLOCKS 512u                 /* that the guest writes to: 2 MiB */
#define BYTES (BLOCKS * BLOCK_BYTES)

static uint8_t data[2 * BYTES];     /* what disk 0 must hold */

static int start(void **state, int compress_level)
{
    struct bench *b = bench_new(8u << 20, 8u << 20, compress_level);

    memset(data, 0, sizeof(data));
    *state = b;
    return 0;
}

static int setup(void **state)
{
    return start(state, 0);
}

static int setup_packed(void **state)
{
    return start(state, 1);
}

/* A block that shrinks by half. */
static void fill(struct dice *d, uint8_t *block)
{
    dice_fill(d, block, BLOCK_BYTES / 2);
    memset(block + BLOCK_BYTES / 2, (int)dice_below(d, 255) + 1, BLOCK_BYTES / 2);
}

static void put(struct bench *b, struct dice *d, uint64_t block)
{
    fill(d, data + block * BLOCK_BYTES);
    assert_int_equal(bench_write(b, 0, block * BLOCK_SECTORS, data + block * BLOCK_BYTES,
                                 BLOCK_BYTES), 0);
}

static void overwrite(struct bench *b, struct dice *d, uint32_t writes)
{
    for (uint32_t i = 0; i < writes; i++) {
        put(b, d, dice_below(d, BLOCKS));
        if (i % 64 == 0)
            bench_settle(b);
    }
}

static void zero(struct bench *b, uint64_t block, uint64_t blocks)
{
    memset(data + block * BLOCK_BYTES, 0, blocks * BLOCK_BYTES);
    assert_int_equal(epoch_zero(b->group, 0, block * BLOCK_SECTORS, blocks * BLOCK_SECTORS, 0), 0);
}

static void check_all(struct bench *b)
{
    static uint8_t in[sizeof(data)];

    bench_read(b, 0, 0, in, sizeof(in));
    assert_memory_equal(in, data, sizeof(in));
}

/* Commits, but keeps apply from it. */
static void commit(struct bench *b)
{
    bench_verb(b, VERB_SEAL);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO;
    b->disk.fail[DISK_IMAGE(0)][DISK_ZERO] = EIO;
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
}

static void apply(struct bench *b)
{
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = 0;
    b->disk.fail[DISK_IMAGE(0)][DISK_ZERO] = 0;
    b->group->now_ns += 2 * GROUP_RETRY_NS;
    bench_settle(b);
    assert_int_equal(b->group->applied, b->group->committed);
    assert_memory_equal(b->disk.file[DISK_IMAGE(0)], data, sizeof(data));
}

static uint32_t errors_told(const struct bench *b)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < b->events; i++)
        n += b->event[i].type == CORE_EVENT_LOG && b->event[i].value >= LOG_ERROR;
    return n;
}

/* Every way to start again. */
static void check_starts(struct bench *b)
{
    uint64_t committed = b->group->committed;

    for (uint32_t turn = 0; turn < 4; turn++) {
        bench_kill(b);
        if (turn == 2)
            bench_forget_arena(b);
        b->events = 0;
        assert_int_equal(bench_open(b), 0);
        assert_int_equal(errors_told(b), 0);
        assert_int_equal(b->group->committed, committed);
        check_all(b);
    }
    apply(b);
}

/* ---- The record as it lies in the journal ------------------------------------------------- */

struct recorded {
    uint32_t frames, segments, blocks; /* blocks: each version of one counts */
    uint64_t bytes;
};

static struct recorded record(struct bench *b)
{
    const uint8_t *at = b->disk.file[DISK_JOURNAL] + JOURNAL_LOG_OFFSET;
    const struct record_header *h = (const struct record_header *)at;
    const struct record_segment *table = (const struct record_segment *)(h + 1);
    struct recorded r = {.segments = h->segments, .bytes = h->record_bytes};

    assert_int_equal(h->magic, RECORD_MAGIC);
    assert_int_equal(h->crc, journal_record_crc(h));
    at += h->header_bytes;
    for (uint32_t i = 0; i < h->segments; i++) {
        uint32_t offset = 0, crc = 0;
        const struct frame_header *f;

        while ((f = frame_next((uint8_t *)(uintptr_t)at, table[i].bytes, &offset))) {
            assert_int_equal(f->crc, frame_crc(f));
            crc = checksum_crc32c(crc, f, sizeof(*f));
            r.frames++;
            r.blocks += f->blocks;
        }
        assert_int_equal(offset, table[i].bytes);
        assert_int_equal(crc, table[i].crc);
        at += page_round_up(table[i].bytes);
    }
    return r;
}

/* Segments that are mostly alive are written whole, so there may be a few dead ones. */
static void a_record_has_each_block_once(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    uint64_t used = b->group->arena.free_count;
    struct recorded r;

    for (uint32_t i = 0; i < BLOCKS; i++)
        put(b, &d, i);
    overwrite(b, &d, 2000);
    used -= b->group->arena.free_count;
    commit(b);
    r = record(b);
    assert_in_range(r.frames, BLOCKS, BLOCKS + BLOCKS / CONDENSE_DEAD_SHARE);
    assert_true(r.segments <= used / 2);
    check_starts(b);
}

static void packed_and_raw_frames_are_together(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);

    for (uint32_t i = 0; i < BLOCKS; i++)
        put(b, &d, i);
    b->group->pack.paused = true;
    bench_settle(b);
    overwrite(b, &d, 1500);
    commit(b);
    assert_true(record(b).blocks >= BLOCKS);
    assert_true(record(b).blocks < BLOCKS + 400); /* those of clusters that live in part */
    check_starts(b);
}

/* Only the newest version counts, for they are durable together or not at all. */
static void several_epochs_are_one_state(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    struct recorded r;

    for (uint32_t epoch = 0; epoch < 4; epoch++) {
        for (uint32_t i = 0; i < BLOCKS; i++)
            put(b, &d, i);
        if (epoch < 3)
            bench_verb(b, VERB_SEAL);
    }
    commit(b);
    r = record(b);
    assert_int_equal(r.frames, BLOCKS);
    assert_int_equal(b->group->committed, 4);
    check_starts(b);
}

/* Parts of blocks, whole ones and ranges of zeroes over and under each other, in any order. */
static void parts_and_ranges_add_up(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);

    for (uint32_t turn = 0; turn < 12; turn++) {
        for (uint32_t i = 0; i < 600; i++) {
            uint64_t block = dice_below(&d, BLOCKS), from = dice_below(&d, BLOCK_SECTORS);
            uint64_t n = 1 + dice_below(&d, 2 * BLOCK_SECTORS);
            uint8_t *at = data + (block * BLOCK_SECTORS + from) * SECTOR_BYTES;

            if (dice_below(&d, 8) == 0) {
                zero(b, block, 1 + dice_below(&d, 40));
            } else if (dice_below(&d, 2) == 0) {
                put(b, &d, block);
            } else {
                dice_fill(&d, at, n * SECTOR_BYTES);
                assert_int_equal(bench_write(b, 0, block * BLOCK_SECTORS + from, at,
                                             n * SECTOR_BYTES), 0);
            }
            if (dice_below(&d, 150) == 0)
                bench_verb(b, VERB_SEAL);
        }
        commit(b);
        check_starts(b);
    }
}

static void what_is_mostly_alive_is_written_from_where_it_lies(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    struct recorded r;

    for (uint32_t i = 0; i < BLOCKS; i++)
        put(b, &d, i);
    overwrite(b, &d, BLOCKS / 20);
    commit(b);
    r = record(b);
    assert_int_equal(r.frames, BLOCKS + BLOCKS / 20);
    assert_int_equal(b->group->arena.header->condensed, 0);
    check_starts(b);
}

/* A record is never more segments than it was: so the arena takes it back. */
static void a_full_arena_takes_the_record_back(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    uint64_t n = 0;

    while (epoch_room(&b->group->writer[0], 1)) {
        put(b, &d, n++ % 3 ? dice_below(&d, 2 * BLOCKS) : 0);
        if (n % 700 == 0)
            bench_verb(b, VERB_SEAL);
    }
    commit(b);
    check_starts(b);
}

/* Killed over that: half of the record is in the arena. */
static void taking_it_back_can_be_repeated(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    struct segment_desc *desc;

    overwrite(b, &d, 1500);
    commit(b);
    desc = b->group->arena.desc;
    for (uint32_t i = 0; i < b->group->arena.segments; i++)
        if (desc[i].epoch == b->group->committed && i % 2)
            desc[i].state = SEGMENT_FREE;
    check_starts(b);
}

static void a_damaged_frame_fails_the_commit_if_it_counts(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);

    for (uint32_t alive = 0; alive < 2; alive++) {
        const struct index_slot *s;
        arena_loc first;

        b->group->config.compress_level = 1;
        for (uint32_t i = 0; i < BLOCKS; i++)
            put(b, &d, i * 2); /* no clusters */
        b->group->pack.paused = true;
        bench_settle(b);
        b->group->config.compress_level = 0;
        s = index_find(epoch_index(epoch_open(b->group), 0), 0, 0);
        first = s->loc;
        assert_int_equal(arena_frame(&b->group->arena, first)->kind, FRAME_ZSTD);
        for (uint32_t i = 0; i < BLOCKS; i++)
            if (i > 0 || !alive)
                put(b, &d, i * 2);
        b->config.compress_level = 0;
        bench_kill(b);
        assert_int_equal(bench_open(b), 0); /* from now on what has a checksum must fit it */
        ((uint8_t *)(arena_frame(&b->group->arena, first) + 1))[20] ^= 1;
        bench_verb(b, VERB_SEAL);
        b->events = 0;
        assert_int_equal(bench_verb(b, VERB_COMMIT)->result, alive ? -EILSEQ : 0);
        bench_settle(b);
        if (!alive)
            assert_memory_equal(b->disk.file[DISK_IMAGE(0)], data, sizeof(data));
    }
}

/* ---- The packer at work ------------------------------------------------------------------- */

static void nothing(struct job *job, struct worker *w)
{
    (void)job;
    (void)w;
}

/* It has written frames behind those that are shown; it may do so for long. */
static void a_commit_does_not_wait_for_the_packer(void **state)
{
    struct bench *b = *state;
    struct group *g = b->group;
    struct dice d = dice_new(__func__);
    uint64_t token;

    for (uint32_t turn = 0; turn < 3; turn++) {
        struct epoch *e = epoch_open(g);

        for (uint32_t i = 0; i < 200; i++)
            put(b, &d, i);
        checkpoint_submit(g, &(struct verb){.kind = VERB_SEAL, .token = 1});
        for (uint32_t i = 0; g->pack.phase != PACK_JOB ||
                             (turn > 0 && e->packed.segment == SEGMENT_NONE); i++) {
            assert_true(i < 2000);
            group_step(g);
        }
        b->events = 0;
        checkpoint_submit(g, &(struct verb){.kind = VERB_COMMIT, .token = 2, .newest = true});
        g->pack.job.run(&g->pack.job, &g->packer); /* is over, but nobody has looked */
        g->pack.job.run = nothing;
        token = 2;
        for (uint32_t i = 0; i < 2000 && !bench_answer(b, token); i++) {
            checkpoint_step(g);
            journal_step(g);
            worker_reap(&g->worker);
            disk_reap(&b->disk.disk, false);
        }
        assert_int_equal(g->pack.phase, PACK_JOB);
        assert_int_equal(bench_answer(b, token)->result, 0);
        assert_true(g->arena.header->condensed == e->id);
        if (turn == 1)
            check_starts(b);
        else
            apply(b);
        g = b->group;
    }
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, bench_teardown)
#define PACKED(f) {#f "_packed", f, setup_packed, bench_teardown, NULL}
    const struct CMUnitTest tests[] = {
        TEST(a_record_has_each_block_once),
        TEST(several_epochs_are_one_state),
        TEST(parts_and_ranges_add_up),
        TEST(what_is_mostly_alive_is_written_from_where_it_lies),
        TEST(a_full_arena_takes_the_record_back),
        TEST(taking_it_back_can_be_repeated),
        TEST(a_damaged_frame_fails_the_commit_if_it_counts),
        PACKED(packed_and_raw_frames_are_together),
        PACKED(parts_and_ranges_add_up),
        PACKED(a_full_arena_takes_the_record_back),
        PACKED(taking_it_back_can_be_repeated),
        PACKED(a_commit_does_not_wait_for_the_packer),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
