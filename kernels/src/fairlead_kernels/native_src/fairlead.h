/* What every kernel.c shares: export and clone macros, 16-bit floats, vector-friendly expf/logf, Philox and mix32.
 * Everything is static inline so that each clone of a kernel gets its own copy in its own instruction set. */
#ifndef FAIRLEAD_H
#define FAIRLEAD_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_MSC_VER)
#define FL_EXPORT __declspec(dllexport)
#define FL_INLINE static __forceinline
#define FL_NOINLINE static __declspec(noinline)
#define FL_RESTRICT __restrict
#define FL_SIMD
#else
#define FL_EXPORT __attribute__((visibility("default")))
#define FL_INLINE static inline __attribute__((always_inline))
#define FL_NOINLINE static __attribute__((noinline))
#define FL_RESTRICT restrict
#define FL_SIMD _Pragma("omp simd")
#endif

/* FL_CLONES before a hot function: compiled for AVX-512, AVX2 and the baseline, chosen when the library is loaded.
 * Needs gcc's ifunc, so glibc on x86-64; elsewhere the baseline alone. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define FL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FL_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#endif
#else
#define FL_CLONES
#endif

/* Storage types, as native.DTYPE_CODES numbers them. */
enum { FL_F32 = 0, FL_F16 = 1, FL_BF16 = 2, FL_F64 = 3 };

FL_INLINE float fl_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

FL_INLINE uint32_t fl_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

FL_INLINE float fl_load_bf16(uint16_t bits) { return fl_from_bits((uint32_t)bits << 16); }

FL_INLINE uint16_t fl_store_bf16(float value) { /* round to nearest even; NaN stays a quiet NaN */
    uint32_t bits = fl_to_bits(value);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}

/* Integer arithmetic with selects instead of _Float16, whose conversions gcc 12 leaves scalar. */
FL_INLINE float fl_load_f16(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, size = (uint32_t)(bits & 0x7FFFu) << 13;
    uint32_t scaled = fl_to_bits(fl_from_bits(size) * 5.192296858534828e33f); /* 2^112 moves the exponent's bias */
    return fl_from_bits(sign | (size >= 0x0F800000u ? size | 0x7F800000u : scaled));
}

