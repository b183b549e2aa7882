#include "diversity.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "parallel.h"

namespace tso {
namespace {

// n-grams below which another thread costs more to start than it saves.
constexpr int64_t kMinWorkPerThread = 1 << 14;

// Numbers the distinct n-grams of one prompt, 0, 1, ... in the order they are met.
//
// A hash only proposes: equal n-grams are found by their tokens, so results are exact. The table holds a number and 32
// bits of the hash, which settle nearly every comparison without a look at the tokens; it is half full at most.
class NgramIndex {
public:
    // For n-grams starting in [0, num_tokens) of the tokens.
    void reset(const int32_t* tokens, int64_t num_tokens, int n) {
        tokens_ = tokens;
        n_ = n;
        bits_ = 4;
        while ((int64_t{1} << bits_) < 2 * num_tokens) ++bits_;
        table_.assign(size_t{1} << bits_, kEmpty);
        first_.clear();
        power_ = 1;  // kBase^n, which leaves the window with its token
        for (int64_t i = 0; i < std::min<int64_t>(n, num_tokens); ++i) power_ *= kBase;  // longer ones: there are none
    }

    int32_t size() const { return static_cast<int32_t>(first_.size()); }

    // visit(position, number) for the n-grams of tokens[begin, end). Two walks see the same numbers.
    template <typename Visit>
    void add(int64_t begin, int64_t end, const Visit& visit) {
        if (end - begin < n_) return;
        uint64_t hash = 0;
        for (int64_t i = begin; i < begin + n_ - 1; ++i) hash = hash * kBase + as_digit(tokens_[i]);
        for (int64_t i = begin; i + n_ <= end; ++i) {
            hash = hash * kBase + as_digit(tokens_[i + n_ - 1]);
            if (i > begin) hash -= power_ * as_digit(tokens_[i - 1]);
            visit(i, number(i, hash));
        }
    }

private:
    static constexpr uint64_t kEmpty = ~uint64_t{0};
    static constexpr uint64_t kBase = 0x9E3779B97F4A7C15;

    // Token 0 must count, else runs of it would hash as nothing.
    static uint64_t as_digit(int32_t token) { return static_cast<uint32_t>(token) + uint64_t{1}; }

    int32_t number(int64_t position, uint64_t hash) {
        const uint64_t mixed = (hash ^ (hash >> 32)) * 0xD6E8FEB86659FD93;
        const uint64_t mask = table_.size() - 1, tag = mixed << 32;  // low half: the place comes from the high one
        for (uint64_t place = mixed >> (64 - bits_);; place = (place + 1) & mask) {
            const uint64_t entry = table_[place];
            if (entry == kEmpty) {
                table_[place] = tag | first_.size();
                first_.push_back(static_cast<int32_t>(position));
                return size() - 1;
            }
            const uint32_t found = static_cast<uint32_t>(entry);
            if ((entry ^ tag) >> 32 == 0 && is_same(first_[found], position)) return static_cast<int32_t>(found);
        }
    }

    bool is_same(int64_t a, int64_t b) const {
        for (int i = 0; i < n_; ++i)
            if (tokens_[a + i] != tokens_[b + i]) return false;
        return true;
    }

    const int32_t* tokens_ = nullptr;
    int64_t n_ = 1;
    int bits_ = 4;
    uint64_t power_ = 1;
    std::vector<uint64_t> table_;
    std::vector<int32_t> first_;  // of each number: where it was met first
};

int popcount(uint64_t bits) {
    bits -= (bits >> 1) & 0x5555555555555555;
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333);
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F;
    return static_cast<int>((bits * 0x0101010101010101) >> 56);
}

struct Counts {
    int32_t most, second;  // largest counts of an n-gram in one response, and in another one
    int32_t most_in;       // the response of the largest
};

struct Scratch {
    NgramIndex index;
    std::vector<int32_t> numbers;  // of each token position
    std::vector<int32_t> last_in;  // by number: the last response that has it, so far
    std::vector<int32_t> shared;   // by number: its bit, -1 while only one response has it
    // (response, bit)
    std::vector<std::pair<int32_t, int32_t>> members;
    std::vector<int64_t> sizes;  // of each response: its distinct n-grams
    std::vector<uint64_t> bits;  // a row of bits a response
    std::vector<int32_t> num_here;
    std::vector<Counts> counts;
    std::vector<double> log_sum;
    std::vector<int32_t> num_orders;
};

class Prompt {
public:
    Prompt(const RaggedTokens& texts, int64_t prompt, Scratch& scratch)
        : scratch_(scratch),
          begins_(texts.token_offsets + texts.offsets[prompt]),
          n_(texts.offsets[prompt + 1] - texts.offsets[prompt]),
          tokens_(texts.tokens + begins_[0]),
          num_tokens_(begins_[n_] - begins_[0]) {}

