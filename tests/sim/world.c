/* world.c - see world.h. */
#include "world.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zdict.h>

#include "check.h"

typedef unsigned long long ull;

#define STEPS_MAX 20000u

const char *const crash_names[CRASH_KINDS] = {"power cut", "agent killed",
                                              "agent killed and arena removed",
                                              "agent killed in its first recovery"};

/* ---- Failures --------------------------------------------------------------------------- */

void sim_fail(struct world *w, const char *format, ...)
{
    struct sim *s = w->sim;
    va_list args;
    int n;

    if (s->failed)
        return;
    s->failed = true;
    s->failed_depth = w->depth;
    va_start(args, format);
    n = vsnprintf(s->failure, sizeof(s->failure), format, args);
    va_end(args);
    snprintf(s->failure + n, sizeof(s->failure) - (size_t)n, " [crash depth %u]", w->depth);
}

/* ---- Events of the group ---------------------------------------------------------------- */

static void acknowledged(struct world *w, uint64_t id)
{
    w->sim->commits++;
    if (id > w->model.committed_id && !model_committed(&w->model, id))
        sim_fail(w, "commit %llu was acknowledged, which is no sealed epoch", (ull)id);
}

static void on_event(void *owner, const core_event *event)
{
    struct world *w = owner;

    w->changes++;
    switch (event->type) {
    case CORE_EVENT_SEALED:
        model_sealed(&w->model, event->value);
        break;
    case CORE_EVENT_COMMITTED:
        acknowledged(w, event->value);
        break;
    case CORE_EVENT_DISCARDED:
        model_discarded(&w->model, event->last);
        break;
    case CORE_EVENT_DONE:
        w->waiting--;
        w->last_result = event->result;
        w->last_value = event->value;
        memcpy(w->text, event->text, sizeof(w->text));
        if (event->token == VERB_PROMOTE && event->result == 0) {
            w->model.mode = CORE_ACTIVE;
            w->model.generation = event->value;
            w->model.promoting = false;
        }
        break;
    case CORE_EVENT_IO_ERROR:
        if (w->disk.faults == 0 && event->result != -EFBIG)
            sim_fail(w, "I/O error without a fault: %s", event->text);
        break;
    default:
        break;
    }
}

/* ---- Set-up ----------------------------------------------------------------------------- */

static void on_point(void *owner, const char *what)
{
    (void)what;
    world_point(owner);
}

#define SPILL_BYTES ((SIM_SPILL_SEGMENTS + 1) * SEGMENT_BYTES)

static struct world *world_new(struct sim *s, uint32_t depth)
{
    struct world *w = calloc(1, sizeof(*w));

    check(w);
    w->sim = s;
    w->depth = depth;
    w->arena_bytes = page_round_up(PAGE + (SIM_SEGMENTS + SIM_SPILL_SEGMENTS) *
                                              sizeof(struct segment_desc)) +
                     SIM_SEGMENTS * SEGMENT_BYTES;
    w->arena_fd = memfd_create("arena", MFD_CLOEXEC);
    check(w->arena_fd >= 0 && ftruncate(w->arena_fd, (off_t)w->arena_bytes) == 0);
    w->arena = mmap(NULL, w->arena_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                    w->arena_fd, 0);
    check(w->arena != MAP_FAILED);
    w->spill_fd = memfd_create("spill", MFD_CLOEXEC);
    check(w->spill_fd >= 0 && ftruncate(w->spill_fd, SPILL_BYTES) == 0);
    w->spill = mmap(NULL, SPILL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                    w->spill_fd, 0);
    check(w->spill != MAP_FAILED);
    return w;
}

struct sim *sim_new(void)
{
    struct sim *s = calloc(1, sizeof(*s));

    check(s);
    for (uint32_t i = 0; i < SIM_DEPTH; i++)
        s->world[i] = world_new(s, i);
    return s;
}

void sim_free(struct sim *s)
{
    for (uint32_t i = 0; i < SIM_DEPTH; i++) {
        munmap(s->world[i]->arena, s->world[i]->arena_bytes);
        close(s->world[i]->arena_fd);
        munmap(s->world[i]->spill, SPILL_BYTES);
        close(s->world[i]->spill_fd);
        free(s->world[i]);
    }
    free(s);
}

