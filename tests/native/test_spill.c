/* The spill file: what moves there, what a kill in the middle leaves, what is not believed. */
#include "support.h"

#include <sys/mman.h>
#include <unistd.h>

#define SPILL_BYTES (32u << 20)
#define IMAGE_BYTES (32u << 20)
#define BYTES (24u << 20) /* an arena and a half */

static uint8_t *data;

static int start(void **state, int compress_level)
{
    struct bench *b = bench_new(IMAGE_BYTES, 8u << 20, compress_level);

    data = malloc(BYTES);
    check(data);
    bench_kill(b);
    bench_add_spill(b, SPILL_BYTES);
    assert_int_equal(bench_open(b), 0);
    *state = b;
    return 0;
}

static int setup(void **state)
{
    return start(state, 0);
}

/* What moves are clusters, most of it. */
static int setup_packed(void **state)
{
    return start(state, 1);
}

static int teardown(void **state)
{
    free(data);
    return bench_teardown(state);
}

/* Writes as a ring does: what has no room waits until the group has made some. */
static void put(struct bench *b, uint64_t at, uint64_t bytes)
{
    for (uint64_t end = at + bytes; at < end; at += BLOCK_BYTES) {
        if (!epoch_room(&b->group->writer[0], 1)) {
            spill_hold(b->group, epoch_room_segments(1));
            bench_settle(b);
            assert_true(epoch_room(&b->group->writer[0], 1));
        }
        assert_int_equal(bench_write(b, 0, at / SECTOR_BYTES, data + at, BLOCK_BYTES), 0);
    }
    bench_settle(b);
}

/* Shrinks a little, so that an arena and a half needs more than an arena when it is packed. */
static void make(struct dice *d, uint64_t at, uint64_t bytes)
{
    dice_fill(d, data + at, bytes);
    for (uint64_t end = at + bytes; at < end; at += BLOCK_BYTES)
        memset(data + at, 3, BLOCK_BYTES / 5);
}

static void fill(struct bench *b)
{
    struct dice d = dice_new("fill");

    make(&d, 0, BYTES);
    put(b, 0, BYTES);
}

static uint32_t spilled_frames(const struct arena *a, enum frame_kind kind)
{
    uint32_t count = 0;

    for (uint32_t i = a->segments; i < arena_segments_all(a); i++) {
        uint32_t offset = 0;
        const struct frame_header *h;

        while (a->desc[i].state != SEGMENT_FREE &&
               (h = arena_frame_next(a, i, arena_tail(a, i), &offset)))
            count += h->kind == kind;
    }
    return count;
}

static void check_all(struct bench *b)
{
    uint8_t *in = malloc(BYTES);

    check(in);
    bench_read(b, 0, 0, in, BYTES);
    assert_memory_equal(in, data, BYTES);
    free(in);
}

static void reopen(struct bench *b)
{
    bench_kill(b);
    assert_int_equal(bench_open(b), 0);
}

static void check_refused(struct bench *b, const char *why)
{
    assert_int_not_equal(bench_open(b), 0);
    if (!strstr(b->text, why))
        fail_msg("\"%s\" is not in: %s", why, b->text);
}

static void ram_stays_free_and_all_reads_back(void **state)
{
    struct bench *b = *state;
    struct arena *a = &b->group->arena;

    fill(b);
    assert_true(a->free_count >= a->segments / SPILL_FREE_SHARE);
    assert_true(arena_spill_used(a) * (uint64_t)SEGMENT_BYTES >= BYTES - BENCH_ARENA);
    assert_int_equal(bench_count(b, CORE_EVENT_SPILL), 1);
    check_all(b);
    bench_verb(b, VERB_SEAL);
    assert_true(bench_verb(b, VERB_COMMIT)->result >= 0);
    assert_memory_equal(b->disk.file[DISK_IMAGE(0)], data, BYTES);
    assert_int_equal(arena_spill_used(a), 0);
    assert_int_equal(a->free_count, a->segments);
    assert_int_equal(bench_count(b, CORE_EVENT_SPILL), 1); /* its end */
}

