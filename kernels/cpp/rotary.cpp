// Rotary positions of queries and keys.
#include "rows.h"

namespace mm::MM_ISA {
namespace {

template <class T>
void run(const RotaryArgs& args) {
    const int64_t half = args.half;
    by_rows(args.tokens, 2 * half * args.heads, [&](int64_t token) {
        const T* cos = static_cast<const T*>(args.cos) + token * args.cos_stride;
        const T* sin = static_cast<const T*>(args.sin) + token * args.sin_stride;
        for (int64_t head = 0; head < args.heads; ++head) {
            const T* x = static_cast<const T*>(args.x) + token * args.token_stride +
                         head * args.head_stride;
            T* out = static_cast<T*>(args.out) + (token * args.heads + head) * 2 * half;
            // Products are rounded, as the reference's are.
            by_vectors(half, [&](int64_t i, auto n) {
                const vf first = load(x + i, n), second = load(x + half + i, n);
                const vf new_first = rounded<T>(first * load(cos + i, n)) -
                                     rounded<T>(second * load(sin + i, n));
                const vf new_second = rounded<T>(second * load(cos + half + i, n)) +
                                      rounded<T>(first * load(sin + half + i, n));
                store(out + i, new_first, n);
                store(out + half + i, new_second, n);
            });
        }
    });
}

}  // namespace

void rotary(const RotaryArgs& args) {
    if (args.dtype == DType::f32) {
        run<float>(args);
    } else {
        run<bf16>(args);
    }
}

}  // namespace mm::MM_ISA
