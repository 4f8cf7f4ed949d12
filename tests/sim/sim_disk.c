/* sim_disk.c - see sim_disk.h. */
#include "sim_disk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "format.h"

#define SUPERS (JOURNAL_SUPER_SLOTS * PAGE) /* kept without the gaps between them */

static uint64_t next_version;

/* ---- Stores ---------------------------------------------------------------------------- */

static void store_init(struct store *s, uint64_t bytes)
{
    s->pages = (uint32_t)((bytes + SIM_PAGE - 1) / SIM_PAGE);
    s->data = aligned_alloc(SIM_PAGE, (uint64_t)s->pages * SIM_PAGE);
    s->version = calloc(s->pages, sizeof(*s->version));
    check(s->data && s->version);
    memset(s->data, 0, (uint64_t)s->pages * SIM_PAGE);
}

static void store_copy(struct store *to, const struct store *from)
{
    for (uint32_t i = 0; i < to->pages; i++) {
        if (to->version[i] == from->version[i])
            continue;
        memcpy(to->data + (uint64_t)i * SIM_PAGE, from->data + (uint64_t)i * SIM_PAGE, SIM_PAGE);
        to->version[i] = from->version[i];
    }
}

/* data NULL: zeroes. */
static void store_put(struct store *s, uint64_t at, const uint8_t *data, uint64_t bytes)
{
    for (uint64_t p = at / SIM_PAGE; p <= (at + bytes - 1) / SIM_PAGE; p++)
        s->version[p] = ++next_version;
    if (data)
        memcpy(s->data + at, data, bytes);
    else
        memset(s->data + at, 0, bytes);
}

static void write_to(struct store *s, const struct sim_write *w)
{
    store_put(s, w->at, w->data, w->bytes);
}

static void sector_to(struct store *s, const struct sim_write *w, uint64_t sector)
{
    uint64_t skip = sector * SECTOR_BYTES;

    store_put(s, w->at + skip, w->data ? w->data + skip : NULL, SECTOR_BYTES);
}

/* ---- Writes that may be lost ------------------------------------------------------------ */

static struct sim_write *write_new(uint32_t file, uint64_t at, uint64_t bytes)
{
    struct sim_write *w = calloc(1, sizeof(*w));

    check(w);
    *w = (struct sim_write){.file = file, .at = at, .bytes = bytes};
    return w;
}

static void write_free(struct sim_write *w)
{
    free(w->data);
    free(w);
}

static void forget(struct sim_disk *d, uint32_t index)
{
    write_free(d->write[index]);
    memmove(&d->write[index], &d->write[index + 1],
            (--d->writes - index) * sizeof(d->write[0]));
}

static void forget_write(struct sim_disk *d, const struct sim_write *w)
{
    uint32_t i = 0;

    while (d->write[i] != w)
        i++;
    forget(d, i);
}

/* A completed write takes its place before those in flight. */
static void write_completed(struct sim_disk *d, struct sim_write *w)
{
    uint32_t from = 0, to = 0;

    while (d->write[from] != w)
        from++;
    while (d->write[to]->done)
        to++;
    memmove(&d->write[to + 1], &d->write[to], (from - to) * sizeof(d->write[0]));
    d->write[to] = w;
    w->done = ++d->moment;
}

static struct sim_write *add_piece(struct sim_disk *d, const struct sim_write *w, uint64_t sector)
{
    struct sim_write *piece = write_new(w->file, w->at + sector * SECTOR_BYTES, SECTOR_BYTES);

    if (w->data) {
        piece->data = malloc(SECTOR_BYTES);
        check(piece->data);
        memcpy(piece->data, w->data + sector * SECTOR_BYTES, SECTOR_BYTES);
    }
    check(d->writes < SIM_WRITES_MAX);
    d->write[d->writes++] = piece;
    write_completed(d, piece);
    write_to(&d->file[w->file].current, piece);
    return piece;
}

/* ---- Tearing ---------------------------------------------------------------------------- */