static void a_segment_on_its_way_goes_with_a_discard(void **state)
{
    struct bench *b = *state;
    struct arena *a = &b->group->arena;
    struct dice d = dice_new("discard");

    make(&d, 0, BYTES);
    b->disk.hold = true;
    for (uint64_t at = 0; epoch_room(&b->group->writer[0], 1); at += BLOCK_BYTES) {
        assert_int_equal(bench_write(b, 0, at / SECTOR_BYTES, data + at, BLOCK_BYTES), 0);
        while (group_step(b->group))
            ;
    }
    assert_true(b->group->spill.busy > 0);
    bench_submit(b, VERB_DISCARD, 0, false);
    b->disk.hold = false;
    bench_settle(b);
    assert_int_equal(b->group->spill.busy, 0);
    assert_int_equal(arena_spill_used(a), 0);
    assert_int_equal(a->free_count, a->segments);
}

static void a_commit_waits_for_segments_on_their_way(void **state)
{
    struct bench *b = *state;
    uint64_t at = 0, token;
    struct dice d = dice_new("commit");

    make(&d, 0, BYTES);
    b->disk.hold = true;
    for (; epoch_room(&b->group->writer[0], 1); at += BLOCK_BYTES) {
        assert_int_equal(bench_write(b, 0, at / SECTOR_BYTES, data + at, BLOCK_BYTES), 0);
        while (group_step(b->group))
            ;
    }
    assert_true(b->group->spill.busy > 0);
    bench_submit(b, VERB_SEAL, 0, false);
    token = bench_submit(b, VERB_COMMIT, 0, true);
    assert_null(bench_answer(b, token));
    assert_int_equal(b->group->journal.commit.phase, COMMIT_JOBS);
    b->disk.hold = false;
    bench_settle(b);
    assert_true(bench_answer(b, token)->result >= 0);
    assert_memory_equal(b->disk.file[DISK_IMAGE(0)], data, at);
}

/* Killed after the segment was shown and before its copy in RAM was free. */
static void both_copies_of_a_segment_are_one(void **state)
{
    struct bench *b = *state;
    struct arena *a = &b->group->arena;
    uint32_t spilled = SEGMENT_NONE, ram;
    uint64_t epoch;

    fill(b);
    for (uint32_t i = a->segments; i < arena_segments_all(a) && spilled == SEGMENT_NONE; i++)
        if (a->desc[i].state != SEGMENT_FREE)
            spilled = i;
    assert_true(spilled != SEGMENT_NONE);
    epoch = a->desc[spilled].epoch;
    ram = arena_segment_take(a, epoch, SEGMENT_RAW);
    memcpy(arena_segment(a, ram), arena_segment(a, spilled), SEGMENT_BYTES);
    a->desc[ram].tail = a->desc[spilled].tail;
    reopen(b);
    check_all(b);
    bench_verb(b, VERB_SEAL);
    assert_true(bench_verb(b, VERB_COMMIT)->result >= 0);
    assert_memory_equal(b->disk.file[DISK_IMAGE(0)], data, BYTES);
}

static void a_failed_write_leaves_the_segment_in_ram(void **state)
{
    struct bench *b = *state;
    uint64_t at = 0;
    struct dice d = dice_new("fail");

    dice_fill(&d, data, BYTES);
    b->group->config.compress_level = 0; /* the packer's timer is no affair of this */
    b->disk.fail[DISK_SPILL][DISK_WRITE] = EIO;
    for (; epoch_room(&b->group->writer[0], 1); at += BLOCK_BYTES) {
        assert_int_equal(bench_write(b, 0, at / SECTOR_BYTES, data + at, BLOCK_BYTES), 0);
        bench_settle(b);
    }
    group_hold(&b->group->writer[0], 1);
    bench_settle(b);
    assert_int_equal(arena_spill_used(&b->group->arena), 0);
    assert_true(bench_count(b, CORE_EVENT_IO_ERROR) == 1);
    assert_non_null(strstr(b->group->error, "writing the spill file"));
    assert_int_equal(b->event[b->events - 1].type, CORE_EVENT_PRESSURE);
    assert_int_equal(b->event[b->events - 1].first, 1); /* held after all */
    assert_int_equal(group_timer(b->group), b->group->now_ns + GROUP_RETRY_NS);
    b->disk.fail[DISK_SPILL][DISK_WRITE] = 0;
    b->group->now_ns += GROUP_RETRY_NS;
    bench_settle(b);
    assert_string_equal(b->group->error, "");
    put(b, at, BYTES - at);
    check_all(b);
}

