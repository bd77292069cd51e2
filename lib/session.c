/* session.c: the door to what runs: a model on a device, with its cache. It checks every argument,
 * holds the session's lock, keeps the cache's books, and calls the backend. */
#include "backend.h"
#include "error.h"
#include "handles.h"
#include "llama.h"
#include "rope.h"
#include "sampler.h"
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct row {
    int32_t token, sequence, position, rope_length;
    bool want;
};

struct llama_session {
    llama_model *model;
    const struct backend *backend;
    void *state;           // the backend's
    struct cache cache;
    pthread_mutex_t lock;  // held through each call
    pid_t process;         // that opened it; a fork has a copy, and no worker threads
    llama_session_info info;
    float *kept;           // (n_kept, n_outputs) logits of the last forward; where they are
    size_t n_kept, kept_room;
    bool on_device;        // on the device, room for one row of them
    struct row *last;      // (n_last) the rows of the last forward that kept logits
    size_t n_last, last_room;
};

static int options_check(const llama_session_options *o, const llama_config *c,
                         const struct backend **backend) {
    const char *device = o->device ? o->device : "cpu";
    *backend = !strcmp(device, "cpu") ? &backend_cpu : !strcmp(device, "cuda") ? &backend_cuda : 0;
    if (!*backend) return fail("device \"%s\", expected cpu or cuda", device);
    if (o->kv_kind != -1 && o->kv_kind != LLAMA_F32 && o->kv_kind != LLAMA_F16 &&
        o->kv_kind != LLAMA_Q8)
        return fail("KV cache kind %d, expected f32, f16 or q8", o->kv_kind);
    if (o->activations != 0 && o->activations != 8 && o->activations != 16)
        return fail("activations is %d, expected 8 or 16", o->activations);
    if (o->max_seq_len > 1 << 24)
        return fail("max_seq_len is %u, expected at most %d", o->max_seq_len, 1 << 24);
    if (!o->host_layers) return 0;
    if (*backend == &backend_cpu)
        return fail("layers are split with device \"cuda\" only, found device \"cpu\"");
    if (o->host_layers > c->n_layers)
        return fail("host_layers is %u, expected at most %u, the model's layers", o->host_layers,
                    c->n_layers);
    *backend = &backend_split;
    return 0;
}

int llama_session_open(llama_model *model, const llama_session_options *options,
                       llama_session **session) {
    if (!model || !options || !session) return fail("llama_session_open: an argument is NULL");
    *session = NULL;
    const struct backend *backend;
    const llama_config *c = &model->model.config;
    if (options_check(options, c, &backend)) return -1;
    llama_session *s = calloc(1, sizeof *s);
    if (!s) return fail("out of memory for a session");
    const int usual = model_rotated(&model->model) ? 8 : 16;
    s->info = (llama_session_info){
        .device = backend->name,
        .max_seq_len = options->max_seq_len ? options->max_seq_len : c->max_seq_len,
        .page_positions = PAGE_POSITIONS,
        .host_layers = options->host_layers,
        .activations = options->activations ? options->activations : usual,
    };
    int rc = backend->open(&model->model, options, &s->info, &s->state);
    const bool open = !rc;
    rc = file_done(&model->model.file, rc); // a GPU has read it all
    if (rc && open) backend->close(s->state);
    if (rc) return free(s), -1;
    s->backend = backend;
    s->model = model;
    s->process = getpid();
    atomic_fetch_add(&model->users, 1);
    cache_open(&s->cache, backend->pages(s->state));
    pthread_mutex_init(&s->lock, NULL);
    *session = s;
    return 0;
}

/* Takes the lock; in a fork of the session's process its holder may be gone. */
static int session_lock(llama_session *s) {
    if (s->process != getpid())
        return fail("this session belongs to another process, which forked: open one here");
    pthread_mutex_lock(&s->lock);
    return 0;
}

void llama_session_close(llama_session *s) {
    if (!s || s->process != getpid()) return; // a copy, perhaps taken in the middle of a call
    cache_close(&s->cache);
    s->backend->close(s->state);
    pthread_mutex_destroy(&s->lock);
    free(s->kept);
    free(s->last);
    model_release(s->model);
    free(s);
}

int llama_get_session_info(llama_session *s, llama_session_info *info) {
    if (!s || !info) return fail("llama_get_session_info: an argument is NULL");
    if (session_lock(s)) return -1;
    *info = s->info;
    info->kv_bytes = s->cache.n_all * info->kv_bytes_per_position * PAGE_POSITIONS;
    info->scratch_bytes += s->kept_room * s->model->model.config.n_outputs * sizeof(float);
    pthread_mutex_unlock(&s->lock);
    return 0;
}