/* What becomes of one write: which of its sectors are done. */
struct tear {
    enum { TEAR_LOST, TEAR_WHOLE, TEAR_PREFIX, TEAR_SUFFIX, TEAR_ANY } kind;
    uint32_t at;
    struct rng rng;
};

static struct tear tear_pick(struct rng *r, uint64_t bytes)
{
    uint32_t sectors = (uint32_t)(bytes / SECTOR_BYTES);
    struct tear t = {.kind = TEAR_LOST};
    uint32_t dice = rng_below(r, 8);

    t.at = rng_below(r, sectors);
    t.rng.state = rng_next(r);
    if (dice >= 2)
        t.kind = TEAR_WHOLE;
    if (sectors > 1 && dice >= 5)
        t.kind = TEAR_PREFIX + (dice - 5);
    return t;
}

static bool tear_done(struct tear *t, uint64_t sector)
{
    switch (t->kind) {
    case TEAR_LOST:
        return false;
    case TEAR_WHOLE:
        return true;
    case TEAR_PREFIX:
        return sector <= t->at;
    case TEAR_SUFFIX:
        return sector >= t->at;
    case TEAR_ANY:
        return rng_chance(&t->rng, 50);
    }
    return false;
}

/* ---- The seam --------------------------------------------------------------------------- */

uint64_t sim_disk_place(const struct sim_disk *d, uint32_t file, uint64_t offset)
{
    (void)d;
    if (file != DISK_JOURNAL)
        return offset;
    if (offset >= JOURNAL_LOG_OFFSET)
        return offset - JOURNAL_LOG_OFFSET + SUPERS;
    if (offset % JOURNAL_SUPER_STRIDE || offset / JOURNAL_SUPER_STRIDE >= JOURNAL_SUPER_SLOTS)
        return UINT64_MAX;
    return offset / JOURNAL_SUPER_STRIDE * PAGE;
}

static void note(struct sim_disk *d, uint8_t kind, const struct disk_op *op, int64_t result)
{
    d->log[d->logged++ % SIM_LOG_MAX] =
        (struct sim_event){.kind = kind, .opcode = (uint8_t)op->opcode, .file = (uint8_t)op->file,
                           .offset = op->offset, .bytes = op->bytes, .result = result};
}

static bool transfers(const struct disk_op *op)
{
    return op->opcode != DISK_SYNC;
}

static bool changes(const struct disk_op *op)
{
    return op->opcode != DISK_SYNC && op->opcode != DISK_READ;
}

static uint64_t iov_bytes(const struct disk_op *op)
{
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < op->iov_count; i++)
        bytes += op->iov[i].iov_len;
    return bytes;
}

static void check_contract(struct sim_disk *d, const struct disk_op *op, uint64_t at)
{
    const struct sim_file *f = &d->file[op->file];

    if (op->file >= d->files)
        d->breach = "an operation on a file that does not exist";
    else if (!transfers(op))
        return;
    else if (at == UINT64_MAX || at + op->bytes > f->bytes || op->bytes == 0)
        d->breach = "an operation outside of the file";
    else if (op->offset % f->align || op->bytes % f->align)
        d->breach = "a misaligned operation";
    else if ((op->opcode == DISK_READ || op->opcode == DISK_WRITE) && iov_bytes(op) != op->bytes)
        d->breach = "buffers that do not add up to the operation's length";
    for (uint32_t i = 0; i < d->flying_count && !d->breach; i++) {
        const struct sim_write *w = d->flying[i].write;

        if (w && w->file == op->file && at < w->at + w->bytes && w->at < at + op->bytes)
            d->breach = "two operations in flight at the same place";
    }
}

static bool in_mapping(const struct sim_disk *d, const uint8_t *at)
{
    return d->mapped && at >= d->mapped && at < d->mapped + d->mapped_bytes;
}

/* A page of the spill file was let go, and comes back changed. */
static void gather(const struct sim_disk *d, const struct disk_op *op, uint8_t *to)
{
    for (uint32_t i = 0; i < op->iov_count; i++) {
        memcpy(to, op->iov[i].iov_base, op->iov[i].iov_len);
        to[op->iov[i].iov_len / 2] ^= in_mapping(d, op->iov[i].iov_base);
        to += op->iov[i].iov_len;
    }
}

