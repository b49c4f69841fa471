/* gumbel_sample: rows [begin, end). gumbel_uniform: the uniforms behind it. Strides in elements.
 * Per row: maxima of blocks of 256 logits; the block of the largest logit first, whose best score bounds what the noise of
 * any other token must reach: one comparison of its Philox word. Logarithms only for the words above that bound.
 * Scores are (logit - largest) / T + noise in double. */
#include "fairlead.h"

#define BLOCK 256
#define LANES (BLOCK / 4)
#define SEED_DOMAIN 0x464C5331u /* as stream.py has it */
#define LARGEST_NOISE 16.7      /* above -ln(-ln u) of the largest 24-bit word, 16.64 */
#define BAD_ROW (-2)
#define NO_MEMORY (-3)

typedef struct {
    const char *data;
    int64_t stride, vocabulary;
    int32_t dtype;
} Row;

FL_INLINE float at(const Row *row, int64_t column) {
    if (row->dtype == FL_F32) return ((const float *)row->data)[column * row->stride];
    const uint16_t bits = ((const uint16_t *)row->data)[column * row->stride];
    return row->dtype == FL_F16 ? fl_load_f16(bits) : fl_load_bf16(bits);
}

/* The vector loops are functions of their own: inside the long ones below the compiler leaves them scalar. */
FL_CLONES FL_NOINLINE void widen_f16(const uint16_t *from, int64_t count, float *to) {
    FL_SIMD
    for (int64_t i = 0; i < count; ++i) to[i] = fl_load_f16(from[i]);
}

FL_CLONES FL_NOINLINE void widen_bf16(const uint16_t *from, int64_t count, float *to) {
    FL_SIMD
    for (int64_t i = 0; i < count; ++i) to[i] = fl_load_bf16(from[i]);
}

/* The largest of a block; 1 when it holds NaN or +inf. */
FL_CLONES FL_NOINLINE int32_t maximum(const float *values, int64_t count, float *largest) {
    float most = -INFINITY, odd = 0.0f;
    _Pragma("omp simd reduction(max : most) reduction(+ : odd)")
    for (int64_t i = 0; i < count; ++i) {
        const float value = values[i];
        most = value > most ? value : most;
        odd += value < INFINITY ? 0.0f : 1.0f; /* a sum, for a reduction by "or" is not vectorised */
    }
    *largest = most;
    return odd > 0.0f;
}

FL_CLONES FL_NOINLINE float exp_sum(const float *values, int64_t count, float top, float scale, float least) {
    float sum = 0.0f;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t i = 0; i < count; ++i) {
        const float value = values[i], term = fl_expf((value - top) * scale);
        sum += value >= least ? term : 0.0f;
    }
    return sum;
}

/* A block as floats: in place where it is one already, else widened into `buffer`. */
FL_INLINE const float *block_of(const Row *row, int64_t block, float *buffer, int64_t *count) {
    const int64_t first = block * BLOCK, left = row->vocabulary - first, size = left < BLOCK ? left : BLOCK;
    *count = size;
    if (row->stride == 1) {
        if (row->dtype == FL_F32) return (const float *)row->data + first;
        if (row->dtype == FL_F16) widen_f16((const uint16_t *)row->data + first, size, buffer);
        else widen_bf16((const uint16_t *)row->data + first, size, buffer);
    } else {
        for (int64_t i = 0; i < size; ++i) buffer[i] = at(row, first + i);
    }
    return buffer;
}

/* ---- noise ---- */

/* -ln(-ln u) of a word, in double from the float32 u that the definition asks for. */
FL_INLINE double noise_of(uint32_t word) {
    const float u = (float)((double)((word >> 8) + 1) / 16777217.0);
    return -log(-log((double)u));
}

/* The largest 24-bit word that cannot lift a token over `needed` noise, minus slack for rounding; -1 when any can. */
FL_INLINE int64_t bound_of(double needed) {
    if (needed < -3.5) return -1; /* exp(-exp(3.5)) is below one word */
    return (int64_t)(exp(-exp(-needed)) * 16777217.0) - 4;
}