/* Checks each row, and that the rows of a sequence follow on from its length; ENDS gets each
 * sequence's length after the batch. */
static int batch_check(const llama_session *s, const llama_batch *b,
                       uint32_t ends[LLAMA_MAX_SEQUENCES], size_t *wanted) {
    const uint32_t vocab_size = s->model->model.config.vocab_size;
    for (int i = 0; i < LLAMA_MAX_SEQUENCES; i++) ends[i] = s->cache.sequences[i].length;
    *wanted = 0;
    for (size_t i = 0; i < b->n; i++) {
        const int32_t token = b->tokens[i], sequence = b->sequences[i], at = b->positions[i];
        if (token < 0 || (uint32_t)token >= vocab_size)
            return fail("token id %d, expected 0 to %u", token, vocab_size - 1);
        if (sequence < 0 || sequence >= LLAMA_MAX_SEQUENCES)
            return fail("sequence %d, expected 0 to %d", sequence, LLAMA_MAX_SEQUENCES - 1);
        if (at < 0 || (uint32_t)at >= s->info.max_seq_len)
            return fail("position %d does not fit the context of %u tokens", at,
                        s->info.max_seq_len);
        if ((uint32_t)at != ends[sequence])
            return fail("position %d of sequence %d, expected %u, its length", at, sequence,
                        ends[sequence]);
        const int32_t length = b->rope_lengths ? b->rope_lengths[i] : 0;
        if (length < 0 || (uint32_t)length > s->info.max_seq_len)
            return fail("rope length %d, expected 0 to %u", length, s->info.max_seq_len);
        ends[sequence]++;
        *wanted += b->want && b->want[i];
    }
    return 0;
}

static int keep_room(llama_session *s, size_t rows) {
    if (rows <= s->kept_room) return 0;
    const size_t n_outputs = s->model->model.config.n_outputs;
    if (rows > SIZE_MAX / sizeof(float) / n_outputs) return fail("too many rows want logits");
    float *kept = realloc(s->kept, rows * n_outputs * sizeof *kept);
    if (!kept) return fail("out of memory for the logits of %zu rows", rows);
    s->kept = kept;
    s->kept_room = rows;
    return 0;
}

/* Remembers B's rows, so that where kept logits broke down can be found later. */
static int keep_rows(llama_session *s, const llama_batch *b) {
    if (b->n > s->last_room) {
        struct row *last = realloc(s->last, b->n * sizeof *last);
        if (!last) return fail("out of memory for a batch of %zu rows", b->n);
        s->last = last;
        s->last_room = b->n;
    }
    for (size_t i = 0; i < b->n; i++)
        s->last[i] = (struct row){b->tokens[i], b->sequences[i], b->positions[i],
                                  b->rope_lengths ? b->rope_lengths[i] : 0,
                                  b->want && b->want[i]};
    s->n_last = b->n;
    return 0;
}

static bool all_finite(const float *x, size_t n) {
    int bad = 0;
    for (size_t i = 0; i < n; i++) bad |= !(fabsf(x[i]) <= FLT_MAX);
    return !bad;
}

/* Says where the numbers of ROWS broke down, which gave some that are not finite: they run once
 * more, into the same pages, and show the whole stream. */
static int fail_by_layer(llama_session *s, const struct rows *rows) {
    const llama_config *c = &s->model->model.config;
    const size_t n = rows->n * c->dim;
    struct rows again = *rows;
    size_t layer = 0;
    uint8_t *want = malloc(rows->n);
    float *stream = calloc((size_t)c->n_layers + 2, n * sizeof *stream);
    int rc = want && stream ? 0 : -1;
    if (!rc) {
        memset(want, 1, rows->n);
        again.want = want, again.wanted = rows->n, again.hidden = true, again.stream = stream;
        rc = s->backend->forward(s->state, &again, stream + (c->n_layers + 1) * n);
        while (layer <= c->n_layers && all_finite(stream + layer * n, n)) layer++;
    }
    free(want);
    free(stream);
    if (rc) return fail("the model gives numbers that are not finite");
    if (layer == 0) return fail("the embedding gives numbers that are not finite");
    if (layer > c->n_layers) return fail("the head gives numbers that are not finite");
    return fail("layer %zu gives numbers that are not finite", layer - 1);
}

