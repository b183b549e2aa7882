#include "selection.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "parallel.h"

namespace tso {
namespace {

// Rows (pairs of rows, where a strategy looks at them) below which another thread costs more than it saves.
constexpr int64_t kMinWorkPerThread = 1 << 15;
// Scores of so many prompts of a few responses fit in the second-level cache.
constexpr int64_t kMaxPromptsPerChunk = 4096;

// splitmix64 (Steele et al. 2014): its state is a counter, so a prompt's draws hang on the seed and its key alone.
class Draws {
public:
    Draws(uint64_t seed, uint64_t key) : state_(mix(mix(seed + kGolden) ^ key)) {}
    // In [0, n), by the high half of a product: off uniform by less than n / 2^64.
    int64_t below(int64_t n) {
        state_ += kGolden;
        return static_cast<int64_t>((static_cast<unsigned __int128>(mix(state_)) * n) >> 64);
    }

private:
    static constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;
    static uint64_t mix(uint64_t z) {
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
    uint64_t state_;
};

struct Pair {
    int32_t chosen, rejected;  // rows within the prompt (select_decided: texts)
    int32_t index;             // select_decided: within the prompt's pairs
    double gap;
};

// Which two texts have been a pair.
class SeenTexts {
public:
    void reset(int64_t num_texts, bool can_repeat) {
        num_texts_ = num_texts;
        can_repeat_ = can_repeat;
        if (can_repeat) seen_.assign(num_texts * num_texts, 0);
    }
    // False if they have been before.
    bool add(int32_t a, int32_t b) {
        if (!can_repeat_) return true;
        char& seen = seen_[std::min(a, b) * num_texts_ + std::max(a, b)];
        return seen ? false : (seen = 1);
    }

private:
    std::vector<char> seen_;
    int64_t num_texts_ = 0;
    bool can_repeat_ = false;
};

struct Scratch {
    std::vector<Pair> pairs, skipped;
    std::vector<int32_t> rows, next_rows;
    std::vector<int32_t> texts;  // of each row: the lowest row with the same text
    std::vector<char> is_used;   // by text, or by row
    SeenTexts seen;
    std::vector<float> scores, distances;
    std::vector<std::pair<int64_t, int32_t>> ids;
};

int64_t choose_num_threads(int64_t work, int64_t num_prompts, int num_threads) {
    const int64_t wanted = num_threads > 0 ? num_threads : std::thread::hardware_concurrency();
    return std::max<int64_t>(1, std::min({wanted, num_prompts, work / kMinWorkPerThread}));
}

int64_t all_pairs(int64_t n) { return n * (n - 1) / 2; }

int64_t prompt_capacity(int64_t n, const SelectionOptions& options) {
    const auto bound = [&] {
        switch (options.strategy) {
            case Strategy::first_round: return n / 2;
            case Strategy::best_worst:
            case Strategy::random: return options.reuses_texts ? all_pairs(n) : n / 2;
            case Strategy::all: return all_pairs(n);
            default: return std::max<int64_t>(0, n - 1);
        }
    };
    return std::min(options.max_pairs, bound());
}

// Calls of_prompt(rows of the prompt) but for one pair a prompt, where that is not worth it.
template <typename OfPrompt>
int64_t sum_capacities(const int64_t* offsets, int64_t first, int64_t last, const SelectionOptions& options,
                       const OfPrompt& of_prompt) {
    if (options.max_pairs == 1) return last - first;
    int64_t total = 0;
    for (int64_t p = first; p < last; ++p) total += of_prompt(offsets[p + 1] - offsets[p]);
    return total;
}

int64_t capacity_of(const int64_t* offsets, int64_t first, int64_t last, const SelectionOptions& options) {
    return sum_capacities(offsets, first, last, options, [&](int64_t n) { return prompt_capacity(n, options); });
}

int64_t decided_capacity_of(const int64_t* offsets, int64_t first, int64_t last, const SelectionOptions& options) {
    return sum_capacities(offsets, first, last, options, [&](int64_t n) { return std::min(options.max_pairs, n); });
}

// Prompts in chunks, each of which writes from its own place of the buffers; then the gaps between them are closed. A
// buffer of the most there can be costs address space, not memory: pages that are never written are never there.
//
//   capacity(first_prompt, last_prompt) most entries of these
//   run(first_prompt, last_prompt, at)  fills the entries from `at` on, returns how many
//   move(from, to, count)               moves entries
template <typename Capacity, typename Run, typename Move>
int64_t run_chunks(int64_t num_prompts, int64_t num_threads, const Capacity& capacity, const Run& run, const Move& move) {
    const int64_t range = std::clamp<int64_t>(num_prompts / (8 * num_threads), 1, kMaxPromptsPerChunk);
    const int64_t num_chunks = (num_prompts + range - 1) / range;
    std::vector<int64_t> begins(num_chunks), counts(num_chunks);
    int64_t total = 0;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        begins[chunk] = total;
        total += capacity(chunk * range, std::min((chunk + 1) * range, num_prompts));
    }
    parallel_for(num_chunks, num_threads, [&](int64_t chunk) {
        counts[chunk] = run(chunk * range, std::min((chunk + 1) * range, num_prompts), begins[chunk]);
    });
    int64_t end = 0;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        if (begins[chunk] != end) move(begins[chunk], end, counts[chunk]);
        end += counts[chunk];
    }
    return end;
}

template <typename T>
void move_rows(T* values, int64_t width, int64_t from, int64_t to, int64_t count) {
    std::memmove(values + width * to, values + width * from, sizeof(T) * width * count);
}

// The order of best_worst and all: a strict order, so that no sort algorithm shows through.
struct WiderGap {
    const float* scores;
    bool operator()(const Pair& a, const Pair& b) const {
        if (a.gap != b.gap) return a.gap > b.gap;
        if (scores[a.chosen] != scores[b.chosen]) return scores[a.chosen] > scores[b.chosen];
        if (scores[a.rejected] != scores[b.rejected]) return scores[a.rejected] < scores[b.rejected];
        return a.chosen != b.chosen ? a.chosen < b.chosen : a.rejected < b.rejected;
    }
};

// Walks scratch.pairs, in order or drawn, and takes first those whose two texts are unused, then those with one used
// (phase 1), then the rest (phase 2). Texts only become used, so a pair passed over in a phase cannot come up in it
// again: one walk a phase. Drawn afresh in each phase, every pair is uniform among those that are used least.
//
//   take(pair)  false: that was enough
template <typename Take>
void take_least_used(Scratch& scratch, const int32_t* texts, int64_t num_texts, int first_phase, int last_phase, Draws* draws,
                     const Take& take) {
    scratch.is_used.assign(num_texts, 0);
    for (int phase = first_phase; phase <= last_phase; ++phase) {
        std::vector<Pair>& pairs = scratch.pairs;
        scratch.skipped.clear();
        for (size_t i = 0; i < pairs.size(); ++i) {
            if (draws) std::swap(pairs[i], pairs[i + draws->below(pairs.size() - i)]);
            const Pair& pair = pairs[i];
            char& is_chosen_used = scratch.is_used[texts[pair.chosen]];
            char& is_rejected_used = scratch.is_used[texts[pair.rejected]];
            if (is_chosen_used + is_rejected_used > phase) {
                scratch.skipped.push_back(pair);
                continue;
            }
            if (!scratch.seen.add(texts[pair.chosen], texts[pair.rejected])) continue;
            is_chosen_used = is_rejected_used = 1;
            if (!take(pair)) return;
        }
        std::swap(pairs, scratch.skipped);
    }
}

// Every row may be paired with every other of its prompt, once.
bool is_plain_best_worst(const SelectionInput& input, const SelectionOptions& options) {
    return options.strategy == Strategy::best_worst && !options.reuses_texts && !input.text_ids_R && !input.num_forbidden;
}

// One prompt. Rows are counted from its first.
class Prompt {
public:
    Prompt(const SelectionInput& input, const SelectionOptions& options, Scratch& scratch, int64_t prompt,
           const float* distances, int64_t* pairs_N2, float* margin_N)
        : input_(input),
          options_(options),
          scratch_(scratch),
          prompt_(prompt),
          begin_(input.offsets[prompt]),
          n_(static_cast<int32_t>(input.offsets[prompt + 1] - begin_)),
          scores_(input.consensus_R + begin_),
          distances_(distances),
          pairs_N2_(pairs_N2),
          margin_N_(margin_N) {}

