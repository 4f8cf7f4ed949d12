/* blk.c - see blk.h: the requests. What the front end commands is in frontend.c. */
#include "blk.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <string.h>

#include "reactor.h"

typedef unsigned long long ull;

#define IOV_MAX_KERNEL 1024u      /* UIO_MAXIOV */
#define STATUS_PENDING 0xffu     /* ours: the request goes on */
#define STATUS_HELD 0xfeu        /* ours: not taken, no room */

/* One run of sectors that the epochs do not have, on its way from the image. */
struct read_part {
    struct disk_op op;
    struct request *request;
    uint8_t *bounce;             /* NULL: straight into guest memory */
    uint64_t skip, bytes;        /* of the bounce buffer: what the guest asked for */
    struct span_cursor to;
    uint32_t iov_count;
    struct iovec iov[];
};

/* ---- Answering -------------------------------------------------------------------------- */

static void count_status(struct blk *b, uint8_t status)
{
    if (status == VIRTIO_BLK_S_IOERR)
        b->stats.errors++;
    else if (status == VIRTIO_BLK_S_UNSUPP)
        b->stats.unsupported++;
}

/* in: the device-writable spans, at least one byte; the last byte takes the status. */
static void finish(struct blk *b, struct ring *r, uint16_t head, const struct span *in,
                   uint32_t in_count, uint64_t data_bytes, uint8_t status)
{
    const struct span *last = &in[in_count - 1];

    if (unlikely(b->reactor->metrics.tracing))
        metrics_trace_end(&b->reactor->metrics, status);
    while (last->bytes == 0)
        last--;
    last->ptr[last->bytes - 1] = status;
    if (b->log) {
        if (data_bytes > 0 || status == VIRTIO_BLK_S_IOERR) /* a read may have failed half-way */
            for (uint32_t i = 0; i < in_count; i++)
                ring_log(r, in[i].guest, in[i].bytes);
        else
            ring_log(r, last->guest + last->bytes - 1, 1);
    }
    count_status(b, status);
    ring_push(r, head, (uint32_t)(data_bytes + 1));
}

static struct request *request_create(struct blk *b, struct ring *r, uint16_t head,
                                      const struct chain *c)
{
    struct request *q = malloc(sizeof(*q) + c->in_count * sizeof(struct span));

    if (!q)
        return NULL;
    *q = (struct request){.blk = b, .ring = r, .head = head, .status = VIRTIO_BLK_S_OK,
                          .parts = 1, .in_count = c->in_count, .next = b->requests,
                          .link = &b->requests, .fetched_ns = b->reactor->now_ns,
                          .stage = METRICS_READ_MISS};
    metrics_trace_wait(&b->reactor->metrics, &q->trace);
    memcpy(q->in, c->in, c->in_count * sizeof(struct span));
    if (b->requests)
        b->requests->link = &q->next;
    b->requests = q;
    r->inflight++;
    return q;
}

static void request_free(struct request *q)
{
    *q->link = q->next;
    if (q->next)
        q->next->link = q->link;
    q->ring->inflight--;
    free(q);
}

static void request_finish(struct request *q)
{
    struct reactor *r = q->blk->reactor;

    metrics_late(&r->metrics, q->stage, q->fetched_ns, r->now_ns);
    metrics_trace_late(&r->metrics, &q->trace, q->status);
    /* A front end that went away is not written to. */
    if (q->ring->used && !q->unreachable)
        finish(q->blk, q->ring, q->head, q->in, q->in_count,
               q->status == VIRTIO_BLK_S_OK ? q->in_bytes : 0, q->status);
    request_free(q);
}

/* ---- Reading ---------------------------------------------------------------------------- */

static void part_done(struct disk_op *op, int64_t result)
{
    struct read_part *p = (struct read_part *)op;
    struct request *q = p->request;
    struct blk *b = q->blk;

    b->reads_busy--;
    __atomic_sub_fetch(&b->group->reads_busy, 1, __ATOMIC_RELAXED);
    if (result < 0) {
        q->status = VIRTIO_BLK_S_IOERR;
        group_log(b->group, LOG_ERROR, "disk \"%s\": reading %llu bytes at %llu failed: %s",
                  b->config->name, (unsigned long long)op->bytes, (unsigned long long)op->offset,
                  strerror((int)-result));
    } else if (p->bounce) {
        span_write(&p->to, p->bounce + p->skip, p->bytes);
    }
    free(p->bounce);
    free(p);
    if (--q->parts == 0)
        request_finish(q);
}