static int forward_locked(llama_session *s, const llama_batch *b, float *logits) {
    uint32_t ends[LLAMA_MAX_SEQUENCES];
    size_t wanted;
    if (batch_check(s, b, ends, &wanted)) return -1;
    if (!logits && b->hidden) return fail("hidden states are not kept: give them a place");
    const bool stay = !logits && wanted <= s->backend->keeps;
    s->n_kept = 0;
    if (!logits && ((!stay && keep_room(s, wanted)) || keep_rows(s, b))) return -1;
    const struct sequence **of = malloc((b->n + 1) * sizeof *of);
    int rc = of ? 0 : fail("out of memory for a batch of %zu rows", b->n);
    for (int32_t i = 0; i < LLAMA_MAX_SEQUENCES && !rc; i++)
        rc = cache_reserve(&s->cache, i, ends[i]);
    if (!rc) {
        for (size_t i = 0; i < b->n; i++) of[i] = &s->cache.sequences[b->sequences[i]];
        const struct rows rows = {.n = b->n, .tokens = b->tokens, .positions = b->positions,
                                  .want = b->want, .of = of, .rope_lengths = b->rope_lengths,
                                  .wanted = wanted, .hidden = b->hidden, .stream = b->stream};
        rc = s->backend->forward(s->state, &rows, logits ? logits : stay ? NULL : s->kept);
        const llama_config *c = &s->model->model.config;
        if (!rc && logits && !all_finite(logits, wanted * (b->hidden ? c->dim : c->n_outputs)))
            rc = fail_by_layer(s, &rows);
        rc = file_done(&s->model->model.file, rc);
    }
    free(of);
    for (int32_t i = 0; i < LLAMA_MAX_SEQUENCES; i++) {
        if (rc) cache_trim(&s->cache, i, s->cache.sequences[i].length);
        else cache_commit(&s->cache, i, ends[i]);
    }
    if (!rc && !logits) s->n_kept = wanted;
    s->on_device = stay;
    return rc;
}

int llama_forward(llama_session *s, const llama_batch *batch, float *logits) {
    if (!s || !batch || (batch->n && !(batch->tokens && batch->sequences && batch->positions)))
        return fail("llama_forward: an argument is NULL");
    if (session_lock(s)) return -1;
    int rc = forward_locked(s, batch, logits);
    pthread_mutex_unlock(&s->lock);
    return rc;
}

/* A sequence's place, or NULL with the reason. */
static struct sequence *sequence_find(llama_session *s, int32_t sequence) {
    if (!s) return fail("the session is NULL"), NULL;
    if (sequence >= 0 && sequence < LLAMA_MAX_SEQUENCES) return &s->cache.sequences[sequence];
    fail("sequence %d, expected 0 to %d", sequence, LLAMA_MAX_SEQUENCES - 1);
    return NULL;
}

int llama_length(llama_session *s, int32_t sequence, uint32_t *length) {
    const struct sequence *q = sequence_find(s, sequence);
    if (!q) return -1;
    if (!length) return fail("llama_length: length is NULL");
    if (session_lock(s)) return -1;
    *length = q->length;
    pthread_mutex_unlock(&s->lock);
    return 0;
}

int llama_trim(llama_session *s, int32_t sequence, uint32_t length) {
    const struct sequence *q = sequence_find(s, sequence);
    if (!q) return -1;
    if (session_lock(s)) return -1;
    int rc = length <= q->length ? 0 : fail("cannot trim sequence %d to %u: it has %u positions",
                                            sequence, length, q->length);
    if (!rc) cache_trim(&s->cache, sequence, length);
    pthread_mutex_unlock(&s->lock);
    return rc;
}

int llama_fork(llama_session *s, int32_t from, int32_t to, uint32_t length) {
    const struct sequence *q = sequence_find(s, from);
    if (!q || !sequence_find(s, to)) return -1;
    if (from == to) return fail("cannot fork sequence %d onto itself", from);
    if (session_lock(s)) return -1;
    int rc = length <= q->length ? cache_fork(&s->cache, from, to, length)
                                 : fail("cannot fork %u positions of sequence %d: it has %u",
                                        length, from, q->length);
    pthread_mutex_unlock(&s->lock);
    return rc;
}

static int stage_locked(llama_session *s, const llama_stage *g) {
    struct layer layer;
    const bool takes = g->stage == LLAMA_STAGE_GATE_UP || g->stage == LLAMA_STAGE_END;
    if (g->stage > LLAMA_STAGE_HEAD) return fail("stage %u of a layer, expected 0 to 5", g->stage);
    if ((takes && !g->given) || (g->stage != LLAMA_STAGE_END && !g->inputs))
        return fail("llama_run_stage: given or inputs is NULL, which stage %u needs", g->stage);
    if (model_layer(&s->model->model, g->layer, g->kinds, g->blocks, &layer)) return -1;
    if (g->n > s->info.max_seq_len)
        return fail("a text of %zu tokens does not fit the context of %u", g->n,
                    s->info.max_seq_len);
    if (s->cache.sequences[0].length) return fail("llama_run_stage: sequence 0 is not empty");
    int rc = cache_reserve(&s->cache, 0, (uint32_t)g->n);
    if (!rc) rc = s->backend->stage(s->state, g, &layer, &s->cache.sequences[0]);
    cache_trim(&s->cache, 0, 0);
    return rc;
}