FL_INLINE void noise_state(uint32_t state[4], uint64_t seed, uint64_t position) {
    state[0] = SEED_DOMAIN, state[1] = (uint32_t)position, state[2] = (uint32_t)(position >> 32), state[3] = 0;
    fl_philox(state, (uint32_t)seed, (uint32_t)(seed >> 32));
}

/* ---- truncation ---- */

/* Hoare's partition of values[low, high] around its middle element, larger ones first: [low, *j] >= pivot,
 * (*j, *i) == pivot, [*i, high] <= pivot. */
FL_INLINE float partition(float *values, int64_t low, int64_t high, int64_t *left, int64_t *right) {
    const float pivot = values[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
        while (values[i] > pivot) ++i;
        while (values[j] < pivot) --j;
        if (i <= j) {
            const float swap = values[i];
            values[i++] = values[j];
            values[j--] = swap;
        }
    }
    *left = j;
    *right = i;
    return pivot;
}

/* The k-th largest of values[0, count), which are reordered. */
static float kth_largest(float *values, int64_t count, int64_t k) {
    int64_t low = 0, high = count - 1, i, j;
    while (low < high) {
        partition(values, low, high, &j, &i);
        if (k - 1 <= j) high = j;
        else if (k - 1 >= i) low = i;
        else break;
    }
    return values[k - 1];
}

FL_INLINE double mass_of(const float *values, int64_t from, int64_t to, float top, double inverse) {
    double mass = 0.0;
    for (int64_t t = from; t < to; ++t) mass += exp(((double)values[t] - top) * inverse);
    return mass;
}

/* The smallest member of the smallest set of largest values whose exp((v - top) / T) sums to at least `mass`; the smallest
 * of all when that is not reached. Quickselect by mass; values are reordered. */
static float mass_cutoff(float *values, int64_t count, float top, double inverse, double mass) {
    int64_t low = 0, high = count - 1, i, j;
    double before = 0.0; /* mass of what lies left of `low` */
    while (low < high) {
        const float pivot = partition(values, low, high, &j, &i);
        const double upper = before + mass_of(values, low, j + 1, top, inverse);
        if (upper >= mass) {
            high = j;
            continue;
        }
        const double middle = upper + mass_of(values, j + 1, i, top, inverse);
        if (middle >= mass) return pivot;
        if (i > high) break;
        before = middle;
        low = i;
    }
    return values[low < count ? low : count - 1];
}

/* exp of x in [-700, 0] in double, for vector loops: relative error below 1e-15. */
FL_INLINE double exp_double(double x) {
    const double shifted = x * 1.4426950408889634 + 6755399441055744.0, power = shifted - 6755399441055744.0;
    const double r = (x - power * 6.93147180369123816490e-1) - power * 1.90821492927058770002e-10;
    double sum = 1.6059043836821613e-10;
    sum = sum * r + 2.0876756987868099e-09;
    sum = sum * r + 2.5052108385441719e-08;
    sum = sum * r + 2.7557319223985891e-07;
    sum = sum * r + 2.7557319223985893e-06;
    sum = sum * r + 2.4801587301587302e-05;
    sum = sum * r + 1.9841269841269841e-04;
    sum = sum * r + 1.3888888888888889e-03;
    sum = sum * r + 8.3333333333333332e-03;
    sum = sum * r + 4.1666666666666664e-02;
    sum = sum * r + 1.6666666666666666e-01;
    sum = sum * r + 0.5;
    sum = sum * r + 1.0;
    sum = sum * r + 1.0;
    int64_t bits;
    memcpy(&bits, &shifted, 8); /* the low bits of `shifted` are `power` as an integer */
    bits = (int64_t)(((uint64_t)bits + 1023) << 52);
    double scale;
    memcpy(&scale, &bits, 8);
    return sum * scale;
}

/* Bins of 1/64 in (top - v) / T up to 32; the last one takes what lies further. They rise where v falls. */
#define BINS 2049
FL_INLINE int32_t bin_of(float value, float top, double inverse) {
    const double depth = ((double)top - value) * inverse * 64.0;
    return (int32_t)(depth < BINS - 1 ? depth : BINS - 1);
}

