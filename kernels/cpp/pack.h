// Lays weights out for `linear`.
#pragma once

#include <cstdint>

#include "ops.h"

namespace mm {

// Bytes that a packed weight [n, k] takes.
int64_t packed_size(int64_t n, int64_t k, DType dtype);

// Packs `weight` [n, k], whose rows lie `stride` numbers apart, to `packed`. Both may be the same
// memory where rows lie together and nothing is filled up: n a multiple of 16, k of 2.
void pack(const void* weight, int64_t stride, int64_t n, int64_t k, DType dtype, void* packed);

// The rows of the packed weight whose numbers stand in `rows`, to `out` [count, k].
void unpack_rows(
    const void* packed, int64_t n, int64_t k, DType dtype, const int64_t* rows, int64_t count,
    void* out);

}  // namespace mm
