// Dot products of pairs of bfloat16, where the instruction set has them.
#pragma once

#include "vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#define MM_HAS_DOT 1
namespace mm::MM_ISA {
// acc + the products of each pair of `w` with that of `a`. Subnormals count as zero.
MM_INLINE vf dot(vf acc, vu w, vu a) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)a);
}
}  // namespace mm::MM_ISA
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#define MM_HAS_DOT 1
namespace mm::MM_ISA {
MM_INLINE vf dot(vf acc, vu w, vu a) {
    return (vf)vbfdotq_f32(
        (float32x4_t)acc, vreinterpretq_bf16_u32((uint32x4_t)w),
        vreinterpretq_bf16_u32((uint32x4_t)a));
}
}  // namespace mm::MM_ISA
#elif defined(MM_EMULATE)
#define MM_HAS_DOT 1
namespace mm::MM_ISA {
MM_INLINE vf dot(vf acc, vu w, vu a) {
    return acc + (vf)(w << 16) * (vf)(a << 16) + (vf)(w & 0xffff0000u) * (vf)(a & 0xffff0000u);
}
}  // namespace mm::MM_ISA
#else
#define MM_HAS_DOT 0
#endif
