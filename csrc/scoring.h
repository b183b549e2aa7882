// Consensus of many scorers over the responses to each prompt. Plain buffers in, plain buffers out.
//
// Letters: P prompts, R responses of all prompts, M scorers. NaN = no score.
#pragma once

#include <cstdint>

namespace tso {

enum class Method { mean, median, borda, win_rate };
enum class Normalize { none, z, rank, minmax };

// The contract of the numbers is tso_fast.scoring.consensus_reference.
//
//   scores_RM     row-major, finite or NaN
//   offsets       [P+1], 0 = offsets[0] <= ... <= offsets[P] = R; prompt p owns the rows offsets[p] to offsets[p+1]
//   weights_M     finite, >= 0; a scorer of weight 0 counts as absent
//   num_threads   0: one per hardware thread. Small inputs use fewer; the result is bitwise the same for any number.
//   consensus_R   out; NaN where nothing could be said
//   num_scores_R  out; scorers of positive weight that scored the response
void consensus(const float* scores_RM, const int64_t* offsets, const double* weights_M, int64_t num_prompts,
               int64_t num_scorers, Method method, Normalize normalize, int num_threads, float* consensus_R,
               int32_t* num_scores_R);

}  // namespace tso
