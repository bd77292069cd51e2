/* forward.c: Llama on the CPU, top to bottom, in named steps (arXiv:2302.13971, section 2.2).
 *
 * Rows are tokens of any sequences at any positions; each row is computed alone except that a
 * weight, once read, serves them all. cuda/forward.cu and llama/model.py take the same steps
 * under the same names. Arithmetic lives in kernels.h, threads in pool.h. */
#include "../backend.h"
#include "../error.h"
#include "../rope.h"
#include "attention.h"
#include "kernels.h"
#include "matmul.h"
#include "memory.h"
#include "pages.h"
#include "pool.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Scratch holds as many rows as fit in SCRATCH_BYTES: a prompt longer than that runs in parts.
 * More rows a part mean fewer readings of the weights; beyond 512 nothing more is won. */
enum { SCRATCH_BYTES = 40 << 20, MOST_ROWS = 512, LEAST_ROWS = 16, LOGIT_ROWS = 16,
       ROOM_BYTES = 8 << 20, MOST_ROOM = 1024 }; // of pieces of attention: half a million positions
_Static_assert((int)MOST_ROWS <= (int)ATTENTION_ROWS, "attend takes all rows at once");

struct cpu {
    const struct model *model;
    uint32_t n_layers;      // the first ones; all, unless a GPU runs the others
    const struct kernels *kernels;
    struct pool *pool;
    struct kv kv;
    struct slabs pages;
    float *frequencies;     // (head_dim / 2) rope, radians a position, for texts of
    uint32_t rope_length;   // this length

    // scratch, `rows` rows each; strides are padded to whole strips
    size_t rows, dim, heads, kv_heads, hidden, outputs; // strides
    struct block memory;
    float *x;               // (rows, dim) the residual stream
    float *normed;          // (rows, dim)
    float *q;               // (rows, heads)
    float *k, *v;           // (rows, kv_heads)
    float *attended;        // (rows, heads)
    size_t room;            // rows of what attention has of pieces behind the first
    float *pieces;          // (room, heads)
    struct mark *marks;     // (rows + room, n_heads)
    float *gate, *up;       // (rows, hidden)
    float *y;               // (rows, dim) what output and down add to the stream
    float *cos, *sin;       // (rows, head_dim / 2)
    float *logits;          // (LOGIT_ROWS, outputs)
    struct multiplier by;   // with room for one matmul's input as codes
};

/* The part of a batch that is being computed, n <= cpu->rows. */
struct part {
    struct cpu *cpu;
    const struct layer *layer;
    uint32_t layer_index;
    size_t n;
    const int32_t *tokens, *positions;
    const struct sequence *const *of;
    const int32_t *rope_lengths;
    const uint8_t *want;
};

// ---- the steps of one layer

static void embed_range(void *context, size_t first, size_t last) {
    const struct part *p = context;
    const struct matrix *e = &p->cpu->model->tok_embeddings;
    for (size_t i = first; i < last; i++)
        kind_decode_row(e->kind, e->data, e->columns, (uint64_t)p->tokens[i],
                        p->cpu->x + i * p->cpu->dim);
}

/* The angles that rope turns by. */
static void angles(struct part *p) {
    struct cpu *c = p->cpu;
    const llama_config *f = &c->model->config;
    const size_t half = f->head_dim / 2;
    for (size_t i = 0; i < p->n; i++) {
        const int32_t asked = p->rope_lengths ? p->rope_lengths[i] : 0;
        const uint32_t length = rope_length(f, asked, p->positions[i]);
        if (length != c->rope_length) rope_frequencies(f, length, c->frequencies);
        c->rope_length = length;
        rope_angles(f, c->frequencies, p->positions[i], c->cos + i * half, c->sin + i * half);
    }
}

static void embed(struct part *p) {
    pool_run(p->cpu->pool, p->n, 4, embed_range, p);
    angles(p);
}

struct norming {
    const struct cpu *cpu;
    const float *weight;    // (dim)
};

static void norm_range(void *context, size_t first, size_t last) {
    const struct norming *z = context;
    const struct cpu *c = z->cpu;
    for (size_t i = first; i < last; i++)
        c->kernels->rms_norm(c->normed + i * c->dim, c->x + i * c->dim, z->weight,
                             c->model->config.dim, c->model->config.norm_eps);
}

static void attention_norm(struct part *p) {
    struct norming z = {p->cpu, p->layer->attention_norm};
    pool_run(p->cpu->pool, p->n, 4, norm_range, &z);
}

