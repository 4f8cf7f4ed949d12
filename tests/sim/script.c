/* script.c - see script.h. */
#include "script.h"

#include <string.h>

#include "check.h"

static const char *const kind_names[] = {
    "write", "write zeroes", "discard blocks", "seal", "commit newest", "commit oldest",
    "discard", "promote", "flush", "run", "drain", "crash", "seal many",
};

/* ---- Making ----------------------------------------------------------------------------- */

static void make_setup(struct setup *u, struct rng *r)
{
    static const uint64_t sizes[MODEL_DISKS_MAX] = {
        20 * BLOCK_BYTES + 3 * SECTOR_BYTES, /* ends within a block */
        12 * BLOCK_BYTES,
        8 * BLOCK_BYTES,
    };

    memset(u, 0, sizeof(*u));
    u->disks = 1 + rng_below(r, MODEL_DISKS_MAX);
    memcpy(u->bytes, sizes, sizeof(sizes));
    /* A commit of the whole arena fits; larger rings take longer to wrap. */
    u->segments = rng_chance(r, 50) ? SIM_SEGMENTS : 5 + rng_below(r, 5);
    u->ring_bytes = (u->segments * (SEGMENT_BYTES / PAGE) + 2 + rng_below(r, 6)) * PAGE;
    u->compress_level = rng_chance(r, 50);
    u->dictionary = u->compress_level && r->state % 5 < 2; /* nothing drawn: the rest stays */
    if (rng_chance(r, 50))
        u->fault_percent = 3 + rng_below(r, 20);
    u->spill_segments = r->state % 7 < 2 ? SIM_SPILL_SEGMENTS : 0; /* nothing drawn either */
    u->ring_bytes += (uint64_t)u->spill_segments * SEGMENT_BYTES;
    u->no_fallocate = rng_chance(r, 20);
    u->apply_rate = rng_chance(r, 15) ? 1u << (10 + rng_below(r, 12)) : 0;
    u->journal_fua = rng_chance(r, 70);
    u->reactors = rng_chance(r, 60) ? 1 : 2 + rng_below(r, MODEL_DISKS_MAX - 1);
}

static void make_step(struct step *t, const struct setup *u, struct rng *r, bool thorough)
{
    static const uint8_t mix[] = {
        STEP_WRITE, STEP_WRITE, STEP_WRITE, STEP_WRITE, STEP_WRITE, STEP_WRITE_ZEROES,
        STEP_DISCARD_RANGE, STEP_SEAL, STEP_SEAL, STEP_COMMIT, STEP_COMMIT, STEP_COMMIT,
        STEP_COMMIT_OLDEST, STEP_RUN, STEP_FLUSH, STEP_SEAL,
    };
    uint32_t sectors, grain;

    memset(t, 0, sizeof(*t));
    t->kind = mix[rng_below(r, sizeof(mix))];
    if (rng_chance(r, 5))
        t->kind = STEP_DISCARD;
    else if (rng_chance(r, 2))
        t->kind = STEP_PROMOTE;
    else if (rng_chance(r, 3))
        t->kind = STEP_DRAIN;
    else if (rng_chance(r, 3))
        t->kind = STEP_SEAL_MANY;
    else if (rng_chance(r, thorough ? 4 : 3))
        t->kind = STEP_CRASH;
    t->disk = (uint8_t)rng_below(r, u->disks);
    grain = t->disk == 1 ? BLOCK_SECTORS : 1; /* of 4 KiB logical blocks; below, too, sometimes */
    if (rng_chance(r, 30))
        grain = 1;
    sectors = (uint32_t)(u->bytes[t->disk] / SECTOR_BYTES) / grain;
    t->sector = (uint16_t)rng_below(r, sectors);
    t->sectors = (uint16_t)(1 + rng_below(r, t->kind == STEP_WRITE ? 24 : 100));
    if (t->sectors > sectors - t->sector)
        t->sectors = (uint16_t)(sectors - t->sector);
    t->sector = (uint16_t)(t->sector * grain);
    t->sectors = (uint16_t)(t->sectors * grain);
    if (t->kind == STEP_WRITE && t->sectors > 64)
        t->sectors = 64;
    t->rounds = (uint16_t)(rng_chance(r, 40) ? 0 : rng_below(r, rng_chance(r, 30) ? 60 : 8));
}

