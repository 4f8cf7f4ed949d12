/* disk_uring.c - see disk_uring.h. */
#include "disk_uring.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

#define DEPTH 256u               /* operations given to the kernel at once */
#define READS_TOGETHER 4u        /* begun while more are taken: handed over all at once, 32 of them
                                  * left the device idle for 100 us of each 600 */
#define WATCH_BIT 1ull           /* user_data of a watch, see watch_data(); operations are even */
#define IGNORE ((uint64_t)-1)    /* user_data of a poll removal */
#define BUFFER_PIECE (1ull << 30) /* the kernel's limit for one registered buffer */

struct disk_uring {
    struct disk disk, later;
    struct disk_op *done, *done_last; /* of the second seam: completed, not delivered */
    struct io_uring ring;
    uint32_t in_flight;          /* given to the kernel */
    struct disk_op *head, *tail; /* not yet given: DEPTH was reached */
    uint8_t *buffer;
    uint64_t buffer_bytes;
    int watch_fd[DISK_URING_TAGS];
    uint32_t watch_turn[DISK_URING_TAGS]; /* tells a watch from earlier ones of its tag */
};

static uint64_t watch_data(const struct disk_uring *u, uint32_t tag)
{
    return (uint64_t)u->watch_turn[tag] << 16 | (uint64_t)tag << 1 | WATCH_BIT;
}

static struct io_uring_sqe *get_sqe(struct disk_uring *u)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);

    while (!sqe) {
        io_uring_submit(&u->ring);
        sqe = io_uring_get_sqe(&u->ring);
    }
    return sqe;
}

/* The registered buffer that holds the whole piece, or -1. */
static int fixed_buffer(const struct disk_uring *u, const struct iovec *v)
{
    const uint8_t *p = v->iov_base;
    uint64_t first, last;

    if (!u->buffer || p < u->buffer || p + v->iov_len > u->buffer + u->buffer_bytes)
        return -1;
    first = (uint64_t)(p - u->buffer) / BUFFER_PIECE;
    last = ((uint64_t)(p - u->buffer) + v->iov_len - 1) / BUFFER_PIECE;
    return first == last ? (int)first : -1;
}

static void give_transfer(struct disk_uring *u, struct io_uring_sqe *sqe, struct disk_op *op)
{
    int file = (int)op->file;
    uint64_t at = op->offset + op->moved;

    if (op->iov_count == 1) {
        int fixed = fixed_buffer(u, op->iov);
        unsigned len = (unsigned)op->iov->iov_len;

        if (op->opcode == DISK_READ && fixed >= 0)
            io_uring_prep_read_fixed(sqe, file, op->iov->iov_base, len, at, fixed);
        else if (op->opcode == DISK_READ)
            io_uring_prep_read(sqe, file, op->iov->iov_base, len, at);
        else if (fixed >= 0)
            io_uring_prep_write_fixed(sqe, file, op->iov->iov_base, len, at, fixed);
        else
            io_uring_prep_write(sqe, file, op->iov->iov_base, len, at);
    } else if (op->opcode == DISK_READ) {
        io_uring_prep_readv(sqe, file, op->iov, op->iov_count, at);
    } else {
        io_uring_prep_writev(sqe, file, op->iov, op->iov_count, at);
    }
    if (op->durable)
        sqe->rw_flags = RWF_DSYNC;
}

static void give(struct disk_uring *u, struct disk_op *op)
{
    struct io_uring_sqe *sqe = get_sqe(u);

    switch (op->opcode) {
    case DISK_READ:
    case DISK_WRITE:
        give_transfer(u, sqe, op);
        break;
    case DISK_SYNC:
        io_uring_prep_fsync(sqe, (int)op->file, IORING_FSYNC_DATASYNC);
        break;
    case DISK_ZERO:
        io_uring_prep_fallocate(sqe, (int)op->file, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
                                (off_t)op->offset, (off_t)op->bytes);
        break;
    case DISK_PUNCH:
        io_uring_prep_fallocate(sqe, (int)op->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                (off_t)op->offset, (off_t)op->bytes);
        break;
    }
    io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
    io_uring_sqe_set_data(sqe, op);
    u->in_flight++;
}

static void submit_to(struct disk_uring *u, struct disk_op *op)
{
    op->next = NULL;
    op->moved = 0;
    if (u->in_flight < DEPTH && !u->head) {
        give(u, op);
        if (op->opcode == DISK_READ && io_uring_sq_ready(&u->ring) >= READS_TOGETHER)
            io_uring_submit(&u->ring);
        return;
    }
    if (u->tail)
        u->tail->next = op;
    else
        u->head = op;
    u->tail = op;
}

static void submit(struct disk *d, struct disk_op *op)
{
    op->later = false;
    submit_to((struct disk_uring *)d, op);
}

static struct disk_uring *uring_of_later(struct disk *d)
{
    return (struct disk_uring *)((uint8_t *)d - offsetof(struct disk_uring, later));
}

static void submit_later(struct disk *d, struct disk_op *op)
{
    op->later = true;
    submit_to(uring_of_later(d), op);
}