static void qkv(struct part *p) {
    struct cpu *c = p->cpu;
    const struct product list[] = {{&p->layer->wq, c->q, c->heads},
                                   {&p->layer->wk, c->k, c->kv_heads},
                                   {&p->layer->wv, c->v, c->kv_heads}};
    matmul(&c->by, p->n, c->normed, c->dim, 3, list);
}

static void rope_range(void *context, size_t first, size_t last) {
    const struct part *p = context;
    const struct cpu *c = p->cpu;
    const llama_config *f = &c->model->config;
    const size_t d = f->head_dim;
    const size_t turned = c->kv.kind == LLAMA_Q8 ? d & -d : 1; // what hadamard makes of a product
    const float scale = 1.0f / sqrtf((float)d) / (float)turned;
    for (size_t i = first; i < last; i++) {
        const float *cos = c->cos + i * (d / 2), *sin = c->sin + i * (d / 2);
        float *q = c->q + i * c->heads, *k = c->k + i * c->kv_heads;
        for (size_t h = 0; h < f->n_kv_heads; h++) c->kernels->rope(k + h * d, cos, sin, d);
        for (size_t h = 0; h < f->n_heads; h++) c->kernels->rope(q + h * d, cos, sin, d);
        if (c->kv.kind == LLAMA_Q8) {
            for (size_t h = 0; h < f->n_kv_heads; h++) c->kernels->hadamard(k + h * d, d);
            for (size_t h = 0; h < f->n_heads; h++) c->kernels->hadamard(q + h * d, d);
        }
        for (size_t j = 0; j < f->n_heads * d; j++) q[j] *= scale; // softmax(q k / sqrt(d))
    }
}

static void rope(struct part *p) { pool_run(p->cpu->pool, p->n, 4, rope_range, p); }

static void store_range(void *context, size_t first, size_t last) {
    const struct part *p = context;
    const struct cpu *c = p->cpu;
    const llama_config *f = &c->model->config;
    for (size_t i = first; i < last; i++) {
        const size_t position = (size_t)p->positions[i];
        uint8_t *page = p->of[i]->handles[position / PAGE_POSITIONS];
        for (size_t h = 0; h < f->n_kv_heads; h++) {
            const size_t at = i * c->kv_heads + h * f->head_dim;
            kv_store(&c->kv, page + kv_offset(&c->kv, p->layer_index, h),
                     position % PAGE_POSITIONS, c->k + at, c->v + at);
        }
    }
}

static void store(struct part *p) { pool_run(p->cpu->pool, p->n, 4, store_range, p); }

static void attend(struct part *p) {
    struct cpu *c = p->cpu;
    const struct attending z = {
        .kv = &c->kv, .layer = p->layer_index, .n_heads = c->model->config.n_heads, .n = p->n,
        .of = p->of, .positions = p->positions, .q = c->q, .out = c->attended, .stride = c->heads,
        .room = c->room, .pieces = c->pieces, .marks = c->marks,
    };
    attend_rows(&z, c->pool);
}

static void residual_range(void *context, size_t first, size_t last) {
    const struct cpu *c = context;
    for (size_t i = first; i < last; i++)
        c->kernels->add(c->x + i * c->dim, c->y + i * c->dim, c->model->config.dim);
}

/* x += y: the one place where a sum across processes would stand. */
static void residual(struct part *p) { pool_run(p->cpu->pool, p->n, 8, residual_range, p->cpu); }

static void output(struct part *p) {
    struct cpu *c = p->cpu;
    matmul(&c->by, p->n, c->attended, c->heads, 1, &(struct product){&p->layer->wo, c->y, c->dim});
    residual(p);
}

static void ffn_norm(struct part *p) {
    struct norming z = {p->cpu, p->layer->ffn_norm};
    pool_run(p->cpu->pool, p->n, 4, norm_range, &z);
}

static void swiglu_range(void *context, size_t first, size_t last) {
    const struct cpu *c = context;
    for (size_t i = first; i < last; i++)
        c->kernels->swiglu(c->gate + i * c->hidden, c->up + i * c->hidden,
                           c->model->config.hidden_dim);
}

static void gate_up(struct part *p) {
    struct cpu *c = p->cpu;
    const struct product list[] = {{&p->layer->w1, c->gate, c->hidden},
                                   {&p->layer->w3, c->up, c->hidden}};
    matmul(&c->by, p->n, c->normed, c->dim, 2, list);
    pool_run(c->pool, p->n, 1, swiglu_range, c);
}

static void down(struct part *p) {
    struct cpu *c = p->cpu;
    matmul(&c->by, p->n, c->gate, c->hidden, 1, &(struct product){&p->layer->w2, c->y, c->dim});
    residual(p);
}

