/* The verbs when the disk does not play along: nothing is lost, every verb is answered once,
 * and can be repeated.
 */
#include "support.h"

static int setup(void **state)
{
    *state = bench_new(8u << 20, 8u << 20, 1);
    return 0;
}

static void put(struct bench *b, int value)
{
    uint8_t data[BLOCK_BYTES];

    memset(data, value, sizeof(data));
    assert_int_equal(bench_write(b, 0, 0, data, sizeof(data)), 0);
}

static uint8_t get(struct bench *b)
{
    uint8_t in[SECTOR_BYTES];

    bench_read(b, 0, 0, in, sizeof(in));
    return in[0];
}

static void fail_journal(struct bench *b, int error)
{
    b->disk.fail[DISK_JOURNAL][DISK_WRITE] = error;
    b->disk.fail[DISK_JOURNAL][DISK_SYNC] = error;
}

static void later(struct bench *b)
{
    b->group->now_ns += 2 * GROUP_RETRY_NS;
}

static void a_failed_commit_leaves_the_epoch_sealed(void **state)
{
    struct bench *b = *state;
    static const enum disk_opcode opcode[] = {DISK_WRITE, DISK_SYNC};

    for (uint32_t i = 0; i < 2; i++) {
        const core_event *answer;

        put(b, (int)i + 1);
        bench_verb(b, VERB_SEAL);
        b->disk.fail[DISK_JOURNAL][opcode[i]] = EIO;
        answer = bench_verb(b, VERB_COMMIT);
        assert_int_equal(answer->result, -EIO);
        assert_non_null(strstr(answer->text, "stays sealed"));
        assert_int_equal(bench_count(b, CORE_EVENT_IO_ERROR), 1);
        assert_int_equal(b->group->epoch[0]->state, CORE_EPOCH_SEALED);
        assert_int_equal(b->group->committed, i);
        assert_int_equal(get(b), i + 1);
        b->disk.fail[DISK_JOURNAL][opcode[i]] = 0;
        assert_int_equal(bench_verb(b, VERB_COMMIT)->value, i + 1);
        bench_settle(b);
        assert_int_equal(b->group->applied, i + 1);
        assert_int_equal(b->disk.file[DISK_IMAGE(0)][0], i + 1);
    }
}

/* A commit whose flush failed may be whole on the disk: a discard must void it first. */
static void a_discard_voids_what_a_failed_commit_left(void **state)
{
    struct bench *b = *state;

    put(b, 1);
    bench_verb(b, VERB_SEAL);
    b->disk.fail[DISK_JOURNAL][DISK_SYNC] = EIO;
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, -EIO);
    assert_int_equal(bench_verb(b, VERB_DISCARD)->result, -EIO);
    assert_int_equal(get(b), 1); /* refused as a whole */
    b->disk.fail[DISK_JOURNAL][DISK_SYNC] = 0;
    assert_int_equal(bench_verb(b, VERB_DISCARD)->result, 0);
    assert_int_equal(get(b), 0);
    bench_kill(b);
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->committed, 0);
    assert_int_equal(get(b), 0);
}

static void a_failed_apply_is_repeated_until_it_works(void **state)
{
    static const enum disk_opcode opcode[] = {DISK_WRITE, DISK_SYNC};
    struct bench *b = *state;

    for (uint32_t i = 0; i < 2; i++) {
        put(b, (int)i + 1);
        bench_verb(b, VERB_SEAL);
        b->disk.fail[DISK_IMAGE(0)][opcode[i]] = ENOSPC;
        assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
        assert_int_equal(bench_count(b, CORE_EVENT_IO_ERROR), 1);
        assert_int_equal(b->group->applied, i);
        assert_int_equal(get(b), i + 1);
        assert_true(group_timer(b->group) > b->group->now_ns);
        b->events = 0;
        bench_settle(b); /* not before its time */
        assert_int_equal(bench_count(b, CORE_EVENT_IO_ERROR), 0);
        later(b);
        bench_settle(b);
        assert_int_equal(bench_count(b, CORE_EVENT_IO_ERROR), 1);
        b->disk.fail[DISK_IMAGE(0)][opcode[i]] = 0;
        later(b);
        bench_settle(b);
        assert_int_equal(b->group->applied, i + 1);
        assert_int_equal(group_timer(b->group), 0);
        assert_string_equal(b->group->error, "");
    }
}