static void submit(struct disk *disk, struct disk_op *op)
{
    struct sim_disk *d = (struct sim_disk *)disk;
    struct sim_flying *f = &d->flying[d->flying_count];
    uint64_t at = transfers(op) ? sim_disk_place(d, op->file, op->offset) : 0;
    bool spill = d->spill && op->file == DISK_SPILL;

    check(d->flying_count < SIM_FLYING_MAX);
    note(d, 's', op, 0);
    if (!spill)
        check_contract(d, op, at);
    *f = (struct sim_flying){.op = op, .submitted = ++d->moment};
    if (!spill && changes(op) && !d->breach) {
        check(d->writes < SIM_WRITES_MAX);
        f->write = write_new(op->file, at, op->bytes);
        if (op->opcode == DISK_WRITE) {
            f->write->data = malloc(op->bytes);
            check(f->write->data);
            gather(d, op, f->write->data);
        }
        d->write[d->writes++] = f->write;
    }
    d->flying_count++;
    d->changes++;
    d->point(d->owner, "submitted");
}

static void check_unchanged(struct sim_disk *d, const struct disk_op *op,
                            const struct sim_write *w)
{
    const uint8_t *p = w->data;

    for (uint32_t i = 0; i < op->iov_count && op->opcode == DISK_WRITE; i++) {
        if (!in_mapping(d, op->iov[i].iov_base) &&
            memcmp(p, op->iov[i].iov_base, op->iov[i].iov_len) != 0)
            d->breach = "a write's buffer changed while it was in flight";
        p += op->iov[i].iov_len;
    }
}

/* Is there an older write to the same place that may still be lost? */
static bool covers_older(const struct sim_disk *d, const struct sim_write *w)
{
    for (uint32_t i = 0; i < d->writes && d->write[i] != w; i++)
        if (d->write[i]->file == w->file && w->at < d->write[i]->at + d->write[i]->bytes &&
            d->write[i]->at < w->at + w->bytes)
            return true;
    return false;
}

/* A durable write is on the medium. Over an older one it stays in the list, so that a crash
 * puts both there in their order. */
static void write_durable(struct sim_disk *d, struct sim_write *w)
{
    w->durable = true;
    if (covers_older(d, w))
        return;
    write_to(&d->file[w->file].durable, w);
    forget_write(d, w);
}

static int64_t do_write(struct sim_disk *d, const struct sim_flying *f, bool fail)
{
    struct sim_write *w = f->write;
    struct tear t;

    if (!w)
        return -EIO; /* a breach */
    check_unchanged(d, f->op, w);
    if (f->op->opcode != DISK_WRITE && d->no_fallocate) {
        forget_write(d, w);
        return -EOPNOTSUPP;
    }
    write_completed(d, w);
    if (!fail) {
        write_to(&d->file[w->file].current, w);
        if (f->op->durable)
            write_durable(d, w);
        return f->op->opcode == DISK_WRITE ? (int64_t)f->op->bytes : 0;
    }
    /* Any part of it was done. */
    t = tear_pick(&d->rng, w->bytes);
    for (uint64_t s = 0; s < w->bytes / SECTOR_BYTES; s++)
        if (tear_done(&t, s))
            add_piece(d, w, s);
    forget_write(d, w);
    return rng_chance(&d->rng, 50) ? -EIO : -ENOSPC;
}

/* After a failed flush: any part of each write is durable, the rest never will be, and reads
 * may show either. */
static void abandon(struct sim_disk *d, const struct sim_write *w, bool stale)
{
    struct sim_file *f = &d->file[w->file];
    struct tear t = tear_pick(&d->rng, w->bytes);

    for (uint64_t s = 0; s < w->bytes / SECTOR_BYTES; s++) {
        uint64_t at = w->at + s * SECTOR_BYTES;

        if (tear_done(&t, s))
            sector_to(&f->durable, w, s);
        if (stale)
            store_put(&f->current, at, f->durable.data + at, SECTOR_BYTES);
    }
}

