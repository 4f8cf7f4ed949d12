/* core.h - everything that Python sees of the C core.
 *
 * Threads: the functions below are called by one Python thread (asyncio's). They hand
 * commands to the reactor thread through a locked queue; the write path never touches it.
 * A command that takes a `token` is asynchronous: it is answered by exactly one
 * CORE_EVENT_DONE that carries the token. Queries block for the microseconds that the
 * reactor needs to answer.
 *
 * Errors: 0 or a positive value is success, a negative errno is failure; where a `text`
 * buffer (CORE_TEXT_MAX bytes) is taken it then holds one English sentence. core_open() gives
 * -ENOKEY when frames name a dictionary that is not in the configuration.
 *
 * File descriptors: kick, call and err descriptors become the core's, also on failure. All
 * others stay the caller's; images, the journal and the spill file must stay open until
 * core_close().
 *
 * Not done here: parsing of any message. Lengths and counts passed in must be honest;
 * guest addresses, ring sizes and everything in guest memory need not be.
 *
 * The part between the two cdef marks is read by cffi (native/build_ffi.py) as it is.
 */
#ifndef EPOCHD_CORE_H
#define EPOCHD_CORE_H

#include <stdint.h>

/* cdef-begin */
#define CORE_DISKS_MAX 32       /* disks of a consistency group */
#define CORE_QUEUES_MAX 16      /* virtqueues a disk */
#define CORE_REACTORS_MAX 8     /* threads that serve the disks */
#define CORE_QUEUE_SIZE_MAX 1024 /* entries a virtqueue; a power of two */
#define CORE_REGIONS_MAX 256    /* guest memory regions a front end */
#define CORE_EPOCHS_MAX 1024    /* epochs alive at once: open + sealed + committed */
#define CORE_SEG_MAX 126        /* data segments a request: virtio_blk_config.seg_max */
#define CORE_REQUEST_BYTES_MAX 67108864 /* data of a read or write; writes: half the arena too */
#define CORE_DISCARD_SECTORS_MAX 4194304 /* sectors a DISCARD or WRITE_ZEROES: 2 GiB */
#define CORE_ARENA_BYTES_MIN 8388608
#define CORE_INDEX_BYTES_MIN 2097152 /* a reactor: the largest write has room */
#define CORE_INDEX_SHARE 4      /* by default: one part in so many of the arena's bytes */
#define CORE_TEXT_MAX 256
#define CORE_ERROR_MAX 1040     /* four sentences */
#define CORE_NAME_MAX 32        /* disk name, NUL included */
#define CORE_SERIAL_BYTES 20    /* VIRTIO_BLK_T_GET_ID */
#define CORE_DICTIONARIES_MAX 16 /* of a group, at once */
#define CORE_DICTIONARY_BYTES_MAX 1048576

typedef struct core core;

typedef struct {
    int fd;                       /* the image; O_RDWR, or O_RDONLY when read_only */
    int direct;                   /* fd was opened with O_DIRECT */
    int read_only;
    int block_device;
    uint64_t size_bytes;          /* multiple of 512 */
    uint64_t identity;            /* st_ino of a file, 0 for a block device */
    uint32_t logical_block_bytes; /* 512 or 4096: granularity of offsets and lengths */
    uint32_t memory_align;        /* alignment of buffers that `direct` needs, in bytes */
    char name[CORE_NAME_MAX];
    char serial[CORE_SERIAL_BYTES]; /* NUL-padded, need not be terminated */
} core_disk_config;

typedef struct {
    const void *data;             /* a zstd dictionary; copied */
    uint64_t bytes;
    uint32_t id;                  /* zstd's, which is in it */
} core_dictionary;

