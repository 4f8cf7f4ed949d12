/* core.c - the functions of core.h: they pack a command, or start and stop the reactor.
 *
 * Owner: the control thread (Python's). What the front end gave us as eventfds is checked
 * to be that: nothing else is always there to be read, written and slept on.
 */
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checksum.h"
#include "reactor.h"

/* ---- Journal file -------------------------------------------------------------------------- */

uint64_t core_arena_huge_pages(int fd, uint64_t bytes)
{
    return arena_huge_pages(fd, bytes);
}

uint64_t core_journal_bytes_min(uint64_t arena_bytes)
{
    /* All of the arena and the spill file as one record, its table included. */
    return JOURNAL_LOG_OFFSET + arena_bytes +
           record_header_bytes((uint32_t)(arena_bytes / SEGMENT_BYTES));
}

static int read_page(int fd, uint64_t offset, void *page, char *text)
{
    ssize_t n = pread(fd, page, PAGE, (off_t)offset);

    if (n >= 0 && n < (ssize_t)PAGE)
        memset((uint8_t *)page + n, 0, PAGE - (size_t)n);
    if (n < 0) {
        snprintf(text, CORE_TEXT_MAX, "journal: reading at offset %llu failed: %s",
                 (unsigned long long)offset, strerror(errno));
        return -errno;
    }
    return 0;
}

static bool all_zero(const uint8_t *p, size_t bytes)
{
    return p[0] == 0 && memcmp(p, p + 1, bytes - 1) == 0;
}

int core_journal_inspect(int fd, core_journal_info *out, char *text)
{
    struct journal_super *page = aligned_alloc(PAGE, PAGE);
    uint64_t best = 0;
    bool empty = true, other = false;
    int error = page ? 0 : -ENOMEM;

    memset(out, 0, sizeof(*out));
    for (uint32_t slot = 0; slot < JOURNAL_SUPER_SLOTS && !error; slot++) {
        error = read_page(fd, (uint64_t)slot * JOURNAL_SUPER_STRIDE, page, text);
        if (error)
            break;
        empty &= all_zero((const uint8_t *)page, PAGE);
        other |= page->magic == JOURNAL_MAGIC && page->version != JOURNAL_VERSION;
        if (page->magic != JOURNAL_MAGIC || page->version != JOURNAL_VERSION ||
            page->crc != journal_super_crc(page) || page->super_seq < best)
            continue;
        best = page->super_seq;
        out->formatted = 1;
        memcpy(out->group, page->group, sizeof(out->group));
        out->size_bytes = page->file_bytes;
    }
    free(page);
    if (error || out->formatted || empty)
        return error;
    snprintf(text, CORE_TEXT_MAX, other ? "journal: written by another version of this agent"
                                        : "journal: the file is damaged, or no journal");
    return -EINVAL;
}

int core_journal_format(const core_config *config, const uint8_t *group, char *text)
{
    struct journal_super *page = aligned_alloc(PAGE, PAGE);
    struct stat st;
    ssize_t n = -1;

    if (page && fstat(config->journal_fd, &st) == 0) {
        memset(page, 0, PAGE);
        page->magic = JOURNAL_MAGIC;
        page->version = JOURNAL_VERSION;
        page->super_seq = JOURNAL_SUPER_SLOTS; /* slot 0 */
        memcpy(page->group, group, sizeof(page->group));
        page->file_bytes = (uint64_t)st.st_size;
        page->epoch_limit = 1;
        page->mode = CORE_STANDBY;
        page->generation = 1;
        page->disks = config->disks;
        page->clean = 1;
        for (uint32_t i = 0; i < config->disks; i++) {
            page->disk[i].size_bytes = config->disk[i].size_bytes;
            page->disk[i].identity = config->disk[i].identity;
            memcpy(page->disk[i].name, config->disk[i].name, sizeof(page->disk[i].name));
        }
        page->crc = journal_super_crc(page);
        n = pwrite(config->journal_fd, page, PAGE, 0);
        if (n == PAGE && fdatasync(config->journal_fd))
            n = -1;
    }
    free(page);
    if (n == PAGE)
        return 0;
    snprintf(text, CORE_TEXT_MAX, "journal: writing the superblock failed: %s", strerror(errno));
    return errno ? -errno : -EIO;
}