int llama_run_stage(llama_session *s, const llama_stage *stage) {
    if (!s || !stage || !stage->stream) return fail("llama_run_stage: an argument is NULL");
    if (session_lock(s)) return -1;
    int rc = file_done(&s->model->model.file, stage_locked(s, stage));
    pthread_mutex_unlock(&s->lock);
    return rc;
}

static int slide_locked(llama_session *s, int32_t sequence, uint32_t first, uint32_t count) {
    const llama_config *c = &s->model->model.config;
    const uint32_t length = s->cache.sequences[sequence].length;
    if (first > length || count > length - first)
        return fail("cannot drop %u positions from %u on of sequence %d: it has %u", count, first,
                    sequence, length);
    if (rope_length(c, (int32_t)s->info.max_seq_len, 0))
        return fail("a context of %u tokens cannot slide: the model's dynamic rope scaling turns "
                    "keys by bases of their own beyond %.0f", s->info.max_seq_len,
                    (double)c->rope_numbers[1]);
    if (first + count == length) return cache_trim(&s->cache, sequence, first), 0;
    return count ? cache_slide(&s->cache, sequence, first, count) : 0;
}

int llama_slide(llama_session *s, int32_t sequence, uint32_t first, uint32_t count) {
    if (!sequence_find(s, sequence)) return -1;
    if (session_lock(s)) return -1;
    int rc = slide_locked(s, sequence, first, count);
    pthread_mutex_unlock(&s->lock);
    return rc;
}

/* That N positions from FIRST on lie within [0, END), and take N_BYTES. */
static int check_kv(const llama_session *s, int32_t sequence, uint32_t first, uint32_t n,
                    size_t n_bytes, uint32_t end) {
    if (first > end || n > end - first)
        return fail("positions %u to %llu of sequence %d, expected at most %u", first,
                    (unsigned long long)first + n, sequence, end);
    if (n_bytes != n * s->info.kv_bytes_per_position)
        return fail("%zu bytes of keys and values for %u positions, expected %llu", n_bytes, n,
                    (unsigned long long)(n * s->info.kv_bytes_per_position));
    return 0;
}

int llama_read_kv(llama_session *s, int32_t sequence, uint32_t first, uint32_t n, void *kv,
                  size_t n_bytes) {
    const struct sequence *q = sequence_find(s, sequence);
    if (!q) return -1;
    if (!kv) return fail("llama_read_kv: kv is NULL");
    if (session_lock(s)) return -1;
    int rc = check_kv(s, sequence, first, n, n_bytes, q->length);
    if (!rc && n) rc = s->backend->read(s->state, q, first, n, kv);
    pthread_mutex_unlock(&s->lock);
    return rc;
}

static int write_locked(llama_session *s, int32_t sequence, uint32_t first, uint32_t n,
                        const void *kv, size_t n_bytes) {
    const struct sequence *q = &s->cache.sequences[sequence];
    if (first != q->length)
        return fail("keys and values for position %u of sequence %d, expected %u, its length",
                    first, sequence, q->length);
    if (check_kv(s, sequence, first, n, n_bytes, s->info.max_seq_len)) return -1;
    if (!n) return 0;
    if (cache_reserve(&s->cache, sequence, first + n)) return -1;
    int rc = s->backend->write(s->state, q, first, n, kv);
    if (rc) cache_trim(&s->cache, sequence, first);
    else cache_commit(&s->cache, sequence, first + n);
    return rc;
}

int llama_write_kv(llama_session *s, int32_t sequence, uint32_t first, uint32_t n, const void *kv,
                   size_t n_bytes) {
    if (!sequence_find(s, sequence)) return -1;
    if (!kv) return fail("llama_write_kv: kv is NULL");
    if (session_lock(s)) return -1;
    int rc = write_locked(s, sequence, first, n, kv, n_bytes);
    pthread_mutex_unlock(&s->lock);
    return rc;
}

// ---- sampling

int llama_sample_logits(const float *logits, size_t vocab_size, const llama_sampling *sampling,
                        const int32_t *seen, size_t n_seen, size_t n_said, uint64_t completion,
                        uint64_t position, int32_t *token) {
    if (!logits) return fail("llama_sample: an argument is NULL");
    if (sampler_check(vocab_size, sampling, seen, n_seen, n_said, token)) return -1;
    return sampler_pick(logits, vocab_size, sampling, seen, n_seen, n_said,
                        sampler_random(sampling->seed, completion, position), token);
}

