// Transposes a square of 32-bit numbers in registers.
#pragma once

#include "vec.h"

namespace mm::MM_ISA {
namespace {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef MM_SHUFFLE  // GCC before 12
#define MM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vu{static_cast<uint32_t>(__VA_ARGS__)})
#endif

// Shuffles within each four lanes: what x86 does in one step. PART: the lower or the upper half.
template <int PART, int... J>
MM_INLINE vu zip_ones(vu a, vu b, Lanes<J...>) {
    return MM_SHUFFLE(a, b, (J / 4 * 4 + PART * 2 + J % 4 / 2 + J % 2 * W)...);
}
template <int PART, int... J>
MM_INLINE vu zip_twos(vu a, vu b, Lanes<J...>) {
    return MM_SHUFFLE(a, b, (J / 4 * 4 + PART * 2 + J % 2 + J % 4 / 2 * W)...);
}
// The lower or upper half of a, then that of b.
template <int PART, int... J>
MM_INLINE vu halves(vu a, vu b, Lanes<J...>) {
    return __builtin_shufflevector(a, b, (PART * W / 2 + J % (W / 2) + J / (W / 2) * W)...);
}
// The even or odd ones of the fours of a, then those of b.
template <int PART, int... J>
MM_INLINE vu every_other_four(vu a, vu b, Lanes<J...>) {
    return MM_SHUFFLE(
        a, b, (PART * 4 + J % 4 + J % (W / 2) / 4 * 8 + J / (W / 2) * W)...);
}

// Transposes W rows of W numbers.
MM_INLINE void transpose(vu (&r)[W]) {
    constexpr AllLanes all{};
    vu t[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 4) {
        const vu a = zip_ones<0>(r[i], r[i + 1], all), b = zip_ones<1>(r[i], r[i + 1], all);
        const vu c = zip_ones<0>(r[i + 2], r[i + 3], all), d = zip_ones<1>(r[i + 2], r[i + 3], all);
        t[i] = zip_twos<0>(a, c, all);
        t[i + 1] = zip_twos<1>(a, c, all);
        t[i + 2] = zip_twos<0>(b, d, all);
        t[i + 3] = zip_twos<1>(b, d, all);
    }
    // Now t[4 g + c] has, for each four L of its lanes, column 4 L + c of the rows 4 g to 4 g + 3.
#pragma GCC unroll 16
    for (int c = 0; c < 4; ++c) {
        if constexpr (W == 4) {
            r[c] = t[c];
        } else if constexpr (W == 8) {
            r[c] = halves<0>(t[c], t[4 + c], all);
            r[4 + c] = halves<1>(t[c], t[4 + c], all);
        } else {
            const vu low = halves<0>(t[c], t[4 + c], all), high = halves<1>(t[c], t[4 + c], all);
            const vu low2 = halves<0>(t[8 + c], t[12 + c], all);
            const vu high2 = halves<1>(t[8 + c], t[12 + c], all);
            r[c] = every_other_four<0>(low, low2, all);
            r[4 + c] = every_other_four<1>(low, low2, all);
            r[8 + c] = every_other_four<0>(high, high2, all);
            r[12 + c] = every_other_four<1>(high, high2, all);
        }
    }
}

}  // namespace
}  // namespace mm::MM_ISA
