// Drawing a token from each row, cut by top-k, top-p and min-p, without sorting the vocabulary.
//
// The order of a sort isn't needed, only where it would be cut: at a weight such that the tokens
// above it stay, those below go, and of those at it the first ids stay. Weights are positive
// floats, whose bits, read as integers, lie in the same order. The edge is searched for among the
// bits by counting, or summing, what is not below each of four candidates. What lies outside the
// two candidates that the edge is between is dropped, and so the later passes are short.
#include "rows.h"

namespace mm::MM_ISA {
namespace {

constexpr int64_t BLOCK = 1024;        // weights that are summed in float32
constexpr int32_t ONE = 0x3f800000;    // the bits of 1, the largest weight
constexpr float OUTSIDE = -1.0f;       // fills the last vector: below every weight

// The first candidates: 2 to the -16, -9, -5 and -2. Edges lie there, not amid all floats.
constexpr int32_t FIRST[4] = {0x37800000, 0x3b000000, 0x3d000000, 0x3e800000};

struct Weights {
    const float* at;
    int64_t num;  // to the next multiple of W there is OUTSIDE
};

MM_INLINE float from_bits(int32_t bits) {
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

MM_INLINE vf masked(vi mask, vf v) { return (vf)((vi)v & mask); }

MM_INLINE bool any(vi mask) {
    int64_t parts[W / 2], all = 0;
    store_as(parts, mask);
    for (int i = 0; i < W / 2; ++i) all |= parts[i];
    return all != 0;
}

MM_INLINE float add_up(vi counts) { return sum(__builtin_convertvector(counts, vf)); }

// Writes e^(x / temperature - the largest such) to `weights`, and the sum of each block to `sums`.
// NaN or infinity among the logits, and a row of -infinity, end up as NaN in the sums.
void weigh(const float* logits, int64_t size, float temperature, float* weights, double* sums) {
    vf tops[4];
    for (vf& top : tops) top = splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + 4 * W <= size; i += 4 * W)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) tops[j] = max(load(logits + i + j * W), tops[j]);
    float top = largest(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
    for (; i < size; ++i) top = max(logits[i], top);
    // Divided as the reference divides, so that the same weights are tied.
    top /= temperature;
    const vf divisor = splat(temperature);

    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t end = min(start + BLOCK, size);
        vf total{};
        for (i = start; i + W <= end; i += W) {
            const vf weight = exp(load(logits + i) / divisor - top);
            store(weights + i, weight);
            total += weight;
        }
        float last = 0.0f;
        if (i < end) {
            float rest[W];
            for (int j = 0; j < W; ++j) rest[j] = i + j < end ? logits[i + j] : -__builtin_inff();
            store(weights + i, exp(load(rest) / divisor - top));
            for (int j = 0; j < W; ++j) {
                if (i + j < end) {
                    last += weights[i + j];
                } else {
                    weights[i + j] = OUTSIDE;
                }
            }
        }
        sums[start / BLOCK] = static_cast<double>(sum(total)) + last;
    }
}

// How many weights are not below each of four, and their sum.
struct Measures {
    double count[4] = {}, mass[4] = {};
};

template <bool MASS>
void measure(Weights weights, const float (&from)[4], Measures& out) {
    out = {};
    for (int64_t start = 0; start < weights.num; start += BLOCK) {
        const int64_t end = min(start + BLOCK, weights.num);
        vi counts[4] = {};
        vf masses[4] = {};
        for (int64_t i = start; i < end; i += W) {
            const vf weight = load(weights.at + i);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const vi is_in = (vi)(weight >= from[j]);
                counts[j] -= is_in;
                if constexpr (MASS) masses[j] += masked(is_in, weight);
            }
        }
        for (int j = 0; j < 4; ++j) {
            out.count[j] += add_up(counts[j]);
            if constexpr (MASS) out.mass[j] += sum(masses[j]);
        }
    }
}

// The weights from `low` on and below `high`, to `out`, which may be where they lie.
Weights gather(Weights weights, float low, float high, float* out) {
    int64_t num = 0;
    const int64_t end = ceil_div(weights.num, W) * W;
    for (int64_t i = 0; i < end;) {
        const int64_t next = min(i + 4 * W, end);
        vi found{};
        for (int64_t j = i; j < next; j += W) {
            const vf weight = load(weights.at + j);
            found |= (vi)(weight >= low) & (vi)(weight < high);
        }
        if (any(found))
            for (int64_t j = i; j < next; ++j) {
                const float weight = weights.at[j];
                out[num] = weight;
                num += weight >= low && weight < high;
            }
        i = next;
    }
    for (int64_t i = num; i % W; ++i) out[i] = OUTSIDE;
    return {out, num};
}

