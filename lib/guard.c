/* guard.c: the process's one SIGBUS handler, and the list of maps that it looks at.
 *
 * A handler may interrupt anything, in any thread, so the list has no lock: its entries are never
 * freed, only used again, and change by single atomic steps. That a map is there while one reads
 * it is the reader's own business. A fault elsewhere goes to whoever handled SIGBUS before. */
#include "guard.h"
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

struct guard {
    atomic_uintptr_t base;   // 0: free; TAKEN: about to be filled
    atomic_size_t bytes;
    atomic_bool broken;
    struct guard *next;
};

enum { TAKEN = 1 };
static _Atomic(struct guard *) guards;
static struct sigaction before; // whom SIGBUS went to
static atomic_bool changing;    // one thread sets the handler at a time
static atomic_size_t page;

/* Zeros from ADDRESS's page to the end of its map; false where it lies in none. */
static bool patch(uintptr_t address) {
    for (struct guard *g = atomic_load(&guards); g; g = g->next) {
        const uintptr_t base = atomic_load(&g->base);
        const size_t bytes = atomic_load(&g->bytes);
        if (base <= TAKEN || address < base || address - base >= bytes ||
            base != atomic_load(&g->base))
            continue;
        const uintptr_t from = address - address % atomic_load(&page);
        atomic_store(&g->broken, true); // before anyone can read a zero
        return mmap((void *)from, base + bytes - from, PROT_READ,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
    }
    return false;
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    const int error = errno;
    const bool fault = info->si_code > 0; // else someone sent it
    if (fault && patch((uintptr_t)info->si_addr)) {
        errno = error;
        return;
    }
    if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(number, info, context);
    else if (before.sa_handler == SIG_IGN && !fault) errno = error;
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
        before.sa_handler(number);
    else { // the same again, on return, kills
        signal(number, SIG_DFL);
        if (!fault) raise(number);
    }
    errno = error;
}

/* Sets the handler, once, or again where none is left. One that others set later stays: they were
 * told of ours, and two that call each other would never end. */
static void install(void) {
    static bool installed;
    struct sigaction now, ours = {.sa_flags = SA_SIGINFO | SA_ONSTACK};
    if (atomic_exchange(&changing, true)) return;
    ours.sa_sigaction = on_sigbus;
    sigemptyset(&ours.sa_mask);
    if (!sigaction(SIGBUS, NULL, &now)) {
        const bool none = !(now.sa_flags & SA_SIGINFO) &&
                          (now.sa_handler == SIG_DFL || now.sa_handler == SIG_IGN);
        if (none || !installed) {
            before = now;
            installed = !sigaction(SIGBUS, &ours, NULL);
        }
    }
    atomic_store(&changing, false);
}

struct guard *guard_add(const void *base, size_t bytes) {
    struct guard *g = atomic_load(&guards);
    uintptr_t free_now = 0;
    atomic_store(&page, (size_t)sysconf(_SC_PAGESIZE));
    while (g && !atomic_compare_exchange_strong(&g->base, &free_now, TAKEN)) {
        free_now = 0;
        g = g->next;
    }
    if (!g) {
        g = calloc(1, sizeof *g);
        if (!g) return NULL;
        atomic_init(&g->base, TAKEN);
        g->next = atomic_load(&guards);
        while (!atomic_compare_exchange_weak(&guards, &g->next, g)) {}
    }
    atomic_store(&g->bytes, bytes);
    atomic_store(&g->broken, false);
    atomic_store(&g->base, (uintptr_t)base);
    install();
    return g;
}

void guard_remove(struct guard *guard) {
    if (guard) atomic_store(&guard->base, 0);
}

bool guard_broken(const struct guard *guard) { return guard && atomic_load(&guard->broken); }
