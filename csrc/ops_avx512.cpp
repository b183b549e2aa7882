#include "ops.h"

#ifdef TSO_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

#define TSO_ISA "avx512"
#define TSO_VECTOR_BYTES 64
#define TSO_MICRO_ROWS 6
#define TSO_MICRO_VECTORS 4

namespace tso {
namespace {
#include "ops_generic.inl"
}  // namespace

const Ops* avx512_ops(Dtype dtype) { return dtype == Dtype::f64 ? &kDouble : &kFloat; }

}  // namespace tso
#endif
