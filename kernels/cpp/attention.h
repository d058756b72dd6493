// The parts of attention over one tile of keys: scores, their softmax, and the sum of values.
//
// A tile's rows are the queries that share a key head, so that a key is read once for all of them.
#pragma once

#include "dot.h"
#include "strips.h"
#include "transpose.h"
#include "vec.h"

namespace mm::MM_ISA {
namespace {

#if defined(__AVX512F__) || defined(MM_EMULATE)
constexpr int MR = 12, MAX_SUMS = 28;  // rows in a strip; vectors of sums in registers
#elif defined(__AVX2__)
constexpr int MR = 6, MAX_SUMS = 12;
#elif defined(__aarch64__)
constexpr int MR = 6, MAX_SUMS = 24;
#else
constexpr int MR = 2, MAX_SUMS = 8;
#endif
constexpr int KEYS = 64;     // in a tile
constexpr int COLUMNS = 32;  // of them in a panel, whose keys are transposed together
constexpr int V_PANEL = 16;  // numbers of a value that lie together once a tile is packed

template <int N>
struct Count {
    static constexpr int value = N;
};

// Calls `f` with the Count of m, which is from 1 to MR.
template <int M = MR, class F>
MM_INLINE void with_rows(int64_t m, const F& f) {
    if constexpr (M == 1) {
        f(Count<1>{});
    } else if (m == M) {
        f(Count<M>{});
    } else {
        with_rows<M - 1>(m, f);
    }
}

// Vectors side by side, up to 4, whose sums fit the registers for M rows.
constexpr int vectors_at_once(int m, int most) {
    int n = 4;
    while (n > most || (n > 1 && n * m > MAX_SUMS)) n /= 2;
    return n;
}

// 2^x to within 2e-7 of its size; the polynomial is that of Cephes' exp2f. 1 above 0, NaN stays;
// below -125 it is 0 or, where the instructions scale, what is left of it.
MM_INLINE vf exp2(vf x) {
    const vf not_above = x > 0.0f ? vf{} : x;
#if MM_HAS_SCALE
    const vf clipped = max(splat(-160.0f), not_above);  // infinity less itself would be NaN
    const vf n = nearest(clipped);
    const vf f = clipped - n;
#else
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const vf clipped = max(splat(-125.0f), not_above);
    const vf shifted = clipped + magic;
    const vf f = clipped - (shifted - magic);
#endif
    vf p = splat(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
#if MM_HAS_SCALE
    return scale(p, n);
#else
    const vf result = (vf)((vi)p + ((vi)shifted << 23));
    return (vf)((vi)result & ~(vi)(x < -125.0f));
#endif
}
MM_INLINE float exp2(float x) {
    float parts[W];
    store(parts, exp2(splat(x)));
    return parts[0];
}

MM_INLINE vf tanh(vf x) { return 1.0f - 2.0f / (exp(x * 2.0f) + 1.0f); }

// How keys of T are multiplied. `put` stores the 32 bits number `unit` of W keys, transposed.
struct Floats {
    using A = float;
    using B = float;
    static constexpr int PER_UNIT = 1;  // of D in 32 bits of a key
    MM_INLINE void put(vu key, B* panel, int64_t unit) {
        store_as(panel + unit * COLUMNS, key);
    }
    MM_INLINE int64_t steps(int64_t dim) { return dim; }
    MM_INLINE vf add(vf sum, vf key, A query) { return sum + key * query; }
    MM_INLINE vf load_key(const B* b) { return load(b); }
};

struct Widened : Floats {
    static constexpr int PER_UNIT = 2;
    MM_INLINE void put(vu key, B* panel, int64_t unit) {
        store(panel + 2 * unit * COLUMNS, (vf)(key << 16));
        store(panel + (2 * unit + 1) * COLUMNS, (vf)(key & 0xffff0000u));
    }
    MM_INLINE int64_t steps(int64_t dim) { return (dim + 1) / 2 * 2; }
};

#if MM_HAS_DOT
struct Pairs {
    using A = uint32_t;
    using B = uint32_t;
    static constexpr int PER_UNIT = 2;
    MM_INLINE void put(vu key, B* panel, int64_t unit) {
        store_as(panel + unit * COLUMNS, key);
    }
    MM_INLINE int64_t steps(int64_t dim) { return (dim + 1) / 2; }
    MM_INLINE vf add(vf sum, vu key, A query) { return dot(sum, key, query + vu{}); }
    MM_INLINE vu load_key(const B* b) { return load_as<vu>(b); }
};
using HalfKeys = Pairs;
#else
using HalfKeys = Widened;
#endif

// COLUMNS keys of `dim` numbers, each where its pointer says, to `panel` [steps, COLUMNS].
template <class Keys, class T>
__attribute__((noinline)) void pack_keys(const T* const* keys, int64_t dim, typename Keys::B* panel) {
    const int64_t units = dim / Keys::PER_UNIT / W * W;
    const int64_t left = (dim - units * Keys::PER_UNIT) * static_cast<int64_t>(sizeof(T));
    for (int64_t column = 0; column < COLUMNS; column += W) {
        for (int64_t unit = 0; unit < units; unit += W) {
            vu r[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
                r[i] = load_as<vu>(keys[column + i] + unit * Keys::PER_UNIT);
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) Keys::put(r[i], panel + column, unit + i);
        }
        if (left > 0) {
            vu r[W];
            for (int i = 0; i < W; ++i) {
                r[i] = vu{};
                __builtin_memcpy(&r[i], keys[column + i] + units * Keys::PER_UNIT, left);
            }
            transpose(r);
            for (int i = 0; i < W; ++i) Keys::put(r[i], panel + column, units + i);
        }
    }
}

// Adds M numbers times N vectors to M x N sums. Those of which there are fewer stay in registers:
// with the others there, too, the sums would have no room.
template <int M, int N, class Vector, class Number, class Add>
MM_INLINE void outer_product(vf (&sums)[M][N], Vector vector, Number number, Add add) {
    if constexpr (M > N) {
        decltype(vector(0)) v[N];
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) v[j] = vector(j);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const auto a = number(i);
#pragma GCC unroll 16
            for (int j = 0; j < N; ++j) sums[i][j] = add(sums[i][j], v[j], a);
        }
    } else {
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) {
            const auto v = vector(j);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) sums[i][j] = add(sums[i][j], v, number(i));
        }
    }
}

