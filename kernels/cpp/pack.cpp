// Panels of 16 rows of the weight, one after the other. In float32 a panel is [K][16]; in bfloat16
// [K / 2][16][2]. What is beyond N or K is zeros, so that kernels need not know of it.
#include "pack.h"

#include <vector>

#include "thread_pool.h"

namespace mm {
namespace {

constexpr int64_t PANEL = 16;

// STEP: neighbours in K that lie together. A panel may take the place of its own rows.
template <class T, int STEP>
void pack_panels(const T* weight, int64_t stride, int64_t n, int64_t k, T* packed) {
    const int64_t steps = (k + STEP - 1) / STEP;
    const bool in_place = weight == packed;
    parallel((n + PANEL - 1) / PANEL, [&](int64_t panel) {
        T* out = packed + panel * steps * STEP * PANEL;
        const T* from = weight + panel * PANEL * stride;
        std::vector<T> rows;
        if (in_place) {
            rows.assign(from, from + PANEL * stride);
            from = rows.data();
        }
        const int64_t real = n - panel * PANEL < PANEL ? n - panel * PANEL : PANEL;
        for (int64_t s = 0; s < steps; ++s) {
            T* to = out + s * STEP * PANEL;
            if (real == PANEL && (s + 1) * STEP <= k) {
                for (int64_t i = 0; i < PANEL; ++i)
                    for (int64_t j = 0; j < STEP; ++j)
                        to[i * STEP + j] = from[i * stride + s * STEP + j];
                continue;
            }
            for (int64_t i = 0; i < PANEL; ++i)
                for (int64_t j = 0; j < STEP; ++j) {
                    const int64_t c = s * STEP + j;
                    to[i * STEP + j] = i < real && c < k ? from[i * stride + c] : T{0};
                }
        }
    });
}

template <class T, int STEP>
void unpack(
    const T* packed, int64_t k, const int64_t* rows, int64_t count, T* out) {
    const int64_t steps = (k + STEP - 1) / STEP;
    for (int64_t r = 0; r < count; ++r) {
        const T* from = packed + rows[r] / PANEL * steps * STEP * PANEL + rows[r] % PANEL * STEP;
        for (int64_t c = 0; c < k; ++c)
            out[r * k + c] = from[c / STEP * STEP * PANEL + c % STEP];
    }
}

}  // namespace

int64_t packed_size(int64_t n, int64_t k, DType dtype) {
    const int64_t padded = (n + PANEL - 1) / PANEL * PANEL;
    return dtype == DType::f32 ? padded * k * 4 : padded * ((k + 1) / 2) * 4;
}

void pack(const void* weight, int64_t stride, int64_t n, int64_t k, DType dtype, void* packed) {
    if (dtype == DType::f32) {
        pack_panels<uint32_t, 1>(
            static_cast<const uint32_t*>(weight), stride, n, k, static_cast<uint32_t*>(packed));
    } else {
        pack_panels<uint16_t, 2>(
            static_cast<const uint16_t*>(weight), stride, n, k, static_cast<uint16_t*>(packed));
    }
}

void unpack_rows(
    const void* packed, int64_t, int64_t k, DType dtype, const int64_t* rows, int64_t count,
    void* out) {
    if (dtype == DType::f32) {
        unpack<uint32_t, 1>(
            static_cast<const uint32_t*>(packed), k, rows, count, static_cast<uint32_t*>(out));
    } else {
        unpack<uint16_t, 2>(
            static_cast<const uint16_t*>(packed), k, rows, count, static_cast<uint16_t*>(out));
    }
}

}  // namespace mm
