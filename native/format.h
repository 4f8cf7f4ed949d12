/* format.h - every byte that outlives a function call.
 *
 * What lies in the arena (POSIX shared memory, survives the agent), in the journal (survives
 * the host) and in both: frames; and the live view, which others read while the agent runs.
 * Little-endian, as virtio 1 and x86-64/AArch64 are; a big-endian host is refused at compile
 * time. A field that changes meaning changes the version beside its magic; readers refuse other
 * versions. Of dictionary files only Python knows:
 * agent/dictionary.py.
 */
#ifndef EPOCHD_FORMAT_H
#define EPOCHD_FORMAT_H

#include <stddef.h>
#include <stdint.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the formats are little-endian");

#define SECTOR_BYTES 512u
#define BLOCK_BYTES 4096u
#define BLOCK_SECTORS 8u
#define MASK_FULL 0xffu            /* all eight sectors of a block */
#define PAGE 4096u

/* Bytes of the sectors that a mask names. */
static inline uint32_t mask_bytes(uint8_t mask)
{
    return mask == MASK_FULL ? BLOCK_BYTES : (uint32_t)__builtin_popcount(mask) * SECTOR_BYTES;
}

/* ---- Frames: the unit in the arena, in the journal and on a wire ---------------------- */

enum frame_kind {
    FRAME_RAW = 1,   /* payload: the sectors named by mask, in order, 512 bytes each */
    FRAME_ZSTD = 2,  /* payload: one zstd frame that expands to the same; it names its dictionary,
                        if it has one (RFC 8878, 3.1.1.1.3) */
    FRAME_ZERO = 3,  /* no payload: `blocks` blocks (or the masked sectors of one) are zero */
    FRAME_CLUSTER = 4, /* payload: the seq of each of `blocks` neighbouring whole blocks, then
                          one zstd frame that expands to them */
};

#define FRAME_UNMAP 1u             /* ZERO only: the image may give the space back */
#define FRAME_ALIGN 32u            /* frames start at multiples of this in a segment */

/* One frame header; the payload follows it, then padding up to FRAME_ALIGN. */
struct frame_header {
    uint32_t crc;           /* CRC32C of the rest of the header and the payload; 0 in the
                               arena until a helper thread has computed it */
    uint32_t payload_bytes; /* stored bytes after the header */
    uint64_t seq;           /* write order in the group: the newest frame of a sector wins,
                               whatever the order in which segments are read */
    uint64_t block;         /* first 4 KiB block, 48 bits used */
    uint32_t blocks;        /* 1; ZERO may cover more, CLUSTER does, then mask is MASK_FULL */
    uint8_t disk;           /* index in the group's disk table */
    uint8_t kind;           /* enum frame_kind */
    uint8_t mask;           /* sectors of the block that this frame carries */
    uint8_t flags;
};
_Static_assert(sizeof(struct frame_header) == 32, "frames are found by adding sizes");
_Static_assert(offsetof(struct frame_header, seq) == 8, "no padding");
_Static_assert(sizeof(struct frame_header) % FRAME_ALIGN == 0, "a zero frame fills its slot");

#define FRAME_BYTES_MAX (sizeof(struct frame_header) + BLOCK_BYTES) /* of one block */

/* A cluster's members are read one by one, at the price of expanding all of it: 32 KiB. More
 * of them would compress little better (a few percent at 16). */
#define CLUSTER_BLOCKS 8u
#define CLUSTER_BYTES (CLUSTER_BLOCKS * BLOCK_BYTES)

/* The seqs of a cluster's blocks, `blocks` of them. Its own seq is the highest. 0: the block is
 * not there (a hole; its bytes are zero, which costs zstd next to nothing): random writes leave
 * few neighbours without gaps. */
static inline const uint64_t *cluster_seq(const struct frame_header *h)
{
    return (const uint64_t *)(h + 1);
}

/* Those that are there, a bit each. */
static inline uint8_t cluster_members(const struct frame_header *h)
{
    uint8_t bits = 0;

    for (uint32_t i = 0; i < h->blocks; i++)
        bits |= (uint8_t)((cluster_seq(h)[i] != 0) << i);
    return bits;
}

static inline uint32_t frame_bytes(uint32_t payload_bytes)
{
    return (uint32_t)((sizeof(struct frame_header) + payload_bytes + FRAME_ALIGN - 1) &
                      ~(FRAME_ALIGN - 1));
}

/* ---- Arena: one POSIX shared-memory object ------------------------------------------- */

#define ARENA_MAGIC 0x414e455241435045ull /* "EPCARENA" */
#define ARENA_VERSION 5u           /* 2: clusters; 3: spill file; 4: dictionaries, condensed;
                                      5: holes */
