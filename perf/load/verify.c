/* verify.c - see verify.h. */
#include "verify.h"

#include <isa-l/crc.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MAGIC 0x64706b62u        /* "bkpd" */
#define BUSY 0x80000000u
#define KIND_MASK 0x60000000u
#define KIND_UNKNOWN 0u
#define KIND_DATA 0x20000000u
#define KIND_ZERO 0x40000000u
#define KIND_EITHER 0x60000000u  /* discarded: zeroes, or the data of before */
#define GENERATION_MASK 0x1fffffffu

typedef unsigned long long ull;

struct stamp {
    uint32_t magic, bytes;
    uint64_t sector;
    uint32_t run_id, generation, disk;
    uint32_t crc;                /* of the block without this field */
};
_Static_assert(sizeof(struct stamp) == LOAD_STAMP_BYTES, "layout on disk");

static uint32_t checksum(const uint8_t *data, uint32_t bytes)
{
    uint32_t crc = crc32_iscsi((unsigned char *)data, offsetof(struct stamp, crc), ~0u);

    return crc32_iscsi((unsigned char *)data + sizeof(struct stamp),
                       (int)(bytes - sizeof(struct stamp)), crc);
}

struct verify *verify_create(const load_config *config, const load_disk_config *disks,
                             uint32_t disk_count)
{
    struct verify *v = calloc(1, sizeof(*v) + disk_count * sizeof(v->disk[0]));

    if (!v)
        return NULL;
    v->run_id = config->run_id;
    v->block_bytes = config->block_bytes;
    for (uint32_t i = 0; i < disk_count; i++) {
        void *state = mmap(NULL, disks[i].blocks * sizeof(uint32_t), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

        if (state == MAP_FAILED) {
            verify_free(v);
            return NULL;
        }
        v->disk[v->disk_count++] = (struct verify_disk){.sector = disks[i].sector,
                                                        .blocks = disks[i].blocks, .state = state};
    }
    return v;
}

void verify_free(struct verify *v)
{
    if (!v)
        return;
    for (uint32_t i = 0; i < v->disk_count; i++)
        munmap(v->disk[i].state, v->disk[i].blocks * sizeof(uint32_t));
    free(v);
}

bool verify_take(struct verify *v, uint32_t disk, uint64_t block)
{
    uint32_t *state = &v->disk[disk].state[block];

    if (*state & BUSY)
        return false;
    *state |= BUSY;
    return true;
}

static uint32_t after(uint32_t state, int op, bool well)
{
    uint32_t generation = state & GENERATION_MASK;

    if (op == LOAD_READ)
        return state;
    if (!well)
        return generation;       /* half of it may be there: nothing is known */
    if (op == LOAD_WRITE)
        return KIND_DATA | generation;
    if (op == LOAD_ZERO)
        return KIND_ZERO | generation;
    return (state & KIND_MASK) == KIND_DATA ? KIND_EITHER | generation : state;
}

void verify_give(struct verify *v, uint32_t disk, uint64_t block, int op, bool well)
{
    uint32_t *state = &v->disk[disk].state[block];

    *state = after(*state & ~BUSY, op, well);
}

bool verify_known(const struct verify *v, uint32_t disk, uint64_t block)
{
    return (v->disk[disk].state[block] & KIND_MASK) != KIND_UNKNOWN;
}

static uint64_t sector_of(const struct verify *v, uint32_t disk, uint64_t block)
{
    return v->disk[disk].sector + block * (v->block_bytes / 512);
}

void verify_stamp(struct verify *v, uint32_t disk, uint64_t block, uint8_t *data)
{
    uint32_t *state = &v->disk[disk].state[block];
    uint32_t generation = (*state + 1) & GENERATION_MASK;
    struct stamp s = {.magic = MAGIC, .bytes = v->block_bytes,
                      .sector = sector_of(v, disk, block), .run_id = v->run_id,
                      .generation = generation, .disk = disk};

    *state = (*state & ~GENERATION_MASK) | generation;
    memcpy(data, &s, sizeof(s));
    s.crc = checksum(data, v->block_bytes);
    memcpy(data, &s, sizeof(s));
}

static bool zeroes(const uint8_t *data, uint32_t bytes)
{
    return data[0] == 0 && memcmp(data, data + 1, bytes - 1) == 0;
}

/* The stamp by itself, and then against what was written: NULL, or what is wrong. */
static const char *self(const struct verify *v, uint32_t disk, uint64_t sector,
                        const struct stamp *s, const uint8_t *data)
{
    if (s->sector != sector)
        return "it is another sector's block";
    if (s->disk != disk)
        return "it is another disk's block";
    if (s->crc != checksum(data, v->block_bytes))
        return "its checksum is wrong";
    return NULL;
}

static const char *against(const struct verify *v, const struct stamp *s, uint32_t state)
{
    if (s->run_id != v->run_id)
        return "an earlier run wrote it";
    if (s->generation != (state & GENERATION_MASK))
        return "it is of another generation";
    return NULL;
}

static const char *names[] = {"nothing known", "the data of", "zeroes, written after",
                              "zeroes or the data of"};

enum verify_result verify_check(struct verify *v, uint32_t disk, uint64_t block,
                                const uint8_t *data, char *text)
{
    uint32_t state = v->disk[disk].state[block] & ~BUSY, kind = state & KIND_MASK;
    uint64_t sector = sector_of(v, disk, block);
    const char *wrong = NULL;
    struct stamp s;
    bool stamped;

    memcpy(&s, data, sizeof(s));
    stamped = s.magic == MAGIC && s.bytes == v->block_bytes;
    if (kind == KIND_UNKNOWN) {
        wrong = stamped ? self(v, disk, sector, &s, data) : NULL;
        if (!wrong)
            return stamped ? VERIFY_RIGHT : VERIFY_UNKNOWN;
    } else if (kind != KIND_DATA && zeroes(data, v->block_bytes)) {
        return VERIFY_RIGHT;
    } else if (!stamped) {
        wrong = kind == KIND_DATA && zeroes(data, v->block_bytes) ? "it is all zeroes"
                                                                 : "it has no stamp";
    } else if (kind == KIND_ZERO) {
        wrong = "it is not zeroes";
    } else {
        wrong = self(v, disk, sector, &s, data);
        if (!wrong)
            wrong = against(v, &s, state);
        if (!wrong)
            return VERIFY_RIGHT;
    }
    if (stamped)
        snprintf(text, LOAD_TEXT_MAX, "wrong data at sector %llu of disk %u: %s (its stamp: "
                 "sector %llu, disk %u, generation %u; expected: %s generation %u)", (ull)sector,
                 disk, wrong, (ull)s.sector, s.disk, s.generation, names[kind >> 29],
                 state & GENERATION_MASK);
    else
        snprintf(text, LOAD_TEXT_MAX, "wrong data at sector %llu of disk %u: %s (expected: %s "
                 "generation %u)", (ull)sector, disk, wrong, names[kind >> 29],
                 state & GENERATION_MASK);
    return VERIFY_WRONG;
}
