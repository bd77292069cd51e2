/* memory.cu: finds the GPU, plans its memory, and brings the weights there as the file has them,
 * once for all sessions of a model. */
#include "memory.h"
#include <cstdio>
#include <cstdlib>

constexpr int LEAST_DRIVER = 13000; // as cudaDriverGetVersion counts
constexpr size_t ALIGNMENT = 256, STAGE_BYTES = 16 << 20, PIECE_BYTES = 16 << 20;
/* What CUDA itself takes while it runs (graphs, kernels), left alone by a plan. */
constexpr size_t SPARE_BYTES = 64 << 20;

static size_t up_to(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int cuda_check(cudaError_t error, const char *doing) {
    if (error == cudaSuccess) return 0;
    cudaGetLastError(); // forgotten, where it can be: the process goes on
    return fail("device \"cuda\": %s: %s", doing, cudaGetErrorString(error));
}

int device_find(cudaDeviceProp *p) {
    int version = 0, count = 0;
    if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
    if (!version) return fail("device \"cuda\": this machine has no NVIDIA driver");
    if (version < LEAST_DRIVER)
        return fail("device \"cuda\": the NVIDIA driver is for CUDA %d.%d, expected %d.%d (driver "
                    "580) or later", version / 1000, version % 1000 / 10, LEAST_DRIVER / 1000,
                    LEAST_DRIVER % 1000 / 10);
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorNoDevice || (!error && !count)) {
        cudaGetLastError();
        return fail("device \"cuda\": the NVIDIA driver finds no GPU");
    }
    if (cuda_check(error, "looking for a GPU") ||
        cuda_check(cudaSetDevice(0), "choosing the GPU") ||
        cuda_check(cudaGetDeviceProperties(p, 0), "asking what the GPU is"))
        return -1;
    if (p->major * 10 + p->minor < 75)
        return fail("device \"cuda\": %s has compute capability %d.%d, expected 7.5 (Turing) or "
                    "later", p->name, p->major, p->minor);
    return 0;
}

// ---- weights