#define ZERO_WRITE_BYTES 1048576u
#ifndef FALLOC_FL_WRITE_ZEROES
#define FALLOC_FL_WRITE_ZEROES 0x80 /* Linux 6.17: the device does it, where it can */
#endif

static int zero_by_writes(int fd, uint64_t offset, uint64_t bytes)
{
    uint8_t *zeroes = aligned_alloc(PAGE, ZERO_WRITE_BYTES);
    int error = zeroes ? 0 : -ENOMEM;

    if (zeroes)
        memset(zeroes, 0, ZERO_WRITE_BYTES);
    while (bytes > 0 && !error) {
        uint64_t some = bytes < ZERO_WRITE_BYTES ? bytes : ZERO_WRITE_BYTES;
        ssize_t n = pwrite(fd, zeroes, some, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            error = n ? -errno : -EIO;
            break;
        }
        offset += (uint64_t)n;
        bytes -= (uint64_t)n;
    }
    free(zeroes);
    return error;
}

int core_journal_zero(int fd, uint64_t offset, uint64_t bytes)
{
    if (fallocate(fd, FALLOC_FL_WRITE_ZEROES, (off_t)offset, (off_t)bytes) == 0)
        return 0;
    return zero_by_writes(fd, offset, bytes);
}

/* ---- Arena and spill file ---------------------------------------------------------------------- */

uint64_t core_spill_file_bytes(uint64_t spill_bytes)
{
    return arena_spill_file_bytes((uint32_t)(spill_bytes / SEGMENT_BYTES));
}

static int inspect_failed(char *text)
{
    int error = errno ? -errno : -EIO;

    snprintf(text, CORE_TEXT_MAX, "arena: its header cannot be read: %s", strerror(-error));
    return error;
}

int core_arena_inspect(int fd, core_arena_info *out, char *text)
{
    struct arena_header h;
    struct segment_desc d;

    memset(out, 0, sizeof(*out));
    errno = 0;
    if (pread(fd, &h, sizeof(h), 0) != (ssize_t)sizeof(h))
        return inspect_failed(text);
    out->fresh = h.magic == 0;
    if (h.magic != ARENA_MAGIC || h.version != ARENA_VERSION)
        return 0; /* whatever it is: core_open() says so */
    out->spill_bytes = (uint64_t)h.spill_segments * SEGMENT_BYTES;
    for (uint32_t i = 0; i < h.spill_segments; i++) {
        if (pread(fd, &d, sizeof(d), (off_t)(PAGE + ((uint64_t)h.segments + i) * sizeof(d))) !=
            (ssize_t)sizeof(d))
            return inspect_failed(text);
        out->spill_used += d.state != SEGMENT_FREE ? SEGMENT_BYTES : 0;
    }
    return 0;
}

/* ---- Life ------------------------------------------------------------------------------------ */

static void emit(void *owner, const core_event *event)
{
    reactor_emit(owner, event);
}

struct core *core_alloc(uint32_t reactors)
{
    size_t bytes = sizeof(struct core) + reactors * sizeof(struct reactor);
    core *c = aligned_alloc(_Alignof(core), bytes); /* calloc() aligns to 16 only */

    if (!c)
        return NULL;
    memset(c, 0, bytes);
    c->reactors = reactors;
    c->gate.places = reactors - 1;
    c->event_fd = -1;
    c->group.event = emit;
    c->group.event_owner = c;
    c->group.worker.wake_fd = c->group.packer.wake_fd = -1;
    pthread_mutex_init(&c->event_lock, NULL);
    pthread_mutex_init(&c->query_lock, NULL);
    pthread_cond_init(&c->query_done, NULL);
    for (uint32_t i = 0; i < reactors; i++) {
        struct reactor *r = &c->reactor[i];

        r->core = c;
        r->group = &c->group;
        r->writer = &c->group.writer[i];
        r->number = i;
        r->follows = i > 0;
        r->leads = i == 0 && reactors > 1;
        r->wake_fd = -1;
        pthread_mutex_init(&r->command_lock, NULL);
        r->block = aligned_alloc(PAGE, BLOCK_BYTES);
        if (!r->block) {
            core_free(c);
            return NULL;
        }
    }
    return c;
}

