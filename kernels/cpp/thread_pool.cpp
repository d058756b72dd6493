// A job is published as one 64-bit word: its number above, the next unclaimed chunk below. A
// thread claims a chunk by raising the word, which fails if the job has changed meanwhile: so a
// thread that wakes late can neither work on a job that is over nor hold up the next one.
//
// Whoever waits spins for some microseconds only, which bridges the gap between two kernels of
// one step, and then sleeps: an idle engine takes no time from others, and where another process
// holds a core, the sleeping caller's core is free for the thread that was put off.
#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace mm {
namespace {

constexpr auto SPIN = std::chrono::microseconds(50);
constexpr uint64_t CLOSED = 0xffffffff;  // no chunk of this job can be claimed

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// True once `ready` is; false if it wasn't for as long as spinning is worth its while.
template <class F>
bool spin(F&& ready) {
    const auto end = std::chrono::steady_clock::now() + SPIN;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// std::condition_variable, which a wheel can't have: its `wait` asks for the C++ library of GCC 12
// or newer (GLIBCXX_3.4.30).
class Condition {
  public:
    template <class F>
    void wait(std::unique_lock<std::mutex>& lock, F&& ready) {
        while (!ready()) pthread_cond_wait(&condition_, lock.mutex()->native_handle());
    }
    void notify_one() { pthread_cond_signal(&condition_); }
    void notify_all() { pthread_cond_broadcast(&condition_); }

  private:
    pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

class Pool {
  public:
    explicit Pool(int size) : size_(size) {
        workers_.reserve(size - 1);
        try {
            for (int i = 1; i < size; ++i) workers_.emplace_back([this] { work(); });
        } catch (const std::system_error&) {
            // The system gives no more threads: those that there are do the work.
        }
    }

    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            over_ = true;
        }
        published_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int size() const { return size_; }
    int asleep() const { return asleep_.load(); }

    void run(int64_t count, Chunk chunk, void* job) {
        const uint64_t number = (word_.load(std::memory_order_relaxed) >> 32) + 1;
        word_.store(number << 32 | CLOSED);
        // With that in `claim_one`: who reads what follows can't claim by the word as it was before.
        std::atomic_thread_fence(std::memory_order_release);
        chunk_.store(chunk, std::memory_order_relaxed);
        job_.store(job, std::memory_order_relaxed);
        count_.store(count, std::memory_order_relaxed);
        left_.store(count, std::memory_order_relaxed);
        failed_.store(false, std::memory_order_relaxed);
        word_.store(number << 32);  // sequentially consistent: against `asleep_` in `work`
        if (asleep_.load() > 0) {
            // Under the lock: a worker that is about to sleep has looked before, or will see it.
            { std::lock_guard lock(mutex_); }
            published_.notify_all();
        }
        while (claim_one()) {
        }
        auto done = [this] { return left_.load(std::memory_order_acquire) == 0; };
        if (!spin(done)) {
            std::unique_lock lock(mutex_);
            finished_.wait(lock, done);
        }
        if (failed_.load(std::memory_order_relaxed)) throw std::bad_alloc();
    }

  private:
    static bool claimable(uint64_t word, int64_t count) {
        return static_cast<int64_t>(word & CLOSED) < count;
    }

    bool any_left() const {
        return claimable(word_.load(), count_.load(std::memory_order_relaxed)) && open();
    }

    bool open() const { return (word_.load() & CLOSED) != CLOSED; }

    bool claim_one() {
        uint64_t word = word_.load(std::memory_order_acquire);
        while (true) {
            const uint64_t index = word & CLOSED;
            const int64_t count = count_.load(std::memory_order_relaxed);
            Chunk chunk = chunk_.load(std::memory_order_relaxed);
            void* job = job_.load(std::memory_order_relaxed);
            if (index == CLOSED || static_cast<int64_t>(index) >= count) return false;
            std::atomic_thread_fence(std::memory_order_acquire);
            // Success means that the word didn't change since it was read: what was read in
            // between is this job's.
            if (word_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) {
                try {
                    chunk(job, static_cast<int64_t>(index));
                } catch (const std::bad_alloc&) {  // all that a chunk can throw: see `scratch`
                    failed_.store(true, std::memory_order_relaxed);
                }
                if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                    // The caller may be on its way to sleep.
                    { std::lock_guard lock(mutex_); }
                    finished_.notify_one();
                }
                return true;
            }
        }
    }

    void work();

    const int size_;  // as asked for
    std::vector<std::thread> workers_;
    alignas(64) std::atomic<uint64_t> word_{CLOSED};
    alignas(64) std::atomic<int64_t> left_{0};
    alignas(64) std::atomic<Chunk> chunk_{nullptr};
    std::atomic<void*> job_{nullptr};
    std::atomic<int64_t> count_{0};
    std::atomic<int> asleep_{0};
    std::atomic<bool> failed_{false};
    std::mutex mutex_;
    Condition published_;
    Condition finished_;
    bool over_ = false;
};

thread_local bool inside = false;  // this thread runs a chunk, or has published a job

void Pool::work() {
    inside = true;
    auto ready = [this] { return any_left(); };
    while (true) {
        while (claim_one()) {
        }
        if (spin(ready)) continue;
        std::unique_lock lock(mutex_);
        asleep_.fetch_add(1);
        published_.wait(lock, [&] { return over_ || any_left(); });
        asleep_.fetch_sub(1);
        if (over_) return;
    }
}

std::mutex one_job;  // held while a job runs, and while the pool changes
std::atomic<int> wanted{1};
Pool* pool = nullptr;  // never freed but on a change of size: threads of a forked child are gone

// A child of fork has none of the threads, and may have inherited locks that are held.
void forget_after_fork() {
    pool = nullptr;
    new (&one_job) std::mutex;
}

void stop_at_exit() {
    std::unique_lock lock(one_job, std::try_to_lock);
    if (!lock.owns_lock()) return;
    delete pool;
    pool = nullptr;
}

struct Alone {
    explicit Alone() : before(inside) { inside = true; }
    ~Alone() { inside = before; }
    bool before;
};

}  // namespace

