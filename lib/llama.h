/* llama.h: the whole public face of the library, and its manual.
 *
 * A model is an open .bin file (docs/format.md): read-only, mapped into memory, shared by any
 * number of sessions, which have its weights on a GPU once. A session is a device, a KV cache and
 * the scratch memory of one forward pass. Text never enters here: tokens go in, logits or tokens
 * come out.
 *
 * Errors: a function that returns int returns 0, or -1 with the reason in llama_error(). An
 * argument that is NULL or out of range is an error and never a crash; using a handle after its
 * close is the caller's bug. The library never prints, never exits and reads no environment
 * variable.
 * Threads: a model may be used by many threads at once. A session holds one lock for the length
 * of each call, so threads that share it take turns; the caller sees to it that llama_close and
 * llama_session_close come last. A call takes up to 256 KiB of its thread's stack. A forked child
 * may use the models it inherits; the sessions stay its parent's, so that any call with one is an
 * error and its close does nothing. One thing is global: the first llama_open sets a handler for
 * SIGBUS, which hands on what does not concern a model's file.
 * Memory: what a function hands out belongs to the library and lives as long as its model or
 * session; the caller owns the buffers it passes in.
 *
 * cffi reads this file too: llama/_lib.py drops the lines that start with '#' and hands on the
 * rest, so between here and the end stand only prototypes, structs and integer constants. */
#ifndef LLAMA_H
#define LLAMA_H
#include <stddef.h>
#include <stdint.h>
#pragma GCC visibility push(default)

typedef struct llama_model llama_model;
typedef struct llama_session llama_session;

/* How a matrix's weights are stored; the numbers stand in files. quant.h draws each layout. */
enum {
    LLAMA_F32 = 0,  // 32 bits a weight
    LLAMA_F16 = 1,  // 16
    LLAMA_BF16 = 2, // 16
    LLAMA_Q8 = 3,   // 8.5: int8 codes, one f16 scale for 32 columns of a row
    LLAMA_Q4 = 5,   // 4.5: 4-bit codes of uneven levels, a scale and a shift for 32 columns
    LLAMA_Q8R = 6,  // q8 and q4 of weights whose groups of 32 columns are rotated, so that inputs
    LLAMA_Q4R = 7,  // rotated likewise meet them, whose codes lose less; whole groups only
    LLAMA_Q4E = 8   // q4 of even levels, for weights that stood on such before
};

enum {
    LLAMA_ROPE_PLAIN = 0,
    LLAMA_ROPE_LINEAR = 1,
    LLAMA_ROPE_LLAMA3 = 2,
    LLAMA_ROPE_YARN = 3,
    LLAMA_ROPE_DYNAMIC = 4
};
enum {
    LLAMA_TOKENIZER_NONE = 0,
    LLAMA_TOKENIZER_SENTENCEPIECE = 1, // a SentencePiece ModelProto
    LLAMA_TOKENIZER_JSON = 2,          // a Hugging Face tokenizer.json
    LLAMA_TOKENIZER_TIKTOKEN = 3       // Meta's Llama 3 file: "base64 rank" lines
};
enum { LLAMA_META_INT = 1, LLAMA_META_FLOAT = 2, LLAMA_META_TEXT = 3, LLAMA_META_BYTES = 4 };
/* What a network's last matrix makes of a token's final hidden state. */
enum {
    LLAMA_HEAD_LM = 0,       // a logit for each token of the vocabulary
    LLAMA_HEAD_NONE = 1,     // there is none: the hidden state itself
    LLAMA_HEAD_SEQUENCE = 2, // a logit for each label of the text; one: its reward
    LLAMA_HEAD_ANSWER = 3,   // two logits: an answer starts here, ends here
    LLAMA_HEAD_TOKEN = 4     // a logit for each label of the token
};
enum { LLAMA_MAX_EOS = 8, LLAMA_MAX_SEQUENCES = 256 };

