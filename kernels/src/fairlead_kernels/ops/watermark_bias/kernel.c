/* watermark_bias: one pass over the logits of rows [begin, end). Strides in elements, columns are contiguous.
 *
 * The words of a block of BLOCK tokens are made from a table, exactly: with v = base + i, base a multiple of BLOCK, the
 * first half round of mix32 is linear over xor, (v ^ a) ^ (v ^ a) >> 16 = v ^ c where c = a ^ a >> 16 ^ base >> 16, and
 * (base + (i ^ low c)) * C1 = base' * C1 + table[i]. The last half round leaves the upper 16 bits alone, so a threshold
 * whose lower 16 bits are zero (gamma 1/4, 1/2, ...) does without it. Together a third of the work.
 */
#include "fairlead.h"

enum { LEFTHASH = 0, MINHASH = 1, SELFHASH = 2 };
enum { BLOCK = 1024, SPAN = 8 * BLOCK, KEPT = 16 }; /* KEPT: context states that a self-hash row keeps over a span */

/* From the first product of mix32 to its word, or to a number with the same upper 16 bits. */
FL_INLINE uint32_t finish(uint32_t h, uint32_t b, const int exact) {
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    h ^= h >> 16;
    h += b;
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    return exact ? h ^ h >> 16 : h;
}

FL_INLINE float biased(float x, int green, float delta, const int hard) {
    return hard ? ((green | (x != x)) ? x : -INFINITY) : (green ? x + delta : x);
}

/* BLOCK tokens of one storage type under the state of one context; words of a self-hash come ready made. */
#define BIAS_BLOCK(SUFFIX, TYPE, LOAD, STORE)                                                                          \
    FL_INLINE void hashed_##SUFFIX(const TYPE *in, TYPE *out, const uint32_t *table, uint32_t base, uint32_t b,        \
                                   int64_t count, uint32_t limit, float delta, const int hard, const int exact) {      \
        FL_SIMD                                                                                                        \
        for (int64_t i = 0; i < count; ++i)                                                                            \
            out[i] = STORE(biased(LOAD(in[i]), finish(base + table[i], b, exact) < limit, delta, hard));               \
    }                                                                                                                  \
    FL_INLINE void given_##SUFFIX(const TYPE *in, TYPE *out, const uint32_t *word, int64_t count, uint32_t limit,      \
                                  float delta, const int hard) {                                                       \
        FL_SIMD                                                                                                        \
        for (int64_t i = 0; i < count; ++i) out[i] = STORE(biased(LOAD(in[i]), word[i] < limit, delta, hard));         \
    }                                                                                                                  \
    FL_INLINE void block_##SUFFIX(const void *from, void *to, int64_t first, const uint32_t *table, uint32_t base,     \
                                  uint32_t b, int64_t count, uint32_t limit, float delta, int given) {                 \
        const TYPE *in = (const TYPE *)from + first;                                                                   \
        TYPE *out = (TYPE *)to + first;                                                                                \
        const int hard = delta == INFINITY;                                                                            \
        if (given && hard) given_##SUFFIX(in, out, table, count, limit, delta, 1);                                     \
        else if (given) given_##SUFFIX(in, out, table, count, limit, delta, 0);                                        \
        else if (limit & 0xFFFFu && hard) hashed_##SUFFIX(in, out, table, base, b, count, limit, delta, 1, 1);         \
        else if (limit & 0xFFFFu) hashed_##SUFFIX(in, out, table, base, b, count, limit, delta, 0, 1);                 \
        else if (hard) hashed_##SUFFIX(in, out, table, base, b, count, limit, delta, 1, 0);                            \
        else hashed_##SUFFIX(in, out, table, base, b, count, limit, delta, 0, 0);                                      \
    }
#define SAME(x) (x)
BIAS_BLOCK(f32, float, SAME, SAME)
BIAS_BLOCK(f16, uint16_t, fl_load_f16, fl_store_f16)
BIAS_BLOCK(bf16, uint16_t, fl_load_bf16, fl_store_bf16)


