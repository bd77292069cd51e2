/* computed.c: what this build of the library computes, as bytes on standard output, for machines
 * that have no Python:
 *
 *     computed logits FILE ISA KV ACTIVATIONS TOKEN...    (tokens, vocab_size) f32: the last three
 *                                                         tokens run one at a time, those before
 *                                                         together; KV is a kind of llama.h
 *     computed blocks FILE KIND BYTES                     each matrix of FILE, encoded in KIND,
 *                                                         whose blocks have so many bytes */
#include "../lib/llama.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TOKENS = 256, SINGLY = 3 };

/* Rows [first, first + n) of sequence 0. */
static int run(llama_session *session, const int32_t *tokens, size_t first, size_t n,
               float *logits) {
    int32_t sequences[MOST_TOKENS] = {0}, positions[MOST_TOKENS];
    uint8_t want[MOST_TOKENS];
    for (size_t i = 0; i < n; i++) {
        positions[i] = (int32_t)(first + i);
        want[i] = 1;
    }
    const llama_batch batch = {.n = n, .tokens = tokens + first, .sequences = sequences,
                               .positions = positions, .want = want};
    return llama_forward(session, &batch, logits);
}

/* ARGS: ISA, KV, ACTIVATIONS and the N tokens. */
static int write_logits(llama_model *model, char **args, size_t n) {
    int32_t tokens[MOST_TOKENS];
    llama_session *session;
    llama_config config;
    const llama_session_options options = {.isa = args[0], .threads = 2, .kv_kind = atoi(args[1]),
                                           .activations = atoi(args[2])};
    for (size_t i = 0; i < n; i++) tokens[i] = atoi(args[3 + i]);
    if (llama_get_config(model, &config)) return -1;
    if (llama_session_open(model, &options, &session)) return -1;
    float *logits = malloc(n * config.vocab_size * sizeof *logits);
    int rc = logits ? run(session, tokens, 0, n - SINGLY, logits) : -1;
    for (size_t i = n - SINGLY; i < n && !rc; i++)
        rc = run(session, tokens, i, 1, logits + i * config.vocab_size);
    if (!rc) fwrite(logits, sizeof *logits, n * config.vocab_size, stdout);
    free(logits);
    llama_session_close(session);
    return rc;
}

static int write_blocks(const llama_model *model, uint32_t kind, size_t block_bytes) {
    llama_tensor t;
    llama_loss loss;
    for (size_t i = 0; i < llama_count_tensors(model); i++) {
        if (llama_get_tensor(model, i, &t)) return -1;
        const int rotated = kind == LLAMA_Q8R || kind == LLAMA_Q4R; // these take whole groups
        if (t.n_dims == 1 || (rotated && t.shape[1] % 32)) continue;
        const size_t bytes = (t.shape[0] + 15) / 16 * ((t.shape[1] + 31) / 32) * block_bytes;
        void *blocks = malloc(bytes);
        const int rc = blocks ? llama_quantize(model, i, 0, t.shape[0], kind, NULL, 2, blocks,
                                               bytes, &loss)
                              : -1;
        if (!rc) fwrite(blocks, 1, bytes, stdout);
        free(blocks);
        if (rc) return rc;
    }
    return 0;
}

int main(int argc, char **argv) {
    llama_model *model;
    const size_t n = argc > 6 ? (size_t)(argc - 6) : 0;
    const int logits = n > SINGLY && n <= MOST_TOKENS && strcmp(argv[1], "logits") == 0;
    if (!logits && (argc != 5 || strcmp(argv[1], "blocks") != 0)) {
        fprintf(stderr, "computed logits FILE ISA KV ACTIVATIONS TOKEN... | "
                        "computed blocks FILE KIND BYTES\n");
        return 1;
    }
    int rc = llama_open(argv[2], &model);
    if (!rc)
        rc = logits ? write_logits(model, argv + 3, n)
                    : write_blocks(model, (uint32_t)atoi(argv[3]), (size_t)atoi(argv[4]));
    if (rc) fprintf(stderr, "%s\n", llama_error());
    else llama_close(model);
    return rc != 0;
}