typedef struct {
    uint32_t vocab_size, dim, hidden_dim, head_dim, n_layers, n_heads, n_kv_heads, max_seq_len;
    float norm_eps, rope_theta;
    uint32_t rope_scaling;  // LLAMA_ROPE_*
    float rope_numbers[8];  // their meaning by kind: docs/format.md
    uint32_t tied;          // 1: the output matrix is the embedding matrix
    uint32_t attention_bias; // 1: wq, wk, wv and wo have biases
    uint32_t mlp_bias;      // 1: w1, w2 and w3 have
    uint32_t head;          // LLAMA_HEAD_*
    uint32_t n_outputs;     // that it gives for a token: vocab_size, dim, or labels
    uint32_t output_bias;   // 1: a head of labels has a bias
    int32_t bos_id;         // -1: none
    uint32_t n_eos;
    int32_t eos_ids[8];
    uint32_t kind;          // LLAMA_F32...: the kind that holds most of the weights
    uint64_t file_bytes, weight_bytes; // the whole file; the tensor data, padding included
} llama_config;

typedef struct {
    const char *name;     // "layers.0.attention.wq.weight"
    uint32_t kind;        // LLAMA_F32...
    uint32_t n_dims;      // 1: a vector; 2: a matrix
    uint64_t shape[2];    // (rows, columns); a vector has shape[1] = 1
    uint64_t bytes;       // as stored, padding included
    uint32_t crc32;       // as recorded in the file
} llama_tensor;

typedef struct {
    const char *key;
    uint32_t type;        // LLAMA_META_*; any other is of a later version, to be skipped
    int64_t integer;      // LLAMA_META_INT
    double number;        // LLAMA_META_FLOAT
    const uint8_t *bytes; // the value as stored; LLAMA_META_TEXT: UTF-8, no terminator
    uint64_t n_bytes;
} llama_meta;

/* The reason for this thread's last failure, one line if the names given to the library are;
 * "" before the first. */
const char *llama_error(void);

/* Opens PATH and checks its header and directory; tensor data is mapped, not read. The file must
 * not be written to while it is open: replace it by a new one under its name. Where it was cut
 * short, or cannot be read any more, every call that has read it or looks at it fails from then
 * on; what llama_get_... handed out may be zeros.
 * llama_close gives the model back once its last session is closed; NULL is allowed. */
int llama_open(const char *path, llama_model **model);
void llama_close(llama_model *model);

int llama_get_config(const llama_model *model, llama_config *config);
/* Tensors and meta entries are numbered from 0, in the file's order. */
size_t llama_count_tensors(const llama_model *model);
size_t llama_count_meta(const llama_model *model);
int llama_get_tensor(const llama_model *model, size_t index, llama_tensor *tensor);
int llama_get_meta(const llama_model *model, size_t index, llama_meta *meta);
/* The tokenizer's own file, byte for byte; returns LLAMA_TOKENIZER_*, or -1. */
int llama_get_tokenizer(const llama_model *model, const uint8_t **bytes, size_t *n_bytes);

/* Everything in the file before the tensor data, byte for byte. Each tensor's checksum stands in
 * it, so a hash of it tells one model from another. */
int llama_get_header(const llama_model *model, const uint8_t **bytes, size_t *n_bytes);

/* Reads a tensor's data and compares its checksum with the recorded one. */
int llama_verify(const llama_model *model, size_t tensor);
/* Writes rows [first, first + n) of a tensor as float32: out (n, columns). */
int llama_read_rows(const llama_model *model, size_t tensor, size_t first, size_t n, float *out);

/* What storing weights in another kind lost. Sums over the true weights, padding left out. */
typedef struct {
    double sum_squares;       // of the weights before
    double sum_squared_error; // of (after - before)
    double max_error;         // largest |after - before|
} llama_loss;

/* Encodes rows [first, first + n) of a matrix in another kind, as they will stand in a file.
 * FIRST is a multiple of 16, and so is N unless it ends at the last row. OUT has an even address,
 * and OUT_BYTES is exactly what those rows take. THREADS as for a session; neither the bytes nor
 * the loss depend on it.
 * FACTOR (columns, columns), which llama_factor_moments made of what the matrix is multiplied
 * with, or NULL: in 4-bit kinds each column then makes up for the errors of those before it; other
 * kinds do not look at it. Each weight's own error grows by that, and that of the products shrinks.
 * A weight that is not finite, or too large for the kind, is an error that names its place. */
int llama_quantize(const llama_model *model, size_t tensor, size_t first, size_t n, uint32_t kind,
                   const float *factor, int threads, void *out, size_t out_bytes,
                   llama_loss *loss);

