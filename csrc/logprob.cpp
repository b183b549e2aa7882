#include "logprob.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
#include <vector>

#include "parallel.h"

namespace tso {
namespace {

constexpr double kLn2 = 0.693147180559945309417, kLog2e = 1.44269504088896340736;
// Rows of W to a tile of logits: [96, 64] accumulators stay in the first-level cache between product and exponential.
constexpr int64_t kVocabTile = 96;
// Tiles whose sums form one partial sum: short chains of float, few of them.
constexpr int64_t kTilesPerTask = 4;
// Rows of W that one pass of dh's product goes over.
constexpr int64_t kVocabBlock = 384;
// Rows of W that a thread takes at a time in dh's product.
constexpr int64_t kStepRows = 2 * kVocabBlock;
// Parts of the vocabulary that dh is summed over separately, whatever the number of threads: W and the exponentials are packed
// once for a block of rows and columns, which a split of that block among the threads would make each of them do.
constexpr int64_t kVocabParts = 4;
// A sum outside of [2^-100, 2^100] may have lost terms to a bound of the exponential.
constexpr double kSafeSum = 0x1p100;

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

const void* offset_bytes(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }
void* offset_bytes(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

// Uninitialised memory, freed with its owner.
class Buffer {
public:
    explicit Buffer(int64_t bytes) : data_(std::aligned_alloc(64, round_up(std::max<int64_t>(bytes, 1), 64))) {
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    void* get() const { return data_; }
    void* at(int64_t bytes) const { return offset_bytes(data_, bytes); }

private:
    void* data_;
};

// Accumulators are float or double, as ops say.
double load_acc(const Ops& ops, const void* p, int64_t i) {
    return ops.acc_size == 8 ? static_cast<const double*>(p)[i] : static_cast<const float*>(p)[i];
}
void store_acc(const Ops& ops, void* p, int64_t i, double x) {
    if (ops.acc_size == 8)
        static_cast<double*>(p)[i] = x;
    else
        static_cast<float*>(p)[i] = static_cast<float>(x);
}

void prefetch_rows(const void* p, int64_t rows, int64_t bytes, int64_t stride) {
#ifdef __GNUC__
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(offset_bytes(p, r * stride + i), 1, 2);
#else
    (void)p, (void)rows, (void)bytes, (void)stride;
#endif
}

// A packed operand B: panels of kPanel columns, the last one narrower, one after the other.
struct Packed {
    const Ops& ops;
    int64_t columns, num_groups;
    Buffer data;

    Packed(const Ops& ops_, int64_t columns_, int64_t num_groups_)
        : ops(ops_),
          columns(columns_),
          num_groups(num_groups_),
          data(round_up(columns_, ops_.lanes) * num_groups_ * ops_.group * ops_.element_size) {}
    int64_t num_panels() const { return divide_up(columns, kPanel); }
    int64_t width(int64_t panel) const { return std::min(kPanel, round_up(columns - panel * kPanel, ops.lanes)); }
    int64_t count(int64_t panel) const { return std::min(kPanel, columns - panel * kPanel); }
    void* panel(int64_t panel, int64_t group = 0) const {
        return data.at((panel * kPanel * num_groups + group * width(panel)) * ops.group * ops.element_size);
    }
};

int64_t padded_groups(const Ops& ops, int64_t count) { return round_up(divide_up(count, ops.group), ops.group_align); }

// Rows of W as operand A, converted only where they can't be read as they are.
class WeightRows {
public:
    explicit WeightRows(const Head& head)
        : head_(head),
          num_groups_(padded_groups(*head.ops, head.D)),
          is_direct_(head.dtype == head.ops->element && num_groups_ * head.ops->group == head.D),
          copy_(is_direct_ ? 1 : kVocabTile * num_groups_ * head.ops->group * head.ops->element_size) {
        if (!is_direct_) std::memset(copy_.get(), 0, kVocabTile * num_groups_ * head.ops->group * head.ops->element_size);
    }
    const void* get(int64_t first, int64_t count) const {
        const void* rows = offset_bytes(head_.weight_VD, first * head_.D * dtype_size(head_.dtype));
        if (is_direct_) return rows;
        head_.ops->convert(rows, head_.dtype, head_.D, count, head_.D, copy_.get(), num_groups_ * head_.ops->group);
        return copy_.get();
    }
    int64_t num_groups() const { return num_groups_; }

private:
    const Head& head_;
    int64_t num_groups_;
    bool is_direct_;
    Buffer copy_;
};

// Bias as accumulators, or nothing.
std::vector<char> widen_bias(const Head& head) {
    std::vector<char> bias;
    if (head.bias_V == nullptr) return bias;
    const Ops& table = *portable_ops(head.ops->acc_size == 8 ? Dtype::f64 : Dtype::f32);
    bias.resize(head.V * head.ops->acc_size);
    table.convert(head.bias_V, head.dtype, head.V, 1, head.V, bias.data(), head.V);
    return bias;
}

// One pass over the vocabulary for the given panels of tokens: sums of exponentials, or maxima, to totals_T.
void sweep(const Head& head, const Packed& hidden, const std::vector<int64_t>& panels, const std::vector<char>& bias,
           const void* offset_T, bool find_max, void* exps, double* totals_T) {
    const Ops& ops = *head.ops;
    const int64_t stride = exps_stride(ops, head.T), acc = ops.acc_size;
    const int64_t rows_per_task = kVocabTile * kTilesPerTask, num_tasks = divide_up(head.V, rows_per_task);
    Buffer partial(num_tasks * stride * acc);
    const double start = find_max ? -std::numeric_limits<double>::infinity() : 0.0;
    parallel_for(num_tasks, head.num_threads, [&](int64_t task) {
        const WeightRows weight(head);
        const Buffer logits(kVocabTile * kPanel * acc);
        void* sums = partial.at(task * stride * acc);
        for (int64_t t = 0; t < stride; ++t) store_acc(ops, sums, t, start);
        const int64_t end = std::min(head.V, (task + 1) * rows_per_task);
        for (int64_t v = task * rows_per_task; v < end; v += kVocabTile) {
            const int64_t count = std::min(kVocabTile, end - v);
            const void* rows = weight.get(v, count);
            for (const int64_t panel : panels) {
                const int64_t t = panel * kPanel, width = hidden.width(panel);
                ops.gemm(rows, weight.num_groups(), 1, hidden.panel(panel), width, logits.get(), kPanel, count,
                         weight.num_groups(), false);
                SoftmaxTile tile;
                tile.logits = logits.get();
                tile.num_vocab = count;
                tile.width = width;
                tile.bias = bias.empty() ? nullptr : bias.data() + v * acc;
                tile.softcap = head.softcap;
                tile.scale = head.scale;
                tile.offset = offset_bytes(offset_T, t * acc);
                tile.exps = exps == nullptr ? nullptr : offset_bytes(exps, (v * stride + t) * ops.element_size);
                tile.exps_stride = stride;
                tile.sums = offset_bytes(sums, t * acc);
                tile.find_max = find_max;
                ops.softmax_tile(tile);
            }
        }
    });
    for (const int64_t panel : panels)
        for (int64_t t = panel * kPanel; t < std::min(head.T, (panel + 1) * kPanel); ++t) {
            double total = start;
            for (int64_t task = 0; task < num_tasks; ++task) {
                const double x = load_acc(ops, partial.at(task * stride * acc), t);
                total = !find_max ? total + x : x > total || x != x ? x : total;
            }
            totals_T[t] = total;
        }
}

// [begin, end) of tokens.
struct Range {
    int64_t begin, end;
};

// Tokens with a gradient, widened to the alignment of the operands.
std::vector<Range> active_ranges(const Ops& ops, const double* dlogprob_T, int64_t T) {
    std::vector<Range> ranges;
    for (int64_t t = 0; t < T; ++t) {
        if (dlogprob_T[t] == 0) continue;
        const int64_t begin = t / ops.row_align * ops.row_align;
        if (ranges.empty() || begin > ranges.back().end)
            ranges.push_back({begin, begin + ops.row_align});
        else
            ranges.back().end = begin + ops.row_align;
        t = ranges.back().end - 1;
    }
    return ranges;
}

void weight_gradient(const Head& head, const std::vector<Range>& ranges, const void* factor_T, const void* exps,
                     const Gradients& gradients) {
    const Ops& ops = *head.ops;
    const int64_t stride = exps_stride(ops, head.T), acc = ops.acc_size, size = ops.element_size;
    const int64_t source = dtype_size(head.dtype);
    Packed hidden(ops, head.D, stride / ops.group);
    parallel_for(hidden.num_panels(), head.num_threads, [&](int64_t panel) {
        ops.pack_rows(offset_bytes(head.hidden_TD, panel * kPanel * source), head.dtype, head.D, head.T, hidden.count(panel),
                      factor_T, hidden.num_groups, hidden.width(panel), hidden.panel(panel));
    });
    parallel_for(divide_up(head.V, kVocabTile), head.num_threads, [&](int64_t task) {
        const int64_t v = task * kVocabTile, count = std::min(kVocabTile, head.V - v);
        const Buffer tile(kVocabTile * kPanel * acc);
        for (int64_t panel = 0; panel < hidden.num_panels(); ++panel) {
            const int64_t at = v * head.D + panel * kPanel;
            void* total = offset_bytes(gradients.dweight_VD, at * source);
            void* rest = gradients.dweight_rest_VD;
            if (rest != nullptr) rest = offset_bytes(rest, at);
            if (!gradients.is_first) {  // on their way while the product is computed
                prefetch_rows(total, count, kPanel * source, head.D * source);
                if (rest != nullptr) prefetch_rows(rest, count, kPanel, head.D);
            }
            if (ranges.empty()) std::memset(tile.get(), 0, kVocabTile * kPanel * acc);
            for (const Range& range : ranges)
                ops.gemm(offset_bytes(exps, (v * stride + range.begin) * size), stride / ops.group, 1,
                         hidden.panel(panel, range.begin / ops.group), hidden.width(panel), tile.get(), kPanel, count,
                         (range.end - range.begin) / ops.group, &range != &ranges.front());
            ops.add(tile.get(), kPanel, count, hidden.count(panel), total, rest, head.dtype, head.D, gradients.is_first,
                    gradients.is_last);
        }
    });
}

void hidden_gradient(const Head& head, const std::vector<Range>& ranges, const void* factor_T, const void* exps,
                     const Gradients& gradients) {
    const Ops& ops = *head.ops;
    const int64_t stride = exps_stride(ops, head.T), acc = ops.acc_size, source = dtype_size(head.dtype);
    const int64_t out_size = dtype_size(gradients.dhidden_dtype);
    int64_t tokens = 512, columns = std::min<int64_t>(round_up(head.D, kPanel), 512);
    std::vector<Range> blocks;
    int64_t num_column_blocks;
    const auto split = [&] {
        blocks.clear();
        for (const Range& range : ranges)
            for (int64_t t = range.begin; t < range.end; t += tokens) blocks.push_back({t, std::min(range.end, t + tokens)});
        num_column_blocks = divide_up(head.D, columns);
        return static_cast<int64_t>(blocks.size()) * num_column_blocks * kVocabParts;
    };
    // Which block computes an element changes none of its bits: every block goes over the vocabulary in the same steps.
    while (split() < 2 * head.num_threads) {
        if (tokens > 2 * ops.row_align && tokens * 2 > columns)
            tokens = round_up(tokens / 2, ops.row_align);
        else if (columns > 2 * kPanel)
            columns = round_up(columns / 2, kPanel);
        else
            break;
    }
    const int64_t part_rows = round_up(divide_up(head.V, kVocabParts), kVocabBlock);
    const int64_t ld = round_up(head.D, kPanel), row_bytes = ld * acc, part_bytes = stride * row_bytes;
    const int64_t num_parts = divide_up(head.V, part_rows), num_blocks = blocks.size();
    const Buffer sums(num_parts * part_bytes);
    const Ops& plain = *portable_ops(acc == 8 ? Dtype::f64 : Dtype::f32);
    // A chain is a part of the vocabulary for a block of tokens and columns, whose sums grow step by step. All chains make
    // their first step, then all their second: threads that run at unequal speed are done at the same time, but for a step.
    const int64_t num_chains = num_blocks * num_column_blocks * num_parts;
    const int64_t num_steps = num_chains * divide_up(part_rows, kStepRows);
    std::atomic<int64_t> next{0};
    std::vector<std::atomic<int64_t>> steps_done(num_chains);
    const int64_t num_workers = std::min<int64_t>(std::max(head.num_threads, 1), num_chains);
    parallel_for(num_workers, num_workers, [&](int64_t) {
        const int64_t num_groups = padded_groups(ops, kVocabBlock);
        Packed weight(ops, columns, num_groups);
        const Buffer operand(num_groups * ops.group * ops.element_size * (tokens + 32));
        for (int64_t step; (step = next.fetch_add(1)) < num_steps;) {
            const int64_t chain = step % num_chains, part = chain % num_parts, block = chain / num_parts;
            const Range range = blocks[block / num_column_blocks];
            const int64_t d = block % num_column_blocks * columns, M = range.end - range.begin;
            const int64_t num_panels = divide_up(std::min(columns, head.D - d), kPanel);
            const int64_t first = part * part_rows, begin = first + step / num_chains * kStepRows;
            const int64_t end = std::min({head.V, first + part_rows, begin + kStepRows});
            // Whoever has the step before took it earlier, so that it will be done.
            while (steps_done[chain].load(std::memory_order_acquire) != step / num_chains) std::this_thread::yield();
            for (int64_t v = begin; v < end; v += kVocabBlock) {
                const int64_t count = std::min(kVocabBlock, end - v), groups = padded_groups(ops, count);
                int64_t row_stride, group_stride;
                const void* A = ops.vocab_operand(offset_bytes(exps, (v * stride + range.begin) * ops.element_size), stride,
                                                  count, M, groups, operand.get(), &row_stride, &group_stride);
                for (int64_t panel = 0; panel < num_panels; ++panel) {
                    const int64_t column = d + panel * kPanel, num_columns = std::min(kPanel, head.D - column);
                    const int64_t width = round_up(num_columns, ops.lanes);
                    ops.pack_rows(offset_bytes(head.weight_VD, (v * head.D + column) * source), head.dtype, head.D, count,
                                  num_columns, nullptr, groups, width, weight.panel(panel));
                    ops.gemm(A, row_stride, group_stride, weight.panel(panel), width,
                             sums.at(part * part_bytes + range.begin * row_bytes + column * acc), ld, M, groups, v > first);
                }
            }
            steps_done[chain].store(step / num_chains + 1, std::memory_order_release);
        }
    });
    parallel_for(num_blocks, head.num_threads, [&](int64_t block) {
        const Range range = blocks[block];
        const int64_t first = range.begin * row_bytes, rows = std::min(range.end, head.T) - range.begin;
        for (int64_t part = 1; part < num_parts; ++part)
            plain.add(sums.at(part * part_bytes + first), ld, rows, head.D, sums.at(first), nullptr, plain.element, ld, false,
                      false);
        ops.store(sums.at(first), ld, offset_bytes(factor_T, range.begin * acc), rows, head.D,
                  offset_bytes(gradients.dhidden_TD, range.begin * head.D * out_size), gradients.dhidden_dtype, head.D);
    });
}

}  // namespace

int64_t exps_stride(const Ops& ops, int64_t T) { return round_up(T, std::max(ops.row_align, ops.lanes)); }

void logprob_forward(const Head& head, const Reduce& reduce, double* logprob_T, Row* row_T, void* exps) {
    const Ops& ops = *head.ops;
    const int64_t source = dtype_size(head.dtype), stride = exps_stride(ops, head.T);
    const std::vector<char> bias = widen_bias(head);

    Packed hidden(ops, head.T, padded_groups(ops, head.D));
    Buffer offset(stride * ops.acc_size);
    std::vector<double> target_T(head.T), totals_T(head.T);  // target_T: its logit, in powers of two
    for (int64_t t = 0; t < stride; ++t) store_acc(ops, offset.get(), t, 0.0);
    parallel_for(hidden.num_panels(), head.num_threads, [&](int64_t panel) {
        const void* rows = offset_bytes(head.hidden_TD, panel * kPanel * head.D * source);
        ops.pack_columns(rows, head.dtype, head.D, hidden.count(panel), head.D, hidden.num_groups, hidden.width(panel),
                         hidden.panel(panel));
        for (int64_t t = panel * kPanel; t < panel * kPanel + hidden.count(panel); ++t) {
            const int64_t target = head.targets_T[t];
            row_T[t].target_slope = 1.0;
            target_T[t] = 0.0;
            if (target < 0) continue;
            double z = ops.dot(offset_bytes(head.hidden_TD, t * head.D * source),
                               offset_bytes(head.weight_VD, target * head.D * source), head.dtype, head.D);
            if (!bias.empty()) z += load_acc(ops, bias.data(), target);
            if (head.softcap != 0) {
                const double tanh = std::tanh(z / head.softcap);
                z = head.softcap * tanh;
                row_T[t].target_slope = 1.0 - tanh * tanh;
            }
            target_T[t] = z * head.scale * kLog2e;
        }
    });
    if (reduce) reduce(target_T.data(), head.T, false);  // 0 from all ranks but one
    for (int64_t t = 0; t < head.T; ++t) store_acc(ops, offset.get(), t, target_T[t]);

    std::vector<int64_t> panels;
    for (int64_t panel = 0; panel < hidden.num_panels(); ++panel) panels.push_back(panel);
    sweep(head, hidden, panels, bias, offset.get(), false, exps, totals_T.data());
    if (reduce) reduce(totals_T.data(), head.T, false);

    // All ranks see the same totals, so all of them go on the same way.
    const auto is_safe = [&](int64_t t) { return totals_T[t] > 1 / kSafeSum && totals_T[t] < kSafeSum; };
    panels.clear();
    for (int64_t t = 0; t < head.T; ++t)
        if (!is_safe(t) && (panels.empty() || panels.back() != t / kPanel)) panels.push_back(t / kPanel);
    if (!panels.empty()) {
        std::vector<double> maxima_T(head.T);
        sweep(head, hidden, panels, bias, offset.get(), true, nullptr, maxima_T.data());
        if (reduce) reduce(maxima_T.data(), head.T, true);
        for (const int64_t panel : panels)
            for (int64_t t = panel * kPanel; t < panel * kPanel + hidden.count(panel); ++t)
                if (!is_safe(t)) store_acc(ops, offset.get(), t, maxima_T[t]);  // the others keep their bits
        std::vector<double> again_T(head.T);
        sweep(head, hidden, panels, bias, offset.get(), false, exps, again_T.data());
        if (reduce) reduce(again_T.data(), head.T, false);
        for (const int64_t panel : panels)
            std::copy_n(again_T.data() + panel * kPanel, hidden.count(panel), totals_T.data() + panel * kPanel);
    }
    for (int64_t t = 0; t < head.T; ++t) {
        Row& row = row_T[t];
        row.offset = load_acc(ops, offset.get(), t);
        row.sum = totals_T[t];
        row.target_exp = std::exp2(target_T[t] - row.offset);
        logprob_T[t] = (target_T[t] - row.offset) * kLn2 - std::log(row.sum);
    }
}

void logprob_backward(const Head& head, const double* dlogprob_T, const Row* row_T, void* exps, const Gradients& gradients) {
    const Ops& ops = *head.ops;
    const int64_t stride = exps_stride(ops, head.T);
    const std::vector<Range> ranges = active_ranges(ops, dlogprob_T, head.T);
    Buffer factor(stride * ops.acc_size);
    for (int64_t t = 0; t < stride; ++t) {
        const bool is_active = t < head.T && dlogprob_T[t] != 0;
        store_acc(ops, factor.get(), t, is_active ? -dlogprob_T[t] * head.scale / row_T[t].sum : 0.0);
        if (is_active && head.targets_T[t] >= 0)
            ops.store_exp(exps, head.targets_T[t] * stride + t, (row_T[t].target_exp - row_T[t].sum) * row_T[t].target_slope);
    }
    if (gradients.dbias_V != nullptr)
        parallel_for(divide_up(head.V, kVocabTile), head.num_threads, [&](int64_t task) {
            for (int64_t v = task * kVocabTile; v < std::min(head.V, (task + 1) * kVocabTile); ++v) {
                double sum = gradients.is_first ? 0.0 : gradients.dbias_V[v];
                for (const Range& range : ranges)
                    sum += ops.dot_exps(offset_bytes(exps, (v * stride + range.begin) * ops.element_size),
                                        offset_bytes(factor.get(), range.begin * ops.acc_size), range.end - range.begin);
                gradients.dbias_V[v] = sum;
            }
        });
    // Once there is a sum, a chunk without gradients adds nothing to it.
    const bool is_nothing = ranges.empty() && !gradients.is_first && !gradients.is_last;
    if (gradients.dweight_VD != nullptr && !is_nothing) weight_gradient(head, ranges, factor.get(), exps, gradients);
    if (gradients.dhidden_TD == nullptr) return;
    const int64_t out_row = head.D * dtype_size(gradients.dhidden_dtype);
    int64_t end = 0;
    for (const Range& range : ranges) {
        std::memset(offset_bytes(gradients.dhidden_TD, end * out_row), 0, (range.begin - end) * out_row);
        end = std::min(range.end, head.T);
    }
    std::memset(offset_bytes(gradients.dhidden_TD, end * out_row), 0, (head.T - end) * out_row);
    hidden_gradient(head, ranges, factor.get(), exps, gradients);
}

}  // namespace tso
