/* arena.c - see arena.h. */
#include "arena.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core.h"

static uint32_t data_offset_for(uint64_t bytes, uint32_t spill_segments)
{
    uint64_t segments = bytes / SEGMENT_BYTES + spill_segments;

    return (uint32_t)page_round_up(PAGE + segments * sizeof(struct segment_desc));
}

static int refuse(char *text, int error, const char *why)
{
    snprintf(text, CORE_TEXT_MAX, "arena: %s", why);
    return error;
}

/* A restart must find what lies in the spill file. */
static int check_spill(const struct arena_header *h, uint32_t spill_segments, char *text)
{
    const struct segment_desc *desc = (const struct segment_desc *)((const uint8_t *)h + PAGE);
    uint32_t used = 0;

    if (h->spill_segments == spill_segments)
        return 0;
    for (uint32_t i = 0; i < h->spill_segments; i++)
        used += desc[h->segments + i].state != SEGMENT_FREE;
    if (spill_segments == 0 && used == 0)
        return 0;
    snprintf(text, CORE_TEXT_MAX, "arena: %u of its segments lie in a spill file of %llu bytes, "
             "which is not there; give it back, or remove the arena from /dev/shm to give up "
             "what is not committed", used,
             (unsigned long long)arena_spill_file_bytes(h->spill_segments));
    return -EINVAL;
}

static int check_header(const struct arena_header *h, uint64_t bytes, uint32_t spill_segments,
                        const uint8_t group[16], const uint8_t boot_id[16], char *text)
{
    if (h->magic != ARENA_MAGIC)
        return refuse(text, -EINVAL, "the shared memory holds something else than an arena");
    if (h->version != ARENA_VERSION || h->segment_bytes != SEGMENT_BYTES) {
        snprintf(text, CORE_TEXT_MAX,
                 "arena: layout version %u with %u-byte segments, this agent reads version %u "
                 "with %u; stop it with the agent that wrote it, or remove it from /dev/shm "
                 "to give up what is not committed", h->version, h->segment_bytes,
                 ARENA_VERSION, SEGMENT_BYTES);
        return -EINVAL;
    }
    if (memcmp(h->group, group, 16) != 0)
        return refuse(text, -EINVAL, "it belongs to another consistency group");
    if (memcmp(h->boot_id, boot_id, 16) != 0)
        return refuse(text, -EINVAL, "it is of another boot of this host; remove it from "
                                     "/dev/shm, what was not committed is gone");
    if (h->arena_bytes != bytes || h->spill_segments > UINT32_MAX / FRAME_ALIGN ||
        h->data_offset != data_offset_for(bytes, h->spill_segments) ||
        h->data_offset > bytes || h->segments != (bytes - h->data_offset) / SEGMENT_BYTES)
        return refuse(text, -EINVAL, "its header does not fit its size");
    return check_spill(h, spill_segments, text);
}

#define HUGE_BYTES (2ull << 20)
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Debian 12's headers are older than its use */
#endif

/* Where huge pages may begin, with so much room `behind` it, in which nothing is mapped;
 * MAP_FAILED and errno as from mmap(). */
