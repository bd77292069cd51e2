/* cuda_kernels.cu: every launcher of lib/cuda/kernels.h against plain double arithmetic, on sizes
 * with nothing round about them. Runs on a GPU, and on the CPU by tests/cuda_on_cpu.
 *
 * Each buffer is an allocation of its own, exactly as long as it should be, so that memcheck and
 * AddressSanitizer see a step too far; what a kernel must not read holds NaN.
 *
 *     cuda_kernels          run all; the last line is "N passed, M failed"
 *     cuda_kernels few      fewer sizes, for slow checkers */
#include "../lib/cuda/kernels.h"
extern "C" {
#include "../lib/llama.h"
#include "../lib/quant.h"
}
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef std::vector<float> floats;
static size_t passed, failed;

static void check(bool good, const char *format, ...) {
    va_list args;
    if (good) passed++;
    if (good || failed++ > 40) return;
    printf("FAILED: ");
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

static void must(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return;
    printf("%s: %s\n0 passed, 1 failed\n", what, cudaGetErrorString(error));
    exit(1);
}

static cudaStream_t stream;

template <class T> struct buffer {
    T *at = nullptr;
    size_t n;
    explicit buffer(size_t n) : n(n) {
        must(cudaMalloc((void **)&at, n * sizeof(T)), "cudaMalloc");
        must(cudaMemsetAsync(at, 0xff, n * sizeof(T), stream), "cudaMemset");
    }
    explicit buffer(const std::vector<T> &from) : buffer(from.size()) {
        must(cudaMemcpyAsync(at, from.data(), n * sizeof(T), cudaMemcpyHostToDevice, stream), "copy");
        must(cudaStreamSynchronize(stream), "copy");
    }
    buffer(const buffer &) = delete;
    ~buffer() { cudaFree(at); }
    std::vector<T> get() const {
        std::vector<T> to(n);
        must(cudaMemcpyAsync(to.data(), at, n * sizeof(T), cudaMemcpyDeviceToHost, stream), "copy");
        must(cudaStreamSynchronize(stream), "running a kernel");
        return to;
    }
};

static uint64_t state = 1;
static double uniform() { // -1 to 1
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 33) / 1073741824.0 - 1;
}
static floats randoms(size_t n, float by = 1) {
    floats v(n);
    for (float &one : v) one = by * (float)uniform();
    return v;
}

/* A random matrix of any kind: its blocks, and what they decode to. */
struct weights {
    const struct kind *kind;
    uint32_t number;
    int rows, columns;
    std::vector<uint8_t> blocks;
    floats values, bias; // (rows, columns); (rows)
    weights(uint32_t number, int rows, int columns, bool with_bias)
        : kind(kind_find(number)), number(number), rows(rows), columns(columns),
          blocks(kind_matrix_bytes(kind, (uint64_t)rows, (uint64_t)columns)),
          values((size_t)rows * columns), bias(with_bias ? randoms((size_t)rows) : floats()) {
        const size_t each = kind->columns * TILE_ROWS;
        for (size_t i = 0; i < blocks.size(); i += kind->block_bytes) {
            const floats random = randoms(each, number == LLAMA_BF16 ? 3000 : 0.1f);
            kind->encode(random.data(), &blocks[i]);
        }
        for (int r = 0; r < rows; r++)
            kind_decode_row(kind, blocks.data(), (uint64_t)columns, (uint64_t)r,
                            &values[(size_t)r * columns]);
        if (kind->columns == 1) // padding rows are zeros
            for (size_t i = 0; i < blocks.size(); i += kind->block_bytes / TILE_ROWS) {
                const size_t row = i / kind_strip_bytes(kind, (uint64_t)columns) * TILE_ROWS +
                                   i / (kind->block_bytes / TILE_ROWS) % TILE_ROWS;
                if (row >= (size_t)rows) memset(&blocks[i], 0, kind->block_bytes / TILE_ROWS);
            }
    }
    /* Scaled as memory.cu scales: here by a fixed power of two that fits the numbers above. */
    float scale() const {
        return number == LLAMA_BF16 ? 2 : number == LLAMA_F32 ? 0x1p13f : 1;
    }
};

