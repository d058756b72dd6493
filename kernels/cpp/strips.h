// Packs rows by strips: M rows whose numbers lie together by K, as the kernels of `linear` and of
// attention take them. A number is a float32, or a pair of bfloat16 that are neighbours in K.
#pragma once

#include "transpose.h"
#include "vec.h"

namespace mm::MM_ISA {

// Numbers of `count` steps of M rows to `out` [count, M]: one(i, step), or `vector(i, step)` for
// those of W steps from there on.
template <int M, class A, class One, class Vector>
MM_INLINE void pack_steps(int64_t count, const One& one, const Vector& vector, A* out) {
    int64_t step = 0;
    if constexpr (M > 2 && M <= W) {
        // A vector that is stored reaches past its step's M numbers: what comes next overwrites
        // that, and the last ones of a strip are written one by one.
        for (; (step + W - 1) * M + W <= count * M; step += W) {
            vu r[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) r[i] = i < M ? vector(i < M ? i : 0, step) : vu{};
            transpose(r);
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j) store_as(out + (step + j) * M, r[j]);
        }
    }
    for (; step < count; ++step)
        for (int i = 0; i < M; ++i) out[step * M + i] = one(i, step);
}

// M rows, each where row(i) says, from `from` to `to` of K, and zeros from there to `even_to`.
template <int M, class Row>
MM_INLINE void pack_rows(const Row& row, int64_t from, int64_t to, int64_t even_to, float* out) {
    pack_steps<M>(
        to - from, [&](int i, int64_t step) { return widen(row(i)[from + step]); },
        [&](int i, int64_t step) { return (vu)load(row(i) + from + step); }, out);
    out += (to - from) * M;
    for (int64_t i = 0; i < (even_to - to) * M; ++i) *out++ = 0;
}

template <int M, class Row>
MM_INLINE void pack_rows(const Row& row, int64_t from, int64_t to, int64_t, uint32_t* out) {
    const int64_t pairs = (to - from) / 2;
    pack_steps<M>(
        pairs, [&](int i, int64_t step) { return load_as<uint32_t>(row(i) + from + 2 * step); },
        [&](int i, int64_t step) { return load_as<vu>(row(i) + from + 2 * step); }, out);
    if ((to - from) % 2)
        for (int i = 0; i < M; ++i) out[pairs * M + i] = row(i)[to - 1].bits;
}

// The same of `m` rows, at most M.
template <int M, class Row, class A>
MM_INLINE void pack_strip(
    int64_t m, const Row& row, int64_t from, int64_t to, int64_t even_to, A* out) {
    if constexpr (M > 1)
        if (m < M) return pack_strip<M - 1>(m, row, from, to, even_to, out);
    pack_rows<M>(row, from, to, even_to, out);
}

}  // namespace mm::MM_ISA
