/* bin.c: a .bin file of any bytes is refused with one line, or opens and runs: every tensor is
 * verified, read and encoded, and a few tokens go through the network.
 *
 * The header's checksum is made right before each try, and the mutator knows where numbers stand,
 * so that what is found lies behind both. The library's map of the file becomes a copy of its
 * exact length, so that AddressSanitizer sees a read of one byte too many. */
#include "must.h"
#include "quant.h"
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

uint32_t crc32_add(uint32_t crc, const void *data, size_t n);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned int seed);
void *__real_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *at, size_t size);
void *__wrap_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
int __wrap_munmap(void *at, size_t size);

// ---- the file's map, as a copy

static void *copy; // one file is open at a time

void *__wrap_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
    if (fd < 0) return __real_mmap(at, size, protection, flags, fd, offset);
    MUST(!copy && !posix_memalign(&copy, 4096, size));
    MUST(pread(fd, copy, size, offset) == (ssize_t)size);
    return copy;
}

int __wrap_munmap(void *at, size_t size) {
    if (at != copy) return __real_munmap(at, size);
    free(copy);
    copy = NULL;
    return 0;
}

static uint64_t get(const uint8_t *p, size_t bytes) {
    uint64_t value = 0;
    for (size_t i = bytes; i--;) value = value << 8 | p[i];
    return value;
}

static void put(uint8_t *p, uint64_t value, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) p[i] = (uint8_t)(value >> 8 * i);
}

/* Makes the header's checksum right, as far as it can be computed. */
static void seal(uint8_t *data, size_t size) {
    if (size < 256 || memcmp(data, "LlamaBin", 8)) return;
    const uint64_t header = get(data + 16, 8);
    put(data + 12, 0, 4);
    put(data + 12, crc32_add(0, data, header < size ? (size_t)header : size), 4);
}

// ---- what is done with it

static const uint8_t *file_bytes; // of the input, sealed
static size_t n_file_bytes;

static void use_tensors(const llama_model *model) {
    static const uint32_t kinds[] = {LLAMA_Q4, LLAMA_Q8, LLAMA_Q4E, LLAMA_Q8R, LLAMA_Q4R,
                                     LLAMA_F32, LLAMA_F16, LLAMA_BF16};
    for (size_t i = 0; i < llama_count_tensors(model); i++) {
        llama_tensor t;
        llama_loss loss;
        MUST(!llama_get_tensor(model, i, &t));
        (void)llama_verify(model, i);
        float *rows = malloc(t.shape[0] * t.shape[1] * sizeof *rows);
        MUST(rows && !llama_read_rows(model, i, 0, t.shape[0], rows));
        MUST(llama_read_rows(model, i, t.shape[0], 1, rows) == -1);
        free(rows);
        // by the header's checksum, so that each tensor meets every kind
        const uint32_t kind = kinds[(i + file_bytes[12]) % (sizeof kinds / sizeof *kinds)];
        const struct kind *k = kind_find(kind);
        const size_t strips = (t.shape[0] + TILE_ROWS - 1) / TILE_ROWS;
        const size_t bytes = strips * ((t.shape[1] + k->columns - 1) / k->columns) * k->block_bytes;
        void *out = malloc(bytes);
        MUST(out);
        const int rc = llama_quantize(model, i, 0, t.shape[0], kind, NULL, 1, out, bytes, &loss);
        MUST(rc || isfinite(loss.sum_squared_error));
        free(out);
    }
}

static void use_texts(const llama_model *model) {
    const uint8_t *bytes = NULL;
    size_t n = 0;
    uint32_t crc = 0; // of every byte that was handed out
    MUST(llama_get_tokenizer(model, &bytes, &n) >= 0);
    crc = crc32_add(crc, bytes, n);
    for (size_t i = 0; i < llama_count_meta(model); i++) {
        llama_meta m;
        MUST(!llama_get_meta(model, i, &m) && strlen(m.key) <= 255);
        crc = crc32_add(crc, m.bytes, m.n_bytes);
    }
    MUST(!llama_get_header(model, &bytes, &n));
    (void)crc32_add(crc, bytes, n);
}

/* Keys and values out of a file, which may be any BYTES: they come back as they were, and a token
 * that attends to them is computed, or refused for numbers that are not finite. */
static void use_kv(llama_session *session, const uint8_t *bytes, size_t n_bytes) {
    llama_session_info info;
    const int32_t to = 9, token = 0;
    const uint8_t want = 0;
    MUST(!llama_get_session_info(session, &info));
    const size_t each = info.kv_bytes_per_position;
    size_t n = n_bytes / each < 40 ? n_bytes / each : 40;
    if (n >= info.max_seq_len) n = info.max_seq_len - 1;
    if (!n) return;
    MUST(llama_write_kv(session, to, 0, (uint32_t)n, bytes, n * each - 1));
    MUST(llama_write_kv(session, to, 1, (uint32_t)n, bytes, n * each));
    MUST(!llama_write_kv(session, to, 0, (uint32_t)n, bytes, n * each));
    uint8_t *back = malloc(n * each);
    MUST(back && !llama_read_kv(session, to, 0, (uint32_t)n, back, n * each));
    MUST(!memcmp(back, bytes, n * each));
    free(back);
    const int32_t at = (int32_t)n;
    const llama_batch next = {.n = 1, .tokens = &token, .sequences = &to, .positions = &at,
                              .want = &want};
    (void)llama_forward(session, &next, NULL);
}