static void arena_wipe(struct world *w)
{
    /* What a fresh object must be sure of; old frames behind the tables must not matter. */
    memset(w->arena, 0, PAGE);
}

/* Of some of the patterns that are written. */
static core_dictionary the_dictionary(void)
{
    enum { ID = 40000, SAMPLES = 64, BYTES = 2048 };
    static uint8_t made[BYTES], content[2 * SECTOR_BYTES], sample[SAMPLES * SECTOR_BYTES];
    static size_t bytes, sizes[SAMPLES];
    ZDICT_params_t params = {.dictID = ID};

    for (uint32_t i = 0; bytes == 0 && i < SAMPLES; i++) {
        sizes[i] = SECTOR_BYTES;
        memcpy(sample + i * SECTOR_BYTES, model_pattern(1 + i), SECTOR_BYTES);
        if (i < 2)
            memcpy(content + i * SECTOR_BYTES, model_pattern(1 + i), SECTOR_BYTES);
    }
    if (bytes == 0)
        bytes = ZDICT_finalizeDictionary(made, BYTES, content, sizeof(content), sample, sizes,
                                         SAMPLES, params);
    check(!ZDICT_isError(bytes));
    return (core_dictionary){.data = made, .bytes = bytes, .id = ID};
}

static void configure(struct world *w, const struct setup *setup)
{
    core_config *c = &w->config;
    uint64_t bytes[SIM_FILES_MAX] = {JOURNAL_SUPER_SLOTS * PAGE + setup->ring_bytes};
    uint32_t align[SIM_FILES_MAX] = {PAGE};

    memset(c, 0, sizeof(*c));
    c->disks = setup->disks;
    c->workers = 1;
    c->reactors = setup->reactors;
    c->journal_fd = -1;
    c->journal_direct = c->journal_fua = setup->journal_fua;
    c->apply_rate = setup->apply_rate;
    c->arena_fd = w->arena_fd;
    c->arena_bytes = w->arena_bytes - (SIM_SEGMENTS - setup->segments) * SEGMENT_BYTES;
    c->spill_fd = w->spill_fd;
    c->spill_bytes = setup->spill_segments * SEGMENT_BYTES;
    c->compress_level = setup->compress_level;
    c->dictionaries = setup->dictionary;
    if (setup->dictionary)
        c->dictionary[0] = the_dictionary();
    for (uint32_t i = 0; i < setup->disks; i++) {
        core_disk_config *d = &c->disk[i];

        d->fd = -1;
        d->size_bytes = setup->bytes[i];
        d->logical_block_bytes = i == 1 ? BLOCK_BYTES : SECTOR_BYTES;
        snprintf(d->name, sizeof(d->name), "disk%u", i);
        bytes[i + 1] = setup->bytes[i];
        align[i + 1] = d->logical_block_bytes;
    }
    sim_disk_init(&w->disk, bytes, align, setup->disks + 1);
    w->disk.point = on_point;
    w->disk.owner = w;
    w->disk.no_fallocate = setup->no_fallocate;
    w->disk.spill = setup->spill_segments ? w->spill : NULL;
    w->disk.spill_bytes = SPILL_BYTES;
    w->disk.sync_lies = setup->sync_lies;
    w->waiting = w->flushes = 0;
    w->up = w->opening = w->retried = false;
    w->now = 1;
}

/* As core_journal_format() does, which works on a descriptor. */
static void format_journal(struct world *w, uint64_t ring_bytes)
{
    struct journal_super *page = calloc(1, PAGE);

    check(page);
    page->magic = JOURNAL_MAGIC;
    page->version = JOURNAL_VERSION;
    page->super_seq = JOURNAL_SUPER_SLOTS;
    page->file_bytes = JOURNAL_LOG_OFFSET + ring_bytes;
    page->epoch_limit = 1;
    page->mode = CORE_STANDBY;
    page->generation = 1;
    page->disks = w->config.disks;
    page->clean = 1;
    for (uint32_t i = 0; i < w->config.disks; i++) {
        page->disk[i].size_bytes = w->config.disk[i].size_bytes;
        memcpy(page->disk[i].name, w->config.disk[i].name, sizeof(page->disk[i].name));
    }
    page->crc = journal_super_crc(page);
    sim_disk_poke(&w->disk, DISK_JOURNAL, 0, page, PAGE);
    free(page);
}

