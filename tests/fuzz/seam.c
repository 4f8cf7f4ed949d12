/* seam.c - see seam.h. */
#include "seam.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void finding(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fputs("FINDING: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    abort();
}

static void submit(struct disk *d, struct disk_op *op)
{
    struct seam *s = (struct seam *)d;

    op->next = NULL;
    if (s->reverse) {
        op->next = s->first;
        s->first = op;
        if (!s->last)
            s->last = op;
    } else if (s->last) {
        s->last = s->last->next = op;
    } else {
        s->first = s->last = op;
    }
}

static int64_t move(struct seam_file *f, struct disk_op *op)
{
    uint64_t at = op->offset, left = op->bytes;

    for (uint32_t i = 0; i < op->iov_count && left > 0; i++) {
        uint64_t n = op->iov[i].iov_len < left ? op->iov[i].iov_len : left;

        if (op->opcode == DISK_READ)
            memcpy(op->iov[i].iov_base, f->data + at, n);
        else
            memcpy(f->data + at, op->iov[i].iov_base, n);
        at += n;
        left -= n;
    }
    if (left > 0)
        finding("an operation of %llu bytes has buffers for %llu", (unsigned long long)op->bytes,
                (unsigned long long)(op->bytes - left));
    return (int64_t)op->bytes;
}

static int64_t carry_out(struct seam *s, struct disk_op *op)
{
    struct seam_file *f;
    bool inside;

    if (op->file >= s->files)
        finding("operation %d on file %u of %u", (int)op->opcode, op->file, s->files);
    f = &s->file[op->file];
    s->operations++;
    if (s->failing > 0) {
        s->failing--;
        return -EIO;
    }
    if (op->opcode == DISK_SYNC)
        return 0;
    inside = op->offset <= f->bytes && op->bytes <= f->bytes - op->offset;
    if (op->opcode == DISK_READ)
        return inside ? move(f, op) : -EIO;
    if (!inside && f->bytes < f->pages * PAGE - PAGE)
        return -ENOSPC; /* the file was cut short by the input */
    if (!inside)
        finding("operation %d at %llu, %llu bytes: file %u has %llu", (int)op->opcode,
                (unsigned long long)op->offset, (unsigned long long)op->bytes, op->file,
                (unsigned long long)f->bytes);
    seam_touch(s, op->file, op->offset, op->bytes);
    if (op->opcode == DISK_WRITE)
        return move(f, op);
    memset(f->data + op->offset, 0, op->bytes);
    return 0;
}

static uint32_t reap(struct disk *d, bool wait)
{
    struct seam *s = (struct seam *)d;
    struct disk_op **at = &s->first;
    uint32_t done = 0;

    while (*at && (done < s->limit || (wait && done == 0))) {
        struct disk_op *op = *at, *i;

        if (op->file < s->files && s->file[op->file].hold && !wait) {
            at = &op->next;
            continue;
        }
        *at = op->next;
        for (i = s->first; i && i->next; i = i->next)
            ;
        s->last = i;
        op->done(op, carry_out(s, op));
        done++;
        at = &s->first; /* done() may have submitted */
    }
    return done;
}

void seam_init(struct seam *s, const uint64_t *bytes, uint32_t files)
{
    memset(s, 0, sizeof(*s));
    s->disk = (struct disk){.submit = submit, .reap = reap};
    s->files = files;
    s->limit = UINT32_MAX;
    for (uint32_t i = 0; i < files; i++) {
        struct seam_file *f = &s->file[i];

        f->bytes = bytes[i];
        f->pages = page_round_up(bytes[i]) / PAGE;
        f->data = calloc(f->pages, PAGE);
        f->base = calloc(f->pages, PAGE);
        f->dirty = calloc(f->pages, 1);
        if (!f->data || !f->base || !f->dirty)
            abort();
    }
}

void seam_keep(struct seam *s)
{
    for (uint32_t i = 0; i < s->files; i++) {
        struct seam_file *f = &s->file[i];

        memcpy(f->base, f->data, f->pages * PAGE);
        memset(f->dirty, 0, f->pages);
    }
}

void seam_restore(struct seam *s)
{
    for (uint32_t i = 0; i < s->files; i++) {
        struct seam_file *f = &s->file[i];

        for (uint64_t p = 0; p < f->pages; p++)
            if (f->dirty[p]) {
                memcpy(f->data + p * PAGE, f->base + p * PAGE, PAGE);
                f->dirty[p] = 0;
            }
        f->hold = false;
    }
    s->limit = UINT32_MAX;
    s->reverse = false;
    s->failing = 0;
}

void seam_touch(struct seam *s, uint32_t file, uint64_t offset, uint64_t bytes)
{
    if (bytes > 0)
        memset(&s->file[file].dirty[offset / PAGE], 1,
               (offset + bytes - 1) / PAGE - offset / PAGE + 1);
}

void seam_drop(struct seam *s)
{
    s->first = s->last = NULL;
}

void seam_settle(struct group *g, struct seam *s)
{
    bool moved = true;

    for (uint32_t rounds = 0; moved; rounds++) {
        if (rounds > 100000)
            finding("the group does not come to rest");
        moved = s->disk.reap(&s->disk, false) > 0;
        while (group_step(g)) {
            moved = true;
            if (rounds++ > 100000)
                finding("the group steps for ever");
        }
    }
}