enum { ROWS = 5 };

/* Three tokens of one sequence, two of another, then one more; OUT (ROWS + 1, n_outputs). The
 * context may be too short for it. */
static int run(llama_model *model, const char *isa, int activations, float *out) {
    llama_config c;
    llama_session *session = NULL;
    MUST(!llama_get_config(model, &c));
    const llama_session_options options = {.isa = isa, .threads = 1, .kv_kind = -1,
                                           .activations = activations};
    if (llama_session_open(model, &options, &session)) return -1;
    const int32_t last = (int32_t)c.vocab_size - 1;
    const int32_t tokens[ROWS] = {0, last, last / 2, last, 0};
    const int32_t sequences[ROWS] = {0, 0, 0, 7, 7}, positions[ROWS] = {0, 1, 2, 0, 1};
    const uint8_t want[ROWS] = {1, 1, 1, 1, 1};
    const llama_batch batch = {.n = ROWS, .tokens = tokens, .sequences = sequences,
                               .positions = positions, .want = want};
    const int32_t at = 3;
    const llama_batch next = {.n = 1, .tokens = tokens, .sequences = sequences, .positions = &at,
                              .want = want};
    int rc = llama_forward(session, &batch, out);
    if (!rc) rc = llama_forward(session, &next, out + ROWS * (size_t)c.n_outputs);
    if (!rc) {
        uint32_t length = 0;
        MUST(!llama_fork(session, 0, 1, 3) && !llama_trim(session, 0, 1));
        (void)llama_slide(session, 1, 1, 1);
        MUST(!llama_length(session, 0, &length) && length == 1);
    }
    use_kv(session, file_bytes, n_file_bytes);
    llama_session_close(session);
    return rc;
}

/* Every kernel set gives the same bits, NaN for NaN. */
static void use_network(llama_model *model) {
    llama_config c;
    MUST(!llama_get_config(model, &c));
    const size_t n = (ROWS + 1) * (size_t)c.n_outputs;
    float *right = malloc(n * sizeof *right), *other = malloc(n * sizeof *other);
    MUST(right && other);
    const int rc = run(model, "scalar", 8, right), again = run(model, NULL, 8, other);
    MUST(rc == again);
    for (size_t i = 0; i < n && !rc; i++)
        MUST(!memcmp(right + i, other + i, sizeof *right) ||
             (isnan(right[i]) && isnan(other[i])));
    (void)run(model, NULL, 16, other);
    free(right);
    free(other);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int fd = -1;
    static char path[64];
    if (fd < 0) {
        fd = memfd_create("bin", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        MUST(fd >= 0);
    }
    uint8_t *sealed = malloc(size + 1);
    MUST(sealed);
    memcpy(sealed, data, size);
    seal(sealed, size);
    MUST(!ftruncate(fd, (off_t)size) && pwrite(fd, sealed, size, 0) == (ssize_t)size);
    file_bytes = sealed;
    n_file_bytes = size;
    llama_model *model = NULL;
    if (llama_open(path, &model)) {
        const char *line = llama_error();
        MUST(!model && line[0] && !strchr(line, '\n'));
    } else {
        use_texts(model);
        use_tensors(model);
        use_network(model);
        llama_close(model);
    }
    free(sealed);
    return 0;
}

// ---- the mutator

static uint32_t draw(uint32_t *state, uint32_t below) {
    *state = *state * 1664525u + 1013904223u;
    return (uint32_t)((uint64_t)(*state >> 8) * below >> 24);
}

/* A number of the header, of a tensor record or of a meta entry becomes an edge, or nearly what it
 * was; everything stands at multiples of 4. */
static void change_number(uint8_t *data, size_t size, uint32_t *state) {
    static const uint64_t edges[] = {
        0, 1, 2, 3, 15, 16, 31, 32, 63, 64, 65, 255, 256, 4096, 65535, 65536, 65537, 1 << 24,
        (1 << 24) + 1, 0x7f800000, 0x7fc00000, 0xff800000, 0x80000000, 0x7fffffff, UINT32_MAX,
        1ull << 32, 1ull << 60, (1ull << 63) - 1, 1ull << 63, UINT64_MAX - 63, UINT64_MAX,
    };
    const uint64_t said = get(data + 16, 8);
    const size_t header = said >= 256 && said < size ? (size_t)said : size;
    const size_t width = draw(state, 2) ? 8 : 4;
    const size_t at = 16 + 4 * (size_t)draw(state, (uint32_t)((header - 16 - width) / 4 + 1));
    uint64_t value = get(data + at, width);
    switch (draw(state, 4)) {
    case 0: value += draw(state, 5) - 2u; break;
    case 1: value ^= 1ull << draw(state, (uint32_t)(8 * width)); break;
    case 2: value = get(data + 16 + 4 * (size_t)draw(state, 46), 4); break;
    default: value = edges[draw(state, sizeof edges / sizeof *edges)];
    }
    put(data + at, value, width);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned int seed) {
    uint32_t state = seed;
    if (size < 256 || draw(&state, 3) == 0) size = LLVMFuzzerMutate(data, size, most);
    else
        for (uint32_t i = 0, n = 1 + draw(&state, 3); i < n; i++) change_number(data, size, &state);
    if (size >= 256) {
        if (draw(&state, 64)) memcpy(data, "LlamaBin\1\0\0\0", 12);
        if (draw(&state, 16)) put(data + 24, size, 8);
    }
    return size;
}
