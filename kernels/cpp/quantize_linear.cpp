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

MM_INLINE float size_of(float x) { return x < 0 ? -x : x; }

// The whole number next to x, whose size is below 2^22.
MM_INLINE float nearest(float x) {
    const float shifted = x + 12582912.0f;
    return shifted - 12582912.0f;
}

MM_INLINE float rounded_to_bf16(float x) {
    bf16 half;
    narrow(x, &half);
    return widen(half);
}

// The sum of squared errors of 32 numbers in this scale, as whole numbers from `low` to `high`.
MM_INLINE float error_of(const float* w, float scale, float low, float high) {
    const float inverse = scale == 0 ? 0.0f : 1.0f / scale;
    float error = 0;
    for (int j = 0; j < GROUP; ++j) {
        float q = w[j] * inverse;
        q = q < low ? low : q;
        q = nearest(q > high ? high : q);
        const float off = w[j] - q * scale;
        error += off * off;
    }
    return error;
}

// The scale of 32 numbers: of some near that which takes the largest of them to an end of the
// range, the one with the least error. In 8 bits these are neighbours in bfloat16, of which the
// nearest alone would be worse than an exact one; in 4 bits the largest number, which is to be -8,
// is taken to -6.8 to -9.05: cut off, or not to the end.
MM_INLINE float scale_of(const float* w, int bits) {
    float most = 0;
    for (int j = 0; j < GROUP; ++j) most = size_of(w[j]) > size_of(most) ? w[j] : most;
    if (most == 0) return 0;
    float best = 0, least = __builtin_inff();
    const int candidates = bits == 8 ? 5 : 16;
    for (int i = 0; i < candidates; ++i) {
        const float scale = rounded_to_bf16(
            bits == 8 ? size_of(most) / 127.0f * (1.0f + 0.004f * static_cast<float>(i - 2))
                      : most / (-6.8f - 0.15f * static_cast<float>(i)));
        const float error = bits == 8 ? error_of(w, scale, -127.0f, 127.0f)
                                      : error_of(w, scale, -8.0f, 7.0f);
        if (error < least || i == 0) {  // the first where squares overflow
            least = error;
            best = scale;
        }
    }
    return best;
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
                const int64_t count = row < args.n ? min(GROUP, args.k - g * GROUP) : 0;
                for (int j = 0; j < GROUP; ++j)
                    w[j] = j < count ? widen(from[g * GROUP + j]) : 0.0f;
                const float scale = scale_of(w, args.bits);
                narrow(
                    scale,
                    static_cast<bf16*>(args.scales) + (panel * groups + g) * PANEL + i);
                const float inverse = scale == 0 ? 0.0f : 1.0f / scale;
                uint8_t* out = static_cast<uint8_t*>(args.out) +
                               (panel * groups + g) * group_bytes + i * 4;
                const float low = args.bits == 8 ? -127.0f : -8.0f;
                const float high = args.bits == 8 ? 127.0f : 7.0f;
                for (int j = 0; j < GROUP; ++j) {
                    float q = w[j] * inverse;
                    q = q < low ? low : q;
                    const int whole = static_cast<int>(nearest(q > high ? high : q));
                    if (args.bits == 8) {
                        out[j / 4 * PANEL * 4 + j % 4] = static_cast<uint8_t>(whole);
                    } else {
                        uint8_t* to = out + j / 8 * PANEL * 4 + j % 4;
                        const int nibble = whole + 8;
                        *to = static_cast<uint8_t>(j % 8 < 4 ? nibble : *to | nibble << 4);
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
