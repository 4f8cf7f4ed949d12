/* Apply: what it writes when several epochs wait, and how it shares the disk. */
#include "support.h"

static int setup(void **state)
{
    *state = bench_new(8u << 20, 8u << 20, 0);
    return 0;
}

static void put(struct bench *b, uint64_t sector, uint32_t sectors, int value)
{
    uint8_t data[BLOCK_BYTES];

    memset(data, value, sizeof(data));
    assert_int_equal(bench_write(b, 0, sector, data, sectors * SECTOR_BYTES), 0);
}

static void checkpoint(struct bench *b)
{
    assert_int_equal(bench_verb(b, VERB_SEAL)->result, 0);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
}

static void hold_image(struct bench *b, bool hold)
{
    b->disk.hold_file[DISK_IMAGE(0)] = hold;
    bench_settle(b);
}

static uint64_t writes(const struct bench *b)
{
    return b->disk.done[DISK_IMAGE(0)][DISK_WRITE];
}

static uint8_t on_disk(const struct bench *b, uint64_t sector)
{
    return b->disk.file[DISK_IMAGE(0)][sector * SECTOR_BYTES];
}

static uint32_t in_flight(const struct bench *b, enum disk_opcode opcode)
{
    uint32_t n = 0;

    for (const struct disk_op *op = b->disk.first; op; op = op->next)
        n += op->file == DISK_IMAGE(0) && op->opcode == opcode;
    return n;
}

/* Every second block, so that each is a write of its own. */
static void scatter(struct bench *b, uint32_t blocks, int value)
{
    for (uint32_t i = 0; i < blocks; i++)
        put(b, (uint64_t)i * 2 * BLOCK_SECTORS, BLOCK_SECTORS, value);
}

static void commits_go_on_while_an_epoch_is_applied(void **state)
{
    struct bench *b = *state;

    hold_image(b, true);
    put(b, 0, BLOCK_SECTORS, 1);
    checkpoint(b);
    assert_int_equal(in_flight(b, DISK_WRITE), 1);
    for (int i = 2; i <= 10; i++) {
        put(b, 0, BLOCK_SECTORS, i);
        checkpoint(b);
        assert_int_equal(b->group->committed, i);
    }
    assert_int_equal(b->group->applied, 0);
    hold_image(b, false);
    assert_int_equal(b->group->applied, 10);
    assert_int_equal(on_disk(b, 0), 10);
}

static void what_waits_is_written_once(void **state)
{
    struct bench *b = *state;
    uint64_t flushes = b->disk.done[DISK_IMAGE(0)][DISK_SYNC];

    hold_image(b, true);
    for (int i = 1; i <= 20; i++) {
        put(b, 0, BLOCK_SECTORS, i);
        checkpoint(b);
    }
    hold_image(b, false);
    assert_int_equal(writes(b), 2); /* the one that was under way, and the newest */
    assert_int_equal(b->disk.done[DISK_IMAGE(0)][DISK_SYNC] - flushes, 2);
    assert_int_equal(b->group->stats.applies, 20);
    assert_int_equal(b->group->applied, 20);
    assert_int_equal(on_disk(b, 0), 20);
    assert_int_equal(journal_used(&b->group->journal), 0);
}

/* Parts of a block from several epochs; a zero range in between; parts after it. */
static void merged_epochs_give_what_one_after_the_other_gives(void **state)
{
    struct bench *b = *state;

    memset(b->disk.file[DISK_IMAGE(0)], 99, 8u << 20);
    hold_image(b, true);
    put(b, 4096, 1, 1);
    checkpoint(b); /* under way; the others wait behind it */
    put(b, 0, 8, 2);
    put(b, 800, 8, 2);
    checkpoint(b);
    put(b, 1, 2, 3);
    checkpoint(b);
    assert_int_equal(epoch_zero(b->group, 0, 800, 8 * 100, 0), 0);
    checkpoint(b);
    put(b, 2, 1, 4);
    put(b, 802, 1, 4);
    checkpoint(b);
    hold_image(b, false);
    assert_int_equal(b->group->applied, 5);
    assert_int_equal(b->group->stats.applies, 5);
    assert_int_equal(on_disk(b, 0), 2);
    assert_int_equal(on_disk(b, 1), 3);
    assert_int_equal(on_disk(b, 2), 4);
    for (uint64_t sector = 3; sector < 8; sector++)
        assert_int_equal(on_disk(b, sector), 2);
    assert_int_equal(on_disk(b, 8), 99);
    for (uint64_t sector = 800; sector < 1600; sector++)
        assert_int_equal(on_disk(b, sector), sector == 802 ? 4 : 0);
    assert_int_equal(on_disk(b, 799), 99);
    assert_int_equal(on_disk(b, 1600), 99);
    assert_int_equal(writes(b), 3); /* the first one; two blocks, one of them in a part */
}

