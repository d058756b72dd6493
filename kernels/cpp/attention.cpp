// Attention over a paged KV cache for a whole step, or over keys that lie together as one block.
//
// A unit of work is one key head, a block of queries with all the heads that share it, and a range
// of keys; it goes through its keys tile by tile with a running softmax, as FlashAttention does
// (arXiv:2205.14135). Where a sequence has too few blocks to occupy many threads its keys are cut
// to ranges (Flash-Decoding), which whoever finishes the last of them puts together. How they are
// cut depends on the sequence alone: neither its neighbours in the step nor the number of threads
// change a digit of its result.
#include "attention_plan.h"
#include "thread_pool.h"

namespace mm::MM_ISA {
namespace {

constexpr int64_t ROWS = 64;         // in a block of queries with their heads
constexpr int64_t RANGE = 4 * KEYS;  // keys that are worth a thread where there are few rows
constexpr int64_t MOST_TOGETHER = 8; // units that a thread claims at once
constexpr int64_t MANY = 64;         // units of a sequence from which on its keys aren't cut
constexpr int64_t FEW = 2 * MR;      // up to so many rows, to pack values doesn't pay
constexpr int64_t ALONE = 1 << 20;   // multiplications that one thread does sooner than it wakes another

template <class T, class Keys>
class Step {
  public:
    explicit Step(const AttentionArgs& args)
        : args_(args), weights_(args.scale, args.softcap), vectors_(ceil_div(args.dim, W)) {
        group_ = args.heads / args.kv_heads;
        const int64_t num = args.num_sequences;
        int64_t partials = 0, counts = 0, work = 0;
        cuts_ = static_cast<Cut*>(scratch(0, num * sizeof(Cut)));
        for (int64_t s = 0; s < num; ++s) {
            Cut& cut = cuts_[s];
            cut.first_row = args.query_starts[s];
            cut.num_queries = args.query_starts[s + 1] - cut.first_row;
            cut.context = args.contexts[s];
            cut.per_block = min(larger(1, ROWS / group_), larger(1, cut.num_queries));
            cut.blocks = ceil_div(cut.num_queries, cut.per_block);
            cut.ranges = 1;
            if (cut.blocks * args.kv_heads < MANY)
                for (int64_t b = 0; b < cut.blocks; ++b)
                    cut.ranges = larger(cut.ranges, ranges_of(keys_of(cut, b)));
            cut.first_unit = num_units_;
            cut.first_partial = partials;
            cut.first_count = counts;
            num_units_ += cut.blocks * cut.ranges * args.kv_heads;
            if (cut.ranges > 1) {
                partials += cut.num_queries * args.heads * cut.ranges;
                counts += cut.blocks * args.kv_heads;
            }
            // What is multiplied, and in its measure what it takes to read the keys.
            const int64_t rows = cut.num_queries * group_;
            work += args.kv_heads * args.dim * cut.context * (2 * rows + 16 * cut.blocks);
        }
        work_ = work;
        partial_size_ = vectors_ * W + 2;
        partials_ = static_cast<float*>(scratch(2, partials * partial_size_ * 4));
        left_ = static_cast<int32_t*>(scratch(3, counts * 4 + 1));
        for (int64_t s = 0; s < num; ++s) {
            if (cuts_[s].ranges == 1) continue;
            for (int64_t i = 0; i < cuts_[s].blocks * args.kv_heads; ++i)
                left_[cuts_[s].first_count + i] = static_cast<int32_t>(cuts_[s].ranges);
        }
    }

    // Units go together that are worth a thread's claim, so that each can ask for what the next
    // one begins with.
    void run() const {
        const int64_t together = larger(1, min(MOST_TOGETHER, num_units_ / (4 * num_threads())));
        auto group = [&](int64_t index) {
            const int64_t end = min(num_units_, (index + 1) * together);
            Unit unit = unit_at(index * together);
            ask_for_first(unit);
            for (int64_t next = index * together + 1; next < end; ++next) {
                const Unit following = unit_at(next);
                run_unit(unit, &following);
                unit = following;
            }
            run_unit(unit, nullptr);
        };
        const int64_t groups = ceil_div(num_units_, together);
        if (work_ < ALONE) {
            for (int64_t i = 0; i < groups; ++i) group(i);
        } else {
            parallel(groups, group);
        }
    }

  private:
    struct Unit {
        int64_t sequence, head, block, queries, range;
        Span all, keys;  // that its queries see, and that it goes through
    };

    Span keys_of(const Cut& cut, int64_t block) const {
        const int64_t first = block * cut.per_block;
        return seen(args_, cut, first, min(cut.per_block, cut.num_queries - first));
    }

    static int64_t ranges_of(Span keys) { return ceil_div(keys.to - keys.from, RANGE); }

    T* out(int64_t sequence, int64_t query, int64_t head) const {
        const int64_t row = cuts_[sequence].first_row + query;
        return static_cast<T*>(args_.out) + (row * args_.heads + head) * args_.dim;
    }

    float* partial(const Cut& cut, int64_t query, int64_t head, int64_t range) const {
        const int64_t row = (query * args_.heads + head) * cut.ranges + range;
        return partials_ + (cut.first_partial + row) * partial_size_;
    }

