/* counter.c - the guest's program: counts in memory, writes every count to the disk.
 *
 *   counter run DEVICE STATE FIRST BLOCKS PAUSE_US   count until told to stop
 *   counter verify DEVICE STATE                      compare the disk with memory
 *   counter status STATE                             print the count
 *   counter stop STATE                               let the counter end after its step
 *
 * STATE is a file in tmpfs, mapped shared: it is guest memory and nothing else. It holds
 * the count and, for each 4 KiB block of [FIRST, FIRST + BLOCKS), the count that was
 * written there last. One step = a few runs of blocks at places that follow from the
 * count, written with O_DIRECT; before a block is overwritten it is read and compared, so
 * a disk that is newer or older than memory is noticed by the first step that meets it.
 *
 * STATE is locked (flock) during a step and a verify: a verify sees whole steps only.
 * Exit codes: 0 all is as it should be, 1 the disk disagrees with memory, 2 an error.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK 4096u
#define RUN_MAX 16u       /* blocks written by one system call */
#define RUNS 2u           /* runs a step */
#define FLUSH_STEPS 64u   /* steps between flushes of the device */
#define MAGIC 0x65706f6368636e74ull

struct state {
    uint64_t magic, count, first, blocks, bytes, mismatches;
    uint32_t stop, done;
    uint64_t expect[]; /* count last written to each block; 0: never, so it reads as zeroes */
};

/* A block: words 0..3 say what it is, word 4 sums up the others. A third of it cannot be
 * compressed, the rest can, as file data does. */
struct block {
    uint64_t magic, count, position, seed, sum;
    uint64_t words[BLOCK / 8 - 5];
};
_Static_assert(sizeof(struct block) == BLOCK, "a block of the disk");

static struct block run_buffer[RUN_MAX] __attribute__((aligned(BLOCK)));

static void die(const char *what)
{
    fprintf(stderr, "counter: %s: %s\n", what, strerror(errno));
    exit(2);
}

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static void block_fill(struct block *b, uint64_t count, uint64_t position)
{
    uint64_t noise = mix(count ^ (position << 32)), sum;
    unsigned n = sizeof(b->words) / 8;

    memset(b, 0, sizeof(*b));
    if (count == 0)
        return;
    b->magic = MAGIC;
    b->count = count;
    b->position = position;
    b->seed = noise;
    for (unsigned i = 0; i < n; i++) {
        if (i < n / 3)
            noise = mix(noise);
        b->words[i] = i < n / 3 ? noise : count;
    }
    sum = MAGIC ^ count ^ position ^ b->seed;
    for (unsigned i = 0; i < n; i++)
        sum = sum * 31 + b->words[i];
    b->sum = sum;
}

/* Says what is wrong with `found`; 0 when it is exactly what memory expects. */
static int block_check(struct state *s, uint64_t index, const struct block *found)
{
    static int told;
    struct block expected;
    uint64_t position = s->first + index;

    block_fill(&expected, s->expect[index], position);
    if (memcmp(&expected, found, BLOCK) == 0)
        return 0;
    s->mismatches++;
    if (told++ < 3)
        printf("block %llu: memory says count %llu, disk holds %s %llu\n",
               (unsigned long long)position, (unsigned long long)s->expect[index],
               found->magic == MAGIC ? "count" : "something else,",
               (unsigned long long)found->count);
    return 1;
}

static void transfer(int fd, int write, uint64_t position, unsigned blocks)
{
    size_t bytes = (size_t)blocks * BLOCK;
    off_t at = (off_t)(position * BLOCK);
    ssize_t done = write ? pwrite(fd, run_buffer, bytes, at) : pread(fd, run_buffer, bytes, at);

    if (done >= 0 && (size_t)done != bytes)
        errno = EIO;
    if (done < 0 || (size_t)done != bytes)
        die(write ? "write" : "read");
}

static int check_run(struct state *s, int fd, uint64_t index, unsigned blocks)
{
    int bad = 0;

    transfer(fd, 0, s->first + index, blocks);
    for (unsigned i = 0; i < blocks; i++)
        bad += block_check(s, index + i, &run_buffer[i]);
    return bad;
}