FL_INLINE void any_block(int32_t dtype, const void *from, void *to, int64_t first, const uint32_t *table, uint32_t base,
                         uint32_t b, int64_t count, uint32_t limit, float delta, int given) {
    if (dtype == FL_F32) block_f32(from, to, first, table, base, b, count, limit, delta, given);
    else if (dtype == FL_F16) block_f16(from, to, first, table, base, b, count, limit, delta, given);
    else block_bf16(from, to, first, table, base, b, count, limit, delta, given);
}

FL_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

/* left-hash and min-hash: one context state per row. */
FL_INLINE void hashed_row(int32_t dtype, const void *from, void *to, uint32_t a, uint32_t b, int64_t vocabulary,
                          uint32_t limit, float delta, uint32_t *table) {
    uint32_t c = 0;
    for (int64_t first = 0; first < vocabulary; first += BLOCK) {
        const uint32_t start = (uint32_t)first;
        if ((start & 0xFFFFu) == 0) {
            c = a ^ a >> 16 ^ start >> 16;
            FL_SIMD
            for (int i = 0; i < BLOCK; ++i) table[i] = ((uint32_t)i ^ (c & (BLOCK - 1))) * 0x7FEB352Du;
        }
        const uint32_t base = ((start ^ c) & ~(uint32_t)(BLOCK - 1)) * 0x7FEB352Du;
        any_block(dtype, from, to, first, table, base, b, least(BLOCK, vocabulary - first), limit, delta, 0);
    }
}

/* Words of count tokens from start on under (a, b); the span lies within 2^16 tokens that share start >> 16. */
FL_INLINE void words_of(uint32_t *word, uint32_t start, int count, uint32_t a, uint32_t b) {
    const uint32_t c = a ^ a >> 16 ^ start >> 16;
    FL_SIMD
    for (int i = 0; i < count; ++i) word[i] = finish(((start + (uint32_t)i) ^ c) * 0x7FEB352Du, b, 1);
}

/* A self-hash after three context tokens (a context width of four), in registers throughout. Either biases float32 logits
 * at once, or leaves the final words (exact = 0: their upper halves) for another pass. */
FL_INLINE void three_tokens(uint32_t *word, const uint32_t *shared, uint32_t start, int count, uint32_t kept[][2],
                            uint32_t a, uint32_t b, const float *in, float *out, uint32_t limit, float delta,
                            const int exact, const int at_once) {
    const uint32_t high = start >> 16, b0 = kept[0][1], b1 = kept[1][1], b2 = kept[2][1];
    const uint32_t c0 = kept[0][0] ^ kept[0][0] >> 16 ^ high, c1 = kept[1][0] ^ kept[1][0] >> 16 ^ high;
    const uint32_t c2 = kept[2][0] ^ kept[2][0] >> 16 ^ high;
    FL_SIMD
    for (int i = 0; i < count; ++i) { /* a 32-bit index: it is also a value */
        const uint32_t token = start + (uint32_t)i;
        const uint32_t w0 = finish((token ^ c0) * 0x7FEB352Du, b0, 1), w1 = finish((token ^ c1) * 0x7FEB352Du, b1, 1);
        const uint32_t w2 = finish((token ^ c2) * 0x7FEB352Du, b2, 1), w3 = shared[i];
        const uint32_t x = w0 < w1 ? w0 : w1, y = w2 < w3 ? w2 : w3;
        uint32_t h = (x < y ? x : y) ^ a;
        h ^= h >> 16;
        h = finish(h * 0x7FEB352Du, b, exact);
        if (at_once) out[i] = h < limit ? in[i] + delta : in[i];
        else word[i] = h;
    }
}