struct on_device {
    buffer<uint8_t> blocks;
    buffer<float> bias;
    device_matrix is;
    explicit on_device(const weights &w) : blocks(w.blocks), bias(w.bias) {
        is = {blocks.at, (size_t)kind_strip_bytes(w.kind, (uint64_t)w.columns), w.rows, w.columns,
              (w.rows + TILE_ROWS - 1) / TILE_ROWS, w.number, false, w.bias.empty() ? nullptr : bias.at,
              w.scale()};
    }
};

// ---- products

enum path { GEMV, GEMV_READY, GEMM };
static const char *const paths[] = {"gemv", "gemv_ready", "gemm"};

struct input {
    int n, columns, stride;
    floats x, norm;
    std::vector<int32_t> rows;
    input(int n, int columns, bool normed, bool gathered)
        : n(n), columns(columns), stride(columns + 3),
          x(randoms((size_t)(gathered ? 2 * n : n) * stride, 3)),
          norm(normed ? randoms((size_t)columns) : floats()) {
        for (int i = 0; gathered && i < n; i++) rows.push_back(2 * i + 1);
    }
    /* Row i as a product sees it. */
    std::vector<double> row(int i) const {
        const float *from = &x[(size_t)(rows.empty() ? i : rows[i]) * stride];
        double squares = 0;
        for (int c = 0; c < columns; c++) squares += (double)from[c] * from[c];
        const double by = 1 / sqrt(squares / columns + 1e-5);
        std::vector<double> to(columns);
        for (int c = 0; c < columns; c++) to[c] = norm.empty() ? from[c] : from[c] * by * norm[c];
        return to;
    }
};

/* Sums and what rounding may make of them. */
struct expected { double sum, size; };
static expected dot(const weights &w, const std::vector<double> &x, int r) {
    expected e = {w.bias.empty() ? 0 : w.bias[r], 0};
    for (int c = 0; c < w.columns; c++) {
        e.sum += (double)w.values[(size_t)r * w.columns + c] * x[c];
        e.size += fabs((double)w.values[(size_t)r * w.columns + c] * x[c]);
    }
    return e;
}

static cudaError_t run(path by, const product &p, const input &in, const vectors &x, bool split) {
    if (by == GEMV) return launch_gemv(p, x, 4, stream);
    const int stride = (in.columns + HALVES_UNIT - 1) / HALVES_UNIT * HALVES_UNIT;
    buffer<uint16_t> halves_(((size_t)in.n << split) * stride);
    buffer<float> unscale((size_t)in.n);
    const halves ready = {halves_.at, unscale.at, stride, in.n, split, false};
    cudaError_t error = launch_prepare(x, in.columns, ready, stream);
    if (!error)
        error = by == GEMM ? launch_gemm(p, ready, stream) : launch_gemv_ready(p, ready, 4, stream);
    if (!error) error = cudaStreamSynchronize(stream);
    return error;
}

