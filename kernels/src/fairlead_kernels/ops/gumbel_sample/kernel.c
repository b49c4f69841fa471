/* gumbel_sample: rows [begin, end). Strides in elements.
 * Per row: maxima of blocks of 256 logits; the block of the largest logit first, whose best score bounds what the noise of
 * any other token must reach: one comparison of its Philox word. Logarithms only for the words above that bound. */
#include "fairlead.h"

#define BLOCK 256
#define LANES (BLOCK / 4)
#define SEED_DOMAIN 0x464C5331u
#define LARGEST_NOISE 16.7 /* above -ln(-ln u) of the largest 24-bit word */
#define BAD_ROW (-2)

FL_INLINE float load(const void *row, int32_t dtype, int64_t column, int64_t stride) {
    if (dtype == FL_F32) return ((const float *)row)[column * stride];
    if (dtype == FL_F16) return fl_load_f16(((const uint16_t *)row)[column * stride]);
    return fl_load_bf16(((const uint16_t *)row)[column * stride]);
}

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

/* The k-th largest of values[0, count), which are reordered. */
static float kth_largest(float *values, int64_t count, int64_t k) {
    int64_t low = 0, high = count - 1, want = k - 1;
    while (low < high) {
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
        if (want <= j) high = j;
        else if (want >= i) low = i;
        else break;
    }
    return values[want];
}

/* The smallest member of the smallest set of largest values whose exp((v - top) / T) sums to at least `mass` of `total`.
 * Quickselect by mass; values are reordered. */
static float mass_cutoff(float *values, int64_t count, float top, double inverse, double mass) {
    int64_t low = 0, high = count - 1;
    double before = 0.0; /* mass of what lies above `low` */
    while (low < high) {
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
        double upper = 0.0; /* of [low, j] */
        for (int64_t t = low; t <= j; ++t) upper += exp(((double)values[t] - top) * inverse);
        if (before + upper >= mass) {
            high = j;
            continue;
        }
        double middle = 0.0; /* of (j, i): equal to the pivot */
        for (int64_t t = j + 1; t < i; ++t) middle += exp(((double)values[t] - top) * inverse);
        if (i > j + 1 && before + upper + middle >= mass) return pivot;
        before += upper + middle;
        if (i > high) return values[high];
        low = i;
    }
    return values[low];
}

/* The smallest logit that top-k, top-p and min-p keep. `scratch` holds the vocabulary. */
static float cutoff(const void *row, int32_t dtype, int64_t vocabulary, int64_t stride, float top, double inverse,
                    int64_t top_k, double top_p, double min_p, float *scratch) {
    float least = -INFINITY;
    int64_t count = 0;
    if ((top_k > 0 && top_k < vocabulary) || top_p < 1.0) {
        for (int64_t v = 0; v < vocabulary; ++v) {
            const float value = load(row, dtype, v, stride);
            scratch[count] = value;
            count += value > -INFINITY;
        }
    }
    if (top_k > 0 && top_k < count) {
        least = kth_largest(scratch, count, top_k);
        int64_t kept = 0;
        for (int64_t i = 0; i < count; ++i) {
            const float value = scratch[i];
            scratch[kept] = value;
            kept += value >= least;
        }
        count = kept;
    }
    if (top_p < 1.0) {
        double total = 0.0;
        for (int64_t i = 0; i < count; ++i) total += exp(((double)scratch[i] - top) * inverse);
        const float smallest = mass_cutoff(scratch, count, top, inverse, top_p * total);
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

/* Score the tokens of one block whose word exceeds `bound`; the best so far is updated, ties to the lowest id. */
FL_INLINE void play_block(const void *row, int32_t dtype, int64_t stride, int64_t first, int64_t vocabulary,
                          const uint32_t state[4], uint64_t key, float least, double inverse, double *best,
                          int64_t *best_id, int64_t bound) {
    uint32_t words[4][LANES];
    uint8_t hit[LANES];
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
                if (words[lane][i] < limit || token >= vocabulary) continue;
                const float logit = load(row, dtype, token, stride);
                if (!(logit >= least) || logit == -INFINITY) continue;
                const double score = (double)logit * inverse + noise_of(words[lane][i]);
                if (score > *best || (score == *best && token < *best_id)) {
                    *best = score;
                    *best_id = token;
                }
            }
        }
    }
}

/* The largest of a block; 1 when it holds NaN or +inf. */
FL_CLONES FL_NOINLINE int32_t maximum_f32(const float *values, int64_t count, float *largest) {
    float most = -INFINITY, sum = 0.0f;
    _Pragma("omp simd reduction(max : most) reduction(+ : sum)")
    for (int64_t i = 0; i < count; ++i) {
        const float value = values[i];
        most = value > most ? value : most;
        sum += value < INFINITY ? 0.0f : 1.0f; /* a sum, for a reduction by "or" is not vectorised */
    }
    *largest = most;
    return sum > 0.0f;
}