typedef struct {
    uint32_t disks;
    uint32_t workers;             /* helper threads; 0 is taken as 1 */
    uint32_t reactors;            /* threads that serve the disks, disk d is the (d % reactors)th's;
                                     0 is taken as 1 */
    int journal_fd;               /* O_RDWR */
    int journal_direct;           /* journal_fd was opened with O_DIRECT */
    int journal_fua;              /* its device makes single writes durable, without a flush */
    int arena_fd;                 /* POSIX shared memory of arena_bytes */
    int compress_level;           /* zstd level 1..19; 0: no compression */
    uint64_t arena_bytes;
    int spill_fd;                 /* O_RDWR; where epochs go on when the arena is full */
    int spill_closed;             /* only for what it holds already: it takes nothing more */
    uint64_t spill_bytes;         /* of segments in it; 0: there is no spill file */
    uint64_t index_bytes;         /* limit of the block index's memory; 0: by arena_bytes */
    uint64_t apply_rate;          /* bytes a second into the images; 0: no limit */
    uint32_t spin_us;             /* polling after the last work, before sleeping */
    uint8_t boot_id[16];          /* the kernel's: an arena of another boot is refused */
    uint32_t dictionaries;
    core_dictionary dictionary[CORE_DICTIONARIES_MAX]; /* the last one compresses */
    core_disk_config disk[CORE_DISKS_MAX];
} core_config;

typedef struct {
    int formatted;                /* 0: the file is empty, core_journal_format() is due */
    uint8_t group[16];            /* identity of the consistency group (a UUID) */
    uint64_t size_bytes;
    uint64_t used_bytes;          /* committed records that are not applied yet */
} core_journal_info;

typedef struct {
    uint64_t spill_bytes;         /* what the arena was laid out for; 0: no spill file */
    uint64_t spill_used;          /* bytes of it that its epochs may lie in */
    int fresh;                    /* it holds no arena yet */
} core_arena_info;

enum core_mode { CORE_STANDBY = 0, CORE_ACTIVE = 1 };
enum core_epoch_state {
    CORE_EPOCH_OPEN = 1, CORE_EPOCH_SEALED = 2, CORE_EPOCH_COMMITTING = 3,
    CORE_EPOCH_COMMITTED = 4
};

typedef struct {
    uint32_t mode;                /* enum core_mode */
    uint32_t clients;             /* disks with a front end's memory attached */
    uint64_t generation;          /* incremented by each promote */
    uint64_t open;                /* id of the open epoch */
    uint64_t sealed_first;        /* sealed ids are sealed_first..sealed_last; 0, 0: none */
    uint64_t sealed_last;
    uint64_t committed;           /* newest epoch that is durable; 0: none yet */
    uint64_t applied;             /* newest epoch that is wholly in the images */
    uint64_t arena_size, arena_used;     /* bytes, counted in whole segments */
    uint64_t spill_size, spill_used;     /* the same, in the spill file; 0, 0: none */
    uint32_t spill_fault;         /* errno: why it takes nothing more until a restart; 0 */
    uint64_t journal_size, journal_used; /* bytes */
    uint64_t index_size;          /* limit of the block index's private memory */
    uint64_t index_used;          /* of it, with what it may need at once to grow */
    uint64_t index_bytes;         /* private memory of the block index */
    uint64_t logical_bytes;       /* guest bytes that the arena's frames stand for */
    uint64_t stored_bytes;        /* bytes of frames in the arena */
    uint64_t held_requests;       /* writes waiting for room in arena or index */
    uint32_t pressure;            /* arena use in percent */
    uint32_t reactors;            /* threads that serve the disks */
    uint32_t direct_journal;      /* 1: O_DIRECT */
    uint64_t commits, applies, discards, seals;        /* since start */
    uint64_t compressed_frames, incompressible_frames, zero_frames, dropped_frames;
    uint64_t compress_ns;         /* processor time of the packer */
    uint64_t pack_bytes_in, pack_bytes_out; /* guest bytes it took, what became of them */
    uint64_t clusters;            /* frames of neighbouring blocks written */
    uint64_t wanted_bytes, expanded_bytes;  /* guest reads of compressed blocks: bytes asked
                                              for, bytes that zstd made for it */
    uint64_t cluster_hits, cluster_misses; /* of those reads: expanded already, or not */
    uint32_t pack_queue;          /* segments that wait for the packer */
    int32_t pack_level;           /* zstd level that it used last */
    uint64_t merges, merged_blocks; /* jobs that brought neighbours together; blocks of them */
    uint64_t merge_bytes_in, merge_bytes_out; /* of frames: what these blocks took, and take */
    uint32_t merge_queue;         /* segments of the sweep under way that wait for it */
    uint32_t dictionary;          /* id of the one that compresses; 0: none */
    uint32_t dictionary_bytes;
    uint32_t dictionaries;        /* loaded: that one, and older ones for what names them */
    uint64_t dictionary_frames;   /* blocks compressed with one */
    uint64_t commit_ns_last, seal_ns_last, apply_ns_last;
    uint64_t journal_bytes_written, image_bytes_written, spill_bytes_written;
    char error[CORE_ERROR_MAX];   /* what stands: commits, superblock, images, spill; "": nothing */
} core_status;

