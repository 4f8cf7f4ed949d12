/* The seam over io_uring, on real files. */
#include "support.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "disk_uring.h"

#define FILE_BYTES (4u << 20)

struct scene {
    int fd;
    uint8_t *buffer;
    struct disk_uring *uring;
    struct disk *disk;
};

static int setup(void **state)
{
    struct scene *s = calloc(1, sizeof(*s));
    const char *folder = getenv("TMPDIR");
    char path[4096];
    bool registered;

    check(s);
    snprintf(path, sizeof(path), "%s/epochd-uring.XXXXXX", folder ? folder : "/tmp");
    s->fd = mkostemp(path, O_CLOEXEC);
    check(s->fd >= 0 && unlink(path) == 0 && ftruncate(s->fd, FILE_BYTES) == 0);
    s->buffer = aligned_alloc(PAGE, FILE_BYTES);
    check(s->buffer);
    memset(s->buffer, 0, FILE_BYTES);
    assert_int_equal(disk_uring_open(&s->uring, &s->fd, 1, s->buffer, FILE_BYTES, &registered), 0);
    s->disk = disk_uring_disk(s->uring);
    *state = s;
    return 0;
}

static int teardown(void **state)
{
    struct scene *s = *state;

    disk_uring_close(s->uring);
    close(s->fd);
    free(s->buffer);
    free(s);
    return 0;
}

static int64_t transfer(struct scene *s, enum disk_opcode opcode, uint64_t offset, void *at,
                        uint64_t bytes)
{
    struct iovec iov = {.iov_base = at, .iov_len = bytes};
    struct disk_op op = {.opcode = opcode, .offset = offset, .bytes = bytes, .iov = &iov,
                         .iov_count = 1};

    return disk_run(s->disk, &op);
}

static int64_t plain(struct scene *s, enum disk_opcode opcode, uint64_t offset, uint64_t bytes)
{
    struct disk_op op = {.opcode = opcode, .offset = offset, .bytes = bytes};

    return disk_run(s->disk, &op);
}

static void what_is_written_is_read_back(void **state)
{
    struct scene *s = *state;
    struct dice d = dice_new(__func__);
    uint8_t out[10000], in[10000], a[100], b[5000], c[4900];
    struct iovec iov[] = {{a, sizeof(a)}, {b, sizeof(b)}, {c, sizeof(c)}};
    struct disk_op op = {.opcode = DISK_READ, .offset = 777, .bytes = 10000, .iov = iov,
                         .iov_count = 3};

    dice_fill(&d, out, sizeof(out));
    assert_int_equal(transfer(s, DISK_WRITE, 777, out, sizeof(out)), sizeof(out));
    assert_int_equal(plain(s, DISK_SYNC, 0, 0), 0);
    assert_int_equal(transfer(s, DISK_READ, 777, in, sizeof(in)), sizeof(in));
    assert_memory_equal(in, out, sizeof(in));
    assert_int_equal(disk_run(s->disk, &op), 10000); /* scattered */
    assert_memory_equal(a, out, 100);
    assert_memory_equal(b, out + 100, 5000);
    assert_memory_equal(c, out + 5100, 4900);
    /* From the registered buffer. */
    dice_fill(&d, s->buffer + PAGE, PAGE);
    assert_int_equal(transfer(s, DISK_WRITE, PAGE, s->buffer + PAGE, PAGE), PAGE);
    assert_int_equal(transfer(s, DISK_READ, PAGE, in, PAGE), PAGE);
    assert_memory_equal(in, s->buffer + PAGE, PAGE);
}

static void a_transfer_that_stays_short_is_an_error(void **state)
{
    struct scene *s = *state;
    uint8_t in[2 * PAGE], half[PAGE], rest[PAGE];
    struct iovec iov[] = {{half, PAGE}, {rest, PAGE}};
    struct disk_op op = {.opcode = DISK_READ, .offset = FILE_BYTES - PAGE - 512,
                         .bytes = 2 * PAGE, .iov = iov, .iov_count = 2};

    assert_int_equal(transfer(s, DISK_READ, FILE_BYTES - PAGE, in, 2 * PAGE), -EIO);
    assert_int_equal(transfer(s, DISK_READ, FILE_BYTES, in, PAGE), -EIO);
    assert_int_equal(disk_run(s->disk, &op), -EIO);
    assert_int_equal(transfer(s, DISK_READ, FILE_BYTES - PAGE, in, PAGE), PAGE);
}

static void errors_are_told(void **state)
{
    struct scene *s = *state;
    uint8_t in[PAGE];
    struct iovec iov = {.iov_base = in, .iov_len = PAGE};
    struct disk_op op = {.opcode = DISK_READ, .file = 7, .bytes = PAGE, .iov = &iov,
                         .iov_count = 1};

    assert_int_equal(disk_run(s->disk, &op), -EBADF); /* no such file */
    assert_int_equal(transfer(s, DISK_READ, 0, (void *)8, PAGE), -EFAULT);
}