void world_begin(struct sim *s, const struct setup *setup, uint64_t seed)
{
    struct world *w = s->world[0];

    for (uint32_t i = 0; i < SIM_DEPTH; i++)
        configure(s->world[i], setup);
    w->rng.state = rng_mix(seed, 1);
    w->disk.rng.state = rng_mix(seed, 2);
    s->pick.state = rng_mix(seed, 3);
    s->failed = false;
    s->reactors = setup->reactors;
    arena_wipe(w);
    format_journal(w, setup->ring_bytes);
    model_init(&w->model, setup->bytes, setup->disks);
    if (!world_open(w, CRASH_HOST))
        return;
    w->disk.fault_percent = setup->fault_percent;
}

void world_end(struct world *w)
{
    struct sim *s = w->sim;

    world_close(w);
    for (uint32_t i = 0; i < SIM_DEPTH; i++)
        sim_disk_free(&s->world[i]->disk);
}

/* ---- Checks ----------------------------------------------------------------------------- */

static bool same(const uint8_t *got, uint32_t value)
{
    static const uint8_t zero[SECTOR_BYTES];

    return memcmp(got, value ? model_pattern(value) : zero, SECTOR_BYTES) == 0;
}

/* What a wrong sector holds, for the report. */
static int value_of(const uint8_t *got)
{
    for (uint32_t v = 0; v < MODEL_VALUES; v++)
        if (same(got, v))
            return (int)v;
    return -1;
}

static void check_block(struct world *w, uint32_t disk, uint64_t block, uint8_t want)
{
    static _Alignas(4096) uint8_t out[BLOCK_BYTES];
    const struct model *m = &w->model;
    const uint8_t *direct, *image = w->disk.file[DISK_IMAGE(disk)].current.data;
    int found = epoch_read(&w->group, disk, block, want, out, &direct);

    if (found < 0) {
        sim_fail(w, "disk %u block %llu cannot be read", disk, (ull)block);
        return;
    }
    for (uint32_t i = 0; i < BLOCK_SECTORS; i++) {
        uint64_t sector = block * BLOCK_SECTORS + i;
        const uint8_t *got = image + sector * SECTOR_BYTES;
        uint32_t value;

        if (!(want & 1u << i))
            continue;
        if (found & 1 << i)
            got = direct ? direct + i * SECTOR_BYTES : out + i * SECTOR_BYTES;
        value = m->open.sector[m->first[disk] + sector];
        if (!same(got, value)) {
            sim_fail(w, "disk %u sector %llu reads %d, expected %u%s (committed %llu, open %llu)",
                     disk, (ull)sector, value_of(got), value, found & 1 << i ? "" : " (image)",
                     (ull)w->group.committed, (ull)epoch_open(&w->group)->id);
            return;
        }
    }
}

void world_check_reads(struct world *w)
{
    const struct model *m = &w->model;

    for (uint32_t d = 0; d < m->disks && !w->sim->failed; d++) {
        uint32_t sectors = m->first[d + 1] - m->first[d];

        for (uint32_t at = 0; at < sectors && !w->sim->failed; at += BLOCK_SECTORS) {
            uint32_t n = sectors - at < BLOCK_SECTORS ? sectors - at : BLOCK_SECTORS;

            check_block(w, d, at / BLOCK_SECTORS, (uint8_t)((1u << n) - 1));
        }
    }
}

