// Vectors of the instruction set that this file is compiled for, in the compiler's own vector
// types: the same source serves every set, and the intrinsics stay where no such type reaches.
//
// Files that are compiled once for each set take nothing from C++'s library: the linker would
// merge an inline function of it across sets, and run one set's code on a CPU without it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "ops.h"

#define MM_INLINE static inline __attribute__((always_inline))

namespace mm::MM_ISA {

#if defined(__AVX512F__) || defined(MM_EMULATE)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};

template <class T, class P>
MM_INLINE T load_as(const P* p) {
    T v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class T, class P>
MM_INLINE void store_as(P* p, T v) {
    __builtin_memcpy(p, &v, sizeof v);
}

MM_INLINE vf splat(float x) { return x - vf{}; }

MM_INLINE float widen(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}
MM_INLINE float widen(float x) { return x; }

// To the nearest, ties to even; NaN stays NaN.
MM_INLINE void narrow(float x, bf16* out) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if (x != x) {
        out->bits = static_cast<uint16_t>(bits >> 16 | 0x40);
    } else {
        out->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
MM_INLINE void narrow(float x, float* out) { *out = x; }

MM_INLINE vf load(const float* p) { return load_as<vf>(p); }
MM_INLINE vf load(const bf16* p) {
    const vh v = load_as<vh>(p);
    // The intrinsics are one instruction each; GCC makes five of the conversion. (The one with a
    // mask, since GCC 12 warns of its own header about the one without.)
#if defined(__AVX512F__) && !defined(MM_EMULATE)
    const vu words = (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__) && !defined(MM_EMULATE)
    const vu words = (vu)_mm256_cvtepu16_epi32((__m128i)v);
#else
    const vu words = __builtin_convertvector(v, vu);
#endif
    return (vf)(words << 16);
}
MM_INLINE void store(float* p, vf v) { store_as(p, v); }
MM_INLINE vu bf16_bits(vf v) {
    const vu bits = (vu)v;
    const vu nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const vu quiet = bits >> 16 | 0x40;
    const vu is_nan = (vu)(v != v);
    return (quiet & is_nan) | (nearest & ~is_nan);
}
MM_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__) && !defined(MM_EMULATE)
    store_as(p, _mm512_cvtneps_pbh((__m512)v));  // Subnormals become zero.
#else
    store_as(p, __builtin_convertvector(bf16_bits(v), vh));
#endif
}

// What would be loaded if v had been stored as T. For v that was computed from such: the lower
// half of a NaN is then 0, and the rounding can't carry out of it.
template <class T>
MM_INLINE vf rounded(vf v) {
    if constexpr (!__is_same(T, bf16)) return v;
    const vu bits = (vu)v;
    return (vf)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

MM_INLINE vf select(vi mask, vf yes, vf no) {
    return (vf)(((vi)yes & mask) | ((vi)no & ~mask));
}
MM_INLINE vf max(vf a, vf b) { return a > b ? a : b; }  // b where one is NaN
MM_INLINE vf min(vf a, vf b) { return a < b ? a : b; }  // likewise
MM_INLINE float max(float a, float b) { return a > b ? a : b; }
MM_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
MM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The numbers of a vector, for packs of them.
template <int... J>
struct Lanes {};
#if defined(__AVX512F__) || defined(MM_EMULATE)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = Lanes<0, 1, 2, 3>;
#endif

// Neighbours change places with neighbours, WIDTH at a time.
template <int WIDTH, int... J>
MM_INLINE vf swapped(vf v, Lanes<J...>) {
    return __builtin_shufflevector(v, v, (J ^ WIDTH)...);
}

// One number of all: the halves are brought together, then the halves of that.
template <class F>
MM_INLINE float fold(vf v, const F& together) {
    constexpr AllLanes all{};
    if constexpr (W > 8) v = together(swapped<8>(v, all), v);
    if constexpr (W > 4) v = together(swapped<4>(v, all), v);
    v = together(swapped<2>(v, all), v);
    return together(swapped<1>(v, all), v)[0];
}
MM_INLINE float sum(vf v) {
    return fold(v, [](vf a, vf b) { return a + b; });
}
MM_INLINE float largest(vf v) {
    return fold(v, [](vf a, vf b) { return max(a, b); });
}

#if defined(__AVX512F__) && !defined(MM_EMULATE)
#define MM_HAS_SCALE 1
// The nearest whole number, and p times 2^n for a whole n; as in `load`, with a mask for GCC.
MM_INLINE vf nearest(vf x) {
    constexpr int NEAREST = 8;  // _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC
    return (vf)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, NEAREST);
}
MM_INLINE vf scale(vf p, vf n) {
    return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
}
#else
#define MM_HAS_SCALE 0
#endif

// e^x to within 2 units in the last place: 2^n * 2^f with |f| <= 1/2, the second by the Taylor
// series of e^(f ln 2) (its error at 1/2 is 1e-8). Infinity above 88.7, NaN stays; below -86.6 it is
// 0 or, where the instructions scale, what is left of it.
MM_INLINE vf exp(vf x) {
#if MM_HAS_SCALE
    x = max(splat(-125.0f), min(splat(90.0f), x));  // infinity less itself would be NaN
    const vf n = nearest(x * 1.44269504088896341f);
#else
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const vf scaled = x * 1.44269504088896341f;
    const vf shifted = max(splat(-125.0f), min(splat(128.0f), scaled)) + magic;
    const vf n = shifted - magic;
#endif
    // x - n ln 2 in two steps: ln 2's upper bits times n are exact.
    const vf r = (x - n * 0.693145751953125f) - n * 1.42860677e-6f;
    vf p = splat(2.0f / 5040.0f);
    p = p * r + 2.0f / 720.0f;
    p = p * r + 2.0f / 120.0f;
    p = p * r + 2.0f / 24.0f;
    p = p * r + 2.0f / 6.0f;
    p = p * r + 1.0f;
    p = p * r + 2.0f;
    p = p * r + 2.0f;
#if MM_HAS_SCALE
    return scale(p, n - 1.0f);
#else
    // Twice the series by 2^(n - 1), as n = 128 is beyond what one float's exponent holds. Above
    // 88.7 the series is at least that of 0, and overflows; NaN went through it.
    const vf power = (vf)(((vi)shifted - (vi)magic + 126) << 23);
    return select(x < -86.64340f, vf{}, p * power);
#endif
}

}  // namespace mm::MM_ISA
