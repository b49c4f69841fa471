/* segment_reduce: segments [begin, end) of values [N, D] with any strides (in elements), offsets int64 [S + 1].
 * Sums in double; each output is made by one thread in the order of its values, so it is the same on every run. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast") /* fused multiply-adds in exp; results are compared within tolerances */
#endif
#include "fairlead.h"

enum { SUM = 0, MEAN = 1, MAX = 2, ARGMAX = 3, LAST = 4, LOGSUMEXP = 5 };
#define LANES 8

FL_INLINE float load(const void *values, int32_t dtype, int64_t index) {
    if (dtype == FL_F32) return ((const float *)values)[index];
    if (dtype == FL_F16) return fl_load_f16(((const uint16_t *)values)[index]);
    return fl_load_bf16(((const uint16_t *)values)[index]);
}

/* Lanes of their own let sums of long segments run as vector code without -ffast-math. */
FL_INLINE double total_of(const void *values, int32_t dtype, int64_t first, int64_t count, int64_t step) {
    double lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int64_t j = 0; j < LANES; ++j) lanes[j] += load(values, dtype, first + (i + j) * step);
    double total = 0.0;
    for (; i < count; ++i) total += load(values, dtype, first + i * step);
    for (int64_t j = 0; j < LANES; ++j) total += lanes[j];
    return total;
}

/* Dense float32, of their own and not inlined: inside a longer function the compiler leaves these loops scalar. */
FL_CLONES FL_NOINLINE float dense_largest(const float *values, int64_t count) {
    float most = -INFINITY;
    int32_t wrong = 0;
    _Pragma("omp simd reduction(max : most) reduction(| : wrong)")
    for (int64_t i = 0; i < count; ++i) {
        most = values[i] > most ? values[i] : most;
        wrong |= values[i] != values[i];
    }
    return wrong ? NAN : most;
}

FL_CLONES FL_NOINLINE float dense_exp_sum(const float *values, int64_t count, float top) {
    float sum = 0.0f;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t i = 0; i < count; ++i) sum += fl_expf(values[i] - top); /* top is 0 beside +inf */
    return sum;
}

/* The largest value; NaN when there is one. -inf of nothing. */
FL_INLINE float largest_of(const void *values, int32_t dtype, int64_t first, int64_t count, int64_t step) {
    if (dtype == FL_F32 && step == 1) return dense_largest((const float *)values + first, count);
    float most = -INFINITY;
    int wrong = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float value = load(values, dtype, first + i * step);
        most = value > most ? value : most;
        wrong |= value != value;
    }
    return wrong ? NAN : most;
}

/* The lowest place of the largest value that is not NaN; -1 of nothing. */
FL_INLINE int64_t winner_of(const void *values, int32_t dtype, int64_t first, int64_t count, int64_t step) {
    int64_t best = -1;
    float most = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        const float value = load(values, dtype, first + i * step);
        if (value > most || (best < 0 && value == value)) most = value, best = i;
    }
    return best;
}

FL_INLINE float logsumexp_of(const void *values, int32_t dtype, int64_t first, int64_t count, int64_t step) {
    const float top = largest_of(values, dtype, first, count, step);
    const float safe = isfinite(top) ? top : 0.0f;
    double total = 0.0;
    for (int64_t at = 0; at < count; at += 4096) { /* float sums of blocks, double sum of the blocks */
        const int64_t block = count - at < 4096 ? count - at : 4096;
        float part = 0.0f;
        if (dtype == FL_F32 && step == 1) part = dense_exp_sum((const float *)values + first + at, block, safe);
        else
            for (int64_t i = 0; i < block; ++i) part += fl_expf(load(values, dtype, first + (at + i) * step) - safe);
        total += part;
    }
    return (float)(log(total) + safe);
}

FL_INLINE void store(void *out, int32_t dtype, int64_t index, float value) {
    if (dtype == FL_F32) ((float *)out)[index] = value;
    else ((uint16_t *)out)[index] = dtype == FL_F16 ? fl_store_f16(value) : fl_store_bf16(value);
}

FL_INLINE void reduce(int64_t begin, int64_t end, const void *values, int64_t row, int64_t column, const int32_t dtype,
                      int64_t width, const int64_t *offsets, int32_t op, void *out) {
    for (int64_t s = begin; s < end; ++s) {
        const int64_t count = offsets[s + 1] - offsets[s];
        for (int64_t d = 0; d < width; ++d) {
            const int64_t first = offsets[s] * row + d * column, at = s * width + d;
            if (op == SUM) ((float *)out)[at] = (float)total_of(values, dtype, first, count, row);
            else if (op == MEAN)
                ((float *)out)[at] = count ? (float)(total_of(values, dtype, first, count, row) / (double)count) : NAN;
            else if (op == MAX) store(out, dtype, at, largest_of(values, dtype, first, count, row));
            else if (op == ARGMAX) {
                const int64_t best = winner_of(values, dtype, first, count, row);
                ((int64_t *)out)[at] = best < 0 ? -1 : offsets[s] + best;
            } else if (op == LAST) store(out, dtype, at, count ? load(values, dtype, first + (count - 1) * row) : NAN);
            else ((float *)out)[at] = logsumexp_of(values, dtype, first, count, row);
        }
    }
}

/* Sums of wide rows: along the rows, so that memory is read in order. */
FL_INLINE void add_rows(int64_t begin, int64_t end, const void *values, int64_t row, const int32_t dtype, int64_t width,
                        const int64_t *offsets, int32_t op, float *out) {
    double sum[256];
    for (int64_t s = begin; s < end; ++s)
        for (int64_t first = 0; first < width; first += 256) {
            const int64_t columns = width - first < 256 ? width - first : 256, count = offsets[s + 1] - offsets[s];
            for (int64_t d = 0; d < columns; ++d) sum[d] = 0.0;
            for (int64_t i = offsets[s]; i < offsets[s + 1]; ++i) {
                FL_SIMD
                for (int64_t d = 0; d < columns; ++d) sum[d] += load(values, dtype, i * row + first + d);
            }
            for (int64_t d = 0; d < columns; ++d)
                out[s * width + first + d] = (float)(op == SUM ? sum[d] : count ? sum[d] / (double)count : NAN);
        }
}

FL_CLONES FL_EXPORT void fl_segment_reduce(int64_t begin, int64_t end, const void *values, int64_t row, int64_t column,
                                           int32_t dtype, int64_t width, const int64_t *offsets, int32_t op, void *out) {
    if (width > 1 && column == 1 && op <= MEAN) {
        if (dtype == FL_F32) add_rows(begin, end, values, row, FL_F32, width, offsets, op, out);
        else if (dtype == FL_F16) add_rows(begin, end, values, row, FL_F16, width, offsets, op, out);
        else add_rows(begin, end, values, row, FL_BF16, width, offsets, op, out);
    } else if (dtype == FL_F32 && row == 1) reduce(begin, end, values, 1, column, FL_F32, width, offsets, op, out);
    else if (dtype == FL_F32) reduce(begin, end, values, row, column, FL_F32, width, offsets, op, out);
    else if (dtype == FL_F16) reduce(begin, end, values, row, column, FL_F16, width, offsets, op, out);
    else reduce(begin, end, values, row, column, FL_BF16, width, offsets, op, out);
}
