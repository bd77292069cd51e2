/* blocks.cpp: the threads of a block as fibers, its barriers and the operations of its warps; one
 * block after the other. CUDA_ON_CPU_ORDER (runtime.cpp) turns their order round.
 * Compiled without ThreadSanitizer's instrumentation: what happens here orders nothing. */
#include "cuda_runtime.h"
#include "fibers.h"
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

using namespace cuda_on_cpu;

place *cuda_on_cpu::here;

namespace {

enum state { READY, AT_BARRIER, IN_WARP, ENDED };
enum { WARP_LANES = 32, MOST_THREADS = 1024, STACK_BYTES = 256 << 10 };

struct pending { copy what; int group; };

struct thread {
    fiber own;
    place at;
    state is;
    unsigned number, barriers;
    unsigned mask;                 // in a warp operation: whom it waits for,
    void *brought;                 // what it brought,
    void (*step)(void **, unsigned);
    std::vector<pending> copies;   // by cp.async, on their way
    int groups;
};

struct block {
    thread *threads[MOST_THREADS]; // made once, reused by all blocks
    unsigned made, n, arrived, ended;
    fiber *back;                   // the launcher's
    const std::function<void()> *body;
    thread *running;
    char tokens[2], begun, done;   // what ThreadSanitizer's order hangs on
    char warp_tokens[MOST_THREADS / WARP_LANES][2];
    unsigned warp_syncs[MOST_THREADS];
    void *shared;                  // exactly as many bytes as asked for: ASan sees their end
    size_t shared_bytes;
};

std::recursive_mutex one_at_a_time;
block now;

[[noreturn]] void die(const char *what) {
    const place *p = &now.running->at;
    fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u) thread (%u, %u, %u): %s\n", p->block.x,
            p->block.y, p->block.z, p->thread.x, p->thread.y, p->thread.z, what);
    fflush(stderr);
    abort();
}

void stop(state is) {
    thread *self = now.running;
    self->is = is;
    fiber_switch(&self->own, now.back);
}

void free_barrier() {
    if (!now.arrived || now.arrived + now.ended < now.n) return;
    now.arrived = 0;
    for (unsigned i = 0; i < now.n; i++)
        if (now.threads[i]->is == AT_BARRIER) now.threads[i]->is = READY;
}

void run_thread() {
    fiber_arrived(&now.running->own, now.back);
    for (;;) {
        fiber_acquire(&now.begun);
        (*now.body)();
        fiber_release(&now.done);
        if (!now.running->copies.empty()) die("ends with copies that nobody waited for");
        now.ended++;
        free_barrier();
        stop(ENDED);
    }
}

void stuck() {
    unsigned barrier = 0, warp = 0;
    for (unsigned i = 0; i < now.n; i++) {
        barrier += now.threads[i]->is == AT_BARRIER;
        warp += now.threads[i]->is == IN_WARP;
        if (now.threads[i]->is != ENDED) now.running = now.threads[i];
    }
    char text[160];
    snprintf(text, sizeof text, "waits for ever: %u threads are at __syncthreads(), %u in a warp "
             "operation, %u have ended", barrier, warp, now.ended);
    die(text);
}

bool backwards() {
    const char *order = getenv("CUDA_ON_CPU_ORDER");
    return order && !strcmp(order, "reverse");
}

void run_block(const place &at, unsigned turn, bool reverse) {
    now.arrived = now.ended = 0;
    for (unsigned i = 0; i < now.n; i++) {
        // a fiber is another thread in the next block, so that races between blocks show
        thread *t = now.threads[(i + turn) % now.n];
        t->at = at;
        t->at.thread = dim3(i % at.threads.x, i / at.threads.x % at.threads.y,
                            i / at.threads.x / at.threads.y);
        t->number = i;
        t->is = READY;
        t->barriers = 0;
        t->groups = 0;
        now.warp_syncs[i] = 0;
    }
    std::vector<thread *> in_order(now.n);
    for (unsigned i = 0; i < now.n; i++) in_order[now.threads[i]->number] = now.threads[i];
    for (unsigned i = 0; i < now.n; i++) now.threads[i] = in_order[i];
    if (now.shared_bytes) {
        if (posix_memalign(&now.shared, 128, now.shared_bytes)) abort();
        memset(now.shared, 0xff, now.shared_bytes);
    }
    fiber_release(&now.begun);
    while (now.ended < now.n) {
        bool moved = false;
        for (unsigned i = 0; i < now.n; i++) {
            thread *t = now.threads[reverse ? now.n - 1 - i : i];
            if (t->is != READY) continue;
            moved = true;
            now.running = t;
            here = &t->at;
            fiber_switch(now.back, &t->own);
        }
        if (!moved) stuck();
    }
}

} // namespace