void world_check_images(struct world *w)
{
    const struct model *m = &w->model;

    for (uint32_t d = 0; d < m->disks; d++) {
        const struct sim_file *f = &w->disk.file[DISK_IMAGE(d)];
        uint32_t sectors = m->first[d + 1] - m->first[d];

        for (uint32_t i = 0; i < sectors; i++) {
            uint64_t at = (uint64_t)i * SECTOR_BYTES;
            uint32_t value = m->committed.sector[m->first[d] + i];
            const uint8_t *got = f->durable.data + at;

            if (f->durable.version[at / SIM_PAGE] != f->current.version[at / SIM_PAGE] &&
                same(got, value))
                got = f->current.data + at;
            if (!same(got, value)) {
                sim_fail(w, "image of disk %u, sector %u holds %d, expected %u of epoch %llu%s", d,
                         i, value_of(got), value, (ull)m->committed_id,
                         got == f->durable.data + at ? " (on the medium)" : " (in the cache)");
                return;
            }
        }
    }
}

static void check_mode(struct world *w)
{
    struct group *g = &w->group;
    struct model *m = &w->model;

    if (g->mode == m->mode && g->generation == m->generation)
        return;
    if (m->promoting && g->mode == CORE_ACTIVE && g->generation == m->generation + 1) {
        m->mode = g->mode;
        m->generation = g->generation;
        return;
    }
    sim_fail(w, "mode %u generation %llu, expected %u and %llu", g->mode, (ull)g->generation,
             m->mode, (ull)m->generation);
}

/* Recovery chose an epoch; from now on only that one is right. */
static void resolve(struct world *w, enum crash_kind after)
{
    struct group *g = &w->group;
    struct model *m = &w->model;
    uint64_t id = g->committed, open = epoch_open(g)->id;

    check_mode(w);
    if (!model_allowed(m, id)) {
        sim_fail(w, "recovered epoch %llu, acknowledged was %llu", (ull)id, (ull)m->committed_id);
        return;
    }
    if (after == CRASH_AGENT) {
        if (open != m->id_used)
            sim_fail(w, "the open epoch is %llu, it was %llu", (ull)open, (ull)m->id_used);
        /* A commit that was in flight has happened or not: no later start may say otherwise. */
        if (id != m->committed_id)
            model_committed(m, id);
        m->attempts = 0;
        if (g->epochs < m->sealed_count + 1)
            sim_fail(w, "%u sealed epochs are left of %u", g->epochs - 1, m->sealed_count);
        return;
    }
    if (open <= m->id_used && m->id_used > 1)
        sim_fail(w, "epoch id %llu is used again (used up to %llu)", (ull)open, (ull)m->id_used);
    model_restarted(m, id);
    m->id_used = open;
    m->promoting &= after != CRASH_HOST;
}

bool world_open(struct world *w, enum crash_kind after)
{
    struct group *g = &w->group;
    int error;

    memset(g, 0, sizeof(*g));
    g->event = on_event;
    g->event_owner = w;
    g->now_ns = w->now;
    w->waiting = w->flushes = 0;
    w->opening = true;
    error = group_open(g, &w->config, &w->disk.disk, w->text);
    w->opening = false;
    w->disk.mapped = g->arena.spill.base;
    w->disk.mapped_bytes = g->arena.spill.bytes;
    if (error) {
        sim_fail(w, "recovery refused (%d): %s", error, w->text);
        return false;
    }
    check(group_start(g, -1, true) == 0);
    w->up = true;
    if (g->checkpoint.first) /* lost acknowledged epochs, committed anew */
        w->waiting++;
    resolve(w, after);
    if (!w->sim->failed)
        world_check_reads(w);
    return !w->sim->failed;
}

/* ---- Running ---------------------------------------------------------------------------- */

/* Commits that the group has begun count as attempts before their first write. */
static void watch_attempts(struct world *w)
{
    const struct group *g = &w->group;

    if (g->journal.commit.phase != COMMIT_IDLE)
        model_attempt(&w->model, g->journal.commit.last);
    if (g->checkpoint.saving && g->checkpoint.first &&
        g->checkpoint.first->kind == VERB_PROMOTE && w->model.mode == CORE_STANDBY)
        w->model.promoting = true;
}

