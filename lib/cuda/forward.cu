/* forward.cu: Llama on the GPU, top to bottom, in the named steps of cpu/forward.c.
 *
 * Norms are folded into the products that follow them, SwiGLU and the residual into those before,
 * so a layer is six or seven launches. A step of few rows is recorded as a graph the second time
 * it is met: everything that changes from token to token (tokens, positions, angles, which page
 * is where) stands in device memory, so the same graph serves the next token. */
#include "session.h"
#include <cstdlib>

namespace {

/* Rows that are being computed, n <= c->rows. */
struct part {
    struct cuda *c;
    const struct rows *rows;
    size_t start;               // its first row
    step_shape shape;
    batch_rows at;              // on the device, as all below
    const int32_t *tokens, *wanted;
    const attend_item *items;
    const device_layer *layer;
    int layer_index;
    cudaError_t error;          // the first one
};

void run(part *p, cudaError_t error) {
    if (p->error == cudaSuccess) p->error = error;
}

// ---- the steps of one layer

bool alike(const device_matrix &a, const device_matrix &b) {
    return a.kind == b.kind && a.rotated == b.rotated;
}

/* Products of one input, kind by kind: N_TARGETS of them. */
void multiply(part *p, const vectors &in, int n_targets, const target *list, after then) {
    struct cuda *c = p->c;
    halves ready = {};
    for (int first = 0, last; first < n_targets; first = last) {
        last = first + 1;
        while (last < n_targets && alike(list[last].w, list[first].w)) last++;
        product one = {last - first, {}, then};
        for (int i = first; i < last; i++) one.targets[i - first] = list[i];
        if (in.n <= GEMV_ROWS) {
            run(p, launch_gemv(one, in, c->device.multiProcessorCount, c->stream));
            continue;
        }
        const int columns = list[first].w.columns;
        const bool split = list[first].w.kind == LLAMA_F32;
        const bool rotated = list[first].w.rotated;
        if (!ready.x || ready.split != split || ready.rotated != rotated) {
            const int stride = (columns + HALVES_UNIT - 1) / HALVES_UNIT * HALVES_UNIT;
            ready = halves{c->halves, c->unscale, stride, in.n, split, rotated};
            run(p, launch_prepare(in, columns, ready, c->stream));
        }
        if ((split ? 2 : 1) * in.n <= 16)
            run(p, launch_gemv_ready(one, ready, c->device.multiProcessorCount, c->stream));
        else run(p, launch_gemm(one, ready, c->stream));
    }
}

vectors plain(const part *p, const float *x, int width) {
    return {x, width, p->shape.n, nullptr, nullptr, 0};
}

vectors normed(const part *p, const float *norm) {
    const llama_config *f = &p->c->model->config;
    return {p->c->x, (int)f->dim, p->shape.n, nullptr, norm, f->norm_eps};
}

/* Not where the stream came from another device (send_batch). */
void embed(part *p) {
    if (p->rows->from) return;
    run(p, launch_embed(p->c->weights->tok_embeddings, p->tokens, p->shape.n, p->c->x,
                        p->c->stream));
}

/* attention_norm is folded in. */
void qkv(part *p) {
    struct cuda *c = p->c;
    const device_layer *l = p->layer;
    const target list[] = {
        {l->wq, c->q, l->wq.rows}, {l->wk, c->k, l->wk.rows}, {l->wv, c->v, l->wv.rows}};
    multiply(p, normed(p, l->attention_norm), 3, list, STORE);
}

/* Both of a head in one launch, while it is at hand. */
void rope_store(part *p) {
    struct cuda *c = p->c;
    run(p, launch_rope_store(c->kv, p->layer_index, p->at, c->q, c->k, c->v,
                             (int)c->model->config.n_heads, c->stream));
}

void attend(part *p) {
    struct cuda *c = p->c;
    const attention a = {c->kv, p->layer_index, (int)c->model->config.n_heads, p->at, c->q,
                         c->attended, p->items, p->shape.items, p->shape.splits,
                         p->shape.pages_a_split, c->partial};
    run(p, attend_fits(c->kv) ? launch_attend(a, c->stream) : launch_attend_any(a, c->stream));
}

/* x += wo attended: the one place, with down, where a sum across processes would stand. */
void output(part *p) {
    const target to = {p->layer->wo, p->c->x, p->layer->wo.rows};
    multiply(p, plain(p, p->c->attended, p->layer->wo.columns), 1, &to, ADD);
}

/* ffn_norm is folded in, and SwiGLU. */
void gate_up(part *p) {
    struct cuda *c = p->c;
    const device_layer *l = p->layer;
    const target list[] = {{l->w1, c->gate, l->w1.rows}, {l->w3, c->up, l->w3.rows}};
    const bool together = alike(l->w1, l->w3);
    multiply(p, normed(p, l->ffn_norm), 2, list, together ? SWIGLU : STORE);
    if (!together)
        run(p, launch_swiglu(c->gate, c->up, (size_t)p->shape.n * (size_t)l->w1.rows, c->stream));
}

void down(part *p) {
    const target to = {p->layer->w2, p->c->x, p->layer->w2.rows};
    multiply(p, plain(p, p->c->gate, p->layer->w2.columns), 1, &to, ADD);
}

void layers(part *p) {
    qkv(p);
    rope_store(p);
    attend(p);
    output(p);
    gate_up(p);
    down(p);
}

/* Logits of the rows [first, first + n) of those that want them, or their hidden states. */
void logits(part *p, int first, int n) {
    struct cuda *c = p->c;
    const llama_config *f = &c->model->config;
    const vectors in = {c->x, (int)f->dim, n, p->wanted + first, c->weights->norm, f->norm_eps};
    float *out = c->logits + (size_t)p->shape.kept * f->n_outputs;
    const target to = {c->weights->output, out, (int)f->n_outputs};
    if (p->shape.hidden) run(p, launch_gather(in, (int)f->dim, c->gathered, c->stream));
    else multiply(p, in, 1, &to, STORE);
}

// ---- a part

template <class T> T *on_host(const part *p, size_t offset) { return (T *)(p->c->host + offset); }
template <class T> const T *on_device(const part *p, size_t offset) {
    return (const T *)(p->c->batch + offset);
}

/* Cosines and sines as the CPU has them. */
void angles(part *p, float *cos, float *sin) {
    struct cuda *c = p->c;
    const llama_config *f = &c->model->config;
    const size_t half = f->head_dim / 2;
    for (int i = 0; i < p->shape.n; i++) {
        const size_t row = p->start + (size_t)i;
        const int32_t asked = p->rows->rope_lengths ? p->rows->rope_lengths[row] : 0;
        const uint32_t length = rope_length(f, asked, p->rows->positions[row]);
        if (length != c->rope_length) rope_frequencies(f, length, c->frequencies);
        c->rope_length = length;
        rope_angles(f, c->frequencies, p->rows->positions[row], cos + i * half, sin + i * half);
    }
}

/* The pages of each run of rows of one sequence, its queries in eights; returns how many pages
 * the list has. WRITE false: only counts. */
size_t list_pages(part *p, const batch_layout &to, bool write) {
    const struct rows *rows = p->rows;
    const llama_config *f = &p->c->model->config;
    const int group = (int)(f->n_heads / f->n_kv_heads);
    size_t n_pages = 0, most = 0;
    p->shape.items = 0;
    for (int first = 0, last; first < p->shape.n; first = last) {
        const struct sequence *of = rows->of[p->start + (size_t)first];
        last = first + 1;
        while (last < p->shape.n && rows->of[p->start + (size_t)last] == of) last++;
        const int32_t end = rows->positions[p->start + (size_t)last - 1];
        const size_t n = (size_t)end / PAGE_POSITIONS + 1;
        if (write) memcpy(on_host<void *>(p, to.pages) + n_pages, of->handles, n * sizeof(void *));
        for (int i = first; i < last && write; i++)
            on_host<int32_t>(p, to.tables)[i] = (int32_t)n_pages;
        for (int query = 0; query < (last - first) * group; query += 8, p->shape.items++)
            if (write)
                on_host<attend_item>(p, to.items)[p->shape.items] = {first, last - first, query};
        n_pages += n;
        most = n > most ? n : most;
    }
    // blocks enough for all processors, in splits of a power of two, so that graphs last
    const int blocks = p->shape.items * (int)f->n_kv_heads;
    const int wish = 4 * p->c->device.multiProcessorCount / blocks;
    p->shape.pages_a_split = 4;
    while (wish < 2 ? (size_t)p->shape.pages_a_split < most
                    : (size_t)p->shape.pages_a_split * (size_t)wish < most)
        p->shape.pages_a_split *= 2;
    p->shape.splits = wish < 2 ? 1 : wish;
    return n_pages;
}

/* Brings all that a part's kernels look up to the device. */
int send_batch(part *p) {
    struct cuda *c = p->c;
    const struct rows *rows = p->rows;
    const batch_layout to = batch_lay_out(c, p->shape.n);
    const size_t n_pages = list_pages(p, to, false);
    if (batch_reserve(c, n_pages)) return -1;
    list_pages(p, to, true);
    p->shape.wanted = 0;
    for (int i = 0; i < p->shape.n; i++) {
        const size_t row = p->start + (size_t)i;
        on_host<int32_t>(p, to.tokens)[i] = rows->tokens ? rows->tokens[row] : 0;
        on_host<int32_t>(p, to.positions)[i] = rows->positions[row];
        if (rows->want && rows->want[row])
            on_host<int32_t>(p, to.wanted)[p->shape.wanted++] = i;
    }
    for (int i = p->shape.wanted; i < p->shape.n; i++) on_host<int32_t>(p, to.wanted)[i] = 0;
    angles(p, on_host<float>(p, to.cos), on_host<float>(p, to.sin));
    p->at = {p->shape.n, on_device<int32_t>(p, to.positions), on_device<int32_t>(p, to.tables),
             on_device<void *>(p, to.pages), on_device<float>(p, to.cos),
             on_device<float>(p, to.sin)};
    p->tokens = on_device<int32_t>(p, to.tokens);
    p->wanted = on_device<int32_t>(p, to.wanted);
    p->items = on_device<attend_item>(p, to.items);
    const size_t dim = c->model->config.dim;
    if (rows->from &&
        cuda_check(cudaMemcpyAsync(c->x, rows->from + p->start * dim,
                                   (size_t)p->shape.n * dim * sizeof *c->x, cudaMemcpyHostToDevice,
                                   c->stream), "sending a batch"))
        return -1;
    return cuda_check(cudaMemcpyAsync(c->batch, c->host, to.pages + n_pages * sizeof(void *),
                                      cudaMemcpyHostToDevice, c->stream), "sending a batch");
}

int fetch(part *p, float *to, const float *from, size_t n) {
    if (!n || p->error) return 0;
    return cuda_check(cudaMemcpyAsync(to, from, n * sizeof *to, cudaMemcpyDeviceToHost,
                                      p->c->stream), "fetching results");
}

/* The residual stream as it stands after LAYER layers, where it is asked for; DONE rows wanted it
 * in the parts before. */
int show_stream(part *p, size_t layer, size_t done) {
    struct cuda *c = p->c;
    const size_t dim = c->model->config.dim;
    if (!p->rows->stream || !p->shape.wanted) return 0;
    const vectors in = {c->x, (int)dim, p->shape.wanted, p->wanted, nullptr, 0};
    run(p, launch_gather(in, (int)dim, c->gathered, c->stream));
    return fetch(p, p->rows->stream + (layer * p->rows->wanted + done) * dim, c->gathered,
                 (size_t)p->shape.wanted * dim);
}

void whole_step(part *p) {
    struct cuda *c = p->c;
    embed(p);
    for (uint32_t n = c->first_layer; n < c->model->config.n_layers; n++) {
        p->layer = &c->weights->layers[n];
        p->layer_index = (int)(n - c->first_layer);
        layers(p);
    }
    if (p->shape.wanted) logits(p, 0, p->shape.wanted);
}

// ---- graphs

step_graph *graph_find(struct cuda *c, const step_shape &shape) {
    step_graph *free_one = nullptr;
    for (step_graph &g : c->graphs) {
        if (g.runs && !memcmp(&g.of, &shape, sizeof shape)) return &g;
        if (!g.runs && !free_one) free_one = &g;
    }
    if (!free_one) {
        graphs_free(c);
        free_one = c->graphs;
    }
    free_one->of = shape;
    return free_one;
}

/* The step as a graph, from the second time on; the first loads the kernels. */
int graph_step(part *p) {
    struct cuda *c = p->c;
    step_graph *g = graph_find(c, p->shape);
    if (!g->runs++) return whole_step(p), 0;
    if (!g->exec) {
        cudaGraph_t graph = nullptr;
        if (cuda_check(cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal),
                       "recording a step"))
            return -1;
        whole_step(p);
        cudaError_t error = cudaStreamEndCapture(c->stream, &graph);
        if (!error) error = p->error;
        if (!error) error = cudaGraphInstantiate(&g->exec, graph, 0);
        if (graph) cudaGraphDestroy(graph);
        if (error) *g = {};
        if (cuda_check(error, "recording a step")) return -1;
    }
    return cuda_check(cudaGraphLaunch(g->exec, c->stream), "launching a step");
}

