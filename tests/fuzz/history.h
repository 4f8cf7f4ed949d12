/* history.h - journals, images and arenas as the real code leaves them, and what they hold.
 *
 * A history is made once: a group on a disk in memory writes, seals, commits, applies some
 * of it, and then is cut off as by a crash. What the images would hold after each committed
 * record is the model that recovery is compared with.
 */
#ifndef EPOCHD_FUZZ_HISTORY_H
#define EPOCHD_FUZZ_HISTORY_H

#include "seam.h"

#define HISTORY_DISKS 2u
#define HISTORY_SEGMENTS 12u
#define HISTORY_ARENA_BYTES ((uint64_t)HISTORY_SEGMENTS * SEGMENT_BYTES + 2 * PAGE)
#define HISTORY_JOURNAL_BYTES (JOURNAL_LOG_OFFSET + 10 * 65536u)
#define HISTORY_RECORDS_MAX 16u
#define HISTORY_RECORD_HEADERS 8u

/* How the group is cut off; histories differ in this and in their data. */
enum history_kind {
    HISTORY_PENDING,            /* committed records that are not applied */
    HISTORY_WRAPPED,            /* the same, the records go round the ring's end */
    HISTORY_TORN,               /* the newest record lacks its header's page */
    HISTORY_CLEAN,              /* stopped */
    HISTORIES
};

struct history {
    struct seam seam;           /* journal and images as they were at the crash */
    uint8_t *arena;             /* the same for the arena */
    uint8_t *older;             /* the journal some commits before */
    uint64_t image_bytes[HISTORY_DISKS];
    uint8_t *state[HISTORY_RECORDS_MAX][HISTORY_DISKS]; /* images after so many records */
    uint32_t states;            /* the last one is the newest committed */
    uint32_t applied;           /* index of the one that the images hold */
    uint64_t super_seq;         /* of the newest superblock */
    uint64_t header[HISTORY_RECORD_HEADERS]; /* file offsets of records, newest first */
    uint32_t headers;
};

void history_make(struct history *h, enum history_kind kind);

/* The shared memory that groups get; its mapping for the target. */
int history_arena_fd(void);
uint8_t *history_arena(void);

/* Opens and starts a group on the history's files. */
int history_open(struct history *h, struct group *g, char *text);

/* What a guest reads of a block; false: an error. */
bool history_read(const struct history *h, struct group *g, uint32_t disk, uint64_t block,
                  uint8_t *out);

/* One block into the open epoch. */
void history_write(struct group *g, uint32_t disk, uint64_t block, uint8_t fill);

#endif
