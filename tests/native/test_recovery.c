/* Rows of native/RECOVERY.md that the simulator meets rarely or never, one test a row. */
#include "support.h"

#include <sys/mman.h>

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

static int get(struct bench *b)
{
    uint8_t data[BLOCK_BYTES];

    bench_read(b, 0, 0, data, sizeof(data));
    return data[0];
}

/* The arena while nobody has it open. */
static struct arena_header *arena_map(struct bench *b)
{
    void *at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, b->config.arena_fd, 0);

    check(at != MAP_FAILED);
    return at;
}

static uint8_t *record(struct bench *b)
{
    return b->disk.file[DISK_JOURNAL] + JOURNAL_LOG_OFFSET;
}

/* R8: its flush failed, so what reads back whole may be in a cache only. */
static void an_unacknowledged_record_is_not_believed(void **state)
{
    struct bench *b = *state;

    put(b, 3);
    bench_verb(b, VERB_SEAL);
    b->disk.fail[DISK_JOURNAL][DISK_SYNC] = EIO;
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, -EIO);
    bench_kill(b);
    b->disk.fail[DISK_JOURNAL][DISK_SYNC] = 0;
    assert_int_equal(((struct record_header *)record(b))->magic, RECORD_MAGIC);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->committed, 0);
    assert_int_equal(get(b), 3);
    bench_kill(b);
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0); /* the start before has voided it */
    assert_int_equal(b->group->committed, 0);
    assert_int_equal(get(b), 0);
}

static uint64_t first_write;       /* of a start, to the journal */
static void (*submit_on)(struct disk *d, struct disk_op *op);

static void note_first_write(struct disk *d, struct disk_op *op)
{
    if (op->file == DISK_JOURNAL && op->opcode == DISK_WRITE && first_write == UINT64_MAX)
        first_write = op->offset;
    submit_on(d, op);
}

/* R8: what a start reads may be a superblock that only a cache holds. By the one on the medium
 * the tail may be a record that counts: it must not be touched before. */
static void the_tail_is_voided_once_the_superblock_is_durable(void **state)
{
    struct bench *b = *state;

    put(b, 3);
    bench_verb(b, VERB_SEAL);
    b->disk.fail[DISK_JOURNAL][DISK_SYNC] = EIO;
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, -EIO);
    bench_kill(b);
    b->disk.fail[DISK_JOURNAL][DISK_SYNC] = 0;
    submit_on = b->disk.disk.submit;
    b->disk.disk.submit = note_first_write;
    first_write = UINT64_MAX;
    assert_int_equal(bench_open(b), 0);
    b->disk.disk.submit = submit_on;
    assert_true(first_write < JOURNAL_LOG_OFFSET);
    assert_int_not_equal(((struct record_header *)record(b))->magic, RECORD_MAGIC);
}

/* R10: the arena has what the journal lost. */
static void a_lost_acknowledged_record_is_committed_anew(void **state)
{
    struct bench *b = *state;

    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO; /* apply must wait */
    put(b, 5);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    bench_kill(b);
    memset(record(b), 0, PAGE);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = 0;
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->committed, 0);
    bench_settle(b);
    assert_int_equal(b->group->committed, 1);
    bench_kill(b);
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->committed, 1);
    assert_int_equal(get(b), 5);
}

/* Killed before them: it was only remembered, and its epochs can still be committed. */
static void a_discard_that_had_not_begun_is_forgotten(void **state)
{
    struct bench *b = *state;
    uint8_t data[BLOCK_BYTES];
    struct arena_header *h = b->group->arena.header;
    uint64_t id = epoch_open(b->group)->id;

    memset(data, 7, sizeof(data));
    assert_int_equal(bench_write(b, 0, 0, data, sizeof(data)), 0);
    h->discarded[h->discarded_next].first = h->discarded[h->discarded_next].last = id;
    h->discarded_next++;
    bench_kill(b);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(bench_verb(b, VERB_SEAL)->value, id);
    for (uint32_t i = 0; i < 2; i++) { /* the repeat says the same */
        const core_event *answer;

        b->events = 0;
        answer = bench_answer(b, bench_submit(b, VERB_COMMIT, id, false));
        assert_int_equal(answer->result, 0);
        assert_int_equal(answer->value, id);
    }
    assert_int_equal(bench_verb(b, VERB_DISCARD)->result, 0);
    b->events = 0;
    assert_int_equal(bench_answer(b, bench_submit(b, VERB_COMMIT, id, false))->result, 0);
}

