#include "scoring_ops.h"

#define TSO_VECTOR_BYTES 16  // SSE2, NEON, and what else has 128-bit registers

namespace tso {
namespace {
#include "scoring_generic.inl"

constexpr ScoringOps kOps = {"portable", classify, affine, rank_table, mean, mean_of_batch, values, compare, sort_columns,
                             best_and_worst};
}  // namespace

const ScoringOps* scoring_ops_portable() { return &kOps; }

}  // namespace tso
