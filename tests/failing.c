/* failing.c: what happens when memory, a map or a thread is refused, at every place where one is
 * asked for:
 *
 *     failing FILE...        each a language model of 600 positions or more
 *     failing broken FILE... the same, whose numbers are not finite
 *
 * A walk through llama.h runs undisturbed first. Then it runs with its first request refused, its
 * second, and so on until it needs no more; after each one the step that failed runs again, and
 * the walk must come to the same numbers as if nothing had happened. Then each time with all
 * requests refused from that one on. Whatever happens, a failure is a sentence about it, and what
 * was taken is given back. The linker puts the functions below in the place of those that they are
 * named after. A broken model's walk is one that must fail, and say so. */
#include "../lib/llama.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// ---- what may be refused

static atomic_long asked, held; // requests so far; those granted and not given back
static long refused_from, refused_to;

static bool refuse(void) {
    const long n = atomic_fetch_add(&asked, 1) + 1;
    return n >= refused_from && n <= refused_to;
}

static void *granted(void *memory) {
    if (memory) held++;
    return memory;
}

#define WRAPPED(type, name, ...)                                                                   \
    type __real_##name(__VA_ARGS__);                                                               \
    type __wrap_##name(__VA_ARGS__);                                                               \
    type __wrap_##name(__VA_ARGS__)
WRAPPED(void *, malloc, size_t n) { return refuse() ? NULL : granted(__real_malloc(n)); }

WRAPPED(void *, calloc, size_t n, size_t size) {
    return refuse() ? NULL : granted(__real_calloc(n, size));
}

WRAPPED(void *, realloc, void *old, size_t n) {
    if (refuse()) return NULL;
    void *memory = __real_realloc(old, n);
    return old ? memory : granted(memory);
}

WRAPPED(int, posix_memalign, void **memory, size_t alignment, size_t n) {
    if (refuse()) return ENOMEM;
    const int error = __real_posix_memalign(memory, alignment, n);
    if (!error) held++;
    return error;
}

WRAPPED(char *, strdup, const char *text) {
    return refuse() ? NULL : granted(__real_strdup(text));
}

WRAPPED(void, free, void *memory) {
    if (memory) held--;
    __real_free(memory);
}

WRAPPED(void *, mmap, void *at, size_t n, int access, int flags, int fd, off_t offset) {
    if (refuse()) return errno = ENOMEM, MAP_FAILED;
    void *memory = __real_mmap(at, n, access, flags, fd, offset);
    if (memory != MAP_FAILED) held++;
    return memory;
}

WRAPPED(int, munmap, void *at, size_t n) {
    held--;
    return __real_munmap(at, n);
}

WRAPPED(int, open, const char *path, int flags, ...) {
    if (refuse()) return errno = EMFILE, -1;
    const int fd = __real_open(path, flags);
    if (fd >= 0) held++;
    return fd;
}

WRAPPED(int, close, int fd) {
    held--;
    return __real_close(fd);
}

WRAPPED(int, pthread_create, pthread_t *thread, const pthread_attr_t *attributes,
        void *(*work)(void *), void *context) {
    if (refuse()) return EAGAIN;
    const int error = __real_pthread_create(thread, attributes, work, context);
    if (!error) held++;
    return error;
}

WRAPPED(int, pthread_join, pthread_t thread, void **result) {
    held--;
    return __real_pthread_join(thread, result);
}

// ---- the walk

enum { PROMPT = 560, FORKED = 70, COLUMNS = 96, INPUTS = 7 };
enum { MOST_BYTES = 1 << 16, MOST_KV = 1 << 18, NUMBERS = 1 << 15 };

struct walk {
    const char *path;
    llama_model *model;
    llama_session *session;
    uint64_t digest;      // of all that came out
    double mu;
    size_t matrix;
};

static float numbers[NUMBERS], moments[COLUMNS * COLUMNS];
static uint8_t bytes[MOST_BYTES], kv[MOST_KV];

static void note(struct walk *w, const void *what, size_t n) {
    const uint8_t *byte = what;
    for (size_t i = 0; i < n; i++) w->digest = (w->digest ^ byte[i]) * 0x100000001b3;
}