    Unit unit_at(int64_t index) const {
        int64_t s = 0;
        for (int64_t end = args_.num_sequences; s + 1 < end;) {
            const int64_t middle = (s + end) / 2;
            (cuts_[middle].first_unit <= index ? s : end) = middle;
        }
        const Cut& cut = cuts_[s];
        const int64_t at = index - cut.first_unit;
        Unit unit;
        unit.sequence = s;
        unit.head = at % args_.kv_heads;
        unit.range = at / args_.kv_heads % cut.ranges;
        // The last block of queries first: it sees most, and what takes long shouldn't come last.
        unit.block = cut.blocks - 1 - at / args_.kv_heads / cut.ranges;
        unit.queries = min(cut.per_block, cut.num_queries - unit.block * cut.per_block);
        unit.all = unit.keys = keys_of(cut, unit.block);
        if (cut.ranges > 1) {
            unit.keys.from += unit.range * RANGE;
            unit.keys.to = min(unit.keys.to, unit.keys.from + RANGE);
        }
        return unit;
    }

    void run_unit(const Unit& unit, const Unit* next) const {
        const Cut& cut = cuts_[unit.sequence];
        const int64_t first = unit.block * cut.per_block;
        if (unit.all.to == unit.all.from) {  // a row of padding
            if (unit.range == 0)
                for (int64_t r = 0; r < unit.queries * group_; ++r)
                    __builtin_memset(
                        out(unit.sequence, first + r / group_, unit.head * group_ + r % group_), 0,
                        args_.dim * sizeof(T));
            return;
        }
        if (unit.keys.from < unit.keys.to) attend(unit, next);
        if (cut.ranges == 1) return;
        int32_t* left = left_ + cut.first_count + unit.block * args_.kv_heads + unit.head;
        if (__atomic_sub_fetch(left, 1, __ATOMIC_ACQ_REL) == 0)
            for (int64_t r = 0; r < unit.queries * group_; ++r)
                merge(
                    unit.sequence, first + r / group_, unit.head * group_ + r % group_,
                    ranges_of(unit.all));
    }

    // Puts together what the ranges of a row's keys gave.
    void merge(int64_t sequence, int64_t query, int64_t head, int64_t ranges) const {
        const Cut& cut = cuts_[sequence];
        const int64_t size = vectors_ * W;
        float most = -__builtin_inff();
        for (int64_t i = 0; i < ranges; ++i)
            most = max(partial(cut, query, head, i)[size], most);
        most = Weights::base(most);
        float* sums = static_cast<float*>(scratch(1, size * 4));
        __builtin_memset(sums, 0, size * 4);
        float weight = 0;
        for (int64_t i = 0; i < ranges; ++i) {
            const float* part = partial(cut, query, head, i);
            const float factor = Weights::of(part[size], most, weights_.unit);
            weight += part[size + 1] * factor;
            for (int64_t k = 0; k < size; k += W)
                store(sums + k, load(sums + k) + load(part + k) * factor);
        }
        finish(sums, weight, args_.dim, out(sequence, query, head));
    }

    // Where keys and values of a tile lie.
    struct Tile {
        const T *keys[KEYS], *values[KEYS];
        int64_t count;
    };

    // The tile of a unit that begins with the key `from`.
    void find_tile(const Unit& unit, int64_t from, Tile* tile) const {
        tile->count = min(KEYS, unit.keys.to - from);
        find(args_, unit.sequence, unit.head, from, tile->count, tile->keys, tile->values);
    }

    // What a thread begins with is nowhere yet; what it goes on with it asks for meanwhile.
    void ask_for_first(const Unit& unit) const {
        if (unit.keys.from >= unit.keys.to || !asks(unit)) return;
        Tile tile;
        find_tile(unit, unit.keys.from, &tile);
        ask_for(tile.keys, 0, tile.count);
        ask_for(tile.values, 0, tile.count);
    }

