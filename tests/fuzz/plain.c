/* plain.c - what the core is built with for targets that have no hostile guest: the names
 * that ring.c puts in the place of memcpy() and munmap(), and loads that nobody watches. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

void *fuzz_memcpy(void *to, const void *from, size_t bytes);
int fuzz_munmap(void *base, size_t bytes);
void __sanitizer_cov_load1(uint8_t *at);
void __sanitizer_cov_load2(uint16_t *at);
void __sanitizer_cov_load4(uint32_t *at);
void __sanitizer_cov_load8(uint64_t *at);
void __sanitizer_cov_load16(__int128 *at);

void *fuzz_memcpy(void *to, const void *from, size_t bytes)
{
    return memcpy(to, from, bytes);
}

int fuzz_munmap(void *base, size_t bytes)
{
    return munmap(base, bytes);
}

void __sanitizer_cov_load1(uint8_t *at) { (void)at; }
void __sanitizer_cov_load2(uint16_t *at) { (void)at; }
void __sanitizer_cov_load4(uint32_t *at) { (void)at; }
void __sanitizer_cov_load8(uint64_t *at) { (void)at; }
void __sanitizer_cov_load16(__int128 *at) { (void)at; }