static void zeroes_are_written_where_fallocate_is_missing(void **state)
{
    struct bench *b = *state;
    uint8_t zero[4096] = {0};

    memset(b->disk.file[DISK_IMAGE(0)], 9, 8u << 20);
    b->disk.fail[DISK_IMAGE(0)][DISK_PUNCH] = EOPNOTSUPP;
    b->disk.fail[DISK_IMAGE(0)][DISK_ZERO] = EOPNOTSUPP;
    assert_int_equal(epoch_zero(b->group, 0, 8, 4096 * 3, FRAME_UNMAP), 0);
    assert_int_equal(epoch_zero(b->group, 0, 8 * 1700, 8 * 100, 0), 0);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    bench_settle(b);
    assert_int_equal(b->group->applied, 1);
    for (uint32_t block = 0; block < 2048; block++) {
        const uint8_t *at = b->disk.file[DISK_IMAGE(0)] + block * 4096u;
        bool zeroed = (block >= 1 && block < 1 + 1536) || (block >= 1700 && block < 1800);

        memset(zero, zeroed ? 0 : 9, sizeof(zero));
        assert_memory_equal(at, zero, sizeof(zero));
    }
}

static void a_seal_overtakes_a_commit(void **state)
{
    struct bench *b = *state;
    uint64_t commit, seal;

    put(b, 1);
    bench_verb(b, VERB_SEAL);
    b->disk.hold = true;
    b->events = 0;
    commit = bench_submit(b, VERB_COMMIT, 1, false);
    put(b, 2);
    seal = bench_submit(b, VERB_SEAL, 0, false);
    assert_null(bench_answer(b, commit));
    assert_non_null(bench_answer(b, seal));
    assert_int_equal(bench_answer(b, seal)->value, 2);
    b->disk.hold = false;
    bench_settle(b);
    assert_int_equal(bench_answer(b, commit)->value, 1);
}

static void seals_that_wait_for_ids_are_overtaken_by_no_commit(void **state)
{
    struct bench *b = *state;
    const struct verb *first;
    uint64_t commit, seal[2];

    put(b, 1);
    bench_verb(b, VERB_SEAL);
    b->disk.hold = true;
    b->group->journal.epoch_limit = 3; /* more are being reserved, which takes a write */
    b->events = 0;
    commit = bench_submit(b, VERB_COMMIT, 1, false);
    for (int i = 0; i < 2; i++)
        seal[i] = bench_submit(b, VERB_SEAL, 0, false);
    first = b->group->checkpoint.first;
    assert_int_equal(first->token, seal[0]);
    assert_int_equal(first->next->token, seal[1]);
    assert_int_equal(first->next->next->token, commit);
    b->disk.hold = false;
    bench_settle(b);
    assert_int_equal(bench_answer(b, seal[0])->value, 2);
    assert_int_equal(bench_answer(b, seal[1])->value, 3);
    assert_int_equal(bench_answer(b, commit)->value, 1);
}

