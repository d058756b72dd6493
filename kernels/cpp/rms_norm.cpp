// Root-mean-square norm, alone or with the addition to the residual stream before it. A row is
// read from memory once: its second reading is from the first cache.
#include "rows.h"

namespace mm::MM_ISA {
namespace {

template <class T>
void run(const RmsNormArgs& args) {
    const int64_t size = args.size;
    const T* weight = static_cast<const T*>(args.weight);
    by_rows(args.rows, size, [&](int64_t row) {
        const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
        T* out = static_cast<T*>(args.out) + row * size;
        float squares;
        if (args.residual == nullptr) {
            squares = sum_by_vectors(size, [&](int64_t i, auto n) {
                const vf v = load(x + i, n);
                return v * v;
            });
        } else {
            const T* residual = static_cast<const T*>(args.residual) + row * args.residual_stride;
            T* total = static_cast<T*>(args.total) + row * size;
            squares = sum_by_vectors(size, [&](int64_t i, auto n) {
                const vf v = rounded<T>(load(x + i, n) + load(residual + i, n));
                store(total + i, v, n);
                return v * v;
            });
            x = total;
        }
        const float mean = squares / static_cast<float>(size);
        const float scale = 1.0f / __builtin_sqrtf(mean + args.eps);
        by_vectors(size, [&](int64_t i, auto n) {
            const vf normed = rounded<T>(load(x + i, n) * scale);
            store(out + i, normed * load(weight + i, n), n);
        });
    });
}

}  // namespace

void rms_norm(const RmsNormArgs& args) {
    if (args.dtype == DType::f32) {
        run<float>(args);
    } else {
        run<bf16>(args);
    }
}

}  // namespace mm::MM_ISA