    // How many pairs were written.
    int64_t select() {
        if (n_ < 2) return 0;
        const bool is_plain = is_plain_best_worst(input_, options_);
        if (is_plain && options_.max_pairs == 1 && !input_.positives_R && !input_.negatives_R) return best_against_worst();
        // A copy: the caller's array may change while the GIL is released, and a sort must not see that.
        scratch_.scores.assign(scores_, scores_ + n_);
        scores_ = scratch_.scores.data();
        if (is_plain) return best_against_worst_in_turn();
        prepare();
        switch (options_.strategy) {
            case Strategy::best_worst: return least_used(0, options_.reuses_texts ? 2 : 0, false);
            case Strategy::random: return least_used(0, options_.reuses_texts ? 2 : 0, true);
            case Strategy::all: return least_used(2, 2, false);
            case Strategy::best_random: return best_against_random();
            case Strategy::diverse: return best_against_farthest();
            case Strategy::baseline: return against_baseline();
            case Strategy::tournament: return tournament(false);
            case Strategy::first_round: return tournament(true);
        }
        return count_;
    }

private:
    float gap(int32_t chosen, int32_t rejected) const { return scores_[chosen] - scores_[rejected]; }
    bool may_be_chosen(int32_t row) const { return !input_.positives_R || input_.positives_R[begin_ + row]; }
    bool may_be_rejected(int32_t row) const { return !input_.negatives_R || input_.negatives_R[begin_ + row]; }