/* N tokens behind what SEQUENCE holds; the last WANTED of them into LOGITS, or kept. */
static int feed(struct walk *w, int32_t sequence, size_t n, size_t wanted, float *logits) {
    static int32_t tokens[PROMPT], sequences[PROMPT], positions[PROMPT];
    static uint8_t want[PROMPT];
    uint32_t length;
    if (llama_length(w->session, sequence, &length)) return -1;
    for (size_t i = 0; i < n; i++) {
        positions[i] = (int32_t)(length + i);
        tokens[i] = positions[i] * 7 % 40;
        sequences[i] = sequence;
        want[i] = i + wanted >= n;
    }
    const llama_batch batch = {.n = n, .tokens = tokens, .sequences = sequences,
                               .positions = positions, .want = want};
    return llama_forward(w->session, &batch, logits);
}

static int open_model(struct walk *w) { return llama_open(w->path, &w->model); }

static int open_session(struct walk *w) {
    const llama_session_options options = {.threads = 3, .kv_kind = -1};
    return llama_session_open(w->model, &options, &w->session);
}

static int prompt(struct walk *w) { return feed(w, 0, PROMPT, 2, NULL); }

static int choose(struct walk *w, llama_sampling s) {
    static const int32_t seen[] = {1, 2, 3, 2}, biased[] = {5};
    static const float bias[] = {0.5f};
    int32_t token;
    s.bias_tokens = biased, s.bias_values = bias, s.n_bias = 1;
    s.repetition_penalty = 1.3f, s.presence_penalty = 0.1f, s.seed = 3;
    if (llama_sample(w->session, 1, &s, seen, 4, 2, 0, 0, &token)) return -1;
    note(w, &token, sizeof token);
    return 0;
}

static int greedy(struct walk *w) {
    return choose(w, (llama_sampling){.top_p = 1, .typical_p = 1});
}

static int filters(struct walk *w) {
    return choose(w, (llama_sampling){.temperature = 1.5f, .top_k = 30, .top_p = 0.95f,
                                      .min_p = 0.01f, .typical_p = 0.9f});
}

static int mirostat(struct walk *w) {
    const int rc = choose(w, (llama_sampling){.temperature = 1, .top_p = 1, .typical_p = 1,
                                              .mirostat_tau = 3, .mirostat_eta = 0.1f,
                                              .mirostat_mu = &w->mu});
    if (!rc) note(w, &w->mu, sizeof w->mu);
    return rc;
}

static int logprobs(struct walk *w) {
    int32_t ids[5];
    double top[5], one;
    if (llama_logprobs(w->session, 0, 7, &one, 5, ids, top)) return -1;
    note(w, ids, sizeof ids);
    note(w, top, sizeof top);
    return 0;
}

static int fork_it(struct walk *w) { return llama_fork(w->session, 0, 1, FORKED); }

/* Writes into a page that sequence 0 shares, and behind it. */
static int grow_fork(struct walk *w) {
    if (feed(w, 1, 40, 40, numbers)) return -1;
    note(w, numbers, 40 * 44 * sizeof *numbers);
    return 0;
}

static int trim(struct walk *w) { return llama_trim(w->session, 0, PROMPT - 30); }
static int fork_more(struct walk *w) { return llama_fork(w->session, 0, 2, PROMPT - 50); }

/* Sequence 2 shares the pages, so that those of sequence 0 that move are new. */
static int slide(struct walk *w) { return llama_slide(w->session, 0, 4, 200); }

static int read_kv(struct walk *w) {
    llama_session_info info;
    if (llama_get_session_info(w->session, &info)) return -1;
    if (llama_read_kv(w->session, 0, 1, 50, kv, 50 * info.kv_bytes_per_position)) return -1;
    note(w, kv, 50 * info.kv_bytes_per_position);
    return 0;
}

static int write_kv(struct walk *w) {
    llama_session_info info;
    if (llama_get_session_info(w->session, &info)) return -1;
    return llama_write_kv(w->session, 3, 0, 50, kv, 50 * info.kv_bytes_per_position);
}

static int empty(struct walk *w) { return llama_trim(w->session, 0, 0); }

static int stage(struct walk *w) {
    static float stream[NUMBERS];
    for (size_t i = 0; i < NUMBERS; i++) stream[i] = (float)(i % 13) - 6;
    const llama_stage s = {.n = 40, .stream = stream, .inputs = numbers};
    if (llama_run_stage(w->session, &s)) return -1;
    note(w, numbers, 40 * 24 * sizeof *numbers);
    return 0;
}

