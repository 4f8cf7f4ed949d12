/* journal.c - recovery from a journal whose bytes were changed, without the arena.
 *
 * The input names a history (history.h) and changes to the journal's file: bits, bytes,
 * lost and misplaced pages, a cut. group_open() must refuse or recover; what it recovers
 * must be exactly the images after one of the records, and never bytes that no guest wrote;
 * afterwards the group works, over another restart too. Inputs that forge checksums are
 * only asked not to harm anything.
 */
#include <stdlib.h>
#include <string.h>

#include "checksum.h"
#include "history.h"

static struct history history[HISTORIES];

struct change {
    struct history *h;
    uint8_t *file;
    bool forged;
    bool older_super;
};

/* ---- Changes ---------------------------------------------------------------------------- */

/* Mostly where something is: superblocks, record headers and tables, the first frames. */
static uint64_t place(struct input *in, const struct history *h)
{
    uint8_t how = input_8(in);
    uint64_t at = input_n(in, 2);

    if (how < 16)
        return (how & 1) * JOURNAL_SUPER_STRIDE + at % PAGE;
    if (how < 160)
        return h->header[how % h->headers] + (how & 64 ? at % 512 : at);
    return (at | (uint64_t)how << 16) % HISTORY_JOURNAL_BYTES;
}

static bool is_crc(const struct history *h, uint64_t at)
{
    uint64_t crc = offsetof(struct journal_super, crc);

    for (uint32_t i = 0; i < JOURNAL_SUPER_SLOTS; i++)
        if (at >= i * JOURNAL_SUPER_STRIDE + crc && at < i * JOURNAL_SUPER_STRIDE + crc + 4)
            return true;
    crc = offsetof(struct record_header, crc);
    for (uint32_t i = 0; i < h->headers; i++)
        if (at >= h->header[i] + crc && at < h->header[i] + crc + 4)
            return true;
    return false;
}

static uint64_t clip(uint64_t at, uint64_t bytes)
{
    if (at >= HISTORY_JOURNAL_BYTES)
        return 0;
    return bytes < HISTORY_JOURNAL_BYTES - at ? bytes : HISTORY_JOURNAL_BYTES - at;
}

static void forge(struct change *c, uint32_t which)
{
    if (which < JOURNAL_SUPER_SLOTS) {
        struct journal_super *s = (struct journal_super *)(c->file + which * JOURNAL_SUPER_STRIDE);

        s->crc = journal_super_crc(s);
    } else {
        uint64_t at = c->h->header[which % c->h->headers];
        struct record_header *h = (struct record_header *)(c->file + at);

        if (h->header_bytes < sizeof(*h) || h->header_bytes > HISTORY_JOURNAL_BYTES - at)
            return;
        h->crc = journal_record_crc(h);
    }
    c->forged = true;
}

static void change(struct change *c, struct input *in)
{
    uint8_t op = input_8(in);
    uint64_t at = place(in, c->h), n, from;

    switch (op & 7) {
    case 0:
        c->file[at % HISTORY_JOURNAL_BYTES] ^= (uint8_t)(1u << (op >> 5));
        break;
    case 1:
        /* A checksum that the fuzzer has solved would be no finding. */
        for (n = clip(at, 1u << (op >> 3 & 3)); n > 0; n--, at++) {
            uint8_t byte = input_8(in);

            if (!is_crc(c->h, at))
                c->file[at] = byte;
        }
        break;
    case 2: /* a sector, a page or more reads as zeroes */
        at = at / SECTOR_BYTES * SECTOR_BYTES;
        memset(c->file + at, 0, clip(at, SECTOR_BYTES << (op >> 5)));
        break;
    case 3: /* misplaced */
        from = place(in, c->h) / SECTOR_BYTES * SECTOR_BYTES;
        at = at / SECTOR_BYTES * SECTOR_BYTES;
        n = clip(from > at ? from : at, SECTOR_BYTES << (op >> 5));
        memmove(c->file + at, c->file + from, n);
        break;
    case 4: /* lost */
        at = at / SECTOR_BYTES * SECTOR_BYTES;
        n = clip(at, SECTOR_BYTES << (op >> 5));
        memcpy(c->file + at, c->h->older + at, n);
        break;
    case 5: /* junk */
        at = at / SECTOR_BYTES * SECTOR_BYTES;
        n = clip(at, SECTOR_BYTES);
        for (uint64_t i = 0, x = input_8(in) + at; i < n; i++) {
            x = x * 6364136223846793005ull + 1442695040888963407ull;
            c->file[at + i] = (uint8_t)(x >> 56);
        }
        break;
    case 6:
        if (op >> 5 == 7)
            c->h->seam.file[0].bytes = at % HISTORY_JOURNAL_BYTES;
        break;
    case 7:
        if (op >> 5 >= 6)
            forge(c, (uint32_t)at % 8);
        break;
    }
}

/* ---- What came of it ----------------------------------------------------------------------- */

