/* checksum.h - CRC32C (Castagnoli), by ISA-L, which picks the processor's instructions. */
#ifndef EPOCHD_CHECKSUM_H
#define EPOCHD_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

#include "format.h"

/* CRC32C of bytes; pass the previous result to go on with the next piece, 0 to begin. */
uint32_t checksum_crc32c(uint32_t crc, const void *data, size_t bytes);

/* A frame's crc: of its header behind the field, and its payload. */
static inline uint32_t frame_crc(const struct frame_header *h)
{
    return checksum_crc32c(0, &h->payload_bytes,
                           sizeof(*h) - offsetof(struct frame_header, payload_bytes) +
                               h->payload_bytes);
}

#endif