static int add_moments(struct walk *w) {
    float x[INPUTS * COLUMNS];
    for (size_t i = 0; i < INPUTS * COLUMNS; i++) x[i] = (float)(i * i % 23) - 11;
    const int rc = llama_add_moments(x, INPUTS, COLUMNS, 0, 2, moments);
    note(w, moments, rc ? 0 : sizeof moments);
    return rc;
}

static int factor_moments(struct walk *w) {
    const int rc = llama_factor_moments(moments, COLUMNS, 0.01, 2);
    note(w, moments, rc ? 0 : sizeof moments);
    return rc;
}

/* FACTOR is of more columns than the matrix has: read as one of fewer, it is as good as any. */
static int encode(struct walk *w, uint32_t kind, const float *factor) {
    llama_tensor t;
    llama_loss loss;
    if (llama_get_tensor(w->model, w->matrix, &t)) return -1;
    const size_t groups = (t.shape[1] + 31) / 32, strips = (t.shape[0] + 15) / 16;
    const size_t n = strips * groups * 16 * (kind == LLAMA_Q8 ? 34 : 18);
    if (llama_quantize(w->model, w->matrix, 0, t.shape[0], kind, factor, 2, bytes, n, &loss))
        return -1;
    note(w, bytes, n);
    note(w, &loss, sizeof loss);
    return 0;
}

static int encode_q8(struct walk *w) { return encode(w, LLAMA_Q8, NULL); }
static int encode_q4(struct walk *w) { return encode(w, LLAMA_Q4, moments); }

static int multiply(struct walk *w) {
    llama_tensor t;
    float x[2 * COLUMNS];
    for (size_t i = 0; i < 2 * COLUMNS; i++) x[i] = (float)(i % 11) - 5;
    if (llama_get_tensor(w->model, w->matrix, &t)) return -1;
    if (llama_multiply(w->model, w->matrix, 0, t.shape[0], t.kind, NULL, 0, x, 2, 2, numbers))
        return -1;
    note(w, numbers, 2 * t.shape[0] * sizeof *numbers);
    return 0;
}

static int bandwidth(struct walk *w) {
    double rate;
    (void)w;
    return llama_measure_bandwidth(2, 1 << 16, &rate);
}

static int close_both(struct walk *w) { // in the order that leaves more to do
    llama_close(w->model);
    llama_session_close(w->session);
    w->model = NULL;
    w->session = NULL;
    return 0;
}

static const struct { const char *name; int (*run)(struct walk *w); } steps[] = {
    {"open", open_model}, {"open a session", open_session}, {"prompt", prompt},
    {"sample greedily", greedy}, {"sample with filters", filters}, {"mirostat", mirostat},
    {"logprobs", logprobs}, {"fork", fork_it}, {"grow a fork", grow_fork}, {"trim", trim},
    {"fork once more", fork_more}, {"slide", slide}, {"read_kv", read_kv}, {"write_kv", write_kv},
    {"empty", empty}, {"stage", stage}, {"add moments", add_moments},
    {"factor moments", factor_moments}, {"encode q8", encode_q8}, {"encode q4", encode_q4},
    {"multiply", multiply}, {"measure", bandwidth}, {"close", close_both},
};
enum { STEPS = sizeof steps / sizeof *steps };

// ---- the judge

static long failures;

static void wrong(const struct walk *w, long n, const char *step, const char *what) {
    failures++;
    printf("%s, request %ld, %s: %s\n", w->path, n, step, what);
}

/* That the last error speaks of what was refused, in one line that is not an older one. */
static void judge_sentence(const struct walk *w, long n, const char *step) {
    static const char *const known[] = {"out of memory", "cannot map it: Cannot allocate",
                                        "Too many open files", "cannot start thread "};
    const char *error = llama_error();
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strstr(error, known[i]) && !strchr(error, '\n')) return;
    wrong(w, n, step, error);
}

static void lengths(const struct walk *w, uint32_t out[4]) {
    for (int32_t i = 0; i < 4; i++)
        if (!w->session || llama_length(w->session, i, &out[i])) out[i] = 0;
}

