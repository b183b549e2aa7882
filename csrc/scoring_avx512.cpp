#include "scoring_ops.h"

#ifdef TSO_SCORING_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,prefer-vector-width=512")
#include <immintrin.h>

#define TSO_ISA "avx512"
#define TSO_VECTOR_BYTES 64

namespace tso {
namespace {
#include "scoring_generic.inl"
}  // namespace

const ScoringOps* scoring_ops_avx512() { return &kOps; }

}  // namespace tso
#endif