/* An older write that was given up may have hidden a durable one: reads see that, and what was
 * written over it since. */
static void show(struct sim_disk *d, uint32_t index)
{
    uint32_t file = d->write[index]->file;

    for (uint32_t i = index; i < d->writes; i++)
        if (d->write[i]->file == file && d->write[i]->done)
            write_to(&d->file[file].current, d->write[i]);
}

static int64_t do_sync(struct sim_disk *d, const struct sim_flying *f, bool fail)
{
    bool stale = fail && rng_chance(&d->rng, 25);

    if (d->sync_lies)
        return 0;
    for (uint32_t i = 0; i < d->writes;) {
        struct sim_write *w = d->write[i];

        if (w->file != f->op->file || !w->done || w->done > f->submitted) {
            i++;
            continue;
        }
        if (fail && !w->durable)
            abandon(d, w, stale);
        else
            write_to(&d->file[w->file].durable, w);
        if (w->durable)
            show(d, i);
        forget(d, i);
    }
    return fail ? -EIO : 0;
}

static void do_read(struct sim_disk *d, const struct disk_op *op)
{
    const uint8_t *p = d->file[op->file].current.data + sim_disk_place(d, op->file, op->offset);

    for (uint32_t i = 0; i < op->iov_count; i++) {
        memcpy(op->iov[i].iov_base, p, op->iov[i].iov_len);
        p += op->iov[i].iov_len;
    }
}

/* A write that fails has done some of it. */
static int64_t do_spill(struct sim_disk *d, const struct disk_op *op, bool fail)
{
    uint8_t *at = d->spill + op->offset;

    if (op->iov_count != 1 || op->offset + op->bytes > d->spill_bytes) {
        d->breach = "an operation outside of the spill file";
        return -EIO;
    }
    if (op->opcode == DISK_READ)
        memcpy(op->iov->iov_base, at, op->bytes);
    else
        memcpy(at, op->iov->iov_base, fail ? op->bytes / 2 : op->bytes);
    return fail ? -EIO : (int64_t)op->bytes;
}

static void deliver(struct sim_disk *d, uint32_t index)
{
    struct sim_flying f = d->flying[index];
    bool fail = d->fault_percent && rng_chance(&d->rng, d->fault_percent);
    int64_t result;

    d->flying[index] = d->flying[--d->flying_count];
    if (d->breach) {
        result = -EIO;
    } else if (f.op->file == DISK_SPILL) {
        fail &= f.op->opcode == DISK_WRITE;
        result = do_spill(d, f.op, fail);
    } else if (changes(f.op)) {
        result = do_write(d, &f, fail);
    } else if (f.op->opcode == DISK_SYNC) {
        result = do_sync(d, &f, fail);
    } else {
        result = (int64_t)f.op->bytes;
        fail = false;
        do_read(d, f.op);
    }
    d->faults += fail;
    d->changes++;
    note(d, 'c', f.op, result);
    f.op->done(f.op, result);
    d->point(d->owner, "completed");
}

static uint32_t reap(struct disk *disk, bool wait)
{
    struct sim_disk *d = (struct sim_disk *)disk;
    uint32_t n = 0;

    while (d->flying_count > 0 && ((wait && n == 0) || rng_chance(&d->rng, 40))) {
        deliver(d, rng_below(&d->rng, d->flying_count));
        n++;
    }
    return n;
}

/* ---- Life ------------------------------------------------------------------------------- */

void sim_disk_init(struct sim_disk *d, const uint64_t *bytes, const uint32_t *align,
                   uint32_t files)
{
    memset(d, 0, sizeof(*d));
    d->disk.submit = submit;
    d->disk.reap = reap;
    d->files = files;
    for (uint32_t i = 0; i < files; i++) {
        d->file[i].bytes = bytes[i];
        d->file[i].align = align[i];
        store_init(&d->file[i].durable, bytes[i]);
        store_init(&d->file[i].current, bytes[i]);
    }
}