/* A short transfer is continued: the kernel then says why it was short. */
static bool continue_short(struct disk_uring *u, struct disk_op *op, int result)
{
    uint64_t skip = (uint64_t)result;

    if ((op->opcode != DISK_READ && op->opcode != DISK_WRITE) || result <= 0)
        return false;
    op->moved += skip;
    if (op->moved >= op->bytes)
        return false;
    while (skip >= op->iov->iov_len) {
        skip -= op->iov->iov_len;
        op->iov++;
        op->iov_count--;
    }
    op->iov->iov_base = (uint8_t *)op->iov->iov_base + skip;
    op->iov->iov_len -= skip;
    give(u, op);
    return true;
}

static void complete(struct disk_uring *u, struct disk_op *op, int result)
{
    int64_t total = result;

    u->in_flight--;
    if (result == -EAGAIN || result == -EINTR) {
        give(u, op);
        return;
    }
    if (continue_short(u, op, result))
        return;
    if (op->opcode == DISK_READ || op->opcode == DISK_WRITE) {
        if (result >= 0)
            total = op->moved == op->bytes ? (int64_t)op->bytes : -EIO;
    }
    if (likely(!op->later)) {
        op->done(op, total);
        return;
    }
    op->result = total;
    op->next = NULL;
    if (u->done_last)
        u->done_last->next = op;
    else
        u->done = op;
    u->done_last = op;
}

static void arm(struct disk_uring *u, uint32_t tag)
{
    struct io_uring_sqe *sqe = get_sqe(u);

    io_uring_prep_poll_multishot(sqe, u->watch_fd[tag], POLLIN);
    sqe->user_data = watch_data(u, tag);
}

/* Never waits: a front end shares the descriptor's flags, so O_NONBLOCK is not enough. */
static void take_count(int fd)
{
    uint64_t count;
    struct iovec v = {.iov_base = &count, .iov_len = sizeof(count)};
    ssize_t n;

    do {
        n = preadv2(fd, &v, 1, -1, RWF_NOWAIT);
    } while (n < 0 && errno == EINTR);
    while (n < 0 && errno == EOPNOTSUPP && /* before Linux 5.8, or no eventfd */
           read(fd, &count, sizeof(count)) < 0 && errno == EINTR)
        errno = EOPNOTSUPP;
}

static void woken(struct disk_uring *u, const struct io_uring_cqe *cqe)
{
    uint32_t tag = (uint32_t)(cqe->user_data >> 1) % DISK_URING_TAGS;

    /* Of a watch that was removed: to arm it would leave a second one behind. */
    if (u->watch_fd[tag] < 0 || cqe->user_data != watch_data(u, tag))
        return;
    /* A descriptor that cannot be polled would be armed for ever; all else passes. */
    if (cqe->res == -EBADF || cqe->res == -EPERM || cqe->res == -EINVAL || cqe->res == -EOPNOTSUPP)
        return;
    take_count(u->watch_fd[tag]);
    if (!(cqe->flags & IORING_CQE_F_MORE))
        arm(u, tag);
}

static uint32_t drain(struct disk_uring *u)
{
    struct io_uring_cqe *cqe;
    uint32_t delivered = 0;

    while (io_uring_peek_cqe(&u->ring, &cqe) == 0 && cqe) {
        struct io_uring_cqe copy = *cqe;

        io_uring_cqe_seen(&u->ring, cqe);
        if (copy.user_data == IGNORE)
            continue;
        if (copy.user_data & WATCH_BIT) {
            woken(u, &copy);
            continue;
        }
        complete(u, (struct disk_op *)(uintptr_t)copy.user_data, copy.res);
        delivered++;
    }
    while (u->head && u->in_flight < DEPTH) {
        struct disk_op *op = u->head;

        u->head = op->next;
        if (!u->head)
            u->tail = NULL;
        give(u, op);
    }
    return delivered;
}

static uint32_t reap(struct disk *d, bool wait)
{
    struct disk_uring *u = (struct disk_uring *)d;
    uint32_t delivered;

    if (io_uring_sq_ready(&u->ring) > 0)
        io_uring_submit(&u->ring);
    delivered = drain(u);
    while (wait && delivered == 0 && u->in_flight > 0) {
        io_uring_submit_and_wait(&u->ring, 1);
        delivered = drain(u);
    }
    if (io_uring_sq_ready(&u->ring) > 0)
        io_uring_submit(&u->ring);
    return delivered;
}

static uint32_t reap_later(struct disk *d, bool wait)
{
    struct disk_uring *u = uring_of_later(d);
    uint32_t delivered = 0;

    if (wait && !u->done)
        reap(&u->disk, true);
    while (u->done) {
        struct disk_op *op = u->done;

        u->done = op->next;
        if (!u->done)
            u->done_last = NULL;
        op->done(op, op->result);
        delivered++;
    }
    return delivered;
}