static void try_product(path by, uint32_t kind, int rows, int columns, int n, after then,
                        int flags) {
    const bool bias = flags & 1, normed = flags & 2, gathered = flags & 4, three = flags & 8;
    const bool split = by == GEMV || kind == LLAMA_F32;
    const int n_targets = then == SWIGLU ? 2 : three ? 3 : 1;
    const input in(n, columns, normed, gathered);
    const weights a(kind, rows, columns, bias);
    const weights b(kind, then == SWIGLU ? rows : rows / 2 + 1, columns, bias);
    const weights c(kind, rows + 5, columns, !bias);
    const weights *all[] = {&a, &b, &c};
    const on_device da(a), db(b), dc(c);
    const device_matrix *on[] = {&da.is, &db.is, &dc.is};
    buffer<float> x(in.x), norm(in.norm);
    buffer<int32_t> gather(in.rows);
    const int stride = rows + 7;
    const floats before = randoms((size_t)n * stride);
    buffer<float> y0(before), y1(before), y2(before);
    float *ys[] = {y0.at, y1.at, y2.at};
    product p = {n_targets, {}, then};
    for (int i = 0; i < n_targets; i++) p.targets[i] = {*on[i], ys[i], stride};
    const vectors v = {x.at, in.stride, n, in.rows.empty() ? nullptr : gather.at,
                       in.norm.empty() ? nullptr : norm.at, 1e-5f};
    must(run(by, p, in, v, split), paths[by]);
    const floats got[] = {y0.get(), y1.get(), y2.get()};
    double worst = 0;
    int touched = 0;
    for (int i = 0; i < n; i++) {
        const std::vector<double> xi = in.row(i);
        for (int t = 0; t < (then == SWIGLU ? 1 : n_targets); t++)
            for (int r = 0; r < stride; r++) {
                const float is = got[t][(size_t)i * stride + r];
                const float was = before[(size_t)i * stride + r];
                if (r >= all[t]->rows) {
                    touched += memcmp(&is, &was, sizeof is) != 0;
                    continue;
                }
                expected e = dot(*all[t], xi, r);
                double want = e.sum, size = e.size + fabs(e.sum);
                if (then == ADD) want += was, size += fabs(was);
                if (then == SWIGLU) {
                    const expected up = dot(b, xi, r);
                    want = e.sum / (1 + exp(-e.sum)) * up.sum;
                    size = (e.size + 1) * (up.size + 1);
                }
                const double off = fabs(is - want) / (size + 1e-30);
                worst = off > worst || off != off ? off : worst;
            }
    }
    // 22 bits of x, and f32 sums; or 11 bits
    check(worst < (split ? 2e-6 : 5e-4) && !touched,
          "%s of kind %u (%d, %d), %d rows, then %d, flags %d: off by %g, %d numbers beside it "
          "changed", paths[by], kind, rows, columns, n, then, flags, worst, touched);
}

static void try_products(bool few) {
    static const uint32_t kinds[] = {LLAMA_F32, LLAMA_F16, LLAMA_BF16, LLAMA_Q8, LLAMA_Q4,
                                     LLAMA_Q4E};
    for (uint32_t kind : kinds) {
        try_product(GEMV, kind, 40, 100, 1, STORE, 2 | 8);
        try_product(GEMV, kind, 35, 2111, 4, ADD, 1 | 4);
        try_product(GEMV, kind, 33, 72, 3, SWIGLU, 1 | 2);
        try_product(GEMV_READY, kind, 50, 161, kind == LLAMA_F32 ? 8 : 16, STORE, 1 | 2 | 8);
        try_product(GEMM, kind, 50, 161, 33, STORE, 1 | 2 | 8);
        if (few) continue;
        try_product(GEMV, kind, 1, 1, 1, STORE, 0);
        try_product(GEMV, kind, 16, 32, 2, STORE, 4);
        try_product(GEMV, kind, 300, 64, 1, SWIGLU, 0);
        try_product(GEMV, kind, 17, 9000, 1, ADD, 2);
        try_product(GEMV_READY, kind, 31, 700, 5, SWIGLU, 2);
        try_product(GEMV_READY, kind, 1, 33, 7, ADD, 4);
        try_product(GEMM, kind, 1, 1, 1, STORE, 0);
        try_product(GEMM, kind, 140, 200, 70, SWIGLU, 2);
        try_product(GEMM, kind, 130, 97, 129, ADD, 1 | 4);
    }
}

static void try_embed() {
    for (uint32_t kind : {LLAMA_F32, LLAMA_F16, LLAMA_BF16, LLAMA_Q8, LLAMA_Q4, LLAMA_Q4E}) {
        const weights w((uint32_t)kind, 37, 300, false);
        const on_device d(w);
        const std::vector<int32_t> tokens = {36, 0, 17};
        buffer<int32_t> t(tokens);
        buffer<float> x(3 * 300);
        must(launch_embed(d.is, t.at, 3, x.at, stream), "embed");
        const floats got = x.get();
        bool same = true;
        for (int i = 0; i < 3; i++)
            same = same && !memcmp(&got[i * 300], &w.values[(size_t)tokens[i] * 300], 300 * 4);
        check(same, "embed of kind %u is not to the last bit what it should be", kind);
    }
}

