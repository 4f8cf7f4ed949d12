/* dictionary.h - zstd dictionaries of a group: trained on its images, for blocks that are too
 * small to be compressed well alone.
 *
 * A frame names its dictionary by the id in zstd's own frame header; most name none. The newest
 * dictionary is for compression, all of them are for reading what is left of earlier ones.
 *
 * Owner: entries are added by one thread (at the start, then the control thread's) and never go
 * before the group does; any thread may read them. Where a frame comes from, its dictionary was
 * there before. A squeezer belongs to one helper.
 * Errors: with a sentence in text. Not done here: files, and which of them are needed
 * (agent/dictionary.py).
 */
#ifndef EPOCHD_DICTIONARY_H
#define EPOCHD_DICTIONARY_H

#include <stdbool.h>
#include <stdint.h>
#include <zstd.h>

#include "core.h"
#include "format.h"

struct dictionary {
    uint32_t id, bytes;
    void *content;
    ZSTD_DDict *expand;
    bool named;                 /* by a frame that was there at the start */
};

struct dictionaries {
    uint32_t count;             /* stored last, release order */
    struct dictionary at[CORE_DICTIONARIES_MAX];
};

/* -EINVAL: not a dictionary of that id; -EEXIST; -ENOSPC: too many; -ENOMEM. */
int dictionaries_add(struct dictionaries *d, const core_dictionary *from, char *text);
void dictionaries_free(struct dictionaries *d);
/* NULL: there is none of that id. */
struct dictionary *dictionary_by_id(struct dictionaries *d, uint32_t id);
/* For compression; NULL: none. */
const struct dictionary *dictionary_newest(const struct dictionaries *d);

/* What the frame was compressed with; 0: no dictionary, or it is not compressed. */
uint32_t frame_dictionary(const struct frame_header *h);

/* Below it a dictionary costs time and gains nothing: 4 KiB blocks of a Debian system come to the
 * same size with and without one at level 3, to 5 % less at level 6. */
#define DICTIONARY_LEVEL_MIN 6
#define SQUEEZER_LEVELS 4u

/* The newest dictionary, digested for the levels that were in use. */
struct squeezer {
    uint32_t id;                /* of which; 0: of none */
    uint32_t levels, next;
    struct {
        int level;
        ZSTD_CDict *with;
    } at[SQUEEZER_LEVELS];
};

/* Sets the context to the level, with d's newest dictionary from DICTIONARY_LEVEL_MIN on. Without
 * memory for that: as without a dictionary. True: with one. */
bool squeezer_use(struct squeezer *s, const struct dictionaries *d, ZSTD_CCtx *c, int level);
void squeezer_free(struct squeezer *s);

#endif
