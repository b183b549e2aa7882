#include "scoring_ops.h"

#define TSO_ISA "portable"
#define TSO_VECTOR_BYTES 16  // SSE2, NEON, and what else has 128-bit registers

namespace tso {
namespace {
#include "scoring_generic.inl"
}  // namespace

const ScoringOps* scoring_ops_portable() { return &kOps; }

}  // namespace tso
