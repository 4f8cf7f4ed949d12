/* Dictionaries: frames made with and without one live side by side, a frame whose dictionary is
 * not there stops the start, and what cannot be one is refused.
 */
#include "support.h"

#include <zdict.h>

#define BLOCKS 512u
#define SAMPLES 400u
#define FIRST 50001u
#define SECOND 50002u

/* Lines of a log, as they could stand in any block. */
static void fill_log(uint8_t *to, uint64_t seed)
{
    struct dice d = {.state = seed * 77 + 5};
    uint32_t at = 0;

    while (at < BLOCK_BYTES) {
        char line[160];
        int n = snprintf(line, sizeof(line), "request %llu of the virtqueue took %llu ns; the "
                         "epoch %llu was sealed and waits for its checkpoint\n",
                         (unsigned long long)dice_below(&d, 100000),
                         (unsigned long long)dice_next(&d), (unsigned long long)dice_below(&d, 99));

        for (int i = 0; i < n && at < BLOCK_BYTES; i++)
            to[at++] = (uint8_t)line[i];
    }
}

static core_dictionary train(uint32_t id, uint64_t seed)
{
    static uint8_t samples[SAMPLES * BLOCK_BYTES], content[8192];
    static size_t sizes[SAMPLES];
    ZDICT_params_t params = {.dictID = id};
    uint8_t *made = malloc(16384);
    size_t bytes;

    check(made);
    for (uint32_t i = 0; i < SAMPLES; i++) {
        fill_log(samples + i * BLOCK_BYTES, seed + i);
        sizes[i] = BLOCK_BYTES;
    }
    memcpy(content, samples, sizeof(content));
    bytes = ZDICT_finalizeDictionary(made, 16384, content, sizeof(content), samples, sizes,
                                     SAMPLES, params);
    check(!ZDICT_isError(bytes));
    return (core_dictionary){.data = made, .bytes = bytes, .id = id};
}

static core_dictionary first, second;

static int setup(void **state)
{
    *state = bench_new(BLOCKS * BLOCK_BYTES, 1u << 20, 1);
    return 0;
}

/* With these from now on; what group_open() returned. */
static int restart_with(struct bench *b, const core_dictionary *d, uint32_t count)
{
    if (b->group)
        bench_kill(b);
    b->config.dictionaries = count;
    for (uint32_t i = 0; i < count; i++)
        b->config.dictionary[i] = d[i];
    return bench_open(b);
}

static void write_logs(struct bench *b, uint64_t from, uint64_t to, uint64_t step)
{
    uint8_t data[BLOCK_BYTES];

    for (uint64_t i = from; i < to; i += step) {
        fill_log(data, i + 1000);
        assert_int_equal(bench_write(b, 0, i * BLOCK_SECTORS, data, sizeof(data)), 0);
    }
    assert_int_equal(bench_verb(b, VERB_SEAL)->result, 0);
    bench_settle(b);
}

static void logs_are_there(struct bench *b, uint64_t from, uint64_t to, uint64_t step)
{
    uint8_t data[BLOCK_BYTES], in[BLOCK_BYTES];

    for (uint64_t i = from; i < to; i += step) {
        fill_log(data, i + 1000);
        bench_read(b, 0, i * BLOCK_SECTORS, in, sizeof(in));
        assert_memory_equal(in, data, sizeof(in));
    }
}

/* Frames in the arena that name it. */
static uint32_t frames_of(const struct group *g, uint32_t id, uint8_t kind)
{
    const struct arena *a = &g->arena;
    const struct frame_header *h;
    uint32_t count = 0;

    for (uint32_t i = 0; i < a->segments; i++) {
        uint32_t offset = 0;

        while (a->desc[i].state != SEGMENT_FREE &&
               (h = arena_frame_next(a, i, arena_tail(a, i), &offset)))
            count += h->kind == kind && frame_dictionary(h) == id;
    }
    return count;
}

static void frames_with_and_without_one_live_side_by_side(void **state)
{
    struct bench *b = *state;
    core_dictionary both[] = {first, second};

    write_logs(b, 0, 128, 1);
    assert_true(frames_of(b->group, 0, FRAME_CLUSTER) > 0);
    assert_int_equal(restart_with(b, both, 1), 0);
    assert_int_equal(b->group->dictionaries.at[0].named, false);
    write_logs(b, 128, 256, 1);
    write_logs(b, 256, 384, 2); /* no neighbours: one by one */
    assert_true(frames_of(b->group, FIRST, FRAME_CLUSTER) > 0);
    assert_true(frames_of(b->group, FIRST, FRAME_ZSTD) > 0);
    assert_int_equal(dictionaries_add(&b->group->dictionaries, &second, b->text), 0);
    write_logs(b, 384, 512, 1); /* while it runs */
    assert_true(frames_of(b->group, SECOND, FRAME_CLUSTER) > 0);
    assert_int_equal(restart_with(b, both, 2), 0);
    assert_true(b->group->dictionaries.at[0].named && b->group->dictionaries.at[1].named);
    for (uint32_t pass = 0; pass < 2; pass++) {
        logs_are_there(b, 0, 256, 1);
        logs_are_there(b, 256, 384, 2);
        logs_are_there(b, 384, 512, 1);
        if (pass == 0) { /* from the images */
            assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
            bench_settle(b);
            assert_int_equal(b->group->epochs, 1);
        }
    }
}