FL_CLONES FL_NOINLINE void masses(const float *values, int64_t count, float top, double inverse, double *mass, int32_t *bin) {
    FL_SIMD
    for (int64_t i = 0; i < count; ++i) {
        const double x = ((double)values[i] - top) * inverse;
        mass[i] = x > -700.0 ? exp_double(x > -700.0 ? x : -700.0) : 0.0;
        bin[i] = bin_of(values[i], top, inverse);
    }
}

/* Top-p over the whole row: a histogram of the mass by logit finds the bin of the cut, a selection within it the logit.
 * `scratch` holds the vocabulary. Blocks 45 T below the top have less than 1e-14 of the mass and are left out. */
static float nucleus_cutoff(const Row *row, const float *maxima, int64_t blocks, float top, double inverse, double top_p,
                            float *scratch) {
    double lanes[4][BINS], mass[BLOCK], total = 0.0;
    int32_t bin[BLOCK];
    float buffer[BLOCK];
    int64_t count;
    memset(lanes, 0, sizeof lanes); /* four, so that neighbours of one bin do not wait for each other */
    for (int64_t b = 0; b < blocks; ++b) {
        if (((double)top - maxima[b]) * inverse > 45.0) continue;
        const float *values = block_of(row, b, buffer, &count);
        masses(values, count, top, inverse, mass, bin);
        for (int64_t i = 0; i < count; ++i) lanes[i & 3][bin[i]] += mass[i];
    }
    for (int32_t n = 0; n < BINS; ++n) total += lanes[0][n] += lanes[1][n] + lanes[2][n] + lanes[3][n];
    double before = 0.0;
    int32_t cut = 0;
    while (cut < BINS - 1 && before + lanes[0][cut] < top_p * total) before += lanes[0][cut++];
    int64_t found = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        if (((double)top - maxima[b]) * inverse > 45.0 || bin_of(maxima[b], top, inverse) > cut) continue;
        const float *values = block_of(row, b, buffer, &count);
        for (int64_t i = 0; i < count; ++i) {
            scratch[found] = values[i];
            found += bin_of(values[i], top, inverse) == cut && values[i] > -INFINITY;
        }
    }
    return mass_cutoff(scratch, found, top, inverse, top_p * total - before);
}

/* Top-k candidates into `scratch`: all logits that are at least the k-th largest block maximum, which the k-th largest
 * logit cannot lie below; then those at least the k-th largest. Returns how many and sets `least`. */
static int64_t k_largest(const Row *row, const float *maxima, int64_t blocks, int64_t k, float *scratch, float *least) {
    float buffer[BLOCK], bound = -INFINITY;
    int64_t count, found = 0, kept = 0;
    if (k < blocks) {
        memcpy(scratch, maxima, sizeof(float) * (size_t)blocks);
        bound = kth_largest(scratch, blocks, k);
    }
    for (int64_t b = 0; b < blocks; ++b) {
        if (maxima[b] < bound || maxima[b] == -INFINITY) continue;
        const float *values = block_of(row, b, buffer, &count);
        for (int64_t i = 0; i < count; ++i) {
            scratch[found] = values[i];
            found += values[i] >= bound && values[i] > -INFINITY;
        }
    }
    if (k > found) return found;
    *least = kth_largest(scratch, found, k);
    for (int64_t i = 0; i < found; ++i) {
        const float value = scratch[i];
        scratch[kept] = value;
        kept += value >= *least;
    }
    return kept;
}

/* The smallest logit that top-k, top-p and min-p keep. */
static float cutoff(const Row *row, const float *maxima, int64_t blocks, float top, double inverse, int64_t top_k,
                    double top_p, double min_p, float *scratch) {
    float least = -INFINITY;
    int64_t count = -1; /* candidates in scratch; -1 = the whole row */
    if (top_k > 0 && top_k < row->vocabulary) count = k_largest(row, maxima, blocks, top_k, scratch, &least);
    if (top_p < 1.0) {
        const float smallest = count < 0
            ? nucleus_cutoff(row, maxima, blocks, top, inverse, top_p, scratch)
            : mass_cutoff(scratch, count, top, inverse, top_p * mass_of(scratch, 0, count, top, inverse));
        least = smallest > least ? smallest : least;
    }
    if (min_p > 0.0) {
        const double limit = (double)top + log(min_p) / inverse;
        float smallest = (float)limit;
        if ((double)smallest < limit) smallest = nextafterf(smallest, INFINITY);
        least = smallest > least ? smallest : least;
    }
    return least;
}