FL_INLINE uint16_t fl_store_f16(float value) { /* round to nearest even; NaN becomes a quiet NaN */
    uint32_t bits = fl_to_bits(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7FFFFFFFu;
    uint32_t small = fl_to_bits(fl_from_bits(size) + 0.5f) - 0x3F000000u; /* subnormal: the addition rounds */
    uint32_t normal = (size + 0xFFFu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
    uint32_t half = size < 0x38800000u ? small : normal;
    half = size >= 0x47800000u ? 0x7C00u : half;
    half = size > 0x7F800000u ? 0x7E00u : half;
    return (uint16_t)(sign | half);
}

/* exp and log without calls, so that loops over them become vector code. Relative error below 2e-7 (exp) and 3e-7 (log).
 * exp: -inf -> 0, NaN -> NaN, above 88.72 -> inf. log: 0 -> -inf, subnormals count as 0, inf -> inf, below 0 -> NaN. */
FL_INLINE float fl_expf(float x) {
    float bounded = x > 88.7f ? 88.7f : x; /* two plain selects: a nested one costs the vector code masks */
    bounded = bounded < -87.3f ? -87.3f : bounded;
    float power = (bounded * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    float rest = (bounded - power * 0.693359375f) + power * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    float value = sum * fl_from_bits((uint32_t)((int32_t)power + 127) << 23);
    value = x < -87.3f ? 0.0f : value;
    value = x > 88.7228f ? INFINITY : value;
    return value; /* NaN has come through the polynomial */
}

/* fl_expf of what is at most 0, or NaN: half of its selects fall away. For sums of exp(x - largest). */
FL_INLINE float fl_expf_below(float x) {
    const float bounded = x < -87.3f ? -87.3f : x;
    const float power = (bounded * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    const float rest = (bounded - power * 0.693359375f) + power * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const float value = sum * fl_from_bits((uint32_t)((int32_t)power + 127) << 23);
    return x < -87.3f ? 0.0f : value;
}

FL_INLINE float fl_logf(float x) {
    uint32_t bits = fl_to_bits(x);
    int32_t power = (int32_t)(bits - 0x3F3504F3u) >> 23; /* mantissa into [sqrt(1/2), sqrt 2) */
    float rest = fl_from_bits(bits - ((uint32_t)power << 23)) - 1.0f;
    float square = rest * rest, scale = (float)power;
    float sum = 7.0376836292e-2f;
    sum = sum * rest - 1.1514610310e-1f;
    sum = sum * rest + 1.1676998740e-1f;
    sum = sum * rest - 1.2420140846e-1f;
    sum = sum * rest + 1.4249322787e-1f;
    sum = sum * rest - 1.6668057665e-1f;
    sum = sum * rest + 2.0000714765e-1f;
    sum = sum * rest - 2.4999993993e-1f;
    sum = sum * rest + 3.3333331174e-1f;
    float value = sum * rest * square + scale * -2.12194440e-4f - 0.5f * square + rest + scale * 0.693359375f;
    value = x < 1.17549435e-38f ? -INFINITY : value;
    value = x < 0.0f ? NAN : value;
    return (x != x || x == INFINITY) ? x : value;
}

/* Philox-4x32-10 (Salmon et al. 2011) on four uint32_t variables, in place. Written out and on variables, because gcc
 * vectorises neither a loop within a loop nor a small array: in vector loops use this, not fl_philox. */
#define FL_PHILOX_ROUND(c0, c1, c2, c3, KEY0, KEY1)                                                   \
    do {                                                                                              \
        const uint64_t fl_left = (uint64_t)0xD2511F53u * c0, fl_right = (uint64_t)0xCD9E8D57u * c2;   \
        c0 = (uint32_t)(fl_right >> 32) ^ c1 ^ (uint32_t)(KEY0);                                      \
        c1 = (uint32_t)fl_right;                                                                      \
        c2 = (uint32_t)(fl_left >> 32) ^ c3 ^ (uint32_t)(KEY1);                                       \
        c3 = (uint32_t)fl_left;                                                                       \
    } while (0)
#define FL_PHILOX(c0, c1, c2, c3, key0, key1) \
    do { \
        FL_PHILOX_ROUND(c0, c1, c2, c3, (key0) + 0x00000000u, (key1) + 0x00000000u); \
        FL_PHILOX_ROUND(c0, c1, c2, c3, (key0) + 0x9E3779B9u, (key1) + 0xBB67AE85u); \
        FL_PHILOX_ROUND(c0, c1, c2, c3, (key0) + 0x3C6EF372u, (key1) + 0x76CF5D0Au); \
        FL_PHILOX_ROUND(c0, c1, c2, c3, (key0) + 0xDAA66D2Bu, (key1) + 0x32370B8Fu); \
        FL_PHILOX_ROUND(c0, c1, c2, c3, (key0) + 0x78DDE6E4u, (key1) + 0xED9EBA14u); \
        FL_PHILOX_ROUND(c0, c1, c2, c3, (key0) + 0x1715609Du, (key1) + 0xA9066899u); \
        FL_PHILOX_ROUND(c0, c1, c2, c3, (key0) + 0xB54CDA56u, (key1) + 0x646E171Eu); \
        FL_PHILOX_ROUND(c0, c1, c2, c3, (key0) + 0x5384540Fu, (key1) + 0x1FD5C5A3u); \
        FL_PHILOX_ROUND(c0, c1, c2, c3, (key0) + 0xF1BBCDC8u, (key1) + 0xDB3D7428u); \
        FL_PHILOX_ROUND(c0, c1, c2, c3, (key0) + 0x8FF34781u, (key1) + 0x96A522ADu); \
    } while (0)

FL_INLINE void fl_philox(uint32_t state[4], uint32_t key0, uint32_t key1) {
    uint32_t c0 = state[0], c1 = state[1], c2 = state[2], c3 = state[3];
    FL_PHILOX(c0, c1, c2, c3, key0, key1);
    state[0] = c0;
    state[1] = c1;
    state[2] = c2;
    state[3] = c3;
}

#define FL_DOMAIN_PHILOX 0x574D4358u /* context state of the function "philox" */
#define FL_DOMAIN_MIX32 0x464C4731u  /* context state of the function "mix32" */
#define FL_DOMAIN_TOKEN 0x574D544Bu  /* token words of the function "philox" */

/* The state of a context: its tokens absorbed in blocks of four. Token i is context[i * stride]; -1 = missing. */
FL_INLINE void fl_context_state(uint32_t state[4], uint32_t domain, uint64_t key, const int64_t *context, int64_t stride,
                                int64_t width) {
    uint32_t key0 = (uint32_t)key, key1 = (uint32_t)(key >> 32);
    state[0] = domain;
    state[1] = (uint32_t)width;
    state[2] = 0;
    state[3] = 0;
    if (width == 0) fl_philox(state, key0, key1);
    for (int64_t offset = 0; offset < width; offset += 4) {
        for (int64_t i = 0; i < 4; ++i)
            state[i] ^= offset + i < width ? (uint32_t)context[(offset + i) * stride] : 0xFFFFFFFFu - (uint32_t)i;
        fl_philox(state, key0 ^ (uint32_t)offset, key1);
    }
}

/* The four words of tokens 4*block .. 4*block+3 under a "philox" context state. */
FL_INLINE void fl_philox_words(uint32_t words[4], const uint32_t state[4], uint64_t key, uint32_t block) {
    words[0] = block;
    words[1] = state[0];
    words[2] = state[1];
    words[3] = state[2];
    fl_philox(words, (uint32_t)key ^ state[3], (uint32_t)(key >> 32) ^ FL_DOMAIN_TOKEN);
}

FL_INLINE uint32_t fl_scramble(uint32_t h) {
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    h ^= h >> 16;
    return h;
}

/* The word of a token under a "mix32" context state (a, b) = its first two words. */
FL_INLINE uint32_t fl_mix32(uint32_t token, uint32_t a, uint32_t b) { return fl_scramble(fl_scramble(token ^ a) + b); }

/* One block of window states: `have` tokens of the block exist, `begun` says that s0..s3 hold a state already. */
FL_INLINE void fl_window_block(uint32_t *s0, uint32_t *s1, uint32_t *s2, uint32_t *s3, uint32_t domain, uint32_t width,
                               uint32_t key0, uint32_t key1, const uint32_t *next, int64_t windows, const int have,
                               const int begun) {
    FL_SIMD
    for (int64_t t = 0; t < windows; ++t) {
        uint32_t c0 = begun ? s0[t] : domain, c1 = begun ? s1[t] : width, c2 = begun ? s2[t] : 0, c3 = begun ? s3[t] : 0;
        if (have > 0) {
            c0 ^= next[t];
            c1 ^= have > 1 ? next[t + 1] : 0xFFFFFFFEu;
            c2 ^= have > 2 ? next[t + 2] : 0xFFFFFFFDu;
            c3 ^= have > 3 ? next[t + 3] : 0xFFFFFFFCu;
        }
        FL_PHILOX(c0, c1, c2, c3, key0, key1);
        s0[t] = c0, s1[t] = c1, s2[t] = c2, s3[t] = c3;
    }
}

/* The state of every window of `width` tokens: window t is tokens[t] .. tokens[t + width - 1]; vector code over t. */
FL_INLINE void fl_window_states(uint32_t *s0, uint32_t *s1, uint32_t *s2, uint32_t *s3, uint32_t domain, uint64_t key,
                                const uint32_t *tokens, int64_t width, int64_t windows) {
    const uint32_t high = (uint32_t)(key >> 32), w = (uint32_t)width;
    for (int64_t offset = 0; offset == 0 || offset < width; offset += 4) {
        const uint32_t low = (uint32_t)key ^ (uint32_t)offset, *next = tokens + offset;
        const int have = width - offset < 4 ? (int)(width - offset) : 4;
#define FL_BLOCK(HAVE, BEGUN) fl_window_block(s0, s1, s2, s3, domain, w, low, high, next, windows, HAVE, BEGUN)
        if (offset == 0 && have == 0) FL_BLOCK(0, 0);
        else if (offset == 0 && have == 1) FL_BLOCK(1, 0);
        else if (offset == 0 && have == 2) FL_BLOCK(2, 0);
        else if (offset == 0 && have == 3) FL_BLOCK(3, 0);
        else if (offset == 0) FL_BLOCK(4, 0);
        else if (have == 1) FL_BLOCK(1, 1);
        else if (have == 2) FL_BLOCK(2, 1);
        else if (have == 3) FL_BLOCK(3, 1);
        else FL_BLOCK(4, 1);
#undef FL_BLOCK
    }
}

/* A set of 64-bit fingerprints by open addressing; `slots` has 1 << bits places, all 0 at first, at least twice as many
 * as items. Returns 1 when the item was not in it before. */
FL_INLINE int fl_set_add(uint64_t *slots, int bits, uint64_t item) {
    const uint64_t last = ((uint64_t)1 << bits) - 1;
    item = item == 0 ? 0x9E3779B97F4A7C15u : item;
    uint64_t at = (item * 0x9E3779B97F4A7C15u) >> (64 - bits);
    while (slots[at] != 0) {
        if (slots[at] == item) return 0;
        at = (at + 1) & last;
    }
    slots[at] = item;
    return 1;
}

/* The fingerprint of (context, token) from the first two words of the context's state. */
FL_INLINE uint64_t fl_fingerprint(uint32_t s0, uint32_t s1, uint32_t token) {
    return ((uint64_t)s0 << 32 | s1) + (uint64_t)token * 0x9E3779B97F4A7C15u;
}

#endif