static void what_was_committed_comes_back_without_the_arena(void **state)
{
    struct bench *b = *state;
    uint64_t epoch;

    fill(b);
    epoch = bench_verb(b, VERB_SEAL)->value;
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO;
    assert_int_equal(bench_verb(b, VERB_COMMIT)->value, epoch);
    bench_kill(b);
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0);
    assert_true(arena_spill_used(&b->group->arena) > 0);
    check_all(b);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = 0;
    bench_settle(b);
    assert_memory_equal(b->disk.file[DISK_IMAGE(0)], data, BYTES);
}

static void without_the_file_a_journal_may_be_too_much(void **state)
{
    struct bench *b = *state;
    uint64_t epoch;

    fill(b);
    epoch = bench_verb(b, VERB_SEAL)->value;
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO;
    assert_int_equal(bench_verb(b, VERB_COMMIT)->value, epoch);
    bench_kill(b);
    bench_forget_arena(b);
    b->config.spill_bytes = 0;
    check_refused(b, "too small for the committed epochs");
    b->config.spill_bytes = SPILL_BYTES;
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0);
    check_all(b);
}

static void a_file_that_is_not_the_arenas_is_refused(void **state)
{
    struct bench *b = *state;
    struct spill_header *h = (struct spill_header *)b->disk.file[DISK_SPILL];

    fill(b);
    bench_kill(b);
    h->id[0] ^= 1;
    check_refused(b, "not the one that the arena was using");
    h->id[0] ^= 1;
    h->group[0] ^= 1;
    check_refused(b, "another consistency group");
    h->group[0] ^= 1;
    h->version++;
    check_refused(b, "another version");
    h->version--;
    h->magic++;
    check_refused(b, "no spill file");
    h->magic--;
    b->config.spill_bytes -= SEGMENT_BYTES;
    check_refused(b, "which is not there");
    b->config.spill_bytes = 0;
    check_refused(b, "which is not there");
    b->config.spill_bytes = SPILL_BYTES;
    assert_int_equal(ftruncate(b->disk.fd[DISK_SPILL], SPILL_BYTES), 0);
    check_refused(b, "has not the");
    assert_int_equal(ftruncate(b->disk.fd[DISK_SPILL], SEGMENT_BYTES), 0);
    assert_int_equal(ftruncate(b->disk.fd[DISK_SPILL], SPILL_BYTES + SEGMENT_BYTES), 0);
    check_refused(b, "cannot be read"); /* its frames are zeroes now */
}

static void a_file_with_nothing_in_use_may_be_any(void **state)
{
    struct bench *b = *state;
    uint8_t in[BLOCK_BYTES];

    memset(data, 5, BLOCK_BYTES);
    put(b, 0, BLOCK_BYTES);
    bench_kill(b);
    memset(b->disk.file[DISK_SPILL], 0xee, PAGE);
    assert_int_equal(bench_open(b), 0);
    bench_read(b, 0, 0, in, BLOCK_BYTES);
    assert_memory_equal(in, data, BLOCK_BYTES);
    bench_kill(b);
    b->config.spill_bytes = 0; /* nor is it needed */
    assert_int_equal(bench_open(b), 0);
    bench_kill(b);
    b->config.spill_bytes = SPILL_BYTES;
    assert_int_equal(bench_open(b), 0);
    fill(b);
    check_all(b);
}