namespace {

/* Goes over a model's weights: counts them, and with memory copies them there by way of two
 * pinned buffers in turn, so that one is filled from the file while the other is sent. */
struct loader {
    uint8_t *memory; // NULL: only counts
    size_t at, told, total;
    const llama_session_options *options;
    cudaStream_t stream;
    uint8_t *stages[2];
    cudaEvent_t sent[2];
    unsigned turn;
    int failed;
};

/* That all before AT is on its way: at most once for each stage's bytes, and at the end. */
void tell(loader *l, size_t at) {
    if (!l->options->progress || (at < l->told + STAGE_BYTES && at < l->total)) return;
    l->told = at;
    if (l->options->progress(l->options->context, at, l->total))
        l->failed = fail("device \"cuda\": copying weights was stopped");
}

void send(loader *l, size_t to, const void *from, size_t bytes) {
    for (size_t done = 0; done < bytes && !l->failed; l->turn++) {
        const size_t n = bytes - done < STAGE_BYTES ? bytes - done : STAGE_BYTES;
        uint8_t *stage = l->stages[l->turn % 2];
        cudaEvent_t sent = l->sent[l->turn % 2];
        l->failed = cuda_check(cudaEventSynchronize(sent), "copying weights");
        if (l->failed) return;
        memcpy(stage, (const uint8_t *)from + done, n);
        l->failed = cuda_check(cudaMemcpyAsync(l->memory + to + done, stage, n,
                                               cudaMemcpyHostToDevice, l->stream),
                               "copying weights") ||
                    cuda_check(cudaEventRecord(sent, l->stream), "copying weights");
        done += n;
        if (!l->failed && to + done < l->total) tell(l, to + done);
    }
}

const void *put(loader *l, const void *from, size_t bytes) {
    const size_t at = l->at;
    l->at += up_to(bytes, ALIGNMENT);
    if (!l->memory) return nullptr;
    send(l, at, from, bytes);
    return l->memory + at;
}

const float *put_vector(loader *l, const float *from, size_t n) {
    return from ? (const float *)put(l, from, n * sizeof *from) : nullptr;
}

/* The power of two that brings a matrix into the range of halves (device.cuh, half_scale). */
float matrix_scale(const struct matrix *m) {
    const size_t n = m->strips * m->strip_bytes;
    uint32_t largest = 0; // of f32's bits without the sign, in order as their numbers are
    if (m->kind_number == LLAMA_F32)
        for (size_t i = 0; i < n; i += 4) {
            uint32_t bits;
            memcpy(&bits, m->data + i, sizeof bits);
            largest = (bits & 0x7fffffff) > largest ? bits & 0x7fffffff : largest;
        }
    else if (m->kind_number == LLAMA_BF16)
        for (size_t i = 0; i < n; i += 2) {
            uint16_t bits;
            memcpy(&bits, m->data + i, sizeof bits);
            const uint32_t wide = (uint32_t)(bits & 0x7fff) << 16;
            largest = wide > largest ? wide : largest;
        }
    const int exponent = (int)(largest >> 23);
    if (exponent < 16 || exponent > 240) return 1;
    const uint32_t bits = (uint32_t)(127 + 13 - (exponent - 127)) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

void set_kind(device_matrix *d, const struct matrix *m) {
    d->strip_bytes = m->strip_bytes;
    d->rotated = m->kind->rotated;
    d->kind = m->kind_number;
    if (d->rotated) d->kind = d->kind == LLAMA_Q8R ? (uint32_t)LLAMA_Q8 : (uint32_t)LLAMA_Q4;
}

device_matrix put_matrix(loader *l, const struct matrix *m) {
    device_matrix d = {};
    if (!m->data) return d;
    d.data = (const uint8_t *)put(l, m->data, m->strips * m->strip_bytes);
    d.bias = put_vector(l, m->bias, m->rows);
    d.rows = (int)m->rows;
    d.columns = (int)m->columns;
    d.strips = (int)m->strips;
    set_kind(&d, m);
    d.scale = l->memory ? matrix_scale(m) : 1;
    return d;
}

void put_layer(loader *l, const struct layer *from, device_layer *to, size_t dim) {
    to->attention_norm = put_vector(l, from->attention_norm, dim);
    to->wq = put_matrix(l, &from->wq);
    to->wk = put_matrix(l, &from->wk);
    to->wv = put_matrix(l, &from->wv);
    to->wo = put_matrix(l, &from->wo);
    to->ffn_norm = put_vector(l, from->ffn_norm, dim);
    to->w1 = put_matrix(l, &from->w1);
    to->w3 = put_matrix(l, &from->w3);
    to->w2 = put_matrix(l, &from->w2);
}

/* What layers from w->first on need, and the head; the embedding with them if there are all. */
void put_all(loader *l, const struct model *model, device_weights *w) {
    const llama_config *c = &model->config;
    const bool tied = model->output.data == model->tok_embeddings.data;
    device_layer unused;
    if (!w->first || tied) w->tok_embeddings = put_matrix(l, &model->tok_embeddings);
    for (uint32_t i = w->first; i < c->n_layers; i++)
        put_layer(l, &model->layers[i], w->layers ? &w->layers[i] : &unused, c->dim);
    w->norm = put_vector(l, model->norm, c->dim);
    w->output = w->tok_embeddings;
    if (!tied) w->output = put_matrix(l, &model->output);
    else w->output.bias = put_vector(l, model->output.bias, model->output.rows);
}

size_t weights_count(const struct model *model, uint32_t first) {
    loader l = {};
    device_weights w = {};
    w.first = first;
    put_all(&l, model, &w);
    return l.at;
}

int weights_load(device_weights *w, const struct model *model,
                 const llama_session_options *options, cudaStream_t stream) {
    loader l = {};
    w->bytes = weights_count(model, w->first);
    w->layers = (device_layer *)calloc(model->config.n_layers, sizeof *w->layers);
    if (!w->layers) return fail("out of memory for a session");
    if (cuda_check(cudaMalloc((void **)&w->memory, w->bytes), "memory for the weights")) return -1;
    l.memory = w->memory;
    l.total = w->bytes;
    l.options = options;
    l.stream = stream;
    for (int i = 0; i < 2 && !l.failed; i++)
        l.failed = cuda_check(cudaMallocHost((void **)&l.stages[i], STAGE_BYTES),
                              "pinned memory to copy weights") ||
                   cuda_check(cudaEventCreate(&l.sent[i]), "copying weights");
    if (!l.failed) put_all(&l, model, w);
    const cudaError_t done = cudaStreamSynchronize(stream);
    if (!l.failed) l.failed = cuda_check(done, "copying weights");
    if (!l.failed) tell(&l, w->bytes);
    for (int i = 0; i < 2; i++) {
        if (l.sent[i]) cudaEventDestroy(l.sent[i]);
        if (l.stages[i]) cudaFreeHost(l.stages[i]);
    }
    return l.failed ? -1 : 0;
}

void weights_free(device_weights *w) {
    cudaFree(w->memory);
    free(w->layers);
    free(w);
}

/* Among those that the model's sessions have here, some with all from layer FIRST on, or NULL. */
device_weights *weights_find(const struct model *model, uint32_t first) {
    device_weights *w = (device_weights *)model->on_device->weights;
    while (w && w->first > first) w = w->next;
    return w;
}

// ---- the plan

/* The longest context whose pages fit what is AVAILABLE beside layers from FIRST on; 0: none. */
size_t longest(const struct model *model, uint32_t first, const session_need &need,
               size_t available) {
    const size_t weights = weights_find(model, first) ? 0 : weights_count(model, first);
    const size_t fixed = weights + need.scratch + SPARE_BYTES;
    const size_t page_bytes = (model->config.n_layers - first) * need.layer_page_bytes;
    if (fixed > available) return 0;
    return page_bytes ? (available - fixed) / page_bytes * PAGE_POSITIONS : SIZE_MAX;
}

int plan(const struct model *model, uint32_t first, const session_need &need) {
    size_t available = 0, total = 0;
    if (cuda_check(cudaMemGetInfo(&available, &total), "asking for free memory")) return -1;
    const uint32_t n_layers = model->config.n_layers;
    const size_t fits = longest(model, first, need, available);
    if (fits >= need.positions) return 0;
    uint32_t fewer = first + 1;
    while (fewer <= n_layers && longest(model, fewer, need, available) < need.positions) fewer++;
    const size_t weights = weights_find(model, first) ? 0 : weights_count(model, first);
    const size_t pages = ((size_t)need.positions + PAGE_POSITIONS - 1) / PAGE_POSITIONS;
    const double mib = 1 << 20;
    char context[64] = "no context fits", layers[64] = "";
    if (fits) snprintf(context, sizeof context, "the longest context that fits is %zu", fits);
    if (fewer <= n_layers)
        snprintf(layers, sizeof layers, "; with this one the last %u of %u layers fit",
                 n_layers - fewer, n_layers);
    return fail("device \"cuda\": %s needs %.0f MiB for weights of %u layers, %.0f for scratch and "
                "%.0f for keys and values of %u positions, and %.0f are free: %s%s",
                model->file.path, (double)weights / mib, n_layers - first,
                (double)(need.scratch + SPARE_BYTES) / mib,
                (double)(pages * (n_layers - first) * need.layer_page_bytes) / mib,
                need.positions, (double)available / mib, context, layers);
}

device_weights *take_locked(const struct model *model, const llama_session_options *options,
                            const session_need &need, cudaStream_t stream) {
    const uint32_t first = options->host_layers;
    if (plan(model, first, need)) return nullptr;
    device_weights *w = weights_find(model, first);
    if (w) return w->users++, w;
    w = (device_weights *)calloc(1, sizeof *w);
    if (!w) return fail("out of memory for a session"), nullptr;
    w->first = first;
    if (weights_load(w, model, options, stream)) return weights_free(w), nullptr;
    w->users = 1;
    w->next = (device_weights *)model->on_device->weights;
    model->on_device->weights = w;
    return w;
}

} // namespace

device_weights *weights_take(const struct model *model, const llama_session_options *options,
                             const session_need &need, cudaStream_t stream) {
    pthread_mutex_lock(&model->on_device->lock);
    device_weights *w = take_locked(model, options, need, stream);
    pthread_mutex_unlock(&model->on_device->lock);
    return w;
}

void weights_give(const struct model *model, device_weights *weights) {
    if (!weights) return;
    pthread_mutex_lock(&model->on_device->lock);
    if (!--weights->users) {
        device_weights *first = (device_weights *)model->on_device->weights, **at = &first;
        while (*at != weights) at = &(*at)->next;
        *at = weights->next;
        model->on_device->weights = first;
        weights_free(weights);
    }
    pthread_mutex_unlock(&model->on_device->lock);
}

int layer_load(device_layer *to, uint8_t **memory, const struct layer *layer,
               const struct layer *of, const device_layer *there, cudaStream_t stream) {
    const struct { const struct matrix *now, *before; device_matrix *to; } all[] = {
        {&layer->wq, &of->wq, &to->wq}, {&layer->wk, &of->wk, &to->wk},
        {&layer->wv, &of->wv, &to->wv}, {&layer->wo, &of->wo, &to->wo},
        {&layer->w1, &of->w1, &to->w1}, {&layer->w3, &of->w3, &to->w3},
        {&layer->w2, &of->w2, &to->w2},
    };
    size_t bytes = 0, at = 0;
    *to = *there;
    *memory = nullptr;
    for (const auto &one : all)
        if (one.now->data != one.before->data)
            bytes += up_to(one.now->strips * one.now->strip_bytes, ALIGNMENT);
    if (!bytes) return 0;
    if (cuda_check(cudaMalloc((void **)memory, bytes), "memory for a layer's weights")) return -1;
    for (const auto &one : all) {
        const size_t n = one.now->strips * one.now->strip_bytes;
        if (one.now->data == one.before->data) continue;
        if (cuda_check(cudaMemcpyAsync(*memory + at, one.now->data, n, cudaMemcpyHostToDevice,
                                       stream), "copying weights"))
            return -1;
        one.to->data = *memory + at;
        set_kind(one.to, one.now);
        one.to->scale = matrix_scale(one.now);
        at += up_to(n, ALIGNMENT);
    }
    return cuda_check(cudaStreamSynchronize(stream), "copying weights");
}

// ---- pages

void page_store_open(page_store *s, size_t page_bytes, uint32_t positions) {
    *s = {};
    s->page_bytes = up_to(page_bytes, ALIGNMENT);
    const size_t most = ((size_t)positions + PAGE_POSITIONS - 1) / PAGE_POSITIONS;
    s->a_piece = s->page_bytes < PIECE_BYTES ? (int)(PIECE_BYTES / s->page_bytes) : 1;
    if ((size_t)s->a_piece > most) s->a_piece = (int)most;
}

void *page_store_take(page_store *s) {
    if (!s->left) {
        if (s->n_pieces == s->room) {
            const size_t room = s->room ? 2 * s->room : 16;
            void **pieces = (void **)realloc(s->pieces, room * sizeof *pieces);
            if (!pieces) return fail("out of memory for the list of KV pages"), nullptr;
            s->pieces = pieces;
            s->room = room;
        }
        // a whole piece, or where that is too much one page
        s->left = s->a_piece;
        cudaError_t error = cudaMalloc(&s->pieces[s->n_pieces], s->left * s->page_bytes);
        if (error != cudaSuccess && s->left > 1) {
            cudaGetLastError();
            s->left = 1;
            error = cudaMalloc(&s->pieces[s->n_pieces], s->page_bytes);
        }
        if (cuda_check(error, "memory for a KV page")) {
            s->left = 0;
            return nullptr;
        }
        s->n_pieces++;
    }
    return (uint8_t *)s->pieces[s->n_pieces - 1] + --s->left * s->page_bytes;
}

void page_store_close(page_store *s) {
    for (size_t i = 0; i < s->n_pieces; i++) cudaFree(s->pieces[i]);
    free(s->pieces);
    *s = {};
}