void run_chunks(int64_t count, Chunk chunk, void* job) {
    if (count <= 0) return;
    const int size = wanted.load(std::memory_order_relaxed);
    if (count > 1 && size > 1 && !inside && count < static_cast<int64_t>(CLOSED)) {
        std::unique_lock lock(one_job, std::try_to_lock);
        if (lock.owns_lock()) {
            Alone alone;
            if (pool == nullptr || pool->size() != size) {
                static const int registered = [] {
                    std::atexit(stop_at_exit);
                    return pthread_atfork(nullptr, nullptr, forget_after_fork);
                }();
                (void)registered;
                delete pool;
                pool = nullptr;
                pool = new Pool(size);
            }
            pool->run(count, chunk, job);
            return;
        }
    }
    for (int64_t i = 0; i < count; ++i) chunk(job, i);
}

int num_threads() { return wanted.load(); }

void set_num_threads(int count) { wanted.store(count < 1 ? 1 : count); }

int num_asleep() {
    std::lock_guard lock(one_job);
    return pool == nullptr ? 0 : pool->asleep();
}

void* scratch(int slot, size_t bytes) {
    struct Buffers {
        void* at[4] = {};
        size_t size[4] = {};
        ~Buffers() {
            for (void* buffer : at) std::free(buffer);
        }
    };
    thread_local Buffers buffers;
    if (buffers.size[slot] < bytes) {
        std::free(buffers.at[slot]);
        buffers.at[slot] = nullptr;
        buffers.size[slot] = 0;
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        void* buffer = nullptr;
        if (posix_memalign(&buffer, 64, rounded) != 0) throw std::bad_alloc();
        buffers.at[slot] = buffer;
        buffers.size[slot] = rounded;
    }
    return buffers.at[slot];
}

}  // namespace mm