    void attend(const Unit& unit, const Unit* next) const {
        const Cut& cut = cuts_[unit.sequence];
        const int64_t kv_head = unit.head, first = unit.block * cut.per_block;
        const Span keys = unit.keys;
        const int64_t rows = unit.queries * group_;
        Tile tiles[2];  // this one and the next
        find_tile(unit, keys.from, &tiles[0]);
        const Buffers<T, Keys> buffers(args_, rows);
        const int64_t steps = Keys::steps(args_.dim);
        // Strips of about one height: a low last one would leave the multipliers waiting.
        const int64_t strip = ceil_div(rows, ceil_div(rows, MR));
        const T* query = static_cast<const T*>(args_.query) +
                         (cut.first_row + first) * args_.query_row +
                         kv_head * group_ * args_.query_head;
        for (int64_t r = 0; r < rows; r += strip)
            pack_strip<MR>(
                min(strip, rows - r),
                [&](int i) {
                    return query + (r + i) / group_ * args_.query_row +
                           (r + i) % group_ * args_.query_head;
                },
                0, args_.dim, Keys::PER_UNIT * ceil_div(args_.dim, Keys::PER_UNIT),
                buffers.queries + r * steps);
        __builtin_memset(buffers.sums, 0, rows * vectors_ * W * 4);
        for (int64_t r = 0; r < rows; ++r) buffers.met[r] = {-__builtin_inff(), 0};

        const bool ahead = asks(unit);
        int turn = 0;
        for (int64_t at = keys.from; at < keys.to; at += KEYS, turn ^= 1) {
            Tile &tile = tiles[turn], &following = tiles[turn ^ 1];
            const int64_t count = tile.count;
            following.count = 0;
            if (at + KEYS < keys.to) {
                find_tile(unit, at + KEYS, &following);
            } else if (next != nullptr && ahead && next->keys.from < next->keys.to) {
                find_tile(*next, next->keys.from, &following);
            }
            for (int64_t column = 0; column < count; column += COLUMNS) {
                if (ahead) ask_for(following.keys, column, min(column + COLUMNS, following.count));
                pack_keys<Keys>(tile.keys + column, args_.dim, buffers.panel);
                for (int64_t r = 0; r < rows; r += strip)
                    with_rows(min(strip, rows - r), [&](auto m) {
                        constexpr int M = decltype(m)::value;
                        constexpr int N = vectors_at_once(M, COLUMNS / W);
                        for (int64_t j = 0; j < COLUMNS; j += N * W)
                            multiply_keys<Keys, M, N>(
                                buffers.queries + r * steps, buffers.panel + j, steps,
                                buffers.scores + r * KEYS + column + j);
                    });
            }
            if (ahead) ask_for(following.keys, ceil_div(count, COLUMNS) * COLUMNS, following.count);
            for (int64_t r = 0; r < rows; ++r) {
                if (ahead)
                    ask_for(
                        following.values, r * following.count / rows,
                        (r + 1) * following.count / rows);
                const Span own = seen(args_, cut, first + r / group_, 1);
                buffers.factors[r] = weigh(
                    buffers.scores + r * KEYS, count, larger(0, own.from - at),
                    min(count, larger(0, own.to - at)), weights_, buffers.met + r);
            }
            add(buffers, rows, strip, tile.values, count);
        }

        for (int64_t r = 0; r < rows; ++r) {
            const float* sums = buffers.sums + r * vectors_ * W;
            const Met& met = buffers.met[r];
            const int64_t q = first + r / group_, head = kv_head * group_ + r % group_;
            if (cut.ranges == 1) {
                finish(sums, met.sum, args_.dim, out(unit.sequence, q, head));
            } else {
                float* part = partial(cut, q, head, unit.range);
                __builtin_memcpy(part, sums, vectors_ * W * 4);
                part[vectors_ * W] = met.largest;
                part[vectors_ * W + 1] = met.sum;
            }
        }
    }

    // Few rows are over sooner than memory answers, and other heads' numbers lie in between: the CPU
    // alone doesn't see what comes next.
    bool asks(const Unit& unit) const { return unit.queries * group_ <= FEW; }

    // A few at a time: more than the core can keep track of would hold it up.
    void ask_for(const T* const* rows, int64_t from, int64_t to) const {
        constexpr int64_t LINE = 64 / sizeof(T);
        for (int64_t k = from; k < to; ++k)
            for (int64_t i = 0; i < args_.dim; i += LINE) __builtin_prefetch(rows[k] + i);
    }

    // Adds a tile's weighted values to the sums.
    void add(
        const Buffers<T, Keys>& buffers, int64_t rows, int64_t strip, const T** value_rows,
        int64_t count) const {
        auto add_from = [&](auto values) {
            for (int64_t r = 0; r < rows; r += strip)
                with_rows(min(strip, rows - r), [&](auto m) {
                    add_all_values<decltype(m)::value>(
                        buffers.scores + r * KEYS, values, count, buffers.factors + r,
                        buffers.sums + r * vectors_ * W, vectors_);
                });
        };
        if (rows > FEW) {
            float* packed = static_cast<float*>(buffers.values);
            pack_values(value_rows, count, args_.dim, packed);
            add_from(Panels{packed});
            return;
        }
        if (args_.dim % W != 0) {  // vectors would reach past the last number of the cache
            T* copies = static_cast<T*>(buffers.values);
            const int64_t size = vectors_ * W;
            for (int64_t k = 0; k < count; ++k) {
                __builtin_memcpy(copies + k * size, value_rows[k], args_.dim * sizeof(T));
                __builtin_memset(
                    copies + k * size + args_.dim, 0, (size - args_.dim) * sizeof(T));
                value_rows[k] = copies + k * size;
            }
        }
        add_from(Rows<T>{value_rows, 0});
    }

    const AttentionArgs& args_;
    const Weights weights_;
    int64_t vectors_, group_, num_units_ = 0, work_, partial_size_;
    Cut* cuts_;
    float* partials_;
    int32_t* left_;
};

}  // namespace

void attention(const AttentionArgs& args) {
    if (args.dtype == DType::f32) {
        Step<float, Floats>(args).run();
    } else {
        Step<bf16, HalfKeys>(args).run();
    }
}

}  // namespace mm::MM_ISA
