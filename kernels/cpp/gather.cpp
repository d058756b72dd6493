// Rows of a table by their numbers: the cosines and sines of a step's positions.
#include "rows.h"

namespace mm::MM_ISA {
namespace {

template <class From, class To>
void run(const GatherArgs& args) {
    const int64_t size = args.size;
    by_rows(args.num, size, [&](int64_t row) {
        const From* from = static_cast<const From*>(args.table) + args.rows[row] * args.stride;
        To* to = static_cast<To*>(args.out) + row * size;
        by_vectors(size, [&](int64_t i, auto n) { store(to + i, load(from + i, n), n); });
    });
}

}  // namespace

void gather(const GatherArgs& args) {
    if (args.dtype == DType::f32) {
        args.out_dtype == DType::f32 ? run<float, float>(args) : run<float, bf16>(args);
    } else {
        args.out_dtype == DType::f32 ? run<bf16, float>(args) : run<bf16, bf16>(args);
    }
}

}  // namespace mm::MM_ISA
