#include "scoring_ops.h"

#ifdef TSO_SCORING_X86
#pragma GCC target("avx2")
#include <immintrin.h>

#define TSO_VECTOR_BYTES 32

namespace tso {
namespace {
#include "scoring_generic.inl"

constexpr ScoringOps kOps = {"avx2", classify, affine, rank_table, mean, mean_of_batch, values, compare, sort_columns,
                             best_and_worst};
}  // namespace

const ScoringOps* scoring_ops_avx2() { return &kOps; }

}  // namespace tso
#endif
