/* sampler.c: any parameters and any logits give an error of one line, or a token that the
 * parameters allow.
 *
 * The input is a stream of choices: each field is usually a number within its range, else any. */
#include "must.h"
#include "sampler.h"
#include <math.h>
#include <string.h>

struct input { const uint8_t *data; size_t left; };

static uint64_t take(struct input *in, size_t bytes) {
    uint64_t value = 0;
    for (size_t i = 0; i < bytes && in->left; i++, in->left--) value = value << 8 | *in->data++;
    return value;
}

static float any(struct input *in) {
    static const float edges[] = {0, -0.0f, 1, -1, 2, -2, 0x1p-149f, 0x1p-126f, 0x1.fffffep127f,
                                  -0x1.fffffep127f, INFINITY, -INFINITY, NAN, 1e-8f, 0.5f, 100};
    const uint32_t how = (uint32_t)take(in, 1);
    if (how < 128) return (float)(int)(how - 64) / 8;
    if (how < 192) return edges[how % 16];
    const uint32_t bits = (uint32_t)take(in, 4);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* FIRST, or a number from LOW to HIGH, or any. */
static float field(struct input *in, float first, float low, float high) {
    const uint32_t how = (uint32_t)take(in, 1);
    if (how < 96) return first;
    return how < 224 ? low + (high - low) * (float)take(in, 1) / 255 : any(in);
}

enum { MOST = 40 };

struct trial {
    float logits[MOST], bias[4];
    int32_t ids[4], seen[8];
    size_t n, n_seen, n_said;
    double mu;
};

static llama_sampling params(struct input *in, struct trial *t) {
    for (size_t i = 0; i < 4; i++) {
        t->ids[i] = (int32_t)take(in, 1) % (MOST + 2) - 1;
        t->bias[i] = any(in);
    }
    return (llama_sampling){
        .bias_tokens = t->ids, .bias_values = t->bias, .n_bias = take(in, 1) % 5,
        .repetition_penalty = field(in, 1, 0.1f, 3), .presence_penalty = field(in, 0, -2, 2),
        .frequency_penalty = field(in, 0, -2, 2), .temperature = field(in, 1, 0, 2),
        .top_k = (int32_t)take(in, 1) - 1 - (take(in, 1) ? 0 : INT32_MAX),
        .top_p = field(in, 1, 0, 1), .min_p = field(in, 0, 0, 1),
        .typical_p = field(in, 1, 0, 1), .mirostat_tau = field(in, 0, 0, 8),
        .mirostat_eta = field(in, 0.1f, 0, 1), .mirostat_mu = take(in, 1) ? &t->mu : NULL,
        .seed = take(in, 8),
    };
}

/* TOKEN's logit, after bias and temperature, in which close ones may become equal, and how many are
 * larger; penalties left out. */
static void check(const struct trial *t, const llama_sampling *s, int32_t token) {
    MUST(token >= 0 && (size_t)token < t->n);
    float logits[MOST], top = -INFINITY;
    size_t larger = 0;
    memcpy(logits, t->logits, sizeof logits);
    for (size_t i = 0; i < s->n_bias; i++) logits[s->bias_tokens[i]] += s->bias_values[i];
    MUST(logits[token] > -INFINITY && logits[token] < INFINITY);
    if (s->repetition_penalty != 1 || s->presence_penalty != 0 || s->frequency_penalty != 0) return;
    for (size_t i = 0; i < t->n; i++) top = fmaxf(top, logits[i]);
    for (size_t i = 0; i < t->n && s->temperature > 0; i++)
        logits[i] = (logits[i] - top) / s->temperature;
    for (size_t i = 0; i < t->n; i++) larger += logits[i] > logits[token];
    if (s->temperature == 0) MUST(!larger);
    else if (s->mirostat_tau == 0 && s->top_k > 0) MUST(larger < (size_t)s->top_k);
}

static void check_logprobs(const struct trial *t) {
    int32_t ids[MOST];
    double logprob = 0, top[MOST], sum = 0;
    if (sampler_logprobs(t->logits, t->n, 0, &logprob, t->n, ids, top)) return;
    for (size_t i = 0; i < t->n; i++) {
        MUST(ids[i] >= 0 && (size_t)ids[i] < t->n && (!i || top[i] <= top[i - 1]));
        sum += exp(top[i]);
    }
    MUST(fabs(sum - 1) < 1e-6 && logprob <= 1e-9);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input in = {data, size};
    struct trial t = {.n = take(&in, 1) % (MOST + 1)};
    t.n_seen = take(&in, 1) % 9;
    t.n_said = take(&in, 1) % 10;
    t.mu = (double)any(&in);
    for (size_t i = 0; i < t.n_seen; i++) t.seen[i] = (int32_t)take(&in, 1) % (MOST + 2) - 1;
    const llama_sampling s = params(&in, &t);
    for (size_t i = 0; i < t.n; i++) t.logits[i] = any(&in);
    for (uint64_t place = 0; place < 3; place++) {
        int32_t token = -1;
        if (llama_sample_logits(t.logits, t.n, &s, t.seen, t.n_seen, t.n_said, take(&in, 1), place,
                                &token)) {
            MUST(*llama_error() && !strchr(llama_error(), '\n'));
            return 0;
        }
        check(&t, &s, token);
    }
    check_logprobs(&t);
    return 0;
}
