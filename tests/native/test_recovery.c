/* Rows of native/RECOVERY.md that the simulator meets rarely or never, one test a row. */
#include "support.h"

#include <sys/mman.h>

static int setup(void **state)
{
    struct bench *b = calloc(1, sizeof(*b));

    check(b);
    bench_start(b, 8u << 20, 8u << 20, 1);
    *state = b;
    return 0;
}

static int teardown(void **state)
{
    bench_end(*state);
    free(*state);
    return 0;
}

static void put(struct bench *b, int value)
{
    uint8_t data[BLOCK_BYTES];

    memset(data, value, sizeof(data));
    assert_int_equal(bench_write(b, 0, 0, data, sizeof(data)), 0);
}

static int get(struct bench *b)
{
    uint8_t data[BLOCK_BYTES];

    bench_read(b, 0, 0, data, sizeof(data));
    return data[0];
}

/* The arena while nobody has it open. */
static struct arena_header *arena_map(struct bench *b)
{
    void *at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, b->config.arena_fd, 0);

    check(at != MAP_FAILED);
    return at;
}

static uint8_t *record(struct bench *b)
{
    return b->disk.file[DISK_JOURNAL] + JOURNAL_LOG_OFFSET;
}

/* R8: its flush failed, so what reads back whole may be in a cache only. */
static void an_unacknowledged_record_is_not_believed(void **state)
{
    struct bench *b = *state;

    put(b, 3);
    bench_verb(b, VERB_SEAL);
    b->disk.fail[DISK_JOURNAL][DISK_SYNC] = EIO;
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, -EIO);
    bench_kill(b);
    b->disk.fail[DISK_JOURNAL][DISK_SYNC] = 0;
    assert_int_equal(((struct record_header *)record(b))->magic, RECORD_MAGIC);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->committed, 0);
    assert_int_equal(get(b), 3);
    bench_kill(b);
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0); /* the start before has voided it */
    assert_int_equal(b->group->committed, 0);
    assert_int_equal(get(b), 0);
}

/* R10: the arena has what the journal lost. */
static void a_lost_acknowledged_record_is_committed_anew(void **state)
{
    struct bench *b = *state;

    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO; /* apply must wait */
    put(b, 5);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    bench_kill(b);
    memset(record(b), 0, PAGE);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = 0;
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->committed, 0);
    bench_settle(b);
    assert_int_equal(b->group->committed, 1);
    bench_kill(b);
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->committed, 1);
    assert_int_equal(get(b), 5);
}

/* R11: killed between the two stores of a discard. */
static void a_discard_that_was_under_way_is_finished(void **state)
{
    struct bench *b = *state;
    struct arena_header *h;

    put(b, 7);
    bench_verb(b, VERB_SEAL);
    put(b, 8);
    bench_kill(b);
    h = arena_map(b);
    assert_int_equal(h->open, 2);
    h->base = 3;
    munmap(h, PAGE);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(epoch_open(b->group)->id, 3);
    assert_int_equal(b->group->epochs, 1);
    assert_int_equal(get(b), 0);
}

/* R12: an arena that says less than the journal is not of its time. */
static void an_arena_behind_the_journal_is_refused(void **state)
{
    struct bench *b = *state;
    struct arena_header *h;

    put(b, 9);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    bench_settle(b);
    bench_kill(b);
    h = arena_map(b);
    h->base = h->open = h->committed = 1;
    munmap(h, PAGE);
    assert_int_equal(bench_open(b), -EINVAL);
    assert_non_null(strstr(b->text, "does not go with the journal"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(an_unacknowledged_record_is_not_believed, setup, teardown),
        cmocka_unit_test_setup_teardown(a_lost_acknowledged_record_is_committed_anew, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(a_discard_that_was_under_way_is_finished, setup, teardown),
        cmocka_unit_test_setup_teardown(an_arena_behind_the_journal_is_refused, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