/* Commit after commit through a ring that is always nearly full, apply close behind. */
static void make_busy(struct script *p, struct rng *r)
{
    static const uint8_t mix[] = {STEP_WRITE, STEP_SEAL, STEP_COMMIT, STEP_RUN};

    p->setup.segments = 5 + rng_below(r, 2);
    p->setup.ring_bytes = (10 + rng_below(r, 4)) * PAGE; /* less than the arena may hold */
    p->setup.fault_percent = rng_chance(r, 50) ? 5 + rng_below(r, 15) : 0;
    for (uint32_t i = 0; i < p->steps; i++) {
        struct step *t = &p->step[i];

        t->kind = mix[i % sizeof(mix)];
        if (t->kind == STEP_WRITE && t->sectors > 40)
            t->sectors = 40;
        t->rounds = t->kind == STEP_RUN ? (uint16_t)(5 + rng_below(r, 20)) : 0;
    }
}

void script_make(struct script *p, uint64_t seed)
{
    struct rng r = {.state = seed};

    memset(p, 0, sizeof(*p));
    p->seed = seed;
    p->thorough = rng_chance(&r, 50);
    make_setup(&p->setup, &r);
    p->steps = p->thorough ? 4 + rng_below(&r, 10) : 40 + rng_below(&r, 160);
    for (uint32_t i = 0; i < p->steps; i++)
        make_step(&p->step[i], &p->setup, &r, p->thorough);
    if (!p->thorough && rng_chance(&r, 40))
        make_busy(p, &r);
    if (p->thorough && rng_chance(&r, 70)) { /* at least one commit in a short one */
        p->step[p->steps - 2].kind = STEP_SEAL;
        p->step[p->steps - 1].kind = STEP_COMMIT;
    }
}

/* ---- Running ---------------------------------------------------------------------------- */

/* The world on top goes on as what a random crash leaves of it. */
static struct world *crash(struct sim *s, struct world *w, const struct setup *u)
{
    enum crash_kind kind = (enum crash_kind)rng_below(&w->rng, 3);
    struct sim_outcome o = {.host = kind == CRASH_HOST, .torn_seed = rng_next(&w->rng) | 1};
    struct world *v = world_crash(w, kind, &o);

    world_close(w);
    s->faults += w->disk.faults;
    s->world[0] = v;
    s->world[1] = w;
    v->depth = 0;
    w->depth = 1;
    if (world_open(v, kind))
        v->disk.fault_percent = u->fault_percent;
    return v;
}

static void seal(struct world *w, uint32_t times)
{
    for (uint32_t i = 0; i < times; i++)
        if (w->model.sealed_count + w->waiting + 8 < MODEL_EPOCHS_MAX)
            world_verb(w, VERB_SEAL, 0);
}

static struct world *step(struct sim *s, struct world *w, const struct step *t,
                          const struct setup *u)
{
    const struct model *m = &w->model;

    switch ((enum step_kind)t->kind) {
    case STEP_WRITE:
        world_write(w, t->disk, t->sector, t->sectors, t->rounds == 7);
        break;
    case STEP_WRITE_ZEROES:
    case STEP_DISCARD_RANGE:
        world_zero(w, t->disk, t->sector, t->sectors, t->kind == STEP_DISCARD_RANGE);
        break;
    case STEP_SEAL:
        seal(w, 1);
        break;
    case STEP_COMMIT:
        world_verb(w, VERB_COMMIT, 0);
        break;
    case STEP_COMMIT_OLDEST:
        if (m->sealed_count)
            world_verb(w, VERB_COMMIT, m->sealed[0].id);
        break;
    case STEP_DISCARD:
        world_verb(w, VERB_DISCARD, 0);
        break;
    case STEP_PROMOTE:
        world_verb(w, VERB_PROMOTE, 0);
        break;
    case STEP_FLUSH:
        world_flush(w);
        break;
    case STEP_RUN:
        break;
    case STEP_DRAIN:
        for (uint32_t i = 0; i < 300 && world_step(w); i++)
            ;
        break;
    case STEP_SEAL_MANY:
        seal(w, 8);
        break;
    case STEP_CRASH:
        w = crash(s, w, u);
        break;
    }
    if (!s->failed)
        world_point(w);
    for (uint32_t i = 0; i < t->rounds && !s->failed; i++)
        world_step(w);
    return w;
}

