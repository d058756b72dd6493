// How a step of attention is cut, where the keys of a part of it lie, and the memory that it takes.
#pragma once

#include "attention.h"
#include "thread_pool.h"

namespace mm::MM_ISA {
namespace {

MM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How a sequence is cut, and where its units, its partial results and their counts begin.
struct Cut {
    int64_t first_row, num_queries, context;
    int64_t per_block, blocks, ranges;  // queries in a block; blocks; ranges of the longest block
    int64_t first_unit, first_partial, first_count;
};

struct Span {
    int64_t from, to;
};

// The keys that the queries from `query` on see, `count` of them.
MM_INLINE Span seen(const AttentionArgs& args, const Cut& cut, int64_t query, int64_t count) {
    if (!args.causal) return {0, cut.context};
    const int64_t position = cut.context - cut.num_queries + query;
    const int64_t from = args.window > 0 ? larger(0, position - args.window + 1) : 0;
    return {from, larger(from, position + count)};
}

MM_INLINE int64_t block_of_table(const AttentionArgs& args, int64_t sequence, int64_t i) {
    const int64_t at = sequence * args.table_stride + i;
    return args.wide_table ? static_cast<const int64_t*>(args.block_tables)[at]
                           : static_cast<const int32_t*>(args.block_tables)[at];
}

// Where the keys and values of the tokens from `first` on lie; the last one's for those past them.
template <class T>
void find(
    const AttentionArgs& args, int64_t sequence, int64_t head, int64_t first, int64_t count,
    const T** keys, const T** values) {
    const T* key = static_cast<const T*>(args.keys.first) + head * args.keys.head;
    const T* value = static_cast<const T*>(args.values.first) + head * args.values.head;
    int64_t i = 0, number = first / args.block_size, offset = first % args.block_size;
    while (i < count) {
        const int64_t block = block_of_table(args, sequence, number++);
        const T* k = key + block * args.keys.block + offset * args.keys.token;
        const T* v = value + block * args.values.block + offset * args.values.token;
        const int64_t end = min(count, i + args.block_size - offset);
        for (; i < end; ++i, k += args.keys.token, v += args.values.token) {
            keys[i] = k;
            values[i] = v;
        }
        offset = 0;
    }
    for (; i < KEYS; ++i) {
        keys[i] = keys[count - 1];
        values[i] = values[count - 1];
    }
}

// The memory of one unit, of `rows` rows.
template <class T, class Keys>
struct Buffers {
    static int64_t rounded(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

    Buffers(const AttentionArgs& args, int64_t rows) {
        const int64_t vectors = ceil_div(args.dim, W);
        const int64_t units = ceil_div(ceil_div(args.dim, Keys::PER_UNIT), W) * W;
        const int64_t panels = ceil_div(args.dim, V_PANEL);
        const int64_t sizes[] = {
            rows * Keys::steps(args.dim) * 4, units * Keys::PER_UNIT * COLUMNS * 4,
            rows * KEYS * 4, rows * vectors * W * 4, rows * static_cast<int64_t>(sizeof(Met)),
            rows * 4, panels * V_PANEL * KEYS * 4};
        int64_t total = 0;
        for (const int64_t size : sizes) total += rounded(size);
        char* at = static_cast<char*>(scratch(1, total));
        void* parts[7];
        for (int i = 0; i < 7; ++i) {
            parts[i] = at;
            at += rounded(sizes[i]);
        }
        queries = static_cast<typename Keys::A*>(parts[0]);
        panel = static_cast<typename Keys::B*>(parts[1]);
        scores = static_cast<float*>(parts[2]);
        sums = static_cast<float*>(parts[3]);
        met = static_cast<Met*>(parts[4]);
        factors = static_cast<float*>(parts[5]);
        values = parts[6];
    }

    typename Keys::A* queries;  // by strips
    typename Keys::B* panel;    // keys
    float* scores;              // [rows, KEYS]
    float* sums;                // [rows, vectors * W]: of weighted values
    Met* met;                   // [rows]
    float* factors;             // [rows]
    void* values;               // packed: [panels, KEYS, V_PANEL] float, or [KEYS, vectors * W] T
};

}  // namespace
}  // namespace mm::MM_ISA
