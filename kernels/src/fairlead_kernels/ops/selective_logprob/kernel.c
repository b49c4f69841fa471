/* selective_logprob and its backward: rows [begin, end). Strides in elements, temperature as its inverse. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast") /* fused multiply-adds in exp; results are compared within tolerances */
#endif
#include "fairlead.h"

#define TILE 4096

FL_INLINE float load(const void *row, int32_t dtype, int64_t index) {
    if (dtype == FL_F32) return ((const float *)row)[index];
    if (dtype == FL_F16) return fl_load_f16(((const uint16_t *)row)[index]);
    return fl_load_bf16(((const uint16_t *)row)[index]);
}

/* Of their own, not inlined: inside a longer function the compiler leaves these loops scalar. */
FL_CLONES FL_NOINLINE float largest_of(const float *values, int64_t count) {
    float most = -INFINITY;
    _Pragma("omp simd reduction(max : most)")
    for (int64_t i = 0; i < count; ++i) most = values[i] > most ? values[i] : most;
    return most;
}

FL_CLONES FL_NOINLINE float exp_sum(const float *values, int64_t count, float top, float scale) {
    float sum = 0.0f;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t i = 0; i < count; ++i) sum += fl_expf_below((values[i] - top) * scale);
    return sum;
}

FL_CLONES FL_NOINLINE void exp_scaled(float *out, const float *values, int64_t count, float scale, float lse,
                                      float factor) {
    FL_SIMD
    for (int64_t i = 0; i < count; ++i) out[i] = factor * fl_expf(values[i] * scale - lse);
}

FL_CLONES FL_NOINLINE void widen(float *out, const uint16_t *values, int64_t count, int32_t half) {
    if (half) {
        FL_SIMD
        for (int64_t i = 0; i < count; ++i) out[i] = fl_load_f16(values[i]);
    } else {
        FL_SIMD
        for (int64_t i = 0; i < count; ++i) out[i] = fl_load_bf16(values[i]);
    }
}

/* `count` values of a row from `first` on as float32: where they lie, or in `buffer`. */
FL_INLINE const float *tile(const void *row, int32_t dtype, int64_t column, int64_t first, int64_t count, float *buffer) {
    if (dtype == FL_F32 && column == 1) return (const float *)row + first;
    if (column == 1) {
        widen(buffer, (const uint16_t *)row + first, count, dtype == FL_F16);
        return buffer;
    }
    for (int64_t i = 0; i < count; ++i) buffer[i] = load(row, dtype, (first + i) * column);
    return buffer;
}

FL_EXPORT void fl_selective_logprob(int64_t begin, int64_t end, const void *logits, int64_t logits_row,
                                    int64_t logits_column, int32_t dtype, int64_t vocabulary, const int64_t *ids,
                                    int64_t ids_stride, float scale, float *logp, float *lse) {
    float buffer[TILE];
    const int64_t size = dtype == FL_F32 ? 4 : 2;
    for (int64_t r = begin; r < end; ++r) {
        const char *row = (const char *)logits + r * logits_row * size;
        float top = -INFINITY;
        double total = 0.0;
        for (int64_t first = 0; first < vocabulary; first += TILE) {
            const int64_t count = vocabulary - first < TILE ? vocabulary - first : TILE;
            const float *values = tile(row, dtype, logits_column, first, count, buffer);
            const float most = largest_of(values, count);
            if (most > top) { /* rescale what was summed under the smaller maximum */
                if (total > 0.0) total *= exp(((double)top - most) * scale);
                top = most;
            }
            if (top > -INFINITY) total += (double)exp_sum(values, count, top, scale);
        }
        const double sum = (double)top * scale + log(total);
        lse[r] = (float)sum;
        logp[r] = (float)((double)load(row, dtype, ids[r * ids_stride] * logits_column) * scale - sum);
    }
}

FL_EXPORT void fl_selective_logprob_backward(int64_t begin, int64_t end, const float *grad, int64_t grad_stride,
                                             const void *logits, int64_t logits_row, int64_t logits_column,
                                             int32_t dtype, int64_t vocabulary, const int64_t *ids, int64_t ids_stride,
                                             const float *lse, float scale, void *out) {
    float buffer[TILE], wide[TILE];
    const int64_t size = dtype == FL_F32 ? 4 : 2;
    for (int64_t r = begin; r < end; ++r) {
        const char *row = (const char *)logits + r * logits_row * size;
        char *line = (char *)out + r * vocabulary * size;
        const float factor = grad[r * grad_stride] * scale;
        const int64_t id = ids[r * ids_stride];
        for (int64_t first = 0; first < vocabulary; first += TILE) {
            const int64_t count = vocabulary - first < TILE ? vocabulary - first : TILE;
            const float *values = tile(row, dtype, logits_column, first, count, buffer);
            float *target = dtype == FL_F32 ? (float *)line + first : wide;
            exp_scaled(target, values, count, scale, lse[r], -factor);
            if (id >= first && id < first + count) target[id - first] += factor;
            if (dtype == FL_F16)
                for (int64_t i = 0; i < count; ++i) ((uint16_t *)line)[first + i] = fl_store_f16(wide[i]);
            else if (dtype == FL_BF16)
                for (int64_t i = 0; i < count; ++i) ((uint16_t *)line)[first + i] = fl_store_bf16(wide[i]);
        }
    }
}
