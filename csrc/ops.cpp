#include "ops.h"

#ifdef TSO_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tso {
namespace {

#ifdef TSO_X86
// The kernel hands out the 8 KiB tile state only to processes that ask (linux/Documentation/arch/x86/xstate.rst).
bool may_use_amx() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool has_tiles = d & (1u << 24), has_bf16 = d & (1u << 22);
    if (!has_tiles || !has_bf16) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Tables {
    const Ops* bf16[7] = {};
    const Ops* others[4] = {};
    const Ops* f64[4] = {};

    Tables() {
        int i = 0, j = 0;
#ifdef TSO_X86
        __builtin_cpu_init();
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
        if (has_bf16 && may_use_amx()) bf16[i++] = amx_ops();
        if (has_bf16) bf16[i++] = avx512_bf16_ops();
        if (has_avx512) add(avx512_ops, i, j);
        if (has_avx2) add(avx2_ops, i, j);
#endif
        add(portable_ops, i, j);
#ifdef TSO_X86
        if (has_bf16) bf16[i++] = amx_emulated_ops();
#endif
    }

    void add(const Ops* (*ops)(Dtype), int& i, int& j) {
        bf16[i++] = ops(Dtype::bf16);
        others[j] = ops(Dtype::f32);
        f64[j++] = ops(Dtype::f64);
    }
};

}  // namespace

const Ops* const* available_ops(Dtype dtype) {
    static const Tables tables;
    return dtype == Dtype::bf16 ? tables.bf16 : dtype == Dtype::f64 ? tables.f64 : tables.others;
}

}  // namespace tso
