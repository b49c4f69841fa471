/* group_normalize: groups [begin, end) of rewards, one sum of doubles each. NaN: not in the statistics, 0 itself. */
#include "fairlead.h"

enum { GRPO = 0, DR_GRPO = 1, BATCH = 2, RLOO = 3, QUANTILE = 4, MIDRANK = 5 };

FL_INLINE double load(const void *values, int32_t dtype, int64_t index) {
    if (dtype == FL_F64) return ((const double *)values)[index];
    if (dtype == FL_F32) return ((const float *)values)[index];
    if (dtype == FL_F16) return fl_load_f16(((const uint16_t *)values)[index]);
    return fl_load_bf16(((const uint16_t *)values)[index]);
}

FL_INLINE void store(void *out, int32_t dtype, int64_t index, double value) {
    if (dtype == FL_F64) ((double *)out)[index] = value;
    else ((float *)out)[index] = (float)value;
}

/* Share of the group at or below each reward; a group is small, so every pair is compared. */
FL_INLINE void rank(const void *rewards, int64_t stride, int32_t dtype, int64_t first, int64_t last, double tie,
                    void *out) {
    for (int64_t i = first; i < last; ++i) {
        const double mine = load(rewards, dtype, i * stride);
        double below = 0.0, same = 0.0, known = 0.0;
        for (int64_t j = first; j < last; ++j) {
            const double other = load(rewards, dtype, j * stride);
            below += other < mine;
            same += other == mine;
            known += other == other;
        }
        store(out, dtype, i, mine == mine ? (below + tie * same) / known : 0.0);
    }
}

FL_EXPORT void fl_group_normalize(int64_t begin, int64_t end, const void *rewards, int64_t stride, int32_t dtype,
                                  const int64_t *offsets, int32_t kind, double eps, double deviation, void *out) {
    for (int64_t g = begin; g < end; ++g) {
        const int64_t first = offsets[g], last = offsets[g + 1];
        if (kind >= QUANTILE) {
            rank(rewards, stride, dtype, first, last, kind == MIDRANK ? 0.5 : 1.0, out);
            continue;
        }
        double sum = 0.0, squares = 0.0, top = -INFINITY, low = INFINITY;
        int64_t known = 0;
        for (int64_t i = first; i < last; ++i) {
            const double value = load(rewards, dtype, i * stride);
            if (value != value) continue;
            sum += value;
            top = value > top ? value : top;
            low = value < low ? value : low;
            ++known;
        }
        const double mean = known ? sum / (double)known : 0.0;
        for (int64_t i = first; i < last; ++i) {
            const double gap = load(rewards, dtype, i * stride) - mean;
            if (gap == gap) squares += gap * gap;
        }
        const double rest = known > 1 ? (double)(known - 1) : 1.0;
        double scale = 1.0;
        if (kind == GRPO) scale = 1.0 / (sqrt(squares / rest) + eps);
        else if (kind == BATCH) scale = 1.0 / (deviation + eps);
        else if (kind == RLOO) scale = (double)known / rest;
        for (int64_t i = first; i < last; ++i) {
            const double value = load(rewards, dtype, i * stride);
            /* The mean of equal floats can differ from them by an ulp, which eps would not hide. */
            store(out, dtype, i, value != value || top == low ? 0.0 : (value - mean) * scale);
        }
    }
}
