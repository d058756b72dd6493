// Quantises a weight [N, K] to 8 or 4 bits by groups of 32 in K, and lays it out for
// `linear_quantized`: by panels of 16 rows, therein by groups, therein by steps of four in K.
// Eight bits: a step is [16][4] bytes. Four bits: two steps share [16][4] bytes, the first in the
// low halves, raised by 8. Scales are [panels][groups][16] in bfloat16. What is beyond N or K
// counts as zero.
#include "thread_pool.h"
#include "vec.h"

namespace mm::MM_ISA {
namespace {

constexpr int PANEL = 16, GROUP = 32;
constexpr int VECTORS = GROUP / W;  // of a group

MM_INLINE float size_of(float x) { return x < 0 ? -x : x; }

// Adding it to a number below 2^22 leaves the whole number next to that in the lower bits.
MM_INLINE vf magic() { return splat(12582912.0f); }

struct Range {
    float low, high;
};

MM_INLINE Range range_of(int bits) {
    return bits == 8 ? Range{-127.0f, 127.0f} : Range{-8.0f, 7.0f};
}

// The whole numbers that stand for w, multiplied by the inverse of its scale, plus `magic`.
MM_INLINE vf quantised(vf w, vf inverse, Range range) {
    return min(splat(range.high), max(splat(range.low), w * inverse)) + magic();
}

MM_INLINE vf inverse_of(vf scale) { return select(scale == 0, vf{}, 1.0f / scale); }

// The scale of 32 numbers: of some near that which takes the largest of them to an end of the
// range, the one with the least sum of squared errors. In 8 bits these are neighbours in bfloat16,
// of which the nearest alone would be worse than an exact one; in 4 bits the largest number, which
// is to be -8, is taken to -6.8 to -9.05: cut off, or not to the end. Each lane tries one.
template <int CANDIDATES>
MM_INLINE float scale_of(const float* w, float most, Range range) {
    constexpr int N = (CANDIDATES + W - 1) / W;
    float scales[N * W], errors[N * W];
    for (int i = 0; i < N * W; ++i) {
        const auto step = static_cast<float>(i);
        scales[i] = CANDIDATES == 16 ? most / (-6.8f - 0.15f * step)
                                     : size_of(most) / 127.0f * (1.0f + 0.004f * (step - 2.0f));
    }
    vf scale[N], inverse[N], error[N];
    for (int v = 0; v < N; ++v) {
        scale[v] = rounded<bf16>(load(scales + v * W));
        inverse[v] = inverse_of(scale[v]);
        error[v] = vf{};
    }
    for (int j = 0; j < GROUP; ++j) {
        const vf number = splat(w[j]);
        for (int v = 0; v < N; ++v) {
            const vf whole = quantised(number, inverse[v], range) - magic();
            const vf off = number - whole * scale[v];
            error[v] += off * off;
        }
    }
    for (int v = 0; v < N; ++v) {
        store(errors + v * W, error[v]);
        store(scales + v * W, scale[v]);
    }
    int best = 0;  // the first where squares overflow
    for (int i = 1; i < CANDIDATES; ++i)
        if (errors[i] < errors[best]) best = i;
    return scales[best];
}

MM_INLINE float scale_of(const float* w, int bits) {
    vf high = load(w), low = -high;
    for (int v = 1; v < VECTORS; ++v) {
        high = max(high, load(w + v * W));
        low = max(low, -load(w + v * W));
    }
    const float up = largest(high), down = largest(low);
    const float most = up >= down ? up : -down;
    if (most == 0) return 0;
    return bits == 8 ? scale_of<5>(w, most, range_of(8)) : scale_of<16>(w, most, range_of(4));
}

template <class T>
MM_INLINE void load_group(const T* from, int64_t count, float* w) {
    if (count >= GROUP) {
        for (int v = 0; v < VECTORS; ++v) store(w + v * W, load(from + v * W));
    } else {
        for (int j = 0; j < GROUP; ++j) w[j] = j < count ? widen(from[j]) : 0.0f;
    }
}

template <class T>
void run(const QuantizeArgs& args) {
    const int64_t groups = ceil_div(args.k, GROUP);
    const int64_t group_bytes = PANEL * GROUP / (args.bits == 8 ? 1 : 2);
    parallel(ceil_div(args.n, PANEL), [&](int64_t panel) {
        for (int64_t i = 0; i < PANEL; ++i) {
            const int64_t row = panel * PANEL + i;
            const T* from = static_cast<const T*>(args.weight) + row * args.stride;
            for (int64_t g = 0; g < groups; ++g) {
                float w[GROUP];
                load_group(from + g * GROUP, row < args.n ? args.k - g * GROUP : 0, w);
                const float scale = scale_of(w, args.bits);
                narrow(
                    scale,
                    static_cast<bf16*>(args.scales) + (panel * groups + g) * PANEL + i);
                int32_t whole[GROUP];
                const vf inverse = inverse_of(splat(scale));
                for (int v = 0; v < VECTORS; ++v) {
                    const vf shifted =
                        quantised(load(w + v * W), inverse, range_of(args.bits));
                    store_as(whole + v * W, (vi)shifted - (vi)magic());
                }
                uint8_t* out = static_cast<uint8_t*>(args.out) +
                               (panel * groups + g) * group_bytes + i * 4;
                if (args.bits == 8) {
                    for (int j = 0; j < GROUP; ++j)
                        out[j / 4 * PANEL * 4 + j % 4] = static_cast<uint8_t>(whole[j]);
                } else {
                    for (int j = 0; j < GROUP / 2; ++j) {
                        const int32_t* two = whole + j / 4 * 8 + j % 4;
                        out[j / 4 * PANEL * 4 + j % 4] =
                            static_cast<uint8_t>((two[0] + 8) | (two[4] + 8) << 4);
                    }
                }
            }
        }
    });
}

}  // namespace

void quantize_linear(const QuantizeArgs& args) {
    args.dtype == DType::f32 ? run<float>(args) : run<bf16>(args);
}

}  // namespace mm::MM_ISA
