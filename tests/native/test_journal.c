/* The journal: what a commit writes, and what a damaged record does to the next start. */
#include "support.h"

#include "checksum.h"

static int setup(void **state)
{
    *state = bench_new(8u << 20, 8u << 20, 1);
    return 0;
}

static void fill(struct bench *b, int value, uint64_t bytes)
{
    static uint8_t data[4u << 20];

    memset(data, value, sizeof(data));
    for (uint64_t i = 0; i < bytes; i += 512)
        data[i] = (uint8_t)(i >> 9); /* no two sectors alike */
    assert_int_equal(bench_write(b, 0, 0, data, bytes), 0);
}

static uint8_t value_at(struct bench *b, uint64_t sector)
{
    uint8_t in[SECTOR_BYTES];

    bench_read(b, 0, sector, in, sizeof(in));
    return in[1];
}

/* Commits, but keeps apply from it: the record stays the only place of its data. */
static const core_event *commit_unapplied(struct bench *b)
{
    b->disk.fail[DISK_IMAGE(0)][DISK_WRITE] = EIO;
    return bench_verb(b, VERB_COMMIT);
}

static struct record_header *record(struct bench *b)
{
    return (struct record_header *)(b->disk.file[DISK_JOURNAL] + JOURNAL_LOG_OFFSET);
}

static void a_record_covers_every_frame(void **state)
{
    struct bench *b = *state;
    const struct record_segment *table;
    const struct record_header *h;
    uint64_t at;

    fill(b, 7, 2u << 20);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(commit_unapplied(b)->value, 1);
    h = record(b);
    assert_int_equal(h->magic, RECORD_MAGIC);
    assert_true(h->epoch_first == 1 && h->epoch_last == 1 && h->lsn == 0);
    assert_int_equal(h->crc, journal_record_crc(h));
    assert_true(h->segments > 0);
    table = (const struct record_segment *)(h + 1);
    at = h->header_bytes;
    for (uint32_t i = 0; i < h->segments; i++) {
        uint32_t offset = 0, crc = 0;

        while (offset < table[i].bytes) {
            const struct frame_header *f =
                (const struct frame_header *)((const uint8_t *)h + at + offset);

            assert_true(frame_plausible(f, table[i].bytes - offset));
            assert_int_equal(f->crc, frame_crc(f));
            crc = checksum_crc32c(crc, f, sizeof(*f));
            offset += frame_bytes(f->payload_bytes);
        }
        assert_int_equal(crc, table[i].crc);
        at += page_round_up(table[i].bytes);
    }
    assert_int_equal(at, h->record_bytes);
}

/* Any byte of it: the record does not count, alone it is a commit that never ended. */
static void a_torn_record_is_void(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);
    uint64_t record_bytes;
    uint8_t *kept;

    fill(b, 7, 1u << 20);
    bench_verb(b, VERB_SEAL);
    assert_int_equal(commit_unapplied(b)->value, 1);
    record_bytes = record(b)->record_bytes;
    bench_kill(b);
    kept = malloc(b->disk.bytes[0]);
    check(kept);
    memcpy(kept, b->disk.file[0], b->disk.bytes[0]);
    for (uint32_t turn = 0; turn < 60; turn++) {
        const struct record_header *h = record(b);
        const struct record_segment *table = (const struct record_segment *)(h + 1);
        uint64_t at = dice_below(&d, sizeof(*h));

        memcpy(b->disk.file[0], kept, b->disk.bytes[0]);
        if (turn % 2) { /* a byte of the frames, not of the padding */
            uint32_t segment = (uint32_t)dice_below(&d, h->segments);

            at = h->header_bytes;
            for (uint32_t i = 0; i < segment; i++)
                at += page_round_up(table[i].bytes);
            /* Headers and payloads; between them up to 31 bytes may be padding. */
            at += dice_below(&d, table[segment].bytes) & ~31ull;
        }
        b->disk.file[0][JOURNAL_LOG_OFFSET + at] ^= (uint8_t)(1 + dice_below(&d, 255));
        bench_forget_arena(b);
        assert_int_equal(bench_open(b), 0);
        assert_int_equal(b->group->committed, 0);
        assert_int_equal(value_at(b, 8), 0);
        assert_true(epoch_open(b->group)->id > 1); /* its id is not used again */
        bench_kill(b);
    }
    memcpy(b->disk.file[0], kept, b->disk.bytes[0]);
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(b->group->committed, 1);
    assert_int_equal(value_at(b, 8), 7);
    assert_true(record_bytes > PAGE);
    free(kept);
}