/* Layer by layer, where the stream is wanted or logits come in several goes. */
int long_step(part *p, size_t done) {
    struct cuda *c = p->c;
    embed(p);
    if (!p->rows->from && show_stream(p, 0, done)) return -1;
    for (uint32_t n = c->first_layer; n < c->model->config.n_layers; n++) {
        p->layer = &c->weights->layers[n];
        p->layer_index = (int)(n - c->first_layer);
        layers(p);
        if (show_stream(p, n + 1, done)) return -1;
    }
    return 0;
}

/* OUT NULL: logits stay where they are. */
int run_part(part *p, size_t done, float *out) {
    struct cuda *c = p->c;
    const llama_config *f = &c->model->config;
    if (send_batch(p)) return -1;
    p->shape.kept = out ? 0 : (int)done;
    const bool whole = !p->rows->stream && p->shape.wanted <= LOGIT_ROWS;
    if (!whole && long_step(p, done)) return -1;
    if (whole && p->shape.n <= GRAPH_ROWS && graph_step(p)) return -1;
    if (whole && p->shape.n > GRAPH_ROWS) whole_step(p);
    const size_t width = p->shape.hidden ? f->dim : f->n_outputs;
    for (int i = 0; i < p->shape.wanted; i += LOGIT_ROWS) {
        const int n = p->shape.wanted - i < LOGIT_ROWS ? p->shape.wanted - i : LOGIT_ROWS;
        if (!whole) logits(p, i, n);
        if (!out) continue; // they stay
        if (fetch(p, out, p->shape.hidden ? c->gathered : c->logits, (size_t)n * width))
            return -1;
        out += (size_t)n * width;
    }
    const cudaError_t done_well = cudaStreamSynchronize(c->stream);
    return cuda_check(p->error ? p->error : done_well, "computing a step");
}

} // namespace

