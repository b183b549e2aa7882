// The inner loops of scoring, one table of them per instruction set. No std templates in the files that fill them (why: ops.h).
//
// Lanes are scorers. Every sum over them is taken in 8 lanes of columns (m, m + 8, ...), which are then halved, and nothing is
// contracted to fused multiply-adds: the tables give the same bits. In mean_of_batch lanes are prompts, and sums are in order.
#pragma once
#include <cstdint>

namespace tso {

enum class Normalize { none, z, rank, minmax };

constexpr int64_t kColumnPad = 16;

struct Scorers {
    int64_t count;          // M
    int64_t padded;         // M rounded up to a multiple of kColumnPad
    const double* weights;  // [padded]; all 1 where is_uniform; 0 beyond M
    const int32_t* absent;  // [padded]; -1 at weight 0 and beyond M, else 0
    const int32_t* beyond;  // [padded]; -1 beyond M, else 0
    bool is_uniform;        // all weights that are not 0 are equal
    double total_weight;
    int32_t num_weighted;
    const int64_t* weighted;  // [num_weighted] their columns, ascending
};

// The scores of one prompt. `padded` floats can be read from the start of every row; those beyond M mean nothing.
struct Rows {
    const float* scores;
    int64_t stride;
    int64_t n;
    bool is_complete;  // no NaN
};

// Prompts that are computed together, one a lane, each as if it were alone.
//
// kMaxBatch floats beyond the scores of a prompt of most_rows rows can be read. One of fewer rows is followed by NaN.
constexpr int kMaxBatch = 8;
struct Batch {
    const float* scores[kMaxBatch];
    int64_t n[kMaxBatch];
    float* mean[kMaxBatch];  // [n] out
    int32_t* num_scores[kMaxBatch];
    int64_t most_rows;
    bool is_complete;  // no NaN
};

// Doubles of scratch.
constexpr int64_t batch_scratch(int64_t most_rows, int64_t num_scorers) {
    return kMaxBatch * (2 * (most_rows + kMaxBatch) * num_scorers + 3 * num_scorers + most_rows + 2 * kMaxBatch);
}

// Every normalisation is scale * (score - shift) + constant, scorer by scorer.
struct Affine {
    double* shift;  // [padded] each
    double* scale;
    double* constant;
};

enum class Found { complete, missing, infinite };

struct ScoringOps {
    const char* isa;
    Found (*classify)(const float* scores, int64_t count);
    // Normalize::rank takes a table of rank_table. Scale and constant are multiplied by the weights.
    void (*affine)(const Scorers& scorers, const Rows& rows, Normalize normalize, const Affine& affine);
    // table [n, padded]: how many of the scorer's other scores are below this one, ties half; NaN where missing. O(n^2).
    void (*rank_table)(const Scorers& scorers, const Rows& rows, float* table);
    // sums [3, n rounded up to a multiple of 8] is scratch.
    void (*mean)(const Scorers& scorers, const Rows& rows, const Affine& affine, double* sums, float* mean_n,
                 int32_t* num_scores_n);
    // Not Normalize::rank. scratch is aligned to 64 bytes.
    void (*mean_of_batch)(const Scorers& scorers, const Batch& batch, Normalize normalize, double* scratch);
    // values_M [padded] of one row, NaN where missing.
    void (*values)(const Scorers& scorers, const Rows& rows, const Affine& affine, int64_t row, double* values_M);
    // Weighted wins of the row over each later one, ties half, and the weights of the scorers of both: [n - row - 1].
    void (*compare)(const Scorers& scorers, const Rows& rows, int64_t row, double* wins, double* games);
    // values [num_values, width] -> sorted in every column, width = 8.
    void (*sort_columns)(double* values, int64_t num_values);
    // Of kMaxBatch prompts of n rows each, one after the other, and of each lane: the first of the rows of highest and of
    // lowest score, and by how much these differ, -inf where all are missing. kMaxBatch floats beyond the last can be read.
    void (*best_and_worst)(const float* scores, int64_t n, int32_t* best, int32_t* worst, float* margin);
};

// Those that this machine can run, best first; null-terminated.
const ScoringOps* const* available_scoring_ops();

const ScoringOps* scoring_ops_portable();
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // clang knows no target pragma
#define TSO_SCORING_X86 1
const ScoringOps* scoring_ops_avx2();
const ScoringOps* scoring_ops_avx512();
#endif

}  // namespace tso