static const uint8_t *seen(const struct history *h, struct group *g, uint32_t disk, uint64_t block)
{
    static uint8_t data[BLOCK_BYTES];

    memset(data, 0, sizeof(data));
    if (!history_read(h, g, disk, block, data))
        finding("block %llu of disk %u cannot be read", (unsigned long long)block, disk);
    return data;
}

static uint64_t block_bytes(const struct history *h, uint32_t disk, uint64_t block)
{
    uint64_t left = h->image_bytes[disk] - block * BLOCK_BYTES;

    return left < BLOCK_BYTES ? left : BLOCK_BYTES;
}

static bool is_state(const struct history *h, struct group *g, uint32_t state)
{
    for (uint32_t d = 0; d < HISTORY_DISKS; d++)
        for (uint64_t b = 0; b * BLOCK_BYTES < h->image_bytes[d]; b++)
            if (memcmp(seen(h, g, d, b), h->state[state][d] + b * BLOCK_BYTES,
                       block_bytes(h, d, b)) != 0)
                return false;
    return true;
}

static uint32_t which_state(const struct history *h, struct group *g)
{
    for (uint32_t i = h->states; i-- > h->applied;)
        if (is_state(h, g, i))
            return i;
    finding("what was recovered is not the state after any record");
}

/* With a superblock lost, older records are applied once more, and if a newer one is damaged
 * too the images mix them: two faults. Bytes that no guest wrote there must not be seen. */
static void check_bytes(const struct history *h, struct group *g)
{
    for (uint32_t d = 0; d < HISTORY_DISKS; d++)
        for (uint64_t s = 0; s * SECTOR_BYTES < h->image_bytes[d]; s++) {
            const uint8_t *now = seen(h, g, d, s / BLOCK_SECTORS) +
                                 s % BLOCK_SECTORS * SECTOR_BYTES;
            bool known = false;

            for (uint32_t i = 0; i < h->states && !known; i++)
                known = memcmp(now, h->state[i][d] + s * SECTOR_BYTES, SECTOR_BYTES) == 0;
            if (!known)
                finding("sector %llu of disk %u holds what nobody wrote", (unsigned long long)s, d);
        }
}

static void verb(struct group *g, enum verb_kind kind)
{
    struct verb v = {.kind = kind, .newest = true};

    checkpoint_submit(g, &v);
}

/* The group goes on: a commit, a crash, and it is there. */
static void go_on(struct history *h, struct group *g)
{
    static struct group again;
    char text[CORE_TEXT_MAX] = "";
    uint64_t committed;
    uint8_t data[BLOCK_BYTES];

    history_write(g, 1, 3, 0xc3);
    verb(g, VERB_SEAL);
    verb(g, VERB_COMMIT);
    seam_settle(g, &h->seam);
    committed = g->committed;
    if (committed + 1 != epoch_open(g)->id)
        finding("a commit after recovery failed: %s", g->error);
    seam_drop(&h->seam);
    group_close(g);
    memset(history_arena(), 0, PAGE);
    if (history_open(h, &again, text))
        finding("refused after a recovery and a commit: %s", text);
    if (again.committed < committed || !history_read(h, &again, 1, 3, data) || data[77] != 0xc3)
        finding("the epoch committed after recovery is gone");
    group_close(&again);
}

static void recover(struct change *c)
{
    static struct group g;
    char text[CORE_TEXT_MAX] = "";
    struct history *h = c->h;
    uint32_t state = 0;
    bool exact;

    memset(history_arena(), 0, PAGE);
    if (history_open(h, &g, text)) {
        if (!text[0])
            finding("refused without a reason");
        return;
    }
    exact = !c->forged && g.journal.super_seq == h->super_seq + 1;
    if (exact)
        state = which_state(h, &g);
    else if (!c->forged)
        check_bytes(h, &g);
    seam_settle(&g, &h->seam);
    if (c->forged || h->seam.file[0].bytes != HISTORY_JOURNAL_BYTES) {
        seam_drop(&h->seam);
        group_close(&g);
        return;
    }
    if (g.journal.pending_count || g.error[0])
        finding("what was recovered is not applied: %s", g.error);
    if (exact && !is_state(h, &g, state))
        finding("the images differ from what was read before they were written");
    go_on(h, &g);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct input in = {.at = data, .end = data + bytes};
    struct change c = {.h = &history[input_8(&in) % HISTORIES]};

    if (!history[0].states)
        for (uint32_t i = 0; i < HISTORIES; i++)
            history_make(&history[i], (enum history_kind)i);
    c.file = c.h->seam.file[0].data;
    for (uint32_t i = 0; i < 24 && !input_over(&in); i++)
        change(&c, &in);
    recover(&c);
    c.h->seam.file[0].bytes = HISTORY_JOURNAL_BYTES;
    memcpy(c.file, c.h->seam.file[0].base, HISTORY_JOURNAL_BYTES);
    seam_restore(&c.h->seam);
    return 0;
}