#ifndef SEGMENT_BYTES               /* the simulator has smaller ones, see tests/sim */
#define SEGMENT_BYTES 262144u      /* one journal write; small, so that a small epoch that
                                      takes a whole segment wastes little */
#endif

#define ARENA_DISCARDED_MAX 128u

/* Page 0. What comes before `base` never changes while the arena lives. */
struct arena_header {
    uint64_t magic;
    uint32_t version;
    uint32_t segment_bytes;
    uint64_t arena_bytes;
    uint32_t segments;
    uint32_t data_offset;   /* of segment 0; a multiple of PAGE */
    uint8_t group[16];      /* the journal's group: frames name disks by index in it */
    uint8_t boot_id[16];    /* another boot's arena cannot be continued */
    /* Epoch ids. `base` is the first epoch that no discard has dropped: ids base..open-1
     * are sealed or committed, everything below base that is not committed is gone. A
     * discard stores base, then open; base > open therefore says "discard to base". */
    uint64_t base;
    uint64_t open;
    uint64_t committed;     /* newest acknowledged commit: the journal must agree */
    uint64_t discarded_next; /* slot of the next entry below, modulo its length */
    struct {                /* the latest discards, to tell "dropped" from "committed" */
        uint64_t first, last;
    } discarded[ARENA_DISCARDED_MAX];
    uint64_t applied;       /* newest epoch whose segments were given back, its head being
                               durable: a superblock that says less is not the newest */
    uint32_t spill_segments; /* numbered on behind `segments`; 0: no spill file. Set with the
                               magic, as what comes before `base`: the table has their
                               entries, so data_offset depends on it */
    uint32_t zero;
    uint8_t spill_id[16];   /* of the file that they lie in; another one is refused. Anew
                               whenever a start finds none of them in use */
    uint64_t condensed;     /* newest epoch whose record has less than the arena: that is no
                               damage. 0: none has */
    uint8_t reserved[PAGE - 136 - 16 * ARENA_DISCARDED_MAX];
};
_Static_assert(offsetof(struct arena_header, reserved) == 136 + 16 * ARENA_DISCARDED_MAX,
               "no padding");
_Static_assert(sizeof(struct arena_header) == PAGE, "the header is page 0");
_Static_assert(offsetof(struct arena_header, spill_id) == 112 + 16 * ARENA_DISCARDED_MAX,
               "no padding");
_Static_assert(offsetof(struct arena_header, base) == 64, "no padding");

enum segment_state {
    SEGMENT_FREE = 0,
    SEGMENT_RAW = 1,     /* filled by the reactor */
    SEGMENT_PACKED = 2,  /* filled by a helper from a RAW one */
};

/* The table of these follows page 0; one a segment, then one a segment of the spill file. */
struct segment_desc {
    uint64_t epoch;
    uint32_t state;         /* enum segment_state; stored last with release order */
    uint32_t tail;          /* bytes of whole frames; stored after the frame, release order:
                               what is behind it does not exist */
};
_Static_assert(sizeof(struct segment_desc) == 16, "the table is an array");

/* ---- Spill file: segments of the arena for which RAM was too small ----------------------- */

#define SPILL_MAGIC 0x4c4c495053435045ull /* "EPCSPILL" */
#define SPILL_VERSION 1u

/* The first page. The rest of the first SEGMENT_BYTES is unused, so that every segment lies
 * at a multiple of its size. What the segments hold is told by the arena's table alone:
 * without the arena (another boot) the file means nothing. Every frame in it has its crc. */
struct spill_header {
    uint64_t magic;
    uint32_t version;
    uint32_t segment_bytes;
    uint32_t segments;
    uint32_t zero;
    uint8_t group[16];
    uint8_t id[16];         /* arena_header.spill_id */
    uint8_t reserved[PAGE - 56];
};
_Static_assert(sizeof(struct spill_header) == PAGE, "one direct write");
_Static_assert(offsetof(struct spill_header, reserved) == 56, "no padding");

/* ---- Journal: one file, a ring of records --------------------------------------------- */

#define JOURNAL_MAGIC 0x314c4e524a435045ull /* "EPCJRNL1" */
#define RECORD_MAGIC 0x3144524352435045ull  /* "EPCRCRD1" */
#define JOURNAL_VERSION 4u           /* 2: clusters; 3: dictionaries; 4: holes in clusters */
#define JOURNAL_LOG_OFFSET 1048576u  /* first byte of the ring */
#define JOURNAL_SUPER_SLOTS 3u       /* written in turn: the last one may be torn, or only in a
                                        cache since a failed flush; the one before it is whole */
#define JOURNAL_SUPER_STRIDE 65536u  /* far apart: no device tears both with one write */
#define JOURNAL_DISKS_MAX 32u