// ---- keys, values and attention

struct scene { // a batch of rows of one or two sequences, their earlier positions stored before
    kv_shape kv;
    int n_heads, n, before;
    bool two; // the last row is of a second sequence, at its position 0
};

static size_t page_bytes(const kv_shape &kv) {
    const size_t element = kv.kind == LLAMA_F32 ? 4 : kv.kind == LLAMA_F16 ? 2 : 1;
    const size_t row = kv.head_dim * element + (kv.kind == LLAMA_Q8 ? 4 : 0);
    return (size_t)2 * kv.n_layers * kv.n_kv_heads * PAGE_POSITIONS * row;
}

/* Plain attention: keys and values as they come back out of the pages, queries as
 * launch_rope_store leaves them. */
static double attention_error(const scene &s, const floats &q, const std::vector<int32_t> &at,
                              const std::vector<floats> &k, const std::vector<floats> &v,
                              const floats &got) {
    const int dim = s.kv.head_dim, group = s.n_heads / s.kv.n_kv_heads;
    double worst = 0;
    for (int i = 0; i < s.n; i++)
        for (int h = 0; h < s.n_heads; h++) {
            const floats &keys = k[s.two && i == s.n - 1], &values = v[s.two && i == s.n - 1];
            std::vector<double> w(at[i] + 1), out(dim);
            double most = -INFINITY, sum = 0;
            for (int p = 0; p <= at[i]; p++) {
                const size_t from = ((size_t)p * s.kv.n_kv_heads + h / group) * dim;
                for (int d = 0; d < dim; d++)
                    w[p] += (double)q[((size_t)i * s.n_heads + h) * dim + d] * keys[from + d];
                most = fmax(most, w[p]);
            }
            for (int p = 0; p <= at[i]; p++) sum += w[p] = exp(w[p] - most);
            for (int p = 0; p <= at[i]; p++)
                for (int d = 0; d < dim; d++)
                    out[d] += w[p] / sum *
                              values[((size_t)p * s.kv.n_kv_heads + h / group) * dim + d];
            for (int d = 0; d < dim; d++) {
                const double off = fabs(got[((size_t)i * s.n_heads + h) * dim + d] - out[d]);
                worst = off > worst || off != off ? off : worst;
            }
        }
    return worst;
}

static uint16_t half_at(const uint8_t *bytes) { return (uint16_t)(bytes[0] | bytes[1] << 8); }

/* Layer 1's keys and values of N positions, by way of launch_copy_page. */
static void read_back(const scene &s, const std::vector<void *> &pages, int n, floats *k,
                      floats *v) {
    const int dim = s.kv.head_dim, heads = s.kv.n_kv_heads;
    const size_t row = page_bytes(s.kv) / PAGE_POSITIONS, half = row / s.kv.n_layers / 2;
    const size_t head = half / heads;
    for (int p = 0; p < n; p++) {
        buffer<uint8_t> plain(row);
        must(launch_copy_page(s.kv, pages[p / PAGE_POSITIONS], p % PAGE_POSITIONS, 1, plain.at, true,
                              stream), "copy_page");
        const std::vector<uint8_t> bytes = plain.get();
        for (int h = 0; h < 2 * heads; h++) {
            const uint8_t *from = &bytes[2 * half + h * head];
            floats *to = h < heads ? k : v;
            float scale = 1;
            if (s.kv.kind == LLAMA_Q8) memcpy(&scale, from + dim, 4);
            for (int d = 0; d < dim; d++) {
                float value = scale * (float)(int8_t)from[d];
                if (s.kv.kind == LLAMA_F32) memcpy(&value, from + 4 * d, 4);
                if (s.kv.kind == LLAMA_F16) value = f16_to_f32(half_at(from + 2 * d));
                to->push_back(value);
            }
        }
    }
}