// Scores of M queries and N vectors of keys; rows of `scores` lie KEYS apart.
template <class Keys, int M, int N>
__attribute__((noinline)) void multiply_keys(
    const typename Keys::A* a, const typename Keys::B* b, int64_t steps, float* scores) {
    vf sums[M][N] = {};
    for (int64_t k = 0; k < steps; ++k, a += M, b += COLUMNS) {
        outer_product<M, N>(
            sums, [&](int j) { return Keys::load_key(b + j * W); }, [&](int i) { return a[i]; },
            [](vf sum, auto key, auto query) { return Keys::add(sum, key, query); });
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) store(scores + i * KEYS + j * W, sums[i][j]);
}

// Where the numbers of values lie: each key's where its pointer says, or packed by panels.
template <class T>
struct Rows {
    const T* const* rows;
    int64_t offset;
    MM_INLINE Rows from(Rows v, int64_t vector) { return {v.rows, v.offset + vector * W}; }
    MM_INLINE vf get(const Rows& v, int64_t key, int j) {
        return load(v.rows[key] + v.offset + j * W);
    }
};
struct Panels {
    static constexpr int VECTORS = V_PANEL / W;
    const float* first;
    MM_INLINE Panels from(Panels v, int64_t vector) {
        return {v.first + vector / VECTORS * (KEYS * V_PANEL) + vector % VECTORS * W};
    }
    MM_INLINE vf get(const Panels& v, int64_t key, int j) {
        return load(v.first + key * V_PANEL + j / VECTORS * (KEYS * V_PANEL) + j % VECTORS * W);
    }
};

// out = out * factor + the sum over `keys` of weight * value: M rows `stride` apart, N vectors.
template <int M, int N, class Values>
__attribute__((noinline)) void add_values(
    const float* weights, Values values, int64_t keys, const float* factors, float* out,
    int64_t stride) {
    vf sums[M][N];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) sums[i][j] = load(out + i * stride + j * W) * factors[i];
    for (int64_t k = 0; k < keys; ++k) {
        outer_product<M, N>(
            sums, [&](int j) { return Values::get(values, k, j); },
            [&](int i) { return weights[i * KEYS + k]; },
            [](vf sum, vf value, float weight) { return sum + value * weight; });
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) store(out + i * stride + j * W, sums[i][j]);
}

