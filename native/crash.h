/* crash.h - named moments at which a test lets the agent die.
 *
 * A build with -Dcrash_points=true kills itself (SIGKILL) when it comes to the point that
 * EPOCHD_CRASH_POINT=NAME:N names, for the Nth time; tests/crash lists the names. In every
 * other build a point is nothing at all.
 */
#ifndef EPOCHD_CRASH_H
#define EPOCHD_CRASH_H

#ifdef EPOCHD_CRASH_POINTS
void crash_point(const char *name);
#else
#define crash_point(name) ((void)0)
#endif

#endif
