/* The cursor over scattered bytes. */
#include "support.h"

#include "span.h"

static void pieces_end_at_spans_and_at_what_is_asked(void **state)
{
    uint8_t a[3], b[5];
    struct span span[] = {{.ptr = a, .bytes = 3}, {.ptr = b, .bytes = 0}, {.ptr = b, .bytes = 5}};
    struct span_cursor c = span_start(span, 3);
    uint64_t got;

    (void)state;
    assert_int_equal(span_bytes(span, 3), 8);
    assert_ptr_equal(span_piece(&c, 2, &got), a);
    assert_int_equal(got, 2);
    assert_ptr_equal(span_piece(&c, 100, &got), a + 2);
    assert_int_equal(got, 1);
    assert_ptr_equal(span_piece(&c, 4, &got), b); /* the empty one is passed over */
    assert_int_equal(got, 4);
    assert_ptr_equal(span_piece(&c, 4, &got), b + 4);
    assert_int_equal(got, 1);
}

static void copies_match_a_plain_array(void **state)
{
    struct dice d = dice_new(__func__);

    (void)state;
    for (uint32_t turn = 0; turn < 500; turn++) {
        uint8_t bytes[600], copy[600], other[600];
        struct span span[40];
        uint32_t count = 0;
        uint64_t at = 0;
        struct span_cursor read, write, zero;

        dice_fill(&d, bytes, sizeof(bytes));
        while (at < sizeof(bytes)) {
            uint64_t n = count == 39 ? sizeof(bytes) - at : dice_below(&d, 40);

            if (n > sizeof(bytes) - at)
                n = sizeof(bytes) - at;
            span[count++] = (struct span){.ptr = bytes + at, .bytes = n};
            at += n;
        }
        read = write = zero = span_start(span, count);
        for (at = 0; at < sizeof(copy);) {
            uint64_t n = 1 + dice_below(&d, sizeof(copy) - at);

            span_read(&read, copy + at, n);
            at += n;
        }
        assert_memory_equal(copy, bytes, sizeof(copy));
        dice_fill(&d, other, sizeof(other));
        for (at = 0; at < sizeof(other);) {
            uint64_t n = 1 + dice_below(&d, sizeof(other) - at);

            span_write(&write, other + at, n);
            at += n;
        }
        assert_memory_equal(bytes, other, sizeof(bytes));
        at = dice_below(&d, sizeof(other) + 1);
        span_zero(&zero, at);
        memset(other, 0, at);
        assert_memory_equal(bytes, other, sizeof(bytes));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pieces_end_at_spans_and_at_what_is_asked),
        cmocka_unit_test(copies_match_a_plain_array),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
