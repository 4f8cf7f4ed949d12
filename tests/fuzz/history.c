/* history.c - see history.h. */
#include "history.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const uint64_t image_bytes[HISTORY_DISKS] = {40 * BLOCK_BYTES + 3 * SECTOR_BYTES,
                                                    24 * BLOCK_BYTES};
static int arena_fd = -1;
static uint8_t *arena_map;

int history_arena_fd(void)
{
    if (arena_fd >= 0)
        return arena_fd;
    arena_fd = memfd_create("arena", 0);
    if (ftruncate(arena_fd, HISTORY_ARENA_BYTES))
        abort();
    arena_map = mmap(NULL, HISTORY_ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, arena_fd, 0);
    if (arena_map == MAP_FAILED)
        abort();
    return arena_fd;
}

uint8_t *history_arena(void)
{
    history_arena_fd();
    return arena_map;
}

static core_config configuration(void)
{
    core_config config = {.disks = HISTORY_DISKS, .journal_fd = -1, .compress_level = 1,
                          .arena_bytes = HISTORY_ARENA_BYTES, .arena_fd = history_arena_fd()};

    for (uint32_t i = 0; i < HISTORY_DISKS; i++) {
        config.disk[i].size_bytes = image_bytes[i];
        config.disk[i].logical_block_bytes = 512;
        config.disk[i].memory_align = 1;
        config.disk[i].name[0] = (char)('a' + i);
    }
    return config;
}

static void format(struct seam *s)
{
    static const uint8_t id[16] = "fuzzfuzzfuzzfuz";
    core_config config = configuration();
    char text[CORE_TEXT_MAX] = "";

    config.journal_fd = memfd_create("journal", 0);
    if (ftruncate(config.journal_fd, HISTORY_JOURNAL_BYTES) ||
        core_journal_format(&config, id, text) ||
        pread(config.journal_fd, s->file[0].data, PAGE, 0) != PAGE)
        finding("%s", text);
    close(config.journal_fd);
}

int history_open(struct history *h, struct group *g, char *text)
{
    core_config config = configuration();
    int error;

    memset(g, 0, sizeof(*g));
    g->now_ns = 1;
    error = group_open(g, &config, &h->seam.disk, text);
    if (!error && group_start(g, -1, true))
        abort();
    return error;
}

bool history_read(const struct history *h, struct group *g, uint32_t disk, uint64_t block,
                  uint8_t *out)
{
    const struct seam_file *f = &h->seam.file[DISK_IMAGE(disk)];
    uint8_t found_data[BLOCK_BYTES];
    const uint8_t *direct;
    uint64_t at = block * BLOCK_BYTES;
    uint64_t bytes = f->bytes - at < BLOCK_BYTES ? f->bytes - at : BLOCK_BYTES;
    uint8_t want = (uint8_t)((1u << bytes / SECTOR_BYTES) - 1);
    int found = epoch_read(g, disk, block, want, found_data, &direct);

    if (found < 0)
        return false;
    memcpy(out, f->data + at, bytes);
    for (uint32_t i = 0; i < bytes / SECTOR_BYTES; i++)
        if (found & 1 << i)
            memcpy(out + i * SECTOR_BYTES, (direct ? direct : found_data) + i * SECTOR_BYTES,
                   SECTOR_BYTES);
    return true;
}

/* ---- Making one --------------------------------------------------------------------------- */

struct maker {
    struct history *h;
    struct group *g;
    uint8_t *now[HISTORY_DISKS]; /* what the guest sees */
    uint32_t seed;
};

static uint32_t roll(struct maker *m, uint32_t below)
{
    m->seed = m->seed * 1664525u + 1013904223u;
    return (m->seed >> 8) % below;
}

static void sectors(struct group *g, uint32_t disk, uint64_t sector, uint8_t *data, uint64_t bytes)
{
    struct span span = {.ptr = data, .bytes = bytes};
    struct span_cursor from = span_start(&span, 1);

    if (epoch_room(&g->writer[0], bytes / BLOCK_BYTES + 2))
        epoch_write(g, disk, sector, &from, bytes);
}

void history_write(struct group *g, uint32_t disk, uint64_t block, uint8_t fill)
{
    uint8_t data[BLOCK_BYTES];

    memset(data, fill, sizeof(data));
    sectors(g, disk, block * BLOCK_SECTORS, data, sizeof(data));
}

