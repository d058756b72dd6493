// Loops over the rows of a matrix, and over the numbers of a row.
#pragma once

#include "thread_pool.h"
#include "vec.h"

namespace mm::MM_ISA {

// Of a row's last vector only a part may be there: what is missing is read as zeros.
struct Whole {};
struct Part {
    int64_t count;
};

template <class T>
MM_INLINE vf load(const T* p, Whole) {
    return load(p);
}
template <class T>
MM_INLINE vf load(const T* p, Part part) {
    T numbers[W] = {};
    for (int j = 0; j < W; ++j)
        if (j < part.count) numbers[j] = p[j];
    return load(numbers);
}
template <class T>
MM_INLINE void store(T* p, vf v, Whole) {
    store(p, v);
}
template <class T>
MM_INLINE void store(T* p, vf v, Part part) {
    T numbers[W];
    store(numbers, v);
    for (int j = 0; j < W; ++j)
        if (j < part.count) p[j] = numbers[j];
}

// Calls body(i, n) for each vector of a row: the numbers from `i` on, n of them.
template <class F>
MM_INLINE void by_vectors(int64_t size, const F& body) {
    int64_t i = 0;
    for (; i + W <= size; i += W) body(i, Whole{});
    if (i < size) body(i, Part{size - i});
}

// The sum of the vectors that term(i, n) gives. Four sums run side by side: one would wait for
// its last addition, and round more often.
template <class F>
MM_INLINE float sum_by_vectors(int64_t size, const F& term) {
    vf sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= size; i += 4 * W)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[j] += term(i + j * W, Whole{});
    by_vectors(size - i, [&](int64_t rest, auto n) { sums[0] += term(i + rest, n); });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Calls body(row) for each row. `cost` of a row is in numbers read, of which a thread takes some
// four in a nanosecond: below 20 microseconds in all it doesn't pay to share the work.
template <class F>
MM_INLINE void by_rows(int64_t rows, int64_t cost, const F& body) {
    constexpr int64_t ALONE = 1 << 16, CHUNK = 1 << 14;
    if (rows == 1 || rows * cost <= ALONE) {
        for (int64_t row = 0; row < rows; ++row) body(row);
        return;
    }
    const int64_t step = CHUNK / (cost + 1) + 1;
    parallel(ceil_div(rows, step), [&](int64_t chunk) {
        const int64_t end = min(rows, (chunk + 1) * step);
        for (int64_t row = chunk * step; row < end; ++row) body(row);
    });
}

}  // namespace mm::MM_ISA