/* ---- drawing ---- */

typedef struct {
    float top, least;
    double inverse, best;
    int64_t best_id;
} Draw;

/* Score the tokens of one block whose word is not below `bound`; the best so far is updated, ties to the lowest id. */
FL_INLINE void play_block(const Row *row, Draw *draw, int64_t block, const uint32_t state[4], uint64_t key, int64_t bound) {
    uint32_t words[4][LANES];
    uint8_t hit[LANES];
    const int64_t first = block * BLOCK;
    const uint32_t key0 = (uint32_t)key ^ state[3], key1 = (uint32_t)(key >> 32) ^ FL_DOMAIN_TOKEN;
    const uint32_t base = (uint32_t)(first >> 2), s0 = state[0], s1 = state[1], s2 = state[2];
    const uint32_t limit = bound < 0 ? 0 : (uint32_t)(bound > 0xFFFFFF ? 0xFFFFFF : bound) << 8;
    FL_SIMD
    for (int i = 0; i < LANES; ++i) {
        uint32_t c0 = base + (uint32_t)i, c1 = s0, c2 = s1, c3 = s2;
        FL_PHILOX(c0, c1, c2, c3, key0, key1);
        words[0][i] = c0, words[1][i] = c1, words[2][i] = c2, words[3][i] = c3;
        hit[i] = (uint8_t)((c0 >= limit) | (c1 >= limit) | (c2 >= limit) | (c3 >= limit));
    }
    for (int group = 0; group < LANES; group += 8) {
        uint64_t any;
        memcpy(&any, hit + group, 8);
        if (any == 0) continue;
        for (int i = group; i < group + 8; ++i) {
            if (!hit[i]) continue;
            for (int lane = 0; lane < 4; ++lane) {
                const int64_t token = first + 4 * i + lane;
                if (words[lane][i] < limit || token >= row->vocabulary) continue;
                const float logit = at(row, token);
                if (!(logit >= draw->least) || logit == -INFINITY) continue;
                const double score = ((double)logit - draw->top) * draw->inverse + noise_of(words[lane][i]);
                if (score > draw->best || (score == draw->best && token < draw->best_id)) {
                    draw->best = score;
                    draw->best_id = token;
                }
            }
        }
    }
}