    void pairwise_distances(int n, float* out_nn) {
        number_shared(n);
        const int64_t words = (num_shared_ + 63) / 64;
        scratch_.bits.assign(n_ * words, 0);
        for (const auto& [response, bit] : scratch_.members)
            scratch_.bits[response * words + bit / 64] |= uint64_t{1} << (bit % 64);
        for (int64_t a = 0; a < n_; ++a) {
            out_nn[a * n_ + a] = 0.0f;
            const uint64_t* bits_a = scratch_.bits.data() + a * words;
            for (int64_t b = a + 1; b < n_; ++b) {
                const uint64_t* bits_b = scratch_.bits.data() + b * words;
                int64_t both = 0;
                for (int64_t w = 0; w < words; ++w) both += popcount(bits_a[w] & bits_b[w]);
                const int64_t either = scratch_.sizes[a] + scratch_.sizes[b] - both;
                const double distance = either ? 1.0 - static_cast<double>(both) / static_cast<double>(either) : 0.0;
                out_nn[a * n_ + b] = out_nn[b * n_ + a] = static_cast<float>(distance);
            }
        }
    }

    float distinct_n(int n) {
        scratch_.index.reset(tokens_, num_tokens_, n);
        int64_t total = 0;
        for (int64_t r = 0; r < n_; ++r) scratch_.index.add(begin(r), begin(r + 1), [&](int64_t, int32_t) { ++total; });
        if (!total) return std::numeric_limits<float>::quiet_NaN();
        return static_cast<float>(static_cast<double>(scratch_.index.size()) / static_cast<double>(total));
    }

    void self_bleu(int max_n, float* bleu_n) {
        scratch_.log_sum.assign(n_, 0.0);
        scratch_.num_orders.assign(n_, 0);
        int64_t longest = 0;
        for (int64_t r = 0; r < n_; ++r) longest = std::max(longest, begin(r + 1) - begin(r));
        for (int n = 1; n <= std::min<int64_t>(max_n, longest); ++n) add_log_precision(n);
        for (int64_t r = 0; r < n_; ++r)
            bleu_n[r] = n_ > 1 && scratch_.num_orders[r]
                            ? static_cast<float>(std::exp(scratch_.log_sum[r] / scratch_.num_orders[r]))
                            : std::numeric_limits<float>::quiet_NaN();
    }

private:
    int64_t begin(int64_t response) const { return begins_[response] - begins_[0]; }

    // Numbers the n-grams of two responses or more; only they can be in an intersection.
    void number_shared(int n) {
        Scratch& s = scratch_;
        s.index.reset(tokens_, num_tokens_, n);
        s.last_in.clear();
        s.shared.clear();
        s.members.clear();
        s.sizes.assign(n_, 0);
        num_shared_ = 0;
        for (int64_t r = 0; r < n_; ++r) {
            const int32_t here = static_cast<int32_t>(r);
            s.index.add(begin(r), begin(r + 1), [&](int64_t, int32_t number) {
                if (number == static_cast<int32_t>(s.last_in.size())) {
                    s.last_in.push_back(here);
                    s.shared.push_back(-1);
                } else if (s.last_in[number] == here) {
                    return;
                } else {
                    if (s.shared[number] < 0) {
                        s.shared[number] = num_shared_++;
                        s.members.emplace_back(s.last_in[number], s.shared[number]);
                    }
                    s.members.emplace_back(here, s.shared[number]);
                    s.last_in[number] = here;
                }
                ++s.sizes[r];
            });
        }
    }

