/* crash.c - see crash.h. Any thread; only in builds with crash points. */
#include "crash.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *wanted;
static size_t wanted_bytes;
static long visits_left;

/* Before main: no thread of ours runs yet. */
__attribute__((constructor)) static void crash_init(void)
{
    const char *value = getenv("EPOCHD_CRASH_POINT"), *colon;

    if (!value)
        return;
    colon = strchr(value, ':');
    wanted = value;
    wanted_bytes = colon ? (size_t)(colon - value) : strlen(value);
    visits_left = colon ? atol(colon + 1) : 1;
}

void crash_point(const char *name)
{
    if (!wanted || strlen(name) != wanted_bytes || memcmp(name, wanted, wanted_bytes) != 0)
        return;
    if (__atomic_sub_fetch(&visits_left, 1, __ATOMIC_RELAXED) != 0)
        return;
    kill(getpid(), SIGKILL);
    for (;;)
        pause(); /* this thread gets no further */
}
