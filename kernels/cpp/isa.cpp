// Which instruction set runs: the best that was built and the CPU has.
#include <atomic>
#include <cstring>

#include "ops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// The build defines MM_ISAS as an X(name) for each set that it compiles, the best first.
#define X(name) \
    namespace mm::name { \
    extern const Ops table; \
    }
MM_ISAS
#undef X

namespace mm {
namespace {

[[maybe_unused]] bool has_baseline() { return true; }
#if defined(__x86_64__)
// These ask the system as well whether it saves the wider registers.
[[maybe_unused]] bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
[[maybe_unused]] bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vnni");
}
// The tiles are large: Linux gives their registers to a process that asks for them.
[[maybe_unused]] bool has_amx() {
#if defined(__linux__)
    constexpr unsigned BF16 = 1 << 22, TILES = 1 << 24;
    constexpr long ASK_FOR = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return (d & BF16) && (d & TILES) && syscall(SYS_arch_prctl, ASK_FOR, TILE_DATA) == 0;
#else
    return false;
#endif
}
[[maybe_unused]] bool has_tiles() { return true; }  // emulated
#elif defined(__aarch64__)
[[maybe_unused]] bool has_neon() { return true; }
[[maybe_unused]] bool has_neon_bf16() {
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

struct Found {
    Isa at[8];
    int count = 0;
    void add(bool has, const char* name, const Ops& table) {
        if (has) at[count++] = {name, &table};
    }
};

Found find() {
    Found found;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#define X(name) found.add(has_##name(), #name, name::table);
    MM_ISAS
#undef X
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
