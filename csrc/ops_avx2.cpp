#include "ops.h"

#ifdef TSO_X86
#pragma GCC target("avx2,fma,f16c")

#define TSO_ISA "avx2"
#define TSO_VECTOR_BYTES 32
#define TSO_MICRO_ROWS 6
#define TSO_MICRO_VECTORS 2

namespace tso {
namespace {
#include "ops_generic.inl"
}  // namespace

const Ops* avx2_ops(Dtype dtype) { return dtype == Dtype::f64 ? &kDouble : &kFloat; }

}  // namespace tso
#endif