typedef struct {
    uint64_t id;
    uint32_t state;               /* enum core_epoch_state */
    uint32_t segments;
    uint64_t blocks;              /* distinct 4 KiB blocks */
    uint64_t logical_bytes, stored_bytes, index_bytes;
} core_epoch_info;

typedef struct {
    uint32_t size, configured, enabled, running, broken;
    uint64_t requests, kicks, calls;
    uint32_t inflight;
    char reason[CORE_TEXT_MAX];   /* why the ring is broken */
} core_queue_info;

typedef struct {
    uint64_t size_bytes;
    uint64_t reads, writes, flushes, discards, write_zeroes, get_ids;
    uint64_t read_bytes, write_bytes;
    uint64_t errors;              /* requests answered with IOERR */
    uint64_t unsupported;         /* requests answered with UNSUPP */
    uint64_t rejected;            /* requests that ask for what cannot be, and broken rings */
    uint64_t broken;              /* rings that broke: part of rejected */
    uint64_t held;                /* writes that had to wait for the arena */
    core_queue_info queue[CORE_QUEUES_MAX];
} core_disk_info;

enum core_event_type {
    CORE_EVENT_DONE = 1,      /* token, result, value, first, last, text when result < 0 */
    CORE_EVENT_SEALED,        /* value: epoch */
    CORE_EVENT_COMMITTED,     /* value: newest epoch committed */
    CORE_EVENT_APPLIED,       /* value: newest epoch applied */
    CORE_EVENT_DISCARDED,     /* first..last: epochs dropped, value: newest committed */
    CORE_EVENT_PRESSURE,      /* value: use in percent of arena or index, whichever is
                                 more; first: 1 when writes are held */
    CORE_EVENT_SPILL,         /* value: bytes in the spill file, first: 1 when it begins to be
                                 used, 0 when it is empty again */
    CORE_EVENT_IO_ERROR,      /* result: -errno, text: what failed, disk or CORE_NO_DISK */
    CORE_EVENT_RING_BROKEN,   /* disk, value: queue, text */
    CORE_EVENT_MEMORY_LOST,   /* disk: guest memory vanished (SIGBUS); drop the front end */
    CORE_EVENT_LOG,           /* value: Python logging level, text */
    CORE_EVENT_REJECTED       /* disk, value: queue, text; first: so many before it of the disk
                                 that no event told of */
};
#define CORE_NO_DISK 4294967295

typedef struct {
    uint32_t type;                /* enum core_event_type */
    uint32_t disk;
    uint64_t token;
    int64_t result;
    uint64_t value, first, last;
    char text[CORE_TEXT_MAX];
} core_event;

typedef struct {
    uint64_t guest_addr, size, user_addr, mmap_offset;
    int fd;
} core_region;

/* Journal and life cycle. core_open() recovers: journal, arena, index. The reactor runs
 * from core_start() to the DONE of core_stop(), which first brings all committed epochs
 * into the images (in active mode it commits everything before). core_close() after that
 * frees everything; without core_stop() it is a crash, and leaves memory that a disk which
 * does not answer may still write to. core_arena_idle() after stop: 1 when
 * the arena holds no guest data, so its shared memory may be unlinked. */
int core_journal_inspect(int fd, core_journal_info *out, char *text);
int core_journal_format(const core_config *config, const uint8_t *group, char *text);
uint64_t core_journal_bytes_min(uint64_t arena_and_spill_bytes);
uint64_t core_arena_huge_pages(int fd, uint64_t bytes); /* of a new arena; see arena.h */
/* Writes zeroes to a part of a new journal (whole pages), so that its blocks are written once:
 * the first write to a block that is only allocated costs a flush of the file system's own
 * journal. Negative errno. */
