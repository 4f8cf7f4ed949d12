/* checksum.c - see checksum.h. Any thread; no state. */
#include "checksum.h"

#include <isa-l/crc.h>

uint32_t checksum_crc32c(uint32_t crc, const void *data, size_t bytes)
{
    const uint8_t *p = data;

    /* ISA-L leaves the two inversions to the caller and takes an int length. */
    crc = ~crc;
    while (bytes > 0) {
        int piece = bytes > 1u << 30 ? 1 << 30 : (int)bytes;
        crc = crc32_iscsi((unsigned char *)p, piece, crc);
        p += piece;
        bytes -= (size_t)piece;
    }
    return ~crc;
}
