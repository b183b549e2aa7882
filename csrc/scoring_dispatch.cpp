#include "scoring_ops.h"

namespace tso {
namespace {

struct Tables {
    const ScoringOps* ops[4] = {};

    Tables() {
        int i = 0;
#ifdef TSO_SCORING_X86
        __builtin_cpu_init();
        const bool has_avx2 = __builtin_cpu_supports("avx2");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (has_avx512) ops[i++] = scoring_ops_avx512();
        if (has_avx2) ops[i++] = scoring_ops_avx2();
#endif
        ops[i++] = scoring_ops_portable();
    }
};

}  // namespace

const ScoringOps* const* available_scoring_ops() {
    static const Tables tables;
    return tables.ops;
}

}  // namespace tso