    bool may_pair(int32_t chosen, int32_t rejected) const {
        return gap(chosen, rejected) > options_.min_margin && may_be_chosen(chosen) && may_be_rejected(rejected) &&
               scratch_.texts[chosen] != scratch_.texts[rejected] && !is_forbidden(chosen, rejected);
    }

    bool is_forbidden(int32_t a, int32_t b) const {
        return forbidden_begin_ != forbidden_end_ &&
               std::binary_search(forbidden_begin_, forbidden_end_,
                                  std::pair<int64_t, int64_t>(begin_ + std::min(a, b), begin_ + std::max(a, b)));
    }

    // False once there are enough.
    bool take(int32_t chosen, int32_t rejected) {
        pairs_N2_[2 * count_] = begin_ + chosen;
        pairs_N2_[2 * count_ + 1] = begin_ + rejected;
        margin_N_[count_] = gap(chosen, rejected);
        return ++count_ < options_.max_pairs;
    }

    // The same, but never the same two texts again.
    bool take_unseen(int32_t chosen, int32_t rejected) {
        return !scratch_.seen.add(scratch_.texts[chosen], scratch_.texts[rejected]) || take(chosen, rejected);
    }

    void prepare() {
        scratch_.texts.resize(n_);
        bool has_repeats = false;
        for (int32_t row = 0; row < n_; ++row) scratch_.texts[row] = row;
        if (input_.text_ids_R) {
            auto& ids = scratch_.ids;
            ids.clear();
            for (int32_t row = 0; row < n_; ++row) ids.emplace_back(input_.text_ids_R[begin_ + row], row);
            std::sort(ids.begin(), ids.end());
            for (int32_t i = 1; i < n_; ++i) {
                if (ids[i].first != ids[i - 1].first) continue;
                scratch_.texts[ids[i].second] = scratch_.texts[ids[i - 1].second];
                has_repeats = true;
            }
        }
        scratch_.seen.reset(n_, has_repeats);
        if (input_.num_forbidden) {
            const auto* const last = input_.forbidden + input_.num_forbidden;
            forbidden_begin_ = std::lower_bound(input_.forbidden, last, std::pair<int64_t, int64_t>(begin_, 0));
            forbidden_end_ = std::lower_bound(forbidden_begin_, last, std::pair<int64_t, int64_t>(begin_ + n_, 0));
        }
    }

