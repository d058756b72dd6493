// A tile of float32 sums becomes a part of the result.
#pragma once

#include "vec.h"

namespace mm::MM_ISA {

// out [rows, columns] = tile + bias [columns] + residual [rows, columns], each of which may be
// null. Rows of the tile lie `stride` apart, those of out and residual `out_stride`.
template <class T>
MM_INLINE void finish_tile(
    const float* tile, int64_t stride, int64_t rows, int64_t columns, const T* bias,
    const T* residual, T* out, int64_t out_stride) {
    for (int64_t i = 0; i < rows; ++i, tile += stride, out += out_stride) {
        int64_t j = 0;
        for (; j + W <= columns; j += W) {
            vf v = load(tile + j);
            if (bias != nullptr) v += load(bias + j);
            if (residual != nullptr) v += load(residual + j);
            store(out + j, v);
        }
        for (; j < columns; ++j) {
            float v = tile[j];
            if (bias != nullptr) v += widen(bias[j]);
            if (residual != nullptr) v += widen(residual[j]);
            narrow(v, out + j);
        }
        if (residual != nullptr) residual += out_stride;
    }
}

// A tile [rows, width] of the product that `args` asks for, whose first number is of `row` and
// `column`, to its place.
template <class T>
MM_INLINE void finish_part(
    const LinearArgs& args, const float* tile, int64_t width, int64_t row, int64_t rows,
    int64_t column) {
    const T* bias = static_cast<const T*>(args.bias);
    const T* residual = static_cast<const T*>(args.residual);
    const int64_t at = row * args.out_stride + column;
    finish_tile(
        tile, width, rows, min(width, args.n - column), bias == nullptr ? bias : bias + column,
        residual == nullptr ? residual : residual + at, static_cast<T*>(args.out) + at,
        args.out_stride);
}

}  // namespace mm::MM_ISA