bool world_step(struct world *w)
{
    struct group *g = &w->group;
    bool moved;
    uint64_t timer;

    if (w->sim->failed)
        return false;
    g->now_ns = w->now += 1000;
    moved = group_step(g);
    if (moved)
        w->changes++;
    world_point(w);
    moved |= disk_reap(&w->disk.disk, false) > 0;
    if (w->disk.breach)
        sim_fail(w, "contract of the seam: %s", w->disk.breach);
    timer = group_timer(g);
    if (!moved && w->disk.flying_count == 0 && timer > w->now) {
        w->now = timer;
        moved = true;
    }
    return moved || w->disk.flying_count > 0;
}

void world_drain(struct world *w)
{
    for (uint32_t i = 0; world_step(w); i++) {
        if (i < STEPS_MAX)
            continue;
        sim_fail(w, "the core does not come to rest (commit phase %d, apply phase %d, error \"%s\")",
                 w->group.journal.commit.phase, w->group.apply.phase, w->group.error);
    }
    if (w->sim->failed)
        return;
    if (w->waiting || w->flushes)
        sim_fail(w, "%u verbs and %u flushes were never answered", w->waiting, w->flushes);
    else if (w->group.journal.pending_count)
        sim_fail(w, "%u committed records are never applied", w->group.journal.pending_count);
}

static bool room(struct world *w, uint32_t disk, uint64_t blocks)
{
    struct writer *writer = group_writer(&w->group, disk);
    bool moved = true;

    for (uint32_t i = 0; i < 40 && moved; i++) {
        epoch_batch_begin(writer);
        if (!epoch_room(writer, blocks)) {
            writer_want(writer, blocks);
            writer_round(writer);
        }
        if (!epoch_room(writer, blocks))
            writer_hold(writer, blocks);
        epoch_batch_end(writer); /* frames are shown one by one: a crash may come after each */
        if (w->sim->failed || epoch_room(writer, blocks))
            break;
        moved = world_step(w);
    }
    return !w->sim->failed && epoch_room(writer, blocks);
}

bool world_write(struct world *w, uint32_t disk, uint32_t sector, uint32_t sectors, bool zeroes)
{
    static uint8_t data[16 * BLOCK_BYTES];
    struct model *m = &w->model;
    struct span span = {.ptr = data, .bytes = (uint64_t)sectors * SECTOR_BYTES};
    struct span_cursor from = span_start(&span, 1);

    check(span.bytes <= sizeof(data));
    if (!room(w, disk, sectors / BLOCK_SECTORS + 2))
        return false;
    for (uint32_t i = 0; i < sectors; i++) {
        uint32_t value = zeroes ? 0 : model_fresh_value(m);

        if (value)
            memcpy(data + i * SECTOR_BYTES, model_pattern(value), SECTOR_BYTES);
        else
            memset(data + i * SECTOR_BYTES, 0, SECTOR_BYTES);
        m->open.sector[m->first[disk] + sector + i] = (uint16_t)value;
    }
    check(epoch_write(&w->group, disk, sector, &from, span.bytes) == 0);
    w->changes++;
    return true;
}

bool world_zero(struct world *w, uint32_t disk, uint32_t sector, uint32_t sectors, bool unmap)
{
    struct model *m = &w->model;

    if (!room(w, disk, 8))
        return false;
    for (uint32_t i = 0; i < sectors; i++)
        m->open.sector[m->first[disk] + sector + i] = 0;
    check(epoch_zero(&w->group, disk, sector, sectors, unmap ? FRAME_UNMAP : 0) == 0);
    w->changes++;
    return true;
}

void world_verb(struct world *w, enum verb_kind kind, uint64_t epoch)
{
    struct verb v = {.kind = kind, .token = kind, .epoch = epoch, .newest = epoch == 0};

    w->waiting++;
    check(checkpoint_submit(&w->group, &v) == 0);
}

struct flush {
    struct flush_waiter waiter;
    struct world *world;
};

static void flush_free(struct flush_waiter *waiter)
{
    free((struct flush *)waiter);
}

