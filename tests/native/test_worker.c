/* The helper thread: every job runs once and comes back once; none sleeps through its wake. */
#include "support.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include "worker.h"

struct task {
    struct job job;
    uint64_t number;
    uint32_t ran, done;
    uint64_t *order, *place; /* where run() notes the order, single-threaded */
};

static void task_run(struct job *job, struct worker *w)
{
    struct task *t = (struct task *)job;

    (void)w;
    t->ran++;
    if (t->order)
        t->order[(*t->place)++] = t->number;
}

static struct dictionaries no_dictionaries;

static void task_done(struct job *job)
{
    ((struct task *)job)->done++;
}

static struct task task_new(uint64_t number)
{
    return (struct task){.job = {.run = task_run, .done = task_done}, .number = number};
}

/* Blocks on the reactor's eventfd alone: a lost wake-up hangs here, and the test times out. */
static void wait_some(struct worker *w)
{
    uint64_t count;

    while (worker_reap(w) == 0)
        check(read(w->notify_fd, &count, sizeof(count)) == sizeof(count));
}

static void jobs_come_back_once_each(void **state)
{
    enum { ROUNDS = 20000 };
    struct dice d = dice_new(__func__);
    struct worker *w = aligned_alloc(_Alignof(struct worker), sizeof(*w));
    int notify = eventfd(0, EFD_CLOEXEC);
    static struct task task[WORKER_RING];

    (void)state;
    assert_non_null(w);
    assert_int_equal(worker_start(w, &no_dictionaries, notify, false, false), 0);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        /* Mostly one or two: that is when the helper falls asleep in between. */
        uint32_t count = 1 + (uint32_t)dice_below(&d, dice_below(&d, 20) ? 2 : WORKER_RING);

        for (uint32_t i = 0; i < count; i++) {
            task[i] = task_new(i);
            assert_true(worker_submit(w, &task[i].job, dice_below(&d, 2)));
        }
        while (w->outstanding > 0)
            wait_some(w);
        for (uint32_t i = 0; i < count; i++)
            assert_true(task[i].ran == 1 && task[i].done == 1);
    }
    worker_stop(w);
    close(notify);
    free(w);
}

static void a_full_ring_takes_no_more(void **state)
{
    struct worker *w = aligned_alloc(_Alignof(struct worker), sizeof(*w));
    static struct task task[WORKER_RING + 1];

    (void)state;
    assert_non_null(w);
    assert_int_equal(worker_start(w, &no_dictionaries, -1, true, false), 0);
    for (uint32_t i = 0; i <= WORKER_RING; i++)
        task[i] = task_new(i);
    for (uint32_t i = 0; i < WORKER_RING; i++)
        assert_true(worker_submit(w, &task[i].job, i % 2));
    assert_false(worker_submit(w, &task[WORKER_RING].job, true));
    assert_false(worker_submit(w, &task[WORKER_RING].job, false));
    assert_int_equal(worker_reap(w), 1);
    assert_true(worker_submit(w, &task[WORKER_RING].job, false));
    while (w->outstanding > 0)
        worker_reap(w);
    for (uint32_t i = 0; i <= WORKER_RING; i++)
        assert_true(task[i].ran == 1 && task[i].done == 1);
    worker_stop(w);
    free(w);
}

static void urgent_jobs_overtake(void **state)
{
    struct worker *w = aligned_alloc(_Alignof(struct worker), sizeof(*w));
    uint64_t order[6], place = 0, wanted[6] = {1, 3, 5, 0, 2, 4};
    struct task task[6];

    (void)state;
    assert_non_null(w);
    assert_int_equal(worker_start(w, &no_dictionaries, -1, true, false), 0);
    for (uint32_t i = 0; i < 6; i++) {
        task[i] = task_new(i);
        task[i].order = order;
        task[i].place = &place;
        assert_true(worker_submit(w, &task[i].job, i % 2));
    }
    while (w->outstanding > 0)
        assert_int_equal(worker_reap(w), 1);
    assert_memory_equal(order, wanted, sizeof(wanted));
    worker_stop(w);
    free(w);
}

static void stopping_does_not_wait_for_work(void **state)
{
    (void)state;
    for (uint32_t round = 0; round < 200; round++) {
        struct worker *w = aligned_alloc(_Alignof(struct worker), sizeof(*w));
        int notify = eventfd(0, EFD_CLOEXEC);
        struct task task = task_new(0);

        assert_non_null(w);
        assert_int_equal(worker_start(w, &no_dictionaries, notify, false, false), 0);
        if (round % 2)
            assert_true(worker_submit(w, &task.job, false));
        worker_stop(w);
        assert_true(task.ran <= 1 && task.done == 0);
        close(notify);
        free(w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(jobs_come_back_once_each),
        cmocka_unit_test(a_full_ring_takes_no_more),
        cmocka_unit_test(urgent_jobs_overtake),
        cmocka_unit_test(stopping_does_not_wait_for_work),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
