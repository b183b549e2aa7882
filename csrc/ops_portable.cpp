#include "ops.h"

#define TSO_ISA "portable"
#define TSO_VECTOR_BYTES 16  // SSE2, NEON, and what else has 128-bit registers
#define TSO_MICRO_ROWS 4
#define TSO_MICRO_VECTORS 2

namespace tso {
namespace {
#include "ops_generic.inl"
}  // namespace

const Ops* portable_ops(Dtype dtype) { return dtype == Dtype::f64 ? &kDouble : &kFloat; }

}  // namespace tso