static void flushed(struct flush_waiter *waiter)
{
    struct flush *f = (struct flush *)waiter;

    f->world->flushes--;
    /* In standby, where a failed promote leads back to, a flush orders and no more. */
    if (f->world->group.mode == CORE_ACTIVE && waiter->epoch > f->world->model.committed_id)
        sim_fail(f->world, "a flush of epoch %llu was answered, committed is %llu",
                 (ull)waiter->epoch, (ull)f->world->model.committed_id);
    free(f);
}

void world_flush(struct world *w)
{
    struct flush *f = calloc(1, sizeof(*f));

    check(f);
    f->waiter.done = flushed;
    f->world = w;
    if (checkpoint_flush(&w->group, &f->waiter))
        free(f);
    else
        w->flushes++;
}

void world_close(struct world *w)
{
    while (w->up && w->group.checkpoint.waiters) {
        struct flush_waiter *next = w->group.checkpoint.waiters->next;

        flush_free(w->group.checkpoint.waiters);
        w->group.checkpoint.waiters = next;
    }
    if (w->up) {
        w->sim->clusters += w->group.stats.clusters;
        w->sim->merges += w->group.stats.merges;
        w->sim->with_dictionary += w->group.stats.dictionary_frames;
        w->sim->spilled += w->group.stats.spill_bytes / PAGE;
        w->disk.mapped = NULL;
        group_close(&w->group);
    }
    w->up = false;
}

/* ---- Crashing --------------------------------------------------------------------------- */

static void arena_copy(struct world *to, const struct world *from)
{
    const struct arena_header *h = (const struct arena_header *)from->arena;
    const struct segment_desc *desc = (const struct segment_desc *)(from->arena + PAGE);
    uint64_t data = h->data_offset;

    memcpy(to->arena, from->arena,
           PAGE + (SIM_SEGMENTS + SIM_SPILL_SEGMENTS) * sizeof(*desc));
    for (uint32_t i = 0; i < h->segments && data; i++)
        if (desc[i].state != SEGMENT_FREE && desc[i].tail <= SEGMENT_BYTES)
            memcpy(to->arena + data + (uint64_t)i * SEGMENT_BYTES,
                   from->arena + data + (uint64_t)i * SEGMENT_BYTES, desc[i].tail);
}

struct world *world_crash(struct world *w, enum crash_kind kind, const struct sim_outcome *o)
{
    struct world *v = w->sim->world[w->depth + 1];

    check(!v->up && o->host == (kind == CRASH_HOST));
    if (w->up)
        watch_attempts(w);
    sim_disk_fork(&v->disk, &w->disk, o);
    if (kind == CRASH_AGENT || kind == CRASH_AGENT_EARLY)
        arena_copy(v, w);
    else
        arena_wipe(v);
    model_copy(&v->model, &w->model);
    v->now = w->now;
    v->rng.state = rng_mix(w->rng.state, o->torn_seed + o->whole);
    v->disk.faults = 0;
    v->retried = false;
    if (w->sim->reactors > 1) /* a restart may have another number of them */
        v->config.reactors = 1 + rng_below(&v->rng, MODEL_DISKS_MAX);
    return v;
}

/* Everything that is left goes on: seals, commits, and is on the images at the end. */
static void go_on(struct world *w)
{
    struct model *m = &w->model;
    uint32_t disk = rng_below(&w->rng, m->disks);
    bool discard = m->mode == CORE_STANDBY && rng_chance(&w->rng, 25);

    world_write(w, disk, disk == 1 ? 0 : rng_below(&w->rng, 9), 1 + rng_below(&w->rng, 12), false);
    if (discard) {
        world_verb(w, VERB_DISCARD, 0);
    } else {
        world_verb(w, VERB_SEAL, 0);
        world_verb(w, VERB_COMMIT, 0);
    }
    world_drain(w);
    if (w->sim->failed)
        return;
    if (w->last_result == -EFBIG && !discard)
        return; /* a ring this small does not take all that was sealed */
    if (w->last_result)
        sim_fail(w, "the last verb after recovery failed: %s", w->text);
    else if (memcmp(&m->open, &m->committed, m->sectors * sizeof(m->open.sector[0])) != 0)
        sim_fail(w, "not everything is committed after seal and commit");
    world_check_reads(w);
    world_check_images(w);
}

