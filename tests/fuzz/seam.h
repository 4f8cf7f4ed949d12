/* seam.h - a disk in memory behind the seam of native/disk.h, and the groups on it.
 *
 * For the fuzz targets: one thread, no waiting. submit() queues, reap() carries out and
 * delivers, so callers see the same order of events as with the real disk layer. Writes
 * outside of a file are a bug of the caller's and end the process. What was written can be
 * undone, so that each input starts from the same files.
 */
#ifndef EPOCHD_FUZZ_SEAM_H
#define EPOCHD_FUZZ_SEAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "group.h"

#define SEAM_FILES 4u

struct seam_file {
    uint8_t *data, *base;       /* base: what restore goes back to */
    uint64_t bytes;             /* as the disk layer sees it */
    uint64_t pages;             /* of data */
    uint8_t *dirty;             /* one a page */
    bool hold;                  /* operations on it wait */
};

struct seam {
    struct disk disk;
    struct seam_file file[SEAM_FILES];
    uint32_t files;
    struct disk_op *first, *last;
    uint32_t limit;             /* completions a reap() */
    bool reverse;               /* newest first */
    uint32_t failing;           /* so many next operations fail */
    uint64_t operations;
};

void seam_init(struct seam *s, const uint64_t *bytes, uint32_t files);
/* Takes the present content as the one that seam_restore() brings back. */
void seam_keep(struct seam *s);
void seam_restore(struct seam *s);
/* Marks bytes that somebody else changes. */
void seam_touch(struct seam *s, uint32_t file, uint64_t offset, uint64_t bytes);
/* Forgets operations in flight. */
void seam_drop(struct seam *s);

/* Steps the group until nothing moves. */
void seam_settle(struct group *g, struct seam *s);

/* Says what is wrong and aborts: libFuzzer keeps the input. */
_Noreturn void finding(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The input, from the front; zeroes when it is used up. */
struct input {
    const uint8_t *at, *end;
};

static inline uint8_t input_8(struct input *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

static inline uint64_t input_n(struct input *in, uint32_t bytes)
{
    uint64_t value = 0;

    for (uint32_t i = 0; i < bytes; i++)
        value |= (uint64_t)input_8(in) << 8 * i;
    return value;
}

static inline bool input_over(const struct input *in)
{
    return in->at >= in->end;
}

#endif