static void punched_and_zeroed_ranges_read_as_zeroes(void **state)
{
    struct scene *s = *state;
    static uint8_t out[16 * PAGE], in[16 * PAGE];
    struct dice d = dice_new(__func__);
    int64_t zeroed;

    dice_fill(&d, out, sizeof(out));
    assert_int_equal(transfer(s, DISK_WRITE, 0, out, sizeof(out)), sizeof(out));
    zeroed = plain(s, DISK_ZERO, PAGE, PAGE);
    if (zeroed != -EOPNOTSUPP) { /* as on tmpfs; the caller has to write zeroes then */
        assert_int_equal(zeroed, 0);
        memset(out + PAGE, 0, PAGE);
    }
    assert_int_equal(plain(s, DISK_PUNCH, 4 * PAGE, 2 * PAGE), 0);
    memset(out + 4 * PAGE, 0, 2 * PAGE);
    assert_int_equal(transfer(s, DISK_READ, 0, in, sizeof(in)), sizeof(in));
    assert_memory_equal(in, out, sizeof(in));
    assert_int_equal(lseek(s->fd, 0, SEEK_END), FILE_BYTES);
}

struct many {
    struct disk_op op;
    struct iovec iov;
    uint32_t times;
    int64_t result;
};

static void many_done(struct disk_op *op, int64_t result)
{
    struct many *m = (struct many *)op;

    m->times++;
    m->result = result;
}

/* More than the kernel is given at once: each is delivered once all the same. */
static void more_operations_than_the_ring_is_deep(void **state)
{
    enum { COUNT = 1000, BYTES = 4096 };
    struct scene *s = *state;
    static struct many many[COUNT];
    static uint8_t in[BYTES];
    uint32_t delivered = 0;

    for (uint32_t i = 0; i < COUNT; i++) {
        uint8_t *at = s->buffer + (uint64_t)i * BYTES;

        memset(at, (int)(i % 251), BYTES);
        many[i].iov = (struct iovec){.iov_base = at, .iov_len = BYTES};
        many[i].op = (struct disk_op){.opcode = DISK_WRITE, .offset = (uint64_t)i * BYTES,
                                      .bytes = BYTES, .iov = &many[i].iov, .iov_count = 1,
                                      .done = many_done};
        disk_submit(s->disk, &many[i].op);
    }
    while (delivered < COUNT)
        delivered += disk_reap(s->disk, true);
    assert_int_equal(delivered, COUNT);
    assert_int_equal(disk_reap(s->disk, false), 0);
    for (uint32_t i = 0; i < COUNT; i++) {
        assert_int_equal(many[i].times, 1);
        assert_int_equal(many[i].result, BYTES);
        assert_int_equal(pread(s->fd, in, BYTES, (off_t)i * BYTES), BYTES);
        assert_memory_equal(in, s->buffer + (uint64_t)i * BYTES, BYTES);
    }
}

/* The end of a disk that is not asked any more: completions are taken, nobody is called. */
static void what_is_in_flight_can_be_discarded(void **state)
{
    struct scene *s = *state;
    static struct many many[100];

    for (uint32_t i = 0; i < 100; i++) {
        many[i].iov = (struct iovec){.iov_base = s->buffer, .iov_len = PAGE};
        many[i].op = (struct disk_op){.opcode = DISK_READ, .bytes = PAGE, .iov = &many[i].iov,
                                      .iov_count = 1, .done = many_done};
        disk_submit(s->disk, &many[i].op);
    }
    assert_int_equal(disk_uring_in_flight(s->uring), 100);
    while (disk_uring_in_flight(s->uring) > 0) {
        disk_uring_sleep(s->uring, 0);
        disk_uring_discard(s->uring);
    }
    for (uint32_t i = 0; i < 100; i++)
        assert_int_equal(many[i].times, 0);
}

static void kick(int fd)
{
    uint64_t one = 1;

    check(write(fd, &one, sizeof(one)) == sizeof(one));
}

static int kick_fd(void)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    check(fd >= 0);
    return fd;
}

/* Sleeps until the ring has taken the kick; for ever if it is lost, then the test's time limit
 * tells. A sleep may end early by what is left of an earlier kick. */
static void sleep_until_taken(struct scene *s, int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};

    while (poll(&p, 1, 0) == 1) {
        disk_uring_sleep(s->uring, 0);
        disk_reap(s->disk, false);
    }
}