static void few_writes_are_in_flight_while_the_guest_reads(void **state)
{
    struct bench *b = *state;

    hold_image(b, true);
    b->group->reads_busy = 1;
    scatter(b, 512, 1);
    checkpoint(b);
    assert_int_equal(in_flight(b, DISK_WRITE), APPLY_DEPTH_SHARED);
    b->group->reads_busy = 0;
    bench_settle(b);
    assert_int_equal(in_flight(b, DISK_WRITE), APPLY_DEPTH);
    hold_image(b, false);
    assert_int_equal(b->group->applied, 1);
    assert_int_equal(writes(b), 512);
}

static void a_limit_holds_in_every_moment(void **state)
{
    struct bench *b = *state;
    uint64_t start = b->group->now_ns = 5000000000ull, steps = 0, bytes;

    b->group->config.apply_rate = 1u << 20;
    b->group->config.compress_level = 0; /* the packer's timer is no affair of this */
    scatter(b, 1024, 1);
    checkpoint(b);
    while (b->group->applied == 0) {
        uint64_t due = group_timer(b->group);

        bytes = writes(b) * BLOCK_BYTES;
        assert_true(bytes <= APPLY_BURST_BYTES + BLOCK_BYTES +
                                 (b->group->now_ns - start) * (1u << 20) / 1000000000u);
        assert_true(due > b->group->now_ns);
        b->group->now_ns = due;
        bench_settle(b);
        assert_true(writes(b) * BLOCK_BYTES > bytes || b->group->applied == 1);
        assert_true(++steps < 5000);
    }
    assert_true(b->group->now_ns - start > 2900000000ull); /* three of four MiB had to wait */
    assert_true(b->group->now_ns - start < 3100000000ull); /* and no longer */
    assert_int_equal(group_timer(b->group), 0);
}

static void a_stop_does_not_wait_for_the_limit(void **state)
{
    struct bench *b = *state;

    b->group->now_ns = 5000000000ull;
    b->group->config.apply_rate = 1;
    scatter(b, 1024, 1);
    checkpoint(b);
    assert_int_equal(b->group->applied, 0);
    assert_int_equal(bench_verb(b, VERB_STOP)->result, 0);
    assert_int_equal(b->group->applied, 1);
}

/* More epochs than one pass takes, as one record; only some fit into the arena with data. */
static void a_record_of_many_epochs_is_applied_in_order(void **state)
{
    const uint32_t epochs = APPLY_PASS_EPOCHS * 2 + 5;
    struct bench *b = *state;

    for (uint32_t i = 1; i <= epochs; i++) {
        if (i % 4 == 1) {
            put(b, 0, BLOCK_SECTORS, (int)i);
            put(b, 8 + i, 1, (int)i);
        }
        assert_int_equal(bench_verb(b, VERB_SEAL)->result, 0);
    }
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    bench_settle(b);
    assert_int_equal(b->group->applied, epochs);
    assert_int_equal(b->group->stats.applies, 1);
    assert_int_equal(on_disk(b, 0), epochs); /* written in three passes */
    assert_true(epochs % 4 == 1 && writes(b) >= 3);
    for (uint32_t i = 1; i <= epochs; i += 4)
        assert_int_equal(on_disk(b, 8 + i), i);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, bench_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(commits_go_on_while_an_epoch_is_applied),
        CASE(what_waits_is_written_once),
        CASE(merged_epochs_give_what_one_after_the_other_gives),
        CASE(few_writes_are_in_flight_while_the_guest_reads),
        CASE(a_limit_holds_in_every_moment),
        CASE(a_stop_does_not_wait_for_the_limit),
        CASE(a_record_of_many_epochs_is_applied_in_order),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