/* One that comes later than the blocks serves those only that are packed after it. */
static void what_is_compressed_with_one_is_smaller(void **state)
{
    struct bench *b = *state;
    uint64_t without, in, out;

    write_logs(b, 0, 256, 2);
    without = b->group->stats.pack_bytes_out;
    assert_int_equal(dictionaries_add(&b->group->dictionaries, &first, b->text), 0);
    in = b->group->stats.pack_bytes_in;
    write_logs(b, 1, 256, 2);
    out = b->group->stats.pack_bytes_out - without;
    assert_int_equal(b->group->stats.pack_bytes_in - in, in);
    assert_true(out < without * 9 / 10);
    assert_int_equal(b->group->stats.dictionary_frames, 128);
}

static void a_start_without_it_is_refused_and_changes_nothing(void **state)
{
    struct bench *b = *state;

    assert_int_equal(restart_with(b, &first, 1), 0);
    write_logs(b, 0, 128, 1);
    assert_int_equal(restart_with(b, NULL, 0), -ENOKEY);
    assert_non_null(strstr(b->text, "0000c351")); /* FIRST */
    assert_int_equal(restart_with(b, &second, 1), -ENOKEY);
    assert_int_equal(restart_with(b, &first, 1), 0);
    logs_are_there(b, 0, 128, 1);
}

/* The arena is gone: frames come back from the journal. */
static void so_is_one_with_only_the_journal_that_needs_it(void **state)
{
    struct bench *b = *state;

    assert_int_equal(restart_with(b, &first, 1), 0);
    write_logs(b, 0, 128, 1);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO; /* apply must wait */
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    bench_kill(b);
    bench_forget_arena(b);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = 0;
    assert_int_equal(restart_with(b, NULL, 0), -ENOKEY);
    bench_forget_arena(b); /* as the agent does with one that it has just made */
    assert_int_equal(restart_with(b, &first, 1), 0);
    logs_are_there(b, 0, 128, 1);
    bench_settle(b);
    assert_int_equal(b->group->applied, b->group->committed);
    assert_int_equal(restart_with(b, NULL, 0), 0); /* nothing names it any more */
    logs_are_there(b, 0, 128, 1);
}

static void what_cannot_be_one_is_refused(void **state)
{
    struct bench *b = *state;
    struct dictionaries *d = &b->group->dictionaries;
    uint8_t *copy = malloc(first.bytes);
    core_dictionary wrong = {.data = copy, .bytes = first.bytes, .id = FIRST};

    check(copy);
    memcpy(copy, first.data, first.bytes);
    wrong.id = SECOND;
    assert_int_equal(dictionaries_add(d, &wrong, b->text), -EINVAL);
    wrong.id = FIRST;
    copy[0] ^= 1; /* its magic */
    assert_int_equal(dictionaries_add(d, &wrong, b->text), -EINVAL);
    wrong.bytes = CORE_DICTIONARY_BYTES_MAX + 1;
    assert_int_equal(dictionaries_add(d, &wrong, b->text), -EINVAL);
    wrong.bytes = 0;
    assert_int_equal(dictionaries_add(d, &wrong, b->text), -EINVAL);
    copy[0] ^= 1;
    memset(copy + 8, 0xff, 100); /* its tables */
    wrong.bytes = first.bytes;
    assert_true(dictionaries_add(d, &wrong, b->text) < 0);
    assert_int_equal(d->count, 0);
    assert_int_equal(dictionaries_add(d, &first, b->text), 0);
    assert_int_equal(dictionaries_add(d, &first, b->text), -EEXIST);
    free(copy);
}

static void there_are_so_many_and_no_more(void **state)
{
    struct bench *b = *state;
    struct dictionaries *d = &b->group->dictionaries;

    for (uint32_t i = 0; i <= CORE_DICTIONARIES_MAX; i++) {
        core_dictionary one = train(60000 + i, i);
        int error = dictionaries_add(d, &one, b->text);

        assert_int_equal(error, i < CORE_DICTIONARIES_MAX ? 0 : -ENOSPC);
        free((void *)(uintptr_t)one.data);
    }
    assert_int_equal(dictionary_newest(d)->id, 60000 + CORE_DICTIONARIES_MAX - 1);
    assert_int_equal(dictionary_by_id(d, 60000)->id, 60000);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, bench_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(frames_with_and_without_one_live_side_by_side),
        CASE(what_is_compressed_with_one_is_smaller),
        CASE(a_start_without_it_is_refused_and_changes_nothing),
        CASE(so_is_one_with_only_the_journal_that_needs_it),
        CASE(what_cannot_be_one_is_refused),
        CASE(there_are_so_many_and_no_more),
    };
    int failed;

    first = train(FIRST, 0);
    second = train(SECOND, 100000);
    failed = cmocka_run_group_tests(tests, NULL, NULL);
    free((void *)(uintptr_t)first.data);
    free((void *)(uintptr_t)second.data);
    return failed;
}
