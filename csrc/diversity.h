// How much the responses to one prompt share: n-grams of their tokens, compared exactly.
//
// Letters: P prompts, R responses of all prompts, T tokens of all responses, n_p responses of one prompt.
#pragma once

#include <cstdint>

namespace tso {

// Positions of a prompt's tokens, and twice as many places, are counted in 32 bits.
constexpr int64_t kMaxPromptTokens = int64_t{1} << 30;

struct RaggedTokens {
    const int32_t* tokens;         // [T]
    const int64_t* token_offsets;  // [R+1]: response r owns the tokens token_offsets[r] to token_offsets[r+1]
    const int64_t* offsets;        // [P+1]: prompt p owns the responses offsets[p] to offsets[p+1]
    int64_t num_prompts;
};

// The contract of each is tso_fast.scoring.<name>_reference. num_threads 0: one per hardware thread; the result is
// bitwise the same for any number.

// distances: out; [n_p, n_p] blocks of the prompts, one after the other
void pairwise_distances(const RaggedTokens& texts, int n, int num_threads, float* distances);

void distinct_n(const RaggedTokens& texts, int n, int num_threads, float* distinct_P);

void self_bleu(const RaggedTokens& texts, int max_n, int num_threads, float* bleu_R);

}  // namespace tso
