/* green_count: words, dedup and counts of rows [begin, end). Strides in elements.
 * Per row: the tokens with their left context as uint32, states and words in vector code, then one pass over the tokens
 * with a hash set of fingerprints. count[row] = -1 says that there was no memory. */
#include "fairlead.h"

enum { LEFTHASH = 0, MINHASH = 1, SELFHASH = 2 };
enum { PAIR = 0, CONTEXT = 1, NONE = 2 };

FL_CLONES FL_EXPORT void fl_green_count(int64_t begin, int64_t end, const int64_t *ids, int64_t ids_row,
                                        int64_t ids_column, int64_t tokens, const int64_t *lengths,
                                        int64_t lengths_stride, const int64_t *context, int64_t context_row,
                                        int64_t context_column, int64_t known, int64_t width, uint64_t key,
                                        uint32_t limit, int32_t scheme, int32_t dedup, int32_t pad_left, int64_t *count,
                                        int64_t *scored, int8_t *marks) {
    const int64_t all = width + tokens;
    int bits = 4;
    while (((int64_t)1 << bits) < 2 * tokens) ++bits;
    const size_t slots_bytes = (size_t)8 << bits, lane = (size_t)(all + 1);
    char *memory = malloc(slots_bytes + 8 * lane + 6 * 4 * lane);
    if (memory == NULL) {
        for (int64_t row = begin; row < end; ++row) count[row] = -1;
        return;
    }
    uint64_t *slots = (uint64_t *)memory, *print = slots + ((size_t)1 << bits);
    uint32_t *token = (uint32_t *)(print + lane), *s0 = token + lane, *s1 = s0 + lane, *s2 = s1 + lane;
    uint32_t *s3 = s2 + lane, *word = s3 + lane;
    uint32_t empty[4];
    fl_context_state(empty, FL_DOMAIN_MIX32, key, ids, 1, 0);
    for (int64_t row = begin; row < end; ++row) {
        const int64_t *line = ids + row * ids_row;
        int8_t *mark = marks + row * tokens;
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
        if (scheme == LEFTHASH) {
            fl_window_states(s0, s1, s2, s3, FL_DOMAIN_MIX32, key, token, width, stop);
        } else if (scheme == MINHASH) {
            FL_SIMD
            for (int64_t i = 0; i < width + stop; ++i) word[i] = fl_mix32(token[i], empty[0], empty[1]);
            for (int64_t t = 0; t < stop; ++t) { /* s3: the chosen token of each window */
                int64_t best = t;
                for (int64_t i = t + 1; i < t + width; ++i)
                    if (word[i] < word[best]) best = i;
                s3[t] = token[best];
            }
            memcpy(word, s3, (size_t)stop * 4);
            fl_window_states(s0, s1, s2, s3, FL_DOMAIN_MIX32, key, word, 1, stop);
        } else {
            fl_window_states(s0, s1, s2, s3, FL_DOMAIN_MIX32, key, token, 1, width + stop);
            FL_SIMD
            for (int64_t t = 0; t < stop; ++t) word[t] = fl_mix32(own[t], empty[0], empty[1]);
            for (int64_t i = 0; i < width; ++i) {
                FL_SIMD
                for (int64_t t = 0; t < stop; ++t) {
                    const uint32_t other = fl_mix32(own[t], s0[t + i], s1[t + i]);
                    word[t] = other < word[t] ? other : word[t];
                }
            }
            FL_SIMD
            for (int64_t t = 0; t < stop; ++t) print[t] = word[t];
            FL_SIMD
            for (int64_t t = 0; t < stop; ++t) word[t] = fl_mix32(word[t], empty[0], empty[1]);
            if (dedup == CONTEXT) fl_window_states(s0, s1, s2, s3, FL_DOMAIN_MIX32, key, token, width, stop);
        }
        if (scheme != SELFHASH) {
            FL_SIMD
            for (int64_t t = 0; t < stop; ++t) word[t] = fl_mix32(own[t], s0[t], s1[t]);
            FL_SIMD
            for (int64_t t = 0; t < stop; ++t) print[t] = fl_fingerprint(s0[t], s1[t], own[t]);
        }
        if (dedup == CONTEXT) {
            FL_SIMD
            for (int64_t t = 0; t < stop; ++t) print[t] = (uint64_t)s0[t] << 32 | s1[t];
        }
        if (dedup != NONE) memset(slots, 0, slots_bytes);
        int64_t greens = 0, total = 0;
        for (int64_t t = 0; t < stop; ++t) {
            const int missing = line[t * ids_column] < 0;
            int valid = !missing && (pad_left || gap < t);
            if (missing) gap = t + width;
            if (valid && dedup != NONE) valid = fl_set_add(slots, bits, print[t]);
            const int green = word[t] < limit;
            mark[t] = (int8_t)(valid ? green : -1);
            total += valid;
            greens += valid & green;
        }
        if (stop < tokens) memset(mark + stop, -1, (size_t)(tokens - stop));
        count[row] = greens;
        scored[row] = total;
    }
    free(memory);
}
