/* verify.h - what was last written to each block, and whether that is what is read.
 *
 * A written block begins with a stamp: disk, sector, generation, the load's id, and a CRC32C of all
 * of the block. The memory is 4 bytes a block. A block belongs to one request at a
 * time (verify_take, verify_give), so that it is always known which write came last.
 *
 * Of a discarded block the device may show zeroes or what was there before. A block that this
 * load has not written is right when its stamp, if there is one of this length, is right
 * by itself: so a later process can check what an earlier one wrote.
 *
 * Owner: the thread in load_run(). */
#ifndef EPOCHD_LOAD_VERIFY_H
#define EPOCHD_LOAD_VERIFY_H

#include <stdbool.h>
#include <stdint.h>

#include "load.h"

struct verify {
    uint32_t run_id, block_bytes, disk_count;
    struct verify_disk {
        uint64_t sector, blocks;
        uint32_t *state;
    } disk[];
};

enum verify_result { VERIFY_RIGHT, VERIFY_UNKNOWN, VERIFY_WRONG };

/* NULL: no memory. */
struct verify *verify_create(const load_config *config, const load_disk_config *disks,
                             uint32_t disk_count);
void verify_free(struct verify *v);

/* False: another request has the block. */
bool verify_take(struct verify *v, uint32_t disk, uint64_t block);
/* The request is over; what it did is noted. */
void verify_give(struct verify *v, uint32_t disk, uint64_t block, int op, bool well);

/* Has the load written it? */
bool verify_known(const struct verify *v, uint32_t disk, uint64_t block);
/* Puts the stamp of the block's next generation into data. */
void verify_stamp(struct verify *v, uint32_t disk, uint64_t block, uint8_t *data);
/* VERIFY_WRONG: the text, of LOAD_TEXT_MAX bytes, says what is wrong. */
enum verify_result verify_check(struct verify *v, uint32_t disk, uint64_t block,
                                const uint8_t *data, char *text);

#endif
