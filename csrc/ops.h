// The inner loops of the log-prob op, one table of them per instruction set and arithmetic. No std templates in the files
// that fill the tables: they are compiled for instructions that the machine may not have, and an inline function of the
// standard library compiled there could be the copy that the linker keeps for everyone.
//
// Every product is C[M, N] (+)= A[M, K] B[K, N] with float or double accumulators. K is counted in groups of kGroup = `group`
// consecutive elements: 2 for bf16, whose products are summed in pairs, else 1. A "word" is one group.
//   A: words at A[m * row_stride + k * group_stride].
//   B: packed in panels of 64 columns, [K][width] words each; the last panel is as wide as its columns, rounded up to `lanes`.
#pragma once
#include <cstdint>

namespace tso {

enum class Dtype { f64, f32, bf16, f16 };

constexpr int64_t dtype_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
constexpr int64_t kPanel = 64;

struct SoftmaxTile {
    const void* logits;  // [num_vocab, kPanel] accumulators of h W^T; overwritten
    int64_t num_vocab, width;
    const void* bias;    // [num_vocab] accumulators or null
    double softcap;      // 0: none
    double scale;        // 1 / temperature
    const void* offset;  // [width] accumulators, in powers of two: exponentials are 2^(logit log2(e) - offset)
    void* exps;          // [num_vocab, exps_stride] elements, or null: nothing is stored. Times 1 - tanh^2 under a softcap.
    int64_t exps_stride;
    void* sums;  // [width] accumulators, the tile's sums are added; or, with find_max, maxima of the logits times log2(e)
    bool find_max;
};

struct Ops {
    const char* isa;
    Dtype element;  // of packed operands and stored exponentials
    int64_t element_size;
    int64_t acc_size;  // 4: float, 8: double
    int64_t group;
    int64_t lanes;        // columns of a panel come in multiples of this
    int64_t row_align;    // ranges of K over tokens start and end at multiples of this
    int64_t group_align;  // K in groups is a multiple of this

    // One panel: `width` columns (a multiple of `lanes`) of B, `num_groups` of K.
    void (*gemm)(const void* A, int64_t row_stride, int64_t group_stride, const void* B, int64_t width, void* C, int64_t ldc,
                 int64_t M, int64_t num_groups, bool accumulate);
    // src [rows, columns] -> elements [rows, ld_dst]
    void (*convert)(const void* src, Dtype dtype, int64_t ld_src, int64_t rows, int64_t columns, void* dst, int64_t ld_dst);
    // One panel of B with K = rows of src and N = its columns; rows are multiplied by row_scale (accumulators) unless null.
    // Zeros beyond `rows` up to num_groups and beyond `columns` up to width.
    void (*pack_rows)(const void* src, Dtype dtype, int64_t ld, int64_t rows, int64_t columns, const void* row_scale,
                      int64_t num_groups, int64_t width, void* dst);
    // One panel of B with K = columns of src and N = its rows: the transpose.
    void (*pack_columns)(const void* src, Dtype dtype, int64_t ld, int64_t rows, int64_t columns, int64_t num_groups,
                         int64_t width, void* dst);
    // Stored exponentials [num_vocab, tokens] -> operand A with K = vocabulary and M = tokens. Sets its strides. dst
    // has room for num_groups * (tokens + 32) words.
    const void* (*vocab_operand)(const void* exps, int64_t ld, int64_t num_vocab, int64_t tokens, int64_t num_groups, void* dst,
                                 int64_t* row_stride, int64_t* group_stride);
    void (*softmax_tile)(const SoftmaxTile& tile);
    // dst[r, c] = row_scale[r] * src[r, c], from accumulators.
    void (*store)(const void* src, int64_t ld_src, const void* row_scale, int64_t rows, int64_t columns, void* dst, Dtype dtype,
                  int64_t ld_dst);
    // Adds a tile of accumulators to a sum kept in total and rest (dtype: of the inputs): f32 and f64 in total; bf16 and f16
    // as a float of 24 bits, the upper 16 in the memory of total and 8 more in rest, a byte each. is_first: what they hold is
    // overwritten. is_last: the sum is rounded into total. rest may be null where the tile is first and last.
    void (*add)(const void* src, int64_t ld_src, int64_t rows, int64_t columns, void* total, void* rest, Dtype dtype,
                int64_t ld, bool is_first, bool is_last);
    // sum_r exps[r] * factor[r]
    double (*dot_exps)(const void* exps, const void* factor, int64_t count);
    double (*dot)(const void* a, const void* b, Dtype dtype, int64_t count);
    void (*store_exp)(void* exps, int64_t index, double value);
};

// Tables that this machine can run, best first (and, last, what is for tests), for inputs of that dtype; null-terminated.
const Ops* const* available_ops(Dtype dtype);

const Ops* portable_ops(Dtype dtype);
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // clang knows no target pragma
#define TSO_X86 1
const Ops* avx2_ops(Dtype dtype);
const Ops* avx512_ops(Dtype dtype);
const Ops* avx512_bf16_ops();
const Ops* amx_ops();
const Ops* amx_emulated_ops();  // AMX without AMX, for tests
#endif

}  // namespace tso