static void drop_writes(struct sim_disk *d)
{
    while (d->writes > 0)
        write_free(d->write[--d->writes]);
    d->flying_count = 0;
}

void sim_disk_free(struct sim_disk *d)
{
    drop_writes(d);
    for (uint32_t i = 0; i < d->files; i++) {
        free(d->file[i].durable.data);
        free(d->file[i].durable.version);
        free(d->file[i].current.data);
        free(d->file[i].current.version);
    }
}

static struct sim_write *write_copy(const struct sim_write *w)
{
    struct sim_write *copy = write_new(w->file, w->at, w->bytes);

    if (w->data) {
        copy->data = malloc(w->bytes);
        check(copy->data);
        memcpy(copy->data, w->data, w->bytes);
    }
    copy->done = w->done;
    copy->durable = w->durable;
    return copy;
}

/* A superblock whose write was cut off may be unreadable as a whole: the reason for slots. */
static bool garbled(struct sim_disk *to, const struct sim_write *w, struct rng *r)
{
    uint8_t noise[SECTOR_BYTES];

    if (w->file != DISK_JOURNAL || w->at >= SUPERS || !rng_chance(r, 20))
        return false;
    for (uint32_t i = 0; i < sizeof(noise); i++)
        noise[i] = (uint8_t)rng_next(r);
    store_put(&to->file[w->file].durable, w->at, noise, sizeof(noise));
    return true;
}

/* Applies what the outcome leaves of write n to the medium (host) or to the cache. */
static void settle(struct sim_disk *to, const struct sim_write *w, uint32_t n,
                   const struct sim_outcome *o, struct rng *r)
{
    struct store *medium = &to->file[w->file].durable;
    struct tear t;

    if (w->durable) {
        t = (struct tear){.kind = TEAR_WHOLE};
    } else if (o->torn_seed) {
        if (o->host && garbled(to, w, r))
            return;
        t = tear_pick(r, w->bytes);
    } else {
        t = (struct tear){.kind = n >= 64 || o->whole >> n & 1 ? TEAR_WHOLE : TEAR_LOST};
    }
    if (o->host && t.kind == TEAR_WHOLE) {
        write_to(medium, w);
        return;
    }
    for (uint64_t s = 0; t.kind != TEAR_LOST && s < w->bytes / SECTOR_BYTES; s++) {
        if (!tear_done(&t, s))
            continue;
        if (o->host)
            sector_to(medium, w, s);
        else
            add_piece(to, w, s);
    }
}

void sim_disk_fork(struct sim_disk *to, const struct sim_disk *from,
                   const struct sim_outcome *o)
{
    struct rng r = {.state = o->torn_seed};

    drop_writes(to);
    to->moment = from->moment;
    to->breach = NULL;
    to->fault_percent = to->faults = 0;
    to->no_fallocate = from->no_fallocate;
    to->sync_lies = from->sync_lies;
    to->logged = 0;
    if (to->spill && !o->host)
        memcpy(to->spill, from->spill, from->spill_bytes);
    to->rng.state = rng_mix(from->rng.state, o->torn_seed + o->whole);
    for (uint32_t i = 0; i < from->files; i++) {
        store_copy(&to->file[i].durable, &from->file[i].durable);
        if (!o->host)
            store_copy(&to->file[i].current, &from->file[i].current);
    }
    for (uint32_t i = 0; i < from->writes; i++) {
        const struct sim_write *w = from->write[i];

        if (!o->host && w->done)
            to->write[to->writes++] = write_copy(w);
        else
            settle(to, w, i, o, &r);
    }
    for (uint32_t i = 0; i < from->files && o->host; i++)
        store_copy(&to->file[i].current, &to->file[i].durable);
}

void sim_disk_poke(struct sim_disk *d, uint32_t file, uint64_t offset, const void *data,
                   uint64_t bytes)
{
    uint64_t at = sim_disk_place(d, file, offset);

    check(at + bytes <= d->file[file].bytes);
    store_put(&d->file[file].durable, at, data, bytes);
    store_put(&d->file[file].current, at, data, bytes);
    d->changes++;
}
