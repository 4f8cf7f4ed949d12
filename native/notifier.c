/* notifier.c - see notifier.h. */
#include "notifier.h"

#include <errno.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct notifier {
    struct io_uring ring;
    int fd;
};

bool notifier_takes(int fd, const char **why)
{
    static const char eventfd[] = "anon_inode:[eventfd]";
    char path[32], target[sizeof(eventfd)];
    ssize_t n;

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    n = readlink(path, target, sizeof(target));
    *why = n < 0 ? "/proc does not tell what the descriptor is"
                 : "the descriptor is no eventfd";
    return n == (ssize_t)sizeof(eventfd) - 1 && memcmp(target, eventfd, (size_t)n) == 0;
}

static int setup_ring(struct io_uring *ring)
{
    int error = io_uring_queue_init(1, ring, IORING_SETUP_SINGLE_ISSUER |
                                             IORING_SETUP_DEFER_TASKRUN);

    return error == -EINVAL ? io_uring_queue_init(1, ring, 0) : error; /* before Linux 6.1 */
}

void notifier_signal(struct notifier *n)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&n->ring);

    if (sqe) /* none: the one of last time was not taken and goes now */
        io_uring_prep_nop(sqe);
    while (io_uring_submit(&n->ring) == -EINTR)
        ;
    io_uring_cq_advance(&n->ring, io_uring_cq_ready(&n->ring));
}

int notifier_open(struct notifier **out, int fd)
{
    struct notifier *n = calloc(1, sizeof(*n));
    int error = n ? setup_ring(&n->ring) : -ENOMEM;

    if (error) {
        close(fd);
        free(n);
        return error;
    }
    n->fd = fd;
    io_uring_register_ring_fd(&n->ring); /* saves a little; a thread has 16 of these */
    notifier_signal(n); /* to nobody: from here on the kernel needs no memory for it */
    error = io_uring_register_eventfd(&n->ring, fd);
    if (error) {
        notifier_close(n);
        return error;
    }
    *out = n;
    return 0;
}

void notifier_close(struct notifier *n)
{
    if (!n)
        return;
    io_uring_queue_exit(&n->ring);
    close(n->fd);
    free(n);
}