    Draws draws() const {
        return Draws(options_.seed, input_.keys_P ? input_.keys_P[prompt_] : static_cast<uint64_t>(prompt_));
    }

    template <typename Rows>
    static void shuffle(Rows& rows, Draws& draws) {
        for (size_t i = 0; i + 1 < rows.size(); ++i) std::swap(rows[i], rows[i + draws.below(rows.size() - i)]);
    }

    int64_t best_against_worst() {
        float best = -std::numeric_limits<float>::infinity(), worst = -best;
        for (int32_t row = 0; row < n_; ++row) {  // a comparison with NaN is false
            best = scores_[row] > best ? scores_[row] : best;
            worst = scores_[row] < worst ? scores_[row] : worst;
        }
        if (!(best - worst > options_.min_margin)) return 0;
        int32_t chosen = 0, rejected = 0;
        for (int32_t row = n_ - 1; row >= 0; --row) {  // no early exit: it could not be predicted
            chosen = scores_[row] == best ? row : chosen;
            rejected = scores_[row] == worst ? row : rejected;
        }
        take(chosen, rejected);
        return count_;
    }

    // While any two rows left make a pair, so do the best and the worst of them.
    int64_t best_against_worst_in_turn() {
        scratch_.is_used.assign(n_, 0);
        for (;;) {
            int32_t best = -1, worst = -1;
            for (int32_t row = 0; row < n_; ++row) {
                if (scratch_.is_used[row] || std::isnan(scores_[row])) continue;
                if (may_be_chosen(row) && (best < 0 || scores_[row] > scores_[best])) best = row;
                if (may_be_rejected(row) && (worst < 0 || scores_[row] < scores_[worst])) worst = row;
            }
            if (best < 0 || worst < 0 || !(gap(best, worst) > options_.min_margin) || !take(best, worst)) return count_;
            scratch_.is_used[best] = scratch_.is_used[worst] = 1;
        }
    }

    void add_if_allowed(int32_t a, int32_t b) {
        const int32_t chosen = scores_[a] > scores_[b] ? a : b, rejected = chosen == a ? b : a;
        if (!may_pair(chosen, rejected)) return;
        scratch_.pairs.push_back({chosen, rejected, 0, static_cast<double>(scores_[chosen]) - scores_[rejected]});
    }

    int64_t least_used(int first_phase, int last_phase, bool is_random) {
        scratch_.pairs.clear();
        for (int32_t a = 0; a < n_; ++a)
            for (int32_t b = a + 1; b < n_; ++b) add_if_allowed(a, b);
        if (!is_random) std::sort(scratch_.pairs.begin(), scratch_.pairs.end(), WiderGap{scores_});
        Draws random = draws();
        take_least_used(scratch_, scratch_.texts.data(), n_, first_phase, last_phase, is_random ? &random : nullptr,
                        [&](const Pair& pair) { return take(pair.chosen, pair.rejected); });
        return count_;
    }

