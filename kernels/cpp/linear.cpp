// x [M, K] by a packed weight [N, K]: for few rows at the speed of memory, for many at that of
// the multipliers.
//
// The weight lies in panels of 16 of its rows, which are 16 columns of the result; K is outermost
// within a panel. In bfloat16 two neighbours in K share 32 bits: what dot-product instructions
// take, and what is widened to two float32 vectors by a shift and a mask. (See pack.cpp.)
//
// The loops are those of Goto and van de Geijn (doi:10.1145/1356052.1356053): a tile of the
// result is summed over blocks of K, in each of which a panel's block stays in the first cache
// and the rows' in the second. Rows are packed by strips of MR that lie together by K.
#include "dot.h"
#include "linear_tiles.h"
#include "shares.h"
#include "strips.h"
#include "tile.h"

namespace mm::MM_ISA {
namespace {

constexpr int PANEL = 16;
constexpr int NV = PANEL / W;  // vectors of a panel's row
#if defined(__AVX512F__) || defined(MM_EMULATE)
constexpr int MR = 12, NP = 2;  // 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int MR = 6, NP = 1;  // 12 of 16
#elif defined(__aarch64__)
constexpr int MR = 6, NP = 1;  // 24 of 32
#else
constexpr int MR = 2, NP = 1;  // 8 of 16
#endif
constexpr int MAX_P = 2;           // panels that a kernel reads side by side: four are no faster
constexpr int64_t KC = 256;        // numbers of A by K in a block where there are many rows,
constexpr int64_t KC_FEW = 1024;   // and of K where there are few
constexpr int64_t LEAD = 48;       // steps between asking for a line of weights and using it
constexpr int64_t MAX_ROWS = 384;  // packed at once, which bounds the memory that takes
constexpr int64_t TILE_ROWS = 96;
constexpr int64_t TILE_PANELS = 16;  // at most, where there are many rows,
constexpr int64_t FEW_PANELS = 64;   // and where there are few
constexpr int64_t FEW = 2 * MR;      // up to so many rows, widening a panel once doesn't pay
constexpr int64_t ALONE = 1 << 15; // numbers that one thread packs sooner than it wakes another

// How a kernel reads panels. A step takes STEP of K from each, A_STEP numbers of A from each row.
// A number of A is used up before the next is loaded: no more registers are taken than there are.
struct FloatPanel {
    static constexpr int STEP = 1, A_STEP = 1;
    using A = float;
    using B = float;
    template <int M, int P>
    MM_INLINE void step(const B* const* b, const A* a, vf (&acc)[M][P * NV]) {
        vf w[P * NV];
#pragma GCC unroll 16
        for (int j = 0; j < P * NV; ++j) w[j] = load(b[j / NV] + j % NV * W);
        add_products<M, P>(w, a, acc);
    }
    template <int M, int P>
    MM_INLINE void add_products(const vf (&w)[P * NV], const A* a, vf (&acc)[M][P * NV]) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const vf row = splat(a[i]);
#pragma GCC unroll 16
            for (int j = 0; j < P * NV; ++j) acc[i][j] += w[j] * row;
        }
    }
};

// The upper halves of pairs as float32, where `lower` are the lower ones.
MM_INLINE vf upper(vu pairs, vf lower) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(MM_EMULATE)
    // Its zeros are where they must be. A mask would take a register, which the sums need.
    return (vf)_mm256_blend_epi16((__m256i)lower, (__m256i)pairs, 0xaa);
#else
    (void)lower;
    return (vf)(pairs & 0xffff0000u);
#endif
}

