/* fibers.cpp: the exchange itself: callee-saved registers and the stack pointer on x86-64,
 * ucontext elsewhere. Compiled without ThreadSanitizer's instrumentation. */
#include "fibers.h"
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

#if defined(__x86_64__)
extern "C" void fiber_exchange(void **from, void *to);
__asm__(R"(
.text
.type fiber_exchange, @function
fiber_exchange:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size fiber_exchange, .-fiber_exchange
)");
#endif

void fiber_make(fiber *f, size_t stack_bytes, void (*start)()) {
    memset(f, 0, sizeof *f);
    // the lowest page may not be touched: a stack that is too small stops the program
    void *stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE)) {
        fprintf(stderr, "cuda_on_cpu: out of memory for a stack\n");
        abort();
    }
    f->stack = (char *)stack;
    f->stack_bytes = stack_bytes;
#if defined(__x86_64__)
    void **top = (void **)(f->stack + stack_bytes);
    *--top = nullptr;          // so that START finds the stack as after a call
    *--top = (void *)start;
    f->stack_pointer = top - 6; // six registers, all zero
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = stack_bytes;
    makecontext(&f->context, start, 0);
#endif
#if defined(FIBERS_WITH_TSAN)
    f->tsan = __tsan_create_fiber(0);
#endif
}

void fiber_adopt(fiber *f) {
    memset(f, 0, sizeof *f);
#if defined(FIBERS_WITH_TSAN)
    f->tsan = __tsan_get_current_fiber();
#endif
}

void fiber_arrived(fiber *self, fiber *from) {
    (void)self, (void)from;
#if defined(__SANITIZE_ADDRESS__)
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(self->asan, &bottom, &bytes);
    if (!from->stack_bytes) { // the system thread's stack, which only ASan knows
        from->stack = (char *)const_cast<void *>(bottom);
        from->stack_bytes = bytes;
    }
#endif
}

void fiber_switch(fiber *from, fiber *to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from->asan, to->stack, to->stack_bytes);
#endif
#if defined(FIBERS_WITH_TSAN)
    __tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
    fiber_exchange(&from->stack_pointer, to->stack_pointer);
#else
    swapcontext(&from->context, &to->context);
#endif
    fiber_arrived(from, to);
}

void fiber_release(void *token) {
    (void)token;
#if defined(FIBERS_WITH_TSAN)
    __tsan_release(token);
#endif
}

void fiber_acquire(void *token) {
    (void)token;
#if defined(FIBERS_WITH_TSAN)
    __tsan_acquire(token);
#endif
}