    // The best row that has partners, which are then in scratch.rows, ascending; -1: there is none.
    int32_t find_best() {
        std::vector<int32_t>& order = scratch_.next_rows;
        order.clear();
        for (int32_t row = 0; row < n_; ++row)
            if (!std::isnan(scores_[row]) && may_be_chosen(row)) order.push_back(row);
        std::sort(order.begin(), order.end(),
                  [&](int32_t a, int32_t b) { return scores_[a] != scores_[b] ? scores_[a] > scores_[b] : a < b; });
        for (const int32_t best : order) {
            scratch_.rows.clear();
            for (int32_t row = 0; row < n_; ++row)
                if (may_pair(best, row) && gap(best, row) <= options_.band) scratch_.rows.push_back(row);
            if (!scratch_.rows.empty()) return best;
        }
        return -1;
    }

    int64_t best_against_random() {
        const int32_t best = find_best();
        if (best < 0) return 0;
        std::vector<int32_t>& rows = scratch_.rows;
        Draws random = draws();
        for (size_t i = 0; i < rows.size(); ++i) {
            std::swap(rows[i], rows[i + random.below(rows.size() - i)]);
            if (!take_unseen(best, rows[i])) break;
        }
        return count_;
    }

    int64_t best_against_farthest() {
        const int32_t best = find_best();
        if (best < 0) return 0;
        std::vector<float>& distance_n = scratch_.distances;
        distance_n.assign(distances_ + static_cast<int64_t>(best) * n_, distances_ + static_cast<int64_t>(best + 1) * n_);
        std::sort(scratch_.rows.begin(), scratch_.rows.end(),
                  [&](int32_t a, int32_t b) { return distance_n[a] != distance_n[b] ? distance_n[a] > distance_n[b] : a < b; });
        for (const int32_t row : scratch_.rows)
            if (!take_unseen(best, row)) break;
        return count_;
    }

    int64_t against_baseline() {
        int32_t baseline = -1;
        if (input_.baseline_P && input_.baseline_P[prompt_] >= 0) {
            baseline = static_cast<int32_t>(input_.baseline_P[prompt_] - begin_);
        } else {
            std::vector<int32_t>& rows = scratch_.rows;
            rows.clear();
            for (int32_t row = 0; row < n_; ++row)
                if (!std::isnan(scores_[row])) rows.push_back(row);
            if (rows.size() < 2) return 0;
            const auto median = rows.begin() + (rows.size() - 1) / 2;
            std::nth_element(rows.begin(), median, rows.end(),
                             [&](int32_t a, int32_t b) { return scores_[a] != scores_[b] ? scores_[a] > scores_[b] : a < b; });
            baseline = *median;
        }
        scratch_.pairs.clear();
        for (int32_t row = 0; row < n_; ++row)
            if (row != baseline) add_if_allowed(row, baseline);
        std::sort(scratch_.pairs.begin(), scratch_.pairs.end(), WiderGap{scores_});
        for (const Pair& pair : scratch_.pairs)
            if (!take_unseen(pair.chosen, pair.rejected)) break;
        return count_;
    }

    int64_t tournament(bool is_one_round) {
        std::vector<int32_t>&rows = scratch_.rows, &winners = scratch_.next_rows;
        rows.clear();
        for (int32_t row = 0; row < n_; ++row)
            if (!std::isnan(scores_[row]) && (may_be_chosen(row) || may_be_rejected(row))) rows.push_back(row);
        Draws random = draws();
        shuffle(rows, random);
        while (rows.size() > 1) {
            winners.clear();
            for (size_t i = 0; i + 1 < rows.size(); i += 2) {
                const int32_t low = std::min(rows[i], rows[i + 1]), high = std::max(rows[i], rows[i + 1]);
                const int32_t winner = scores_[high] > scores_[low] ? high : low, loser = winner == low ? high : low;
                if (may_pair(winner, loser) && !take_unseen(winner, loser)) return count_;
                winners.push_back(winner);
            }
            if (is_one_round) break;
            if (rows.size() % 2) winners.push_back(rows.back());
            std::swap(rows, winners);
        }
        return count_;
    }