static void try_attention(const scene &s, int splits, int pages_a_split) {
    const int dim = s.kv.head_dim, half = dim / 2, heads = s.kv.n_kv_heads;
    const int group = s.n_heads / heads, total = s.before + s.n;
    const int n_pages = (total + PAGE_POSITIONS - 1) / PAGE_POSITIONS;
    std::vector<buffer<uint8_t> *> own;
    std::vector<void *> pages;
    for (int i = 0; i <= n_pages; i++) {
        own.push_back(new buffer<uint8_t>(page_bytes(s.kv)));
        pages.push_back(own.back()->at);
    }
    buffer<void *> list(pages);
    // first the earlier positions, then the batch itself; only the batch's queries are kept
    std::vector<int32_t> at, tables;
    floats cos, sin, kept_q;
    for (int step = 0; step < 2; step++) {
        const int n = step ? s.n : s.before;
        if (!n) continue;
        at.assign(n, 0), tables.assign(n, 0);
        for (int i = 0; i < n; i++) at[i] = step ? s.before + i : i;
        if (step && s.two) at[n - 1] = 0, tables[n - 1] = n_pages;
        cos.clear(), sin.clear();
        for (int i = 0; i < n * half; i++) {
            cos.push_back((float)std::cos(at[i / half] * 0.1 * (i % half + 1)));
            sin.push_back((float)std::sin(at[i / half] * 0.1 * (i % half + 1)));
        }
        buffer<int32_t> dat(at), dtables(tables);
        buffer<float> dcos(cos), dsin(sin), q(randoms((size_t)n * s.n_heads * dim, 4));
        buffer<float> k(randoms((size_t)n * heads * dim)), v(randoms((size_t)n * heads * dim));
        const batch_rows rows = {n, dat.at, dtables.at, list.at, dcos.at, dsin.at};
        must(launch_rope_store(s.kv, 1, rows, q.at, k.at, v.at, s.n_heads, stream), "rope_store");
        kept_q = q.get();
        if (!step) continue;
        std::vector<attend_item> items;
        for (int i = 0; i < (n - s.two) * group; i += 8) items.push_back({0, n - s.two, i});
        for (int i = 0; s.two && i < group; i += 8) items.push_back({n - 1, 1, i});
        buffer<attend_item> ditems(items);
        buffer<float> partial(items.size() * heads * splits * 8 * (dim + 2));
        buffer<float> out((size_t)n * s.n_heads * dim), plain((size_t)n * s.n_heads * dim);
        attention a = {s.kv, 1, s.n_heads, rows, q.at, out.at, ditems.at, (int)items.size(),
                       splits, pages_a_split, partial.at};
        std::vector<floats> ks(2), vs(2);
        read_back(s, pages, total - s.two, &ks[0], &vs[0]);
        if (s.two) read_back(s, {pages[n_pages]}, 1, &ks[1], &vs[1]);
        if (attend_fits(s.kv)) {
            must(launch_attend(a, stream), "attend");
            const double off = attention_error(s, kept_q, at, ks, vs, out.get());
            check(off < 4e-6, "attend, kind %u, heads %d of %d for %d, %d rows behind %d, splits "
                  "%d: off by %g", s.kv.kind, s.n_heads, dim, heads, s.n, s.before, splits, off);
        }
        a.out = plain.at;
        must(launch_attend_any(a, stream), "attend_any");
        const double off = attention_error(s, kept_q, at, ks, vs, plain.get());
        check(off < 4e-6, "attend_any, kind %u, heads %d of %d for %d, %d rows behind %d: off by %g",
              s.kv.kind, s.n_heads, dim, heads, s.n, s.before, off);
    }
    for (buffer<uint8_t> *page : own) delete page;
}

static void try_attentions(bool few) {
    for (int kind : {LLAMA_F16, LLAMA_Q8, LLAMA_F32}) {
        const uint32_t k = (uint32_t)kind;
        try_attention({{k, 2, 2, 64}, 6, 7, 30, true}, 1, 4);
        try_attention({{k, 2, 1, 128}, 9, 1, 170, false}, 2, 4);
        if (few) continue;
        try_attention({{k, 2, 2, 6}, 2, 5, 0, false}, 1, 4);
        try_attention({{k, 2, 1, 48}, 3, 2, 140, true}, 1, 8);
        try_attention({{k, 2, 2, 64}, 2, 33, 0, false}, 1, 4);
        try_attention({{k, 2, 1, 64}, 8, 3, 290, true}, 4, 4);
        try_attention({{k, 2, 1, 128}, 1, 1, 0, false}, 8, 4);
    }
}

