// x [M, K] by a weight of 8 or 4 bits, whose 32 neighbours in K share a scale; x is quantised to
// 8 bits on the way, 32 neighbours of a row by their largest. (As llama.cpp's Q8_0 and Q4_0 do.)
//
// A result's terms are summed in one order, whatever the number of rows: a row's result doesn't
// depend on its neighbours. See pack.h for the layout.
#include "dot8.h"
#include "thread_pool.h"
#include "tile.h"

namespace mm::MM_ISA {
namespace {

constexpr int PANEL = 16, NV = PANEL / W;
constexpr int GROUP = 32, STEPS = GROUP / 4;  // of K; 32 bits of activations hold four
#if defined(__AVX512F__) || defined(MM_EMULATE)
constexpr int MR = 6, MAX_P = 2;  // 12 vectors of whole numbers and 12 of sums
#elif defined(__AVX2__)
constexpr int MR = 2, MAX_P = 1;  // 4 and 4 of 16 registers
#elif defined(__aarch64__)
constexpr int MR = 3, MAX_P = 1;
#else
constexpr int MR = 1, MAX_P = 1;
#endif
// Bytes of weight that a thread claims: a few shares for each thread, within these. At the start of
// each its first lines aren't there yet.
constexpr int64_t MIN_CHUNK = 1 << 15, MAX_CHUNK = 1 << 18, SHARES = 4;
constexpr int64_t MAX_PANELS = 64;   // of a chunk, as their results are held in between
constexpr int64_t AHEAD = 1024;      // words of weight that are asked for before they are used
constexpr int64_t MANY_ROWS = 48;    // of which a panel is read once
constexpr int64_t MAX_ROWS = 1024;   // quantised at once
constexpr int64_t ALONE = 1 << 13;   // numbers that one thread quantises sooner than it wakes another

// A strip's activations: [groups][STEPS][m] of four bytes, and for each group and row the scale
// and what is to be taken off the whole number that comes out.
struct Strip {
    const uint32_t* x;
    const float* scales;
    const float* offsets;
};

struct Bytes {
    static constexpr int WORDS = STEPS * PANEL;  // 32-bit words of a panel's group
    static constexpr float OFFSET = SHIFT;
    template <int M, int V>
    MM_INLINE void add(const uint32_t* const* w, const uint32_t* x, vi (&sums)[M][V]) {
        for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) {
                const vu weights = load_as<vu>(w[j / NV] + step * PANEL + j % NV * W);
#pragma GCC unroll 6
                for (int i = 0; i < M; ++i)
                    sums[i][j] = dot_bytes(sums[i][j], weights, x[step * M + i] + vu{});
            }
    }
};

struct Nibbles {
    static constexpr int WORDS = STEPS / 2 * PANEL;
    static constexpr float OFFSET = 8;
    template <int M, int V>
    MM_INLINE void add(const uint32_t* const* w, const uint32_t* x, vi (&sums)[M][V]) {
#if MM_PAIRS_OF_16
        vs pairs[M][V] = {};
        each<M, V>(w, x, [&](int i, int j, vu weights, vu activations) {
            pairs[i][j] += pairs_of_nibbles(weights, activations);
        });
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) sums[i][j] += sum_of_pairs(pairs[i][j]);
#else
        each<M, V>(w, x, [&](int i, int j, vu weights, vu activations) {
            sums[i][j] = dot_nibbles(sums[i][j], weights, activations);
        });
#endif
    }
    template <int M, int V, class F>
    MM_INLINE void each(const uint32_t* const* w, const uint32_t* x, const F& f) {
#pragma GCC unroll 4
        for (int step = 0; step < STEPS; step += 2)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) {
                const vu both = load_as<vu>(w[j / NV] + step / 2 * PANEL + j % NV * W);
                const vu low = both & 0x0f0f0f0fu, high = both >> 4 & 0x0f0f0f0fu;
#pragma GCC unroll 6
                for (int i = 0; i < M; ++i) {
                    f(i, j, low, x[step * M + i] + vu{});
                    f(i, j, high, x[(step + 1) * M + i] + vu{});
                }
            }
    }
};