    const SelectionInput& input_;
    const SelectionOptions& options_;
    Scratch& scratch_;
    const int64_t prompt_, begin_;
    const int32_t n_;
    const float* scores_;
    const float* const distances_;  // of this prompt
    int64_t* const pairs_N2_;
    float* const margin_N_;
    const std::pair<int64_t, int64_t>*forbidden_begin_ = nullptr, *forbidden_end_ = nullptr;
    int64_t count_ = 0;
};

// The best against the worst of each prompt of a batch of n rows each; how many pairs were written. There must be room for one
// of each prompt.
int64_t best_against_worst(const ScoringOps& ops, const float* scores, int64_t begin, int64_t n, float min_margin,
                           int64_t* pairs_N2, float* margin_N) {
    int32_t best[kMaxBatch], worst[kMaxBatch];
    float margin[kMaxBatch];
    ops.best_and_worst(scores, n, best, worst, margin);
    int64_t count = 0;
    for (int i = 0; i < kMaxBatch; ++i) {  // no branch: it could not be predicted
        pairs_N2[2 * count] = begin + i * n + best[i];
        pairs_N2[2 * count + 1] = begin + i * n + worst[i];
        margin_N[count] = margin[i];
        count += margin[i] > min_margin;
    }
    return count;
}

bool has_infinite(const float* scores, int64_t begin, int64_t end) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    int32_t is_found = 0;  // no early exit: the loop is vectorised
    for (int64_t row = begin; row < end; ++row) is_found |= std::abs(scores[row]) == kInfinity;
    return is_found != 0;
}

// Whether as many prompts as make a batch follow from p on, of the same number of rows, at least two.
bool are_alike(const int64_t* offsets, int64_t p, int64_t last) {
    if (p + kMaxBatch > last) return false;
    const int64_t n = offsets[p + 1] - offsets[p];
    int64_t differ = n < 2;
    for (int i = 1; i < kMaxBatch; ++i) differ |= (offsets[p + i + 1] - offsets[p + i]) ^ n;
    return !differ;
}

bool looks_at_pairs(Strategy strategy) { return strategy == Strategy::random || strategy == Strategy::all; }

}  // namespace

int64_t selection_capacity(const int64_t* offsets, int64_t num_prompts, const SelectionOptions& options) {
    return capacity_of(offsets, 0, num_prompts, options);
}

Selection select_pairs(const SelectionInput& input, const SelectionOptions& options, const ScoringOps& ops, int64_t* pairs_N2,
                       float* margin_N) {
    const int64_t* const offsets = input.offsets;
    std::vector<int64_t> blocks;  // where the distances of each prompt begin
    int64_t work = offsets[input.num_prompts];
    if (looks_at_pairs(options.strategy) || options.strategy == Strategy::diverse) {
        work = 0;
        for (int64_t p = 0; p < input.num_prompts; ++p) {
            if (options.strategy == Strategy::diverse) blocks.push_back(work);
            work += (offsets[p + 1] - offsets[p]) * (offsets[p + 1] - offsets[p]);
        }
    }
    const bool one_a_prompt =
        options.max_pairs == 1 && is_plain_best_worst(input, options) && !input.positives_R && !input.negatives_R;
    const int64_t num_rows = offsets[input.num_prompts];
    std::atomic<bool> is_finite{true};
    const auto run = [&](int64_t first, int64_t last, int64_t at) {
        const int64_t begin = at;
        if (has_infinite(input.consensus_R, offsets[first], offsets[last])) {
            is_finite.store(false);
            return int64_t{0};
        }
        Scratch scratch;
        for (int64_t p = first; p < last; ++p) {
            if (one_a_prompt && are_alike(offsets, p, last) && offsets[p + kMaxBatch] + kMaxBatch <= num_rows) {
                at += best_against_worst(ops, input.consensus_R + offsets[p], offsets[p], offsets[p + 1] - offsets[p],
                                         options.min_margin, pairs_N2 + 2 * at, margin_N + at);
                p += kMaxBatch - 1;
                continue;
            }
            const float* distances = blocks.empty() ? nullptr : input.distances + blocks[p];
            at += Prompt(input, options, scratch, p, distances, pairs_N2 + 2 * at, margin_N + at).select();
        }
        return at - begin;
    };
    const auto capacity = [&](int64_t first, int64_t last) { return capacity_of(offsets, first, last, options); };
    const auto move = [&](int64_t from, int64_t to, int64_t count) {
        move_rows(pairs_N2, 2, from, to, count);
        move_rows(margin_N, 1, from, to, count);
    };
    const int64_t threads = choose_num_threads(work, input.num_prompts, options.num_threads);
    const int64_t num_pairs = run_chunks(input.num_prompts, threads, capacity, run, move);
    return {num_pairs, is_finite.load()};
}