/* Who a frame's `disk` is. */
struct journal_disk {
    uint64_t size_bytes;    /* of the image when last opened; it may grow, never shrink */
    uint64_t identity;      /* inode number of a file: another image is refused */
    char name[32];
    uint8_t reserved[16];
};
_Static_assert(sizeof(struct journal_disk) == 64, "array in the superblock");

/* The superblock, PAGE bytes, in slot super_seq % JOURNAL_SUPER_SLOTS. */
struct journal_super {
    uint64_t magic;
    uint32_t crc;           /* CRC32C of the page with this field 0 */
    uint32_t version;
    uint64_t super_seq;     /* the valid slot with the highest one counts */
    uint8_t group[16];
    uint64_t file_bytes;
    uint64_t head_lsn;      /* first record that the images may lack */
    uint64_t applied;       /* newest epoch that is wholly in the images */
    uint64_t epoch_limit;   /* ids below it may have been used: a start without the arena
                               goes on here, so that no id is used twice */
    uint64_t generation;
    uint32_t mode;          /* enum core_mode */
    uint32_t disks;
    uint32_t clean;         /* 1: written by a stop with nothing behind the head, so what
                               lies in the ring needs no search for damage */
    uint8_t reserved[PAGE - 92 - 64 * JOURNAL_DISKS_MAX];
    struct journal_disk disk[JOURNAL_DISKS_MAX];
};
_Static_assert(sizeof(struct journal_super) == PAGE, "one atomic-enough write");
_Static_assert(offsetof(struct journal_super, reserved) == 92, "no padding");

/* A commit record: this header and its table (padded to PAGE), then the segments' frames,
 * each segment padded to PAGE. The record is the only commit point: it counts when the
 * header's crc, every segment's crc and its position (lsn) are right. A position is a byte
 * count that never wraps; the place in the file is lsn modulo the ring's size. */
struct record_header {
    uint64_t magic;
    uint32_t crc;           /* CRC32C of header and table with this field 0 */
    uint32_t version;
    uint8_t group[16];
    uint64_t lsn;
    uint64_t epoch_first;   /* the record commits epoch_first..epoch_last, all or none */
    uint64_t epoch_last;
    uint64_t record_bytes;  /* header, table and data with all padding */
    uint64_t epoch_limit;   /* as in the superblock; the higher one counts */
    uint32_t segments;
    uint32_t header_bytes;  /* header and table, padded to PAGE */
};
_Static_assert(sizeof(struct record_header) == 80, "no padding");

struct record_segment {
    uint64_t epoch;
    uint32_t bytes;         /* of frames, without padding */
    uint32_t crc;           /* CRC32C over the frame headers in order. A frame header holds
                               its payload's CRC, so this covers every byte that counts. */
};
_Static_assert(sizeof(struct record_segment) == 16, "array after the record header");

static inline uint64_t page_round_up(uint64_t bytes)
{
    return (bytes + PAGE - 1) & ~(uint64_t)(PAGE - 1);
}

static inline uint32_t record_header_bytes(uint32_t segments)
{
    return (uint32_t)page_round_up(sizeof(struct record_header) +
                                   (uint64_t)segments * sizeof(struct record_segment));
}

/* ---- Live view: one POSIX shared-memory object -------------------------------------------- */

/* What the agent is doing, for whoever may read the object (`epochctl top`): written by the
 * reactor, never read by it, so nothing that happens to it can harm the agent. It lives from
 * start to clean stop; a new start makes a new one. Times are CLOCK_MONOTONIC, in ns; counts
 * are since the agent's start. Python reads these structs through cffi (build_ffi.py). */
/* cdef-begin */
#define METRICS_MAGIC 0x31434952544d5045 /* "EPMTRIC1" */
#define METRICS_VERSION 3
#define METRICS_SUB_BITS 4     /* buckets: 2^4 a power of two, so a value is known to 1/16 */
#define METRICS_BUCKETS 592    /* values below 2^40 ns (18 minutes); longer ones in the last */
#define METRICS_TRACES 4096
#define METRICS_TRACE_EVERY 61 /* requests; a prime, so that no place in a batch is favoured */
#define METRICS_DISKS 32
#define METRICS_QUEUES 16
#define METRICS_PATH 112