static void damage_before_an_acknowledged_record_is_refused(void **state)
{
    struct bench *b = *state;

    for (int turn = 0; turn < 2; turn++) {
        fill(b, 7 + turn, 1u << 20);
        bench_verb(b, VERB_SEAL);
        assert_int_equal(commit_unapplied(b)->value, (uint64_t)turn + 1);
    }
    bench_kill(b);
    bench_forget_arena(b);
    record(b)->crc ^= 1;
    assert_int_equal(bench_open(b), -EBADMSG);
    assert_non_null(strstr(b->text, "damaged"));
    record(b)->crc ^= 1;
    assert_int_equal(bench_open(b), 0);
    assert_int_equal(value_at(b, 8), 8);
}

/* A header with a right checksum and absurd sizes: rejected, whatever it says. */
static void absurd_headers_are_no_records(void **state)
{
    struct bench *b = *state;
    struct record_header good;

    fill(b, 7, 1u << 20);
    bench_verb(b, VERB_SEAL);
    commit_unapplied(b);
    bench_kill(b);
    good = *record(b);
#define ABSURD(field, value)                               \
    do {                                                   \
        struct record_header *h = record(b);               \
        *h = good;                                         \
        h->field = (value);                                \
        h->crc = journal_record_crc(h);                    \
        bench_forget_arena(b);                             \
        assert_int_equal(bench_open(b), 0);                \
        assert_int_equal(b->group->committed, 0);          \
        bench_kill(b);                                     \
    } while (0)
    ABSURD(segments, 1u << 28);      /* 2^32 bytes of table: the length wraps to its own */
    ABSURD(segments, good.segments + 1);
    ABSURD(record_bytes, good.record_bytes + PAGE);
    ABSURD(record_bytes, good.record_bytes + 1);
    ABSURD(record_bytes, UINT64_MAX / PAGE * PAGE);
    ABSURD(lsn, PAGE);
    ABSURD(epoch_last, 0);
    ABSURD(version, 2);
}

static void any_superblock_will_do(void **state)
{
    struct bench *b = *state;
    uint8_t *slot[JOURNAL_SUPER_SLOTS], *newest;

    fill(b, 7, PAGE);
    bench_verb(b, VERB_SEAL);
    bench_verb(b, VERB_COMMIT);
    bench_settle(b);
    bench_kill(b);
    newest = slot[0] = b->disk.file[0];
    for (uint32_t i = 1; i < JOURNAL_SUPER_SLOTS; i++) {
        slot[i] = b->disk.file[0] + i * JOURNAL_SUPER_STRIDE;
        if (((const struct journal_super *)slot[i])->super_seq >
            ((const struct journal_super *)newest)->super_seq)
            newest = slot[i];
    }
    newest[100] ^= 1;
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), 0); /* the record is applied once more */
    assert_int_equal(b->group->committed, 1);
    bench_settle(b);
    assert_int_equal(value_at(b, 8 - 7), 7);
    bench_kill(b);
    for (uint32_t i = 0; i < JOURNAL_SUPER_SLOTS; i++)
        slot[i][200] ^= 1; /* none is whole now */
    bench_forget_arena(b);
    assert_int_equal(bench_open(b), -EINVAL);
    assert_non_null(strstr(b->text, "no superblock"));
}

/* The ring of the journal, many times around. */
static void records_wrap_around(void **state)
{
    struct bench *b = *state;
    struct dice d = dice_new(__func__);

    for (uint64_t turn = 1; turn <= 120; turn++) {
        static uint8_t data[2u << 20];
        uint64_t bytes = PAGE * (1 + dice_below(&d, sizeof(data) / PAGE));

        dice_fill(&d, data, bytes);
        assert_int_equal(bench_write(b, 0, 0, data, bytes), 0);
        bench_verb(b, VERB_SEAL);
        assert_int_equal(bench_verb(b, VERB_COMMIT)->result, 0);
        if (turn % 7 == 0) {
            bench_kill(b);
            bench_forget_arena(b);
            assert_int_equal(bench_open(b), 0);
        }
        bench_settle(b);
        assert_memory_equal(b->disk.file[DISK_IMAGE(0)], data, bytes);
        assert_int_equal(journal_used(&b->group->journal), 0);
    }
    assert_true(b->group->journal.head_lsn > 2 * b->group->journal.ring_bytes);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, bench_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(a_record_covers_every_frame),
        CASE(a_torn_record_is_void),
        CASE(damage_before_an_acknowledged_record_is_refused),
        CASE(absurd_headers_are_no_records),
        CASE(any_superblock_will_do),
        CASE(records_wrap_around),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
