/* Translation of guest addresses, and the dirty log. */
#include "support.h"

#include <sys/mman.h>
#include <unistd.h>

#include "memory.h"
#include "span.h"

#define MIB (1ull << 20)

static int make(const core_region *regions, uint32_t count, struct memory **m)
{
    char text[CORE_TEXT_MAX] = "";
    int error = memory_create(regions, count, m, text);

    assert_true(!error == !text[0]); /* an error has its sentence */
    return error;
}

static void regions_are_found_wherever_they_lie(void **state)
{
    int fd = memory_file(4 * MIB);
    core_region r[] = {
        {.guest_addr = 0x100000000, .size = MIB, .user_addr = 0x7000000, .mmap_offset = MIB,
         .fd = fd},
        {.guest_addr = 0, .size = MIB, .user_addr = 0x5000000, .fd = fd},
        {.guest_addr = MIB, .size = 2 * MIB, .user_addr = 0x9000000, .mmap_offset = 2 * MIB,
         .fd = fd},
    };
    struct memory *m;
    uint64_t got;
    uint8_t *at;

    (void)state;
    assert_int_equal(make(r, 3, &m), 0);
    *memory_at(m, 0x100000123, 1, &got) = 42;
    at = mmap(NULL, 4 * MIB, PROT_READ, MAP_SHARED, fd, 0);
    assert_int_equal(at[MIB + 0x123], 42);
    munmap(at, 4 * MIB);
    assert_ptr_equal(memory_at_user(m, 0x7000123, 1), memory_at(m, 0x100000123, 1, &got));
    /* A buffer over two regions comes in two pieces. */
    assert_non_null(memory_at(m, MIB - 10, 30, &got));
    assert_int_equal(got, 10);
    assert_non_null(memory_at(m, MIB, 20, &got));
    assert_int_equal(got, 20);
    assert_non_null(memory_at(m, 3 * MIB - 1, 20, &got));
    assert_int_equal(got, 1);
    assert_null(memory_at(m, 3 * MIB, 1, &got)); /* a hole */
    assert_null(memory_at(m, 0xffffffff, 1, &got));
    assert_null(memory_at(m, 0x100000000 + MIB, 1, &got));
    assert_null(memory_at(m, UINT64_MAX, 1, &got));
    assert_null(memory_at_user(m, 0x5000000 + MIB - 1, 2)); /* rings do not span regions */
    assert_null(memory_at_user(m, 0x4ffffff, 1));
    assert_null(memory_at_user(m, 0x5000001, UINT64_MAX));
    memory_free(m);
    close(fd);
}

static void any_address_is_found_or_in_a_hole(void **state)
{
    struct dice d = dice_new(__func__);

    (void)state;
    for (uint32_t run = 0; run < 30; run++) {
        int fd = memory_file(64 * PAGE);
        bool there[64] = {false};
        core_region r[64];
        uint32_t count = 0;
        struct memory *m;

        for (uint64_t page = 0; page < 64;) {
            uint64_t n = 1 + dice_below(&d, 6);

            if (n > 64 - page)
                n = 64 - page;
            if (dice_below(&d, 3)) {
                r[count++] = (core_region){.guest_addr = page * PAGE, .size = n * PAGE,
                                           .user_addr = page * PAGE, .mmap_offset = page * PAGE,
                                           .fd = fd};
                memset(&there[page], true, n);
            }
            page += n;
        }
        for (uint32_t i = count; i > 1; i--) { /* in any order */
            uint32_t with = (uint32_t)dice_below(&d, i);
            core_region kept = r[i - 1];

            r[i - 1] = r[with];
            r[with] = kept;
        }
        assert_int_equal(make(r, count, &m), 0);
        for (uint32_t turn = 0; turn < 2000; turn++) {
            uint64_t at = dice_below(&d, 64 * PAGE), bytes = 1 + dice_below(&d, 8 * PAGE), got;
            const uint8_t *p = memory_at(m, at, bytes, &got);

            assert_int_equal(p != NULL, there[at / PAGE]);
            if (!p)
                continue;
            assert_true(got >= 1 && got <= bytes);
            for (uint64_t page = at / PAGE; page <= (at + got - 1) / PAGE; page++)
                assert_true(there[page]);
        }
        memory_free(m);
        close(fd);
    }
}

static void tables_that_cannot_be_are_refused(void **state)
{
    int fd = memory_file(MIB);
    struct memory *m;
    core_region good = {.size = MIB, .fd = fd}, r[2];
    static core_region many[CORE_REGIONS_MAX + 1];

    (void)state;
#define REFUSED(field, value)                       \
    do {                                            \
        r[0] = good;                                \
        r[0].field = (value);                       \
        assert_int_equal(make(r, 1, &m), -EINVAL);  \
    } while (0)
    REFUSED(size, 0);
    REFUSED(size, MIB + 1);             /* beyond the file */
    REFUSED(mmap_offset, PAGE);
    REFUSED(guest_addr, UINT64_MAX - 5); /* wraps */
    REFUSED(user_addr, UINT64_MAX - 5);
    REFUSED(mmap_offset, UINT64_MAX - 5);
    REFUSED(guest_addr, 0 - MIB);       /* ends at 2^64: wraps to 0 */
    REFUSED(fd, -1);
    r[0] = r[1] = good;
    r[1].guest_addr = MIB - 1;          /* overlap by a byte */
    r[1].user_addr = 8 * MIB;
    assert_int_equal(make(r, 2, &m), -EINVAL);
    r[1].guest_addr = MIB;
    assert_int_equal(make(r, 2, &m), 0);
    memory_free(m);
    assert_int_equal(make(many, CORE_REGIONS_MAX + 1, &m), -EINVAL);
    close(fd);
}

static void memory_that_vanishes_is_told(void **state)
{
    int fd = memory_file(MIB);
    core_region r = {.size = MIB, .fd = fd};
    struct memory *m;
    uint32_t faults = span_faults_now();
    uint8_t *p;
    uint64_t got;

    (void)state;
    assert_int_equal(memory_handle_sigbus(), 0);
    assert_int_equal(make(&r, 1, &m), 0);
    p = memory_at(m, PAGE, 1, &got);
    *p = 1;
    assert_false(memory_lost(m));
    assert_int_equal(ftruncate(fd, 0), 0);
    assert_int_equal(*(volatile uint8_t *)p, 0);
    assert_true(memory_lost(m));
    assert_int_equal(span_faults_now(), faults + 1);
    memory_free(m);
    close(fd);
}

static void the_dirty_log_has_a_bit_a_page(void **state)
{
    uint8_t bits[4] = {0};
    struct dirty_log log = {.bits = bits, .bytes = sizeof(bits)};

    (void)state;
    assert_true(dirty_log_mark(&log, 0, 0));
    assert_int_equal(bits[0], 0);
    assert_true(dirty_log_mark(&log, PAGE - 1, 2));
    assert_int_equal(bits[0], 3);
    assert_true(dirty_log_mark(&log, 31 * PAGE, PAGE));
    assert_int_equal(bits[3], 0x80);
    assert_false(dirty_log_mark(&log, 31 * PAGE, PAGE + 1)); /* not covered to its end */
    assert_false(dirty_log_mark(&log, UINT64_MAX, 1));
    assert_int_equal(bits[1] | bits[2], 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(regions_are_found_wherever_they_lie),
        cmocka_unit_test(any_address_is_found_or_in_a_hole),
        cmocka_unit_test(tables_that_cannot_be_are_refused),
        cmocka_unit_test(memory_that_vanishes_is_told),
        cmocka_unit_test(the_dirty_log_has_a_bit_a_page),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