struct WidenedPairs {
    static constexpr int STEP = 2, A_STEP = 2;
    using A = float;
    using B = uint32_t;
    template <int M, int P>
    MM_INLINE void step(const B* const* b, const A* a, vf (&acc)[M][P * NV]) {
        vf w[P * NV];
#pragma GCC unroll 16
        for (int j = 0; j < P * NV; ++j)
            w[j] = (vf)(load_as<vu>(b[j / NV] + j % NV * W) << 16);
        FloatPanel::add_products<M, P>(w, a, acc);
        asm volatile("" ::: "memory");  // the next numbers of A have no registers before this
#pragma GCC unroll 16
        for (int j = 0; j < P * NV; ++j)
            w[j] = upper(load_as<vu>(b[j / NV] + j % NV * W), w[j]);
        FloatPanel::add_products<M, P>(w, a + M, acc);
    }
};

#if MM_HAS_DOT
struct DotPairs {
    static constexpr int STEP = 2, A_STEP = 1;
    using A = uint32_t;
    using B = uint32_t;
    template <int M, int P>
    MM_INLINE void step(const B* const* b, const A* a, vf (&acc)[M][P * NV]) {
        vu w[P * NV];
#pragma GCC unroll 16
        for (int j = 0; j < P * NV; ++j) w[j] = load_as<vu>(b[j / NV] + j % NV * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const vu row = vu{} + a[i];
#pragma GCC unroll 16
            for (int j = 0; j < P * NV; ++j) acc[i][j] = dot(acc[i][j], w[j], row);
        }
    }
};
#endif

// What is asked of memory while a kernel runs: with each step, one address in each panel.
struct Ahead {
    const char* at[MAX_P];
    int64_t each;  // bytes from one step's address to the next's
};

// Adds the product of M rows and P panels over `steps` steps to `tile` (rows `stride` apart). A
// function of its own: inlined, its sums compete with what the loops around it hold in registers.
template <class Panel, int M, int P>
__attribute__((noinline)) void multiply(
    const typename Panel::A* a, const typename Panel::B* const* panels, int64_t steps,
    const Ahead& ahead, float* tile, int64_t stride) {
    vf acc[M][P * NV];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < P * NV; ++j) acc[i][j] = load(tile + i * stride + j * W);
    const typename Panel::B* b[P];
    for (int p = 0; p < P; ++p) b[p] = panels[p];
    int64_t reach = 0;
    for (int64_t s = 0; s < steps; ++s) {
        for (int p = 0; p < P; ++p) __builtin_prefetch(ahead.at[p] + reach);
        reach += ahead.each;
        Panel::template step<M, P>(b, a, acc);
        for (int p = 0; p < P; ++p) b[p] += PANEL;
        a += M * Panel::A_STEP;
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < P * NV; ++j) store(tile + i * stride + j * W, acc[i][j]);
}

template <class Panel, int P, int M = MR>
MM_INLINE void multiply_rows(
    int64_t m, const typename Panel::A* a, const typename Panel::B* const* panels, int64_t steps,
    const Ahead& ahead, float* tile, int64_t stride) {
    if constexpr (M > 1 && M * P > MR * NP) {  // more sums than there are registers: not asked for
        multiply_rows<Panel, P, M - 1>(m, a, panels, steps, ahead, tile, stride);
    } else if constexpr (M == 1) {
        multiply<Panel, 1, P>(a, panels, steps, ahead, tile, stride);
    } else if (m == M) {
        multiply<Panel, M, P>(a, panels, steps, ahead, tile, stride);
    } else {
        multiply_rows<Panel, P, M - 1>(m, a, panels, steps, ahead, tile, stride);
    }
}

// The same for `count` panels, one or two.
template <class Panel>
MM_INLINE void multiply_panels(
    int count, int64_t m, const typename Panel::A* a, const typename Panel::B* const* panels,
    int64_t steps, const Ahead& ahead, float* tile, int64_t stride) {
    if (count == 2) {
        multiply_rows<Panel, 2>(m, a, panels, steps, ahead, tile, stride);
    } else {
        multiply_rows<Panel, 1>(m, a, panels, steps, ahead, tile, stride);
    }
}

