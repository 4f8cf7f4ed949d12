/* choose.c - see choose.h. */
#include "choose.h"

#include <math.h>

/* ---- Zipf ------------------------------------------------------------------------------- */

/* The integral of x^-theta, its inverse, and the density. */
static double integral(double theta, double x)
{
    double log_x = log(x), t = (1 - theta) * log_x;

    return fabs(t) > 1e-8 ? expm1(t) / t * log_x : log_x * (1 + t / 2);
}

static double inverse(double theta, double x)
{
    double t = x * (1 - theta);

    if (t < -1)
        t = -1;
    return exp(fabs(t) > 1e-8 ? log1p(t) / t * x : x * (1 - t / 2));
}

static double density(double theta, double x)
{
    return exp(-theta * log(x));
}

static uint64_t divisor(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t rest = a % b;

        a = b;
        b = rest;
    }
    return a;
}

void zipf_init(struct zipf *z, uint64_t blocks, double theta)
{
    z->theta = theta;
    z->blocks = blocks;
    z->h_first = integral(theta, 1.5) - 1;
    z->h_last = integral(theta, (double)blocks + 0.5);
    z->shortcut = 2 - inverse(theta, integral(theta, 2.5) - density(theta, 2));
    /* Near the golden section, which spreads best; without a common divisor, so that each
     * rank gets a block of its own. */
    z->spread = (uint64_t)((double)blocks * 0.6180339887498949) | 1;
    while (divisor(z->spread, blocks) != 1)
        z->spread += 2;
}

static uint64_t rank(struct chooser *c)
{
    const struct zipf *z = &c->zipf;

    for (;;) {
        double unit = (double)(choose_random(c) >> 11) * 0x1p-53;
        double u = z->h_last + unit * (z->h_first - z->h_last);
        double x = inverse(z->theta, u), k = floor(x + 0.5);

        if (k < 1)
            k = 1;
        else if (k > (double)z->blocks)
            k = (double)z->blocks;
        if (k - x <= z->shortcut || u >= integral(z->theta, k + 0.5) - density(z->theta, k))
            return (uint64_t)k - 1;
    }
}

uint64_t zipf_block(struct chooser *c)
{
    uint64_t r = rank(c), n = c->zipf.blocks;

    if (n <= UINT32_MAX)
        return r * (c->zipf.spread % n) % n;
    return (uint64_t)((u128)r * c->zipf.spread % n);
}

/* ---- The whole -------------------------------------------------------------------------- */

static void weights(struct chooser *c, const uint32_t *weight)
{
    uint64_t sum = 0, up_to = 0;
    int kinds = 0;

    for (int op = 0; op < LOAD_OPS; op++) {
        sum += weight[op];
        if (weight[op]) {
            kinds++;
            c->only = op;
        }
    }
    if (kinds == 1)
        return;
    c->only = -1;
    for (int op = 0; op < LOAD_OPS; op++) {
        up_to += weight[op];
        c->below[op] = (up_to << 32) / sum;
    }
}

void choose_init(struct chooser *c, const load_workload *w, uint64_t stream, uint64_t blocks,
                 uint64_t part, uint64_t parts)
{
    *c = (struct chooser){.pattern = w->pattern, .state = w->seed, .blocks = blocks};
    /* Far apart in the generator's period, whatever the seeds. */
    c->state = choose_random(c) + stream * 0xd1342543de82ef95u;
    c->state = choose_random(c);
    c->begin = (uint64_t)((u128)blocks * part / parts);
    c->end = (uint64_t)((u128)blocks * (part + 1) / parts);
    if (c->begin == c->end && !w->once) { /* more queues than blocks */
        c->begin = 0;
        c->end = blocks;
    }
    c->next = c->begin;
    weights(c, w->weight);
    if (w->pattern == LOAD_ZIPF)
        zipf_init(&c->zipf, blocks, w->theta);
}

void load_draw(int pattern, double theta, uint64_t seed, uint64_t blocks, uint64_t *out,
               uint64_t count)
{
    load_workload w = {.pattern = pattern, .theta = theta, .seed = seed, .weight = {1}};
    struct chooser c;

    choose_init(&c, &w, 0, blocks, 0, 1);
    for (uint64_t i = 0; i < count; i++)
        out[i] = choose_block(&c);
}
