/* gate.h: who closes it is alone, who found it closed comes in before it closes again. */
#include <pthread.h>
#include <sched.h>

#include "gate.h"
#include "support.h"

#define PASSERS 2u
#define CLOSINGS 200u

static struct gate gate;
static uint64_t passes[PASSERS];     /* each one's own, written inside */
static uint64_t sum;                 /* of all, written while it is closed */
static uint32_t stop;

static void *pass(void *arg)
{
    uint32_t place = (uint32_t)(uintptr_t)arg;

    while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
        uint64_t seen;

        gate_enter(&gate, place);
        seen = sum; /* plain: ThreadSanitizer sees a closing that does not keep us out */
        passes[place]++;
        check(seen == sum);
        gate_leave(&gate, place);
    }
    return NULL;
}

static void who_closes_is_alone(void **state)
{
    pthread_t thread[PASSERS];
    uint64_t before[PASSERS] = {0}, total = 0;

    (void)state;
    gate = (struct gate){.places = PASSERS};
    for (uintptr_t i = 0; i < PASSERS; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, pass, (void *)i), 0);
    for (uint32_t n = 0; n < CLOSINGS || total == 0; n++) { /* they may begin late */
        gate_close(&gate);
        total = 0;
        for (uint32_t i = 0; i < PASSERS; i++) {
            assert_true(passes[i] >= before[i]);
            before[i] = passes[i];
            total += before[i];
        }
        sum = total;
        for (uint32_t i = 0; i < PASSERS; i++)
            assert_int_equal(passes[i], before[i]);
        gate_open(&gate);
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < PASSERS; i++)
        assert_int_equal(pthread_join(thread[i], NULL), 0);
    assert_true(total > 0);
}

static void *pass_once(void *arg)
{
    (void)arg;
    gate_enter(&gate, 0);
    passes[0]++;
    gate_leave(&gate, 0);
    return NULL;
}

/* However soon it is closed again, who has waited comes in before. */
static void who_waited_is_next(void **state)
{
    pthread_t thread;

    (void)state;
    gate = (struct gate){.places = 1};
    passes[0] = 0;
    gate_close(&gate);
    assert_int_equal(pthread_create(&thread, NULL, pass_once, NULL), 0);
    while (__atomic_load_n(&gate.place[0].state, __ATOMIC_ACQUIRE) != GATE_WAITING)
        sched_yield();
    assert_int_equal(passes[0], 0);
    gate_open(&gate);
    gate_close(&gate);
    assert_int_equal(passes[0], 1);
    gate_open(&gate);
    assert_int_equal(pthread_join(thread, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(who_closes_is_alone),
        cmocka_unit_test(who_waited_is_next),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