// The largest count of panels, up to what is left, whose sums fit the registers with m rows.
MM_INLINE int panels_at_once(int64_t m, int64_t left) {
    for (int count = MAX_P; count > 1; count /= 2)
        if (count <= left && m * count <= MR * NP) return count;
    return 1;
}

// Panel: how the packed weight is read. Wide: how it is read once a block was widened, or Panel.
template <class T, class Panel>
void run(const LinearArgs& args) {
    using A = typename Panel::A;
    using B = typename Panel::B;
    constexpr bool WIDENS = !__is_same(A, uint32_t) && Panel::STEP == 2;
    const int64_t k = ceil_div(args.k, Panel::STEP) * Panel::STEP;
    const int64_t panel_size = k / Panel::STEP * PANEL;
    const int64_t panels = ceil_div(args.n, PANEL);
    const B* packed = static_cast<const B*>(args.packed);

    for (int64_t first_row = 0; first_row < args.m; first_row += MAX_ROWS) {
        const int64_t rows = min(args.m - first_row, MAX_ROWS);
        const bool few = rows <= FEW;
        const int64_t per_k = Panel::STEP / Panel::A_STEP;  // of K in one number of A
        const int64_t kc = few ? KC_FEW : KC * per_k;
        // Strips of about one height: a low one takes the multipliers as long as a higher one.
        const int64_t strips = ceil_div(rows, MR);
        const int64_t height = ceil_div(rows, strips);
        auto start = [&](int64_t strip) { return strip * rows / strips; };
        A* a = static_cast<A*>(scratch(0, sizeof(A) * (rows * k / per_k + 1)));
        const T* x = static_cast<const T*>(args.x) + first_row * args.x_stride;

        auto pack = [&](int64_t strip) {
            const int64_t first = start(strip), m = start(strip + 1) - first;
            const T* of_strip = x + first * args.x_stride;
            auto row = [&](int i) { return of_strip + i * args.x_stride; };
            for (int64_t from = 0; from < k; from += kc) {
                const int64_t even_to = min(from + kc, k), to = min(even_to, args.k);
                A* out = a + (rows * from + first * (even_to - from)) / per_k;
                pack_strip<MR>(m, row, from, to, even_to, out);
            }
        };
        if (rows * k <= ALONE) {
            for (int64_t strip = 0; strip < strips; ++strip) pack(strip);
        } else {
            parallel(strips, pack);
        }

        const int64_t tile_strips = few ? strips : TILE_ROWS / height;
        const int64_t row_tiles = ceil_div(strips, tile_strips);
        const int at_once = panels_at_once(height, panels);
        const int64_t most = few ? FEW_PANELS : TILE_PANELS;
        const Shares shares = shares_of(panels, at_once, most, 3);

        parallel(row_tiles * shares.count, [&](int64_t index) {
            const int64_t first_strip = index % row_tiles * tile_strips;
            const int64_t num_strips = min(strips - first_strip, tile_strips);
            const int64_t row = start(first_strip), num_rows = start(first_strip + num_strips) - row;
            const int64_t first_panel = shares.starts[index / row_tiles];
            const int64_t num_panels = shares.size(index / row_tiles);
            const int64_t width = num_panels * PANEL;
            float* tile = static_cast<float*>(scratch(1, sizeof(float) * num_rows * width));
            __builtin_memset(tile, 0, sizeof(float) * num_rows * width);

            auto block = [&](int64_t p, int64_t from) {
                return packed + (first_panel + p) * panel_size + from / Panel::STEP * PANEL;
            };
            // The block of `count` panels at (p, from); the one at (next_p, next_from) comes next.
            auto multiply_block = [&](int64_t p, int64_t from, int count, int64_t next_p,
                                      int64_t next_from) {
                const int64_t length = min(kc, k - from);
                const B* b[MAX_P];
                for (int q = 0; q < count; ++q) b[q] = block(p + q, from);
                auto each_strip = [&](auto panel, auto* blocks) {
                    using Read = decltype(panel);
                    const int64_t steps = length / Read::STEP;
                    const int64_t bytes =
                        length / Panel::STEP * PANEL * static_cast<int64_t>(sizeof(B));
                    // One strip asks for its own block, a little ahead, and at its end for where
                    // the next one begins. Of several the first would wait for memory and memory
                    // for the rest: each asks for its share of the next block.
                    const int64_t lead = num_strips == 1 ? min(steps, LEAD) : 0;
                    Ahead ahead;
                    for (int64_t i = 0; i < num_strips; ++i) {
                        const int64_t top = start(first_strip + i);
                        const int64_t m = start(first_strip + i + 1) - top;
                        const A* rows_at = a + (rows * from + top * length) / per_k;
                        float* sums = tile + (top - row) * width + p * PANEL;
                        const int64_t own = num_strips == 1 ? steps - lead : 0;
                        if (own > 0) {
                            ahead.each = bytes / steps;
                            for (int q = 0; q < count; ++q)
                                ahead.at[q] =
                                    reinterpret_cast<const char*>(b[q]) + lead * ahead.each;
                            multiply_panels<Read>(
                                count, m, rows_at, blocks, own, ahead, sums, width);
                        }
                        const typename Read::B* rest[MAX_P];
                        ahead.each = bytes / (steps * num_strips);
                        for (int q = 0; q < count; ++q) {
                            rest[q] = blocks[q] + own * PANEL;
                            ahead.at[q] =
                                reinterpret_cast<const char*>(block(next_p + q, next_from)) +
                                i * bytes / num_strips;
                        }
                        multiply_panels<Read>(
                            count, m, rows_at + own * m * Read::A_STEP, rest, steps - own, ahead,
                            sums, width);
                    }
                };
                if constexpr (WIDENS) {
                    if (!few) {
                        const float* wide[MAX_P];
                        float* buffer = static_cast<float*>(
                            scratch(2, sizeof(float) * MAX_P * KC * PANEL));
                        for (int q = 0; q < count; ++q) {
                            float* out = buffer + q * KC * PANEL;
                            wide[q] = out;
                            for (int64_t s = 0; s < length / 2; ++s, out += 2 * PANEL)
                                for (int j = 0; j < PANEL; j += W) {
                                    const vu pair = load_as<vu>(b[q] + s * PANEL + j);
                                    store(out + j, (vf)(pair << 16));
                                    store(out + PANEL + j, (vf)(pair & 0xffff0000u));
                                }
                        }
                        each_strip(FloatPanel{}, wide);
                        return;
                    }
                }
                each_strip(Panel{}, b);
            };

            if (few) {
                for (int64_t p = 0; p < num_panels;) {
                    const int count = panels_at_once(height, num_panels - p);
                    for (int64_t from = 0; from < k; from += kc) {
                        const bool last = from + kc >= k;
                        multiply_block(p, from, count, last ? p + count : p, last ? 0 : from + kc);
                    }
                    p += count;
                }
            } else {
                for (int64_t from = 0; from < k; from += kc)
                    for (int64_t p = 0; p < num_panels;) {
                        const int count = panels_at_once(height, num_panels - p);
                        const bool last = p + count >= num_panels;
                        multiply_block(
                            p, from, count, last && from + kc < k ? 0 : p + count,
                            !last ? from : from + kc < k ? from + kc : 0);
                        p += count;
                    }
            }
            finish_part<T>(args, tile, width, first_row + row, num_rows, first_panel * PANEL);
        });
    }
}

}  // namespace

void linear(const LinearArgs& args) {
    if (args.dtype == DType::f32) {
        run<float, FloatPanel>(args);
        return;
    }
#if MM_HAS_TILES
    if (args.m > FEW) {
        linear_tiles(args);
        return;
    }
#endif
#if MM_HAS_DOT
    run<bf16, DotPairs>(args);
#else
    run<bf16, WidenedPairs>(args);
#endif
}

}  // namespace mm::MM_ISA