static void verify(struct world *w)
{
    struct model *m = &w->model;
    uint64_t id = m->committed_id;

    world_drain(w);
    if (w->sim->failed)
        return;
    if (w->group.applied != m->committed_id)
        sim_fail(w, "applied is %llu, committed %llu", (ull)w->group.applied,
                 (ull)m->committed_id);
    world_check_images(w);
    if (id) { /* asking again gives the same answer */
        world_verb(w, VERB_COMMIT, id);
        world_drain(w);
        if (!w->sim->failed && (w->last_result || w->last_value < id))
            sim_fail(w, "commit %llu asked again: %lld, %s", (ull)id, (long long)w->last_result,
                     w->text);
    }
    if (!w->sim->failed && rng_chance(&w->rng, 25))
        go_on(w);
}

void world_try(struct world *w, enum crash_kind kind, const struct sim_outcome *o)
{
    struct sim *s = w->sim;
    struct world *v;

    /* Killed while it filled a new arena: nothing of it counts. */
    if (kind == CRASH_AGENT && ((const struct arena_header *)w->arena)->magic == 0)
        kind = CRASH_AGENT_EARLY;
    v = world_crash(w, kind, o);
    s->states++;
    s->kinds[kind]++;
    s->nested += w->depth > 0;
    if (world_open(v, kind))
        verify(v);
    if (s->failed) {
        char text[sizeof(s->failure)];

        memcpy(text, s->failure, sizeof(text));
        snprintf(s->failure, sizeof(s->failure),
                 "%.700s\n    after: %s, %u writes not durable, outcome %s%llx", text,
                 crash_names[kind], w->disk.writes, o->torn_seed ? "torn " : "subset ",
                 (ull)(o->torn_seed ? o->torn_seed : o->whole));
    }
    world_close(v);
}

static enum crash_kind pick_kind(struct sim *s)
{
    uint32_t dice = rng_below(&s->pick, 100);

    return dice < 55 ? CRASH_HOST : dice < 85 ? CRASH_AGENT : CRASH_AGENT_NO_ARENA;
}

static void try_random(struct world *w, enum crash_kind kind)
{
    struct sim_outcome o = {.host = kind == CRASH_HOST, .torn_seed = rng_next(&w->sim->pick) | 1};

    world_try(w, kind, &o);
}

/* All legal outcomes when there are few, the two extremes and samples when there are many. */
static void try_all(struct world *w, enum crash_kind kind)
{
    struct sim *s = w->sim;
    uint32_t n = 0, shift = 0;

    for (uint32_t i = 0; i < w->disk.writes; i++) {
        bool flying = w->disk.write[i]->done == 0;

        if (kind != CRASH_HOST && !flying)
            shift++;
        else
            n++;
    }
    if (n <= s->subsets_max) {
        for (uint64_t bits = 0; bits < 1ull << n && !s->failed; bits++)
            world_try(w, kind, &(struct sim_outcome){.host = kind == CRASH_HOST,
                                                     .whole = bits << shift});
    } else {
        world_try(w, kind, &(struct sim_outcome){.host = kind == CRASH_HOST});
        if (!s->failed)
            world_try(w, kind, &(struct sim_outcome){.host = kind == CRASH_HOST, .whole = ~0ull});
    }
    for (uint32_t i = 0; n > 0 && i < s->samples && !s->failed; i++)
        try_random(w, kind);
}

void world_point(struct world *w)
{
    struct sim *s = w->sim;
    uint64_t now = w->disk.changes + w->changes;

    if (w->up)
        watch_attempts(w);
    if (s->failed || w->depth + 1 >= SIM_DEPTH || w->seen == now)
        return;
    if (s->states >= s->deadline)
        return;
    w->seen = now;
    s->points++;
    if (w->depth > 0) {
        if (rng_chance(&s->pick, s->nested_percent))
            try_random(w, pick_kind(s));
        return;
    }
    if (!rng_chance(&s->pick, s->crash_percent))
        return;
    for (uint32_t kind = 0; kind <= CRASH_AGENT_NO_ARENA && !s->failed; kind++)
        try_all(w, kind);
}