/* Every byte of a frame in the file counts: reads and commits notice. */
static void a_changed_frame_is_never_passed_on(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new("change");
    const core_event *answer;
    uint32_t changed = 0;

    fill(b);
    check_all(b); /* what was expanded is not believed for it */
    for (uint32_t i = 0; i < 400; i++) {
        struct arena *a = &b->group->arena;
        uint32_t segment = a->segments + (uint32_t)dice_below(&d, a->spill_segments);
        uint32_t tail = arena_tail(a, segment), offset = 0, at = 0, n;
        struct frame_header *h = NULL;
        uint8_t out[BLOCK_BYTES], *byte, mask;
        uint64_t block;

        if (a->desc[segment].state == SEGMENT_FREE)
            continue;
        for (n = (uint32_t)dice_below(&d, 40); n > 0; n--) {
            at = offset;
            h = arena_frame_next(a, segment, tail, &offset);
            if (!h)
                break;
        }
        if (!h)
            continue;
        block = h->block + dice_below(&d, h->blocks);
        mask = h->mask;
        n = (uint32_t)dice_below(&d, sizeof(*h) + h->payload_bytes);
        byte = b->disk.file[DISK_SPILL] + arena_spill_offset(a, segment) + at + n;
        *byte ^= (uint8_t)(1u << dice_below(&d, 8));
        assert_int_equal(frame_expand(&b->group->writer[0].expand, a, arena_loc_of(segment, at), block, mask,
                                      out), -EIO);
        changed++;
    }
    assert_true(changed > 10);
    bench_verb(b, VERB_SEAL);
    answer = bench_verb(b, VERB_COMMIT);
    assert_int_equal(answer->result, -EIO);
    assert_non_null(strstr(answer->text, "spill file"));
    assert_int_equal(b->group->committed, 0);
    assert_true(bench_verb(b, VERB_DISCARD)->result >= 0);
    assert_int_equal(arena_spill_used(&b->group->arena), 0);
}

/* A page may leave the cache and come back different, at any time: the record has what was
 * checked. The write of it is under way when the file changes. */
static void what_changes_behind_a_check_is_not_written(void **state)
{
    struct bench *b = *state;
    uint64_t token;

    fill(b);
    bench_verb(b, VERB_SEAL);
    b->disk.hold = true;
    b->events = 0;
    token = bench_submit(b, VERB_COMMIT, 0, true);
    assert_null(bench_answer(b, token));
    assert_true(b->group->journal.commit.checked > 0);
    for (uint64_t at = SEGMENT_BYTES; at < SPILL_BYTES; at += SECTOR_BYTES)
        b->disk.file[DISK_SPILL][at] ^= 1;
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO;
    disk_reap(&b->disk.disk, true); /* what was checked before; the rest is lost */
    b->disk.hold = false;
    for (uint64_t at = SEGMENT_BYTES; at < SPILL_BYTES; at += SECTOR_BYTES)
        b->disk.file[DISK_SPILL][at] ^= 1;
    bench_settle(b);
    assert_int_equal(bench_answer(b, token)->result, 0);
    bench_kill(b);
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0);
    check_all(b);
}

/* SIGBUS: the page is not there any more. */
static void a_file_that_shrinks_is_an_error(void **state)
{
    struct bench *b = *state;
    uint8_t out[BLOCK_BYTES];
    const uint8_t *direct;
    int failed = 0;

    assert_int_equal(memory_handle_sigbus(), 0); /* cmocka has its own in a test */
    fill(b);
    assert_int_equal(ftruncate(b->disk.fd[DISK_SPILL], SEGMENT_BYTES), 0);
    for (uint64_t block = 0; block < BYTES / BLOCK_BYTES; block++)
        if (epoch_read(b->group, 0, block, MASK_FULL, out, &direct) < 0) {
            failed++; /* nor is a part of it replaced */
            assert_int_equal(bench_write(b, 0, block * BLOCK_SECTORS, data, SECTOR_BYTES), -EIO);
        }
    assert_true(failed > 0);
    assert_true(arena_spill_lost(&b->group->arena));
    assert_int_equal(bench_count(b, CORE_EVENT_IO_ERROR), 1);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, -EIO);
    assert_true(bench_verb(b, VERB_DISCARD)->result >= 0);
    memset(data, 9, BLOCK_BYTES);
    put(b, 0, BLOCK_BYTES);
    assert_int_equal(arena_spill_used(&b->group->arena), 0);
}

