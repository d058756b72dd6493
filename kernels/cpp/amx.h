// The tiles of AMX: eight squares of 16 rows of 64 bytes, and products of bfloat16 between them.
//
// In C++ as well (MM_EMULATE_TILES), for tests on a CPU that has none.
#pragma once

#include "vec.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#define MM_HAS_TILES 1
#define MM_TILE_ZERO(t) _tile_zero(t)
#define MM_TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define MM_TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define MM_TILE_PRODUCT(c, a, b) _tile_dpbf16ps(c, a, b)

namespace mm::MM_ISA {

// A thread's tiles are all whole, from here to `release_tiles`.
MM_INLINE void use_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // GCC's intrinsics don't tell it all that they read.
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}
MM_INLINE void release_tiles() { _tile_release(); }

}  // namespace mm::MM_ISA
#elif defined(MM_EMULATE_TILES)
#define MM_HAS_TILES 1
#define MM_TILE_ZERO(t) tile_zero(t)
#define MM_TILE_LOAD(t, from, stride) tile_load(t, from, stride)
#define MM_TILE_STORE(t, to, stride) tile_store(t, to, stride)
#define MM_TILE_PRODUCT(c, a, b) tile_product(c, a, b)

namespace mm::MM_ISA {

struct EmulatedTiles {
    uint32_t at[8][16][16];
    bool in_use;
};
static thread_local EmulatedTiles emulated_tiles;

MM_INLINE uint32_t (&tile(int t))[16][16] {
    if (!emulated_tiles.in_use) __builtin_trap();  // as a CPU does that wasn't told their shape
    return emulated_tiles.at[t];
}
MM_INLINE void use_tiles() {
    __builtin_memset(&emulated_tiles, 0xff, sizeof emulated_tiles);  // NaN, until it is written
    emulated_tiles.in_use = true;
}
MM_INLINE void release_tiles() { emulated_tiles.in_use = false; }
MM_INLINE void tile_zero(int t) { __builtin_memset(tile(t), 0, 1024); }
MM_INLINE void tile_load(int t, const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i)
        __builtin_memcpy(tile(t)[i], static_cast<const char*>(from) + i * stride, 64);
}
MM_INLINE void tile_store(int t, void* to, int64_t stride) {
    for (int i = 0; i < 16; ++i)
        __builtin_memcpy(static_cast<char*>(to) + i * stride, tile(t)[i], 64);
}
// c[m][n] += a[m][k] times b[k][n], each of two bfloat16, which are added.
MM_INLINE void tile_product(int c, int a, int b) {
    auto half = [](uint32_t pair, int which) {
        return widen(bf16{static_cast<uint16_t>(which ? pair >> 16 : pair)});
    };
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float sum;
            __builtin_memcpy(&sum, &tile(c)[m][n], 4);
            for (int k = 0; k < 16; ++k)
                for (int which = 0; which < 2; ++which)
                    sum += half(tile(a)[m][k], which) * half(tile(b)[k][n], which);
            __builtin_memcpy(&tile(c)[m][n], &sum, 4);
        }
}

}  // namespace mm::MM_ISA
#else
#define MM_HAS_TILES 0
#endif
