// What each op is called with, and the table of them that every instruction set fills.
#pragma once

#include <cstdint>

namespace mm {

enum class DType : int { f32 = 0, bf16 = 1 };

// out [M, N] = x [M, K] by weight [N, K], which is packed: see pack.cpp. Rows of x and of out lie
// `x_stride` and `out_stride` numbers apart. bias [N] may be null, as may `residual` [M, N] (rows
// `out_stride` apart), which is added.
struct LinearArgs {
    const void* x;
    const void* packed;
    const void* bias;
    const void* residual;
    void* out;
    int64_t m, n, k;
    int64_t x_stride, out_stride;
    DType dtype;
};

// out [rows, size] = x / sqrt(mean of x^2 + eps) * weight [size]. Where `residual` isn't null, x is
// first added to it, and the sum goes to `total` [rows, size] as well.
struct RmsNormArgs {
    const void* x;
    const void* residual;
    const void* weight;
    void* out;
    void* total;
    int64_t rows, size;
    int64_t x_stride, residual_stride;
    float eps;
    DType dtype;
};

// out [rows, size] = silu(gate) * up, of x [rows, 2 * size]: the gate, then up.
struct SiluMulArgs {
    const void* x;
    void* out;
    int64_t rows, size, stride;
    DType dtype;
};

// out [tokens, heads, 2 * half] = x rotated by cos and sin [tokens, 2 * half]. Halves are pairs.
struct RotaryArgs {
    const void* x;
    const void* cos;
    const void* sin;
    void* out;
    int64_t tokens, heads, half;
    int64_t token_stride, head_stride;  // of x
    int64_t cos_stride, sin_stride;
    DType dtype;
};

// Row i of rows [num, size] goes to place p = places[i] of out, converted: to the row p % block_size
// of the block p / block_size. Blocks lie `block_stride` numbers apart. Places below 0 are skipped.
struct ScatterArgs {
    const void* rows;
    void* out;
    const int64_t* places;
    int64_t num, size, stride;
    int64_t block_size, block_stride;
    DType dtype, out_dtype;
};

// out [num, size]: the rows `rows` of table, which lie `stride` numbers apart, converted.
struct GatherArgs {
    const void* table;
    const int64_t* rows;
    void* out;
    int64_t num, size, stride;
    DType dtype, out_dtype;
};

// values [num]: the largest of each row of x [num, size], NaN where one is; places [num]: where the
// first such is, NaN aside. Rows lie `stride` numbers apart.
struct LargestArgs {
    const void* x;
    float* values;
    int64_t* places;
    int64_t num, size, stride;
    DType dtype;
};

// sampled [num]: an id drawn from each row of logits [num, size], whose rows lie `stride` apart.
// `kept` [num, size] may be null, or gets the weights that are kept.
struct SampleArgs {
    const float* logits;
    const double* uniform;
    const float* temperature;
    const int64_t* top_k;
    const float* top_p;
    const float* min_p;
    int64_t* sampled;
    float* kept;
    int64_t num, size, stride;
};

// Keys or values: the token t of block b and head h begins at first + b * block + t * token +
// h * head numbers.
struct KeyValues {
    const void* first;
    int64_t block, token, head;
};

// Attention of a step's queries [T, H, D], of which sequence s owns the rows from query_starts[s]
// below query_starts[s + 1], to the first contexts[s] tokens of the blocks in row s of
// `block_tables` [S, table_stride], of int32 or, if wide, of int64. If it is causal, the queries are
// the last of those tokens, and see what is before them; else they see all. `window` (of causal
// attention) and `softcap` may be 0: none. The result [T, H, D] lies together.
struct AttentionArgs {
    const void* query;
    KeyValues keys, values;
    const void* block_tables;
    const int32_t* query_starts;
    const int32_t* contexts;
    void* out;
    int64_t num_sequences, heads, kv_heads, dim, block_size, table_stride;
    int64_t query_row, query_head;
    int64_t window;
    float scale, softcap;
    bool wide_table, causal;
    DType dtype;
};

// Quantises weight [N, K], whose rows lie `stride` numbers apart, to `bits` (8 or 4): bytes `out` and
// bfloat16 `scales` as quantize_linear.cpp lays them out.
struct QuantizeArgs {
    const void* weight;
    void* out;
    void* scales;
    int64_t n, k, stride;
    DType dtype;
    int bits;
};

// out [M, N] = x [M, K] by a weight that `quantize_linear` made, plus bias [N], which may be null.
struct QuantizedLinearArgs {
    const void* x;
    const void* weight;
    const void* scales;
    const void* bias;
    void* out;
    int64_t m, n, k, x_stride;
    DType dtype;
    int bits;
};

struct Ops {
    void (*linear)(const LinearArgs&);
    void (*rms_norm)(const RmsNormArgs&);
    void (*silu_mul)(const SiluMulArgs&);
    void (*rotary)(const RotaryArgs&);
    void (*scatter)(const ScatterArgs&);
    void (*gather)(const GatherArgs&);
    void (*largest)(const LargestArgs&);
    void (*sample)(const SampleArgs&);
    void (*attention)(const AttentionArgs&);
    void (*quantize_linear)(const QuantizeArgs&);
    void (*linear_quantized)(const QuantizedLinearArgs&);
};

// The sets that this file was built for, best first, of those that this CPU has.
struct Isa {
    const char* name;
    const Ops* ops;
};
const Isa* runnable_isas(int* count);

// The ops of the set in use.
const Ops& ops();
const char* isa();
bool use_isa(const char* name);

}  // namespace mm
