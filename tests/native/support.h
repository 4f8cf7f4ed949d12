/* support.h - what the C unit tests share: seeds, a disk in memory behind the seam, and a
 * group on it.
 *
 * The disk keeps operations until reap(); it can hold them back, and fail them by file and
 * opcode. It neither tears nor reorders: that is the simulator's. Everything aborts on a
 * failure of the machine (no memory, no memfd).
 */
#ifndef EPOCHD_TESTS_SUPPORT_H
#define EPOCHD_TESTS_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants those four before it. */
#include <cmocka.h>

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "group.h"

/* ---- Randomness: EPOCHD_SEED repeats a run ------------------------------------------------- */

struct dice {
    uint64_t state;
};
/* Prints the seed under the test's name. */
struct dice dice_new(const char *test);
uint64_t dice_next(struct dice *d);
static inline uint64_t dice_below(struct dice *d, uint64_t n)
{
    return dice_next(d) % n;
}
void dice_fill(struct dice *d, void *to, size_t bytes);

/* A memfd of so many zero bytes; not sealed. */
int memory_file(uint64_t bytes);

/* ---- A disk in memory ---------------------------------------------------------------------- */

#define FILES_MAX (DISK_SPILL + 1u)

struct memory_disk {
    struct disk disk;
    int fd[FILES_MAX];
    uint8_t *file[FILES_MAX];
    uint64_t bytes[FILES_MAX];
    uint32_t files;
    struct disk_op *first, *last;
    bool hold;                      /* reap() delivers nothing */
    bool hold_file[FILES_MAX];      /* ... of these files */
    int fail[FILES_MAX][DISK_PUNCH + 1]; /* errno to fail with; 0: works */
    uint64_t done[FILES_MAX][DISK_PUNCH + 1];
};

/* ---- A group ------------------------------------------------------------------------------- */

#define BENCH_DISKS 2u
#define BENCH_ARENA (16u << 20)
#define BENCH_SPILL_MAX (32u << 20)
#define BENCH_EVENTS 4096u

struct bench {
    struct memory_disk disk;
    core_config config;
    struct group *group;
    core_event event[BENCH_EVENTS]; /* what the group has told, oldest first */
    uint32_t events;
    uint64_t token;
    char text[CORE_TEXT_MAX];
};

/* Formats a journal and opens the group on a fresh arena; sizes of the images in bytes. */
void bench_start(struct bench *b, uint64_t size0, uint64_t size1, int compress_level);
/* Opens what is there; what group_open() returned. */
int bench_open(struct bench *b);
/* While closed: from now on with a spill file of so many bytes, and a new arena. */
void bench_add_spill(struct bench *b, uint64_t bytes);
/* As a kill does: the arena stays. */
void bench_kill(struct bench *b);
/* As a power cut does, while closed: the arena is new. */
void bench_forget_arena(struct bench *b);
void bench_end(struct bench *b);
/* For a test's fixture: one on the heap, started; and the teardown of a state that is such. */
struct bench *bench_new(uint64_t size0, uint64_t size1, int compress_level);
int bench_teardown(void **state);

/* Lets the group run until it waits for something. */
void bench_settle(struct bench *b);
/* Submits a verb, settles, and returns its DONE; NULL while there is none. */
uint64_t bench_submit(struct bench *b, enum verb_kind kind, uint64_t epoch, bool newest);
const core_event *bench_answer(const struct bench *b, uint64_t token);
/* The verb as a whole: must be answered now. */
const core_event *bench_verb(struct bench *b, enum verb_kind kind);
uint32_t bench_count(const struct bench *b, uint32_t type);

/* As a reactor's round does for a request of that disk: sets segments aside, asks for room; the
 * group may have to be settled before there is any. */
bool bench_room(struct bench *b, uint32_t disk, uint64_t blocks);

/* One write of so many bytes from `data`. */
int bench_write(struct bench *b, uint32_t disk, uint64_t sector, const void *data, uint64_t bytes);
/* What a guest would read: epochs, then the image. */
void bench_read(struct bench *b, uint32_t disk, uint64_t sector, void *to, uint64_t bytes);

#endif
