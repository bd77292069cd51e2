/* format.c: .bin -> read-only mmap -> named tensors.
 *
 * The file may come from anyone, so each number is checked against the file's real length before
 * it is used, and the header's checksum before anything else is believed. Tensor data is not
 * read here: opening costs the same for any size of model. */
#include "format.h"
#include "error.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HEADER_BYTES = 256, RECORD_BYTES = 128, NAME_BYTES = 64, ENTRY_BYTES = 24, ALIGN = 64 };
enum { MAX_TENSORS = 65536, MAX_METAS = 4096, MAX_KEY = 255, MAX_LABELS = 65536 };

typedef unsigned long long ull;

static uint32_t u32(const uint8_t *p) {
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static uint64_t u64(const uint8_t *p) { return u32(p) | (uint64_t)u32(p + 4) << 32; }
static float f32(const uint8_t *p) {
    uint32_t bits = u32(p);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static bool all_zero(const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (p[i]) return false;
    return true;
}

/* Maps PATH; what is not a regular file of a header's length is refused by name. */
static int map(struct file *f) {
    int fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe must not make it wait
    if (fd < 0) return fail("%s: %s", f->path, strerror(errno));
    struct stat st;
    int rc = 0;
    if (fstat(fd, &st)) rc = fail("%s: %s", f->path, strerror(errno));
    else if (S_ISDIR(st.st_mode)) rc = fail("%s: is a directory, not a .bin file", f->path);
    else if (!S_ISREG(st.st_mode)) rc = fail("%s: is not a regular file", f->path);
    else if (st.st_size == 0) rc = fail("%s: is empty", f->path);
    else if ((uint64_t)st.st_size > SIZE_MAX) rc = fail("%s: too large to map here", f->path);
    if (!rc) {
        void *base = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (base == MAP_FAILED) rc = fail("%s: cannot map it: %s", f->path, strerror(errno));
        else {
            f->base = base, f->bytes = (size_t)st.st_size;
#if defined(MADV_HUGEPAGE)
            // What the disk still has comes in huge pages then, where the file system knows them.
            madvise(base, f->bytes, MADV_HUGEPAGE);
#endif
        }
    }
    if (f->base && !(f->guard = guard_add(f->base, f->bytes)))
        rc = fail("%s: out of memory", f->path);
    close(fd);
    return rc;
}

/* What another program's file is, by its first bytes. */
static int not_ours(const struct file *f) {
    const char *what = "its first bytes are not \"LlamaBin\"";
    if (f->bytes >= 4 && !memcmp(f->base, "GGUF", 4)) what = "it is a GGUF file";
    if (f->bytes >= 4 && !memcmp(f->base, "PK\3\4", 4)) what = "it is a zip or .pth file";
    if (f->bytes >= 9 && u64(f->base) < f->bytes && f->base[8] == '{')
        what = "it is a safetensors file";
    return fail("%s: is not a model of this program (%s); export.py makes one", f->path, what);
}

/* Magic, version, lengths and checksum: after this the header is what its writer wrote. */
static int check_envelope(struct file *f) {
    const uint8_t *h = f->base;
    if (f->bytes < 8 || memcmp(h, "LlamaBin", 8)) return not_ours(f);
    if (f->bytes < HEADER_BYTES)
        return fail("%s: cut short: %zu bytes, its header alone has 256", f->path, f->bytes);
    if (u32(h + 8) != 1)
        return fail("%s: file version %u, this program reads version 1", f->path, u32(h + 8));
    uint64_t header_bytes = u64(h + 16), file_bytes = u64(h + 24);
    if (file_bytes != f->bytes)
        return fail("%s: %s: its header says %llu bytes, it has %zu", f->path,
                    f->bytes < file_bytes ? "cut short" : "too long", (ull)file_bytes, f->bytes);
    if (header_bytes < HEADER_BYTES || header_bytes > f->bytes || header_bytes % ALIGN)
        return fail("%s: damaged: header of %llu bytes", f->path, (ull)header_bytes);
    f->header_bytes = (size_t)header_bytes;
    const uint8_t zero[4] = {0};
    uint32_t crc = crc32_add(crc32_add(0, h, 12), zero, 4);
    crc = crc32_add(crc, h + 16, (size_t)header_bytes - 16);
    if (crc != u32(h + 12))
        return fail("%s: damaged: header checksum %08x, recorded %08x", f->path, crc, u32(h + 12));
    return 0;
}

static int check_rope(const struct file *f) {
    static const uint32_t counts[] = {0, 1, 4, 6, 2}; // how many numbers each LLAMA_ROPE_ has
    const llama_config *c = &f->config;
    const float *numbers = c->rope_numbers;
    if (c->rope_scaling >= sizeof counts / sizeof *counts)
        return fail("%s: rope scaling %u is not known to this program", f->path, c->rope_scaling);
    for (uint32_t i = 0; i < counts[c->rope_scaling]; i++) {
        const bool choice = c->rope_scaling == LLAMA_ROPE_YARN && i == 5; // truncate
        if (choice ? numbers[i] != 0 && numbers[i] != 1
                   : !(numbers[i] > 0 && isfinite(numbers[i])))
            return fail("%s: impossible config: rope scaling number %u is %g", f->path, i,
                        (double)numbers[i]);
    }
    if (c->rope_scaling == LLAMA_ROPE_DYNAMIC && c->head_dim == 2)
        return fail("%s: impossible config: dynamic rope scaling with a head_dim of 2", f->path);
    if (c->rope_scaling == LLAMA_ROPE_LLAMA3 && numbers[2] <= numbers[1])
        return fail("%s: impossible config: llama3 rope scaling from %g to %g", f->path,
                    (double)numbers[1], (double)numbers[2]);
    return 0;
}

static int check_head(const struct file *f) {
    const llama_config *c = &f->config;
    const uint32_t labels = u32(f->base + 200);
    const bool labelled = c->head >= LLAMA_HEAD_SEQUENCE;
    if (c->head > LLAMA_HEAD_TOKEN)
        return fail("%s: head %u is not known to this program", f->path, c->head);
    if (labelled ? labels < 1 || labels > MAX_LABELS : labels > 0)
        return fail("%s: impossible config: %u labels for head %u", f->path, labels, c->head);
    if (c->head == LLAMA_HEAD_ANSWER && labels != 2)
        return fail("%s: impossible config: an answer's head has %u outputs, expected 2", f->path,
                    labels);
    if (c->head != LLAMA_HEAD_LM && c->tied)
        return fail("%s: impossible config: head %u cannot be tied", f->path, c->head);
    if (!labelled && c->output_bias)
        return fail("%s: impossible config: head %u has no bias", f->path, c->head);
    return 0;
}

static int check_config(const struct file *f) {
    const llama_config *c = &f->config;
    const struct { const char *name; uint32_t value, most; } sizes[] = {
        {"vocab_size", c->vocab_size, 1 << 24}, {"dim", c->dim, 1 << 24},
        {"hidden_dim", c->hidden_dim, 1 << 24}, {"head_dim", c->head_dim, 1 << 16},
        {"n_layers", c->n_layers, 4096},        {"n_heads", c->n_heads, 65536},
        {"n_kv_heads", c->n_kv_heads, 65536},   {"max_seq_len", c->max_seq_len, 1 << 24},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].most)
            return fail("%s: impossible config: %s is %u, expected 1 to %u", f->path,
                        sizes[i].name, sizes[i].value, sizes[i].most);
    if (c->head_dim % 2)
        return fail("%s: impossible config: head_dim is %u, expected an even number", f->path,
                    c->head_dim);
    if (c->n_heads % c->n_kv_heads)
        return fail("%s: impossible config: n_kv_heads is %u, expected a divisor of n_heads %u",
                    f->path, c->n_kv_heads, c->n_heads);
    if (!(c->norm_eps > 0 && isfinite(c->norm_eps)))
        return fail("%s: impossible config: norm_eps is %g", f->path, (double)c->norm_eps);
    if (!(c->rope_theta > 0 && isfinite(c->rope_theta)))
        return fail("%s: impossible config: rope_theta is %g", f->path, (double)c->rope_theta);
    if (check_rope(f) || check_head(f)) return -1;
    if (c->bos_id < -1 || (c->bos_id >= 0 && (uint32_t)c->bos_id >= c->vocab_size))
        return fail("%s: impossible config: bos_id is %d of %u tokens", f->path, c->bos_id,
                    c->vocab_size);
    if (c->n_eos > LLAMA_MAX_EOS)
        return fail("%s: impossible config: %u eos ids, at most %d", f->path, c->n_eos,
                    LLAMA_MAX_EOS);
    for (uint32_t i = 0; i < c->n_eos; i++)
        if (c->eos_ids[i] < 0 || (uint32_t)c->eos_ids[i] >= c->vocab_size)
            return fail("%s: impossible config: eos_id is %d of %u tokens", f->path,
                        c->eos_ids[i], c->vocab_size);
    return 0;
}

static int read_config(struct file *f) {
    const uint8_t *h = f->base;
    const uint32_t flags = u32(h + 76);
    if (flags > 15) return fail("%s: unknown flags %#x in its header", f->path, flags);
    llama_config *c = &f->config;
    uint32_t *sizes[] = {&c->vocab_size, &c->dim,     &c->hidden_dim, &c->head_dim,
                         &c->n_layers,   &c->n_heads, &c->n_kv_heads, &c->max_seq_len};
    for (size_t i = 0; i < 8; i++) *sizes[i] = u32(h + 80 + 4 * i);
    c->tied = flags & 1;
    c->attention_bias = flags >> 1 & 1;
    c->mlp_bias = flags >> 2 & 1;
    c->output_bias = flags >> 3 & 1;
    c->norm_eps = f32(h + 112);
    c->rope_theta = f32(h + 116);
    c->rope_scaling = u32(h + 120);
    for (size_t i = 0; i < 8; i++) c->rope_numbers[i] = f32(h + 124 + 4 * i);
    c->bos_id = (int32_t)u32(h + 156);
    c->n_eos = u32(h + 160);
    for (size_t i = 0; i < LLAMA_MAX_EOS; i++) c->eos_ids[i] = (int32_t)u32(h + 164 + 4 * i);
    c->head = u32(h + 196);
    c->n_outputs = c->head == LLAMA_HEAD_LM     ? c->vocab_size
                   : c->head == LLAMA_HEAD_NONE ? c->dim
                                                : u32(h + 200);
    c->file_bytes = f->bytes;
    return check_config(f);
}

static int read_record(struct file *f, size_t index) {
    const uint8_t *r = f->base + HEADER_BYTES + index * RECORD_BYTES;
    struct tensor *t = &f->tensors[index];
    size_t length = 0;
    while (length < NAME_BYTES && r[length] > ' ' && r[length] < 127) length++;
    if (!length || length == NAME_BYTES || !all_zero(r + length, NAME_BYTES - length))
        return fail("%s: damaged: tensor %zu has no proper name", f->path, index);
    t->is = (llama_tensor){.name = (const char *)r, .kind = u32(r + 64), .n_dims = u32(r + 68),
                           .shape = {u64(r + 72), u64(r + 80)}, .bytes = u64(r + 96),
                           .crc32 = u32(r + 104)};
    const char *name = t->is.name;
    t->kind = kind_find(t->is.kind);
    if (!t->kind)
        return fail("%s: %s has block kind %u, unknown here: made by an older version, quantize "
                    "again (or by a newer one)", f->path, name, t->is.kind);
    const uint64_t most = 1 << 24;
    if (t->is.n_dims < 1 || t->is.n_dims > 2 || t->is.shape[0] < 1 || t->is.shape[0] > most ||
        t->is.shape[1] < 1 || t->is.shape[1] > most || (t->is.n_dims == 1 && t->is.shape[1] != 1))
        return fail("%s: %s has an impossible shape: %u dims (%llu, %llu)", f->path, name,
                    t->is.n_dims, (ull)t->is.shape[0], (ull)t->is.shape[1]);
    if (t->kind->rotated && t->is.shape[1] % GROUP)
        return fail("%s: %s has %llu columns, %s takes whole groups of %d", f->path, name,
                    (ull)t->is.shape[1], t->kind->name, GROUP);
    if (t->is.n_dims == 1 && t->is.kind != LLAMA_F32)
        return fail("%s: %s is a vector of %s, expected f32", f->path, name, t->kind->name);
    uint64_t need = t->is.n_dims == 1 ? 4 * t->is.shape[0]
                                      : kind_matrix_bytes(t->kind, t->is.shape[0], t->is.shape[1]);
    if (t->is.bytes != need)
        return fail("%s: %s has %llu bytes, its shape needs %llu", f->path, name,
                    (ull)t->is.bytes, (ull)need);
    uint64_t offset = u64(r + 88);
    if (offset % ALIGN || offset < u64(f->base + 16) || offset > f->bytes ||
        need > f->bytes - offset)
        return fail("%s: %s lies outside the file: offset %llu, %llu bytes", f->path, name,
                    (ull)offset, (ull)need);
    t->data = f->base + offset;
    return 0;
}

struct sorted { const char *name; const uint8_t *data; size_t index; };
static int order_names(const void *a, const void *b) {
    return strcmp(((const struct sorted *)a)->name, ((const struct sorted *)b)->name);
}
static int order_places(const void *a, const void *b) {
    const uint8_t *x = ((const struct sorted *)a)->data, *y = ((const struct sorted *)b)->data;
    return (x > y) - (x < y);
}

/* Names must differ and data must not overlap; leaves by_name filled. */
static int check_directory(struct file *f) {
    struct sorted *s = malloc((f->n_tensors + 1) * sizeof *s);
    if (!s) return fail("%s: out of memory", f->path);
    int rc = 0;
    for (size_t i = 0; i < f->n_tensors; i++)
        s[i] = (struct sorted){f->tensors[i].is.name, f->tensors[i].data, i};
    qsort(s, f->n_tensors, sizeof *s, order_places);
    for (size_t i = 1; i < f->n_tensors && !rc; i++)
        if (s[i - 1].data + f->tensors[s[i - 1].index].is.bytes > s[i].data)
            rc = fail("%s: damaged: %s and %s overlap", f->path, s[i - 1].name, s[i].name);
    qsort(s, f->n_tensors, sizeof *s, order_names);
    for (size_t i = 1; i < f->n_tensors && !rc; i++)
        if (!strcmp(s[i - 1].name, s[i].name))
            rc = fail("%s: damaged: two tensors are called %s", f->path, s[i].name);
    for (size_t i = 0; i < f->n_tensors; i++) f->by_name[i] = s[i].index;
    free(s);
    return rc;
}

static int read_tensors(struct file *f) {
    uint64_t header_bytes = u64(f->base + 16);
    f->n_tensors = u32(f->base + 32);
    if (f->n_tensors > MAX_TENSORS ||
        HEADER_BYTES + RECORD_BYTES * (uint64_t)f->n_tensors > header_bytes)
        return fail("%s: damaged: %zu tensors do not fit its header", f->path, f->n_tensors);
    f->tensors = calloc(f->n_tensors + 1, sizeof *f->tensors);
    f->by_name = calloc(f->n_tensors + 1, sizeof *f->by_name);
    if (!f->tensors || !f->by_name) return fail("%s: out of memory", f->path);
    uint64_t weights_of[LLAMA_Q4E + 1] = {0}; // by kind
    for (size_t i = 0; i < f->n_tensors; i++) {
        if (read_record(f, i)) return -1;
        const llama_tensor *t = &f->tensors[i].is;
        f->config.weight_bytes += t->bytes;
        if (t->n_dims == 2) weights_of[t->kind] += t->shape[0] * t->shape[1];
    }
    for (uint32_t k = 0; k <= LLAMA_Q4E; k++)
        if (weights_of[k] > weights_of[f->config.kind]) f->config.kind = k;
    return check_directory(f);
}

/* One meta entry at P, LEFT bytes before the section ends; *SIZE is what it takes. */
static int read_meta(struct file *f, const uint8_t *p, uint64_t left, llama_meta *m, char *key,
                     uint64_t *size) {
    if (left < ENTRY_BYTES) return fail("%s: damaged: meta entries are cut short", f->path);
    uint32_t type = u32(p), flags = u32(p + 4), key_bytes = u32(p + 8);
    uint64_t value_bytes = u64(p + 16);
    if (key_bytes < 1 || key_bytes > MAX_KEY || value_bytes > left ||
        ENTRY_BYTES + key_bytes + value_bytes > left)
        return fail("%s: damaged: a meta entry is longer than its section", f->path);
    for (uint32_t i = 0; i < key_bytes; i++)
        if (p[ENTRY_BYTES + i] <= ' ' || p[ENTRY_BYTES + i] > '~')
            return fail("%s: damaged: a meta key is not plain ASCII", f->path);
    memcpy(key, p + ENTRY_BYTES, key_bytes);
    key[key_bytes] = 0;
    if (flags & 1)
        return fail("%s: needs \"%s\", which this version does not know", f->path, key);
    const uint8_t *value = p + ENTRY_BYTES + key_bytes;
    *m = (llama_meta){.key = key, .type = type, .bytes = value, .n_bytes = value_bytes};
    if (type == LLAMA_META_INT || type == LLAMA_META_FLOAT) {
        if (value_bytes != 8) return fail("%s: damaged: meta \"%s\" has %llu bytes, expected 8",
                                          f->path, key, (ull)value_bytes);
        uint64_t bits = u64(value);
        memcpy(&m->integer, &bits, 8);
        memcpy(&m->number, &bits, 8);
    }
    *size = (ENTRY_BYTES + key_bytes + value_bytes + 7) / 8 * 8;
    if (*size > left) return fail("%s: damaged: meta entries are cut short", f->path);
    return 0;
}

static int order_keys(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int check_keys(const struct file *f) {
    const char **keys = malloc((f->n_metas + 1) * sizeof *keys);
    if (!keys) return fail("%s: out of memory", f->path);
    int rc = 0;
    for (size_t i = 0; i < f->n_metas; i++) keys[i] = f->metas[i].key;
    qsort(keys, f->n_metas, sizeof *keys, order_keys);
    for (size_t i = 1; i < f->n_metas && !rc; i++)
        if (!strcmp(keys[i - 1], keys[i]))
            rc = fail("%s: damaged: two meta entries are called %s", f->path, keys[i]);
    free(keys);
    return rc;
}

static int read_metas(struct file *f) {
    const uint8_t *h = f->base;
    uint64_t header_bytes = u64(h + 16), at = u64(h + 40), bytes = u64(h + 48);
    f->n_metas = u32(h + 36);
    if (f->n_metas > MAX_METAS || at != HEADER_BYTES + RECORD_BYTES * (uint64_t)f->n_tensors ||
        bytes % 8 || at > header_bytes || bytes > header_bytes - at)
        return fail("%s: damaged: its meta entries do not fit its header", f->path);
    f->metas = calloc(f->n_metas + 1, sizeof *f->metas);
    f->meta_keys = malloc((f->n_metas + 1) * (MAX_KEY + 1));
    if (!f->metas || !f->meta_keys) return fail("%s: out of memory", f->path);
    for (size_t i = 0; i < f->n_metas; i++) {
        uint64_t size = 0;
        char *key = f->meta_keys + i * (MAX_KEY + 1);
        if (read_meta(f, h + at, bytes, &f->metas[i], key, &size)) return -1;
        at += size, bytes -= size;
    }
    if (bytes) return fail("%s: damaged: bytes left over after its meta entries", f->path);
    f->tokenizer_bytes = u64(h + 64);
    f->tokenizer_kind = (int)u32(h + 72);
    uint64_t start = u64(h + 56);
    if (start != at || start > header_bytes || f->tokenizer_bytes > header_bytes - start)
        return fail("%s: damaged: its tokenizer does not fit its header", f->path);
    if (u32(h + 72) > LLAMA_TOKENIZER_TIKTOKEN ||
        (f->tokenizer_kind == LLAMA_TOKENIZER_NONE) != (f->tokenizer_bytes == 0))
        return fail("%s: tokenizer kind %u with %zu bytes is not known to this program", f->path,
                    u32(h + 72), f->tokenizer_bytes);
    f->tokenizer = h + start;
    return check_keys(f);
}

int file_open(struct file *f, const char *path) {
    memset(f, 0, sizeof *f);
    f->path = strdup(path);
    if (!f->path) return fail("%s: out of memory", path);
    if (map(f) || check_envelope(f) || read_config(f) || read_tensors(f) || read_metas(f))
        return file_done(f, -1);
    return file_done(f, 0);
}

int file_done(const struct file *f, int rc) {
    return guard_broken(f->guard)
        ? fail("%s: was cut short, or cannot be read any more, while it was open", f->path) : rc;
}

void file_close(struct file *f) {
    guard_remove(f->guard);
    if (f->base) munmap((void *)(uintptr_t)f->base, f->bytes);
    free(f->path);
    free(f->tensors);
    free(f->by_name);
    free(f->metas);
    free(f->meta_keys);
    memset(f, 0, sizeof *f);
}

const struct tensor *file_find(const struct file *f, const char *name) {
    size_t low = 0, high = f->n_tensors;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const struct tensor *t = &f->tensors[f->by_name[middle]];
        int order = strcmp(name, t->is.name);
        if (!order) return t;
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

int file_verify(const struct file *f, size_t index) {
    const struct tensor *t = &f->tensors[index];
    uint32_t crc = crc32_add(0, t->data, (size_t)t->is.bytes);
    if (file_done(f, 0)) return -1;
    if (crc != t->is.crc32)
        return fail("%s: %s is damaged: checksum %08x, recorded %08x", f->path, t->is.name, crc,
                    t->is.crc32);
    return 0;
}