int64_t decided_capacity(const int64_t* offsets, int64_t num_prompts, const SelectionOptions& options) {
    return decided_capacity_of(offsets, 0, num_prompts, options);
}

int64_t select_decided(const DecidedInput& input, const SelectionOptions& options, int64_t* index_N) {
    const int64_t* const offsets = input.offsets;
    const bool is_random = options.strategy == Strategy::random;
    const bool takes_any = options.strategy == Strategy::all;
    const auto run = [&](int64_t first, int64_t last, int64_t at) {
        const int64_t begin_at = at;
        Scratch scratch;
        std::vector<int64_t> ids;
        for (int64_t p = first; p < last; ++p) {
            const int64_t begin = offsets[p], end = offsets[p + 1];
            const auto id = [&](int64_t i) {
                const int64_t row = input.pairs_C2[i];
                return input.text_ids_R ? input.text_ids_R[row] : row;
            };
            ids.clear();
            for (int64_t i = 2 * begin; i < 2 * end; ++i) ids.push_back(id(i));
            std::sort(ids.begin(), ids.end());
            ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
            const auto text = [&](int64_t i) {
                return static_cast<int32_t>(std::lower_bound(ids.begin(), ids.end(), id(i)) - ids.begin());
            };
            scratch.pairs.clear();
            for (int64_t i = begin; i < end; ++i) {
                const int32_t chosen = text(2 * i), rejected = text(2 * i + 1);
                if (chosen == rejected) continue;
                scratch.pairs.push_back({chosen, rejected, static_cast<int32_t>(i - begin), input.margin_C[i]});
            }
            if (!is_random)
                std::stable_sort(scratch.pairs.begin(), scratch.pairs.end(),
                                 [](const Pair& a, const Pair& b) { return a.gap > b.gap; });
            scratch.seen.reset(ids.size(), true);
            scratch.rows.resize(ids.size());
            for (size_t i = 0; i < ids.size(); ++i) scratch.rows[i] = static_cast<int32_t>(i);
            Draws draws(options.seed, input.keys_P ? input.keys_P[p] : static_cast<uint64_t>(p));
            int64_t count = 0;
            take_least_used(scratch, scratch.rows.data(), ids.size(), takes_any ? 2 : 0,
                            takes_any || options.reuses_texts ? 2 : 0, is_random ? &draws : nullptr, [&](const Pair& pair) {
                                index_N[at++] = begin + pair.index;
                                return ++count < options.max_pairs;
                            });
        }
        return at - begin_at;
    };
    const auto capacity = [&](int64_t first, int64_t last) { return decided_capacity_of(offsets, first, last, options); };
    const auto move = [&](int64_t from, int64_t to, int64_t count) { move_rows(index_N, 1, from, to, count); };
    const int64_t threads = choose_num_threads(offsets[input.num_prompts], input.num_prompts, options.num_threads);
    return run_chunks(input.num_prompts, threads, capacity, run, move);
}

}  // namespace tso