// The product of M rows and P panels to `tile`, whose rows are `stride` apart.
template <class Format, int M, int P>
void multiply(
    const Strip& strip, const uint32_t* const* panels, const bf16* const* scales, int64_t groups,
    float* tile, int64_t stride) {
    constexpr int V = P * NV;
    vf acc[M][V] = {};
    const uint32_t* w[P];
    for (int p = 0; p < P; ++p) w[p] = panels[p];
    for (int64_t g = 0; g < groups; ++g) {
        vi sums[M][V] = {};
        for (int p = 0; p < P; ++p)
            for (int line = 0; line < Format::WORDS; line += 16)
                __builtin_prefetch(w[p] + AHEAD + line);
        Format::template add<M, V>(w, strip.x + g * STEPS * M, sums);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
            const vf scale = load(scales[j / NV] + g * PANEL + j % NV * W);
#pragma GCC unroll 6
            for (int i = 0; i < M; ++i) {
                const vf whole = __builtin_convertvector(sums[i][j], vf) - strip.offsets[g * M + i];
                acc[i][j] += whole * (scale * strip.scales[g * M + i]);
            }
        }
        for (int p = 0; p < P; ++p) w[p] += Format::WORDS;
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) store(tile + i * stride + j * W, acc[i][j]);
}

template <class Format, int P, int M = MR>
MM_INLINE void multiply_rows(
    int64_t m, const Strip& strip, const uint32_t* const* panels, const bf16* const* scales,
    int64_t groups, float* tile, int64_t stride) {
    if constexpr (M == 1) {
        multiply<Format, 1, P>(strip, panels, scales, groups, tile, stride);
    } else if (m == M) {
        multiply<Format, M, P>(strip, panels, scales, groups, tile, stride);
    } else {
        multiply_rows<Format, P, M - 1>(m, strip, panels, scales, groups, tile, stride);
    }
}

// A group of 32 numbers in 8 bits, by its largest: 8 words of four. Returns their sum.
MM_INLINE int32_t quantize_group(const vf (&v)[GROUP / W], uint32_t (&words)[STEPS], float* scale) {
    typedef int8_t vb __attribute__((vector_size(W)));
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the whole number below
    vf most = {}, zero = {};
    for (const vf& part : v) {
        const vf size = (vf)((vu)part & 0x7fffffffu);
        most = size > most ? size : most;
        zero += part * 0.0f;  // NaN where one isn't finite
    }
    const bool finite = sum(zero) == 0.0f;
    const float largest_size = largest(most);
    *scale = finite ? largest_size / 127.0f : __builtin_nanf("");  // so the result isn't, either
    const float inverse = finite && largest_size > 1e-30f ? 127.0f / largest_size : 0.0f;
    vi total = {};
    for (int j = 0; j < GROUP / W; ++j) {
        const vi whole = (vi)((finite ? v[j] : vf{}) * inverse + magic) - (vi)magic;
        total += whole;
        store_as(reinterpret_cast<uint8_t*>(words) + j * W, __builtin_convertvector(whole, vb));
    }
    int32_t sum = 0;
    for (int j = 0; j < W; ++j) sum += total[j];
    return sum;
}

// Quantises `m` rows of x: bytes [groups][STEPS][m][4], scales and offsets [groups][m].
template <class T>
void quantize_strip(
    const T* x, int64_t stride, int64_t m, int64_t k, int64_t groups, float offset, uint8_t* bytes,
    float* scales, float* offsets) {
    for (int64_t i = 0; i < m; ++i)
        for (int64_t g = 0; g < groups; ++g) {
            const T* from = x + i * stride + g * GROUP;
            T rest[GROUP] = {};
            if (k - g * GROUP < GROUP) {
                for (int64_t j = 0; j < k - g * GROUP; ++j) rest[j] = from[j];
                from = rest;
            }
            vf v[GROUP / W];
            for (int j = 0; j < GROUP / W; ++j) v[j] = load(from + j * W);
            uint32_t words[STEPS];
            const int32_t sum = quantize_group(v, words, scales + g * m + i);
            for (int step = 0; step < STEPS; ++step)
                __builtin_memcpy(bytes + ((g * STEPS + step) * m + i) * 4, words + step, 4);
            offsets[g * m + i] = offset * static_cast<float>(sum);
        }
}

