// Which responses of each prompt become pairs (chosen, rejected). Plain buffers in, plain buffers out.
//
// Letters: P prompts, R responses of all prompts, N pairs, C decided pairs. NaN = no score.
#pragma once

#include <cstdint>
#include <utility>

#include "scoring_ops.h"

namespace tso {

// The contract of each is tso_fast.scoring.select_pairs_reference.
enum class Strategy { best_worst, best_random, random, baseline, tournament, first_round, all, diverse };

struct SelectionOptions {
    Strategy strategy;
    int64_t max_pairs;  // of a prompt, > 0
    float min_margin;   // >= 0
    float band;         // diverse: largest gap
    bool reuses_texts;  // best_worst, random: whether texts already used are paired once no others are left
    uint64_t seed;
    int num_threads;  // 0: one per hardware thread; the result is bitwise the same for any number
};

struct SelectionInput {
    const float* consensus_R;  // finite or NaN
    const int64_t* offsets;    // [P+1], 0 = offsets[0] <= ... <= offsets[P] = R
    int64_t num_prompts;
    const bool* positives_R;    // null: every row may be chosen
    const bool* negatives_R;    // null: every row may be rejected
    const int64_t* text_ids_R;  // null: all texts differ
    // sorted; the lower row first, both of one prompt
    const std::pair<int64_t, int64_t>* forbidden;
    int64_t num_forbidden;
    const uint64_t* keys_P;     // null: the prompt's index
    const int64_t* baseline_P;  // null or -1: the median-ranked row
    const float* distances;     // diverse: [n, n] blocks of the prompts, one after the other
};

// At most so many pairs will be selected: the rows that select_pairs needs in its buffers.
int64_t selection_capacity(const int64_t* offsets, int64_t num_prompts, const SelectionOptions& options);

struct Selection {
    int64_t num_pairs;
    bool is_finite;  // no score is infinite; else the pairs mean nothing
};

// pairs_N2 and margin_N: out; [selection_capacity], of which the first num_pairs rows are filled.
Selection select_pairs(const SelectionInput& input, const SelectionOptions& options, const ScoringOps& ops, int64_t* pairs_N2,
                       float* margin_N);

struct DecidedInput {
    const int64_t* pairs_C2;  // rows >= 0
    const float* margin_C;    // finite
    const int64_t* offsets;   // [P+1] into C
    int64_t num_prompts;
    const int64_t* text_ids_R;  // null: all texts differ
    const uint64_t* keys_P;
};

int64_t decided_capacity(const int64_t* offsets, int64_t num_prompts, const SelectionOptions& options);

// Strategies best_worst, random and all; min_margin is not read. index_N: out; [decided_capacity]. Returns N.
int64_t select_decided(const DecidedInput& input, const SelectionOptions& options, int64_t* index_N);

}  // namespace tso
