/* sampler.c: bias, penalties, temperature, top-k, top-p, min-p, typical-p (or mirostat in place of
 * these four), then one draw, in transformers' order; and the logits as log-probabilities.
 *
 * Candidates are kept as a heap with the likeliest on top, so that a filter costs as much as it
 * keeps, and a vocabulary of 128 thousand is never sorted. */
#include "sampler.h"
#include "error.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

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

static int sampling_check(const llama_sampling *s) {
    if (s->n_bias && (!s->bias_tokens || !s->bias_values)) return fail("logit_bias is NULL");
    for (size_t i = 0; i < s->n_bias; i++)
        if (isnan(s->bias_values[i]) || s->bias_values[i] == INFINITY)
            return fail("logit_bias of token %d is %g, expected a number or -infinity",
                        s->bias_tokens[i], (double)s->bias_values[i]);
    if (!(s->repetition_penalty > 0 && isfinite(s->repetition_penalty)))
        return fail("repetition_penalty is %g, expected above 0", (double)s->repetition_penalty);
    if (!(fabsf(s->presence_penalty) <= 2))
        return fail("presence_penalty is %g, expected -2 to 2", (double)s->presence_penalty);
    if (!(fabsf(s->frequency_penalty) <= 2))
        return fail("frequency_penalty is %g, expected -2 to 2", (double)s->frequency_penalty);
    if (!(s->temperature >= 0 && isfinite(s->temperature)))
        return fail("temperature is %g, expected 0 or more", (double)s->temperature);
    if (s->top_k < 0) return fail("top_k is %d, expected 0 (off) or more", s->top_k);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return fail("top_p is %g, expected above 0, to 1", (double)s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return fail("min_p is %g, expected 0 to 1", (double)s->min_p);
    if (!(s->typical_p > 0 && s->typical_p <= 1))
        return fail("typical_p is %g, expected above 0, to 1", (double)s->typical_p);
    if (!(s->mirostat_tau >= 0 && isfinite(s->mirostat_tau)))
        return fail("mirostat_tau is %g, expected 0 (off) or more", (double)s->mirostat_tau);
    if (!(s->mirostat_eta >= 0 && isfinite(s->mirostat_eta)))
        return fail("mirostat_eta is %g, expected 0 or more", (double)s->mirostat_eta);
    if (s->mirostat_tau > 0 && (!s->mirostat_mu || !isfinite(*s->mirostat_mu)))
        return fail("mirostat_tau is %g and there is no finite mirostat_mu",
                    (double)s->mirostat_tau);
    return 0;
}

int sampler_check(size_t vocab_size, const llama_sampling *sampling, const int32_t *seen,
                  size_t n_seen, size_t n_said, const int32_t *token) {
    if (!sampling || !token || (n_seen && !seen)) return fail("llama_sample: an argument is NULL");
    if (vocab_size < 1 || vocab_size > 1 << 24)
        return fail("%zu logits, expected 1 to %d", vocab_size, 1 << 24);
    if (sampling_check(sampling)) return -1;
    if (n_said > n_seen) return fail("%zu tokens said, of %zu seen", n_said, n_seen);
    for (size_t i = 0; i < n_seen; i++)
        if (seen[i] < 0 || (size_t)seen[i] >= vocab_size)
            return fail("seen token id %d, expected 0 to %zu", seen[i], vocab_size - 1);
    for (size_t i = 0; i < sampling->n_bias; i++)
        if (sampling->bias_tokens[i] < 0 || (size_t)sampling->bias_tokens[i] >= vocab_size)
            return fail("logit_bias token id %d, expected 0 to %zu", sampling->bias_tokens[i],
                        vocab_size - 1);
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

/* repetition_penalty goes by whether a token was seen, the other two by how often it was said. */
static int penalise(struct candidate *c, size_t n, const llama_sampling *s, const int32_t *seen,
                    size_t n_seen, size_t n_said) {
    const int talks = s->presence_penalty != 0 || s->frequency_penalty != 0;
    if (!n_seen || (s->repetition_penalty == 1 && !talks)) return 0;
    unsigned char *done = calloc(n, 1);
    if (!done) return fail("out of memory for sampling");
    for (size_t i = 0; i < n_seen; i++) {
        float *logit = &c[seen[i]].logit;
        if (!done[seen[i]])
            *logit = *logit < 0 ? *logit * s->repetition_penalty : *logit / s->repetition_penalty;
        done[seen[i]] = 1;
    }
    for (size_t i = n_seen - n_said; talks && i < n_seen; i++) {
        float *logit = &c[seen[i]].logit;
        if (done[seen[i]] == 1) *logit -= s->presence_penalty;
        *logit -= s->frequency_penalty;
        done[seen[i]] = 2;
    }
    free(done);
    return 0;
}

static double weight(struct candidate c) { return exp((double)c.logit); }

/* Most tokens of a large vocabulary are faint: far below the likeliest. */
#define FAINT_LOGIT (-20.f)
#define FAINT 2.1e-9 // exp(FAINT_LOGIT) and a little

/* Moves the faint ones behind the others; how many others there are. */
static size_t faint_last(struct candidate *c, size_t n) {
    size_t likely = 0;
    for (size_t i = 0; i < n; i++)
        if (c[i].logit >= FAINT_LOGIT) {
            const struct candidate moving = c[i];
            c[i] = c[likely];
            c[likely++] = moving;
        }
    return likely;
}

/* What candidates weigh: within what the N_FAINT at FAINT can, who are weighed if it matters. */
struct mass {
    double least, most;
    const struct candidate *faint;
    size_t n_faint;
};

static double weigh(const struct candidate *c, size_t n) {
    double total = 0;
    for (size_t i = 0; i < n; i++) total += weight(c[i]);
    return total;
}

/* Whether SUM is SHARE of the mass or more. */
static int reaches(struct mass *m, double sum, double share) {
    if (sum >= share * m->least && sum < share * m->most)
        m->least = m->most = m->least + weigh(m->faint, m->n_faint);
    return sum >= share * m->most;
}

/* How many of the likeliest the filters leave: they stand up to c[*end]. Logits are relative to the
 * largest, so a weight is a share of the largest probability. */
static size_t filter(struct candidate *c, size_t n, const llama_sampling *s, size_t *end) {
    const double top_p = (double)s->top_p, min_p = (double)s->min_p;
    const size_t top_k = (size_t)s->top_k;
    *end = n;
    if (!top_k && top_p == 1 && min_p == 0) return n; // as they came
    size_t likely = faint_last(c, n);
    if (top_k ? likely <= top_k : min_p < FAINT && 1 - top_p <= (double)n * FAINT) likely = n;
    struct mass mass = {.faint = c + likely, .n_faint = n - likely};
    if (!top_k) mass.least = weigh(c, likely);

    struct ranking r = {c, likely, likely};
    size_t most = likely, kept = 0;
    double sum = 0;
    for (size_t i = likely / 2; i-- > 0;) sift_down(c, likely, i);
    if (top_k && top_k < likely) {
        most = top_k;
        while (most < likely && nth(&r, most).logit == nth(&r, most - 1).logit) most++;
    }
    if (top_k)
        for (size_t i = 0; i < most; i++) mass.least += weight(nth(&r, i));
    mass.most = mass.least + (top_k ? 0 : (double)mass.n_faint * FAINT);
    *end = likely;
    if (top_p == 1 && min_p == 0) return most;
    for (; kept < most; kept++) {
        const double w = weight(nth(&r, kept));
        if (kept && (reaches(&mass, sum, top_p) || w < min_p)) break;
        sum += w;
    }
    return kept;
}

/* typical_p: how many of the N kept remain; they move to the front. A token counts as typical as
 * its surprise, -ln p, is near the mean surprise, the entropy; ties with the last one stay. */
static int64_t typical(struct candidate *c, size_t n, double typical_p) {
    struct candidate *near = malloc(2 * n * sizeof *near);
    if (!near) return fail("out of memory for sampling");
    struct candidate *left = near + n;
    double total = weigh(c, n), mean = 0, sum = 0;
    for (size_t i = 0; i < n; i++)
        if (c[i].logit > -INFINITY) mean += weight(c[i]) / total * (double)c[i].logit;
    for (size_t i = 0; i < n; i++) // both surprises less ln(total)
        near[i] = (struct candidate){(float)-fabs(mean - (double)c[i].logit), (int32_t)i};
    struct ranking r = {near, n, n};
    size_t kept = 0;
    for (size_t i = n / 2; i-- > 0;) sift_down(near, n, i);
    for (; kept < n; kept++) {
        const struct candidate next = nth(&r, kept);
        if (sum >= typical_p * total && next.logit < nth(&r, kept - 1).logit) break;
        sum += weight(c[next.id]);
    }
    for (size_t i = 0; i < kept; i++) left[i] = c[nth(&r, i).id];
    memcpy(c, left, kept * sizeof *c);
    free(near);
    return (int64_t)kept;
}

static int by_id(const void *a, const void *b) {
    int32_t x = ((const struct candidate *)a)->id, y = ((const struct candidate *)b)->id;
    return (x > y) - (x < y);
}

/* The token at which the running sum of weights, in rising id, passes RANDOM of the total: its id,
 * or -1. */
static int64_t draw(struct candidate *kept, size_t n, double random, struct candidate *chosen) {
    double *sums = malloc(n * sizeof *sums), sum = 0;
    size_t in_order = 1, i = 0;
    if (!sums) return fail("out of memory for sampling");
    while (in_order < n && kept[in_order - 1].id < kept[in_order].id) in_order++;
    if (in_order < n) qsort(kept, n, sizeof *kept, by_id);
    for (size_t j = 0; j < n; j++) sums[j] = sum += weight(kept[j]);
    while (i + 1 < n && sums[i] <= random * sum) i++;
    while (i && sums[i] == sums[i - 1]) i--; // one that weighs nothing is never drawn
    *chosen = kept[i];
    free(sums);
    return chosen->id;
}

/* Mirostat 2: draws from the tokens of at most *mu bits of surprise, or from the likeliest where
 * none is, and moves mu by how far the chosen one's surprise is from tau. Surprise is that of the
 * whole distribution, as in the paper's equations, not of what was kept. */
static int64_t mirostat(struct candidate *c, size_t n, const llama_sampling *s, double random) {
    struct candidate chosen;
    double total = weigh(c, n);
    size_t kept = 0;
    const double bits = log2(total), most = fmax(*s->mirostat_mu, bits); // the likeliest's own
    for (size_t i = 0; i < n; i++)
        if (bits - (double)c[i].logit / M_LN2 <= most) c[kept++] = c[i];
    if (draw(c, kept, random, &chosen) < 0) return -1;
    const double surprise = bits - (double)chosen.logit / M_LN2;
    *s->mirostat_mu -= (double)s->mirostat_eta * (surprise - (double)s->mirostat_tau);
    return chosen.id;
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

static struct candidate *candidates(const float *logits, size_t n) {
    struct candidate *c = malloc(n * sizeof *c);
    if (!c) return fail("out of memory for sampling from %zu logits", n), NULL;
    for (size_t i = 0; i < n; i++) c[i] = (struct candidate){logits[i], (int32_t)i};
    return c;
}

int sampler_pick(const float *logits, size_t n, const llama_sampling *s, const int32_t *seen,
                 size_t n_seen, size_t n_said, double random, int32_t *token) {
    struct candidate *c = candidates(logits, n);
    if (!c) return -1;
    for (size_t i = 0; i < s->n_bias; i++) c[s->bias_tokens[i]].logit += s->bias_values[i];
    const int failed = penalise(c, n, s, seen, n_seen, n_said);
    const int64_t best = failed ? -1 : largest(c, n);
    if (best < 0) return free(c), -1;
    if (s->temperature > 0) {
        const float top = c[best].logit;
        for (size_t i = 0; i < n; i++) c[i].logit = (c[i].logit - top) / s->temperature;
    }
    int64_t chosen = best;
    if (s->mirostat_tau > 0 && s->temperature > 0) {
        chosen = mirostat(c, n, s, random);
    } else if (s->temperature > 0) {
        size_t end;
        int64_t kept = (int64_t)filter(c, n, s, &end);
        struct candidate *first = c + end - (size_t)kept, drawn;
        if (s->typical_p < 1) kept = typical(first, (size_t)kept, (double)s->typical_p);
        chosen = kept < 0 ? -1 : draw(first, (size_t)kept, random, &drawn);
    }
    free(c);
    if (chosen < 0) return -1;
    *token = (int32_t)chosen;
    return 0;
}

int sampler_logprobs(const float *logits, size_t vocab_size, int32_t token, double *logprob,
                     size_t n, int32_t *ids, double *top) {
    struct candidate *c = candidates(logits, vocab_size);
    const int64_t best = c ? largest(c, vocab_size) : -1;
    if (best < 0) return free(c), -1;
    double total = 0;
    const double most = (double)logits[best];
    for (size_t i = 0; i < vocab_size; i++) total += exp((double)logits[i] - most);
    const double whole = log(total); // less most: their sum would lose it beside huge logits
    struct ranking r = {c, vocab_size, vocab_size};
    *logprob = (double)logits[token] - most - whole;
    for (size_t i = vocab_size / 2; n && i-- > 0;) sift_down(c, vocab_size, i);
    for (size_t i = 0; i < n; i++) {
        const struct candidate next = nth(&r, i);
        ids[i] = next.id;
        top[i] = (double)next.logit - most - whole;
    }
    free(c);
    return 0;
}