void cuda_on_cpu::run_grid(dim3 grid, dim3 threads, size_t shared,
                           const std::function<void()> &body) {
    std::lock_guard<std::recursive_mutex> lock(one_at_a_time);
    static fiber back; // fibers come back to it across launches
    fiber_adopt(&back);
    now.back = &back;
    now.body = &body;
    now.n = threads.x * threads.y * threads.z;
    for (; now.made < now.n; now.made++) {
        now.threads[now.made] = new thread{};
        fiber_make(&now.threads[now.made]->own, STACK_BYTES, run_thread);
    }
    now.shared = nullptr;
    now.shared_bytes = shared;
    std::vector<void *> all_shared; // kept until ThreadSanitizer has forgotten who wrote there
    const unsigned blocks = grid.x * grid.y * grid.z;
    const bool reverse = backwards();
    for (unsigned i = 0; i < blocks; i++) {
        const unsigned b = reverse ? blocks - 1 - i : i;
        const place at = {dim3(), dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y),
                          threads, grid};
        run_block(at, i % 7 * 5 + 1, reverse);
        all_shared.push_back(now.shared);
    }
    fiber_acquire(&now.done);
    for (void *memory : all_shared) free(memory);
}

// ---- inside a kernel

void cuda_on_cpu::sync_threads() {
    thread *self = now.running;
    char *token = &now.tokens[self->barriers++ % 2]; // two: the next barrier is another
    fiber_release(token);
    now.arrived++;
    self->is = AT_BARRIER;
    free_barrier();
    if (self->is == AT_BARRIER) fiber_switch(&self->own, now.back);
    fiber_acquire(token);
}

unsigned cuda_on_cpu::lane() { return now.running->number % WARP_LANES; }

void cuda_on_cpu::together(unsigned mask, void *mine, void (*step)(void **, unsigned)) {
    thread *self = now.running;
    const unsigned first = self->number / WARP_LANES * WARP_LANES;
    if (!(mask >> lane() & 1)) die("is not in the mask of its own warp operation");
    self->mask = mask;
    self->brought = mine;
    self->step = step;
    self->is = IN_WARP;
    void *lanes[WARP_LANES] = {};
    for (unsigned l = 0; l < WARP_LANES; l++) {
        if (!(mask >> l & 1)) continue;
        if (first + l >= now.n) die("waits for a lane that the block does not have");
        const thread *t = now.threads[first + l];
        if (t->is == ENDED) die("waits for a lane that has ended");
        if (t->is == IN_WARP && (t->mask != mask || t->step != step))
            die("meets lanes in another warp operation, or with another mask");
        if (t->is != IN_WARP) {
            fiber_switch(&self->own, now.back);
            return;
        }
        lanes[l] = t->brought;
    }
    step(lanes, mask);
    for (unsigned l = 0; l < WARP_LANES; l++)
        if (mask >> l & 1) now.threads[first + l]->is = READY;
}

static void nothing(void **, unsigned) {}

void cuda_on_cpu::sync_warp(unsigned mask) {
    thread *self = now.running;
    char *token = &now.warp_tokens[self->number / WARP_LANES][now.warp_syncs[self->number]++ % 2];
    fiber_release(token);
    together(mask, nullptr, nothing);
    fiber_acquire(token);
}

void cuda_on_cpu::do_shuffle(void **lanes, unsigned mask) {
    for (int l = 0; l < WARP_LANES; l++) {
        shuffle *s = (shuffle *)lanes[l];
        if (!s) continue;
        if (!(mask >> s->lane & 1)) die("reads the value of a lane that is not in the mask");
        s->result = ((shuffle *)lanes[s->lane])->value;
    }
}

void cuda_on_cpu::do_ballot(void **lanes, unsigned) {
    uint64_t bits = 0;
    for (int l = 0; l < WARP_LANES; l++)
        if (lanes[l]) bits |= ((shuffle *)lanes[l])->value << l;
    for (int l = 0; l < WARP_LANES; l++)
        if (lanes[l]) ((shuffle *)lanes[l])->result = bits;
}

void *cuda_on_cpu::dynamic_shared() { return now.shared; }

void cuda_on_cpu::misaligned() { die("reaches for memory across its own alignment"); }

void cuda_on_cpu::copy_later(void *to, const void *from, int bytes, int given) {
    thread *self = now.running;
    self->copies.push_back({{(char *)to, (const char *)from, bytes, given}, self->groups});
}

void cuda_on_cpu::copy_commit() { now.running->groups++; }

bool cuda_on_cpu::copy_due(int left, copy *c) {
    thread *self = now.running;
    if (self->copies.empty() || self->copies.front().group >= self->groups - left) return false;
    *c = self->copies.front().what;
    self->copies.erase(self->copies.begin());
    return true;
}