FL_INLINE int32_t block_maxima(const void *row, int32_t dtype, int64_t stride, int64_t vocabulary, float *maxima) {
    int32_t bad = 0;
    for (int64_t first = 0, block = 0; first < vocabulary; first += BLOCK, ++block) {
        const int64_t count = vocabulary - first < BLOCK ? vocabulary - first : BLOCK;
        float largest = -INFINITY;
        int32_t odd = 0;
        if (dtype == FL_F32 && stride == 1) {
            odd = maximum_f32((const float *)row + first, count, &largest);
        } else {
            for (int64_t i = 0; i < count; ++i) {
                const float value = load(row, dtype, first + i, stride);
                largest = value > largest ? value : largest;
                odd |= !(value < INFINITY);
            }
        }
        maxima[block] = largest;
        bad |= odd;
    }
    return bad;
}

/* Functions of their own, not inlined: inside the long function below the compiler leaves these loops scalar. */
FL_CLONES FL_NOINLINE float exp_sum_f32(const float *values, int64_t count, float top, float scale,
                                                             float least) {
    float sum = 0.0f;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t i = 0; i < count; ++i) {
        const float value = values[i], term = fl_expf((value - top) * scale);
        sum += value >= least ? term : 0.0f;
    }
    return sum;
}

FL_INLINE float exp_sum(const void *row, int32_t dtype, int64_t stride, int64_t first, int64_t stop, float top,
                        float scale, float least) {
    float sum = 0.0f;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t v = first; v < stop; ++v) {
        const float value = load(row, dtype, v, stride), term = fl_expf((value - top) * scale);
        sum += value >= least ? term : 0.0f;
    }
    return sum;
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
    float *maxima = malloc(sizeof(float) * (size_t)(blocks + 1 + (truncates ? vocabulary : 0)));
    float *scratch = maxima == NULL ? NULL : maxima + blocks;
    for (int64_t r = begin; r < end; ++r) {
        logprobs[r] = 0.0f;
        if (rows != NULL && !rows[r * rows_stride]) {
            ids[r] = -1;
            continue;
        }
        ids[r] = maxima == NULL ? -3 : BAD_ROW;
        if (maxima == NULL) continue;
        const char *row = (const char *)logits + r * logits_row * (dtype == FL_F32 ? 4 : 2);
        if (block_maxima(row, dtype, logits_column, vocabulary, maxima)) continue;
        int64_t first_block = 0;
        for (int64_t b = 1; b < blocks; ++b) first_block = maxima[b] > maxima[first_block] ? b : first_block;
        const float top = maxima[first_block];
        if (top == -INFINITY) continue;
        const double inverse = 1.0 / (temperatures == NULL ? temperature : (double)temperatures[r * temperatures_stride]);
        float least = -INFINITY;
        if (truncates || min_p > 0.0)
            least = cutoff(row, dtype, vocabulary, logits_column, top, inverse, top_k, top_p, min_p, scratch);
        uint32_t state[4];
        uint64_t row_key = key;
        if (seeds != NULL) {
            row_key = (uint64_t)seeds[r * seeds_stride];
            const uint64_t position = (uint64_t)positions[r * positions_stride];
            state[0] = SEED_DOMAIN, state[1] = (uint32_t)position, state[2] = (uint32_t)(position >> 32), state[3] = 0;
            fl_philox(state, (uint32_t)row_key, (uint32_t)(row_key >> 32));
        } else {
            fl_context_state(state, FL_DOMAIN_PHILOX, key, context + r * context_row, context_column, width);
        }
        double best = -INFINITY;
        int64_t best_id = vocabulary;
        play_block(row, dtype, logits_column, first_block * BLOCK, vocabulary, state, row_key, least, inverse, &best,
                   &best_id, -1);
        for (int64_t b = 0; b < blocks; ++b) {
            if (b == first_block || maxima[b] < least || maxima[b] == -INFINITY) continue;
            const double needed = best - (double)maxima[b] * inverse;
            if (needed > LARGEST_NOISE) continue;
            play_block(row, dtype, logits_column, b * BLOCK, vocabulary, state, row_key, least, inverse, &best, &best_id,
                       bound_of(needed));
        }
        ids[r] = best_id;
        if (want_logprob) {
            double total = 0.0;
            const float scale = (float)inverse;
            for (int64_t first = 0; first < vocabulary; first += 4096) {
                const int64_t stop = first + 4096 < vocabulary ? first + 4096 : vocabulary;
                total += (double)(dtype == FL_F32 && logits_column == 1
                                      ? exp_sum_f32((const float *)row + first, stop - first, top, scale, least)
                                      : exp_sum(row, dtype, logits_column, first, stop, top, scale, least));
            }
            logprobs[r] = (float)(((double)load(row, dtype, best_id, logits_column) - top) * inverse - log(total));
        }
    }
    free(maxima);
}