static void guest(struct maker *m, uint32_t requests)
{
    static uint8_t data[4 * BLOCK_BYTES];

    for (uint32_t i = 0; i < requests; i++) {
        uint32_t disk = roll(m, HISTORY_DISKS), kind = roll(m, 8);
        uint64_t all = image_bytes[disk] / SECTOR_BYTES, sector = roll(m, (uint32_t)all);
        uint64_t count = 1 + roll(m, 24);

        if (kind < 5)
            sector = sector / BLOCK_SECTORS * BLOCK_SECTORS;
        if (count > all - sector)
            count = all - sector;
        if (kind == 7) {
            epoch_zero(m->g, disk, sector, count, roll(m, 2));
            memset(m->now[disk] + sector * SECTOR_BYTES, 0, count * SECTOR_BYTES);
            continue;
        }
        for (uint64_t b = 0; b < count * SECTOR_BYTES; b++) /* some of it shrinks, some not */
            data[b] = kind & 1 ? (uint8_t)roll(m, 256) : (uint8_t)(b / 512 + m->seed % 7);
        sectors(m->g, disk, sector, data, count * SECTOR_BYTES);
        memcpy(m->now[disk] + sector * SECTOR_BYTES, data, count * SECTOR_BYTES);
    }
}

static void state_keep(struct maker *m)
{
    struct history *h = m->h;

    if (h->states == HISTORY_RECORDS_MAX)
        abort();
    for (uint32_t i = 0; i < HISTORY_DISKS; i++) {
        h->state[h->states][i] = malloc(image_bytes[i]);
        memcpy(h->state[h->states][i], m->now[i], image_bytes[i]);
    }
    h->states++;
}

static void verb(struct group *g, enum verb_kind kind)
{
    struct verb v = {.kind = kind, .newest = true};

    checkpoint_submit(g, &v);
}

static void checkpoint(struct maker *m, uint32_t epochs)
{
    for (uint32_t i = 0; i < epochs; i++) {
        guest(m, 3 + roll(m, 6));
        verb(m->g, VERB_SEAL);
        seam_settle(m->g, &m->h->seam);
    }
    for (uint32_t i = HISTORY_RECORD_HEADERS - 1; i > 0; i--)
        m->h->header[i] = m->h->header[i - 1];
    m->h->header[0] = journal_offset(&m->g->journal, m->g->journal.tail_lsn);
    if (m->h->headers < HISTORY_RECORD_HEADERS)
        m->h->headers++;
    verb(m->g, VERB_COMMIT);
    seam_settle(m->g, &m->h->seam);
    if (m->g->committed != epoch_open(m->g)->id - 1)
        finding("the history cannot be made: epoch %llu is not committed",
                (unsigned long long)epoch_open(m->g)->id - 1);
    state_keep(m);
}

static void applied(struct maker *m, uint32_t records)
{
    for (uint32_t i = 0; i < records; i++)
        checkpoint(m, 1 + roll(m, 3));
    m->h->applied = m->h->states - 1;
}

static void hold_images(struct history *h, bool hold)
{
    for (uint32_t i = 0; i < HISTORY_DISKS; i++)
        h->seam.file[DISK_IMAGE(i)].hold = hold;
}

void history_make(struct history *h, enum history_kind kind)
{
    const uint64_t files[] = {HISTORY_JOURNAL_BYTES, image_bytes[0], image_bytes[1]};
    struct group *g = calloc(1, sizeof(*g));
    struct maker m = {.h = h, .g = g, .seed = 77u + kind};
    char text[CORE_TEXT_MAX] = "";

    memset(h, 0, sizeof(*h));
    seam_init(&h->seam, files, HISTORY_DISKS + 1);
    memcpy(h->image_bytes, image_bytes, sizeof(image_bytes));
    format(&h->seam);
    memset(history_arena(), 0, HISTORY_ARENA_BYTES);
    for (uint32_t i = 0; i < HISTORY_DISKS; i++)
        m.now[i] = calloc(1, image_bytes[i]);
    if (history_open(h, g, text))
        finding("the history cannot be made: %s", text);
    state_keep(&m);
    applied(&m, kind == HISTORY_WRAPPED ? 7 : 3);
    h->older = malloc(HISTORY_JOURNAL_BYTES);
    memcpy(h->older, h->seam.file[0].data, HISTORY_JOURNAL_BYTES);
    hold_images(h, kind != HISTORY_CLEAN);
    for (uint32_t i = 0; i < 3; i++)
        checkpoint(&m, 1 + i % 2);
    if (kind == HISTORY_CLEAN) {
        h->applied = h->states - 1;
        verb(g, VERB_STOP);
        seam_settle(g, &h->seam);
    } else {
        guest(&m, 5); /* sealed and open epochs, in the arena only */
        verb(g, VERB_SEAL);
        seam_settle(g, &h->seam);
        guest(&m, 5);
    }
    if (kind == HISTORY_TORN) {
        memset(h->seam.file[0].data + h->header[0], 0, PAGE);
        h->states--;
    }
    h->super_seq = g->journal.super_seq;
    h->arena = malloc(HISTORY_ARENA_BYTES);
    memcpy(h->arena, history_arena(), HISTORY_ARENA_BYTES);
    seam_drop(&h->seam);
    hold_images(h, false);
    seam_keep(&h->seam);
    group_close(g);
    free(g);
    for (uint32_t i = 0; i < HISTORY_DISKS; i++)
        free(m.now[i]);
}