/* Positions move down and keys turn back: against a store at the new positions. */
static void try_slide() {
    for (int kind : {LLAMA_F32, LLAMA_F16, LLAMA_Q8}) {
        const scene s = {{(uint32_t)kind, 2, 2, 12}, 2, 0, 0, false};
        const int n = 75, first = 5, count = 20, dim = 12, half = 6;
        std::vector<void *> pages;
        std::vector<buffer<uint8_t> *> own;
        for (int i = 0; i < 6; i++) { // three hold the positions as they were, three as they are
            own.push_back(new buffer<uint8_t>(page_bytes(s.kv)));
            must(cudaMemsetAsync(own.back()->at, 0, page_bytes(s.kv), stream), "cudaMemset");
            pages.push_back(own.back()->at);
        }
        buffer<void *> list(pages);
        const floats k = randoms((size_t)n * 2 * dim), v = randoms((size_t)n * 2 * dim);
        floats kk[2], vv[2], back_cos, back_sin;
        for (int moved = 0; moved < 2; moved++) {
            std::vector<int32_t> at, tables;
            floats cos, sin, k_at, v_at;
            for (int i = 0; i < n; i++) {
                if (moved && i >= first && i < first + count) continue;
                at.push_back(moved && i >= first ? i - count : i);
                tables.push_back(3 * moved);
                for (int j = 0; j < half; j++) {
                    cos.push_back((float)std::cos(at.back() * 0.3 / (j + 1)));
                    sin.push_back((float)std::sin(at.back() * 0.3 / (j + 1)));
                }
                k_at.insert(k_at.end(), &k[i * 2 * dim], &k[i * 2 * dim] + 2 * dim);
                v_at.insert(v_at.end(), &v[i * 2 * dim], &v[i * 2 * dim] + 2 * dim);
            }
            buffer<int32_t> dat(at), dtables(tables);
            buffer<float> dcos(cos), dsin(sin), dk(k_at), dv(v_at), q(at.size() * 2 * dim);
            const batch_rows rows = {(int)at.size(), dat.at, dtables.at, list.at, dcos.at, dsin.at};
            for (int layer = 0; layer < 2; layer++)
                must(launch_rope_store(s.kv, layer, rows, q.at, dk.at, dv.at, 2, stream), "store");
            must(cudaStreamSynchronize(stream), "rope_store");
        }
        for (int j = 0; j < half; j++) {
            back_cos.push_back((float)std::cos(count * 0.3 / (j + 1)));
            back_sin.push_back((float)-std::sin(count * 0.3 / (j + 1)));
        }
        buffer<float> dcos(back_cos), dsin(back_sin);
        must(launch_slide(s.kv, list.at, list.at, first, count, n - count, dcos.at, dsin.at, stream),
             "slide");
        for (int moved = 0; moved < 2; moved++)
            read_back(s, {pages[3 * moved], pages[3 * moved + 1], pages[3 * moved + 2]}, n - count,
                      &kk[moved], &vv[moved]);
        double off = 0;
        for (size_t i = 0; i < kk[0].size(); i++) off = fmax(off, fabs(kk[0][i] - kk[1][i]));
        const double bound = kind == LLAMA_F32 ? 1e-6 : kind == LLAMA_F16 ? 2e-3 : 8e-2;
        check(off < bound && vv[0] == vv[1], "slide of kind %d: keys off by %g, values %s", kind,
              off, vv[0] == vv[1] ? "right" : "wrong");
        for (buffer<uint8_t> *page : own) delete page;
    }
}

int main(int n, char **words) {
    const bool few = n > 1 && !strcmp(words[1], "few");
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    try_products(few);
    try_embed();
    try_attentions(few);
    try_slide();
    must(cudaStreamDestroy(stream), "cudaStreamDestroy");
    printf("%zu passed, %zu failed\n", passed, failed);
    return failed != 0;
}
