/* What linear_logprob does to a tile of float32 logits, one pass over each row: rows [begin, end), dense, `count` wide.
 * `local` is the target's column in the tile, outside of it for most rows. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast") /* fused multiply-adds in exp; results are compared within tolerances */
#endif
#include "fairlead.h"

/* Of their own, not inlined: inside a longer function the compiler leaves these loops scalar. */
FL_CLONES FL_NOINLINE float tile_top(const float *values, int64_t count) {
    float most = -INFINITY;
    _Pragma("omp simd reduction(max : most)")
    for (int64_t i = 0; i < count; ++i) most = values[i] > most ? values[i] : most;
    return most;
}

FL_CLONES FL_NOINLINE float tile_sum(const float *values, int64_t count, float top, float scale) {
    float sum = 0.0f;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t i = 0; i < count; ++i) sum += fl_expf_below((values[i] - top) * scale);
    return sum;
}

FL_CLONES FL_NOINLINE float tile_exp(float *values, int64_t count, float top, float scale) {
    float sum = 0.0f;
    _Pragma("omp simd reduction(+ : sum)")
    for (int64_t i = 0; i < count; ++i) {
        const float value = fl_expf_below((values[i] - top) * scale);
        values[i] = value;
        sum += value;
    }
    return sum;
}

FL_CLONES FL_NOINLINE void tile_slope(float *values, int64_t count, float scale, float lse, float factor) {
    FL_SIMD
    for (int64_t i = 0; i < count; ++i) values[i] = -factor * fl_expf(values[i] * scale - lse);
}

FL_EXPORT void fl_linear_logprob_forward(int64_t begin, int64_t end, float *tile, int64_t count, const int64_t *local,
                                         float scale, float *top, float *total, float *chosen, float *rescale) {
    for (int64_t r = begin; r < end; ++r) {
        float *row = tile + r * count;
        if (local[r] >= 0 && local[r] < count) chosen[r] = row[local[r]];
        const float here = tile_top(row, count), most = here > top[r] ? here : top[r];
        const float safe = most == -INFINITY ? 0.0f : most;
        const float shrink = (float)exp(((double)top[r] - safe) * scale);
        const float sum = rescale ? tile_exp(row, count, safe, scale) : tile_sum(row, count, safe, scale);
        total[r] = total[r] * shrink + sum;
        top[r] = most;
        if (rescale) rescale[r] = shrink;
    }
}

FL_EXPORT void fl_linear_logprob_backward(int64_t begin, int64_t end, float *tile, int64_t count, const int64_t *local,
                                          float scale, const float *lse, const float *factor) {
    for (int64_t r = begin; r < end; ++r) {
        float *row = tile + r * count;
        tile_slope(row, count, scale, lse[r], factor[r]);
        if (local[r] >= 0 && local[r] < count) row[local[r]] += factor[r];
    }
}
