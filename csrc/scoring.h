// Consensus and agreement of many scorers over the responses to each prompt. Plain buffers in, plain buffers out.
//
// Letters: P prompts, R responses of all prompts, M scorers, C comparisons. NaN = no score.
//   offsets       [P+1], 0 = offsets[0] <= ... <= offsets[P] = R; prompt p owns the rows offsets[p] to offsets[p+1]
//   num_threads   0: one per hardware thread. Small inputs use fewer; the result is bitwise the same for any number.
#pragma once

#include <cstdint>

#include "bradley_terry.h"
#include "scoring_ops.h"

namespace tso {

enum class Method { mean, median, borda, win_rate, bradley_terry };

struct Scores {
    const float* scores_RM;  // row-major
    const int64_t* offsets;
    int64_t num_prompts;
    int64_t num_scorers;
};

// The contract of the numbers is tso_fast.scoring.consensus_reference.
//
//   weights_M     finite, >= 0; a scorer of weight 0 counts as absent
//   consensus_R   out; NaN where nothing could be said
//   num_scores_R  out; scorers of positive weight that scored the response
//   num_unfinished  out; prompts of which bradley_terry did not reach the tolerance
//
// False if a score is infinite: the outputs are then incomplete.
bool consensus(const Scores& scores, const double* weights_M, Method method, Normalize normalize,
               const BradleyTerryOptions& options, const ScoringOps& ops, int num_threads, float* consensus_R,
               int32_t* num_scores_R, int64_t* num_unfinished);

// The contract of the numbers is tso_fast.scoring.agreement_reference. False if a score is infinite.
bool agreement(const Scores& scores, const ScoringOps& ops, int num_threads, float* concordance_P, float* leave_one_out_M);

// The contract of the numbers is tso_fast.scoring.bradley_terry_reference.
//
//   pairs         [C, 2] rows, two of one prompt; prompts in any order
//   wins          [C, 2] finite, >= 0
//   strengths_R   out
//   num_unfinished  out; prompts that did not reach the tolerance
//
// The index of the first comparison whose rows are not two of one prompt, or -1.
int64_t bradley_terry(const int64_t* pairs, const double* wins, int64_t num_comparisons, const int64_t* offsets,
                      int64_t num_prompts, const BradleyTerryOptions& options, int num_threads, float* strengths_R,
                      int64_t* num_unfinished);

}  // namespace tso