int core_journal_zero(int fd, uint64_t offset, uint64_t bytes);
/* What an arena's shared memory says of its spill file; sizes as in core_config. */
int core_arena_inspect(int fd, core_arena_info *out, char *text);
/* Least size of the file for so many bytes of segments. */
uint64_t core_spill_file_bytes(uint64_t spill_bytes);
int core_open(const core_config *config, core **out, char *text);
/* After core_open(): bit n is set when frames that were found name config->dictionary[n]. */
uint32_t core_dictionaries_named(core *c);
/* At any time: one more, for compression from now on. It must be where the next start finds it
 * before it is added. */
int core_dictionary_add(core *c, const core_dictionary *dictionary, char *text);
int core_start(core *c, char *text);
/* Live view, before core_start(): core_metrics_bytes() bytes of shared memory, all zero, that
 * hold a metrics_page (format.h) until core_close(). fd stays the caller's. */
uint64_t core_metrics_bytes(void);
uint64_t core_metrics_bucket_low(uint32_t bucket); /* smallest ns that it counts */
int core_metrics(core *c, int fd, const char *name, const char *control, char *text);
void core_stop(core *c, uint64_t token);
int core_arena_idle(core *c);
void core_close(core *c);

/* Events: core_event_fd() is an eventfd that polls readable while events wait. Read it (8
 * bytes), then call core_next_event() until it returns 0. */
int core_event_fd(core *c);
int core_next_event(core *c, core_event *out);

/* Control verbs. DONE: seal: value = sealed epoch; commit: value = newest committed;
 * discard: first..last dropped (0, 0: none), value = committed; promote: value = generation. */
void core_epoch_seal(core *c, uint64_t token);
void core_epoch_commit(core *c, uint64_t token, uint64_t epoch, int newest);
void core_epoch_discard(core *c, uint64_t token);
void core_promote(core *c, uint64_t token);

/* Queries. core_query_epochs() returns how many it wrote, oldest first. */
int core_query_status(core *c, core_status *out);
int core_query_epochs(core *c, core_epoch_info *out, uint32_t max);
int core_query_disk(core *c, uint32_t disk, core_disk_info *out);

/* vhost-user, one front end a disk. core_vhost_memory() replaces the whole table; the
 * mapping happens in the caller, errors of it are returned at once and then no DONE comes.
 * So do _log and _inflight. queue_size of _inflight is the region's, not the ring's. */
int core_vhost_memory(core *c, uint64_t token, uint32_t disk, const core_region *regions,
                      uint32_t count, char *text);
int core_vhost_log(core *c, uint64_t token, uint32_t disk, int fd, uint64_t size,
                   uint64_t offset, char *text);
uint64_t core_inflight_bytes(uint32_t queues, uint32_t queue_size);
int core_vhost_inflight(core *c, uint64_t token, uint32_t disk, int fd, uint64_t size,
                        uint64_t offset, uint32_t queues, uint32_t queue_size, char *text);
void core_vhost_features(core *c, uint64_t token, uint32_t disk, uint64_t features);
void core_vring_size(core *c, uint64_t token, uint32_t disk, uint32_t queue, uint32_t size);
void core_vring_addr(core *c, uint64_t token, uint32_t disk, uint32_t queue, uint32_t flags,
                     uint64_t desc, uint64_t avail, uint64_t used, uint64_t log);
void core_vring_base(core *c, uint64_t token, uint32_t disk, uint32_t queue, uint32_t base);
/* Eventfds only, else -EINVAL at once as above; fd -1: none. */
int core_vring_kick(core *c, uint64_t token, uint32_t disk, uint32_t queue, int fd,
                    char *text);
int core_vring_call(core *c, uint64_t token, uint32_t disk, uint32_t queue, int fd,
                    char *text);
int core_vring_err(core *c, uint64_t token, uint32_t disk, uint32_t queue, int fd,
                   char *text);
void core_vring_enable(core *c, uint64_t token, uint32_t disk, uint32_t queue, int on);
/* Drains the ring and stops it. DONE: value = next available index (GET_VRING_BASE). */
void core_vring_stop(core *c, uint64_t token, uint32_t disk, uint32_t queue);
/* The front end is gone, or RESET: stops all rings without publishing what is unfinished,
 * unmaps memory, log and in-flight region, closes descriptors. */
void core_vhost_reset(core *c, uint64_t token, uint32_t disk);
/* cdef-end */

#endif
