/* gumbel_score: scores, dedup and sums of rows [begin, end). Strides in elements. scored[row] = -1: there was no memory. */
#include "fairlead.h"

enum { PAIR = 0, CONTEXT = 1, NONE = 2 };

FL_CLONES FL_EXPORT void fl_gumbel_score(int64_t begin, int64_t end, const int64_t *ids, int64_t ids_row,
                                         int64_t ids_column, int64_t tokens, const int64_t *lengths,
                                         int64_t lengths_stride, const int64_t *context, int64_t context_row,
                                         int64_t context_column, int64_t known, int64_t width, uint64_t key,
                                         int32_t dedup, int32_t pad_left, double *sums, int64_t *scored, double *marks) {
    const int64_t all = width + tokens;
    int bits = 4;
    while (((int64_t)1 << bits) < 2 * tokens) ++bits;
    const size_t slots_bytes = (size_t)8 << bits, lane = (size_t)(all + 1);
    char *memory = malloc(slots_bytes + 6 * 4 * lane);
    if (memory == NULL) {
        for (int64_t row = begin; row < end; ++row) scored[row] = -1;
        return;
    }
    uint64_t *slots = (uint64_t *)memory;
    uint32_t *token = (uint32_t *)(slots + ((size_t)1 << bits));
    uint32_t *s0 = token + lane, *s1 = s0 + lane, *s2 = s1 + lane, *s3 = s2 + lane, *word = s3 + lane;
    const uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32) ^ FL_DOMAIN_TOKEN;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t *line = ids + row * ids_row;
        double *mark = marks + row * tokens;
        const int64_t length = lengths == NULL ? tokens : lengths[row * lengths_stride];
        const int64_t stop = length < tokens ? (length > 0 ? length : 0) : tokens;
        int64_t gap = -1; /* the last place so far in context and tokens that holds no id */
        for (int64_t i = 0; i < width; ++i) {
            const int64_t from = known - width + i;
            const int64_t id = from < 0 ? -1 : context[row * context_row + from * context_column];
            token[i] = (uint32_t)id;
            if (id < 0) gap = i;
        }
        uint32_t *own = token + width;
        for (int64_t t = 0; t < stop; ++t) own[t] = (uint32_t)line[t * ids_column];
        fl_window_states(s0, s1, s2, s3, FL_DOMAIN_PHILOX, key, token, width, stop);
        FL_SIMD
        for (int64_t t = 0; t < stop; ++t) {
            uint32_t c0 = own[t] >> 2, c1 = s0[t], c2 = s1[t], c3 = s2[t];
            FL_PHILOX(c0, c1, c2, c3, low ^ s3[t], high);
            const uint32_t which = own[t] & 3u;
            const uint32_t even = which == 0 ? c0 : c2, odd = which == 1 ? c1 : c3;
            word[t] = (which & 1u) ? odd : even;
        }
        if (dedup != NONE) memset(slots, 0, slots_bytes);
        int64_t total = 0;
        double sum = 0.0;
        for (int64_t t = 0; t < stop; ++t) {
            const int missing = line[t * ids_column] < 0;
            int valid = !missing && (pad_left || gap < t);
            if (missing) gap = t + width;
            if (valid && dedup != NONE)
                valid = fl_set_add(slots, bits, dedup == PAIR ? fl_fingerprint(s0[t], s1[t], own[t])
                                                              : ((uint64_t)s0[t] << 32 | s1[t]));
            mark[t] = NAN;
            if (!valid) continue;
            const float u = (float)((double)((word[t] >> 8) + 1) / 16777217.0);
            mark[t] = -log1p(-(double)u);
            sum += mark[t];
            ++total;
        }
        for (int64_t t = stop; t < tokens; ++t) mark[t] = NAN;
        sums[row] = sum;
        scored[row] = total;
    }
    free(memory);
}