FL_CLONES FL_EXPORT void fl_gumbel_sample(int64_t begin, int64_t end, const void *logits, int64_t logits_row,
                                          int64_t logits_column, int32_t dtype, int64_t vocabulary,
                                          const int64_t *context, int64_t context_row, int64_t context_column,
                                          int64_t width, uint64_t key, const int64_t *seeds, int64_t seeds_stride,
                                          const int64_t *positions, int64_t positions_stride, double temperature,
                                          const float *temperatures, int64_t temperatures_stride, int64_t top_k,
                                          double top_p, double min_p, const uint8_t *rows, int64_t rows_stride,
                                          int32_t want_logprob, int64_t *ids, float *logprobs) {
    const int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
    const int truncates = (top_k > 0 && top_k < vocabulary) || top_p < 1.0;
    float *maxima = malloc(sizeof(float) * (size_t)(blocks + (truncates ? vocabulary + 1 : 0)));
    float *scratch = maxima == NULL ? NULL : maxima + blocks;
    float buffer[BLOCK];
    int64_t count;
    for (int64_t r = begin; r < end; ++r) {
        logprobs[r] = 0.0f;
        if (rows != NULL && !rows[r * rows_stride]) {
            ids[r] = -1;
            continue;
        }
        ids[r] = maxima == NULL ? NO_MEMORY : BAD_ROW;
        if (maxima == NULL) continue;
        const Row row = {(const char *)logits + r * logits_row * (dtype == FL_F32 ? 4 : 2), logits_column, vocabulary, dtype};
        int64_t largest = 0;
        int32_t odd = 0;
        for (int64_t b = 0; b < blocks; ++b) {
            const float *values = block_of(&row, b, buffer, &count);
            odd |= maximum(values, count, &maxima[b]);
            largest = maxima[b] > maxima[largest] ? b : largest;
        }
        if (odd || maxima[largest] == -INFINITY) continue;
        Draw draw = {maxima[largest], -INFINITY, 0.0, -INFINITY, vocabulary};
        draw.inverse = 1.0 / (temperatures == NULL ? temperature : (double)temperatures[r * temperatures_stride]);
        if (truncates || min_p > 0.0)
            draw.least = cutoff(&row, maxima, blocks, draw.top, draw.inverse, top_k, top_p, min_p, scratch);
        uint32_t state[4];
        uint64_t row_key = key;
        if (seeds != NULL) {
            row_key = (uint64_t)seeds[r * seeds_stride];
            noise_state(state, row_key, (uint64_t)positions[r * positions_stride]);
        } else {
            fl_context_state(state, FL_DOMAIN_PHILOX, key, context + r * context_row, context_column, width);
        }
        play_block(&row, &draw, largest, state, row_key, -1);
        for (int64_t b = 0; b < blocks; ++b) {
            if (b == largest || maxima[b] < draw.least || maxima[b] == -INFINITY) continue;
            const double needed = draw.best - ((double)maxima[b] - draw.top) * draw.inverse;
            if (needed <= LARGEST_NOISE) play_block(&row, &draw, b, state, row_key, bound_of(needed));
        }
        ids[r] = draw.best_id;
        if (!want_logprob) continue;
        const float scale = draw.inverse < 1e38 ? (float)draw.inverse : 1e38f; /* finite: the top's 0 stays 0 */
        double total = 0.0;
        for (int64_t b = 0; b < blocks; ++b) {
            if (maxima[b] < draw.least) continue;
            const float *values = block_of(&row, b, buffer, &count);
            total += exp_sum(values, count, draw.top, scale, draw.least);
        }
        logprobs[r] = (float)(((double)at(&row, draw.best_id) - draw.top) * draw.inverse - log(total));
    }
    free(maxima);
}

/* u = ((word >> 8) + 1) / (2^24 + 1) rounded once to float is the float just below ((word >> 8) + 1) / 2^24. */
FL_INLINE float uniform_of(uint32_t word) {
    return fl_from_bits(fl_to_bits((float)(int32_t)((word >> 8) + 1) * 5.9604644775390625e-8f) - 1);
}

FL_CLONES FL_NOINLINE void uniforms(const uint32_t state[4], uint64_t key, int64_t quads, float *out) {
    const uint32_t key0 = (uint32_t)key ^ state[3], key1 = (uint32_t)(key >> 32) ^ FL_DOMAIN_TOKEN;
    const uint32_t s0 = state[0], s1 = state[1], s2 = state[2];
    FL_SIMD
    for (int64_t i = 0; i < quads; ++i) {
        uint32_t c0 = (uint32_t)i, c1 = s0, c2 = s1, c3 = s2;
        FL_PHILOX(c0, c1, c2, c3, key0, key1);
        out[4 * i] = uniform_of(c0);
        out[4 * i + 1] = uniform_of(c1);
        out[4 * i + 2] = uniform_of(c2);
        out[4 * i + 3] = uniform_of(c3);
    }
}

FL_EXPORT void fl_gumbel_uniform(int64_t begin, int64_t end, const int64_t *context, int64_t context_row,
                                 int64_t context_column, int64_t width, uint64_t key, int64_t vocabulary, float *out) {
    for (int64_t r = begin; r < end; ++r) {
        uint32_t state[4], words[4];
        float *line = out + r * vocabulary;
        fl_context_state(state, FL_DOMAIN_PHILOX, key, context + r * context_row, context_column, width);
        uniforms(state, key, vocabulary / 4, line);
        if (vocabulary % 4 == 0) continue;
        fl_philox_words(words, state, key, (uint32_t)(vocabulary / 4));
        for (int64_t v = vocabulary / 4 * 4; v < vocabulary; ++v) line[v] = uniform_of(words[v & 3]);
    }
}