    // visit(number, count) for each distinct n-gram of a response.
    template <typename Visit>
    void count(int64_t response, int n, const Visit& visit) {
        const int64_t last = begin(response + 1) - n;
        for (int64_t i = begin(response); i <= last; ++i) ++scratch_.num_here[scratch_.numbers[i]];
        for (int64_t i = begin(response); i <= last; ++i) {
            int32_t& num_here = scratch_.num_here[scratch_.numbers[i]];
            if (num_here) visit(scratch_.numbers[i], num_here);
            num_here = 0;
        }
    }

    void add_log_precision(int n) {
        Scratch& s = scratch_;
        s.index.reset(tokens_, num_tokens_, n);
        s.numbers.resize(num_tokens_);
        for (int64_t r = 0; r < n_; ++r)
            s.index.add(begin(r), begin(r + 1), [&](int64_t i, int32_t number) { s.numbers[i] = number; });
        s.num_here.assign(s.index.size(), 0);
        s.counts.assign(s.index.size(), {0, 0, -1});
        for (int64_t r = 0; r < n_; ++r)
            count(r, n, [&](int32_t number, int32_t here) {
                Counts& counts = s.counts[number];
                if (here > counts.most)
                    counts = {here, counts.most, static_cast<int32_t>(r)};
                else
                    counts.second = std::max(counts.second, here);
            });
        for (int64_t r = 0; r < n_; ++r) {
            const int64_t total = begin(r + 1) - begin(r) - n + 1;
            if (total < 1) continue;
            int64_t clipped = 0;
            count(r, n, [&](int32_t number, int32_t here) {
                const Counts& counts = s.counts[number];
                clipped += std::min(here, counts.most_in == r ? counts.second : counts.most);
            });
            s.log_sum[r] += std::log(static_cast<double>(clipped) / static_cast<double>(total));  // log 0 = -inf
            ++s.num_orders[r];
        }
    }

    Scratch& scratch_;
    const int64_t* const begins_;  // token_offsets of the prompt's responses
    const int64_t n_;
    const int32_t* const tokens_;  // of the prompt
    const int64_t num_tokens_;
    int32_t num_shared_ = 0;
};

// A prompt is computed by one thread whichever it is, so who takes which cannot change a bit of the result.
template <typename Run>
void for_each_prompt(const RaggedTokens& texts, int64_t orders, int num_threads, const Run& run) {
    const int64_t P = texts.num_prompts;
    const int64_t work = orders * (texts.token_offsets[texts.offsets[P]] + texts.offsets[P]);
    const int64_t wanted = num_threads > 0 ? num_threads : std::thread::hardware_concurrency();
    const int64_t threads = std::max<int64_t>(1, std::min({wanted, P, work / kMinWorkPerThread}));
    const int64_t range = std::clamp<int64_t>(P / (8 * threads), 1, 64);
    parallel_for((P + range - 1) / range, threads, [&](int64_t chunk) {
        Scratch scratch;
        for (int64_t p = chunk * range; p < std::min((chunk + 1) * range, P); ++p) {
            Prompt prompt(texts, p, scratch);
            run(p, prompt);
        }
    });
}

}  // namespace

void pairwise_distances(const RaggedTokens& texts, int n, int num_threads, float* distances) {
    std::vector<int64_t> blocks(texts.num_prompts);
    int64_t end = 0;
    for (int64_t p = 0; p < texts.num_prompts; ++p) {
        const int64_t rows = texts.offsets[p + 1] - texts.offsets[p];
        blocks[p] = end;
        end += rows * rows;
    }
    for_each_prompt(texts, 1, num_threads,
                    [&](int64_t p, Prompt& prompt) { prompt.pairwise_distances(n, distances + blocks[p]); });
}

void distinct_n(const RaggedTokens& texts, int n, int num_threads, float* distinct_P) {
    for_each_prompt(texts, 1, num_threads, [&](int64_t p, Prompt& prompt) { distinct_P[p] = prompt.distinct_n(n); });
}

void self_bleu(const RaggedTokens& texts, int max_n, int num_threads, float* bleu_R) {
    for_each_prompt(texts, max_n, num_threads,
                    [&](int64_t p, Prompt& prompt) { prompt.self_bleu(max_n, bleu_R + texts.offsets[p]); });
}

}  // namespace tso
