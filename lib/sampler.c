/* sampler.c: penalty, temperature, top-k, top-p, min-p, then one draw, in transformers' order.
 *
 * Candidates are kept as a heap with the likeliest on top, so that a filter costs as much as it
 * keeps, and a vocabulary of 128 thousand is never sorted. */
#include "sampler.h"
#include "error.h"
#include <math.h>
#include <stdlib.h>

struct candidate {
    float logit;
    int32_t id;
};

/* The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). */
static uint64_t mix(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

double sampler_random(uint64_t seed, uint64_t completion, uint64_t position) {
    return (double)(mix(mix(mix(seed) ^ completion) ^ position) >> 11) * 0x1p-53;
}

int sampling_check(const llama_sampling *s) {
    if (!(s->repetition_penalty > 0 && isfinite(s->repetition_penalty)))
        return fail("repetition_penalty is %g, expected above 0", (double)s->repetition_penalty);
    if (!(s->temperature >= 0 && isfinite(s->temperature)))
        return fail("temperature is %g, expected 0 or more", (double)s->temperature);
    if (s->top_k < 0) return fail("top_k is %d, expected 0 (off) or more", s->top_k);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return fail("top_p is %g, expected above 0, to 1", (double)s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return fail("min_p is %g, expected 0 to 1", (double)s->min_p);
    return 0;
}

/* Likelier first; of equals the smaller id. */
static int before(struct candidate a, struct candidate b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

static void sift_down(struct candidate *heap, size_t n, size_t i) {
    struct candidate moving = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(heap[child + 1], heap[child])) child++;
        if (!before(heap[child], moving)) break;
        heap[i] = heap[child];
    }
    heap[i] = moving;
}

/* All candidates; the likeliest `n - left` are taken off the heap and stand sorted behind it,
 * from the end: the i-th likeliest at c[n - 1 - i]. */
struct ranking {
    struct candidate *c;
    size_t n, left;
};

static struct candidate nth(struct ranking *r, size_t i) {
    while (r->n - r->left <= i) {
        struct candidate top = r->c[0];
        r->c[0] = r->c[--r->left];
        r->c[r->left] = top;
        if (r->left) sift_down(r->c, r->left, 0);
    }
    return r->c[r->n - 1 - i];
}

/* Penalises the logits of tokens seen, each once however often it was seen. */
static int penalise(struct candidate *c, size_t n, float penalty, const int32_t *seen,
                    size_t n_seen) {
    if (penalty == 1 || !n_seen) return 0;
    unsigned char *done = calloc(n, 1);
    if (!done) return fail("out of memory for sampling");
    for (size_t i = 0; i < n_seen; i++) {
        if (done[seen[i]]) continue;
        float *logit = &c[seen[i]].logit;
        *logit = *logit < 0 ? *logit * penalty : *logit / penalty;
        done[seen[i]] = 1;
    }
    free(done);
    return 0;
}

static double weight(struct candidate c) { return exp((double)c.logit); }

static int by_id(const void *a, const void *b) {
    int32_t x = ((const struct candidate *)a)->id, y = ((const struct candidate *)b)->id;
    return (x > y) - (x < y);
}

/* How many of the likeliest the filters leave: they are the last ones of the array, in rising id.
 * Logits are relative to the largest, so a weight is a share of the largest probability. */
static size_t filter(struct candidate *c, size_t n, const llama_sampling *s) {
    struct ranking r = {c, n, n};
    size_t most = n, kept = 0;
    double total = 0, sum = 0;
    if (!s->top_k && s->top_p == 1 && s->min_p == 0) return n; // as they came
    for (size_t i = n / 2; i-- > 0;) sift_down(c, n, i);
    if (s->top_k && (size_t)s->top_k < n) {
        most = (size_t)s->top_k;
        while (most < n && nth(&r, most).logit == nth(&r, most - 1).logit) most++;
        for (size_t i = 0; i < most; i++) total += weight(nth(&r, i));
    } else {
        for (size_t i = 0; i < n; i++) total += weight(c[i]);
    }
    if (s->top_p == 1 && s->min_p == 0) kept = most;
    for (; kept < most; kept++) {
        const double w = weight(nth(&r, kept));
        if (kept && (sum >= (double)s->top_p * total || w < (double)s->min_p)) break;
        sum += w;
    }
    qsort(c + n - kept, kept, sizeof *c, by_id);
    return kept;
}

/* The token at which the running sum of weights, in rising id, passes RANDOM of the total. */
static int32_t draw(const struct candidate *kept, size_t n, double random) {
    double total = 0, sum = 0;
    int32_t id = kept[0].id;
    for (size_t i = 0; i < n; i++) total += weight(kept[i]);
    for (size_t i = 0; i < n && sum <= random * total; i++) {
        const double w = weight(kept[i]);
        if (w > 0) id = kept[i].id;
        sum += w;
    }
    return id;
}

/* The largest logit's index, the first of equals; -1 with the reason if there is none. */
static int64_t largest(const struct candidate *c, size_t n) {
    float top = -INFINITY;
    int64_t best = -1;
    for (size_t i = 0; i < n; i++) {
        if (isnan(c[i].logit) || c[i].logit == INFINITY)
            return fail("the logit of token %zu is %g: the model's numbers broke down", i,
                        (double)c[i].logit);
        if (c[i].logit > top) top = c[i].logit, best = (int64_t)i;
    }
    return best < 0 ? fail("every logit is -infinity: nothing to choose") : best;
}

int sampler_pick(const float *logits, size_t vocab_size, const llama_sampling *s,
                 const int32_t *seen, size_t n_seen, uint64_t completion, uint64_t position,
                 int32_t *token) {
    struct candidate *c = malloc(vocab_size * sizeof *c);
    if (!c) return fail("out of memory for sampling from %zu logits", vocab_size);
    for (size_t i = 0; i < vocab_size; i++) c[i] = (struct candidate){logits[i], (int32_t)i};
    int rc = penalise(c, vocab_size, s->repetition_penalty, seen, n_seen);
    int64_t best = rc ? -1 : largest(c, vocab_size);
    if (best < 0) return free(c), -1;
    *token = (int32_t)best;
    if (s->temperature > 0) {
        const float top = c[best].logit;
        for (size_t i = 0; i < vocab_size; i++) c[i].logit = (c[i].logit - top) / s->temperature;
        const size_t kept = filter(c, vocab_size, s);
        *token = draw(c + vocab_size - kept, kept,
                      sampler_random(s->seed, completion, position));
    }
    free(c);
    return 0;
}