static bool aligned(const struct blk *b, const struct read_part *p, uint64_t offset)
{
    if (!b->config->direct)
        return true;
    if (offset % b->config->logical_block_bytes)
        return false;
    for (uint32_t i = 0; i < p->iov_count; i++)
        if ((uintptr_t)p->iov[i].iov_base % b->config->memory_align ||
            p->iov[i].iov_len % b->config->logical_block_bytes)
            return false;
    return true;
}

/* Reads whole logical blocks around the run and copies the run out afterwards. */
static bool bounce(const struct blk *b, struct read_part *p, uint64_t offset)
{
    uint64_t unit = b->config->logical_block_bytes;
    uint64_t first = offset / unit * unit, end = (offset + p->bytes + unit - 1) / unit * unit;

    p->bounce = aligned_alloc(PAGE, page_round_up(end - first));
    if (!p->bounce)
        return false;
    p->skip = offset - first;
    p->op.offset = first;
    p->op.bytes = end - first;
    p->iov[0] = (struct iovec){.iov_base = p->bounce, .iov_len = end - first};
    p->op.iov_count = 1;
    return true;
}

static bool read_run(struct request *q, uint64_t sector, uint64_t sectors, struct span_cursor to)
{
    struct blk *b = q->blk;
    uint64_t bytes = sectors * SECTOR_BYTES, left = bytes;
    struct span_cursor walk = to;
    struct read_part *p;

    p = calloc(1, sizeof(*p) + (to.count - to.at + 1) * sizeof(struct iovec));
    if (!p)
        return false;
    while (left > 0) {
        uint64_t got;
        uint8_t *ptr = span_piece(&walk, left, &got);

        p->iov[p->iov_count++] = (struct iovec){.iov_base = ptr, .iov_len = got};
        left -= got;
    }
    p->request = q;
    p->bytes = bytes;
    p->to = to;
    p->to.span = q->in; /* the chain's spans are reused by the next request */
    p->op = (struct disk_op){.opcode = DISK_READ, .file = DISK_IMAGE(b->disk),
                             .offset = sector * SECTOR_BYTES, .bytes = bytes, .iov = p->iov,
                             .iov_count = p->iov_count, .done = part_done};
    if ((p->iov_count > IOV_MAX_KERNEL || !aligned(b, p, p->op.offset)) &&
        !bounce(b, p, p->op.offset)) {
        free(p);
        return false;
    }
    q->parts++;
    b->reads_busy++;
    __atomic_add_fetch(&b->group->reads_busy, 1, __ATOMIC_RELAXED);
    disk_submit(b->reactor->disk, &p->op);
    return true;
}

static void skip(struct span_cursor *c, uint64_t bytes)
{
    while (bytes > 0) {
        uint64_t got;

        span_piece(c, bytes, &got);
        bytes -= got;
    }
}

/* What a read is made of so far. */
struct reading {
    struct blk *b;
    struct ring *r;
    const struct chain *c;
    struct request *q;           /* NULL: nothing was missing yet */
    uint16_t head;
    uint64_t run_sector, run_sectors; /* missing, not yet asked for */
    struct span_cursor run_to;
};

static bool flush_run(struct reading *g)
{
    if (g->run_sectors == 0)
        return true;
    if (!g->q)
        g->q = request_create(g->b, g->r, g->head, g->c);
    if (!g->q || !read_run(g->q, g->run_sector, g->run_sectors, g->run_to))
        return false;
    g->run_sectors = 0;
    return true;
}

/* One block's wanted sectors, run by run: found ones are copied, others join the run. */
static bool read_block(struct reading *g, uint64_t block, uint8_t want, struct span_cursor *to)
{
    struct group *group = g->b->group;
    const uint8_t *direct, *from = g->b->reactor->block;
    int found = epoch_read(group, g->b->disk, block, want, g->b->reactor->block, &direct);

    if (found < 0)
        return false;
    if (found == want) {
        uint32_t first = (uint32_t)__builtin_ctz(want);
        const uint8_t *at, *ahead = g->b->reactor->ahead;
        uint64_t got;

        if (direct && want == MASK_FULL && span_left(to, &at) >= BLOCK_BYTES)
            copy_block(span_piece(to, BLOCK_BYTES, &got), direct, ahead ? ahead : direct);
        else
            span_write(to, direct ? direct : from + first * SECTOR_BYTES, mask_bytes(want));
        return flush_run(g);
    }
    for (uint32_t i = 0; i < BLOCK_SECTORS; i++) {
        if (!(want & 1u << i))
            continue;
        if (found & 1 << i) {
            if (!flush_run(g))
                return false;
            span_write(to, from + i * SECTOR_BYTES, SECTOR_BYTES);
            continue;
        }
        if (g->run_sectors++ == 0) {
            g->run_sector = block * BLOCK_SECTORS + i;
            g->run_to = *to;
        }
        skip(to, SECTOR_BYTES);
    }
    return true;
}