static int step(struct state *s, int fd)
{
    uint64_t next = s->count + 1;

    for (unsigned r = 0; r < RUNS; r++) {
        uint64_t at = mix(next * RUNS + r);
        unsigned blocks = 1 + (unsigned)(at >> 32) % RUN_MAX;
        uint64_t index = at % (s->blocks - RUN_MAX);

        if (check_run(s, fd, index, blocks))
            return 1;
        for (unsigned i = 0; i < blocks; i++)
            block_fill(&run_buffer[i], next, s->first + index + i);
        transfer(fd, 1, s->first + index, blocks);
        for (unsigned i = 0; i < blocks; i++)
            s->expect[index + i] = next;
        s->bytes += (uint64_t)blocks * BLOCK;
    }
    if (next % FLUSH_STEPS == 0 && fdatasync(fd))
        die("flush");
    s->count = next;
    return 0;
}

static struct state *state_map(const char *path, size_t bytes, int *lock)
{
    struct stat st;
    int fd = open(path, O_RDWR | (bytes ? O_CREAT : 0), 0600);
    struct state *s;

    if (fd < 0 || (bytes && ftruncate(fd, (off_t)bytes)) || fstat(fd, &st))
        die(path);
    s = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (s == MAP_FAILED)
        die(path);
    *lock = fd;
    return s;
}

static int device_open(const char *path)
{
    int fd = open(path, O_RDWR | O_DIRECT);

    if (fd < 0)
        die(path);
    return fd;
}

static void print_status(const struct state *s)
{
    printf("count %llu bytes %llu mismatches %llu\n", (unsigned long long)s->count,
           (unsigned long long)s->bytes, (unsigned long long)s->mismatches);
}

static int run(const char *device, const char *path, uint64_t first, uint64_t blocks,
               unsigned pause_us)
{
    int lock, fd = device_open(device), bad = 0;
    struct state *s = state_map(path, sizeof(*s) + blocks * sizeof(uint64_t), &lock);

    s->magic = MAGIC;
    s->first = first;
    s->blocks = blocks;
    while (!bad && !s->stop) {
        if (flock(lock, LOCK_EX))
            die("lock");
        bad = step(s, fd);
        flock(lock, LOCK_UN);
        fflush(stdout);
        if (pause_us)
            usleep(pause_us);
    }
    s->done = 1;
    print_status(s);
    return bad;
}

static int verify(const char *device, const char *path)
{
    int lock, fd = device_open(device), bad = 0;
    struct state *s = state_map(path, 0, &lock);

    if (flock(lock, LOCK_EX))
        die("lock");
    for (uint64_t i = 0; i < s->blocks; i += RUN_MAX) {
        uint64_t left = s->blocks - i;
        bad += check_run(s, fd, i, left < RUN_MAX ? (unsigned)left : RUN_MAX);
    }
    printf("%s: count %llu, blocks %llu, different %d\n", bad ? "MISMATCH" : "AGREES",
           (unsigned long long)s->count, (unsigned long long)s->blocks, bad);
    return bad != 0;
}

int main(int argc, char **argv)
{
    int lock;

    if (argc == 7 && !strcmp(argv[1], "run"))
        return run(argv[2], argv[3], strtoull(argv[4], NULL, 0), strtoull(argv[5], NULL, 0),
                   (unsigned)strtoul(argv[6], NULL, 0));
    if (argc == 4 && !strcmp(argv[1], "verify"))
        return verify(argv[2], argv[3]);
    if (argc == 3 && !strcmp(argv[1], "status")) {
        print_status(state_map(argv[2], 0, &lock));
        return 0;
    }
    if (argc == 3 && !strcmp(argv[1], "stop")) {
        struct state *s = state_map(argv[2], 0, &lock);
        s->stop = 1;
        while (!s->done)
            usleep(1000);
        print_status(s);
        return s->mismatches != 0;
    }
    fprintf(stderr, "counter: run, verify, status or stop; see counter.c\n");
    return 2;
}