/* y (n_x, n): rows [first, first + n) of a matrix times the inputs x (n_x, columns), in f32
 * whatever the kind. BLOCKS: those rows as llama_quantize gave them in KIND, BLOCK_BYTES of them,
 * in their place; NULL: the model's own. The same for any number of threads. */
int llama_multiply(const llama_model *model, size_t tensor, size_t first, size_t n, uint32_t kind,
                   const void *blocks, size_t block_bytes, const float *x, size_t n_x, int threads,
                   float *y);

/* MOMENTS += X^T X for N inputs x (n, columns) of a matrix; with ROTATED not 0, as rotated kinds
 * meet them. Of MOMENTS (columns, columns), which begin as zeros, only the lower triangle is
 * written or read, here and below. The sums are the same for any number of threads. */
int llama_add_moments(const float *x, size_t n, size_t columns, int rotated, int threads,
                      float *moments);
/* Factors H, the moments with DAMPING (0 to 1) times their mean diagonal added to the diagonal:
 * H = F^T D F, F lower triangular with ones on its diagonal, where D takes their place. With E
 * the errors of a row, F's row i says what those before column i ask of it, and D how much its own
 * rounding counts: E H E^T is the sum of D times its squares (arXiv:2307.13304, section 4.1). */
int llama_factor_moments(float *moments, size_t columns, double damping, int threads);

typedef struct {
    const char *device;   // NULL or "cpu"; "cuda", the first GPU
    const char *isa;      // CPU kernels: NULL the best this CPU has; or one of llama_isa_name
    int threads;          // 0: one for each core this process may use
    int kv_kind;          // LLAMA_F32; LLAMA_F16, which holds keys and values up to 65,504; or
                          // LLAMA_Q8: int8 codes, an f32 scale for each position, head and layer;
                          // -1: f32 for an f32 file, f16 otherwise
    int activations;      // bits of what meets quantised weights, but for the head's, which is 16:
                          // 8, or 16, which is twice the products; 0: 8 if they are rotated, 16 if
                          // not. A GPU has its own: 22 for up to 4 rows at once, 11 for more
    uint32_t max_seq_len; // the longest sequence this session takes; 0: the model's own. More
                          // than that, up to 2^24, is allowed: it was not trained for it
    uint32_t host_layers; // with "cuda": so many of the first layers, and the embedding, stay on
                          // the CPU, which ISA, THREADS and ACTIVATIONS are then of; 0: none
    /* Told while weights go to a GPU, from the thread that opens the session, what is done of how
     * many bytes, at the end all; not where another session of the model has brought them. If it
     * returns anything but 0 the session is not opened. NULL: nobody is told. */
    int (*progress)(void *context, uint64_t done, uint64_t total);
    void *context;        // what it is given
} llama_session_options;

typedef struct {
    const char *device;      // "cpu"
    const char *isa;         // "avx512vnni"; of a GPU "NVIDIA H200, sm_90"; of both, both
    int threads, activations; // of a GPU its processors, and 16
    uint32_t kv_kind, max_seq_len, page_positions;
    uint32_t host_layers;    // that the CPU runs for the GPU; 0 on "cpu"
    uint64_t kv_bytes;       // held by KV pages now, free ones included
    uint64_t scratch_bytes;  // room for one forward pass and for the logits it keeps
    uint64_t gpu_scratch_bytes; // of these, a GPU's
    uint64_t kv_bytes_per_position;
} llama_session_info;

/* The I-th of the kernel sets that this build and this CPU can run, best first; NULL past the
 * last. "scalar" is always there. */
const char *llama_isa_name(size_t i);

/* The session holds on to its model. llama_session_close: NULL is allowed. */
int llama_session_open(llama_model *model, const llama_session_options *options,
                       llama_session **session);
void llama_session_close(llama_session *session);
int llama_get_session_info(llama_session *session, llama_session_info *info);

