/* test_metrics.c - the live view's histograms, rounds and traces. */
#include <sys/mman.h>
#include <unistd.h>

#include "metrics.h"
#include "support.h"

static struct metrics metrics;
static const uint8_t group[16] = {7};

static int open_page(void **state)
{
    int fd = memory_file(sizeof(struct metrics_page));

    (void)state;
    memset(&metrics, 0, sizeof(metrics));
    assert_int_equal(metrics_open(&metrics, fd, group, "group", "/run/control"), 0);
    close(fd);
    return 0;
}

static int close_page(void **state)
{
    (void)state;
    metrics_close(&metrics);
    return 0;
}

static uint64_t counted(enum metrics_stage stage)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < METRICS_BUCKETS; i++)
        sum += metrics.page->stage[stage].bucket[i];
    return sum;
}

/* ---- Buckets -------------------------------------------------------------------------------- */

static void buckets_follow_each_other_without_gap(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < METRICS_BUCKETS; i++) {
        uint64_t low = metrics_bucket_low(i);

        assert_int_equal(metrics_bucket(low), i);
        if (i > 0)
            assert_int_equal(metrics_bucket(low - 1), i - 1);
    }
}

static void a_bucket_is_at_most_a_sixteenth_wide(void **state)
{
    (void)state;
    for (uint32_t i = 1; i + 1 < METRICS_BUCKETS; i++) {
        uint64_t low = metrics_bucket_low(i), wide = metrics_bucket_low(i + 1) - low;

        assert_true(wide == 1 || wide * 16 <= low);
    }
}

static void the_last_bucket_takes_everything_longer(void **state)
{
    (void)state;
    assert_int_equal(metrics_bucket((1ull << 40) - 1), METRICS_BUCKETS - 1);
    assert_int_equal(metrics_bucket(1ull << 40), METRICS_BUCKETS - 1);
    assert_int_equal(metrics_bucket(UINT64_MAX), METRICS_BUCKETS - 1);
    assert_int_equal(metrics_bucket(0), 0);
}

/* ---- Rounds --------------------------------------------------------------------------------- */

static void a_rounds_answers_share_its_time(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 32; i++)
        metrics_answered(&metrics, METRICS_WRITE);
    metrics_answered(&metrics, METRICS_READ_HIT);
    metrics_round_over(&metrics, 5000, 105000);
    assert_int_equal(metrics.page->stage[METRICS_WRITE].bucket[metrics_bucket(5000)], 32);
    assert_int_equal(metrics.page->stage[METRICS_READ_HIT].bucket[metrics_bucket(5000)], 1);
    assert_int_equal(counted(METRICS_WRITE), 32);
    assert_int_equal(counted(METRICS_ZERO), 0);
    assert_int_equal(metrics.batches, 1);
    metrics_round_over(&metrics, 100, 105100); /* answered nothing: counts as work only */
    assert_int_equal(counted(METRICS_WRITE), 32);
    assert_int_equal(metrics.batches, 1);
    assert_int_equal(metrics.busy_ns, 5100);
}

/* ---- Traces --------------------------------------------------------------------------------- */

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* One traced request that is answered at once. */
static void trace_one(uint64_t sector)
{
    struct metrics_trace about = {.sector = sector, .type = 1};

    metrics_trace_begin(&metrics, now_ns(), &about);
    metrics_trace_end(&metrics, 0);
}

static void one_request_of_sixty_one_is_due_for_a_trace(void **state)
{
    struct metrics_trace about = {0};
    uint32_t due = 0;

    (void)state;
    for (uint32_t i = 0; i < METRICS_TRACE_EVERY * 10; i++)
        if (metrics_trace_due(&metrics)) {
            metrics_trace_begin(&metrics, now_ns(), &about);
            due++;
        }
    assert_int_equal(due, 10);
}

static void a_trace_shows_when_its_round_is_over(void **state)
{
    const struct metrics_trace *t = &metrics.page->trace[0];

    (void)state;
    trace_one(77);
    assert_int_equal(t->number, 0);
    metrics_round_over(&metrics, 1000, now_ns());
    assert_int_equal(t->number, 1);
    assert_int_equal(t->sector, 77);
    assert_true(t->begun_ns <= t->copied_ns && t->copied_ns <= t->published_ns);
    assert_int_equal(metrics.page->traced, 1);
    assert_int_equal(counted(METRICS_REQUEST_COPY), 1);
}

static void a_request_that_waits_keeps_its_trace(void **state)
{
    struct metrics_trace about = {.sector = 5}, mine, none;

    (void)state;
    metrics_trace_begin(&metrics, now_ns(), &about);
    metrics_trace_wait(&metrics, &mine);
    metrics_trace_wait(&metrics, &none); /* the next request of the ring is not traced */
    assert_int_equal(none.fetched_ns, 0);
    trace_one(6);
    metrics_round_over(&metrics, 1000, now_ns());
    metrics_trace_late(&metrics, &none, 0);
    metrics_trace_late(&metrics, &mine, 1);
    metrics_round_over(&metrics, 1000, now_ns());
    assert_int_equal(metrics.page->trace[0].sector, 6);
    assert_int_equal(metrics.page->trace[1].sector, 5);
    assert_int_equal(metrics.page->trace[1].waited, 1);
    assert_int_equal(metrics.page->trace[1].status, 1);
    assert_int_equal(metrics.page->traced, 2);
    assert_int_equal(counted(METRICS_REQUEST_COPY), 1); /* waits are no time of copying */
}

static void the_newest_traces_replace_the_oldest(void **state)
{
    (void)state;
    for (uint64_t i = 0; i < METRICS_TRACES + 10; i++) {
        trace_one(i);
        metrics_round_over(&metrics, 1000, now_ns());
    }
    assert_int_equal(metrics.page->trace[9].sector, METRICS_TRACES + 9);
    assert_int_equal(metrics.page->trace[9].number, METRICS_TRACES + 10);
    assert_int_equal(metrics.page->trace[10].sector, 10);
}

static void without_a_page_nothing_happens(void **state)
{
    struct metrics m = {0};
    struct metrics_trace about = {0}, mine;

    (void)state;
    metrics_answered(&m, METRICS_WRITE);
    metrics_trace_begin(&m, 1, &about);
    metrics_trace_wait(&m, &mine);
    metrics_trace_late(&m, &mine, 0);
    metrics_late(&m, METRICS_FLUSH, 1, 2);
    metrics_add(&m, METRICS_SEAL, 5, 1);
    metrics_round_over(&m, 10, 20);
    assert_false(m.tracing);
    assert_int_equal(m.traced, 0);
    assert_int_equal(m.answered[METRICS_WRITE], 0);
    metrics_close(&m);
}

int main(void)
{
#define each(test) cmocka_unit_test_setup_teardown(test, open_page, close_page)
    const struct CMUnitTest tests[] = {
        each(buckets_follow_each_other_without_gap),
        each(a_bucket_is_at_most_a_sixteenth_wide),
        each(the_last_bucket_takes_everything_longer),
        each(a_rounds_answers_share_its_time),
        each(one_request_of_sixty_one_is_due_for_a_trace),
        each(a_trace_shows_when_its_round_is_over),
        each(a_request_that_waits_keeps_its_trace),
        each(the_newest_traces_replace_the_oldest),
        each(without_a_page_nothing_happens),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