static uint8_t do_read(struct blk *b, struct ring *r, uint16_t head, const struct chain *c,
                       uint64_t sector, uint64_t bytes)
{
    struct reading g = {.b = b, .r = r, .c = c, .head = head};
    struct span_cursor to = span_start(c->in, c->in_count);
    uint64_t end = sector + bytes / SECTOR_BYTES;
    bool good = true;

    b->stats.reads++;
    b->stats.read_bytes += bytes;
    if (unlikely(arena_spill_used(&b->group->arena) > 0) && bytes > BLOCK_BYTES)
        spill_prefetch(b->group, b->disk, sector / BLOCK_SECTORS, (end - 1) / BLOCK_SECTORS);
    for (uint64_t at = sector; at < end && good;) {
        uint64_t block = at / BLOCK_SECTORS, next = (block + 1) * BLOCK_SECTORS;
        uint32_t first = (uint32_t)(at % BLOCK_SECTORS);
        uint32_t last = next <= end ? BLOCK_SECTORS : (uint32_t)(end - block * BLOCK_SECTORS);

        good = read_block(&g, block, (uint8_t)((1u << last) - (1u << first)), &to);
        at = next;
    }
    good = good && flush_run(&g);
    if (!g.q) {
        metrics_answered(&b->reactor->metrics, METRICS_READ_HIT);
        return good ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
    }
    g.q->in_bytes = bytes;
    if (!good)
        g.q->status = VIRTIO_BLK_S_IOERR;
    if (--g.q->parts == 0)
        request_finish(g.q);
    return STATUS_PENDING;
}

/* ---- Writing ---------------------------------------------------------------------------- */

static void flushed(struct flush_waiter *w)
{
    struct request *q = (struct request *)((uint8_t *)w - offsetof(struct request, waiter));

    q->waits_flush = false;
    /* Called from group_step(), which the leader may do for us. */
    if (q->blk->group->now_ns > q->blk->reactor->now_ns)
        q->blk->reactor->now_ns = q->blk->group->now_ns;
    request_finish(q);
}

uint32_t blk_fail_flushes(struct ring *r)
{
    struct request *q = r->blk->requests, *next;
    uint32_t count = 0;

    for (; q; q = next) {
        next = q->next;
        if (q->ring != r || !q->waits_flush)
            continue;
        checkpoint_unflush(r->blk->group, &q->waiter);
        q->waits_flush = false;
        q->status = VIRTIO_BLK_S_IOERR;
        request_finish(q);
        count++;
    }
    return count;
}

/* Active mode: the answer waits until what is written is durable. */
static uint8_t answer_when_durable(struct blk *b, struct ring *r, uint16_t head,
                                   const struct chain *c)
{
    struct request *q;

    if (b->group->mode != CORE_ACTIVE)
        return VIRTIO_BLK_S_OK;
    q = request_create(b, r, head, c);
    if (!q)
        return VIRTIO_BLK_S_IOERR;
    q->waiter.done = flushed;
    q->stage = METRICS_FLUSH;
    if (checkpoint_flush(b->group, &q->waiter)) {
        request_free(q);
        return VIRTIO_BLK_S_OK;
    }
    q->waits_flush = true;
    if (b->writer->shared)
        writer_ask(b->writer);
    return STATUS_PENDING;
}

/* After a change of data: a driver without FLUSH relies on write-through. */
static uint8_t written(struct blk *b, struct ring *r, uint16_t head, const struct chain *c,
                       int error)
{
    if (error)
        return VIRTIO_BLK_S_IOERR;
    if (b->features & BLK_F_FLUSH)
        return VIRTIO_BLK_S_OK;
    return answer_when_durable(b, r, head, c);
}

static bool room(struct blk *b, struct ring *r, uint64_t blocks)
{
    if (likely(epoch_room(b->writer, blocks)))
        return true;
    b->reactor->metrics.tracing = false; /* it is not taken */
    r->held = true;
    r->held_told = false;
    r->held_blocks = blocks;
    if (b->writer->shared)
        writer_want(b->writer, blocks); /* before the next round it may have more */
    else
        blk_hold(r);
    return false;
}

void blk_hold(struct ring *r)
{
    if (!r->held_told)
        r->blk->stats.held++;
    r->held_told = true;
    writer_hold(r->blk->writer, r->held_blocks);
}

