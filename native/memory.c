/* memory.c - see memory.h. */
#include "memory.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "check.h"
#include "format.h"
#include "span.h"

typedef unsigned long long ull;

/* What the handler knows of mappings; nothing that another thread may free under it. It skips
 * an entry that is being changed: a mapping that somebody touches is not being freed. */
#define MAPPINGS_MAX (CORE_DISKS_MAX * (CORE_REGIONS_MAX + 2) + 1) /* the spill file */
struct known {
    uint32_t taken;             /* by compare-and-swap */
    uint32_t turn;              /* odd while first and end change */
    uintptr_t first, end;
    uint32_t lost;
};
static struct known known[MAPPINGS_MAX];
_Thread_local uint32_t span_faults;

static void know(struct known *k, uintptr_t first, uint64_t bytes)
{
    __atomic_add_fetch(&k->turn, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&k->first, first, __ATOMIC_SEQ_CST);
    __atomic_store_n(&k->end, first + bytes, __ATOMIC_SEQ_CST);
    __atomic_store_n(&k->lost, 0, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&k->turn, 1, __ATOMIC_SEQ_CST);
}

static bool known_at(struct known *k, uintptr_t at, uintptr_t *first, uintptr_t *end)
{
    uint32_t turn = __atomic_load_n(&k->turn, __ATOMIC_SEQ_CST);

    *first = __atomic_load_n(&k->first, __ATOMIC_SEQ_CST);
    *end = __atomic_load_n(&k->end, __ATOMIC_SEQ_CST);
    return turn % 2 == 0 && turn == __atomic_load_n(&k->turn, __ATOMIC_SEQ_CST) &&
           at >= *first && at < *end;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr, first, end;

    (void)context;
    for (uint32_t i = 0; i < MAPPINGS_MAX; i++) {
        if (!known_at(&known[i], at, &first, &end))
            continue;
        if (mmap((void *)first, end - first, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
            break;
        __atomic_store_n(&known[i].lost, 1, __ATOMIC_RELEASE);
        __atomic_add_fetch(&span_faults, 1, __ATOMIC_RELEASE);
        return;
    }
    signal(number, SIG_DFL); /* ours: the access repeats and ends the process */
}

int memory_handle_sigbus(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};

    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, NULL) ? -errno : 0;
}

bool mapping_watch(struct mapping *m)
{
    for (uint32_t i = 0; i < MAPPINGS_MAX; i++) {
        uint32_t no = 0;

        if (__atomic_compare_exchange_n(&known[i].taken, &no, 1, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED)) {
            know(&known[i], (uintptr_t)m->base, m->bytes);
            m->lost = &known[i].lost;
            return true;
        }
    }
    return false;
}

void mapping_unwatch(struct mapping *m)
{
    struct known *k;

    if (!m->lost)
        return;
    k = (struct known *)((uint8_t *)m->lost - offsetof(struct known, lost));
    m->lost = NULL;
    know(k, 0, 0);
    __atomic_store_n(&k->taken, 0, __ATOMIC_RELEASE);
}

int mapping_create(int fd, uint64_t bytes, struct mapping **out, char *text)
{
    struct mapping *m = calloc(1, sizeof(*m));
    struct stat st;
    int error = -ENOMEM;

    if (!m)
        goto failed;
    error = -EINVAL;
    if (fstat(fd, &st) || (uint64_t)st.st_size < bytes) {
        snprintf(text, CORE_TEXT_MAX, "the file behind the memory has %llu bytes, %llu are asked "
                 "for", (ull)st.st_size, (ull)bytes);
        free(m);
        return error;
    }
    m->bytes = bytes;
    m->base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    error = -errno;
    if (m->base == MAP_FAILED)
        goto failed;
    madvise(m->base, bytes, MADV_DONTDUMP);
    if (mapping_watch(m)) {
        *out = m;
        return 0;
    }
    munmap(m->base, bytes);
    error = -ENOSPC;
failed:
    snprintf(text, CORE_TEXT_MAX, "cannot map %llu bytes: %s", (ull)bytes, strerror(-error));
    free(m);
    return error;
}

void mapping_free(struct mapping *m)
{
    if (!m)
        return;
    mapping_unwatch(m); /* before the address may be somebody else's */
    munmap(m->base, m->bytes);
    free(m);
}

bool mapping_lost(const struct mapping *m)
{
    return m && m->lost && __atomic_load_n(m->lost, __ATOMIC_ACQUIRE);
}

