/* guard.h: what becomes of a process that reads a mapped file where it ends no more.
 *
 * The system answers such a read with SIGBUS, also where a disk fails. Here, inside a guarded map,
 * the reader gets zeros instead from there to the map's end, and whoever asks is told, so that
 * work on a file ends in an error and not in the process's death. */
#ifndef GUARD_H
#define GUARD_H
#include <stdbool.h>
#include <stddef.h>

struct guard;

/* Guards the map of BYTES at BASE, a page's start, until guard_remove, which comes before munmap;
 * NULL without memory for it. */
struct guard *guard_add(const void *base, size_t bytes);
void guard_remove(struct guard *guard);
/* Whether a read in the map found no file. */
bool guard_broken(const struct guard *guard);
#endif
