/* Segments of the arena: attaching, frames behind a published tail. */
#include "support.h"

#include <sys/mman.h>
#include <unistd.h>

#define BYTES (8u << 20)

static const uint8_t group[16] = "a group", other_group[16] = "another group";
static const uint8_t boot[16] = "a boot", other_boot[16] = "another boot";

static int attach(struct arena *a, int fd, const uint8_t *g, const uint8_t *b, bool *fresh,
                  char *text)
{
    *text = '\0';
    return arena_attach(a, fd, BYTES, -1, 0, g, b, fresh, text);
}

/* A fresh arena, its magic set as recovery does at its end. */
static int begin(struct arena *a)
{
    char text[CORE_TEXT_MAX];
    int fd = memory_file(BYTES);
    bool fresh;

    assert_int_equal(attach(a, fd, group, boot, &fresh, text), 0);
    assert_true(fresh);
    arena_collect_free(a);
    a->header->magic = ARENA_MAGIC;
    return fd;
}

static void put(struct arena *a, struct arena_cursor *at, uint64_t block, uint32_t sectors)
{
    struct frame_header *h;

    assert_true(arena_fits(at, sectors * SECTOR_BYTES));
    h = arena_frame_begin(a, at);
    *h = (struct frame_header){.payload_bytes = sectors * SECTOR_BYTES, .seq = block + 1,
                               .block = block, .blocks = 1, .kind = FRAME_RAW,
                               .mask = (uint8_t)((1u << sectors) - 1)};
    memset(h + 1, (int)block, h->payload_bytes);
    arena_frame_end(a, at);
}

static void a_fresh_arena_is_laid_out_and_found_again(void **state)
{
    struct arena a;
    char text[CORE_TEXT_MAX];
    int fd = begin(&a);
    uint32_t segments = a.segments, taken;
    bool fresh;

    (void)state;
    assert_int_equal(a.free_count, segments);
    assert_true((uint64_t)a.header->data_offset + (uint64_t)segments * SEGMENT_BYTES <= BYTES);
    assert_int_equal(a.header->data_offset % PAGE, 0);
    taken = arena_segment_take(&a, 5, SEGMENT_RAW);
    arena_detach(&a);
    assert_int_equal(attach(&a, fd, group, boot, &fresh, text), 0);
    assert_false(fresh);
    arena_collect_free(&a);
    assert_int_equal(a.segments, segments);
    assert_int_equal(a.free_count, segments - 1);
    assert_int_equal(a.desc[taken].epoch, 5);
    arena_detach(&a);
    close(fd);
}

static void an_agent_that_died_at_its_first_start_left_nothing(void **state)
{
    struct arena a;
    char text[CORE_TEXT_MAX];
    int fd = begin(&a);
    bool fresh;

    (void)state;
    arena_segment_take(&a, 5, SEGMENT_RAW);
    a.header->magic = 0;
    arena_detach(&a);
    assert_int_equal(attach(&a, fd, group, boot, &fresh, text), 0);
    assert_true(fresh);
    arena_collect_free(&a);
    assert_int_equal(a.free_count, a.segments);
    arena_detach(&a);
    close(fd);
}

static void refused(int fd, const uint8_t *g, const uint8_t *b, const char *why)
{
    struct arena a;
    char text[CORE_TEXT_MAX];
    bool fresh;

    assert_int_equal(attach(&a, fd, g, b, &fresh, text), -EINVAL);
    assert_non_null(strstr(text, why));
}

static void an_arena_of_somebody_else_is_refused(void **state)
{
    struct arena a;
    int fd = begin(&a);
    struct arena_header *h = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    (void)state;
    arena_detach(&a);
    assert_ptr_not_equal(h, MAP_FAILED);
    refused(fd, other_group, boot, "another consistency group");
    refused(fd, group, other_boot, "another boot");
    h->version++;
    refused(fd, group, boot, "this agent reads version");
    h->version--;
    h->segment_bytes *= 2;
    refused(fd, group, boot, "layout version");
    h->segment_bytes /= 2;
    h->segments++;
    refused(fd, group, boot, "does not fit its size");
    h->segments--;
    h->data_offset = 0;
    refused(fd, group, boot, "does not fit its size");
    h->magic ^= 1;
    refused(fd, group, boot, "something else");
    munmap(h, PAGE);
    close(fd);
}

static void an_arena_of_another_size_is_refused(void **state)
{
    struct arena a;
    char text[CORE_TEXT_MAX];
    int fd = begin(&a);
    bool fresh;

    (void)state;
    arena_detach(&a);
    assert_int_equal(arena_attach(&a, fd, BYTES / 2, -1, 0, group, boot, &fresh, text), -EINVAL);
    assert_non_null(strstr(text, "does not fit its size"));
    close(fd);
}

static void all_segments_can_be_taken_once(void **state)
{
    struct arena a;
    int fd = begin(&a);
    uint32_t segments = a.segments;
    bool *seen = calloc(segments, sizeof(*seen));

    (void)state;
    assert_non_null(seen);
    for (uint32_t i = 0; i < segments; i++) {
        uint32_t s = arena_segment_take(&a, 1, SEGMENT_RAW);

        assert_true(s < segments && !seen[s]);
        seen[s] = true;
    }
    assert_int_equal(arena_segment_take(&a, 1, SEGMENT_RAW), SEGMENT_NONE);
    arena_segment_free(&a, 3);
    assert_int_equal(arena_segment_take(&a, 2, SEGMENT_PACKED), 3);
    free(seen);
    arena_detach(&a);
    close(fd);
}