// The largest bits, from `low` on, that as many weights as `wanted` (MASS: with that sum) are not
// below. Counting may stop at lower bits that just as many are not below.
template <bool MASS>
int32_t search(Weights weights, int32_t low, double wanted, float* buffer) {
    int32_t high = ONE + 1;
    double dropped = 0;           // the measure of those that were, as they are not below `high`
    double from_high = 0;         // that of those among `weights`
    double num_from_low = static_cast<double>(weights.num), num_from_high = 0;
    for (bool first = true; high - low > 1; first = false) {
        int32_t bits[4];
        float from[4];
        const int32_t step = high - low < 5 ? 1 : (high - low) / 5;
        for (int j = 0; j < 4; ++j) {
            bits[j] = first && low < FIRST[0] ? FIRST[j] : low + (j + 1) * step;
            if (bits[j] > high) bits[j] = high;
            from[j] = from_bits(bits[j]);
        }
        Measures found;
        measure<MASS>(weights, from, found);
        const double(&value)[4] = MASS ? found.mass : found.count;
        int enough = 0;
        while (enough < 4 && bits[enough] < high && dropped + value[enough] >= wanted) ++enough;
        if (enough > 0) {
            low = bits[enough - 1];
            num_from_low = found.count[enough - 1];
            if (!MASS && dropped + value[enough - 1] == wanted) return low;
        }
        if (enough < 4) {
            high = bits[enough];
            num_from_high = found.count[enough];
            from_high = value[enough];
        }
        if (2 * (num_from_low - num_from_high) < static_cast<double>(weights.num)) {
            weights = gather(weights, from_bits(low), from_bits(high), buffer);
            dropped += from_high;
            num_from_low = static_cast<double>(weights.num);
            num_from_high = from_high = 0;
        }
    }
    return low;
}

// What is cut: weights below `edge`, those at it from the id `ties_end` on, all below `floor`.
struct Cut {
    float edge, floor;
    int64_t ties_end;
    MM_INLINE vi stays(const Cut& cut, vf weight, vi ids) {
        const vi early = (vi)(ids < static_cast<int32_t>(cut.ties_end));
        return ((vi)(weight > cut.edge) | ((vi)(weight == cut.edge) & early)) &
               (vi)(weight >= cut.floor);
    }
    bool stays(float weight, int64_t id) const {
        return (weight > edge || (weight == edge && id < ties_end)) && weight >= floor;
    }
};

// The id after the `num`-th weight of those that are `edge`.
int64_t end_of_ties(Weights weights, float edge, double num) {
    if (num < 1) return 0;
    for (int64_t i = 0; i < weights.num; i += W)
        if (any((vi)(load(weights.at + i) == edge)))
            for (int64_t j = i; j < min(i + W, weights.num); ++j)
                if (weights.at[j] == edge && --num < 1) return j + 1;
    return weights.num;
}

Cut find_cut(Weights all, double mass, int64_t k, double p, float floor, float* buffer) {
    int32_t edge = 0;
    const double size = static_cast<double>(all.num);
    double num_at = size, num_ties = size;  // of the weights at the edge, those that stay
    Weights weights = all;  // without those that top-k cuts
    Measures found;
    if (k < all.num) {
        edge = search<false>(weights, edge, static_cast<double>(k), buffer);
        const float around[4] = {from_bits(edge), from_bits(edge + 1), 2, 2};
        measure<true>(weights, around, found);
        num_at = found.count[0] - found.count[1];
        num_ties = static_cast<double>(k) - found.count[1];
        if (num_ties > num_at) num_ties = num_at;
        mass = found.mass[1] + num_ties * from_bits(edge);
        if (p < 1 && 2 * found.count[0] < size)
            weights = gather(all, from_bits(edge), 2, buffer);
    }
    if (p < 1) {
        const double wanted = mass * p;
        // After the weights that are searched, if those lie in the buffer as well.
        float* free = buffer + (weights.at == buffer ? ceil_div(weights.num, W) * W : 0);
        const int32_t edge_p = search<true>(weights, edge, wanted, free);
        const float around[4] = {from_bits(edge_p), from_bits(edge_p + 1), 2, 2};
        measure<true>(weights, around, found);
        num_at = found.count[0] - found.count[1];
        // The token that reaches the mass stays, and the likeliest stays in any case.
        const double weight = edge_p > 0 ? from_bits(edge_p) : 1.0;
        double needed = __builtin_ceil((wanted - found.mass[1]) / weight);
        if (needed < 1 && found.count[1] == 0) needed = 1;
        if (edge_p != edge || needed < num_ties) num_ties = needed;
        edge = edge_p;
    }
    Cut cut{from_bits(edge), floor, all.num};
    if (num_ties < num_at) cut.ties_end = end_of_ties(all, cut.edge, num_ties);
    return cut;
}