static int by_guest(const void *a, const void *b)
{
    const struct memory_region *x = a, *y = b;

    return x->guest < y->guest ? -1 : x->guest > y->guest;
}

static int add_region(struct memory *m, const core_region *r, char *text)
{
    struct memory_region *to = &m->region[m->count];
    int error;

    if (r->size == 0 || r->guest_addr + r->size < r->guest_addr ||
        r->user_addr + r->size < r->user_addr || r->mmap_offset + r->size < r->mmap_offset) {
        snprintf(text, CORE_TEXT_MAX, "memory region at %#llx: a size of %#llx at offset %#llx "
                 "wraps or is empty", (ull)r->guest_addr, (ull)r->size, (ull)r->mmap_offset);
        return -EINVAL;
    }
    /* From the file's start: huge pages ask for more alignment than mmap_offset may have. */
    error = mapping_create(r->fd, r->mmap_offset + r->size, &to->mapping, text);
    if (error)
        return error;
    to->guest = r->guest_addr;
    to->user = r->user_addr;
    to->bytes = r->size;
    to->host = (uint8_t *)to->mapping->base + r->mmap_offset;
    m->count++;
    return 0;
}

int memory_create(const core_region *regions, uint32_t count, struct memory **out, char *text)
{
    struct memory *m = calloc(1, sizeof(*m));
    int error = m && count <= CORE_REGIONS_MAX ? 0 : -EINVAL;

    if (error)
        snprintf(text, CORE_TEXT_MAX, "%u memory regions: at most %u", count, CORE_REGIONS_MAX);
    for (uint32_t i = 0; i < count && !error; i++)
        error = add_region(m, &regions[i], text);
    if (!error)
        qsort(m->region, m->count, sizeof(m->region[0]), by_guest);
    for (uint32_t i = 1; i < count && !error; i++)
        if (m->region[i - 1].guest + m->region[i - 1].bytes > m->region[i].guest) {
            snprintf(text, CORE_TEXT_MAX, "memory regions overlap at guest address %#llx",
                     (ull)m->region[i].guest);
            error = -EINVAL;
        }
    if (error) {
        memory_free(m);
        return error;
    }
    *out = m;
    return 0;
}

void memory_free(struct memory *m)
{
    if (!m)
        return;
    for (uint32_t i = 0; i < m->count; i++)
        mapping_free(m->region[i].mapping);
    free(m);
}

bool memory_lost(const struct memory *m)
{
    for (uint32_t i = 0; m && i < m->count; i++)
        if (mapping_lost(m->region[i].mapping))
            return true;
    return false;
}

uint8_t *memory_at(struct memory *m, uint64_t guest, uint64_t bytes, uint64_t *got)
{
    const struct memory_region *r;
    uint32_t low = 0, high = m->count;

    if (unlikely(m->count == 0))
        return NULL;
    r = &m->region[m->last];
    if (unlikely(guest < r->guest || guest - r->guest >= r->bytes)) {
        while (low < high) { /* first region that ends behind the address */
            uint32_t mid = low + (high - low) / 2;

            if (m->region[mid].guest + (m->region[mid].bytes - 1) < guest)
                low = mid + 1;
            else
                high = mid;
        }
        if (low == m->count || m->region[low].guest > guest)
            return NULL;
        m->last = low;
        r = &m->region[low];
    }
    *got = r->bytes - (guest - r->guest);
    if (*got > bytes)
        *got = bytes;
    return r->host + (guest - r->guest);
}

uint8_t *memory_at_user(const struct memory *m, uint64_t user, uint64_t bytes)
{
    for (uint32_t i = 0; i < m->count; i++) {
        const struct memory_region *r = &m->region[i];

        if (user >= r->user && user - r->user < r->bytes && bytes <= r->bytes - (user - r->user))
            return r->host + (user - r->user);
    }
    return NULL;
}

bool dirty_log_mark(const struct dirty_log *log, uint64_t guest, uint64_t bytes)
{
    if (bytes == 0)
        return true;
    for (uint64_t page = guest / PAGE; page <= (guest + bytes - 1) / PAGE; page++) {
        if (page / 8 >= log->bytes)
            return false;
        __atomic_fetch_or(&log->bits[page / 8], (uint8_t)(1u << page % 8), __ATOMIC_RELAXED);
    }
    return true;
}