void core_free(struct core *c)
{
    for (uint32_t i = 0; i < c->reactors; i++)
        free(c->reactor[i].block);
    free(c);
}

/* One without a disk would have nothing to do. */
static uint32_t core_reactors(const core_config *config)
{
    uint32_t reactors = config->reactors ? config->reactors : 1;

    return reactors < config->disks ? reactors : config->disks;
}

static int check_config(const core_config *config, char *text)
{
    const char *wrong = NULL;

    if (config->disks == 0 || config->disks > CORE_DISKS_MAX)
        wrong = "a group has 1 to 32 disks";
    else if (config->arena_bytes < CORE_ARENA_BYTES_MIN || config->arena_bytes > 128ull << 30)
        wrong = "the arena has 8 MiB to 128 GiB";
    else if (config->spill_bytes > (128ull << 30) - config->arena_bytes)
        wrong = "arena and spill file have at most 128 GiB together";
    else if (config->dictionaries > CORE_DICTIONARIES_MAX)
        wrong = "a group has 16 dictionaries at most";
    else if (config->reactors > CORE_REACTORS_MAX)
        wrong = "a group has 1 to 8 reactors";
    else if (config->index_bytes > 0 &&
             config->index_bytes / core_reactors(config) < CORE_INDEX_BYTES_MIN)
        wrong = "the index has 2 MiB at least for each reactor";
    for (uint32_t i = 0; i < config->disks && !wrong; i++) {
        const core_disk_config *d = &config->disk[i];

        if (d->size_bytes == 0 || d->size_bytes % SECTOR_BYTES)
            wrong = "an image's size is a multiple of 512 bytes";
        else if (d->logical_block_bytes != 512 && d->logical_block_bytes != 4096)
            wrong = "logical blocks have 512 or 4096 bytes";
        else if (d->direct && d->size_bytes % d->logical_block_bytes)
            wrong = "with O_DIRECT an image's size is a multiple of its logical block";
        else if (d->direct && (d->memory_align == 0 || d->memory_align > PAGE))
            wrong = "memory alignment is 1 to 4096 bytes";
    }
    if (!wrong)
        return 0;
    snprintf(text, CORE_TEXT_MAX, "configuration: %s", wrong);
    return -EINVAL;
}

static int open_uring(struct reactor *r, const core_config *config, char *text)
{
    int files[DISK_SPILL + 1], error;
    const struct arena *a = &r->group->arena;
    bool arena = a->header && !r->follows; /* what it holds is the group's to write */
    uint32_t count = config->disks + 1;
    bool registered = false;

    memset(files, 0xff, sizeof(files)); /* -1: there is none */
    files[DISK_JOURNAL] = config->journal_fd;
    for (uint32_t i = 0; i < config->disks; i++)
        files[DISK_IMAGE(i)] = config->disk[i].fd;
    if (config->spill_bytes > 0) {
        files[DISK_SPILL] = config->spill_fd;
        count = DISK_SPILL + 1;
    }
    /* RAM only: the kernel does not pin a file's pages for good. What is behind RAM's last
     * segment must not be in it, the spill file's mapping begins there. */
    error = disk_uring_open(&r->uring, files, count, arena ? a->header : NULL,
                            arena ? a->header->data_offset +
                                        (uint64_t)a->segments * SEGMENT_BYTES : 0,
                            &registered);
    if (error) {
        snprintf(text, CORE_TEXT_MAX, "io_uring: %s%s", strerror(-error),
                 error == -ENOMEM ? "; raise the limit of locked memory (ulimit -l)" :
                 error == -EPERM ? "; see /proc/sys/kernel/io_uring_disabled" : "");
        return error;
    }
    if (arena && !registered)
        group_log(r->group, LOG_WARNING, "the arena could not be registered with io_uring: "
                  "commits cost more; raise the limit of locked memory (ulimit -l) above the "
                  "arena's size");
    r->disk = disk_uring_disk(r->uring);
    if (!r->follows) /* what completes for the group, others must not see happen */
        r->group->disk = r->leads ? disk_uring_later(r->uring) : r->disk;
    return 0;
}

