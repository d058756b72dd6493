// The gate of an MLP: silu(gate) * up.
#include "rows.h"

namespace mm::MM_ISA {
namespace {

template <class T>
void run(const SiluMulArgs& args) {
    const int64_t size = args.size;
    by_rows(args.rows, 2 * size, [&](int64_t row) {
        const T* gate = static_cast<const T*>(args.x) + row * args.stride;
        const T* up = gate + size;
        T* out = static_cast<T*>(args.out) + row * size;
        by_vectors(size, [&](int64_t i, auto n) {
            const vf x = load(gate + i, n);
            store(out + i, rounded<T>(x / (exp(-x) + 1.0f)) * load(up + i, n), n);
        });
    });
}

}  // namespace

void silu_mul(const SiluMulArgs& args) {
    if (args.dtype == DType::f32) {
        run<float>(args);
    } else {
        run<bf16>(args);
    }
}

}  // namespace mm::MM_ISA
