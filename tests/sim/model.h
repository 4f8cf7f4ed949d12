/* model.h - what the disks of the group must hold, said without journal, arena or frames.
 *
 * A sector's content is a small number (0: zeroes), which stands for 512 bytes. The model
 * follows what the guest wrote and what the group's events said; model_allowed() says which
 * committed epochs a recovery may come up with.
 */
#ifndef SIM_MODEL_H
#define SIM_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#define MODEL_DISKS_MAX 3u
#define MODEL_SECTORS_MAX 400u   /* of all disks */
#define MODEL_EPOCHS_MAX 40u
#define MODEL_ATTEMPTS_MAX MODEL_EPOCHS_MAX /* each is of a sealed epoch */
#define MODEL_VALUES 2048u

struct model_image {
    uint16_t sector[MODEL_SECTORS_MAX];
};

struct model_epoch {
    uint64_t id;
    struct model_image image;
};

struct model {
    uint32_t disks, sectors;
    uint32_t first[MODEL_DISKS_MAX + 1]; /* of each disk in the image; the end of the last */
    struct model_image committed, open;
    uint64_t committed_id;
    struct model_epoch sealed[MODEL_EPOCHS_MAX]; /* oldest first */
    uint32_t sealed_count;
    /* Commits that were begun and neither acknowledged nor taken back by a discard: a crash
     * may have made them, also when they were answered with an error. */
    uint64_t attempt[MODEL_ATTEMPTS_MAX];
    uint32_t attempts;
    uint64_t id_used;              /* highest id ever opened */
    uint64_t dropped;              /* newest id that a discard dropped, 0: none */
    uint32_t mode;
    uint64_t generation;
    bool promoting;                /* begun, not acknowledged: may be made or not */
    uint32_t next_value;
};

void model_init(struct model *m, const uint64_t *bytes, uint32_t disks);
/* Copies what is used. */
void model_copy(struct model *to, const struct model *from);

/* 512 bytes of a value. */
const uint8_t *model_pattern(uint32_t value);
uint32_t model_fresh_value(struct model *m);

/* The image as of a sealed or the committed epoch, or NULL. */
const struct model_image *model_image_of(const struct model *m, uint64_t id);
bool model_allowed(const struct model *m, uint64_t id);

void model_sealed(struct model *m, uint64_t id);
void model_attempt(struct model *m, uint64_t id);
/* Acknowledged; false: that epoch was never sealed. */
bool model_committed(struct model *m, uint64_t id);
void model_discarded(struct model *m, uint64_t last);
/* A start without the arena came up with epoch id and opened another. */
void model_restarted(struct model *m, uint64_t id);

#endif
