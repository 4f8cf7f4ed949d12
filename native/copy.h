/* copy.h - guest data into the arena, around the cache; and out of it.
 *
 * What is written into the arena is next read much later, and by somebody else. Ordinary
 * stores would first fetch each line of the arena from memory only to overwrite it, which is
 * half of what a 4 KiB write costs. Streaming stores do not, but they also do not wait their
 * turn: copy_fence() comes before the store that shows the data to anybody else.
 *
 * Any thread. Plain memcpy() where the processor has no AVX2, and in builds with
 * EPOCHD_PLAIN_COPY: the fuzz targets change guest memory in the middle of a memcpy().
 */
#ifndef EPOCHD_COPY_H
#define EPOCHD_COPY_H

#include <stdint.h>

#include "format.h"

/* A frame header and a whole block behind it: `to` is aligned to FRAME_ALIGN. `from` may be
 * changed by others meanwhile; it is read once. */
extern void (*copy_frame)(uint8_t *to, const struct frame_header *header, const uint8_t *from);

/* A whole block out of the arena into guest memory, line by line, and the lines of the block that
 * is copied next (any address will do) into the cache: all at once they would fill the queue
 * that every other miss has to wait in. */
extern void (*copy_block)(uint8_t *to, const uint8_t *from, const uint8_t *next);

/* What copy_frame() wrote comes before what is stored from here on. */
static inline void copy_fence(void)
{
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#else
    __atomic_thread_fence(__ATOMIC_RELEASE);
#endif
}

#endif