/* R11: killed between the two stores of a discard. */
static void a_discard_that_was_under_way_is_finished(void **state)
{
    struct bench *b = *state;
    struct arena_header *h;

    put(b, 7);
    bench_verb(b, VERB_SEAL);
    put(b, 8);
    bench_kill(b);
    h = arena_map(b);
    assert_int_equal(h->open, 2);
    h->base = 3;
    munmap(h, PAGE);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(epoch_open(b->group)->id, 3);
    assert_int_equal(b->group->epochs, 1);
    assert_int_equal(get(b), 0);
}

/* R12: an arena that says less than the journal is not of its time. */
static void an_arena_behind_the_journal_is_refused(void **state)
{
    struct bench *b = *state;
    struct arena_header *h;

    put(b, 9);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    bench_settle(b);
    bench_kill(b);
    h = arena_map(b);
    h->base = h->open = h->committed = 1;
    munmap(h, PAGE);
    assert_int_equal(bench_open(b), -EINVAL);
    assert_non_null(strstr(b->text, "does not go with the journal"));
}

/* ---- An arena that was changed from outside ------------------------------------------------ */

struct whole_arena {
    struct arena_header *header;
    struct segment_desc *desc;
    uint8_t *data;
};

static struct whole_arena arena_map_all(struct bench *b)
{
    struct whole_arena a = {.header = mmap(NULL, b->config.arena_bytes, PROT_READ | PROT_WRITE,
                                           MAP_SHARED, b->config.arena_fd, 0)};

    check(a.header != MAP_FAILED);
    a.desc = (struct segment_desc *)((uint8_t *)a.header + PAGE);
    a.data = (uint8_t *)a.header + a.header->data_offset;
    return a;
}

/* The one segment of the epoch. */
static uint32_t segment_of(const struct whole_arena *a, uint64_t epoch)
{
    uint32_t i = 0;

    while (a->desc[i].state == SEGMENT_FREE || a->desc[i].tail == 0 || a->desc[i].epoch != epoch) {
        i++;
        check(i < a->header->segments);
    }
    return i;
}

/* Epoch 1 is committed with block 0 full of 5, and not applied; the agent is dead. */
static void commit_and_kill(struct bench *b)
{
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO;
    put(b, 5);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    bench_kill(b);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = 0;
}

static void is_right_after_all(struct bench *b)
{
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->committed, 1);
    assert_int_equal(get(b), 5);
    bench_settle(b);
    assert_int_equal(b->group->applied, 1);
    assert_int_equal(get(b), 5);
    assert_int_equal(b->disk.file[DISK_IMAGE(0)][0], 5);
}

/* R17 */
static void a_committed_frame_that_changed_is_read_from_the_journal(void **state)
{
    struct bench *b = *state;
    struct whole_arena a;
    uint32_t at;

    commit_and_kill(b);
    a = arena_map_all(b);
    at = segment_of(&a, 1);
    a.data[(uint64_t)at * SEGMENT_BYTES + sizeof(struct frame_header) + 8] ^= 1;
    munmap(a.header, b->config.arena_bytes);
    is_right_after_all(b);
}

/* R17 */
static void a_committed_segment_that_is_gone_is_read_from_the_journal(void **state)
{
    struct bench *b = *state;
    struct whole_arena a;

    commit_and_kill(b);
    a = arena_map_all(b);
    a.desc[segment_of(&a, 1)].state = SEGMENT_FREE;
    munmap(a.header, b->config.arena_bytes);
    is_right_after_all(b);
}