/* One flat list of tokens serves prompts, single steps, batches and verification.
 * Row i computes token tokens[i] of sequence sequences[i] at positions[i], and attends to that
 * sequence's positions 0..positions[i]. Within a sequence positions go up by one and start at
 * its length, so that no position is ever written twice: llama_trim first to go back.
 * A row with want[i] != 0 yields the head's n_outputs numbers, "logits" for short; want NULL asks
 * for none. On the CPU each row's logits are the same to the last bit alone or in any batch, for
 * any split of a prompt into calls, and for any number of threads; on a GPU within rounding, for
 * few rows and many are computed in other ways.
 *
 * Under LLAMA_ROPE_DYNAMIC the rotary base depends on how long the text is: row i has that of
 * max(rope_lengths[i], positions[i] + 1) tokens. Rows of a prompt are given the whole prompt's
 * length, in whichever call they come; rows that follow it may have the same number or 0. Stored
 * keys stay as they were turned, so a prefix that was computed for one length is not that of a
 * prompt of another (llama_trim, llama_fork), unless neither is longer than the model's original
 * length. Other models do not look at rope_lengths.
 *
 * What the network thinks on the way is to be had too: with HIDDEN the rows that want logits yield
 * instead the final hidden state, after the last norm, that the head would read. STREAM takes
 * those rows' residual stream after the embedding and after each layer. */
typedef struct {
    size_t n;
    const int32_t *tokens;    // (n), 0 <= token < vocab_size
    const int32_t *sequences; // (n), 0 <= sequence < LLAMA_MAX_SEQUENCES
    const int32_t *positions; // (n)
    const uint8_t *want;      // (n) or NULL
    const int32_t *rope_lengths; // (n) 0 to the session's max_seq_len; NULL: all 0
    uint32_t hidden;          // 1: hidden states, of dim numbers, in the logits' place
    float *stream;            // (n_layers + 1, rows that want logits, dim), or NULL
} llama_batch;

/* Runs the batch. LOGITS (rows that want them, n_outputs or dim) takes them in row order; if it is
 * NULL the session keeps a language model's for llama_sample until its next llama_forward.
 * Numbers in LOGITS that are not finite are a failure, which names the layer where they began.
 * On failure the sequences are as they were before the call. */
int llama_forward(llama_session *session, const llama_batch *batch, float *logits);

/* Sequences start empty. */
int llama_length(llama_session *session, int32_t sequence, uint32_t *length);
/* Forgets positions from LENGTH on; LENGTH 0 gives all its pages back. */
int llama_trim(llama_session *session, int32_t sequence, uint32_t length);
/* Makes TO a copy of the first LENGTH positions of FROM, sharing pages; TO must differ. */
int llama_fork(llama_session *session, int32_t from, int32_t to, uint32_t length);

/* Drops positions [first, first + count) and moves those that follow COUNT positions down, their
 * keys turned back by as much, so that positions go on without a gap (arXiv:2309.17453). What
 * stays still holds what it learned from the dropped tokens: it is no fresh run of its own. With
 * an f16 or q8 cache each slide rounds the moved keys once more. Sequences that share pages with
 * this one are not touched. Not under LLAMA_ROPE_DYNAMIC in a session longer than the model's
 * original length: keys there were turned by bases of their own. A failure changes nothing. */
int llama_slide(llama_session *session, int32_t sequence, uint32_t first, uint32_t count);

/* The keys and values of positions [first, first + n), in a layout that no device has for its
 * own: (n, n_layers, 2, n_kv_heads, head_dim) numbers of the session's KV kind, a layer's keys,
 * as they were stored (turned by their position), before its values; in q8 a head's codes, of
 * Hadamard-turned keys, and behind them their scale, f32. N_BYTES is exactly
 * n * kv_bytes_per_position. llama_write_kv adds them at FIRST, the sequence's length: the
 * sequence is then as if it had computed those tokens. */
int llama_read_kv(llama_session *session, int32_t sequence, uint32_t first, uint32_t n, void *kv,
                  size_t n_bytes);
int llama_write_kv(llama_session *session, int32_t sequence, uint32_t first, uint32_t n,
                   const void *kv, size_t n_bytes);

/* What calibration does: one layer at a time, in stages between which the matrices that are next
 * can be encoded, from their inputs, and take the place of the model's. */
enum {
    LLAMA_STAGE_QKV = 0,    // the input of wq, wk and wv (n, dim)
    LLAMA_STAGE_OUTPUT = 1, // of wo, by those three (n, n_heads * head_dim)
    LLAMA_STAGE_GATE_UP = 2, // of w1 and w3 (n, dim); first wo's input becomes part of the stream
    LLAMA_STAGE_DOWN = 3,   // of w2, by those two (n, hidden_dim)
    LLAMA_STAGE_END = 4,    // nothing; w2's input becomes part of the stream
    LLAMA_STAGE_HEAD = 5    // of the output matrix, after the last layer (n, dim)
};
enum { LLAMA_LAYER_MATRICES = 7 };
typedef struct {
    uint32_t layer, stage;
    size_t n;               // positions 0 to n - 1 of one text
    float *stream;          // (n, dim) what the layer adds to: an embedding at first
    const float *given;     // GATE_UP and END: the inputs that the stage before them gave
    float *inputs;          // what the stage gives
    uint32_t kinds[7];      // of wq, wk, wv, wo, w1, w3, w2 as they are encoded in
    const void *blocks[7];  // these, at multiples of 64 bytes; NULL: the model's own
} llama_stage;