/* An apply that works says nothing of the journal, and the other way round. */
static void an_error_stands_until_a_success_of_its_own_kind(void **state)
{
    struct bench *b = *state;

    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = ENOSPC;
    put(b, 1);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    assert_non_null(strstr(b->group->error, "of disk \"disk0\": No space left"));
    put(b, 2);
    bench_verb(b, VERB_SEAL);
    b->disk.fail[DISK_JOURNAL][DISK_SYNC] = EIO;
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, -EIO);
    assert_non_null(strstr(b->group->error, "writing the journal: Input/output error; "));
    assert_non_null(strstr(b->group->error, "No space left"));
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = 0;
    later(b);
    bench_settle(b); /* applied; but the head, which is in the journal, cannot move */
    assert_null(strstr(b->group->error, "No space left"));
    assert_non_null(strstr(b->group->error, "writing the journal"));
    assert_non_null(strstr(b->group->error, "moving the journal's head"));
    b->disk.fail[DISK_JOURNAL][DISK_SYNC] = 0;
    later(b);
    bench_settle(b);
    assert_int_equal(b->group->applied, 1);
    assert_non_null(strstr(b->group->error, "writing the journal")); /* nobody committed yet */
    assert_null(strstr(b->group->error, "head"));
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    assert_string_equal(b->group->error, "");
}

/* Ids are reserved on disk in steps of 4096; a journal that fails then must not hang a seal. */
static void without_ids_a_seal_is_refused(void **state)
{
    struct bench *b = *state;
    uint64_t writes;
    const core_event *answer;

    fail_journal(b, EIO);
    b->group->journal.epoch_limit = 3; /* as after 4095 epochs */
    assert_int_equal(bench_verb(b, VERB_SEAL)->value, 1);
    answer = bench_verb(b, VERB_SEAL);
    assert_int_equal(answer->result, -EIO);
    assert_non_null(strstr(answer->text, "no epoch id is left"));
    writes = b->disk.done[DISK_JOURNAL][DISK_WRITE];
    bench_settle(b);
    assert_int_equal(bench_verb(b, VERB_SEAL)->result, -EIO);
    assert_int_equal(bench_verb(b, VERB_DISCARD)->result, -EIO);
    assert_int_equal(b->disk.done[DISK_JOURNAL][DISK_WRITE], writes); /* not before its time */
    later(b);
    fail_journal(b, 0);
    assert_int_equal(bench_verb(b, VERB_SEAL)->result, 0);
}

static uint32_t flushes;

static void flushed(struct flush_waiter *w)
{
    (void)w;
    flushes++;
}

static void a_flush_waits_for_its_commit(void **state)
{
    struct bench *b = *state;
    struct flush_waiter w = {.done = flushed};

    flushes = 0;
    put(b, 1);
    assert_true(checkpoint_flush(b->group, &w)); /* standby: nothing to wait for */
    assert_int_equal(bench_verb(b, VERB_PROMOTE)->result, 0);
    assert_true(checkpoint_flush(b->group, &w)); /* the write was discarded */
    put(b, 2);
    assert_false(checkpoint_flush(b->group, &w));
    fail_journal(b, EIO);
    bench_settle(b);
    assert_int_equal(flushes, 0);
    assert_true(group_timer(b->group) > b->group->now_ns);
    fail_journal(b, 0);
    later(b);
    bench_settle(b);
    assert_int_equal(flushes, 1);
    assert_int_equal(b->group->committed, epoch_open(b->group)->id - 1);
}

/* In between the guest may have flushed, and nobody would ever commit for it. */
static void a_promote_that_fails_lets_flushes_go(void **state)
{
    struct bench *b = *state;
    struct flush_waiter w = {.done = flushed};
    uint64_t promote;

    flushes = 0;
    b->disk.hold = true;
    b->events = 0;
    promote = bench_submit(b, VERB_PROMOTE, 0, false);
    assert_int_equal(b->group->mode, CORE_ACTIVE);
    put(b, 1);
    assert_false(checkpoint_flush(b->group, &w));
    b->disk.hold = false;
    fail_journal(b, EIO);
    bench_settle(b);
    assert_int_equal(bench_answer(b, promote)->result, -EIO);
    assert_int_equal(b->group->mode, CORE_STANDBY);
    assert_int_equal(flushes, 1);
    fail_journal(b, 0);
    assert_int_equal(bench_verb(b, VERB_PROMOTE)->value, 2);
}

