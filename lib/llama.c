/* llama.c: the door to a file and to the machine. It checks every argument, keeps the error text,
 * and calls inward; nothing behind it needs to doubt what it is given. session.c is the door to
 * what runs. */
#include "llama.h"
#include "cpu/kernels.h"
#include "cpu/limits.h"
#include "encode.h"
#include "error.h"
#include "handles.h"
#include "moments.h"
#include "products.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local char error_text[1024];

int fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return -1;
}

const char *llama_error(void) { return error_text; }

// ---- models

void model_release(llama_model *m) {
    if (atomic_fetch_sub(&m->users, 1) != 1) return;
    model_close(&m->model);
    free(m);
}

int llama_open(const char *path, llama_model **model) {
    if (!path || !model) return fail("llama_open: path or model is NULL");
    *model = NULL;
    llama_model *m = calloc(1, sizeof *m);
    if (!m) return fail("out of memory for a model");
    atomic_init(&m->users, 1);
    if (model_open(&m->model, path)) {
        file_done(&m->model.file, -1); // names and shapes are read from it
        return model_release(m), -1;
    }
    *model = m;
    return 0;
}

void llama_close(llama_model *model) {
    if (model) model_release(model);
}

int llama_get_config(const llama_model *model, llama_config *config) {
    if (!model || !config) return fail("llama_get_config: an argument is NULL");
    *config = model->model.config;
    return file_done(&model->model.file, 0);
}

size_t llama_count_tensors(const llama_model *model) {
    return model ? model->model.file.n_tensors : 0;
}

size_t llama_count_meta(const llama_model *model) { return model ? model->model.file.n_metas : 0; }

int llama_get_tensor(const llama_model *model, size_t index, llama_tensor *tensor) {
    if (!model || !tensor) return fail("llama_get_tensor: an argument is NULL");
    const struct file *f = &model->model.file;
    if (index >= f->n_tensors) return fail("tensor %zu of %zu", index, f->n_tensors);
    *tensor = f->tensors[index].is;
    return file_done(f, 0);
}

int llama_get_meta(const llama_model *model, size_t index, llama_meta *meta) {
    if (!model || !meta) return fail("llama_get_meta: an argument is NULL");
    const struct file *f = &model->model.file;
    if (index >= f->n_metas) return fail("meta entry %zu of %zu", index, f->n_metas);
    *meta = f->metas[index];
    return file_done(f, 0);
}

int llama_get_tokenizer(const llama_model *model, const uint8_t **bytes, size_t *n_bytes) {
    if (!model || !bytes || !n_bytes) return fail("llama_get_tokenizer: an argument is NULL");
    const struct file *f = &model->model.file;
    *bytes = f->tokenizer;
    *n_bytes = f->tokenizer_bytes;
    return file_done(f, f->tokenizer_kind);
}

int llama_get_header(const llama_model *model, const uint8_t **bytes, size_t *n_bytes) {
    if (!model || !bytes || !n_bytes) return fail("llama_get_header: an argument is NULL");
    *bytes = model->model.file.base;
    *n_bytes = model->model.file.header_bytes;
    return file_done(&model->model.file, 0);
}

int llama_verify(const llama_model *model, size_t tensor) {
    if (!model) return fail("llama_verify: model is NULL");
    const struct file *f = &model->model.file;
    if (tensor >= f->n_tensors) return fail("tensor %zu of %zu", tensor, f->n_tensors);
    return file_verify(f, tensor);
}

int llama_read_rows(const llama_model *model, size_t tensor, size_t first, size_t n, float *out) {
    if (!model || !out) return fail("llama_read_rows: an argument is NULL");
    const struct file *f = &model->model.file;
    if (tensor >= f->n_tensors) return fail("tensor %zu of %zu", tensor, f->n_tensors);
    const struct tensor *t = &f->tensors[tensor];
    if (first > t->is.shape[0] || n > t->is.shape[0] - first)
        return fail("%s: rows %zu to %zu of %zu", t->is.name, first, first + n,
                    (size_t)t->is.shape[0]);
    if (t->is.n_dims == 1) memcpy(out, t->data + first * 4, n * 4);
    else
        for (size_t i = 0; i < n; i++)
            kind_decode_row(t->kind, t->data, t->is.shape[1], first + i, out + i * t->is.shape[1]);
    return file_done(f, 0);
}

// ---- quantising

int llama_quantize(const llama_model *model, size_t tensor, size_t first, size_t n, uint32_t kind,
                   const float *factor, int threads, void *out, size_t out_bytes,
                   llama_loss *loss) {
    if (!model || !out || !loss) return fail("llama_quantize: an argument is NULL");
    const struct file *f = &model->model.file;
    if (encode_check(f, tensor, first, n, kind, &out_bytes)) return -1;
    return file_done(f, encode_rows(&f->tensors[tensor], first, n, kind_find(kind), factor, threads,
                                    out, loss));
}

int llama_multiply(const llama_model *model, size_t tensor, size_t first, size_t n, uint32_t kind,
                   const void *blocks, size_t block_bytes, const float *x, size_t n_x, int threads,
                   float *y) {
    if (!model || !x || !y) return fail("llama_multiply: an argument is NULL");
    const struct file *f = &model->model.file;
    if (encode_check(f, tensor, first, n, kind, blocks ? &block_bytes : NULL)) return -1;
    return file_done(f, products_make(&f->tensors[tensor], first, n, kind_find(kind), blocks, x,
                                      n_x, threads, y));
}

int llama_add_moments(const float *x, size_t n, size_t columns, int rotated, int threads,
                      float *moments) {
    if (!x || !moments || !columns) return fail("llama_add_moments: an argument is NULL or 0");
    if (rotated && columns % GROUP)
        return fail("%zu columns are no whole groups of %d to rotate", columns, GROUP);
    return n ? moments_add(x, n, columns, rotated, threads, moments) : 0;
}

int llama_factor_moments(float *moments, size_t columns, double damping, int threads) {
    if (!moments || !columns) return fail("llama_factor_moments: an argument is NULL or 0");
    if (!(damping >= 0 && damping <= 1)) return fail("damping is %g, expected 0 to 1", damping);
    return moments_factor(moments, columns, damping, threads);
}

// ---- the machine

const char *llama_isa_name(size_t i) {
    const struct kernels *k = kernels_at(i);
    return k ? k->isa : NULL;
}

int llama_measure_bandwidth(int threads, size_t bytes, double *bytes_per_second) {
    if (!bytes_per_second) return fail("llama_measure_bandwidth: bytes_per_second is NULL");
    return limits_bandwidth(threads, bytes, bytes_per_second);
}

int llama_measure_peaks(int threads, const char *isa, double *f32, double *int8) {
    if (!f32 || !int8) return fail("llama_measure_peaks: f32 or int8 is NULL");
    const struct kernels *k = kernels_find(isa);
    if (!k) return fail("isa \"%s\" is not among the kernels that this build and CPU have", isa);
    return limits_peaks(threads, k->isa, f32, int8);
}