static int open_descriptors(core *c, char *text)
{
    bool good;

    c->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    good = c->event_fd >= 0;
    for (uint32_t i = 0; i < c->reactors && good; i++) {
        c->reactor[i].wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        good = c->reactor[i].wake_fd >= 0;
    }
    if (good)
        return 0;
    snprintf(text, CORE_TEXT_MAX, "cannot create eventfds: %s", strerror(errno));
    return -errno;
}

/* Recovery is this thread's, with a ring of its own; the reactors open theirs. */
static int recover(core *c, const core_config *config, char *text)
{
    struct reactor *r = &c->reactor[0];
    int error = open_uring(r, config, text);

    if (error)
        return error;
    error = group_open(&c->group, config, r->disk, text);
    disk_uring_release(r->uring);
    disk_uring_close(r->uring);
    r->uring = NULL;
    return error;
}

int core_open(const core_config *config, core **out, char *text)
{
    int error = check_config(config, text);
    core *c;

    if (error)
        return error;
    c = core_alloc(core_reactors(config));
    if (!c) {
        snprintf(text, CORE_TEXT_MAX, "no memory to start");
        return -ENOMEM;
    }
    if (c->reactors > 1) {
        c->group.call = reactor_called;
        c->group.wake = reactor_wake;
    }
    error = open_descriptors(c, text);
    if (!error)
        error = recover(c, config, text);
    if (error) {
        c->group.config.disks = 0;
        core_close(c);
        return error;
    }
    for (uint32_t i = 0; i < config->disks; i++)
        blk_init(&c->blk[i], &c->reactor[i % c->reactors], i);
    *out = c;
    return 0;
}

uint32_t core_dictionaries_named(core *c)
{
    const struct dictionaries *d = &c->group.dictionaries;
    uint32_t bits = 0;

    for (uint32_t i = 0; i < CORE_DICTIONARIES_MAX; i++)
        bits |= (uint32_t)d->at[i].named << i;
    return bits;
}

int core_dictionary_add(core *c, const core_dictionary *dictionary, char *text)
{
    return dictionaries_add(&c->group.dictionaries, dictionary, text);
}

uint64_t core_metrics_bytes(void)
{
    return sizeof(struct metrics_page);
}

uint64_t core_metrics_bucket_low(uint32_t bucket)
{
    return metrics_bucket_low(bucket);
}

int core_metrics(core *c, int fd, const char *name, const char *control, char *text)
{
    struct group *g = &c->group;
    int error = metrics_open(&g->metrics, fd, g->journal.group, name, control);

    if (error)
        snprintf(text, CORE_TEXT_MAX, "live view: cannot map its shared memory: %s",
                 strerror(-error));
    for (uint32_t i = 0; i < c->reactors && !error; i++)
        metrics_share(&c->reactor[i].metrics, &g->metrics, i, c->reactors);
    return error;
}

/* The ring has to be set up by the thread that uses it. */
struct start {
    struct reactor *reactor;
    pthread_mutex_t lock;
    pthread_cond_t ready;
    bool done;
    int error;
    char *text;
};

static void *start_reactor(void *arg)
{
    struct start *s = arg;
    struct reactor *r = s->reactor;
    int error = open_uring(r, &r->group->config, s->text);

    pthread_mutex_lock(&s->lock);
    s->error = error;
    s->done = true;
    pthread_cond_signal(&s->ready);
    pthread_mutex_unlock(&s->lock); /* s is gone from here on */
    return error ? NULL : reactor_main(r);
}

/* Signals are the control thread's: ours start with all but the faults blocked. */
static void block_signals(sigset_t *before)
{
    static const int faults[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
    sigset_t all;

    sigfillset(&all);
    for (size_t i = 0; i < sizeof(faults) / sizeof(faults[0]); i++)
        sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, before);
}

