/* session.cu: opens and closes a session on the GPU, and looks after its pages. */
#include "session.h"
#include <cstdio>
#include <cstdlib>

namespace {

size_t up_to(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- scratch

/* Lays the scratch out from BASE (NULL: only counts); returns its bytes. */
size_t lay_out(struct cuda *c, uint8_t *base) {
    const llama_config *f = &c->model->config;
    const size_t r = (size_t)c->rows, dim = f->dim, heads = (size_t)f->n_heads * f->head_dim;
    const size_t kv_heads = (size_t)f->n_kv_heads * f->head_dim, hidden = f->hidden_dim;
    size_t widest = dim > heads ? dim : heads;
    widest = up_to(widest > hidden ? widest : hidden, HALVES_UNIT);
    const struct { void *pointer; size_t bytes; } list[] = {
        {&c->x, r * dim * 4},      {&c->gathered, r * dim * 4},
        {&c->q, r * heads * 4},    {&c->attended, r * heads * 4},
        {&c->k, r * kv_heads * 4}, {&c->v, r * kv_heads * 4},
        {&c->gate, r * hidden * 4}, {&c->up, r * hidden * 4},
        {&c->logits, (size_t)LOGIT_ROWS * f->n_outputs * 4},
        {&c->partial, (size_t)c->most_partial * 8 * (f->head_dim + 2) * 4},
        {&c->halves, 2 * r * widest * 2}, {&c->unscale, r * 4},
        {&c->work, (size_t)f->n_outputs * 4}, {&c->choice_weights, (size_t)f->n_outputs * 8},
        {&c->counts, (size_t)f->n_outputs * 4}, {&c->token, 4},
    };
    size_t bytes = 0;
    for (const auto &one : list) {
        uint8_t *at = base ? base + bytes : nullptr;
        memcpy(one.pointer, &at, sizeof at);
        bytes += up_to(one.bytes, 256);
    }
    return bytes;
}

size_t batch_count(const struct cuda *c, size_t n_pages) {
    return batch_lay_out(c, c->rows).pages + n_pages * sizeof(void *);
}

int scratch_open(struct cuda *c) {
    if (cuda_check(cudaMalloc((void **)&c->memory, c->memory_bytes), "memory for scratch"))
        return -1;
    lay_out(c, c->memory);
    return batch_reserve(c, c->most_pages);
}

} // namespace

batch_layout batch_lay_out(const struct cuda *c, int rows) {
    const llama_config *f = &c->model->config;
    const size_t n = (size_t)rows, half = f->head_dim / 2;
    const size_t items = n * ((f->n_heads / f->n_kv_heads + 7) / 8);
    batch_layout b = {};
    const struct { size_t *to; size_t bytes; } list[] = {
        {&b.tokens, n * 4}, {&b.positions, n * 4}, {&b.tables, n * 4}, {&b.wanted, n * 4},
        {&b.items, items * sizeof(attend_item)}, {&b.cos, n * half * 4}, {&b.sin, n * half * 4},
        {&b.pages, 0},
    };
    size_t at = 0;
    for (const auto &one : list) {
        *one.to = at;
        at += up_to(one.bytes, 16);
    }
    return b;
}

void graphs_free(struct cuda *c) {
    for (step_graph &g : c->graphs) {
        if (g.exec) cudaGraphExecDestroy(g.exec);
        g = {};
    }
}

int batch_reserve(struct cuda *c, size_t n_pages) {
    if (c->batch && n_pages <= c->most_pages) return 0;
    if (n_pages < c->most_pages) n_pages = c->most_pages;
    n_pages += n_pages / 2;
    const size_t bytes = batch_count(c, n_pages);
    graphs_free(c);
    cudaFree(c->batch);
    cudaFreeHost(c->host);
    c->batch = c->host = nullptr;
    if (cuda_check(cudaMallocHost((void **)&c->host, bytes), "pinned memory for a batch") ||
        cuda_check(cudaMalloc((void **)&c->batch, bytes), "memory for a batch"))
        return -1;
    memset(c->host, 0, bytes); // gaps between the arrays are sent along
    c->batch_bytes = bytes;
    c->most_pages = n_pages;
    return 0;
}

// ---- pages

namespace {

void *page_make(void *device) {
    const on_gpu here;
    return page_store_take(&((struct cuda *)device)->pages);
}

void page_copy(void *device, void *to, const void *from) {
    const on_gpu here;
    struct cuda *c = (struct cuda *)device;
    c->failed |= cuda_check(cudaMemcpyAsync(to, from, c->page_bytes, cudaMemcpyDeviceToDevice,
                                            c->stream), "copying a KV page");
}

/* Pages go back all at once, when the session closes. */
void page_destroy(void *, void *) {}

/* What a slide needs on the device: both lists of pages, then cosines and sines. */
int slide_send(struct cuda *c, uint8_t **to, void *const *from_pages, size_t n_from,
               void *const *to_pages, size_t n_to, uint32_t count) {
    const size_t half = c->model->config.head_dim / 2, lists = (n_from + n_to) * sizeof(void *);
    const size_t bytes = lists + 2 * half * sizeof(float);
    uint8_t *host = (uint8_t *)malloc(bytes);
    if (!host) return fail("out of memory to slide a sequence");
    memcpy(host, from_pages, n_from * sizeof(void *));
    memcpy(host + n_from * sizeof(void *), to_pages, n_to * sizeof(void *));
    float *cos = (float *)(host + lists);
    rope_back(&c->model->config, c->frequencies, count, cos, cos + half);
    int rc = cuda_check(cudaMalloc((void **)to, bytes), "memory to slide a sequence");
    if (!rc)
        rc = cuda_check(cudaMemcpyAsync(*to, host, bytes, cudaMemcpyHostToDevice, c->stream),
                        "sliding a sequence") ||
             cuda_check(cudaStreamSynchronize(c->stream), "sliding a sequence");
    free(host);
    return rc ? -1 : 0;
}

void page_slide(void *device, void *const *from, void *const *to, uint32_t first, uint32_t count,
                uint32_t length) {
    const on_gpu here;
    struct cuda *c = (struct cuda *)device;
    const size_t n_from = ((size_t)length + count + PAGE_POSITIONS - 1) / PAGE_POSITIONS;
    const size_t n_to = ((size_t)length + PAGE_POSITIONS - 1) / PAGE_POSITIONS;
    uint8_t *sent = nullptr;
    int rc = slide_send(c, &sent, from, n_from, to, n_to, count);
    if (!rc) {
        void *const *lists = (void *const *)sent;
        const float *cos = (const float *)(lists + n_from + n_to);
        rc = cuda_check(launch_slide(c->kv, lists, lists + n_from, (int)first, (int)count,
                                     (int)length, cos, cos + c->kv.head_dim / 2, c->stream),
                        "sliding a sequence") ||
             cuda_check(cudaStreamSynchronize(c->stream), "sliding a sequence");
    }
    cudaFree(sent);
    c->failed |= rc != 0;
}

/* Positions [first, first + n) to OUT or from IN, a page at a time through a buffer on the
 * device. */
int copy_pages(struct cuda *c, const struct sequence *of, uint32_t first, uint32_t n, void *out,
               const void *in) {
    const on_gpu here;
    const size_t row = (size_t)c->page_bytes / PAGE_POSITIONS;
    uint8_t *buffer = nullptr;
    if (cuda_check(cudaMalloc((void **)&buffer, c->page_bytes), "memory to copy keys and values"))
        return -1;
    int rc = 0;
    for (uint32_t done = 0, here; done < n && !rc; done += here) {
        const uint32_t at = first + done, slot = at % PAGE_POSITIONS;
        here = PAGE_POSITIONS - slot < n - done ? PAGE_POSITIONS - slot : n - done;
        cudaError_t error = cudaSuccess;
        if (in)
            error = cudaMemcpyAsync(buffer, (const uint8_t *)in + done * row, here * row,
                                    cudaMemcpyHostToDevice, c->stream);
        if (!error)
            error = launch_copy_page(c->kv, of->handles[at / PAGE_POSITIONS], (int)slot, (int)here,
                                     buffer, out != nullptr, c->stream);
        if (!error && out)
            error = cudaMemcpyAsync((uint8_t *)out + done * row, buffer, here * row,
                                    cudaMemcpyDeviceToHost, c->stream);
        if (!error) error = cudaStreamSynchronize(c->stream);
        rc = cuda_check(error, "copying keys and values");
    }
    cudaFree(buffer);
    return rc;
}

struct pages cuda_pages(void *state) {
    return {state, page_make, page_copy, page_slide, page_destroy};
}

int cuda_read(void *state, const struct sequence *of, uint32_t first, uint32_t n, void *out) {
    return copy_pages((struct cuda *)state, of, first, n, out, nullptr);
}

int cuda_write(void *state, const struct sequence *of, uint32_t first, uint32_t n,
               const void *in) {
    return copy_pages((struct cuda *)state, of, first, n, nullptr, in);
}

// ---- opening and closing

void cuda_close(void *state) {
    const on_gpu here;
    struct cuda *c = (struct cuda *)state;
    if (c->stream) cudaStreamSynchronize(c->stream);
    graphs_free(c);
    page_store_close(&c->pages);
    weights_give(c->model, c->weights);
    cudaFree(c->memory);
    cudaFree(c->lists);
    cudaFree(c->batch);
    cudaFreeHost(c->host);
    if (c->stream) cudaStreamDestroy(c->stream);
    free(c->frequencies);
    free(c);
}

void kv_open(struct cuda *c, const llama_session_options *options, uint32_t positions) {
    const llama_config *f = &c->model->config;
    uint32_t kind = f->kind == LLAMA_F32 ? LLAMA_F32 : LLAMA_F16;
    if (options->kv_kind >= 0) kind = (uint32_t)options->kv_kind;
    const size_t n_layers = f->n_layers - c->first_layer;
    c->kv = {kind, (int)n_layers, (int)f->n_kv_heads, (int)f->head_dim};
    const size_t element = kind == LLAMA_F32 ? 4 : kind == LLAMA_F16 ? 2 : 1;
    const size_t head = f->head_dim * element + (kind == LLAMA_Q8 ? 4 : 0);
    c->layer_page_bytes = (size_t)2 * f->n_kv_heads * PAGE_POSITIONS * head;
    c->page_bytes = n_layers * c->layer_page_bytes;
    if (n_layers) page_store_open(&c->pages, c->page_bytes, positions);
}

/* What blocks and their shared memory hold. */
int check_shape(const llama_config *f) {
    if (f->head_dim > MOST_HEAD_DIM)
        return fail("device \"cuda\": head_dim is %u, expected at most %d", f->head_dim,
                    MOST_HEAD_DIM);
    if (f->n_heads > MOST_HEADS)
        return fail("device \"cuda\": n_heads is %u, expected at most %d", f->n_heads, MOST_HEADS);
    return 0;
}

int open_parts(struct cuda *c, const llama_session_options *options, llama_session_info *info) {
    const llama_config *f = &c->model->config;
    if (device_find(&c->device) || check_shape(f)) return -1;
    snprintf(c->isa, sizeof c->isa, "%s, sm_%d%d", c->device.name, c->device.major,
             c->device.minor);
    kv_open(c, options, info->max_seq_len);
    c->rows = MOST_ROWS;
    if ((uint32_t)c->rows > info->max_seq_len) c->rows = (int)info->max_seq_len;
    if (c->rows < GRAPH_ROWS) c->rows = GRAPH_ROWS;
    // splits never make more blocks than four for each processor
    c->most_partial = 4 * c->device.multiProcessorCount;
    c->most_pages = 4 * ((size_t)info->max_seq_len / PAGE_POSITIONS + 1);
    c->memory_bytes = lay_out(c, nullptr);
    const size_t scratch = c->memory_bytes + batch_count(c, c->most_pages + c->most_pages / 2);
    const session_need need = {scratch, c->layer_page_bytes, info->max_seq_len};
    if (cuda_check(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking),
                   "opening a stream"))
        return -1;
    c->weights = weights_take(c->model, options, need, c->stream);
    if (!c->weights || scratch_open(c)) return -1;
    c->frequencies = (float *)malloc(f->head_dim / 2 * sizeof(float));
    if (!c->frequencies) return fail("out of memory for a session");
    rope_frequencies(f, 0, c->frequencies);
    info->isa = c->isa;
    info->threads = c->device.multiProcessorCount;
    info->kv_kind = c->kv.kind;
    info->scratch_bytes = info->gpu_scratch_bytes = scratch;
    info->kv_bytes_per_position = c->page_bytes / PAGE_POSITIONS;
    return 0;
}

int cuda_open(const struct model *model, const llama_session_options *options,
              llama_session_info *info, void **state) {
    const on_gpu here;
    struct cuda *c = (struct cuda *)calloc(1, sizeof *c);
    if (!c) return fail("out of memory for a session");
    c->model = model;
    c->first_layer = options->host_layers;
    if (open_parts(c, options, info)) return cuda_close(c), -1;
    *state = c;
    return 0;
}

} // namespace

extern "C" const struct backend backend_cuda = {
    "cuda",     cuda_open, cuda_close, cuda_pages, cuda_forward, cuda_stage,
    cuda_read, cuda_write, LOGIT_ROWS, cuda_fetch, cuda_sample,
};