FL_CLONES FL_EXPORT void fl_watermark_bias(int64_t begin, int64_t end, const void *logits, int64_t logits_row,
                                           int32_t dtype, const int64_t *context, int64_t context_row,
                                           int64_t context_column, int64_t width, uint64_t key, uint32_t limit,
                                           float delta, int32_t scheme, const uint8_t *rows, int64_t rows_stride,
                                           void *out, int64_t out_row, int64_t vocabulary) {
    const int64_t size = dtype == FL_F32 ? 4 : 2;
    uint32_t empty[4], state[4], table[BLOCK], shared[SPAN], kept[KEPT][2];
    fl_context_state(empty, FL_DOMAIN_MIX32, key, context, 1, 0);
    for (int64_t row = begin; row < end; ++row) {
        const char *in = (const char *)logits + row * logits_row * size;
        char *to = (char *)out + row * out_row * size;
        const int64_t *tokens = context + row * context_row;
        if (rows != NULL && !rows[row * rows_stride]) {
            if (in != to) memmove(to, in, (size_t)(vocabulary * size));
            continue;
        }
        if (scheme == SELFHASH) continue;
        if (scheme == LEFTHASH) {
            fl_context_state(state, FL_DOMAIN_MIX32, key, tokens, context_column, width);
        } else {
            int64_t best = 0;
            uint32_t smallest = fl_mix32((uint32_t)tokens[0], empty[0], empty[1]);
            for (int64_t i = 1; i < width; ++i) {
                uint32_t candidate = fl_mix32((uint32_t)tokens[i * context_column], empty[0], empty[1]);
                if (candidate < smallest) smallest = candidate, best = i;
            }
            fl_context_state(state, FL_DOMAIN_MIX32, key, tokens + best * context_column, 1, 1);
        }
        hashed_row(dtype, in, to, state[0], state[1], vocabulary, limit, delta, table);
    }
    if (scheme != SELFHASH) return;
    /* self-hash: the words under the empty context are the same in every row, so rows share them span by span. */
    for (int64_t from = 0; from < vocabulary; from += SPAN) {
        const int64_t stop = least(from + SPAN, vocabulary);
        words_of(shared, (uint32_t)from, (int)(stop - from), empty[0], empty[1]);
        for (int64_t row = begin; row < end; ++row) {
            if (rows != NULL && !rows[row * rows_stride]) continue;
            const char *in = (const char *)logits + row * logits_row * size;
            char *to = (char *)out + row * out_row * size;
            const int64_t *tokens = context + row * context_row;
            for (int64_t first = from; first < stop; first += BLOCK) {
                const int count = (int)least(BLOCK, stop - first);
                if (width == 3) {
                    for (int64_t j = 0; j < 3 && first == from; ++j) {
                        fl_context_state(state, FL_DOMAIN_MIX32, key, tokens + j * context_column, 1, 1);
                        memcpy(kept[j], state, 8);
                    }
                    const uint32_t *known = shared + (first - from), at = (uint32_t)first;
                    const float *x = (const float *)in + first;
                    float *y = (float *)to + first;
                    const int at_once = dtype == FL_F32 && delta != INFINITY, exact = (limit & 0xFFFFu) != 0;
#define FL_THREE(E, O) three_tokens(table, known, at, count, kept, empty[0], empty[1], x, y, limit, delta, E, O)
                    if (exact && at_once) FL_THREE(1, 1);
                    else if (at_once) FL_THREE(0, 1);
                    else if (exact) FL_THREE(1, 0);
                    else FL_THREE(0, 0);
#undef FL_THREE
                    if (!at_once) any_block(dtype, in, to, first, table, 0, 0, count, limit, delta, 1);
                    continue;
                }
                memcpy(table, shared + (first - from), (size_t)count * 4);
                for (int64_t j = 0; j < width; ++j) {
                    if (j >= KEPT || first == from)
                        fl_context_state(state, FL_DOMAIN_MIX32, key, tokens + j * context_column, 1, 1);
                    if (j < KEPT && first == from) memcpy(kept[j], state, 8);
                    if (j < KEPT) memcpy(state, kept[j], 8);
                    const uint32_t start = (uint32_t)first, b = state[1];
                    const uint32_t c = state[0] ^ state[0] >> 16 ^ start >> 16;
                    FL_SIMD
                    for (int i = 0; i < count; ++i) {
                        uint32_t word = finish(((start + (uint32_t)i) ^ c) * 0x7FEB352Du, b, 1);
                        table[i] = word < table[i] ? word : table[i];
                    }
                }
                FL_SIMD
                for (int i = 0; i < count; ++i) table[i] = fl_mix32(table[i], empty[0], empty[1]);
                any_block(dtype, in, to, first, table, 0, 0, count, limit, delta, 1);
            }
        }
    }
}
