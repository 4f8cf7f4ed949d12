/* notifier.h - adds one to an eventfd that a front end gave us, and never waits for it.
 *
 * write() waits while the count stands at its top, unless O_NONBLOCK is set. That flag is the
 * open file's, which the front end shares: it may clear it and fill the count at any moment,
 * so looking first does not help. The kernel itself signals eventfds without waiting, and
 * does so for one that is registered with an io_uring whenever that ring completes
 * something: a notifier is such a ring, completing a NOP. Costs 0.15 us more than write().
 *
 * Owner: the thread that opened it; any thread may close it once that one has ended.
 */
#ifndef EPOCHD_NOTIFIER_H
#define EPOCHD_NOTIFIER_H

#include <stdbool.h>

struct notifier;

/* Is it an eventfd? False also where /proc cannot tell; *why is a sentence then. */
bool notifier_takes(int fd, const char **why);

/* Takes the descriptor over, also on failure. */
int notifier_open(struct notifier **out, int fd);
void notifier_close(struct notifier *n);
void notifier_signal(struct notifier *n);

#endif
