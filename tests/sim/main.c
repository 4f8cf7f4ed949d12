/* main.c - the simulator's command line; tests/sim/run builds it and runs several of these.
 *
 *   simulator [--seed S] [--states N] [--faults PERCENT] [--mutant M] [--replay RUN]
 *
 * Prints one line of figures at the end. Exit status 0: no failure; 1: a state that must not
 * be, with its seed and a shrunk trace on stdout; 2: usage.
 */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <malloc.h>

#include "mutant.h"
#include "script.h"

typedef unsigned long long ull;

enum mutant mutant_active;

static uint64_t run_seed; /* for the report of an abort */

static void aborted(int number)
{
    fprintf(stdout, "FAILED: the core stopped with signal %d, run %llu\n", number, (ull)run_seed);
    fflush(stdout);
    _Exit(1);
}

static void report(struct sim *s, struct script *p, bool shrink)
{
    printf("FAILED: %s\n  run %llu, %u steps\n", s->failure, (ull)p->seed, p->steps);
    fflush(stdout);
    if (!shrink)
        return;
    script_shrink(s, p);
    printf("  shrunk to %u steps: %s\n", p->steps, s->failure);
    script_print(p, stdout);
    for (uint32_t i = 0; i <= s->failed_depth; i++) {
        printf("  the last I/O of host %u:\n", i);
        script_print_io(s->world[i], stdout);
    }
}

static int usage(void)
{
    fprintf(stderr, "usage: simulator [--seed S] [--states N] [--faults PERCENT] [--mutant M] "
                    "[--replay RUN] [--no-shrink]\n");
    return 2;
}

int main(int argc, char **argv)
{
    uint64_t seed = 1, states = 100000, replay = 0, runs = 0;
    static struct script script;
    uint32_t faults = 0;
    bool shrink = true;
    struct sim *s;

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--no-shrink") == 0) {
            shrink = false;
            continue;
        }
        if (i + 1 >= argc)
            return usage();
        if (strcmp(argv[i], "--seed") == 0)
            seed = strtoull(argv[++i], NULL, 0);
        else if (strcmp(argv[i], "--states") == 0)
            states = strtoull(argv[++i], NULL, 0);
        else if (strcmp(argv[i], "--faults") == 0)
            faults = (uint32_t)strtoul(argv[++i], NULL, 0);
        else if (strcmp(argv[i], "--mutant") == 0)
            mutant_active = (enum mutant)strtoul(argv[++i], NULL, 0);
        else if (strcmp(argv[i], "--replay") == 0)
            replay = strtoull(argv[++i], NULL, 0);
        else
            return usage();
    }
    signal(SIGABRT, aborted);
    signal(SIGSEGV, aborted);
    /* Recoveries allocate and free the same few megabytes over and over. */
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    s = sim_new();
    while (!s->failed && (replay ? runs == 0 : s->states < states)) {
        run_seed = replay ? replay : rng_mix(seed, runs);
        script_make(&script, run_seed);
        if (faults)
            script.setup.fault_percent = faults;
        script_run(s, &script, script.thorough ? 2500 : 1500);
        runs++;
    }
    printf("runs=%llu states=%llu power_cuts=%llu kills=%llu arena_removed=%llu nested=%llu "
           "points=%llu faults=%llu commits=%llu clusters=%llu spilled_pages=%llu with_dictionary=%llu merges=%llu failures=%d\n",
           (ull)runs, (ull)s->states, (ull)s->kinds[CRASH_HOST],
           (ull)(s->kinds[CRASH_AGENT] + s->kinds[CRASH_AGENT_EARLY]),
           (ull)s->kinds[CRASH_AGENT_NO_ARENA], (ull)s->nested, (ull)s->points, (ull)s->faults,
           (ull)s->commits, (ull)s->clusters, (ull)s->spilled,
           (ull)s->with_dictionary, (ull)s->merges, s->failed);
    fflush(stdout);
    if (!s->failed) {
        sim_free(s);
        return 0;
    }
    report(s, &script, shrink);
    return 1;
}