static int check_kept(const llama_session *s, size_t row) {
    if (s->model->model.config.head != LLAMA_HEAD_LM)
        return fail("this model has no language-model head");
    if (row < s->n_kept) return 0;
    return fail("no logits kept for row %zu: the last forward kept %zu", row, s->n_kept);
}

/* Kept row ROW's logits on the host, or NULL with the reason. */
static const float *kept_row(llama_session *s, size_t row) {
    if (check_kept(s, row)) return NULL;
    if (!s->on_device) return s->kept + row * s->model->model.config.n_outputs;
    return keep_room(s, 1) || s->backend->fetch(s->state, row, s->kept) ? NULL : s->kept;
}

/* After a failure with kept row ROW's LOGITS: where they are not finite, says where that began. */
static int explain(llama_session *s, size_t row, const float *logits) {
    const size_t n_outputs = s->model->model.config.n_outputs;
    size_t last = 0, n = 0;
    if (all_finite(logits, n_outputs)) return -1;
    for (size_t wanted = 0; last < s->n_last; last++)
        if (s->last[last].want && wanted++ == row) break;
    if (last == s->n_last) return -1;
    const int32_t sequence = s->last[last].sequence;
    const struct sequence *q = &s->cache.sequences[sequence];
    if ((uint32_t)s->last[last].position >= q->length) return -1; // trimmed since
    int32_t *tokens = calloc(last + 1, 3 * sizeof *tokens);
    const struct sequence **of = calloc(last + 1, sizeof *of);
    if (!tokens || !of) return free(tokens), free(of), -1;
    int32_t *positions = tokens + last + 1, *lengths = positions + last + 1;
    for (size_t i = 0; i <= last; i++) {
        if (s->last[i].sequence != sequence) continue;
        tokens[n] = s->last[i].token;
        positions[n] = s->last[i].position;
        lengths[n] = s->last[i].rope_length;
        of[n++] = q;
    }
    const struct rows rows = {.n = n, .tokens = tokens, .positions = positions, .of = of,
                              .rope_lengths = lengths};
    fail_by_layer(s, &rows);
    free(tokens);
    free(of);
    return -1;
}

static int sample_locked(llama_session *s, size_t row, const llama_sampling *sampling,
                         const int32_t *seen, size_t n_seen, size_t n_said, double random,
                         int32_t *token) {
    const size_t vocab_size = s->model->model.config.vocab_size;
    if (check_kept(s, row) || sampler_check(vocab_size, sampling, seen, n_seen, n_said, token))
        return -1;
    const int rc = !s->on_device ? 1 : s->backend->sample(s->state, row, sampling, seen, n_seen,
                                                          n_said, random, token);
    if (rc <= 0) return rc;
    const float *logits = kept_row(s, row);
    if (!logits) return -1;
    if (!sampler_pick(logits, vocab_size, sampling, seen, n_seen, n_said, random, token)) return 0;
    return file_done(&s->model->model.file, explain(s, row, logits));
}

int llama_sample(llama_session *s, size_t row, const llama_sampling *sampling,
                 const int32_t *seen, size_t n_seen, size_t n_said, uint64_t completion,
                 uint64_t position, int32_t *token) {
    if (!s) return fail("llama_sample: session is NULL");
    if (session_lock(s)) return -1;
    const double random = sampling ? sampler_random(sampling->seed, completion, position) : 0;
    int rc = sample_locked(s, row, sampling, seen, n_seen, n_said, random, token);
    pthread_mutex_unlock(&s->lock);
    return rc;
}

int llama_logprobs(llama_session *s, size_t row, int32_t token, double *logprob, size_t n,
                   int32_t *ids, double *top) {
    if (!s || !logprob || (n && (!ids || !top)))
        return fail("llama_logprobs: an argument is NULL");
    const size_t vocab_size = s->model->model.config.vocab_size;
    if (token < 0 || (size_t)token >= vocab_size || n > vocab_size)
        return fail("logprobs of token id %d and %zu others, expected below %zu", token, n,
                    vocab_size);
    if (session_lock(s)) return -1;
    const float *logits = kept_row(s, row);
    int rc = logits ? sampler_logprobs(logits, vocab_size, token, logprob, n, ids, top) : -1;
    if (rc && logits) rc = file_done(&s->model->model.file, explain(s, row, logits));
    pthread_mutex_unlock(&s->lock);
    return rc;
}
