/* CRC32C against published vectors, and that every byte of a record or page counts. */
#include "support.h"

#include "checksum.h"

static void known_vectors(void **state)
{
    uint8_t bytes[32];

    (void)state;
    assert_int_equal(checksum_crc32c(0, "123456789", 9), 0xe3069283u);
    assert_int_equal(checksum_crc32c(0, "", 0), 0);
    /* RFC 3720, B.4 */
    memset(bytes, 0, sizeof(bytes));
    assert_int_equal(checksum_crc32c(0, bytes, sizeof(bytes)), 0x8a9136aau);
    memset(bytes, 0xff, sizeof(bytes));
    assert_int_equal(checksum_crc32c(0, bytes, sizeof(bytes)), 0x62a8ab43u);
    for (uint32_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (uint8_t)i;
    assert_int_equal(checksum_crc32c(0, bytes, sizeof(bytes)), 0x46dd794eu);
}

static void pieces_make_the_whole(void **state)
{
    struct dice d = dice_new(__func__);
    uint8_t bytes[5000];
    uint32_t whole;

    (void)state;
    dice_fill(&d, bytes, sizeof(bytes));
    whole = checksum_crc32c(0, bytes, sizeof(bytes));
    for (uint32_t turn = 0; turn < 200; turn++) {
        size_t cut = dice_below(&d, sizeof(bytes) + 1);
        uint32_t crc = checksum_crc32c(0, bytes, cut);

        assert_int_equal(checksum_crc32c(crc, bytes + cut, sizeof(bytes) - cut), whole);
    }
}

static void every_byte_of_a_frame_counts(void **state)
{
    struct {
        struct frame_header h;
        uint8_t payload[512];
    } frame = {.h = {.payload_bytes = 512, .seq = 7, .block = 9, .blocks = 1, .kind = FRAME_RAW,
                     .mask = 1}};
    uint32_t good = frame_crc(&frame.h);

    (void)state;
    frame.h.crc = good; /* the field itself is not covered */
    assert_int_equal(frame_crc(&frame.h), good);
    for (size_t i = 8; i < sizeof(frame); i++) { /* the length, at 4, says what is read */
        ((uint8_t *)&frame)[i] ^= 0x10;
        assert_int_not_equal(frame_crc(&frame.h), good);
        ((uint8_t *)&frame)[i] ^= 0x10;
    }
}

static void every_byte_of_a_superblock_counts(void **state)
{
    struct journal_super page = {.magic = JOURNAL_MAGIC, .version = JOURNAL_VERSION, .disks = 1};
    uint32_t good = journal_super_crc(&page);

    (void)state;
    page.crc = good;
    assert_int_equal(journal_super_crc(&page), good);
    for (size_t i = 0; i < sizeof(page); i++) {
        if (i >= offsetof(struct journal_super, crc) &&
            i < offsetof(struct journal_super, version))
            continue;
        ((uint8_t *)&page)[i] ^= 1;
        assert_int_not_equal(journal_super_crc(&page), good);
        ((uint8_t *)&page)[i] ^= 1;
    }
}

static void every_byte_of_a_record_header_counts(void **state)
{
    static union {
        struct record_header h;
        uint8_t byte[2 * PAGE];
    } r;
    uint32_t good;

    (void)state;
    r.h = (struct record_header){.magic = RECORD_MAGIC, .segments = 300,
                                 .header_bytes = record_header_bytes(300)};
    assert_int_equal(r.h.header_bytes, sizeof(r));
    good = journal_record_crc(&r.h);
    r.h.crc = good;
    assert_int_equal(journal_record_crc(&r.h), good);
    for (size_t i = 0; i < sizeof(r); i++) {
        bool crc = i >= offsetof(struct record_header, crc) &&
                   i < offsetof(struct record_header, version);
        bool length = i >= offsetof(struct record_header, header_bytes) &&
                      i < sizeof(struct record_header);

        if (crc || length)
            continue;
        r.byte[i] ^= 1;
        assert_int_not_equal(journal_record_crc(&r.h), good);
        r.byte[i] ^= 1;
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(known_vectors),
        cmocka_unit_test(pieces_make_the_whole),
        cmocka_unit_test(every_byte_of_a_frame_counts),
        cmocka_unit_test(every_byte_of_a_superblock_counts),
        cmocka_unit_test(every_byte_of_a_record_header_counts),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