// The same for `vectors` vectors of a value.
template <int M, class Values>
MM_INLINE void add_all_values(
    const float* weights, Values values, int64_t keys, const float* factors, float* out,
    int64_t vectors) {
    constexpr int N = vectors_at_once(M, 4);
    const int64_t stride = vectors * W;
    int64_t j = 0;
    for (; j + N <= vectors; j += N)
        add_values<M, N>(weights, Values::from(values, j), keys, factors, out + j * W, stride);
    if constexpr (N > 2)
        if (j + 2 <= vectors) {
            add_values<M, 2>(weights, Values::from(values, j), keys, factors, out + j * W, stride);
            j += 2;
        }
    for (; j < vectors; ++j)
        add_values<M, 1>(weights, Values::from(values, j), keys, factors, out + j * W, stride);
}

// What a row has met so far: the largest score, and the sum of the weights relative to it.
struct Met {
    float largest, sum;
};

// How scores become weights: a score s counts as 2^(unit * s). Where `bends`, the products of
// queries and keys are scaled and capped first; else they are the scores themselves.
struct Weights {
    explicit Weights(float scale, float softcap)
        : scale(scale), softcap(softcap), bends(softcap > 0 || !(scale > 0)),
          unit((bends ? 1.0f : scale) * 1.44269504088896341f) {}
    float scale, softcap;
    bool bends;
    float unit;

    // To subtract first keeps the largest score's weight at 1, however large it is. Where all are
    // -inf, so is the largest: their weights are 0, not those of inf - inf.
    static float base(float largest) { return largest == -__builtin_inff() ? 0.0f : largest; }
    template <class S>
    MM_INLINE S of(S score, float base, float unit) { return exp2((score - base) * unit); }
};

// Turns a row's `count` products to weights, which are 0 outside of [low, high). Returns the
// factor that earlier weights are to be multiplied by.
__attribute__((noinline)) static float weigh(
    float* scores, int64_t count, int64_t low, int64_t high, const Weights& weights, Met* met) {
    const int64_t width = ceil_div(count, W) * W;
    const vf none = splat(-__builtin_inff());
    vf most = none;
    if (weights.bends || low > 0 || high < width) {
        vi lane;
        for (int i = 0; i < W; ++i) lane[i] = i;
        const vi from = lane - static_cast<int32_t>(low), to = lane - static_cast<int32_t>(high);
        for (int64_t j = 0; j < width; j += W) {
            vf v = load(scores + j);
            if (weights.bends) v *= weights.scale;
            if (weights.softcap > 0) v = weights.softcap * tanh(v / weights.softcap);
            const vi seen = (from + static_cast<int32_t>(j) >= 0) & (to + static_cast<int32_t>(j) < 0);
            v = select(seen, v, none);
            most = v > most ? v : most;
            store(scores + j, v);
        }
    } else {
        for (int64_t j = 0; j < width; j += W) {
            const vf v = load(scores + j);
            most = v > most ? v : most;
        }
    }
    const float before = met->largest;
    const float now = max(largest(most), before);
    const float base = Weights::base(now), unit = weights.unit;
    vf total = {};
    for (int64_t j = 0; j < width; j += W) {
        const vf weight = Weights::of(load(scores + j), base, unit);
        store(scores + j, weight);
        total += weight;
    }
    const float factor = Weights::of(before, base, unit);
    met->largest = now;
    met->sum = met->sum * factor + sum(total);
    return factor;
}

// A tile's values as float32 panels.
template <class T>
void pack_values(const T* const* rows, int64_t count, int64_t dim, float* out) {
    for (int64_t first = 0; first < dim; first += V_PANEL, out += KEYS * V_PANEL) {
        const int64_t width = min(dim - first, V_PANEL);
        for (int64_t k = 0; k < count; ++k) {
            const T* v = rows[k] + first;
            float* to = out + k * V_PANEL;
            if (width == V_PANEL) {
#pragma GCC unroll 4
                for (int j = 0; j < V_PANEL; j += W) store(to + j, load(v + j));
            } else {
                for (int64_t j = 0; j < V_PANEL; ++j) to[j] = j < width ? widen(v[j]) : 0.0f;
            }
        }
    }
}

// A row's result: its sum of values by the sum of its weights.
template <class T>
void finish(const float* sums, float weight, int64_t dim, T* out) {
    const float share = 1.0f / weight;
    int64_t k = 0;
    for (; k + W <= dim; k += W) store(out + k, load(sums + k) * share);
    for (; k < dim; ++k) narrow(sums[k] * share, out + k);
}

}  // namespace
}  // namespace mm::MM_ISA
