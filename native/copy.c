/* copy.c - see copy.h. */
#include "copy.h"

#include <string.h>

#include "check.h"

static void copy_frame_plain(uint8_t *to, const struct frame_header *header, const uint8_t *from)
{
    memcpy(to, header, sizeof(*header));
    memcpy(to + sizeof(*header), from, BLOCK_BYTES);
}

static void copy_block_plain(uint8_t *to, const uint8_t *from, const uint8_t *next)
{
    (void)next;
    memcpy(to, from, BLOCK_BYTES);
}

#if defined(__x86_64__) && !defined(EPOCHD_PLAIN_COPY)
#include <immintrin.h>

_Static_assert(FRAME_ALIGN == sizeof(__m256i), "a streaming store wants this alignment");
_Static_assert(sizeof(struct frame_header) == sizeof(__m256i), "the header is one store");

__attribute__((target("avx2")))
static void copy_frame_avx2(uint8_t *to, const struct frame_header *header, const uint8_t *from)
{
    _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)header));
    to += sizeof(__m256i);
    for (uint32_t i = 0; i < BLOCK_BYTES; i += 4 * sizeof(__m256i)) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(from + i));
        __m256i b = _mm256_loadu_si256((const __m256i *)(from + i + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + i + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(from + i + 96));

        _mm256_stream_si256((__m256i *)(to + i), a);
        _mm256_stream_si256((__m256i *)(to + i + 32), b);
        _mm256_stream_si256((__m256i *)(to + i + 64), c);
        _mm256_stream_si256((__m256i *)(to + i + 96), d);
    }
}

__attribute__((target("avx2")))
static void copy_block_avx2(uint8_t *to, const uint8_t *from, const uint8_t *next)
{
    for (uint32_t i = 0; i < BLOCK_BYTES; i += 4 * sizeof(__m256i)) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(from + i));
        __m256i b = _mm256_loadu_si256((const __m256i *)(from + i + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + i + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(from + i + 96));

        prefetch(next + i);
        prefetch(next + i + 64);
        _mm256_storeu_si256((__m256i *)(to + i), a);
        _mm256_storeu_si256((__m256i *)(to + i + 32), b);
        _mm256_storeu_si256((__m256i *)(to + i + 64), c);
        _mm256_storeu_si256((__m256i *)(to + i + 96), d);
    }
    prefetch(next + BLOCK_BYTES); /* frames have a header, too */
}

__attribute__((constructor))
static void choose(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        copy_frame = copy_frame_avx2;
        copy_block = copy_block_avx2;
    }
}
#endif

void (*copy_frame)(uint8_t *to, const struct frame_header *header, const uint8_t *from) =
    copy_frame_plain;
void (*copy_block)(uint8_t *to, const uint8_t *from, const uint8_t *next) = copy_block_plain;