/* Nobody waits any more for the commit that failed: no reason to wake for it either. */
static void a_retry_time_that_has_passed_wakes_nobody(void **state)
{
    struct bench *b = *state;
    struct flush_waiter w = {.done = flushed};

    bench_verb(b, VERB_PROMOTE);
    put(b, 1);
    fail_journal(b, EIO);
    assert_false(checkpoint_flush(b->group, &w));
    bench_settle(b);
    checkpoint_unflush(b->group, &w);
    assert_true(group_timer(b->group) > b->group->now_ns);
    later(b);
    bench_settle(b);
    assert_int_equal(group_timer(b->group), 0);
}

static void a_stop_brings_everything_into_the_images(void **state)
{
    struct bench *b = *state;

    put(b, 1);
    bench_verb(b, VERB_SEAL);
    bench_verb(b, VERB_COMMIT);
    assert_int_equal(bench_verb(b, VERB_STOP)->result, 0);
    assert_int_equal(b->disk.file[DISK_IMAGE(0)][0], 1);
    bench_kill(b);
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(epoch_open(b->group)->id, 2); /* goes on where it was */
}

static void a_stop_with_an_error_standing_is_answered(void **state)
{
    struct bench *b = *state;
    const core_event *answer;

    put(b, 1);
    bench_verb(b, VERB_SEAL);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO;
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    answer = bench_verb(b, VERB_STOP);
    assert_int_equal(answer->result, -EIO);
    assert_non_null(strstr(answer->text, "applied at the next start"));
    bench_kill(b);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = 0;
    assert_int_equal(bench_open(b), 0);
    bench_settle(b);
    assert_int_equal(b->disk.file[DISK_IMAGE(0)][0], 1);
}

static void a_stop_without_its_last_superblock_is_told(void **state)
{
    struct bench *b = *state;
    const core_event *answer;
    uint64_t used = epoch_open(b->group)->id;

    fail_journal(b, EIO);
    answer = bench_verb(b, VERB_STOP);
    assert_int_equal(answer->result, -EIO);
    assert_non_null(strstr(answer->text, "last superblock could not be written"));
    bench_kill(b);
    bench_forget_arena(b);
    fail_journal(b, 0);
    assert_int_equal(bench_open(b), 0);
    assert_true(epoch_open(b->group)->id > used);
}

/* The journal says "nothing behind here": whatever came would not be searched for damage. */
static void nothing_is_committed_behind_a_clean_stop(void **state)
{
    struct bench *b = *state;
    static const enum verb_kind verbs[] = {VERB_SEAL, VERB_COMMIT, VERB_DISCARD, VERB_PROMOTE};
    struct flush_waiter w = {.done = flushed};

    flushes = 0;
    assert_int_equal(bench_verb(b, VERB_PROMOTE)->result, 0);
    assert_int_equal(bench_verb(b, VERB_STOP)->result, 0);
    put(b, 1);
    assert_false(checkpoint_flush(b->group, &w));
    bench_settle(b);
    assert_int_equal(flushes, 0);
    for (uint32_t i = 0; i < 4; i++)
        assert_int_equal(bench_verb(b, verbs[i])->result, -ESHUTDOWN);
    checkpoint_unflush(b->group, &w);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, bench_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(a_failed_commit_leaves_the_epoch_sealed),
        CASE(a_discard_voids_what_a_failed_commit_left),
        CASE(a_failed_apply_is_repeated_until_it_works),
        CASE(zeroes_are_written_where_fallocate_is_missing),
        CASE(a_seal_overtakes_a_commit),
        CASE(seals_that_wait_for_ids_are_overtaken_by_no_commit),
        CASE(an_error_stands_until_a_success_of_its_own_kind),
        CASE(a_stop_without_its_last_superblock_is_told),
        CASE(nothing_is_committed_behind_a_clean_stop),
        CASE(without_ids_a_seal_is_refused),
        CASE(a_flush_waits_for_its_commit),
        CASE(a_promote_that_fails_lets_flushes_go),
        CASE(a_retry_time_that_has_passed_wakes_nobody),
        CASE(a_stop_brings_everything_into_the_images),
        CASE(a_stop_with_an_error_standing_is_answered),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
