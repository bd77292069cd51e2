/* fibers.h: one system thread's stack exchanged for another's, in sight of the sanitizers.
 *
 * AddressSanitizer is told which stack is in use, ThreadSanitizer that each fiber is a thread of
 * its own and that an exchange orders nothing: only what the kernel does may. */
#ifndef FIBERS_H
#define FIBERS_H
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(FIBERS_WITH_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct fiber {
#if defined(__x86_64__)
    void *stack_pointer;
#else
    ucontext_t context;
#endif
    char *stack;        // NULL: the system thread's own
    size_t stack_bytes;
    void *asan, *tsan;
};

/* A fiber that begins in START at the first fiber_switch to it; START never returns. */
void fiber_make(fiber *f, size_t stack_bytes, void (*start)());
/* The system thread as a fiber that others can come back to. */
void fiber_adopt(fiber *f);
void fiber_switch(fiber *from, fiber *to);
/* START calls this first; FROM is who came here. */
void fiber_arrived(fiber *self, fiber *from);
/* Everything before a release is seen after an acquire of the same TOKEN. */
void fiber_release(void *token);
void fiber_acquire(void *token);
#endif
