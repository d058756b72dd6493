// x [M, K] by a packed weight of bfloat16, for many rows, on AMX.
//
// A panel's sixteen pairs of K are a tile as they lie. Rows of x are packed so that theirs are, too:
// sixteen rows of 32 numbers, zeros where there are no more. Two tiles of rows by two panels are four
// tiles of sums; with those of the rows and of the panels all eight are in use.
#pragma once

#include "amx.h"
#include "shares.h"
#include "tile.h"

#if MM_HAS_TILES

namespace mm::MM_ISA {
namespace {

constexpr int64_t TILE = 16;          // rows, and 32-bit numbers in a row
constexpr int64_t TILE_K = 2 * TILE;  // of K in a tile of x or of a panel
constexpr int64_t TILE_SIZE = TILE * TILE;
constexpr int64_t MANY_TILES = 24;    // tiles of rows that are packed at once,
constexpr int64_t TILES_TOGETHER = 6;  // and those that go through a panel together
constexpr int64_t PANELS_TOGETHER = 16;
constexpr int64_t BLOCK = 32;         // tiles by K whose rows stay in the second cache

// Adds (or, `fresh`, writes) the product of R tiles of rows, `a_next` numbers apart, and P panels
// over `count` tiles by K to `sums`, whose rows are `stride` apart.
template <int R, int P>
__attribute__((noinline)) void multiply_tiles(
    const uint32_t* a, int64_t a_next, const uint32_t* const* b, int64_t count, bool fresh,
    float* sums, int64_t stride) {
    const int64_t row = stride * static_cast<int64_t>(sizeof(float));
    asm volatile("" ::: "memory");  // what is loaded has been written: GCC isn't told that it is read
    if (fresh) {
        MM_TILE_ZERO(0);
        if constexpr (P == 2) MM_TILE_ZERO(1);
        if constexpr (R == 2) MM_TILE_ZERO(2);
        if constexpr (R == 2 && P == 2) MM_TILE_ZERO(3);
    } else {
        MM_TILE_LOAD(0, sums, row);
        if constexpr (P == 2) MM_TILE_LOAD(1, sums + TILE, row);
        if constexpr (R == 2) MM_TILE_LOAD(2, sums + TILE * stride, row);
        if constexpr (R == 2 && P == 2) MM_TILE_LOAD(3, sums + TILE * stride + TILE, row);
    }
    for (int64_t i = 0; i < count; ++i, a += TILE_SIZE) {
        MM_TILE_LOAD(4, a, 64);
        MM_TILE_LOAD(6, b[0] + i * TILE_SIZE, 64);
        MM_TILE_PRODUCT(0, 4, 6);
        if constexpr (P == 2) {
            MM_TILE_LOAD(7, b[1] + i * TILE_SIZE, 64);
            MM_TILE_PRODUCT(1, 4, 7);
        }
        if constexpr (R == 2) {
            MM_TILE_LOAD(5, a + a_next, 64);
            MM_TILE_PRODUCT(2, 5, 6);
            if constexpr (P == 2) MM_TILE_PRODUCT(3, 5, 7);
        }
    }
    MM_TILE_STORE(0, sums, row);
    if constexpr (P == 2) MM_TILE_STORE(1, sums + TILE, row);
    if constexpr (R == 2) MM_TILE_STORE(2, sums + TILE * stride, row);
    if constexpr (R == 2 && P == 2) MM_TILE_STORE(3, sums + TILE * stride + TILE, row);
}

MM_INLINE void multiply_tiles(
    int64_t r, int64_t p, const uint32_t* a, int64_t a_next, const uint32_t* const* b, int64_t count,
    bool fresh, float* sums, int64_t stride) {
    const auto multiply = r == 2 ? (p == 2 ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                 : (p == 2 ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
    multiply(a, a_next, b, count, fresh, sums, stride);
}

// Sixteen rows from `first` on, of which `rows` are there, to tiles [by_k, TILE, TILE].
MM_INLINE void pack_row_tiles(
    const bf16* first, int64_t stride, int64_t rows, int64_t k, int64_t by_k, uint32_t* out) {
    for (int64_t i = 0; i < TILE; ++i)
        for (int64_t t = 0; t < by_k; ++t) {
            uint32_t* to = out + t * TILE_SIZE + i * TILE;
            const int64_t left = i < rows ? min(TILE_K, k - t * TILE_K) : 0;
            if (left < TILE_K) __builtin_memset(to, 0, 64);
            if (left > 0)
                __builtin_memcpy(to, first + i * stride + t * TILE_K, left * sizeof(bf16));
        }
}

void linear_tiles(const LinearArgs& args) {
    const int64_t pairs = ceil_div(args.k, 2), by_k = ceil_div(pairs, TILE);
    const int64_t whole = pairs / TILE;  // tiles by K; a last one of fewer pairs may follow
    const int64_t panels = ceil_div(args.n, TILE);
    const uint32_t* packed = static_cast<const uint32_t*>(args.packed);
    const bf16* x = static_cast<const bf16*>(args.x);
    for (int64_t first_row = 0; first_row < args.m; first_row += MANY_TILES * TILE) {
        const int64_t rows = min(args.m - first_row, MANY_TILES * TILE);
        const int64_t row_tiles = ceil_div(rows, TILE), a_next = by_k * TILE_SIZE;
        uint32_t* a = static_cast<uint32_t*>(scratch(0, row_tiles * a_next * 4));
        parallel(row_tiles, [&](int64_t i) {
            const int64_t row = first_row + i * TILE;
            pack_row_tiles(
                x + row * args.x_stride, args.x_stride, min(TILE, args.m - row), args.k, by_k,
                a + i * a_next);
        });
        const int64_t groups = ceil_div(row_tiles, TILES_TOGETHER);
        const Shares shares = shares_of(panels, 2, PANELS_TOGETHER, 3);
        parallel(groups * shares.count, [&](int64_t index) {
            const int64_t tile = index % groups * TILES_TOGETHER;
            const int64_t tiles = min(row_tiles - tile, TILES_TOGETHER);
            const int64_t panel = shares.starts[index / groups];
            const int64_t count = shares.size(index / groups), width = count * TILE;
            float* sums = static_cast<float*>(scratch(1, tiles * TILE * width * sizeof(float)));
            uint32_t* last = static_cast<uint32_t*>(scratch(2, 2 * TILE_SIZE * 4));
            use_tiles();
            for (int64_t from = 0; from < by_k; from += BLOCK)
                for (int64_t p = 0; p < count; p += 2) {
                    const int64_t together = min(2, count - p);
                    const uint32_t *b[2], *rest[2];
                    for (int64_t q = 0; q < together; ++q) {
                        b[q] = packed + (panel + p + q) * pairs * TILE + from * TILE_SIZE;
                        rest[q] = last + q * TILE_SIZE;
                    }
                    const int64_t full = min(BLOCK, whole - from);
                    const bool has_rest = whole < by_k && from + BLOCK >= by_k;
                    if (has_rest) {  // what lies behind a panel is another's
                        __builtin_memset(last, 0, 2 * TILE_SIZE * 4);
                        for (int64_t q = 0; q < together; ++q)
                            __builtin_memcpy(
                                last + q * TILE_SIZE, b[q] + full * TILE_SIZE,
                                (pairs - whole * TILE) * TILE * 4);
                    }
                    for (int64_t t = 0; t < tiles; t += 2) {
                        const int64_t r = min(2, tiles - t);
                        const uint32_t* a_at = a + (tile + t) * a_next + from * TILE_SIZE;
                        float* at = sums + t * TILE * width + p * TILE;
                        if (full > 0)
                            multiply_tiles(
                                r, together, a_at, a_next, b, full, from == 0, at, width);
                        if (has_rest)
                            multiply_tiles(
                                r, together, a_at + full * TILE_SIZE, a_next, rest, 1,
                                from + full == 0, at, width);
                    }
                }
            release_tiles();
            finish_part<bf16>(
                args, sums, width, first_row + tile * TILE, min(rows - tile * TILE, tiles * TILE),
                panel * TILE);
        });
    }
}

}  // namespace
}  // namespace mm::MM_ISA

#endif
