/* disk_uring.h - the seam over io_uring, which is also the one place where the reactor
 * sleeps.
 *
 * Owner: the thread that opened it; one thread for all calls (the ring is set up with
 * SINGLE_ISSUER where the kernel has it). Files and the arena are registered; where memory
 * may not be locked the arena is not, which costs page pinning on each journal write.
 */
#ifndef EPOCHD_DISK_URING_H
#define EPOCHD_DISK_URING_H

#include "disk.h"

struct disk_uring;

/* files[n] is the descriptor of file number n, -1: there is none. buffer: memory that writes mostly come from
 * (the arena). *registered tells whether it could be registered. */
int disk_uring_open(struct disk_uring **out, const int *files, uint32_t count, void *buffer,
                    uint64_t buffer_bytes, bool *registered);
void disk_uring_close(struct disk_uring *u);
struct disk *disk_uring_disk(struct disk_uring *u);
/* A second seam on the same ring: what is submitted through it is taken from the kernel by the
 * first one's reap(), and delivered by its own only. ready: that would deliver something. */
struct disk *disk_uring_later(struct disk_uring *u);
bool disk_uring_ready(const struct disk_uring *u);

/* Wakes the sleeper when the eventfd is written; tag is given to woken(). Unwatch before
 * the descriptor is closed; tags are small numbers, one watch a tag. */
void disk_uring_watch(struct disk_uring *u, int fd, uint32_t tag);
void disk_uring_unwatch(struct disk_uring *u, uint32_t tag);

/* Sleeps until a completion, a watched eventfd or the timeout (ns; 0: none). */
void disk_uring_sleep(struct disk_uring *u, uint64_t timeout_ns);

/* For the end: operations that the kernel has, and taking their completions without
 * delivering them. What was not given to the kernel yet never will be. */
uint32_t disk_uring_in_flight(const struct disk_uring *u);
void disk_uring_discard(struct disk_uring *u);
/* Lets go of the files at once, with nothing in flight: the kernel takes a ring down some
 * time after it was closed, and as long the images would stay locked and busy. */
void disk_uring_release(struct disk_uring *u);

#define DISK_URING_TAGS 1024u

#endif