static void a_kick_ends_the_sleep(void **state)
{
    struct scene *s = *state;
    int a = kick_fd(), b = kick_fd();

    disk_uring_watch(s->uring, a, 5);
    disk_uring_watch(s->uring, b, DISK_URING_TAGS - 1);
    for (uint32_t turn = 0; turn < 2000; turn++) {
        int fd = turn % 3 ? a : b;

        kick(fd);
        if (turn % 5 == 0)
            kick(fd);
        sleep_until_taken(s, fd);
    }
    disk_uring_unwatch(s->uring, 5);
    disk_uring_unwatch(s->uring, DISK_URING_TAGS - 1);
    close(a);
    close(b);
}

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void drain_leftovers(struct scene *s)
{
    /* Completions of removed watches may come yet. */
    for (uint32_t i = 0; i < 20; i++) {
        disk_uring_sleep(s->uring, 1000000);
        disk_reap(s->disk, false);
    }
}

static void an_unwatched_descriptor_wakes_nobody(void **state)
{
    struct scene *s = *state;
    int fd = kick_fd();
    uint64_t start;

    disk_uring_watch(s->uring, fd, 1);
    kick(fd);
    disk_uring_sleep(s->uring, 0);
    disk_reap(s->disk, false);
    disk_uring_unwatch(s->uring, 1);
    drain_leftovers(s);
    kick(fd);
    start = now();
    disk_uring_sleep(s->uring, 50000000);
    assert_true(now() - start >= 49000000); /* nothing ended it before */
    close(fd);
}

/* A front end shares the descriptor and its flags: it may read the count away and make reads
 * block. The test's time limit tells if one does. */
static void a_count_that_is_gone_is_not_waited_for(void **state)
{
    struct scene *s = *state;
    int fd = kick_fd();
    uint64_t count;

    disk_uring_watch(s->uring, fd, 3);
    for (uint32_t turn = 0; turn < 100; turn++) {
        kick(fd);
        disk_uring_sleep(s->uring, 0);
        assert_int_equal(fcntl(fd, F_SETFL, 0), 0);
        assert_int_equal(read(fd, &count, sizeof(count)), sizeof(count));
        disk_reap(s->disk, false);
        assert_int_equal(fcntl(fd, F_SETFL, O_NONBLOCK), 0);
    }
    disk_uring_unwatch(s->uring, 3);
    close(fd);
}

/* A ring stopped and started again with another kick descriptor, at once, many times. */
static void a_tag_can_be_watched_anew(void **state)
{
    struct scene *s = *state;

    for (uint32_t turn = 0; turn < 500; turn++) {
        int old = kick_fd(), fresh = kick_fd();

        disk_uring_watch(s->uring, old, 9);
        if (turn % 2)
            kick(old);
        if (turn % 3 == 0)
            disk_reap(s->disk, false);
        disk_uring_unwatch(s->uring, 9);
        close(old);
        disk_uring_watch(s->uring, fresh, 9);
        kick(fresh);
        sleep_until_taken(s, fresh);
        disk_uring_unwatch(s->uring, 9);
        close(fresh);
    }
}

static void count_read(struct disk_op *op, int64_t result)
{
    *(uint32_t *)op->owner += result == PAGE;
}

/* A device should not wait until the last one of many reads is taken. */
static void reads_begin_while_more_are_taken(void **state)
{
    struct scene *s = *state;
    uint8_t *to = s->buffer + PAGE;
    struct iovec iov[32];
    struct disk_op op[32];
    uint32_t done = 0;

    memset(s->buffer, 0x5a, PAGE);
    assert_int_equal(transfer(s, DISK_WRITE, 0, s->buffer, PAGE), PAGE);
    for (uint32_t i = 0; i < 32; i++) {
        iov[i] = (struct iovec){.iov_base = to + i * PAGE, .iov_len = PAGE};
        op[i] = (struct disk_op){.opcode = DISK_READ, .bytes = PAGE, .iov = &iov[i], .iov_count = 1,
                                 .done = count_read, .owner = &done};
        disk_submit(s->disk, &op[i]);
    }
    for (uint32_t i = 0; i < 5000 && __atomic_load_n(&to[PAGE - 1], __ATOMIC_ACQUIRE) == 0; i++)
        usleep(1000); /* nobody asks for completions meanwhile */
    assert_int_equal(to[0], 0x5a);
    assert_int_equal(to[PAGE - 1], 0x5a);
    while (done < 32)
        disk_reap(s->disk, true);
    for (uint32_t i = 0; i < 32; i++)
        assert_memory_equal(to + i * PAGE, s->buffer, PAGE);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(reads_begin_while_more_are_taken),
        CASE(what_is_written_is_read_back),
        CASE(a_transfer_that_stays_short_is_an_error),
        CASE(errors_are_told),
        CASE(punched_and_zeroed_ranges_read_as_zeroes),
        CASE(more_operations_than_the_ring_is_deep),
        CASE(what_is_in_flight_can_be_discarded),
        CASE(a_kick_ends_the_sleep),
        CASE(an_unwatched_descriptor_wakes_nobody),
        CASE(a_count_that_is_gone_is_not_waited_for),
        CASE(a_tag_can_be_watched_anew),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