/* Waits; but not what an earlier agent had taken, when a stop has waited for it too long. */
static uint8_t no_room(struct ring *r)
{
    if (!r->give_up || r->resubmit_next == r->resubmits)
        return STATUS_HELD;
    r->held = false;
    r->given_up++;
    return VIRTIO_BLK_S_IOERR;
}

static uint8_t do_write(struct blk *b, struct ring *r, uint16_t head, const struct chain *c,
                        uint64_t sector, uint64_t bytes, uint64_t header_bytes)
{
    struct span_cursor from = span_start(c->out, c->out_count);
    int error;

    if (!room(b, r, bytes / BLOCK_BYTES + 2))
        return no_room(r);
    skip(&from, header_bytes);
    b->stats.writes++;
    metrics_answered(&b->reactor->metrics, METRICS_WRITE);
    b->stats.write_bytes += bytes;
    error = epoch_write(b->group, b->disk, sector, &from, bytes);
    return written(b, r, head, c, error);
}

/* A write that can never fit is an error, not a wait. */
static bool too_large(const struct blk *b, uint64_t bytes)
{
    const struct arena *a = &b->group->arena;

    return bytes > (uint64_t)(a->segments - GROUP_RESERVED_SEGMENTS) / 2 * SEGMENT_FRAMES_MIN *
                       BLOCK_BYTES;
}

static bool in_range(const struct blk *b, uint64_t sector, uint64_t sectors)
{
    return sector <= b->sectors && sectors <= b->sectors - sector;
}

/* Says why a range of the disk was refused. */
__attribute__((cold)) static void reject_range(struct blk *b, const struct ring *r, uint32_t type,
                                               uint64_t sector, uint64_t bytes)
{
    const char *why = "is too long";

    if (bytes % SECTOR_BYTES)
        why = "is not made of whole sectors";
    else if (!in_range(b, sector, bytes / SECTOR_BYTES))
        why = "is beyond the disk's end";
    else if (type != VIRTIO_BLK_T_IN && b->config->read_only)
        why = "would change a read-only disk";
    blk_reject(b, r->index, "request type %u, %llu bytes at sector %llu, %s", type, (ull)bytes,
               (ull)sector, why);
}