/* RC, after an error only when the GPU is done with the caller's memory and the batch's. */
static int settled(struct cuda *c, int rc) {
    if (!rc) return 0;
    cudaStreamSynchronize(c->stream);
    return -1;
}

int cuda_forward(void *state, const struct rows *rows, float *out) {
    const on_gpu here;
    struct cuda *c = (struct cuda *)state;
    if (c->failed) return fail("device \"cuda\": keys and values could not be moved earlier on");
    const llama_config *f = &c->model->config;
    const bool hidden = rows->hidden || f->head == LLAMA_HEAD_NONE;
    size_t done = 0;
    for (size_t start = 0; start < rows->n; start += (size_t)c->rows) {
        part p = {};
        p.c = c;
        p.rows = rows;
        p.start = start;
        p.shape.n = (int)(rows->n - start < (size_t)c->rows ? rows->n - start : (size_t)c->rows);
        p.shape.hidden = hidden;
        float *to = out ? out + done * (hidden ? f->dim : f->n_outputs) : nullptr;
        if (run_part(&p, done, to)) return settled(c, -1);
        done += (size_t)p.shape.wanted;
    }
    return 0;
}

// ---- stages, for calibration

namespace {

int bring(part *p, float *to, const float *from, size_t n) {
    return cuda_check(cudaMemcpyAsync(to, from, n * sizeof *to, cudaMemcpyHostToDevice,
                                      p->c->stream), "sending a stage's input");
}

/* One stage of the part's rows, its stream being in x and its input where it belongs; returns
 * where what it gives stands. */
const float *stage_part(part *p, uint32_t stage) {
    struct cuda *c = p->c;
    const int dim = (int)c->model->config.dim;
    const float *norm = stage == LLAMA_STAGE_QKV    ? p->layer->attention_norm
                        : stage == LLAMA_STAGE_HEAD ? c->weights->norm
                                                    : p->layer->ffn_norm;
    switch (stage) {
    case LLAMA_STAGE_OUTPUT:
        qkv(p);
        rope_store(p);
        attend(p);
        return c->attended;
    case LLAMA_STAGE_GATE_UP: output(p); break;
    case LLAMA_STAGE_DOWN: gate_up(p); return c->gate;
    case LLAMA_STAGE_END: down(p); return nullptr;
    }
    run(p, launch_gather(normed(p, norm), dim, c->gathered, c->stream));
    return c->gathered;
}

/* FIRST: the part's first row among the stage's. */
int run_stage(part *p, const llama_stage *g, size_t first) {
    struct cuda *c = p->c;
    const llama_config *f = &c->model->config;
    const size_t n = (size_t)p->shape.n, dim = f->dim, heads = (size_t)f->n_heads * f->head_dim;
    const size_t hidden = f->hidden_dim;
    float *stream = g->stream + first * dim;
    if (send_batch(p) || bring(p, c->x, stream, n * dim)) return -1;
    if (g->stage == LLAMA_STAGE_GATE_UP && bring(p, c->attended, g->given + first * heads,
                                                 n * heads))
        return -1;
    if (g->stage == LLAMA_STAGE_END && bring(p, c->gate, g->given + first * hidden, n * hidden))
        return -1;
    const float *gives = stage_part(p, g->stage);
    const size_t width = g->stage == LLAMA_STAGE_OUTPUT ? heads
                         : g->stage == LLAMA_STAGE_DOWN ? hidden
                                                        : dim;
    if (fetch(p, stream, c->x, n * dim) ||
        (gives && fetch(p, g->inputs + first * width, gives, n * width)))
        return -1;
    const cudaError_t error = cudaStreamSynchronize(c->stream);
    return cuda_check(p->error ? p->error : error, "computing a stage");
}

} // namespace

