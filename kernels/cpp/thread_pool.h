// Threads that share one job at a time: see thread_pool.cpp for how they wait.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mm {

using Chunk = void (*)(void* job, int64_t index);

// Calls `chunk(job, i)` for every i below `count`, on the pool's threads and the caller's own.
// Chunks are claimed one by one, so that a thread which the system took off its core holds up
// no more than the chunk it is in. A call from within a chunk, or while another thread's job
// runs, is done by the caller alone.
void run_chunks(int64_t count, Chunk chunk, void* job);

template <class F>
void parallel(int64_t count, const F& body) {
    run_chunks(
        count, [](void* job, int64_t i) { (*static_cast<const F*>(job))(i); },
        const_cast<F*>(&body));
}

int num_threads();
void set_num_threads(int count);

// Memory of the calling thread, 64-byte aligned, until its next call with this slot.
void* scratch(int slot, size_t bytes);

// Threads that are asleep for want of a job, and how often one was woken: for tests.
int num_asleep();

}  // namespace mm