static int start_thread(struct reactor *r, char *text)
{
    struct start s = {.reactor = r, .text = text};
    int error;

    pthread_mutex_init(&s.lock, NULL);
    pthread_cond_init(&s.ready, NULL);
    error = -pthread_create(&r->thread, NULL, start_reactor, &s);
    if (error) {
        snprintf(text, CORE_TEXT_MAX, "cannot start a reactor thread: %s", strerror(-error));
        return error;
    }
    pthread_mutex_lock(&s.lock);
    while (!s.done)
        pthread_cond_wait(&s.ready, &s.lock);
    pthread_mutex_unlock(&s.lock);
    if (s.error) {
        pthread_join(r->thread, NULL);
        return s.error;
    }
    r->started = true;
    return 0;
}

/* Those that run already when one cannot be started end with core_close(). */
static int start_threads(core *c, char *text)
{
    int error = memory_handle_sigbus();

    if (!error)
        error = group_start(&c->group, c->reactor[0].wake_fd, false);
    if (error) {
        snprintf(text, CORE_TEXT_MAX, "cannot start the helper thread: %s", strerror(-error));
        return error;
    }
    for (uint32_t i = 0; i < c->reactors && !error; i++)
        error = start_thread(&c->reactor[i], text);
    return error;
}

int core_start(core *c, char *text)
{
    sigset_t before;
    int error;

    block_signals(&before);
    error = start_threads(c, text);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

static void submit_to(struct reactor *r, struct command *command)
{
    uint64_t one = 1;

    pthread_mutex_lock(&r->command_lock);
    if (r->command_last)
        r->command_last->next = command;
    else
        r->command_first = command;
    r->command_last = command;
    __atomic_store_n(&r->commands, r->commands + 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&r->command_lock);
    if (write(r->wake_fd, &one, sizeof(one)) < 0) {
        /* EAGAIN: it is readable already */
    }
}

/* What is a disk's goes to its reactor, all else to the first. */
static void submit(core *c, struct command *command)
{
    bool of_group = command->kind <= COMMAND_QUERY_IDLE;

    submit_to(&c->reactor[of_group ? 0 : command->disk % c->reactors], command);
}

static struct command *command_new(enum command_kind kind, uint64_t token, uint32_t disk,
                                   uint32_t queue)
{
    struct command *command = calloc(1, sizeof(*command));

    check(command);
    check(disk < CORE_DISKS_MAX && queue < CORE_QUEUES_MAX);
    command->kind = kind;
    command->token = token;
    command->disk = disk;
    command->queue = queue;
    command->fd = -1;
    return command;
}

static void stop_thread(struct reactor *r)
{
    if (!r->started)
        return;
    submit_to(r, command_new(COMMAND_EXIT, 0, 0, 0));
    pthread_join(r->thread, NULL);
}

static void free_reactor(struct reactor *r)
{
    while (r->command_first) {
        struct command *command = r->command_first;

        r->command_first = command->next;
        free(command);
    }
    if (r->wake_fd >= 0)
        close(r->wake_fd);
}

void core_close(core *c)
{
    bool unsettled = false;

    for (uint32_t i = c->reactors; i-- > 0;) { /* the leader last: others may wait for it */
        stop_thread(&c->reactor[i]);
        unsettled |= c->reactor[i].unsettled;
    }
    if (unsettled)
        return; /* the kernel may still write to our buffers */
    for (uint32_t i = 0; i < c->reactors; i++)
        disk_uring_close(c->reactor[i].uring);
    for (uint32_t i = 0; i < c->group.config.disks; i++)
        blk_free(&c->blk[i]);
    group_close(&c->group); /* the helpers end, who write to the leader's wake_fd */
    for (uint32_t i = 0; i < c->reactors; i++)
        free_reactor(&c->reactor[i]);
    while (c->event_first) {
        struct event_node *n = c->event_first;

        c->event_first = n->next;
        free(n);
    }
    if (c->event_fd >= 0)
        close(c->event_fd);
    metrics_close(&c->group.metrics);
    core_free(c);
}

/* ---- Events ----------------------------------------------------------------------------------- */

int core_event_fd(core *c)
{
    return c->event_fd;
}

int core_next_event(core *c, core_event *out)
{
    struct event_node *n;

    pthread_mutex_lock(&c->event_lock);
    n = c->event_first;
    if (n) {
        c->event_first = n->next;
        if (!c->event_first)
            c->event_last = NULL;
        __atomic_sub_fetch(&c->events, 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&c->event_lock);
    if (!n)
        return 0;
    *out = n->event;
    free(n);
    return 1;
}

/* ---- Verbs ------------------------------------------------------------------------------------- */

static void submit_verb(core *c, uint64_t token, enum verb_kind kind, uint64_t epoch, bool newest)
{
    struct command *command = command_new(COMMAND_VERB, token, 0, 0);
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    command->verb = (struct verb){
        .kind = kind, .epoch = epoch, .newest = newest,
        .arrived_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec};
    submit(c, command);
}

void core_epoch_seal(core *c, uint64_t token)
{
    submit_verb(c, token, VERB_SEAL, 0, false);
}

void core_epoch_commit(core *c, uint64_t token, uint64_t epoch, int newest)
{
    submit_verb(c, token, VERB_COMMIT, epoch, newest != 0);
}

void core_epoch_discard(core *c, uint64_t token)
{
    submit_verb(c, token, VERB_DISCARD, 0, false);
}

void core_promote(core *c, uint64_t token)
{
    submit_verb(c, token, VERB_PROMOTE, 0, false);
}

void core_stop(core *c, uint64_t token)
{
    submit_verb(c, token, VERB_STOP, 0, false);
}

/* ---- Queries ------------------------------------------------------------------------------------ */

static int64_t query(core *c, enum command_kind kind, uint32_t disk, void *out, uint32_t max)
{
    struct command *command = command_new(kind, 0, disk, 0);
    int64_t result;

    command->out = out;
    command->max = max;
    submit(c, command);
    pthread_mutex_lock(&c->query_lock);
    while (!command->answered)
        pthread_cond_wait(&c->query_done, &c->query_lock);
    pthread_mutex_unlock(&c->query_lock);
    result = command->result;
    free(command);
    return result;
}

int core_query_status(core *c, core_status *out)
{
    return (int)query(c, COMMAND_QUERY_STATUS, 0, out, 0);
}

int core_query_epochs(core *c, core_epoch_info *out, uint32_t max)
{
    return (int)query(c, COMMAND_QUERY_EPOCHS, 0, out, max);
}

int core_arena_idle(core *c)
{
    return c->reactor[0].started ? (int)query(c, COMMAND_QUERY_IDLE, 0, NULL, 0) : 0;
}

int core_query_disk(core *c, uint32_t disk, core_disk_info *out)
{
    return (int)query(c, COMMAND_QUERY_DISK, disk, out, 0);
}

/* ---- vhost-user ----------------------------------------------------------------------------------- */

int core_vhost_memory(core *c, uint64_t token, uint32_t disk, const core_region *regions,
                      uint32_t count, char *text)
{
    struct memory *memory = NULL;
    struct command *command;
    int error = memory_create(regions, count, &memory, text);

    if (error)
        return error;
    command = command_new(COMMAND_MEMORY, token, disk, 0);
    command->memory = memory;
    submit(c, command);
    return 0;
}

int core_vhost_log(core *c, uint64_t token, uint32_t disk, int fd, uint64_t size,
                   uint64_t offset, char *text)
{
    struct mapping *mapping = NULL;
    struct command *command;
    int error;

    if (offset + size < offset || size == 0) {
        snprintf(text, CORE_TEXT_MAX, "dirty log of %llu bytes at offset %llu",
                 (unsigned long long)size, (unsigned long long)offset);
        return -EINVAL;
    }
    error = mapping_create(fd, offset + size, &mapping, text);
    if (error)
        return error;
    command = command_new(COMMAND_LOG, token, disk, 0);
    command->mapping = mapping;
    command->offset = offset;
    command->bytes = size;
    submit(c, command);
    return 0;
}

uint64_t core_inflight_bytes(uint32_t queues, uint32_t queue_size)
{
    return queues * inflight_queue_bytes(queue_size);
}

int core_vhost_inflight(core *c, uint64_t token, uint32_t disk, int fd, uint64_t size,
                        uint64_t offset, uint32_t queues, uint32_t queue_size, char *text)
{
    struct mapping *mapping = NULL;
    struct command *command;
    int error;

    if (offset + size < offset || offset % 8 || queues == 0 || queues > CORE_QUEUES_MAX ||
        queue_size == 0 || queue_size > CORE_QUEUE_SIZE_MAX ||
        size < core_inflight_bytes(queues, queue_size)) {
        snprintf(text, CORE_TEXT_MAX, "in-flight region of %llu bytes at offset %llu for %u "
                 "queues of %u", (unsigned long long)size, (unsigned long long)offset, queues,
                 queue_size);
        return -EINVAL;
    }
    error = mapping_create(fd, offset + size, &mapping, text);
    if (error)
        return error;
    command = command_new(COMMAND_INFLIGHT, token, disk, 0);
    command->mapping = mapping;
    command->offset = offset;
    command->queues = queues;
    command->queue_size = queue_size;
    submit(c, command);
    return 0;
}

void core_vhost_features(core *c, uint64_t token, uint32_t disk, uint64_t features)
{
    struct command *command = command_new(COMMAND_FEATURES, token, disk, 0);

    command->value = features;
    submit(c, command);
}

static void submit_value(core *c, enum command_kind kind, uint64_t token, uint32_t disk,
                         uint32_t queue, uint64_t value)
{
    struct command *command = command_new(kind, token, disk, queue);

    command->value = value;
    submit(c, command);
}

void core_vring_size(core *c, uint64_t token, uint32_t disk, uint32_t queue, uint32_t size)
{
    submit_value(c, COMMAND_SIZE, token, disk, queue, size);
}

void core_vring_addr(core *c, uint64_t token, uint32_t disk, uint32_t queue, uint32_t flags,
                     uint64_t desc, uint64_t avail, uint64_t used, uint64_t log)
{
    struct command *command = command_new(COMMAND_ADDR, token, disk, queue);

    command->flags = flags;
    command->desc = desc;
    command->avail = avail;
    command->used = used;
    command->log = log;
    submit(c, command);
}

void core_vring_base(core *c, uint64_t token, uint32_t disk, uint32_t queue, uint32_t base)
{
    submit_value(c, COMMAND_BASE, token, disk, queue, base);
}

static int submit_fd(core *c, enum command_kind kind, uint64_t token, uint32_t disk,
                     uint32_t queue, int fd, char *text)
{
    struct command *command;
    const char *why;

    if (fd >= 0 && !notifier_takes(fd, &why)) {
        snprintf(text, CORE_TEXT_MAX, "virtqueue %u: %s; kicks, calls and errors take an eventfd",
                 queue, why);
        close(fd);
        return -EINVAL;
    }
    if (fd >= 0) /* before Linux 5.8 nothing else keeps a read from waiting */
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    command = command_new(kind, token, disk, queue);
    command->fd = fd;
    submit(c, command);
    return 0;
}

int core_vring_kick(core *c, uint64_t token, uint32_t disk, uint32_t queue, int fd, char *text)
{
    return submit_fd(c, COMMAND_KICK, token, disk, queue, fd, text);
}

int core_vring_call(core *c, uint64_t token, uint32_t disk, uint32_t queue, int fd, char *text)
{
    return submit_fd(c, COMMAND_CALL, token, disk, queue, fd, text);
}

int core_vring_err(core *c, uint64_t token, uint32_t disk, uint32_t queue, int fd, char *text)
{
    return submit_fd(c, COMMAND_ERR, token, disk, queue, fd, text);
}

void core_vring_enable(core *c, uint64_t token, uint32_t disk, uint32_t queue, int on)
{
    submit_value(c, COMMAND_ENABLE, token, disk, queue, on != 0);
}

void core_vring_stop(core *c, uint64_t token, uint32_t disk, uint32_t queue)
{
    submit_value(c, COMMAND_STOP, token, disk, queue, 0);
}

void core_vhost_reset(core *c, uint64_t token, uint32_t disk)
{
    submit_value(c, COMMAND_RESET, token, disk, 0, 0);
}