/* DISCARD and WRITE_ZEROES: one segment; both leave zeroes. */
static uint8_t do_zero(struct blk *b, struct ring *r, uint16_t head, const struct chain *c,
                       uint32_t type)
{
    struct virtio_blk_discard_write_zeroes seg;
    struct span_cursor from = span_start(c->out, c->out_count);
    uint64_t data = c->out_bytes - sizeof(struct virtio_blk_outhdr);
    uint32_t flags = 0;
    int error;

    if (data != sizeof(seg)) {
        blk_reject(b, r->index, "request type %u with %llu bytes of ranges: %u are one range, more "
                   "are not supported", type, (ull)data, (uint32_t)sizeof(seg));
        return data > sizeof(seg) ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
    }
    skip(&from, sizeof(struct virtio_blk_outhdr));
    span_read(&from, &seg, sizeof(seg));
    if (b->config->read_only || !in_range(b, seg.sector, seg.num_sectors) ||
        seg.num_sectors > CORE_DISCARD_SECTORS_MAX) {
        reject_range(b, r, type, seg.sector, (uint64_t)seg.num_sectors * SECTOR_BYTES);
        return VIRTIO_BLK_S_IOERR;
    }
    if (seg.flags & ~(type == VIRTIO_BLK_T_WRITE_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
                                                        : 0u)) {
        blk_reject(b, r->index, "request type %u with unknown flags %#x", type, seg.flags);
        return VIRTIO_BLK_S_UNSUPP;
    }
    if (!room(b, r, EPOCH_ZERO_ROOM))
        return no_room(r);
    if (type == VIRTIO_BLK_T_DISCARD) {
        b->stats.discards++;
        flags = FRAME_UNMAP;
    } else {
        b->stats.write_zeroes++;
        if (seg.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
            flags = FRAME_UNMAP;
    }
    metrics_answered(&b->reactor->metrics, METRICS_ZERO);
    error = epoch_zero(b->group, b->disk, seg.sector, seg.num_sectors, flags);
    return written(b, r, head, c, error);
}

/* ---- One request ------------------------------------------------------------------------ */

static uint8_t get_id(struct blk *b, const struct chain *c, uint64_t *data_bytes)
{
    struct span_cursor to = span_start(c->in, c->in_count);
    uint64_t bytes = c->in_bytes - 1;

    b->stats.get_ids++;
    *data_bytes = bytes < CORE_SERIAL_BYTES ? bytes : CORE_SERIAL_BYTES;
    span_write(&to, b->config->serial, *data_bytes);
    return VIRTIO_BLK_S_OK;
}

static uint8_t read_or_write(struct blk *b, struct ring *r, uint16_t head, const struct chain *c,
                             uint32_t type, uint64_t sector, uint64_t *data_bytes)
{
    uint64_t header = sizeof(struct virtio_blk_outhdr);
    uint64_t bytes = type == VIRTIO_BLK_T_IN ? c->in_bytes - 1 : c->out_bytes - header;

    /* Many descriptors may name one page: a disk's size is no bound for a request's work. */
    if (bytes % SECTOR_BYTES || !in_range(b, sector, bytes / SECTOR_BYTES) ||
        bytes > CORE_REQUEST_BYTES_MAX) {
        reject_range(b, r, type, sector, bytes);
        return VIRTIO_BLK_S_IOERR;
    }
    if (type == VIRTIO_BLK_T_IN) {
        uint8_t status = do_read(b, r, head, c, sector, bytes);

        if (status == VIRTIO_BLK_S_OK)
            *data_bytes = bytes;
        return status;
    }
    if (b->config->read_only || too_large(b, bytes)) {
        reject_range(b, r, type, sector, bytes);
        return VIRTIO_BLK_S_IOERR;
    }
    return do_write(b, r, head, c, sector, bytes, header);
}

static uint8_t dispatch(struct blk *b, struct ring *r, const struct chain *c,
                        uint64_t *data_bytes)
{
    uint16_t head = c->head;

    if (unlikely(c->out_bytes < sizeof(c->header))) {
        blk_reject(b, r->index, "request of %llu readable bytes: its header has %u",
                   (ull)c->out_bytes, (uint32_t)sizeof(c->header));
        return VIRTIO_BLK_S_IOERR;
    }
    switch (c->header.type) {
    case VIRTIO_BLK_T_IN:
    case VIRTIO_BLK_T_OUT:
        return read_or_write(b, r, head, c, c->header.type, c->header.sector, data_bytes);
    case VIRTIO_BLK_T_FLUSH:
        b->stats.flushes++;
        return answer_when_durable(b, r, head, c);
    case VIRTIO_BLK_T_GET_ID:
        return get_id(b, c, data_bytes);
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        return do_zero(b, r, head, c, c->header.type);
    default:
        blk_reject(b, r->index, "request of unknown type %u", c->header.type);
        return VIRTIO_BLK_S_UNSUPP;
    }
}

void blk_expect(struct blk *b, struct chain *c)
{
    struct span_cursor from = span_start(c->out, c->out_count);

    if (unlikely(c->out_bytes < sizeof(c->header)))
        return;
    if (likely(c->out[0].bytes >= sizeof(c->header)))
        memcpy(&c->header, c->out[0].ptr, sizeof(c->header));
    else
        span_read(&from, &c->header, sizeof(c->header));
    if (c->out_count > 1) /* the data's first lines; the processor sees by itself what follows */
        for (uint32_t i = 0; i < 4; i++)
            prefetch(c->out[1].ptr + 64 * i);
    epoch_expect(b->writer, b->disk, c->header.sector / BLOCK_SECTORS);
}

__attribute__((noinline)) static void trace_begin(struct ring *r, const struct chain *c)
{
    struct reactor *reactor = r->blk->reactor;
    struct metrics_trace about = {.sector = c->header.sector, .type = (uint8_t)c->header.type,
                                  .bytes = (uint32_t)(c->in_bytes + c->out_bytes),
                                  .disk = (uint8_t)r->blk->disk, .queue = (uint8_t)r->index};

    metrics_trace_begin(&reactor->metrics, reactor->now_ns, &about);
}

void blk_look_ahead(struct blk *b, const struct chain *c)
{
    b->reactor->ahead = NULL;
    if (c->header.type == VIRTIO_BLK_T_IN && c->out_bytes >= sizeof(c->header))
        b->reactor->ahead = epoch_frame(b->writer, b->disk, c->header.sector / BLOCK_SECTORS);
}

bool blk_execute(struct ring *r, const struct chain *c)
{
    uint64_t data_bytes = 0;
    uint8_t status;

    if (unlikely(metrics_trace_due(&r->blk->reactor->metrics)))
        trace_begin(r, c);
    status = dispatch(r->blk, r, c, &data_bytes);
    if (status == STATUS_HELD)
        return false;
    if (status != STATUS_PENDING)
        finish(r->blk, r, c->head, c->in, c->in_count, data_bytes, status);
    return true;
}