// The sums of what stays of each block, to `sums`; its weights, and zeros, to `kept` if that is
// not null.
void sum_kept(Weights weights, const Cut& cut, double* sums, float* kept) {
    vi ids;
    for (int j = 0; j < W; ++j) ids[j] = j;
    for (int64_t start = 0; start < weights.num; start += BLOCK) {
        const int64_t end = min(start + BLOCK, weights.num);
        vf total{};
        for (int64_t i = start; i < end; i += W, ids += W) {
            const vf weight = load(weights.at + i);
            const vf staying = masked(Cut::stays(cut, weight, ids), weight);
            total += staying;
            if (kept != nullptr) store(kept + i, staying, Part{min(W, end - i)});
        }
        sums[start / BLOCK] = sum(total);
    }
}

// The first id at which the running sum of what stays exceeds `share` of it all; the last that
// stays where rounding leaves none, and 0 where nothing stays.
int64_t cross(Weights weights, const Cut& cut, const double* sums, double share) {
    const int64_t blocks = ceil_div(weights.num, BLOCK);
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += sums[b];
    const double goal = share * total;
    double running = 0, before = 0;
    int64_t block = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        if (!(sums[b] > 0)) continue;
        block = b;
        before = running;
        running += sums[b];
        if (running > goal) break;
    }
    int64_t last = 0;
    for (int64_t i = block * BLOCK; i < min(block * BLOCK + BLOCK, weights.num); ++i) {
        const float weight = weights.at[i];
        if (!(weight > 0 && cut.stays(weight, i))) continue;
        last = i;
        before += weight;
        if (before > goal) break;
    }
    return last;
}

int64_t draw(const SampleArgs& args, int64_t row) {
    const int64_t size = args.size;
    // Room for the vector that the last weights are in.
    float* weights = static_cast<float*>(scratch(0, sizeof(float) * (size + W)));
    double* sums = static_cast<double*>(scratch(1, sizeof(double) * (size / BLOCK + 1)));
    weigh(args.logits + row * args.stride, size, args.temperature[row], weights, sums);
    double mass = 0;
    for (int64_t b = 0; b < ceil_div(size, BLOCK); ++b) mass += sums[b];
    float* kept = args.kept == nullptr ? nullptr : args.kept + row * size;
    if (!(mass > 0)) {  // there is no distribution
        for (int64_t i = 0; kept != nullptr && i < size; ++i) kept[i] = 0;
        return 0;
    }
    const int64_t k = args.top_k[row] < 1 ? 1 : args.top_k[row];
    const double p = args.top_p[row];
    const Weights all{weights, size};
    Cut cut{0, args.min_p[row], size};
    if (k < size || p < 1) {
        // Weights of top-k, and what is left of them or of all: see find_cut.
        float* buffer = static_cast<float*>(scratch(2, sizeof(float) * (2 * size + 4 * W)));
        cut = find_cut(all, mass, k, p, cut.floor, buffer);
        sum_kept(all, cut, sums, kept);
    } else if (cut.floor > 0 || kept != nullptr) {
        sum_kept(all, cut, sums, kept);
    }
    return cross(all, cut, sums, args.uniform[row]);
}

}  // namespace

void sample(const SampleArgs& args) {
    constexpr int64_t COST = 8;  // of a logit, in numbers that are read and written
    by_rows(args.num, args.size * COST, [&](int64_t row) { args.sampled[row] = draw(args, row); });
}

}  // namespace mm::MM_ISA
