// How many units of a job a thread claims at once: many at first, few at the end.
//
// Each new share costs: what comes first isn't on its way from memory yet. But the last shares are
// what threads wait for one another in. So a share is a part of what is left, as in guided
// self-scheduling (Polychronopoulos and Kuck, doi:10.1109/TC.1987.5009495).
#pragma once

#include "thread_pool.h"
#include "vec.h"

namespace mm::MM_ISA {

// `total` units, at least one, in shares of `least` to `most` (of both of which `least` is a
// factor, as of every share but the last). `starts` holds `count` + 1 numbers.
struct Shares {
    const int64_t* starts;
    int64_t count;

    int64_t size(int64_t share) const { return starts[share + 1] - starts[share]; }
};

MM_INLINE Shares shares_of(int64_t total, int64_t least, int64_t most, int slot) {
    constexpr int64_t PARTS = 2;  // of what is left, for each thread
    const int64_t room = ceil_div(total, least) + 1;
    int64_t* starts = static_cast<int64_t*>(scratch(slot, room * sizeof(int64_t)));
    const int64_t parts = PARTS * num_threads();
    int64_t count = 0, at = 0;
    while (at < total) {
        starts[count++] = at;
        const int64_t part = (total - at) / parts / least * least;
        at += min(part < least ? least : part, most);
    }
    starts[count] = total;
    return {starts, count};
}

}  // namespace mm::MM_ISA
