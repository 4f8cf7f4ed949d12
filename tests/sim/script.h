/* script.h - workloads: what the guest and the controller do, as a list that can be printed,
 * repeated and made shorter. */
#ifndef SIM_SCRIPT_H
#define SIM_SCRIPT_H

#include "world.h"

#define SCRIPT_MAX 256u

enum step_kind {
    STEP_WRITE, STEP_WRITE_ZEROES, STEP_DISCARD_RANGE, STEP_SEAL, STEP_COMMIT, STEP_COMMIT_OLDEST,
    STEP_DISCARD, STEP_PROMOTE, STEP_FLUSH, STEP_RUN, STEP_DRAIN, STEP_CRASH,
    STEP_SEAL_MANY
};

struct step {
    uint8_t kind;
    uint8_t disk;
    uint16_t sector, sectors;
    uint16_t rounds;             /* of the core afterwards */
};

struct script {
    struct setup setup;
    uint64_t seed;
    bool thorough;               /* every crash point, all outcomes */
    struct step step[SCRIPT_MAX];
    uint32_t steps;
};

/* What a seed stands for. */
void script_make(struct script *p, uint64_t seed);
/* Runs it, with crashes; at most `states` of them are looked at. */
void script_run(struct sim *s, const struct script *p, uint64_t states);
/* Makes a failing script shorter as long as it fails; ends with the failure in s. */
void script_shrink(struct sim *s, struct script *p);
void script_print(const struct script *p, FILE *out);
void script_print_io(const struct world *w, FILE *out);

#endif
