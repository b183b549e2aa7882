#include "scoring_ops.h"

#ifdef TSO_SCORING_X86
#pragma GCC target("avx2")
#include <immintrin.h>

#define TSO_ISA "avx2"
#define TSO_VECTOR_BYTES 32

namespace tso {
namespace {
#include "scoring_generic.inl"
}  // namespace

const ScoringOps* scoring_ops_avx2() { return &kOps; }

}  // namespace tso
#endif