void disk_uring_sleep(struct disk_uring *u, uint64_t timeout_ns)
{
    struct __kernel_timespec ts = {.tv_sec = (long long)(timeout_ns / 1000000000u),
                                   .tv_nsec = (long long)(timeout_ns % 1000000000u)};
    struct io_uring_cqe *cqe;

    if (timeout_ns)
        io_uring_submit_and_wait_timeout(&u->ring, &cqe, 1, &ts, NULL);
    else
        io_uring_submit_and_wait(&u->ring, 1);
}

void disk_uring_watch(struct disk_uring *u, int fd, uint32_t tag)
{
    check(tag < DISK_URING_TAGS && u->watch_fd[tag] < 0);
    u->watch_fd[tag] = fd;
    u->watch_turn[tag]++;
    arm(u, tag);
}

void disk_uring_unwatch(struct disk_uring *u, uint32_t tag)
{
    struct io_uring_sqe *sqe;

    if (u->watch_fd[tag] < 0)
        return;
    u->watch_fd[tag] = -1;
    sqe = get_sqe(u);
    io_uring_prep_poll_remove(sqe, watch_data(u, tag));
    sqe->user_data = IGNORE;
    io_uring_submit(&u->ring); /* before the caller closes the descriptor */
}

uint32_t disk_uring_in_flight(const struct disk_uring *u)
{
    return u->in_flight;
}

void disk_uring_discard(struct disk_uring *u)
{
    struct io_uring_cqe *cqe;

    while (io_uring_peek_cqe(&u->ring, &cqe) == 0 && cqe) {
        if (cqe->user_data != IGNORE && !(cqe->user_data & WATCH_BIT))
            u->in_flight--;
        io_uring_cqe_seen(&u->ring, cqe);
    }
}

void disk_uring_release(struct disk_uring *u)
{
    check(u->in_flight == 0);
    io_uring_unregister_files(&u->ring);
}

static int setup_ring(struct io_uring *ring)
{
    struct io_uring_params p = {0};
    int error;

    p.flags = IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
              IORING_SETUP_TASKRUN_FLAG;
    p.cq_entries = 4 * (DEPTH + DISK_URING_TAGS);
    error = io_uring_queue_init_params(2 * DEPTH, ring, &p);
    if (error != -EINVAL)
        return error;
    memset(&p, 0, sizeof(p)); /* before Linux 6.1 */
    p.flags = IORING_SETUP_CQSIZE;
    p.cq_entries = 4 * (DEPTH + DISK_URING_TAGS);
    return io_uring_queue_init_params(2 * DEPTH, ring, &p);
}

static bool register_buffer(struct disk_uring *u, uint8_t *buffer, uint64_t bytes)
{
    uint32_t pieces = (uint32_t)((bytes + BUFFER_PIECE - 1) / BUFFER_PIECE);
    struct iovec *v = calloc(pieces, sizeof(*v));
    int error = -ENOMEM;

    for (uint32_t i = 0; v && i < pieces; i++) {
        uint64_t left = bytes - i * BUFFER_PIECE;

        v[i].iov_base = buffer + i * BUFFER_PIECE;
        v[i].iov_len = left < BUFFER_PIECE ? left : BUFFER_PIECE;
    }
    if (v)
        error = io_uring_register_buffers(&u->ring, v, pieces);
    free(v);
    return error == 0;
}

int disk_uring_open(struct disk_uring **out, const int *files, uint32_t count, void *buffer,
                    uint64_t buffer_bytes, bool *registered)
{
    struct disk_uring *u = calloc(1, sizeof(*u));
    int error;

    if (!u)
        return -ENOMEM;
    error = setup_ring(&u->ring);
    if (!error) {
        error = io_uring_register_files(&u->ring, files, count);
        if (error)
            io_uring_queue_exit(&u->ring);
    }
    if (error) {
        free(u);
        return error;
    }
    *registered = buffer && register_buffer(u, buffer, buffer_bytes);
    if (*registered) {
        u->buffer = buffer;
        u->buffer_bytes = buffer_bytes;
    }
    for (uint32_t i = 0; i < DISK_URING_TAGS; i++)
        u->watch_fd[i] = -1;
    u->disk = (struct disk){.submit = submit, .reap = reap};
    u->later = (struct disk){.submit = submit_later, .reap = reap_later};
    *out = u;
    return 0;
}

void disk_uring_close(struct disk_uring *u)
{
    if (!u)
        return;
    check(u->in_flight == 0);
    io_uring_queue_exit(&u->ring);
    free(u);
}

struct disk *disk_uring_disk(struct disk_uring *u)
{
    return &u->disk;
}

struct disk *disk_uring_later(struct disk_uring *u)
{
    return &u->later;
}

bool disk_uring_ready(const struct disk_uring *u)
{
    return u->done;
}

struct wait_state {
    bool finished;
    int64_t result;
};

static void finished(struct disk_op *op, int64_t result)
{
    struct wait_state *w = op->owner;

    w->finished = true;
    w->result = result;
}

int64_t disk_run(struct disk *d, struct disk_op *op)
{
    struct wait_state w = {0};

    op->done = finished;
    op->owner = &w;
    disk_submit(d, op);
    while (!w.finished)
        disk_reap(d, true);
    return w.result;
}