/* The stream's rows that want logits, one after the other; how many. TO may be the stream. */
static size_t gather(const struct part *p, float *to, size_t stride) {
    const struct cpu *c = p->cpu;
    size_t wanted = 0;
    for (size_t i = 0; i < p->n; i++)
        if (p->want && p->want[i])
            memmove(to + wanted++ * stride, c->x + i * c->dim,
                    c->model->config.dim * sizeof(float));
    return wanted;
}

/* N rows, STRIDE apart, of WIDTH numbers; returns past the last one written. */
static float *put(float *out, const float *rows, size_t n, size_t stride, size_t width) {
    for (size_t i = 0; i < n; i++, out += width)
        memcpy(out, rows + i * stride, width * sizeof *out);
    return out;
}

/* Final norm and the head's matrix for the rows that want them, or the norm alone; returns past
 * the last row written. Gathered in place: the stream is not needed again. */
static float *logits(struct part *p, bool hidden, float *out) {
    struct cpu *c = p->cpu;
    const llama_config *f = &c->model->config;
    const size_t wanted = gather(p, c->x, c->dim);
    struct norming z = {c, c->model->norm};
    struct multiplier by = c->by;
    by.bits = 16; // the logits feel each rounding, and are few
    pool_run(c->pool, wanted, 4, norm_range, &z);
    if (hidden || f->head == LLAMA_HEAD_NONE) return put(out, c->normed, wanted, c->dim, f->dim);
    for (size_t i = 0; i < wanted; i += LOGIT_ROWS) {
        const size_t n = wanted - i < LOGIT_ROWS ? wanted - i : LOGIT_ROWS;
        matmul(&by, n, c->normed + i * c->dim, c->dim, 1,
               &(struct product){&c->model->output, c->logits, c->outputs});
        out = put(out, c->logits, n, c->outputs, f->n_outputs);
    }
    return out;
}

/* The residual stream as it stands after LAYERS layers, where it is asked for. */
static void show_stream(const struct part *p, const struct rows *rows, size_t layers, size_t done) {
    const size_t dim = p->cpu->model->config.dim;
    if (rows->stream) gather(p, rows->stream + (layers * rows->wanted + done) * dim, dim);
}

static int cpu_forward(void *state, const struct rows *rows, float *out) {
    struct cpu *c = state;
    const size_t dim = c->model->config.dim;
    size_t done = 0; // rows wanted in the parts before
    for (size_t start = 0; start < rows->n; start += c->rows) {
        struct part p = {
            .cpu = c,
            .n = rows->n - start < c->rows ? rows->n - start : c->rows,
            .tokens = rows->tokens + start,
            .positions = rows->positions + start,
            .of = rows->of + start,
            .rope_lengths = rows->rope_lengths ? rows->rope_lengths + start : NULL,
            .want = rows->want ? rows->want + start : NULL,
        };
        embed(&p);
        show_stream(&p, rows, 0, done);
        for (uint32_t n = 0; n < c->n_layers; n++) {
            p.layer = &c->model->layers[n];
            p.layer_index = n;
            attention_norm(&p);
            qkv(&p);
            rope(&p);
            store(&p);
            attend(&p);
            output(&p);
            ffn_norm(&p);
            gate_up(&p);
            down(&p);
            show_stream(&p, rows, n + 1, done);
        }
        for (size_t i = 0; i < p.n; i++) done += p.want && p.want[i];
        if (rows->to) {
            put(rows->to + start * dim, c->x, p.n, c->dim, dim);
            continue;
        }
        out = logits(&p, rows->hidden, out);
    }
    return 0;
}

// ---- stages, for calibration

struct rows_view { float *at; size_t stride, width; }; // rows of scratch

/* What a stage takes besides the stream, or leaves. */
static struct rows_view stage_view(struct cpu *c, uint32_t stage) {
    const llama_config *f = &c->model->config;
    if (stage == LLAMA_STAGE_OUTPUT)
        return (struct rows_view){c->attended, c->heads, (size_t)f->n_heads * f->head_dim};
    if (stage == LLAMA_STAGE_DOWN) return (struct rows_view){c->gate, c->hidden, f->hidden_dim};
    return (struct rows_view){c->normed, c->dim, f->dim};
}

static void take(struct rows_view to, const float *rows, size_t n) {
    for (size_t i = 0; i < n; i++)
        memcpy(to.at + i * to.stride, rows + i * to.width, to.width * sizeof *rows);
}

