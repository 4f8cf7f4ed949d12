/* arena.h - segments of the shared-memory arena and frames in them.
 *
 * Segments 0..segments-1 are RAM. Those behind them lie in the spill file, which is mapped
 * right behind RAM, for reading only: a place names a byte in either. spill.h fills them.
 *
 * Owner: the reactor thread takes and frees segments. A helper thread may append to a
 * PACKED segment that the reactor gave it, and may read frames below a published tail.
 * Errors: negative errno and a sentence from arena_attach() only; running out of segments
 * is a return value, never an error. Limit: never more memory than the object has. Pages of
 * the spill file that were read are the kernel's cache, clean, and its to take back. A spill
 * file that shrinks or cannot be read is no crash: its segments read as zeroes from then on
 * and arena_spill_lost() tells; arena_spilled() places are to be checked on every use.
 * Not done here: which frame is newest (index.h), what an epoch is (epoch.h).
 */
#ifndef EPOCHD_ARENA_H
#define EPOCHD_ARENA_H

#include <stdbool.h>
#include <stdint.h>

#include "check.h"
#include "copy.h"
#include "format.h"
#include "memory.h"

#define SEGMENT_NONE UINT32_MAX
#define SEGMENT_FRAMES_MIN (SEGMENT_BYTES / FRAME_BYTES_MAX) /* raw frames that surely fit */

/* A place in the arena: byte offset from segment 0, in units of FRAME_ALIGN. */
typedef uint32_t arena_loc;

/* Which of a segment's bytes still count. Private: recounted at each start. A frame that
 * covers several blocks counts once for each slot or range of the index that points to it. */
struct segment_use {
    uint32_t slots;         /* index slots that were pointed into it */
    uint32_t dead;          /* of those, how many point elsewhere by now */
    uint32_t worn_at;       /* `dead` at which pack_worn() has to look; UINT32_MAX: never */
    uint32_t generation;    /* changes when the segment is taken; never 0 */
    uint32_t look_next;     /* of the segments that a writer wants looked at: see writer.h */
    bool worn;              /* it is on its epoch's worn list */
    bool merged;            /* nothing can be done for it in that sweep ... */
    uint32_t sweep;         /* ... of merge.h; 0: since it was packed there was none */
    uint64_t first;         /* place of its first frame, if there was: they are in order */
};

struct arena {
    struct arena_header *header;
    struct segment_desc *desc;
    uint8_t *data;          /* segment 0 */
    uint64_t bytes;
    uint32_t segments;      /* in RAM */
    uint32_t free_count;
    uint32_t *free_stack;   /* free_count entries */
    uint32_t spill_segments; /* numbered on; 0: there is no spill file */
    uint32_t spill_free_count;
    uint32_t *spill_free_stack;
    struct mapping spill;   /* of the file's segments */
    uint64_t mapped_bytes;  /* from the header on, both mappings */
    uint32_t *next;         /* per segment: next one of the same list, or SEGMENT_NONE */
    uint32_t *previous;     /* ... and the one before it */
    struct segment_use *use; /* per segment */
};

/* Where the next frame goes. */
struct arena_cursor {
    uint32_t segment;       /* SEGMENT_NONE: none taken yet */
    uint32_t tail;          /* bytes used in it */
};

/* Puts a new object's pages into huge ones, as far as the kernel gives them without being set
 * up for it (MADV_COLLAPSE, Linux 6.1): a random 4 KiB of 1 GiB then costs one translation
 * less, and mapping it again at a restart next to nothing. Returns how many bytes; what is left
 * is the caller's to allocate. */
uint64_t arena_huge_pages(int fd, uint64_t bytes);

/* Maps the object and checks or writes its header. *fresh: it held no arena; ids in the
 * header are then 0 and the caller sets them. spill_bytes: of segments in the spill file, 0:
 * there is none. An arena that has none in use may be attached without, one laid out for
 * another size is refused. Whether it is the right file is the caller's to see. */
int arena_attach(struct arena *a, int fd, uint64_t bytes, int spill_fd, uint64_t spill_bytes,
                 const uint8_t group[16], const uint8_t boot_id[16], bool *fresh, char *text);
void arena_detach(struct arena *a);

/* After attach, every segment not FREE is the caller's to keep or free, then this once. */
void arena_collect_free(struct arena *a);

/* RAM only. reserve: takes it off the free ones, where a restart finds it still; begin: puts it
 * to use; take: both. SEGMENT_NONE: there is none. */
uint32_t arena_segment_reserve(struct arena *a);
void arena_segment_unreserve(struct arena *a, uint32_t segment);
void arena_segment_begin(struct arena *a, uint32_t segment, uint64_t epoch,
                         enum segment_state state);
