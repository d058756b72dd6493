// Calls of ops that are kept, to be made again without Python.
#pragma once

#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace mm {

// A step of decodes makes hundreds of calls, the same at each step but for the numbers in its
// tensors. While a recording is on, this thread's calls are kept and not made.
class Recording {
  public:
    Recording() = default;
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;
    ~Recording() { stop(); }

    void start() {
        if (current_ != nullptr) throw std::runtime_error("a recording is on already.");
        current_ = this;
    }

    void stop() {
        if (current_ == this) current_ = nullptr;
    }

    // Makes all calls, in their order.
    void run() const {
        for (const auto& call : calls_) call();
    }

    size_t size() const { return calls_.size(); }

    // That of this thread which is on; null: none is.
    static Recording* current() { return current_; }

    void add(std::function<void()> call) { calls_.push_back(std::move(call)); }

  private:
    static inline thread_local Recording* current_ = nullptr;
    std::vector<std::function<void()>> calls_;
};

}  // namespace mm
