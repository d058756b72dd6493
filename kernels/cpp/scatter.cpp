// Rows to places of their own: keys and values to the paged cache, images' embeddings into a
// prompt's.
#include "rows.h"

namespace mm::MM_ISA {
namespace {

template <class From, class To>
void run(const ScatterArgs& args) {
    const int64_t size = args.size;
    by_rows(args.num, size, [&](int64_t row) {
        const int64_t place = args.places[row];
        if (place < 0) return;
        const From* from = static_cast<const From*>(args.rows) + row * args.stride;
        To* to = static_cast<To*>(args.out) + place / args.block_size * args.block_stride +
                 place % args.block_size * size;
        if constexpr (__is_same(From, To)) {
            __builtin_memcpy(to, from, size * sizeof(To));
        } else {
            by_vectors(size, [&](int64_t i, auto n) { store(to + i, load(from + i, n), n); });
        }
    });
}

}  // namespace

void scatter(const ScatterArgs& args) {
    if (args.dtype == DType::f32) {
        args.out_dtype == DType::f32 ? run<float, float>(args) : run<float, bf16>(args);
    } else {
        args.out_dtype == DType::f32 ? run<bf16, float>(args) : run<bf16, bf16>(args);
    }
}

}  // namespace mm::MM_ISA
