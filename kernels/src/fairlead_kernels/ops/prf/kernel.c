/* prf: the words of tokens after their contexts. Rows [begin, end); all strides in elements. */
#include "fairlead.h"

FL_CLONES FL_EXPORT void fl_prf(int64_t begin, int64_t end, const int64_t *context, int64_t context_row,
                                int64_t context_column, int64_t width, const int64_t *tokens, int64_t token_row,
                                int64_t token_column, int64_t count, uint64_t key, int32_t philox, int64_t *out) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t *ids = tokens + row * token_row;
        int64_t *words = out + row * count;
        uint32_t state[4];
        fl_context_state(state, philox ? FL_DOMAIN_PHILOX : FL_DOMAIN_MIX32, key, context + row * context_row,
                         context_column, width);
        if (philox) {
            const uint32_t key0 = (uint32_t)key ^ state[3], key1 = (uint32_t)(key >> 32) ^ FL_DOMAIN_TOKEN;
            const uint32_t s0 = state[0], s1 = state[1], s2 = state[2];
            FL_SIMD
            for (int64_t i = 0; i < count; ++i) {
                const uint32_t token = (uint32_t)ids[i * token_column], lane = token & 3u;
                uint32_t c0 = token >> 2, c1 = s0, c2 = s1, c3 = s2;
                FL_PHILOX(c0, c1, c2, c3, key0, key1);
                const uint32_t low = lane == 0 ? c0 : c1, high = lane == 2 ? c2 : c3;
                words[i] = (int64_t)(lane < 2 ? low : high);
            }
        } else {
            const uint32_t a = state[0], b = state[1];
            FL_SIMD
            for (int64_t i = 0; i < count; ++i) words[i] = (int64_t)fl_mix32((uint32_t)ids[i * token_column], a, b);
        }
    }
}