/* Every layer has the first's place in the pages: no other is needed at the same time. */
int cuda_stage(void *state, const llama_stage *g, const struct layer *layer,
               const struct sequence *of) {
    const on_gpu here;
    struct cuda *c = (struct cuda *)state;
    int32_t positions[MOST_ROWS], lengths[MOST_ROWS];
    const struct sequence *all[MOST_ROWS];
    device_layer there;
    uint8_t *memory = nullptr;
    int rc = layer_load(&there, &memory, layer, &c->model->layers[g->layer],
                        &c->weights->layers[g->layer], c->stream);
    for (size_t start = 0; start < g->n && !rc; start += (size_t)c->rows) {
        part p = {};
        p.c = c;
        p.shape.n = (int)(g->n - start < (size_t)c->rows ? g->n - start : (size_t)c->rows);
        for (int i = 0; i < p.shape.n; i++) {
            positions[i] = (int32_t)start + i;
            lengths[i] = (int32_t)g->n;
            all[i] = of;
        }
        const struct rows rows = {(size_t)p.shape.n, nullptr, positions, nullptr, all, lengths, 0,
                                  false, nullptr, nullptr, nullptr};
        p.rows = &rows;
        p.layer = &there;
        rc = run_stage(&p, g, start);
    }
    rc = settled(c, rc);
    cudaFree(memory);
    return rc;
}

