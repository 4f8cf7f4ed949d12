/* memcpy DEPTH COPIES - the memory's limit for 4 KiB writes.
 *
 * Copies DEPTH source buffers in turn to 4 KiB places that follow each other in one
 * gigabyte, as the arena's frames do, and prints copies a second. The gigabyte is touched
 * before, so no page fault is counted. Exit status 1: no memory or bad usage.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define BLOCK ((size_t)4096)
#define PLACES ((size_t)1 << 18)

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint8_t *memory(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED) {
        perror("memcpy: mmap");
        exit(1);
    }
    memset(p, 1, bytes);
    return p;
}

int main(int argc, char **argv)
{
    size_t depth = argc == 3 ? strtoul(argv[1], NULL, 10) : 0;
    size_t copies = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
    uint8_t *from, *to;
    uint64_t start, took;

    if (!depth || !copies || depth > 4096) {
        fprintf(stderr, "usage: memcpy DEPTH COPIES\n");
        return 1;
    }
    from = memory(depth * BLOCK);
    to = memory(PLACES * BLOCK);
    start = now_ns();
    for (size_t i = 0; i < copies; i++) {
        memcpy(to + i % PLACES * BLOCK, from + i % depth * BLOCK, BLOCK);
        __asm__ volatile("" ::: "memory"); /* every copy has to happen */
    }
    took = now_ns() - start;
    printf("%.1f\n", (double)copies * 1e9 / (double)(took ? took : 1));
    return 0;
}