/* Runs one stage. Sequence 0 must be empty and is left so. */
int llama_run_stage(llama_session *session, const llama_stage *stage);

/* How logits become a token, applied in the order of the fields: transformers' order, with the
 * two penalties that it lacks next to the one it has. */
typedef struct {
    const int32_t *bias_tokens; // (n_bias) logit_bias: ids, and what is added to their logits;
    const float *bias_values;   // (n_bias) -infinity bans a token
    size_t n_bias;
    float repetition_penalty; // > 0; 1: off. Divides positive logits of tokens already seen,
                              // multiplies negative ones (arXiv:1909.05858, section 4.1)
    float presence_penalty;   // [-2, 2]: taken once from each token that the completion holds,
    float frequency_penalty;  // [-2, 2]: and this for each time that it holds it (OpenAI); 0: off
    float temperature;        // >= 0; 0: take the largest logit, the first of equals
    int32_t top_k;            // keep the K largest, ties with the K-th included; 0: off
    float top_p;              // (0, 1]: keep the fewest whose probabilities reach P; 1: off
    float min_p;              // [0, 1]: keep those of at least P times the largest; 0: off
    float typical_p;          // (0, 1]: keep those whose surprise is nearest the entropy, till
                              // their probabilities reach P (arXiv:2202.00666); 1: off
    float mirostat_tau;       // >= 0; above 0: instead of the four filters before, keep tokens of
                              // at most *mirostat_mu bits of surprise (arXiv:2007.14966, its
                              // second version) and then move it, so that the mean comes to TAU
    float mirostat_eta;       // >= 0: how far: mu -= eta * (surprise of the chosen - tau)
    double *mirostat_mu;      // the caller's, one for each completion; begins at 2 * TAU
    uint64_t seed;
} llama_sampling;

/* Chooses a token from row ROW (counting rows that wanted logits) of the last llama_forward, or
 * from LOGITS (vocab_size, 1 to 2^24). SEEN are the tokens so far, for the penalties: the last
 * N_SAID of them the completion's own, each as often as it was said; NULL, 0, 0 is allowed. The
 * random number depends only on (seed, completion, position). Logits that are not finite where it
 * matters (NaN, +infinity, or all -infinity) are an error; of a session's it names the layer where
 * they began. */
int llama_sample(llama_session *session, size_t row, const llama_sampling *sampling,
                 const int32_t *seen, size_t n_seen, size_t n_said, uint64_t completion,
                 uint64_t position, int32_t *token);
int llama_sample_logits(const float *logits, size_t vocab_size, const llama_sampling *sampling,
                        const int32_t *seen, size_t n_seen, size_t n_said, uint64_t completion,
                        uint64_t position, int32_t *token);

/* Log-probabilities (natural) that the model itself gives in row ROW of the last llama_forward,
 * before any of llama_sampling: TOKEN's in LOGPROB, and the N likeliest tokens, likeliest first,
 * of equals the smaller id, in IDS (n) and TOP (n); NULL where N is 0. */
int llama_logprobs(llama_session *session, size_t row, int32_t token, double *logprob, size_t n,
                   int32_t *ids, double *top);

/* Reads a buffer of BYTES (0: 256 MiB, larger than caches) with THREADS threads, as for a session,
 * a few times, and gives the best rate in bytes a second: the limit that decoding is measured
 * against. */
int llama_measure_bandwidth(int threads, size_t bytes, double *bytes_per_second);
/* The multiply-adds a second that THREADS threads reach with the best instruction that the kernels
 * ISA (NULL: the best) can use, on registers alone: of f32 numbers, and of int8 numbers into int32
 * sums. Prompts are measured against these. */
int llama_measure_peaks(int threads, const char *isa, double *f32, double *int8);

#pragma GCC visibility pop
#endif
