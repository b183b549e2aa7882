// Log-probs of target tokens under softmax(softcap(h W^T + b) * scale), and the products of their gradient, tile by tile.
// With z the logits, k_t the target's logit and E = exp(z - k_t): logprob = -log(sum E) and dlogits = g (onehot - E / sum E).
// E is stored in the forward pass, so that the backward pass is two plain products: dh = v (E^T W), dW = E (v h) with
// v = -g / sum E. Exponents of float and bf16 reach 2^126, so any k_t near the log-sum-exp does: the target's logit costs one
// dot product a row, where a running maximum would rescale what is stored. Rows far off are redone with their maximum.
#pragma once
#include <cstdint>
#include <functional>

#include "ops.h"

namespace tso {

// Rows of a head: T tokens, D hidden, V vocabulary. All arrays are contiguous.
struct Head {
    const Ops* ops;
    Dtype dtype;
    const void* hidden_TD;
    const void* weight_VD;
    const void* bias_V;        // null: none
    const int64_t* targets_T;  // -1: another rank has the target, see Reduce
    int64_t T, D, V;
    double softcap;  // 0: none
    double scale;    // 1 / temperature
    int num_threads;
};

// Of a row: what it takes to get from stored exponentials to the gradient.
struct Row {
    double offset;        // E = 2^(z log2(e) - offset)
    double sum;           // of E
    double target_exp;    // E of the target
    double target_slope;  // 1 - tanh^2 under a softcap, else 1
};

// Columns of the stored exponentials [V, stride]: T rounded up.
int64_t exps_stride(const Ops& ops, int64_t T);

// Replaces numbers, [count], by their sum or maximum over the ranks that hold a head together; the same bits on every rank.
using Reduce = std::function<void(double* values, int64_t count, bool find_max)>;

// exps [V, exps_stride(T)] elements of ops, or null. logprob_T: double. reduce: the ranks that hold the head together, each
// some of its rows and all of these tokens; empty: this one has all of it.
void logprob_forward(const Head& head, const Reduce& reduce, double* logprob_T, Row* row_T, void* exps);

struct Gradients {
    void* dhidden_TD;  // null: not wanted
    Dtype dhidden_dtype;
    void* dweight_VD;  // null: not wanted. With dweight_rest_VD a sum over calls, as in Ops::add
    void* dweight_rest_VD;
    double* dbias_V;  // null: not wanted
    bool is_first;    // what dweight_VD and dbias_V hold is overwritten, not added to
    bool is_last;     // the sum is rounded into dweight_VD
};

// Destroys exps. Rows with dlogprob_T = 0 enter no product, up to the alignment of ops. Of a rank that has a part of the head
// dhidden_TD is a part of the sum over ranks.
void logprob_backward(const Head& head, const double* dlogprob_T, const Row* row_T, void* exps, const Gradients& gradients);

}  // namespace tso