enum metrics_stage {
    METRICS_WRITE,             /* its round's begin -> copied and shown as used */
    METRICS_READ_HIT,          /* the same of a read that the epochs could serve alone */
    METRICS_ZERO,              /* the same of discards and write-zeroes */
    METRICS_READ_MISS,         /* the same until the image has answered */
    METRICS_FLUSH,             /* the same until durable, where the guest waits for that */
    METRICS_REQUEST_WAIT,      /* traced requests that are answered at once: fetched -> begun */
    METRICS_REQUEST_COPY,      /* ... -> data copied */
    METRICS_REQUEST_PUBLISH,   /* ... -> the driver sees it as used */
    METRICS_SEAL,              /* asked -> sealed */
    METRICS_COMMIT_PREPARE,    /* begun -> laid out, and room in the journal */
    METRICS_COMMIT_WRITE,      /* ... -> all writes of the record completed */
    METRICS_COMMIT_FLUSH,      /* ... -> flushed */
    METRICS_COMMIT,            /* begun -> durable */
    METRICS_APPLY_WRITE,       /* begun -> all writes to the images completed */
    METRICS_APPLY_FLUSH,       /* ... -> flushed */
    METRICS_APPLY,             /* begun -> journal's head moved, arena freed */
    METRICS_STAGES
};

/* Bucket i < 16 counts the value i; of the others, 16 share each power of two. Every word
 * only grows, and is written whole: readers need no lock. */
struct metrics_histogram {
    uint64_t bucket[METRICS_BUCKETS];
};

/* One request. `number` is stored last: 0 while the rest changes; each reactor counts up. */
struct metrics_trace {
    uint64_t number;
    uint64_t fetched_ns;       /* begin of its round; the next three are what passed since */
    uint32_t begun_ns;         /* those before it in the batch are copied */
    uint32_t copied_ns;        /* a read that missed: its reads of the image have begun */
    uint32_t published_ns;
    uint32_t bytes;            /* of its buffers, header and status included */
    uint64_t sector;
    uint8_t disk;
    uint8_t queue;
    uint8_t type;              /* VIRTIO_BLK_T_... */
    uint8_t status;            /* VIRTIO_BLK_S_... */
    uint32_t waited;           /* 1: for the image, or for a flush */
};

struct metrics_queue {
    uint64_t requests, kicks, calls;
    uint32_t size;
    uint32_t inflight;         /* taken and not answered: reads of the image, flushes */
    uint32_t running, held;    /* held: the next write waits for room in the arena */
};

struct metrics_disk {
    char name[32];
    uint64_t reads, writes, flushes, discards, write_zeroes;
    uint64_t read_bytes, write_bytes;
    uint64_t errors, unsupported, rejected, held;
    uint64_t connected;
    struct metrics_queue queue[METRICS_QUEUES]; /* zeroes when it is not running */
};

/* One consistent picture: `version` is odd while it is being written. Made anew every few
 * milliseconds, and before the reactor sleeps. */
struct metrics_state {
    uint64_t version;
    uint64_t updated_ns;
    uint64_t busy_ns;          /* spent in rounds of a reactor that did something */
    uint64_t asleep_ns;        /* spent asleep; the rest is polling */
    uint64_t batches;          /* rounds that answered requests at once; how many those were
                                  is in the histograms */
    uint64_t mode, generation, open, committed, applied, epochs;
    uint64_t arena_bytes, arena_used, arena_percent;
    uint64_t index_size, index_used; /* limit of its memory; of it, with what it needs to grow */
    uint64_t journal_bytes, journal_used;
    uint64_t logical_bytes, stored_bytes, index_bytes; /* of the epochs alive */
    uint64_t seals, commits, applies, discards;
    uint64_t compressed_frames, incompressible_frames, zero_frames, dropped_frames;
    uint64_t compress_ns, journal_written, image_written;
    uint64_t disks;
    char error[256];
    struct metrics_disk disk[METRICS_DISKS];
};

struct metrics_page {
    uint64_t magic;            /* stored last, when all before `sleeping` is right */
    uint32_t version;
    uint32_t pid;
    uint64_t page_bytes;
    uint64_t started_ns;
    uint8_t group[16];
    char name[32];             /* the group's */
    char control[METRICS_PATH]; /* path of the control socket */
    uint64_t sleeping;         /* 1: all reactors wait for an event, so nothing changes */
    uint64_t traced;           /* traces in trace[], or that were; each reactor has its share */
    uint64_t reactors;         /* that the picture's times add up */
    uint8_t reserved[296];     /* what changes with requests begins at a line of its own */
    struct metrics_state state;
    struct metrics_histogram stage[METRICS_STAGES];
    struct metrics_trace trace[METRICS_TRACES];
};
/* cdef-end */
_Static_assert(sizeof(struct metrics_trace) == 48, "no padding");
_Static_assert(sizeof(struct metrics_queue) == 40, "no padding");
_Static_assert(sizeof(struct metrics_disk) == 128 + METRICS_QUEUES * 40, "no padding");
_Static_assert(offsetof(struct metrics_page, state) == 512, "no padding");
_Static_assert(sizeof(struct metrics_histogram) == METRICS_BUCKETS * 8, "words only");

#endif