uint32_t arena_segment_take(struct arena *a, uint64_t epoch, enum segment_state state);
/* A segment of the spill file; it stays FREE for a restart until arena_spill_publish(). */
uint32_t arena_spill_take(struct arena *a);
void arena_spill_publish(struct arena *a, uint32_t segment, uint64_t epoch, uint32_t tail);
void arena_spill_give_back(struct arena *a, uint32_t segment);
/* Either kind. */
void arena_segment_free(struct arena *a, uint32_t segment);

static inline uint32_t arena_segments_all(const struct arena *a)
{
    return a->segments + a->spill_segments;
}

static inline uint32_t arena_spill_used(const struct arena *a)
{
    return a->spill_segments - a->spill_free_count;
}

/* Byte in the spill file where one of its segments begins, and the file's least size. */
static inline uint64_t arena_spill_offset(const struct arena *a, uint32_t segment)
{
    return (uint64_t)(segment - a->segments + 1) * SEGMENT_BYTES;
}
static inline uint64_t arena_spill_file_bytes(uint32_t spill_segments)
{
    return (uint64_t)(spill_segments + 1) * SEGMENT_BYTES;
}

/* The mapping hit a page that the file does not have or the disk cannot read. */
static inline bool arena_spill_lost(const struct arena *a)
{
    return mapping_lost(&a->spill);
}

static inline uint8_t *arena_segment(const struct arena *a, uint32_t segment)
{
    return a->data + (uint64_t)segment * SEGMENT_BYTES;
}

static inline uint32_t arena_tail(const struct arena *a, uint32_t segment)
{
    return __atomic_load_n(&a->desc[segment].tail, __ATOMIC_ACQUIRE);
}

static inline struct frame_header *arena_frame(const struct arena *a, arena_loc loc)
{
    return (struct frame_header *)(a->data + (uint64_t)loc * FRAME_ALIGN);
}

static inline arena_loc arena_loc_of(uint32_t segment, uint32_t offset)
{
    return (arena_loc)(((uint64_t)segment * SEGMENT_BYTES + offset) / FRAME_ALIGN);
}

static inline uint32_t arena_loc_segment(arena_loc loc)
{
    return (uint32_t)((uint64_t)loc * FRAME_ALIGN / SEGMENT_BYTES);
}

static inline bool arena_spilled(const struct arena *a, arena_loc loc)
{
    return (uint64_t)loc * FRAME_ALIGN >= (uint64_t)a->segments * SEGMENT_BYTES;
}

/* Room for a frame of payload_bytes at the cursor? */
static inline bool arena_fits(const struct arena_cursor *at, uint32_t payload_bytes)
{
    return at->segment != SEGMENT_NONE && at->tail + frame_bytes(payload_bytes) <= SEGMENT_BYTES;
}

/* The header to fill, its payload right behind it; arena_fits() was true. */
static inline struct frame_header *arena_frame_begin(const struct arena *a,
                                                     const struct arena_cursor *at)
{
    return (struct frame_header *)(arena_segment(a, at->segment) + at->tail);
}

/* The frame at the cursor is whole; it is not shown to anybody yet. */
static inline arena_loc arena_frame_close(struct arena_cursor *at, uint32_t payload_bytes)
{
    arena_loc loc = arena_loc_of(at->segment, at->tail);

    at->tail += frame_bytes(payload_bytes);
    check(at->tail <= SEGMENT_BYTES);
    return loc;
}

/* Publishes the frames up to the cursor: a reader or a restarted agent that sees the new tail
 * sees them whole. */
static inline void arena_publish(const struct arena *a, const struct arena_cursor *at)
{
    copy_fence();
    __atomic_store_n(&a->desc[at->segment].tail, at->tail, __ATOMIC_RELEASE);
}

/* Both, for a frame that was filled in its place. */
static inline arena_loc arena_frame_end(struct arena *a, struct arena_cursor *at)
{
    arena_loc loc = arena_frame_close(at, arena_frame_begin(a, at)->payload_bytes);

    arena_publish(a, at);
    return loc;
}

/* Walks frames: *offset starts at 0; NULL at the tail or at a frame that cannot be one
 * (then *offset < tail). Payload bytes are within the tail. */
struct frame_header *frame_next(uint8_t *from, uint32_t tail, uint32_t *offset);
static inline struct frame_header *arena_frame_next(const struct arena *a, uint32_t segment,
                                                    uint32_t tail, uint32_t *offset)
{
    return frame_next(arena_segment(a, segment), tail, offset);
}

/* Is this header one that we could have written? Checks sizes, kind, mask; not the CRC. */
bool frame_plausible(const struct frame_header *h, uint32_t room);

#endif