// ---- logits that stayed

int cuda_fetch(void *state, size_t row, float *out) {
    const on_gpu here;
    struct cuda *c = (struct cuda *)state;
    const size_t n = c->model->config.n_outputs;
    const cudaError_t error = cudaMemcpyAsync(out, c->logits + row * n, n * sizeof *out,
                                              cudaMemcpyDeviceToHost, c->stream);
    return cuda_check(error ? error : cudaStreamSynchronize(c->stream), "fetching logits");
}

/* Seen tokens, biased ones and their biases go to the device, in one list. */
static int send_lists(struct cuda *c, const llama_sampling *s, const int32_t *seen, size_t n_seen) {
    const size_t n = n_seen + 2 * s->n_bias;
    if (n > c->lists_room) {
        cudaFree(c->lists);
        c->lists = nullptr;
        c->lists_room = 0;
        if (cuda_check(cudaMalloc((void **)&c->lists, 2 * n * sizeof *c->lists),
                       "memory for sampling"))
            return -1;
        c->lists_room = 2 * n;
    }
    const struct { const void *from; size_t n; } lists[] = {
        {seen, n_seen}, {s->bias_tokens, s->n_bias}, {s->bias_values, s->n_bias}};
    size_t at = 0;
    for (const auto &one : lists) {
        if (one.n && cuda_check(cudaMemcpyAsync(c->lists + at, one.from, one.n * 4,
                                                cudaMemcpyHostToDevice, c->stream), "sampling"))
            return -1;
        at += one.n;
    }
    return 0;
}

