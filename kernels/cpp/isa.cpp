// Which instruction set runs: the best that this file was built for and the CPU has.
#include <atomic>
#include <cstring>

#include "ops.h"

#define MM_DECLARE(name) \
    namespace mm::name { \
    extern const Ops table; \
    }
#if defined(__x86_64__)
MM_DECLARE(baseline)
MM_DECLARE(avx2)
MM_DECLARE(avx512)
MM_DECLARE(avx512_bf16)
#elif defined(__aarch64__)
MM_DECLARE(neon)
MM_DECLARE(neon_bf16)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#else
MM_DECLARE(baseline)
#endif

namespace mm {
namespace {

struct Found {
    Isa at[8];
    int count = 0;
    void add(bool has, const char* name, const Ops& table) {
        if (has) at[count++] = {name, &table};
    }
};

#if defined(__aarch64__)
bool has_bf16() {
#if defined(__linux__)
    return getauxval(AT_HWCAP2) & (1 << 14);  // HWCAP2_BF16
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}
#endif

Found find() {
    Found found;
#if defined(__x86_64__)
    // These ask the system as well whether it saves the wider registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("avx512vnni");
    found.add(bf16, "avx512_bf16", avx512_bf16::table);
    found.add(avx512, "avx512", avx512::table);
    found.add(avx2, "avx2", avx2::table);
    found.add(true, "baseline", baseline::table);
#elif defined(__aarch64__)
    found.add(has_bf16(), "neon_bf16", neon_bf16::table);
    found.add(true, "neon", neon::table);
#else
    found.add(true, "baseline", baseline::table);
#endif
    return found;
}

const Found& found() {
    static const Found all = find();
    return all;
}

std::atomic<int> in_use{0};

}  // namespace

const Isa* runnable_isas(int* count) {
    *count = found().count;
    return found().at;
}

const Ops& ops() { return *found().at[in_use.load(std::memory_order_relaxed)].ops; }

const char* isa() { return found().at[in_use.load()].name; }

bool use_isa(const char* name) {
    for (int i = 0; i < found().count; ++i)
        if (std::strcmp(found().at[i].name, name) == 0) {
            in_use.store(i);
            return true;
        }
    return false;
}

}  // namespace mm
