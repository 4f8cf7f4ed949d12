/* model.c - see model.h. */
#include "model.h"

#include <stddef.h>
#include <string.h>

#include "check.h"
#include "format.h"
#include "rng.h"

const uint8_t *model_pattern(uint32_t value)
{
    static uint8_t pattern[MODEL_VALUES][SECTOR_BYTES];
    static bool made;

    for (uint32_t v = 1; !made && v < MODEL_VALUES; v++) {
        struct rng r = {.state = v};

        for (uint32_t i = 0; i < SECTOR_BYTES; i += 8) {
            /* Every third one is for the compressor to shrink. */
            uint64_t word = i > 8 && v % 3 == 0 ? v : rng_next(&r) | 1;
            memcpy(&pattern[v][i], &word, sizeof(word));
        }
    }
    made = true;
    return pattern[value];
}

uint32_t model_fresh_value(struct model *m)
{
    m->next_value = m->next_value % (MODEL_VALUES - 1) + 1;
    return m->next_value;
}

void model_init(struct model *m, const uint64_t *bytes, uint32_t disks)
{
    memset(m, 0, sizeof(*m));
    m->disks = disks;
    for (uint32_t i = 0; i < disks; i++)
        m->first[i + 1] = m->first[i] + (uint32_t)(bytes[i] / SECTOR_BYTES);
    m->sectors = m->first[disks];
    check(m->sectors <= MODEL_SECTORS_MAX);
    m->id_used = 1;
    m->generation = 1;
}

void model_copy(struct model *to, const struct model *from)
{
    memcpy(to, from, offsetof(struct model, sealed) +
                         from->sealed_count * sizeof(from->sealed[0]));
    memcpy(&to->sealed_count, &from->sealed_count,
           sizeof(*from) - offsetof(struct model, sealed_count));
}

const struct model_image *model_image_of(const struct model *m, uint64_t id)
{
    if (id == m->committed_id)
        return &m->committed;
    for (uint32_t i = 0; i < m->sealed_count; i++)
        if (m->sealed[i].id == id)
            return &m->sealed[i].image;
    return NULL;
}

bool model_allowed(const struct model *m, uint64_t id)
{
    if (id == m->committed_id)
        return true;
    for (uint32_t i = 0; i < m->attempts; i++)
        if (m->attempt[i] == id && id > m->committed_id)
            return true;
    return false;
}

void model_sealed(struct model *m, uint64_t id)
{
    check(m->sealed_count < MODEL_EPOCHS_MAX);
    m->sealed[m->sealed_count].id = id;
    m->sealed[m->sealed_count++].image = m->open;
    m->id_used = id + 1;
}

void model_attempt(struct model *m, uint64_t id)
{
    for (uint32_t i = 0; i < m->attempts; i++)
        if (m->attempt[i] == id)
            return;
    check(m->attempts < MODEL_ATTEMPTS_MAX);
    m->attempt[m->attempts++] = id;
}

bool model_committed(struct model *m, uint64_t id)
{
    uint32_t n = 0;

    while (n < m->sealed_count && m->sealed[n].id < id)
        n++;
    if (n == m->sealed_count || m->sealed[n].id != id)
        return false;
    m->committed = m->sealed[n].image;
    m->committed_id = id;
    n++;
    memmove(m->sealed, m->sealed + n, (m->sealed_count - n) * sizeof(m->sealed[0]));
    m->sealed_count -= n;
    m->attempts = 0;
    return true;
}

void model_discarded(struct model *m, uint64_t last)
{
    m->sealed_count = 0;
    m->attempts = 0;
    m->open = m->committed;
    m->dropped = last;
    m->id_used = last + 1;
}

void model_restarted(struct model *m, uint64_t id)
{
    if (id != m->committed_id)
        m->committed = *model_image_of(m, id);
    m->committed_id = id;
    m->open = m->committed;
    m->sealed_count = 0;
    m->attempts = 0;
}