static uint32_t walk(const struct arena *a, uint32_t segment, uint32_t *offset)
{
    uint32_t frames = 0;

    *offset = 0;
    while (arena_frame_next(a, segment, arena_tail(a, segment), offset))
        frames++;
    return frames;
}

static void a_frame_exists_once_the_tail_is_behind_it(void **state)
{
    struct arena a;
    int fd = begin(&a);
    struct arena_cursor at = {.segment = arena_segment_take(&a, 1, SEGMENT_RAW)};
    uint32_t offset, frames = 0;
    struct frame_header *h;

    (void)state;
    for (; arena_fits(&at, 8 * SECTOR_BYTES); frames++) {
        assert_int_equal(walk(&a, at.segment, &offset), frames);
        h = arena_frame_begin(&a, &at);
        memset(h, 0x5a, FRAME_BYTES_MAX); /* a torn one, behind the tail */
        assert_int_equal(walk(&a, at.segment, &offset), frames);
        put(&a, &at, frames, 1 + frames % 8);
    }
    assert_true(frames >= SEGMENT_FRAMES_MIN);
    assert_int_equal(walk(&a, at.segment, &offset), frames);
    assert_int_equal(offset, arena_tail(&a, at.segment));
    arena_detach(&a);
    close(fd);
}

static void a_walk_stops_at_what_cannot_be_a_frame(void **state)
{
    struct arena a;
    int fd = begin(&a);
    struct arena_cursor at = {.segment = arena_segment_take(&a, 1, SEGMENT_RAW)};
    uint32_t offset, second;
    struct frame_header *h, good;

    (void)state;
    put(&a, &at, 1, 8);
    second = at.tail;
    h = arena_frame_begin(&a, &at);
    put(&a, &at, 2, 8);
    put(&a, &at, 3, 8);
    good = *h;
    assert_int_equal(walk(&a, at.segment, &offset), 3);
#define DAMAGED(field, value)                                      \
    do {                                                           \
        h->field = (value);                                        \
        assert_int_equal(walk(&a, at.segment, &offset), 1);        \
        assert_int_equal(offset, second);                          \
        *h = good;                                                 \
    } while (0)
    DAMAGED(kind, 0);
    DAMAGED(kind, 99);
    DAMAGED(kind, FRAME_ZERO); /* which has no payload */
    DAMAGED(mask, 0);
    DAMAGED(mask, 0x7f);       /* seven sectors, payload of eight */
    DAMAGED(blocks, 0);
    DAMAGED(blocks, 2);
    DAMAGED(blocks, UINT32_MAX);
    DAMAGED(payload_bytes, 0);
    DAMAGED(payload_bytes, 4095);
    DAMAGED(payload_bytes, UINT32_MAX);
    DAMAGED(payload_bytes, UINT32_MAX - 31);
    DAMAGED(block, 1ull << 48);
    DAMAGED(disk, CORE_DISKS_MAX);
    /* A tail inside of a frame, as no release store leaves it. */
    a.desc[at.segment].tail = second + 64;
    assert_int_equal(walk(&a, at.segment, &offset), 1);
    a.desc[at.segment].tail = second + 16;
    assert_int_equal(walk(&a, at.segment, &offset), 1);
    a.desc[at.segment].tail = SEGMENT_BYTES + 32;
    assert_int_equal(walk(&a, at.segment, &offset), 0);
    arena_detach(&a);
    close(fd);
}

static void any_bytes_are_walked_without_harm(void **state)
{
    struct dice d = dice_new(__func__);
    struct arena a;
    int fd = begin(&a);
    uint32_t segment = a.segments - 1, offset; /* the last: behind it is nothing */

    (void)state;
    a.desc[segment].tail = SEGMENT_BYTES;
    for (uint32_t turn = 0; turn < 300; turn++) {
        uint8_t *p = arena_segment(&a, segment);

        for (uint32_t i = 0; i < SEGMENT_BYTES; i += 4096)
            dice_fill(&d, p + i, 64);
        /* Sizes that pass, so that the walk gets far. */
        for (uint32_t i = 0; i + 32 <= SEGMENT_BYTES;) {
            struct frame_header *h = (struct frame_header *)(p + i);

            h->mask = (uint8_t)(1 + dice_below(&d, 255));
            h->payload_bytes = (uint32_t)__builtin_popcount(h->mask) * SECTOR_BYTES;
            h->kind = FRAME_RAW;
            h->blocks = 1;
            h->disk = 0;
            h->block = 0;
            i += frame_bytes(h->payload_bytes);
        }
        walk(&a, segment, &offset);
        assert_true(offset <= SEGMENT_BYTES);
    }
    arena_detach(&a);
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_fresh_arena_is_laid_out_and_found_again),
        cmocka_unit_test(an_agent_that_died_at_its_first_start_left_nothing),
        cmocka_unit_test(an_arena_of_somebody_else_is_refused),
        cmocka_unit_test(an_arena_of_another_size_is_refused),
        cmocka_unit_test(all_segments_can_be_taken_once),
        cmocka_unit_test(a_frame_exists_once_the_tail_is_behind_it),
        cmocka_unit_test(a_walk_stops_at_what_cannot_be_a_frame),
        cmocka_unit_test(any_bytes_are_walked_without_harm),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