/* R17: another epoch's segment with a committed epoch's name on it. */
static void a_segment_too_many_is_not_applied(void **state)
{
    struct bench *b = *state;
    struct whole_arena a;
    struct frame_header *h;

    commit_and_kill(b);
    a = arena_map_all(b);
    a.desc[7] = (struct segment_desc){.epoch = 1, .state = SEGMENT_RAW,
                                      .tail = frame_bytes(BLOCK_BYTES)};
    h = (struct frame_header *)(a.data + 7 * SEGMENT_BYTES);
    *h = (struct frame_header){.payload_bytes = BLOCK_BYTES, .seq = 10, .blocks = 1,
                               .kind = FRAME_RAW, .mask = MASK_FULL};
    memset(h + 1, 6, BLOCK_BYTES);
    munmap(a.header, b->config.arena_bytes);
    is_right_after_all(b);
}

/* R18: frames get their checksum when they are packed; only a commit reads them again. */
static void a_sealed_frame_that_changed_is_not_committed(void **state)
{
    struct bench *b = *state;
    struct whole_arena a;
    uint32_t at;

    put(b, 5);
    bench_verb(b, VERB_SEAL);
    bench_kill(b);
    a = arena_map_all(b);
    at = segment_of(&a, 1);
    assert_int_equal(a.desc[at].state, SEGMENT_PACKED);
    a.data[(uint64_t)at * SEGMENT_BYTES + sizeof(struct frame_header)] ^= 1;
    munmap(a.header, b->config.arena_bytes);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, -EILSEQ);
    assert_int_equal(b->group->committed, 0);
    assert_int_equal(bench_verb(b, VERB_DISCARD)->result, 0);
    put(b, 7);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
}

/* R19: a segment of an older epoch among those of a newer one would bring old blocks back. */
static void a_segment_of_another_epoch_is_refused(void **state)
{
    struct bench *b = *state;
    struct whole_arena a;
    uint32_t older, newer;

    put(b, 5);
    bench_verb(b, VERB_SEAL);
    put(b, 6);
    bench_kill(b);
    a = arena_map_all(b);
    older = segment_of(&a, 1);
    newer = segment_of(&a, 2);
    a.desc[older].epoch = 2;
    a.desc[newer].epoch = 1;
    munmap(a.header, b->config.arena_bytes);
    assert_int_equal(bench_open(b), -EILSEQ);
    assert_non_null(strstr(b->text, "frames of epoch 2 cannot be read"));
}

/* ---- A superblock that is lost ------------------------------------------------------------- */

static void lose_newest_super(struct bench *b)
{
    struct journal_super *newest = NULL;

    for (uint32_t i = 0; i < JOURNAL_SUPER_SLOTS; i++) {
        struct journal_super *s =
            (struct journal_super *)(b->disk.file[DISK_JOURNAL] + i * JOURNAL_SUPER_STRIDE);

        if (s->magic == JOURNAL_MAGIC && (!newest || s->super_seq > newest->super_seq))
            newest = s;
    }
    check(newest);
    newest->crc ^= 1;
}

/* Applied, and the agent killed while it gave the segments back: the newer frame of block 0
 * is gone, the older one is still there. */
static void apply_and_die_half_way(struct bench *b)
{
    static uint8_t filler[SEGMENT_BYTES];
    struct whole_arena a;

    b->config.compress_level = 0;
    put(b, 1);
    memset(filler, 9, sizeof(filler));
    assert_int_equal(bench_write(b, 1, 0, filler, sizeof(filler)), 0);
    put(b, 2);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    bench_settle(b);
    assert_int_equal(b->group->applied, 1);
    bench_kill(b);
    a = arena_map_all(b);
    a.desc[0].state = SEGMENT_RAW;
    assert_int_equal(a.desc[0].epoch, 1);
    munmap(a.header, b->config.arena_bytes);
}

