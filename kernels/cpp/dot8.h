// Sums of products of bytes: what quantised weights are multiplied with.
#pragma once

#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace mm::MM_ISA {

typedef int16_t vs __attribute__((vector_size(W * 4)));

// acc + for each 32 bits the sum of four products of a weight (from 0 to 15) and an activation
// (from -127 to 127).
MM_INLINE vi dot_nibbles(vi acc, vu weights, vu x);

// The same of weights from -127 to 127. Where the instructions take unsigned weights they are
// raised by SHIFT: then SHIFT times the activations' sum is to be taken off.
MM_INLINE vi dot_bytes(vi acc, vu weights, vu x);

// Where products of bytes come in pairs of 16 bits, those of a group are added as such: eight times
// two products of at most 15 * 127 stay below 2^15.
#define MM_PAIRS_OF_16 0

#if defined(__AVX512VNNI__) && !defined(MM_EMULATE)
constexpr int SHIFT = 128;
MM_INLINE vi dot_nibbles(vi acc, vu weights, vu x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, (__m512i)x);
}
MM_INLINE vi dot_bytes(vi acc, vu weights, vu x) {
    return dot_nibbles(acc, weights ^ 0x80808080u, x);
}
#elif defined(__AVX512BW__) && !defined(MM_EMULATE)
#undef MM_PAIRS_OF_16
#define MM_PAIRS_OF_16 1
constexpr int SHIFT = 0;
MM_INLINE vs pairs_of_nibbles(vu weights, vu x) {
    return (vs)_mm512_maddubs_epi16((__m512i)weights, (__m512i)x);
}
MM_INLINE vi sum_of_pairs(vs pairs) {
    return (vi)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1));
}
MM_INLINE vi dot_nibbles(vi acc, vu weights, vu x) {
    return acc + sum_of_pairs(pairs_of_nibbles(weights, x));
}
MM_INLINE vi dot_bytes(vi acc, vu weights, vu x) {
    // |w| times x with w's sign: unsigned by signed, and no pair's sum is beyond 16 bits.
    const __m512i w = (__m512i)weights, activations = (__m512i)x;
    const __mmask64 negative = _mm512_movepi8_mask(w);
    const __m512i turned =
        _mm512_mask_sub_epi8(activations, negative, _mm512_setzero_si512(), activations);
    return dot_nibbles(acc, (vu)_mm512_abs_epi8(w), (vu)turned);
}
#elif defined(__AVX2__) && !defined(MM_EMULATE)
#undef MM_PAIRS_OF_16
#define MM_PAIRS_OF_16 1
constexpr int SHIFT = 0;
MM_INLINE vs pairs_of_nibbles(vu weights, vu x) {
    return (vs)_mm256_maddubs_epi16((__m256i)weights, (__m256i)x);
}
MM_INLINE vi sum_of_pairs(vs pairs) {
    return (vi)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1));
}
MM_INLINE vi dot_nibbles(vi acc, vu weights, vu x) {
    return acc + sum_of_pairs(pairs_of_nibbles(weights, x));
}
MM_INLINE vi dot_bytes(vi acc, vu weights, vu x) {
    // |w| times x with w's sign: unsigned by signed, and no pair's sum is beyond 16 bits.
    const __m256i w = (__m256i)weights;
    return dot_nibbles(
        acc, (vu)_mm256_abs_epi8(w), (vu)_mm256_sign_epi8((__m256i)x, w));
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int SHIFT = 0;
MM_INLINE vi dot_bytes(vi acc, vu weights, vu x) {
    return (vi)vdotq_s32(
        (int32x4_t)acc, vreinterpretq_s8_u32((uint32x4_t)weights),
        vreinterpretq_s8_u32((uint32x4_t)x));
}
MM_INLINE vi dot_nibbles(vi acc, vu weights, vu x) { return dot_bytes(acc, weights, x); }
#else
constexpr int SHIFT = 0;
MM_INLINE vi dot_bytes(vi acc, vu weights, vu x) {
    for (int shift = 0; shift < 32; shift += 8)
        acc += ((vi)(weights << shift) >> 24) * ((vi)(x << shift) >> 24);
    return acc;
}
MM_INLINE vi dot_nibbles(vi acc, vu weights, vu x) { return dot_bytes(acc, weights, x); }
#endif

}  // namespace mm::MM_ISA