/* Runs all steps, request N refused, or all FROM there on; how many requests there were. */
static long run(struct walk *w, long n, bool from) {
    bool failed = false;
    memset(moments, 0, sizeof moments);
    asked = 0;
    refused_from = n;
    refused_to = from ? 1L << 40 : n;
    for (size_t i = 0; i < STEPS; i++) {
        uint32_t before[4], after[4];
        lengths(w, before);
        llama_trim(NULL, 0, 0); // leaves an error that is not about what follows
        if (!steps[i].run(w)) continue;
        judge_sentence(w, n, steps[i].name);
        lengths(w, after);
        if (memcmp(before, after, sizeof before)) wrong(w, n, steps[i].name, "lengths changed");
        if (failed) wrong(w, n, steps[i].name, "failed once more");
        if (failed || from) {
            failed = true;
            break;
        }
        failed = true;
        i--;
    }
    if (n && n <= asked && !failed) wrong(w, n, "the walk", "a refusal was not told");
    refused_from = refused_to = 0;
    const long needed = asked;
    close_both(w);
    if (held) wrong(w, n, "close", "something was not given back");
    held = 0;
    return needed;
}

static struct walk start(const char *path) {
    return (struct walk){.path = path, .digest = 0xcbf29ce484222325, .mu = 6};
}

/* The first matrix of a layer. */
static int find_matrix(const char *path, size_t *matrix) {
    llama_model *model;
    llama_tensor t = {0};
    if (llama_open(path, &model)) return -1;
    for (*matrix = 0; t.n_dims != 2 || !strstr(t.name, "attention"); ++*matrix)
        if (llama_get_tensor(model, *matrix, &t)) break;
    --*matrix;
    llama_close(model);
    return 0;
}

/* A model whose own numbers are a failure, and who says so may be refused what it needs for that:
 * how many requests there were. */
static long run_broken(const char *path, long n) {
    struct walk w = start(path);
    asked = 0;
    refused_from = refused_to = n;
    if (!open_model(&w) && !open_session(&w) && !prompt(&w)) {
        llama_trim(NULL, 0, 0);
        if (!greedy(&w)) wrong(&w, n, "sample", "it chose a token");
        if (!strstr(llama_error(), "the logit of") && !strstr(llama_error(), "not finite"))
            judge_sentence(&w, n, "sample");
        llama_trim(NULL, 0, 0);
        if (!feed(&w, 0, 3, 1, numbers)) wrong(&w, n, "forward", "it gave logits");
        if (!strstr(llama_error(), "not finite")) judge_sentence(&w, n, "forward");
    } else {
        judge_sentence(&w, n, "open or prompt");
    }
    refused_from = refused_to = 0;
    close_both(&w);
    if (held) wrong(&w, n, "close", "something was not given back");
    held = 0;
    return asked;
}

static void refuse_each(const char *path) {
    struct walk right = start(path);
    if (find_matrix(path, &right.matrix)) return wrong(&right, 0, "open", llama_error());
    const struct walk fresh = right;
    const long needed = run(&right, 0, false);
    for (long n = 1; n <= needed && !failures; n++) {
        struct walk once = fresh, on = fresh;
        run(&once, n, false);
        if (once.digest != right.digest) wrong(&once, n, "the walk", "other numbers came out");
        run(&on, n, true);
    }
    printf("%s: %ld requests refused, one by one and from each on\n", path, needed);
}

/* A process's first model leaves an entry in lib/guard.c's list, which the next ones use again. */
static void open_first(const char *path) {
    for (long n = 1; n == 1 || n <= asked + 1; n++) {
        struct walk w = start(path);
        asked = 0;
        refused_from = refused_to = n;
        const int failed = open_model(&w);
        refused_from = refused_to = 0;
        if (failed) judge_sentence(&w, n, "open");
        close_both(&w);
    }
    if (held > 1) wrong(&(struct walk){.path = path}, 0, "close", "more than a guard stayed");
    held = 0;
}

int main(int count, char **arguments) {
    const int broken = count > 1 && !strcmp(arguments[1], "broken");
    if (count > 1 + broken) open_first(arguments[1 + broken]);
    for (int i = 1 + broken; i < count; i++) {
        if (!broken) {
            refuse_each(arguments[i]);
            continue;
        }
        const long needed = run_broken(arguments[i], 0);
        for (long n = 1; n <= needed; n++) run_broken(arguments[i], n);
        printf("%s: %ld requests refused, one by one\n", arguments[i], needed);
    }
    return failures > 0;
}