/* The journal has what the file has lost of a committed epoch. */
static void a_committed_epoch_outlives_the_file(void **state)
{
    struct bench *b = *state;
    uint64_t epoch;

    assert_int_equal(memory_handle_sigbus(), 0);
    fill(b);
    epoch = bench_verb(b, VERB_SEAL)->value;
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO;
    assert_int_equal(bench_verb(b, VERB_COMMIT)->value, epoch);
    assert_int_equal(ftruncate(b->disk.fd[DISK_SPILL], SEGMENT_BYTES), 0);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = 0;
    b->group->now_ns += GROUP_RETRY_NS;
    bench_settle(b);
    assert_non_null(strstr(b->group->error, "remove the arena from /dev/shm"));
    assert_int_equal(b->group->applied, 0);
    bench_kill(b);
    bench_forget_arena(b);
    assert_int_equal(ftruncate(b->disk.fd[DISK_SPILL], SPILL_BYTES + SEGMENT_BYTES), 0);
    assert_int_equal(bench_open(b), 0);
    bench_settle(b);
    assert_int_equal(b->group->applied, epoch);
    assert_memory_equal(b->disk.file[DISK_IMAGE(0)], data, BYTES);
}

/* Read before and after: the clusters that an expander keeps are of a place and its time. */
static void a_place_that_is_used_again_has_the_new_clusters(void **state)
{
    struct bench *b = *state;

    for (uint32_t i = 0; i < 3; i++) {
        fill(b);
        assert_true(spilled_frames(&b->group->arena, FRAME_CLUSTER) > 100);
        check_all(b);
        assert_true(bench_verb(b, VERB_DISCARD)->result >= 0);
        bench_settle(b);
        assert_int_equal(arena_spill_used(&b->group->arena), 0);
    }
}

/* 24 MiB are alive at any time; RAM has 16 and the file 32. */
static void what_was_overwritten_makes_room(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new("overwrite");

    fill(b);
    for (uint32_t i = 0; i < 20000; i++) {
        uint64_t at = dice_below(&d, BYTES / BLOCK_BYTES) * BLOCK_BYTES;

        make(&d, at, BLOCK_BYTES);
        put(b, at, BLOCK_BYTES);
    }
    check_all(b);
    reopen(b);
    check_all(b);
    bench_verb(b, VERB_SEAL);
    assert_true(bench_verb(b, VERB_COMMIT)->result >= 0);
    assert_memory_equal(b->disk.file[DISK_IMAGE(0)], data, BYTES);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
#define PACKED(f) {#f "_packed", f, setup_packed, teardown, NULL}
    const struct CMUnitTest tests[] = {
        TEST(ram_stays_free_and_all_reads_back),
        TEST(a_segment_on_its_way_goes_with_a_discard),
        TEST(a_commit_waits_for_segments_on_their_way),
        TEST(both_copies_of_a_segment_are_one),
        TEST(a_failed_write_leaves_the_segment_in_ram),
        TEST(what_was_committed_comes_back_without_the_arena),
        TEST(without_the_file_a_journal_may_be_too_much),
        TEST(a_file_that_is_not_the_arenas_is_refused),
        TEST(a_file_with_nothing_in_use_may_be_any),
        TEST(a_changed_frame_is_never_passed_on),
        TEST(what_changes_behind_a_check_is_not_written),
        TEST(a_file_that_shrinks_is_an_error),
        TEST(what_was_overwritten_makes_room),
        TEST(a_committed_epoch_outlives_the_file),
        PACKED(a_place_that_is_used_again_has_the_new_clusters),
        PACKED(a_segment_on_its_way_goes_with_a_discard),
        PACKED(a_commit_waits_for_segments_on_their_way),
        PACKED(both_copies_of_a_segment_are_one),
        PACKED(what_was_committed_comes_back_without_the_arena),
        PACKED(a_changed_frame_is_never_passed_on),
        PACKED(what_changes_behind_a_check_is_not_written),
        PACKED(a_file_that_shrinks_is_an_error),
        PACKED(what_was_overwritten_makes_room),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