static void stage_part(struct part *p, uint32_t stage) {
    struct norming last = {p->cpu, p->cpu->model->norm};
    switch (stage) {
    case LLAMA_STAGE_QKV: attention_norm(p); break;
    case LLAMA_STAGE_OUTPUT:
        angles(p);
        attention_norm(p);
        qkv(p);
        rope(p);
        store(p);
        attend(p);
        break;
    case LLAMA_STAGE_GATE_UP:
        output(p);
        ffn_norm(p);
        break;
    case LLAMA_STAGE_DOWN:
        ffn_norm(p);
        gate_up(p);
        break;
    case LLAMA_STAGE_END: down(p); break;
    case LLAMA_STAGE_HEAD: pool_run(p->cpu->pool, p->n, 4, norm_range, &last); break;
    }
}

/* Every layer has the first's place in the pages: no other is needed at the same time. */
static int cpu_stage(void *state, const llama_stage *stage, const struct layer *layer,
                     const struct sequence *of) {
    struct cpu *c = state;
    const size_t dim = c->model->config.dim;
    int32_t positions[MOST_ROWS], lengths[MOST_ROWS];
    const struct sequence *all[MOST_ROWS];
    for (size_t start = 0; start < stage->n; start += c->rows) {
        struct part p = {.cpu = c, .layer = layer, .positions = positions, .of = all,
                         .rope_lengths = lengths,
                         .n = stage->n - start < c->rows ? stage->n - start : c->rows};
        for (size_t i = 0; i < p.n; i++) {
            positions[i] = (int32_t)(start + i);
            lengths[i] = (int32_t)stage->n;
            all[i] = of;
        }
        const struct rows_view stream = {c->x, c->dim, dim}, out = stage_view(c, stage->stage);
        take(stream, stage->stream + start * dim, p.n);
        if (stage->stage == LLAMA_STAGE_GATE_UP || stage->stage == LLAMA_STAGE_END) {
            const struct rows_view in = stage_view(c, stage->stage - 1);
            take(in, stage->given + start * in.width, p.n);
        }
        stage_part(&p, stage->stage);
        put(stage->stream + start * dim, c->x, p.n, c->dim, dim);
        if (stage->stage != LLAMA_STAGE_END)
            put(stage->inputs + start * out.width, out.at, p.n, out.stride, out.width);
    }
    return 0;
}

// ---- pages

static void *page_make(void *device) {
    struct cpu *c = device;
    void *page = slabs_take(&c->pages);
    if (!page) fail("out of memory for a KV page of %zu bytes", c->kv.page_bytes);
    return page;
}

static void page_copy(void *device, void *to, const void *from) {
    memcpy(to, from, ((struct cpu *)device)->kv.page_bytes);
}

/* All go together when the session closes. */
static void page_destroy(void *device, void *page) {
    (void)device, (void)page;
}

/* The angles stand where a forward pass keeps its first row's. The frequencies never changed in
 * a session that may slide. */
static void page_slide(void *device, void *const *from, void *const *to, uint32_t first,
                       uint32_t count, uint32_t length) {
    struct cpu *c = device;
    rope_back(&c->model->config, c->frequencies, count, c->cos, c->sin);
    kv_slide(&c->kv, c->pool, from, to, first, count, length, c->cos, c->sin, c->k);
}

static struct pages cpu_pages(void *state) {
    return (struct pages){state, page_make, page_copy, page_slide, page_destroy};
}

static int cpu_read(void *state, const struct sequence *of, uint32_t first, uint32_t n,
                    void *out) {
    const struct cpu *c = state;
    kv_read(&c->kv, c->pool, of->handles, first, n, out);
    return 0;
}

static int cpu_write(void *state, const struct sequence *of, uint32_t first, uint32_t n,
                     const void *in) {
    const struct cpu *c = state;
    kv_write(&c->kv, c->pool, of->handles, first, n, in);
    return 0;
}

// ---- opening and closing

static void cpu_close(void *state) {
    struct cpu *c = state;
    pool_close(c->pool);
    slabs_free(&c->pages);
    block_give(&c->memory);
    free(c->frequencies);
    free(c);
}