void script_run(struct sim *s, const struct script *p, uint64_t states)
{
    struct world *w;

    s->crash_percent = p->thorough ? 100 : 10;
    s->nested_percent = p->thorough ? 3 : 2;
    s->subsets_max = p->thorough ? 5 : 2;
    s->samples = p->thorough ? 6 : 3;
    s->deadline = s->states + states;
    world_begin(s, &p->setup, p->seed);
    w = s->world[0];
    for (uint32_t i = 0; i < p->steps && !s->failed; i++)
        w = step(s, w, &p->step[i], &p->setup);
    s->faults += w->disk.faults;
    w->disk.fault_percent = 0;
    world_drain(w);
    if (!s->failed) {
        world_check_reads(w);
        world_check_images(w);
    }
    world_end(w);
}

/* ---- Shrinking -------------------------------------------------------------------------- */

static bool fails(struct sim *s, const struct script *p)
{
    script_run(s, p, 20000);
    return s->failed;
}

void script_shrink(struct sim *s, struct script *p)
{
    struct script shorter;
    bool again = true;

    for (uint32_t n = p->steps / 2; n > 0 || again; n = n > 1 ? n / 2 : 1) {
        again = false;
        for (uint32_t at = 0; at + n <= p->steps;) {
            shorter = *p;
            memmove(&shorter.step[at], &shorter.step[at + n],
                    (p->steps - at - n) * sizeof(p->step[0]));
            shorter.steps -= n;
            if (fails(s, &shorter)) {
                *p = shorter;
                again = true;
            } else {
                at += n;
            }
        }
        if (n <= 1 && !again)
            break;
    }
    check(fails(s, p)); /* the same again, for the report */
}

/* ---- Printing --------------------------------------------------------------------------- */

void script_print(const struct script *p, FILE *out)
{
    fprintf(out, "    %u disks, %u reactors, ring of %llu pages, compression %d%s%s, %u %% faults%s%s, "
                 "%llu bytes/s\n",
            p->setup.disks, p->setup.reactors, (unsigned long long)p->setup.ring_bytes / PAGE,
            p->setup.compress_level, p->setup.dictionary ? " with a dictionary" : "",
            p->setup.spill_segments ? ", spill file" : "",
            p->setup.fault_percent,
            p->setup.no_fallocate ? ", no fallocate" : "",
            p->setup.journal_fua ? ", forced unit access" : "",
            (unsigned long long)p->setup.apply_rate);
    for (uint32_t i = 0; i < p->steps; i++) {
        const struct step *t = &p->step[i];

        fprintf(out, "    %3u %s", i, kind_names[t->kind]);
        if (t->kind <= STEP_DISCARD_RANGE)
            fprintf(out, " disk %u sectors %u..%u", t->disk, t->sector,
                    t->sector + t->sectors - 1);
        fprintf(out, ", then %u rounds\n", t->rounds);
    }
}

void script_print_io(const struct world *w, FILE *out)
{
    static const char *const names[] = {"?", "read", "write", "sync", "zero", "punch"};
    const struct sim_disk *d = &w->disk;
    uint64_t from = d->logged > 40 ? d->logged - 40 : 0;

    for (uint64_t i = from; i < d->logged; i++) {
        const struct sim_event *e = &d->log[i % SIM_LOG_MAX];

        fprintf(out, "    %s %s of %s%u, %llu bytes at %llu", e->kind == 's' ? "submit" : "  done",
                names[e->opcode], e->file ? "image " : "journal ", e->file ? e->file - 1u : 0,
                (unsigned long long)e->bytes, (unsigned long long)e->offset);
        if (e->kind == 'c' && e->result < 0)
            fprintf(out, ": %s", strerror((int)-e->result));
        fputc('\n', out);
    }
}