static void *map_aligned(int fd, uint64_t bytes, uint64_t behind)
{
    uint64_t all = page_round_up(bytes) + behind;
    uint8_t *space = mmap(NULL, all + HUGE_BYTES, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint8_t *base, *map;
    int error;

    if (space == MAP_FAILED)
        return MAP_FAILED;
    base = space + (HUGE_BYTES - (uintptr_t)space % HUGE_BYTES) % HUGE_BYTES;
    map = mmap(base, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (map == MAP_FAILED) {
        error = errno;
        munmap(space, all + HUGE_BYTES);
        errno = error;
        return MAP_FAILED;
    }
    if (base > space)
        munmap(space, (size_t)(base - space));
    if (space + HUGE_BYTES > base)
        munmap(base + all, (size_t)(space + HUGE_BYTES - base));
    return map;
}

uint64_t arena_huge_pages(int fd, uint64_t bytes)
{
    uint8_t *base = map_aligned(fd, bytes, 0);
    uint64_t done = 0;

    if (base == MAP_FAILED)
        return 0;
    for (; done + HUGE_BYTES <= bytes; done += HUGE_BYTES)
        /* One page has to be there; a full file system says so instead of killing us. */
        if (fallocate(fd, 0, (off_t)done, PAGE) ||
            madvise(base + done, HUGE_BYTES, MADV_COLLAPSE))
            break;
    munmap(base, bytes);
    return done;
}

static int cannot_map(char *text, uint64_t bytes)
{
    int error = -errno;

    snprintf(text, CORE_TEXT_MAX, "arena: cannot map %llu bytes: %s", (unsigned long long)bytes,
             strerror(-error));
    return error;
}

/* RAM, with room for the spill file's mapping behind it. */
static int map_ram(struct arena *a, int fd, uint64_t bytes, uint64_t spill_bytes, char *text)
{
    void *base = map_aligned(fd, bytes, spill_bytes);

    if (base == MAP_FAILED)
        return cannot_map(text, bytes + spill_bytes);
    madvise(base, bytes, MADV_HUGEPAGE); /* where shmem_enabled allows it; no harm elsewhere */
    a->header = base;
    a->bytes = bytes;
    a->mapped_bytes = page_round_up(bytes) + spill_bytes;
    return 0;
}

static int map_spill(struct arena *a, int fd, char *text)
{
    uint64_t bytes = (uint64_t)a->spill_segments * SEGMENT_BYTES;
    void *base;
    int error;

    if (bytes == 0)
        return 0;
    base = mmap(arena_segment(a, a->segments), bytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd,
                SEGMENT_BYTES);
    if (base == MAP_FAILED)
        return cannot_map(text, bytes);
    madvise(base, bytes, MADV_DONTDUMP);
    a->spill = (struct mapping){.base = base, .bytes = bytes};
    error = memory_handle_sigbus();
    if (error || !mapping_watch(&a->spill))
        return refuse(text, error ? error : -ENOSPC, "its spill file cannot be watched");
    return 0;
}

static void lay_out(struct arena_header *h, uint64_t bytes, uint32_t spill_segments,
                    const uint8_t group[16], const uint8_t boot_id[16])
{
    h->version = ARENA_VERSION;
    h->segment_bytes = SEGMENT_BYTES;
    h->arena_bytes = bytes;
    h->spill_segments = spill_segments;
    h->data_offset = data_offset_for(bytes, spill_segments);
    h->segments = (uint32_t)((bytes - h->data_offset) / SEGMENT_BYTES);
    memcpy(h->group, group, 16);
    memcpy(h->boot_id, boot_id, 16);
    /* An agent that died while filling a fresh arena left no magic, but segments. */
    memset((uint8_t *)h + PAGE, 0, h->data_offset - PAGE);
}

static int attach(struct arena *a, int fd, uint64_t bytes, int spill_fd, uint64_t spill_bytes,
                  const uint8_t group[16], const uint8_t boot_id[16], bool *fresh, char *text)
{
    int error;

    a->spill_segments = (uint32_t)(spill_bytes / SEGMENT_BYTES);
    if (data_offset_for(bytes, a->spill_segments) > bytes / 2)
        return refuse(text, -EINVAL, "too small for the table of so large a spill file; give a "
                                     "larger --arena-size or a smaller --spill-size");
    error = map_ram(a, fd, bytes, spill_bytes, text);
    if (error)
        return error;
    *fresh = a->header->magic == 0;
    if (*fresh)
        lay_out(a->header, bytes, a->spill_segments, group, boot_id);
    else
        error = check_header(a->header, bytes, a->spill_segments, group, boot_id, text);
    if (error)
        return error;
    a->segments = a->header->segments;
    a->desc = (struct segment_desc *)((uint8_t *)a->header + PAGE);
    a->data = (uint8_t *)a->header + a->header->data_offset;
    error = map_spill(a, spill_fd, text);
    if (error)
        return error;
    a->free_stack = malloc(a->segments * sizeof(uint32_t));
    a->spill_free_stack = malloc((a->spill_segments + 1) * sizeof(uint32_t));
    a->next = malloc(arena_segments_all(a) * sizeof(uint32_t));
    a->previous = malloc(arena_segments_all(a) * sizeof(uint32_t));
    a->use = calloc(arena_segments_all(a), sizeof(*a->use));
    if (!a->free_stack || !a->spill_free_stack || !a->next || !a->previous || !a->use)
        return refuse(text, -ENOMEM, "no memory for the segment tables");
    for (uint32_t i = 0; i < arena_segments_all(a); i++) {
        a->next[i] = a->previous[i] = SEGMENT_NONE;
        a->use[i] = (struct segment_use){.worn_at = UINT32_MAX, .generation = 1};
    }
    return 0;
}

int arena_attach(struct arena *a, int fd, uint64_t bytes, int spill_fd, uint64_t spill_bytes,
                 const uint8_t group[16], const uint8_t boot_id[16], bool *fresh, char *text)
{
    int error;

    memset(a, 0, sizeof(*a));
    error = attach(a, fd, bytes, spill_fd, spill_bytes, group, boot_id, fresh, text);
    if (error)
        arena_detach(a);
    return error;
}

void arena_detach(struct arena *a)
{
    if (a->spill.base)
        mapping_unwatch(&a->spill);
    if (a->header)
        munmap(a->header, a->mapped_bytes);
    free(a->free_stack);
    free(a->spill_free_stack);
    free(a->next);
    free(a->previous);
    free(a->use);
    memset(a, 0, sizeof(*a));
}

void arena_collect_free(struct arena *a)
{
    a->free_count = a->spill_free_count = 0;
    /* Lowest segments on top: neighbours in the arena become one journal write. */
    for (uint32_t i = a->segments; i-- > 0;)
        if (a->desc[i].state == SEGMENT_FREE)
            a->free_stack[a->free_count++] = i;
    for (uint32_t i = arena_segments_all(a); i-- > a->segments;)
        if (a->desc[i].state == SEGMENT_FREE)
            a->spill_free_stack[a->spill_free_count++] = i;
}

uint32_t arena_segment_reserve(struct arena *a)
{
    return a->free_count > 0 ? a->free_stack[--a->free_count] : SEGMENT_NONE;
}

void arena_segment_unreserve(struct arena *a, uint32_t segment)
{
    a->free_stack[a->free_count++] = segment;
    check(a->free_count <= a->segments);
}

void arena_segment_begin(struct arena *a, uint32_t segment, uint64_t epoch,
                         enum segment_state state)
{
    a->next[segment] = a->previous[segment] = SEGMENT_NONE;
    a->use[segment] = (struct segment_use){.worn_at = UINT32_MAX,
                                           .generation = a->use[segment].generation + 1};
    a->desc[segment].epoch = epoch;
    a->desc[segment].tail = 0;
    __atomic_store_n(&a->desc[segment].state, state, __ATOMIC_RELEASE);
}

uint32_t arena_segment_take(struct arena *a, uint64_t epoch, enum segment_state state)
{
    uint32_t segment = arena_segment_reserve(a);

    if (segment != SEGMENT_NONE)
        arena_segment_begin(a, segment, epoch, state);
    return segment;
}

uint32_t arena_spill_take(struct arena *a)
{
    uint32_t segment;

    if (a->spill_free_count == 0)
        return SEGMENT_NONE;
    segment = a->spill_free_stack[--a->spill_free_count];
    a->next[segment] = a->previous[segment] = SEGMENT_NONE;
    a->use[segment] = (struct segment_use){.worn_at = UINT32_MAX,
                                           .generation = a->use[segment].generation + 1};
    return segment;
}

void arena_spill_publish(struct arena *a, uint32_t segment, uint64_t epoch, uint32_t tail)
{
    a->desc[segment].epoch = epoch;
    a->desc[segment].tail = tail;
    __atomic_store_n(&a->desc[segment].state, SEGMENT_PACKED, __ATOMIC_RELEASE);
}

void arena_spill_give_back(struct arena *a, uint32_t segment)
{
    check(segment >= a->segments && segment < arena_segments_all(a));
    a->spill_free_stack[a->spill_free_count++] = segment;
    check(a->spill_free_count <= a->spill_segments);
}

void arena_segment_free(struct arena *a, uint32_t segment)
{
    check(segment < arena_segments_all(a) && a->desc[segment].state != SEGMENT_FREE);
    __atomic_store_n(&a->desc[segment].state, SEGMENT_FREE, __ATOMIC_RELEASE);
    if (segment >= a->segments) {
        arena_spill_give_back(a, segment);
        return;
    }
    arena_segment_unreserve(a, segment);
}

bool frame_plausible(const struct frame_header *h, uint32_t room)
{
    uint32_t sectors = (uint32_t)__builtin_popcount(h->mask);

    if (room < sizeof(*h) || h->payload_bytes > CLUSTER_BYTES ||
        frame_bytes(h->payload_bytes) > room)
        return false;
    if (h->mask == 0 || h->block >> 48 || h->disk >= CORE_DISKS_MAX || h->blocks == 0 ||
        h->blocks > (1u << 31))
        return false;
    switch (h->kind) {
    case FRAME_RAW:
        return h->blocks == 1 && h->payload_bytes == sectors * SECTOR_BYTES;
    case FRAME_ZSTD:
        return h->blocks == 1 && h->payload_bytes > 0 && h->payload_bytes < sectors * SECTOR_BYTES;
    case FRAME_CLUSTER:
        return h->mask == MASK_FULL && h->blocks > 1 && h->blocks <= CLUSTER_BLOCKS &&
               h->payload_bytes > h->blocks * sizeof(uint64_t) &&
               h->payload_bytes < h->blocks * BLOCK_BYTES;
    case FRAME_ZERO:
        return h->payload_bytes == 0 && (h->blocks == 1 || h->mask == MASK_FULL);
    default:
        return false;
    }
}

struct frame_header *frame_next(uint8_t *from, uint32_t tail, uint32_t *offset)
{
    struct frame_header *h;

    if (*offset >= tail || tail > SEGMENT_BYTES)
        return NULL;
    h = (struct frame_header *)(from + *offset);
    if (!frame_plausible(h, tail - *offset))
        return NULL;
    *offset += frame_bytes(h->payload_bytes);
    return h;
}