/* R14, with the arena */
static void half_an_epoch_is_not_applied_again(void **state)
{
    struct bench *b = *state;

    apply_and_die_half_way(b);
    lose_newest_super(b);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->applied, 1);
    assert_int_equal(b->group->committed, 1);
    assert_int_equal(get(b), 2);
    bench_settle(b);
    assert_int_equal(b->disk.file[DISK_IMAGE(0)][0], 2);
    assert_true(bench_count(b, CORE_EVENT_LOG) > 0);
}

/* R20 */
static void a_lost_superblock_with_no_way_on_is_refused(void **state)
{
    struct bench *b = *state;

    apply_and_die_half_way(b);
    lose_newest_super(b);
    memset(record(b), 0, PAGE);
    assert_int_equal(bench_open(b), -EBADMSG);
    assert_non_null(strstr(b->text, "its newest superblock cannot be read"));
    assert_int_equal(b->disk.file[DISK_IMAGE(0)][0], 2);
}

/* R14: "clean" in the one before says nothing of what came behind it. */
static void an_older_clean_superblock_does_not_hide_damage(void **state)
{
    struct bench *b = *state;

    assert_int_equal(bench_verb(b, VERB_STOP)->result, 0);
    bench_kill(b);
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0);
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO; /* two records stay in the journal */
    for (int i = 1; i <= 2; i++) {
        put(b, i);
        bench_verb(b, VERB_SEAL);
        assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
    }
    bench_kill(b);
    bench_forget_arena(b);
    lose_newest_super(b);
    memset(record(b), 0, PAGE);
    assert_int_equal(bench_open(b), -EBADMSG);
}

/* R14: ids that the lost one had reserved are not used again. */
static void a_lost_superblock_may_have_reserved_ids(void **state)
{
    struct bench *b = *state;
    uint64_t used;

    bench_kill(b);
    assert_int_equal(bench_open(b), 0);
    for (uint32_t i = 0; i < JOURNAL_EPOCH_STEP + 500; i++) {
        put(b, 1);
        b->events = 0;
        assert_int_equal(bench_verb(b, VERB_DISCARD)->result, 0);
    }
    used = epoch_open(b->group)->id;
    bench_kill(b);
    bench_forget_arena(b);
    lose_newest_super(b);
    assert_int_equal(bench_open(b), 0);
    assert_true(epoch_open(b->group)->id > used);
}

/* R14: a promoted agent does not become a standby again. */
static void promote_survives_the_loss_of_a_superblock(void **state)
{
    struct bench *b = *state;

    assert_int_equal(bench_verb(b, VERB_PROMOTE)->result, 0);
    bench_kill(b);
    bench_forget_arena(b);
    lose_newest_super(b);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->mode, CORE_ACTIVE);
    assert_int_equal(b->group->generation, 2);
}

#define ROW(test) cmocka_unit_test_setup_teardown(test, setup, bench_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        ROW(a_committed_frame_that_changed_is_read_from_the_journal),
        ROW(a_committed_segment_that_is_gone_is_read_from_the_journal),
        ROW(a_segment_too_many_is_not_applied),
        ROW(a_sealed_frame_that_changed_is_not_committed),
        ROW(a_segment_of_another_epoch_is_refused),
        ROW(half_an_epoch_is_not_applied_again),
        ROW(a_lost_superblock_with_no_way_on_is_refused),
        ROW(an_older_clean_superblock_does_not_hide_damage),
        ROW(a_lost_superblock_may_have_reserved_ids),
        ROW(promote_survives_the_loss_of_a_superblock),
        ROW(an_unacknowledged_record_is_not_believed),
        ROW(the_tail_is_voided_once_the_superblock_is_durable),
        ROW(a_lost_acknowledged_record_is_committed_anew),
        ROW(a_discard_that_had_not_begun_is_forgotten),
        ROW(a_discard_that_was_under_way_is_finished),
        ROW(an_arena_behind_the_journal_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