static size_t up_to(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/* Lays the scratch out from BASE (NULL: only counts); returns its bytes. */
static size_t lay_out(struct cpu *c, char *base) {
    const size_t r = c->rows, half = c->model->config.head_dim / 2;
    const size_t layers = r * (size_t)c->by.bits / 8, head = LOGIT_ROWS * 16 / 8;
    const size_t codes = layers > head ? layers : head, groups = r > LOGIT_ROWS ? r : LOGIT_ROWS;
    size_t widest = c->dim > c->heads ? c->dim : c->heads;
    widest = up_to(widest > c->hidden ? widest : c->hidden, GROUP);
    const struct { void *pointer; size_t bytes; } list[] = {
        {&c->x, r * c->dim * 4},         {&c->normed, r * c->dim * 4},
        {&c->q, r * c->heads * 4},       {&c->attended, r * c->heads * 4},
        {&c->k, r * c->kv_heads * 4},    {&c->v, r * c->kv_heads * 4},
        {&c->gate, r * c->hidden * 4},   {&c->up, r * c->hidden * 4},
        {&c->y, r * c->dim * 4},         {&c->logits, LOGIT_ROWS * c->outputs * 4},
        {&c->cos, r * half * 4},         {&c->sin, r * half * 4},
        {&c->pieces, c->room * c->heads * 4},
        {&c->marks, (r + c->room) * c->model->config.n_heads * sizeof *c->marks},
        {&c->by.codes, codes * widest},
        {&c->by.scales, groups * widest / GROUP * 4},
        {&c->by.sums, groups * widest / GROUP * 4},
    };
    size_t bytes = 0;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        char *at = base ? base + bytes : NULL;
        memcpy(list[i].pointer, &at, sizeof at);
        bytes += up_to(list[i].bytes, 64);
    }
    return bytes;
}

static int scratch_open(struct cpu *c) {
    const llama_config *f = &c->model->config;
    c->dim = up_to(f->dim, TILE_ROWS);
    c->heads = up_to((size_t)f->n_heads * f->head_dim, TILE_ROWS);
    c->kv_heads = up_to((size_t)f->n_kv_heads * f->head_dim, TILE_ROWS);
    c->hidden = up_to(f->hidden_dim, TILE_ROWS);
    c->outputs = up_to(f->n_outputs, TILE_ROWS);
    c->rows = c->room = 1;
    const size_t row_bytes = lay_out(c, NULL) - LOGIT_ROWS * c->outputs * 4;
    c->rows = SCRATCH_BYTES / row_bytes;
    if (c->rows > MOST_ROWS) c->rows = MOST_ROWS;
    if (c->rows < LEAST_ROWS) c->rows = LEAST_ROWS;
    c->room = ROOM_BYTES / (c->heads * 4 + f->n_heads * sizeof *c->marks);
    if (c->room > MOST_ROOM) c->room = MOST_ROOM;
    if (c->room < c->rows) c->room = c->rows; // a prompt's rows have one each
    const size_t bytes = lay_out(c, NULL);
    if (block_take(&c->memory, bytes)) return fail("out of memory for %zu bytes of scratch", bytes);
    lay_out(c, c->memory.at);
    return 0;
}

static int cpu_open(const struct model *model, const llama_session_options *options,
                    llama_session_info *info, void **state) {
    struct cpu *c = calloc(1, sizeof *c);
    if (!c) return fail("out of memory for a session");
    const llama_config *f = &model->config;
    c->model = model;
    c->n_layers = options->host_layers ? options->host_layers : f->n_layers;
    c->kernels = kernels_find(options->isa);
    c->by.bits = info->activations;
    c->kv = (struct kv){
        .kernels = c->kernels,
        .kind = options->kv_kind >= 0  ? (uint32_t)options->kv_kind
                : f->kind == LLAMA_F32 ? LLAMA_F32
                                       : LLAMA_F16,
        .n_layers = c->n_layers, .n_kv_heads = f->n_kv_heads, .head_dim = f->head_dim,
    };
    kv_lay_out(&c->kv);
    c->pages.piece_bytes = up_to(c->kv.page_bytes, 64);
    c->frequencies = malloc(f->head_dim / 2 * sizeof(float));
    if (!c->frequencies) fail("out of memory for a session");
    if (!c->kernels)
        fail("isa \"%s\" is not among the kernels that this build and CPU have", options->isa);
    if (!c->frequencies || !c->kernels || scratch_open(c) ||
        !(c->pool = pool_open(options->threads)))
        return cpu_close(c), -1;
    c->by.kernels = c->kernels;
    c->by.pool = c->pool;
    rope_frequencies(f, 0, c->frequencies);
    info->isa = c->kernels->isa;
    info->threads = pool_threads(c->pool);
    info->kv_kind = c->kv.kind;
    info->scratch_bytes = lay_out(c, c->memory.at);
    info->kv_bytes_per_position = c->kv.page_bytes / PAGE_POSITIONS;
    *state = c;
    return 0;
}

const struct backend backend_cpu = {
    .name = "cpu", .open = cpu_open, .close = cpu_close, .pages = cpu_pages,
    .forward = cpu_forward, .stage = cpu_stage, .read = cpu_read, .write = cpu_write,
};
