/* Calls to a front end: every one arrives, and no state of its eventfd makes us wait. */
#include "support.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "notifier.h"

#define TOP 0xfffffffffffffffeull /* write() waits for a reader from here on */

static uint64_t take(int fd)
{
    uint64_t count;

    assert_int_equal(read(fd, &count, sizeof(count)), sizeof(count));
    return count;
}

static struct notifier *start(int fd)
{
    struct notifier *n = NULL;

    assert_int_equal(notifier_open(&n, dup(fd)), 0);
    return n;
}

static void each_signal_adds_one(void **state)
{
    int fd = eventfd(0, EFD_NONBLOCK);
    struct notifier *n = start(fd);

    (void)state;
    for (uint64_t i = 0; i < 5000; i++)
        notifier_signal(n);
    assert_int_equal(take(fd), 5000);
    notifier_signal(n);
    assert_int_equal(take(fd), 1);
    notifier_close(n);
    close(fd);
}

static void a_full_count_without_nonblock_does_not_hold_us(void **state)
{
    int fd = eventfd(0, EFD_NONBLOCK);
    struct notifier *n = start(fd);
    uint64_t top = TOP;

    (void)state;
    assert_int_equal(fcntl(fd, F_SETFL, 0), 0); /* of the open file: also of the notifier's */
    assert_int_equal(write(fd, &top, sizeof(top)), sizeof(top));
    for (int i = 0; i < 1000; i++)
        notifier_signal(n); /* a write() would hang here, and the test time out */
    assert_true(take(fd) >= TOP);
    notifier_signal(n);
    assert_int_equal(take(fd), 1);
    notifier_close(n);
    close(fd);
}

static void only_eventfds_are_taken(void **state)
{
    int fd = eventfd(0, 0), ends[2], null = open("/dev/null", O_RDWR);
    const char *why;

    (void)state;
    assert_int_equal(pipe(ends), 0);
    assert_true(notifier_takes(fd, &why));
    assert_false(notifier_takes(ends[1], &why));
    assert_false(notifier_takes(null, &why));
    assert_string_equal(why, "the descriptor is no eventfd");
    close(fd);
    assert_false(notifier_takes(fd, &why));
    close(ends[0]);
    close(ends[1]);
    close(null);
}

static void a_descriptor_that_is_no_eventfd_is_closed_and_told(void **state)
{
    struct notifier *n = NULL;
    int null = open("/dev/null", O_RDWR);

    (void)state;
    assert_true(notifier_open(&n, null) < 0);
    assert_null(n);
    assert_int_equal(fcntl(null, F_GETFD), -1);
}

static void *close_it(void *arg)
{
    notifier_close(arg);
    return NULL;
}

/* As core_close() does, after the reactor has ended. */
static void another_thread_may_close_it(void **state)
{
    int fd = eventfd(0, EFD_NONBLOCK);
    pthread_t thread;

    (void)state;
    for (int i = 0; i < 40; i++) { /* more than a thread can register */
        struct notifier *n = start(fd);

        notifier_signal(n);
        assert_int_equal(pthread_create(&thread, NULL, close_it, n), 0);
        pthread_join(thread, NULL);
        assert_int_equal(take(fd), 1);
    }
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_signal_adds_one),
        cmocka_unit_test(a_full_count_without_nonblock_does_not_hold_us),
        cmocka_unit_test(only_eventfds_are_taken),
        cmocka_unit_test(a_descriptor_that_is_no_eventfd_is_closed_and_told),
        cmocka_unit_test(another_thread_may_close_it),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
