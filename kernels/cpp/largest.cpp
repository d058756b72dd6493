// The largest of each row and where it is: the greedy choice, and whether a row is finite.
#include "rows.h"

namespace mm::MM_ISA {
namespace {

constexpr int SIDE = 4;  // vectors that are compared side by side

template <class T>
void search(const T* x, int64_t size, float* value, int64_t* place) {
    // Which vector it is in is noted, not which number: comparing ids as well would cost as much
    // again. NaN is looked for beside it, as no comparison finds it.
    vf best[SIDE];
    vi where[SIDE], nan{};
    for (int j = 0; j < SIDE; ++j) {
        best[j] = splat(-__builtin_inff());
        where[j] = vi{};
    }
    vi number{};
    int64_t i = 0;
    for (; i + SIDE * W <= size; i += SIDE * W, ++number)
#pragma GCC unroll 4
        for (int j = 0; j < SIDE; ++j) {
            const vf v = load(x + i + j * W);
            const vi more = (vi)(v > best[j]);
            nan |= (vi)(v != v);
            best[j] = select(more, v, best[j]);
            where[j] = (number & more) | (where[j] & ~more);
        }
    float top = -__builtin_inff();
    int64_t at = 0;
    bool broken = false;
    for (int j = 0; j < SIDE; ++j)
        for (int l = 0; l < W; ++l) {
            broken |= nan[l] != 0;
            const int64_t id = (static_cast<int64_t>(where[j][l]) * SIDE + j) * W + l;
            if (best[j][l] > top || (best[j][l] == top && id < at)) {
                top = best[j][l];
                at = id;
            }
        }
    for (; i < size; ++i) {
        const float v = widen(x[i]);
        broken |= v != v;
        if (v > top) {
            top = v;
            at = i;
        }
    }
    *value = broken ? __builtin_nanf("") : top;
    *place = at;
}

template <class T>
void run(const LargestArgs& args) {
    by_rows(args.num, args.size, [&](int64_t row) {
        search(
            static_cast<const T*>(args.x) + row * args.stride, args.size, args.values + row,
            args.places + row);
    });
}

}  // namespace

void largest(const LargestArgs& args) {
    if (args.dtype == DType::f32) {
        run<float>(args);
    } else {
        run<bf16>(args);
    }
}

}  // namespace mm::MM_ISA