template <class T, class Format>
void run(const QuantizedLinearArgs& args) {
    const int64_t groups = ceil_div(args.k, GROUP), panels = ceil_div(args.n, PANEL);
    const uint32_t* weight = static_cast<const uint32_t*>(args.weight);
    const bf16* scales = static_cast<const bf16*>(args.scales);
    for (int64_t first_row = 0; first_row < args.m; first_row += MAX_ROWS) {
        const int64_t rows = min(args.m - first_row, MAX_ROWS);
        const int64_t strips = ceil_div(rows, MR), height = ceil_div(rows, strips);
        uint8_t* bytes = static_cast<uint8_t*>(scratch(0, rows * groups * (GROUP + 8)));
        float* x_scales = reinterpret_cast<float*>(bytes + rows * groups * GROUP);
        float* offsets = x_scales + rows * groups;
        const T* x = static_cast<const T*>(args.x) + first_row * args.x_stride;
        auto quantize = [&](int64_t strip) {
            const int64_t row = strip * height;
            quantize_strip(
                x + row * args.x_stride, args.x_stride, min(height, rows - row), args.k, groups,
                Format::OFFSET, bytes + row * groups * GROUP, x_scales + row * groups,
                offsets + row * groups);
        };
        const int64_t count = ceil_div(rows, height);
        if (rows * args.k <= ALONE) {
            for (int64_t strip = 0; strip < count; ++strip) quantize(strip);
        } else {
            parallel(count, quantize);
        }
        const int64_t tile_rows = ceil_div(MANY_ROWS, height) * height;
        const int64_t row_tiles = ceil_div(rows, tile_rows);
        const int64_t panel_bytes = groups * Format::WORDS * 4;
        const int64_t share = panels * panel_bytes / (SHARES * num_threads());
        const int64_t chunk = share < MIN_CHUNK ? MIN_CHUNK : min(share, MAX_CHUNK);
        int64_t tile_panels = min(chunk / (panel_bytes + 1) / MAX_P * MAX_P, MAX_PANELS);
        if (tile_panels < MAX_P) tile_panels = MAX_P;
        parallel(row_tiles * ceil_div(panels, tile_panels), [&](int64_t index) {
            const int64_t row = index % row_tiles * tile_rows;
            const int64_t first = index / row_tiles * tile_panels;
            const int64_t num_rows = min(rows - row, tile_rows);
            const int64_t num_panels = min(panels - first, tile_panels);
            const int64_t width = num_panels * PANEL;
            float* tile = static_cast<float*>(scratch(1, num_rows * width * 4));
            for (int64_t p = 0; p < num_panels;) {
                const int together = num_panels - p >= MAX_P ? MAX_P : 1;
                const uint32_t* w[MAX_P];
                const bf16* s[MAX_P];
                for (int q = 0; q < together; ++q) {
                    w[q] = weight + (first + p + q) * groups * Format::WORDS;
                    s[q] = scales + (first + p + q) * groups * PANEL;
                }
                for (int64_t i = 0; i < num_rows; i += height) {
                    const int64_t m = min(height, num_rows - i), at = (row + i) * groups;
                    const Strip strip{
                        reinterpret_cast<const uint32_t*>(bytes + at * GROUP), x_scales + at,
                        offsets + at};
                    float* out = tile + i * width + p * PANEL;
                    if (together == MAX_P)
                        multiply_rows<Format, MAX_P>(m, strip, w, s, groups, out, width);
                    else
                        multiply_rows<Format, 1>(m, strip, w, s, groups, out, width);
                }
                p += together;
            }
            const T* bias = static_cast<const T*>(args.bias);
            const T* no_residual = nullptr;
            const int64_t column = first * PANEL;
            finish_tile(
                tile, width, num_rows, min(width, args.n - column),
                bias == nullptr ? bias : bias + column, no_residual,
                static_cast<T*>(args.out) + (first_row + row) * args.n + column, args.n);
        });
    }
}

}  // namespace

void linear_quantized(const QuantizedLinearArgs& args) {
    if (args.dtype == DType::f32) {
        args.bits == 8 ? run<float, Bytes>(args) : run<float, Nibbles>(args);
    } else {
        args.bits == 8 ? run<bf16, Bytes>(args) : run<bf16, Nibbles>(args);
    }
}

}  // namespace mm::MM_ISA