int cuda_sample(void *state, size_t row, const llama_sampling *s, const int32_t *seen,
                size_t n_seen, size_t n_said, double random, int32_t *token) {
    const on_gpu here;
    struct cuda *c = (struct cuda *)state;
    const size_t n = c->model->config.n_outputs;
    if (s->temperature > 0 && (s->typical_p < 1 || s->mirostat_tau > 0)) return 1;
    const bool penalties = s->repetition_penalty != 1 || s->presence_penalty != 0 ||
                           s->frequency_penalty != 0;
    if (!penalties) n_seen = n_said = 0; // then nobody looks at them
    if (send_lists(c, s, seen, n_seen)) return settled(c, -1);
    const choice one = {
        c->logits + row * n, (int)n, c->lists + n_seen, c->lists,
        (const float *)(c->lists + n_seen + s->n_bias), (int)s->n_bias, (int)n_seen, (int)n_said,
        s->repetition_penalty, s->presence_penalty, s->frequency_penalty, s->temperature, s->top_p,
        (double)s->min_p, random, s->top_k, c->work, c->choice_weights, c->counts, c->token};
    cudaError_t error = launch_sample(one, c->stream);
    if (!error)
        error = cudaMemcpyAsync(token, c->token, sizeof *token, cudaMemcpyDeviceToHost, c->stream);
    if (!error) error = cudaStreamSynchronize(c->stream);
    if (cuda_check(error, "sampling")) return settled(c, -1);
    return *token < 0 ? 1 : 0; // the host says what is wrong with the logits
}
