/* dictionary.c - see dictionary.h. */
#include "dictionary.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int refuse(char *text, int error, uint32_t id, const char *why)
{
    snprintf(text, CORE_TEXT_MAX, "dictionary %08x: %s", id, why);
    return error;
}

int dictionaries_add(struct dictionaries *d, const core_dictionary *from, char *text)
{
    uint32_t id = from->id;
    struct dictionary *to = &d->at[d->count];

    if (from->bytes == 0 || from->bytes > CORE_DICTIONARY_BYTES_MAX)
        return refuse(text, -EINVAL, id, "its size is not 1 byte to 1 MiB");
    if (id == 0 || ZSTD_getDictID_fromDict(from->data, from->bytes) != id)
        return refuse(text, -EINVAL, id, "it is not a zstd dictionary of that id");
    if (dictionary_by_id(d, id))
        return refuse(text, -EEXIST, id, "it is loaded already");
    if (d->count == CORE_DICTIONARIES_MAX)
        return refuse(text, -ENOSPC, id, "16 others are loaded; start the agent again when "
                                         "what they compressed is committed and applied");
    *to = (struct dictionary){.id = id, .bytes = (uint32_t)from->bytes,
                              .content = malloc(from->bytes)};
    if (to->content)
        memcpy(to->content, from->data, from->bytes);
    /* By reference: its content is kept for compression, too. */
    to->expand = to->content ? ZSTD_createDDict(to->content, to->bytes) : NULL;
    if (!to->expand || ZSTD_getDictID_fromDDict(to->expand) != id) {
        bool memory = !to->expand;

        ZSTD_freeDDict(to->expand);
        free(to->content);
        return memory ? refuse(text, -ENOMEM, id, "it cannot be read, or there is no memory")
                      : refuse(text, -EINVAL, id, "its tables are damaged");
    }
    __atomic_store_n(&d->count, d->count + 1, __ATOMIC_RELEASE);
    return 0;
}

void dictionaries_free(struct dictionaries *d)
{
    for (uint32_t i = 0; i < d->count; i++) {
        ZSTD_freeDDict(d->at[i].expand);
        free(d->at[i].content);
    }
    memset(d, 0, sizeof(*d));
}

struct dictionary *dictionary_by_id(struct dictionaries *d, uint32_t id)
{
    for (uint32_t i = __atomic_load_n(&d->count, __ATOMIC_ACQUIRE); i-- > 0;)
        if (d->at[i].id == id)
            return &d->at[i];
    return NULL;
}

const struct dictionary *dictionary_newest(const struct dictionaries *d)
{
    uint32_t count = __atomic_load_n(&d->count, __ATOMIC_ACQUIRE);

    return count > 0 ? &d->at[count - 1] : NULL;
}

uint32_t frame_dictionary(const struct frame_header *h)
{
    uint32_t seqs = h->kind == FRAME_CLUSTER ? h->blocks * (uint32_t)sizeof(uint64_t) : 0;

    if (h->kind != FRAME_ZSTD && h->kind != FRAME_CLUSTER)
        return 0;
    return ZSTD_getDictID_fromFrame((const uint8_t *)(h + 1) + seqs, h->payload_bytes - seqs);
}

/* ---- Compression ----------------------------------------------------------------------------- */

void squeezer_free(struct squeezer *s)
{
    for (uint32_t i = 0; i < s->levels; i++)
        ZSTD_freeCDict(s->at[i].with);
    memset(s, 0, sizeof(*s));
}

/* For this level; NULL: there is no memory. */
static ZSTD_CDict *digested(struct squeezer *s, const struct dictionary *d, int level)
{
    uint32_t at = s->levels;

    for (uint32_t i = 0; i < s->levels; i++)
        if (s->at[i].level == level)
            return s->at[i].with;
    if (s->levels == SQUEEZER_LEVELS) {
        at = s->next++ % SQUEEZER_LEVELS;
        ZSTD_freeCDict(s->at[at].with);
    } else {
        s->levels++;
    }
    s->at[at].level = level;
    s->at[at].with = ZSTD_createCDict(d->content, d->bytes, level);
    return s->at[at].with;
}

bool squeezer_use(struct squeezer *s, const struct dictionaries *d, ZSTD_CCtx *c, int level)
{
    const struct dictionary *newest = level >= DICTIONARY_LEVEL_MIN ? dictionary_newest(d) : NULL;
    ZSTD_CDict *with = NULL;

    ZSTD_CCtx_refCDict(c, NULL); /* before its owner may go */
    if (newest && s->id != newest->id) {
        squeezer_free(s);
        s->id = newest->id;
    }
    if (newest)
        with = digested(s, newest, level);
    if (with && !ZSTD_isError(ZSTD_CCtx_refCDict(c, with)))
        return true;
    ZSTD_CCtx_setParameter(c, ZSTD_c_compressionLevel, level);
    return false;
}
