#include "scoring.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "parallel.h"

namespace tso {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Scores (pairs of scores where responses are compared) below which another thread costs more to start than it saves.
constexpr int64_t kMinWorkPerThread = 1 << 16;
// Beyond, sorting every column is faster than comparing all pairs.
constexpr int64_t kMaxRowsCompared = 128;
// Beyond, std::sort is faster than the sorting network.
constexpr int64_t kMaxNetwork = 32;
// Prompts of up to so many scores are computed several at once: what they need fits in the first-level cache.
constexpr int64_t kMaxScoresBatched = 512;

// What the kernels want to know of the scorers.
class PaddedScorers {
public:
    PaddedScorers(const double* weights_M, int64_t M) {
        const int64_t padded = (M + kColumnPad - 1) / kColumnPad * kColumnPad;
        weights.assign(padded, 0.0);
        absent.assign(padded, -1);
        beyond.assign(padded, -1);
        std::copy(weights_M, weights_M + M, weights.begin());
        const double largest = M ? *std::max_element(weights_M, weights_M + M) : 0.0;
        bool is_uniform = true;
        for (int64_t m = 0; m < M; ++m) {
            beyond[m] = 0;
            absent[m] = weights[m] > 0.0 ? 0 : -1;
            is_uniform = is_uniform && (weights[m] == 0.0 || weights[m] == largest);
        }
        double total = 0.0;
        for (int64_t m = 0; m < M; ++m) {
            if (weights[m] == 0.0) continue;
            if (is_uniform) weights[m] = 1.0;
            total += weights[m];
            weighted.push_back(m);
        }
        const int32_t num_weighted = static_cast<int32_t>(weighted.size());
        view = {M, padded, weights.data(), absent.data(), beyond.data(), is_uniform, total, num_weighted, weighted.data()};
    }
    PaddedScorers(const PaddedScorers&) = delete;

    Scorers view;

private:
    std::vector<double> weights;
    std::vector<int32_t> absent, beyond;
    std::vector<int64_t> weighted;
};

struct Scratch {
    explicit Scratch(int64_t padded) : columns(3 * padded), values_M(padded) {
        affine = {columns.data(), columns.data() + padded, columns.data() + 2 * padded};
    }
    template <typename T>
    static T* at_least(std::vector<T>& buffer, int64_t size) {
        if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
        return buffer.data();
    }

    double* aligned(int64_t size) {
        constexpr int64_t kExtra = 64 / sizeof(double);
        return reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(at_least(buffer, size + kExtra)) + 63) / 64 * 64);
    }

    std::vector<double> buffer, columns, values_M, sums, block, wins, games;
    std::vector<float> copy, table, copies[kMaxBatch];
    Batch batch;
    std::vector<std::pair<float, int64_t>> sorted;
    std::vector<Comparison> comparisons;
    BradleyTerry bradley_terry;
    Affine affine;
};

// Prompts as the kernels take them.
class Reader {
public:
    Reader(const Scores& scores, const Scorers& scorers, const ScoringOps& ops) : scores(scores), scorers(scorers), ops(ops) {}

    // False if a score is infinite. Rows are valid until the next call.
    bool read(int64_t prompt, Scratch& scratch, Rows* rows) const {
        const int64_t M = scorers.count, begin = scores.offsets[prompt], n = scores.offsets[prompt + 1] - begin;
        const float* first = scores.scores_RM + begin * M;
        const Found found = ops.classify(first, n * M);
        if (found == Found::infinite) return false;
        *rows = {first, M, n, found == Found::complete};
        const int64_t num_rows = scores.offsets[scores.num_prompts];
        if (n && (begin + n - 1) * M + scorers.padded > num_rows * M) {
            // Kernels read whole vectors, here beyond the end of the array.
            float* copy = Scratch::at_least(scratch.copy, (n - 1) * M + scorers.padded);
            std::copy(first, first + n * M, copy);
            rows->scores = copy;
        }
        return true;
    }

    // One lane a prompt; lanes beyond the prompts repeat the first. False if a score is infinite.
    bool read(const int64_t* prompts, int num_prompts, Scratch& scratch, float* consensus_R, int32_t* num_scores_R) const {
        const int64_t M = scorers.count, end = scores.offsets[scores.num_prompts] * M;
        Batch& batch = scratch.batch;
        batch.most_rows = 0;
        bool is_contiguous = true;
        for (int lane = 0; lane < kMaxBatch; ++lane) {
            const int64_t prompt = prompts[lane < num_prompts ? lane : 0], begin = scores.offsets[prompt];
            batch.n[lane] = scores.offsets[prompt + 1] - begin;
            batch.scores[lane] = scores.scores_RM + begin * M;
            batch.mean[lane] = consensus_R + begin;
            batch.num_scores[lane] = num_scores_R + begin;
            batch.most_rows = std::max(batch.most_rows, batch.n[lane]);
            if (lane && lane < num_prompts)
                is_contiguous &= batch.scores[lane] == batch.scores[lane - 1] + batch.n[lane - 1] * M;
        }
        const auto classify = [&](int lane, const float* last) {
            const Found found = ops.classify(batch.scores[lane], last - batch.scores[lane]);
            batch.is_complete &= found == Found::complete;
            return found != Found::infinite;
        };
        const auto last = [&](int lane) { return batch.scores[lane] + batch.n[lane] * M; };
        batch.is_complete = true;
        if (is_contiguous) {
            if (!classify(0, last(num_prompts - 1))) return false;
        } else {
            for (int lane = 0; lane < num_prompts; ++lane)
                if (!classify(lane, last(lane))) return false;
        }
        for (int lane = 0; lane < kMaxBatch; ++lane) {
            const int64_t size = batch.n[lane] * M, most = batch.most_rows * M;
            const bool is_short = size < most;
            if (!is_short && batch.scores[lane] - scores.scores_RM + most + kMaxBatch <= end) continue;
            batch.is_complete &= !is_short;
            float* copy = Scratch::at_least(scratch.copies[lane], most + kMaxBatch);
            std::copy(batch.scores[lane], batch.scores[lane] + size, copy);
            std::fill(copy + size, copy + most + kMaxBatch, static_cast<float>(kNaN));
            batch.scores[lane] = copy;
        }
        return true;
    }

private:
    const Scores& scores;
    const Scorers& scorers;
    const ScoringOps& ops;
};

void rank_by_sorting(const Scorers& scorers, const Rows& rows, Scratch& scratch, float* table) {
    std::fill(table, table + rows.n * scorers.padded, static_cast<float>(kNaN));
    auto& sorted = scratch.sorted;
    for (int64_t m = 0; m < scorers.count; ++m) {
        if (scorers.absent[m] && !rows.is_complete) continue;
        sorted.clear();
        for (int64_t r = 0; r < rows.n; ++r) {
            const float score = rows.scores[r * rows.stride + m];
            if (!std::isnan(score)) sorted.emplace_back(score, r);
        }
        std::sort(sorted.begin(), sorted.end());
        const int64_t n = sorted.size();
        for (int64_t first = 0, last; first < n; first = last) {
            for (last = first + 1; last < n && sorted[last].first == sorted[first].first;) ++last;
            const float rank = static_cast<float>(0.5 * (first + last - 1));
            for (int64_t i = first; i < last; ++i) table[sorted[i].second * scorers.padded + m] = rank;
        }
    }
}

// Ranks counted from 0, ties share their mean.
Rows ranks(const Scorers& scorers, const Rows& rows, const ScoringOps& ops, Scratch& scratch) {
    float* table = Scratch::at_least(scratch.table, rows.n * scorers.padded);
    if (rows.n <= kMaxRowsCompared)
        ops.rank_table(scorers, rows, table);
    else
        rank_by_sorting(scorers, rows, scratch, table);
    return {table, scorers.padded, rows.n, rows.is_complete};
}

void medians(const Scorers& scorers, const Rows& rows, const ScoringOps& ops, Scratch& scratch, float* median_n,
             int32_t* num_scores_n) {
    const int64_t M = scorers.count;
    double* values_M = scratch.values_M.data();
    double* block = Scratch::at_least(scratch.block, 8 * M);  // [M, 8]: eight rows are sorted at once
    for (int64_t first = 0; first < rows.n; first += 8) {
        const int64_t last = std::min(first + 8, rows.n);
        const bool is_network = M <= kMaxNetwork;
        for (int64_t r = first; r < last; ++r) {
            ops.values(scorers, rows, scratch.affine, r, values_M);
            int32_t count = 0;
            for (int64_t m = 0; m < M; ++m) {
                const bool is_missing = std::isnan(values_M[m]);
                count += !is_missing;
                if (is_missing) values_M[m] = kInfinity;
            }
            num_scores_n[r] = count;
            if (!is_network) std::sort(values_M, values_M + M);
            for (int64_t m = 0; m < M; ++m) block[m * 8 + r - first] = values_M[m];
        }
        if (is_network) ops.sort_columns(block, M);
        for (int64_t r = first; r < last; ++r) {
            const int32_t count = num_scores_n[r];
            const double* column = block + r - first;
            median_n[r] = static_cast<float>(count ? 0.5 * (column[(count - 1) / 2 * 8] + column[count / 2 * 8]) : kNaN);
        }
    }
}

void count_scores(const Scorers& scorers, const Rows& rows, int32_t* num_scores_n) {
    for (int64_t r = 0; r < rows.n; ++r) {
        int32_t count = 0;
        for (int64_t m = 0; m < scorers.count; ++m)
            count += !scorers.absent[m] && !std::isnan(rows.scores[r * rows.stride + m]);
        num_scores_n[r] = count;
    }
}

// Calls use(i, j, wins of i, games) for every two responses of a prompt that share a scorer.
template <typename Use>
void for_each_pair(const Scorers& scorers, const Rows& rows, const ScoringOps& ops, Scratch& scratch, const Use& use) {
    double* wins = Scratch::at_least(scratch.wins, rows.n);
    double* games = Scratch::at_least(scratch.games, rows.n);
    for (int64_t i = 0; i < rows.n; ++i) {
        ops.compare(scorers, rows, i, wins, games);
        for (int64_t j = i + 1; j < rows.n; ++j)
            if (games[j - i - 1] > 0.0) use(i, j, wins[j - i - 1], games[j - i - 1]);
    }
}

void win_rates(const Scorers& scorers, const Rows& rows, const ScoringOps& ops, Scratch& scratch, float* rate_n) {
    double* sums = Scratch::at_least(scratch.sums, 2 * rows.n);
    double* num_compared = sums + rows.n;
    std::fill(sums, sums + 2 * rows.n, 0.0);
    for_each_pair(scorers, rows, ops, scratch, [&](int64_t i, int64_t j, double wins, double games) {
        const double share = wins / games;
        sums[i] += share;
        sums[j] += 1.0 - share;
        num_compared[i] += 1.0;
        num_compared[j] += 1.0;
    });
    for (int64_t i = 0; i < rows.n; ++i)
        rate_n[i] = static_cast<float>(num_compared[i] > 0.0 ? sums[i] / num_compared[i] : kNaN);
}

int64_t choose_num_threads(int num_threads, int64_t work) {
    const int64_t wanted = num_threads > 0 ? num_threads : std::thread::hardware_concurrency();
    return std::max<int64_t>(1, std::min(wanted, work / kMinWorkPerThread));
}

int64_t num_pairs_of_scores(const Scores& scores) {
    int64_t work = 0;
    for (int64_t p = 0; p < scores.num_prompts; ++p) {
        const int64_t n = scores.offsets[p + 1] - scores.offsets[p];
        work += n * n;
    }
    return work * scores.num_scorers;
}

// Calls work(first, last) for ranges of prompts. A prompt is computed by one thread whichever it is, so who takes which range
// cannot change a bit of the result.
template <typename Work>
void for_each_range(int64_t num_prompts, int64_t thread_count, const Work& work) {
    const int64_t range = std::max<int64_t>(1, num_prompts / (16 * thread_count));
    parallel_for((num_prompts + range - 1) / range, thread_count,
                 [&](int64_t index) { work(index * range, std::min((index + 1) * range, num_prompts)); });
}

}  // namespace

bool consensus(const Scores& scores, const double* weights_M, Method method, Normalize normalize,
               const BradleyTerryOptions& options, const ScoringOps& ops, int num_threads, float* consensus_R,
               int32_t* num_scores_R, int64_t* num_unfinished) {
    const PaddedScorers padded(weights_M, scores.num_scorers);
    const Scorers& scorers = padded.view;
    const Reader reader(scores, scorers, ops);
    const bool has_pairs = method == Method::win_rate || method == Method::bradley_terry;
    const int64_t num_scores = scores.offsets[scores.num_prompts] * scores.num_scorers;
    const int64_t thread_count = choose_num_threads(num_threads, has_pairs ? num_pairs_of_scores(scores) : num_scores);
    std::atomic<bool> is_finite{true};
    std::atomic<int64_t> unfinished{0};

    const auto mean = [&](const Rows& rows, Normalize how, Scratch& scratch, float* out, int32_t* num_out) {
        const Rows values = how == Normalize::rank ? ranks(scorers, rows, ops, scratch) : rows;
        ops.affine(scorers, values, how, scratch.affine);
        if (method == Method::median) return medians(scorers, values, ops, scratch, out, num_out);
        ops.mean(scorers, values, scratch.affine, Scratch::at_least(scratch.sums, 3 * (rows.n + 7)), out, num_out);
    };
    const auto bradley_terry = [&](const Rows& rows, Scratch& scratch, float* out) {
        // Only the ratios of weights count, and a comparison by all scorers is as many games as scorers.
        const double unit = scorers.num_weighted / scorers.total_weight;
        scratch.comparisons.clear();
        for_each_pair(scorers, rows, ops, scratch, [&](int64_t i, int64_t j, double wins, double games) {
            scratch.comparisons.push_back({i, j, unit * wins, unit * (games - wins)});
        });
        unfinished += !scratch.bradley_terry.fit(scratch.comparisons, rows.n, options, out);
    };

    const bool has_batches = method == Method::mean && normalize != Normalize::rank && scorers.num_weighted;
    for_each_range(scores.num_prompts, thread_count, [&](int64_t first, int64_t last) {
        Scratch scratch(scorers.padded);
        int64_t batched[kMaxBatch];
        int num_batched = 0;
        const auto finish_batch = [&] {
            if (!num_batched) return true;
            if (!reader.read(batched, num_batched, scratch, consensus_R, num_scores_R)) return false;
            double* buffer = scratch.aligned(batch_scratch(scratch.batch.most_rows, scorers.count));
            ops.mean_of_batch(scorers, scratch.batch, normalize, buffer);
            num_batched = 0;
            return true;
        };
        for (int64_t p = first; p < last; ++p) {
            const int64_t begin = scores.offsets[p], n = scores.offsets[p + 1] - begin;
            if (has_batches && n && n * scorers.count <= kMaxScoresBatched) {
                batched[num_batched++] = p;
                if (num_batched == kMaxBatch && !finish_batch()) {
                    is_finite = false;
                    return;
                }
                continue;
            }
            float* out = consensus_R + begin;
            int32_t* num_out = num_scores_R + begin;
            Rows rows;
            if (!reader.read(p, scratch, &rows)) {
                is_finite = false;
                return;
            }
            if (rows.n == 0) continue;
            if (!scorers.num_weighted) {
                std::fill(out, out + rows.n, static_cast<float>(kNaN));
                std::fill(num_out, num_out + rows.n, 0);
            } else if (!has_pairs) {
                mean(rows, method == Method::borda ? Normalize::rank : normalize, scratch, out, num_out);
            } else if (method == Method::win_rate && rows.is_complete && rows.n > 1) {
                // Nothing is missing, so that every pair is compared by all scorers: the shares add up to borda's.
                mean(rows, Normalize::rank, scratch, out, num_out);
            } else {
                count_scores(scorers, rows, num_out);
                if (method == Method::win_rate)
                    win_rates(scorers, rows, ops, scratch, out);
                else
                    bradley_terry(rows, scratch, out);
            }
        }
        if (!finish_batch()) is_finite = false;
    });
    *num_unfinished = unfinished;
    return is_finite;
}

namespace {

// What Pearson's correlation needs, for every scorer.
struct Sums {
    explicit Sums(int64_t M) : buffer(6 * M), count(buffer.data()), x(count + M), y(x + M), xx(y + M), yy(xx + M), xy(yy + M) {}

    std::vector<double> buffer;
    double *count, *x, *y, *xx, *yy, *xy;
};

// Kendall's W = 12 S / (m^2 (n^3 - n) - m sum T) over the scorers that scored all responses. With ranks less their mean,
// doubled to make them whole numbers, it is sum_i (sum_m rank)^2 / (m sum_i sum_m rank^2), ties and all.
double concordance(const Scorers& scorers, const Rows& ranks, const double* num_present_M) {
    double num_scorers = 0.0, between = 0.0, all = 0.0;
    for (int64_t m = 0; m < scorers.count; ++m) num_scorers += num_present_M[m] == ranks.n;
    for (int64_t i = 0; i < ranks.n; ++i) {
        double total = 0.0;
        for (int64_t m = 0; m < scorers.count; ++m) {
            if (num_present_M[m] != ranks.n) continue;
            const double rank = 2.0 * ranks.scores[i * ranks.stride + m] - (ranks.n - 1);
            total += rank;
            all += rank * rank;
        }
        between += total * total;
    }
    return num_scorers >= 2.0 && all > 0.0 ? between / (num_scorers * all) : kNaN;
}

void add_leave_one_out(const Scorers& scorers, const Rows& ranks, const double* num_present_M, double* rank_M,
                       double* is_present_M, Sums& sums) {
    const int64_t M = scorers.count;
    for (int64_t i = 0; i < ranks.n; ++i) {
        const float* row_M = ranks.scores + i * ranks.stride;
        double total = 0.0, count = 0.0;
        for (int64_t m = 0; m < M; ++m) {
            const bool is_present = num_present_M[m] >= 2.0 && row_M[m] == row_M[m];
            is_present_M[m] = is_present;
            rank_M[m] = is_present ? row_M[m] / (num_present_M[m] - 1.0) - 0.5 : 0.0;
            total += rank_M[m];
            count += is_present_M[m];
        }
        if (count < 2.0) continue;
        for (int64_t m = 0; m < M; ++m) {
            const double x = rank_M[m], y = is_present_M[m] * (total - x) / (count - 1.0);
            sums.count[m] += is_present_M[m];
            sums.x[m] += x;
            sums.y[m] += y;
            sums.xx[m] += x * x;
            sums.yy[m] += y * y;
            sums.xy[m] += x * y;
        }
    }
}

double correlation(double n, double x, double y, double xx, double yy, double xy) {
    // Ranks are of order 1; a constant has a variance of rounding errors.
    constexpr double kNoVariance = 1e-20;
    const double variance_x = xx / n - x / n * (x / n), variance_y = yy / n - y / n * (y / n);
    if (!(variance_x > kNoVariance && variance_y > kNoVariance)) return kNaN;
    const double r = (xy / n - x / n * (y / n)) / std::sqrt(variance_x * variance_y);
    return std::min(1.0, std::max(-1.0, r));
}

}  // namespace

bool agreement(const Scores& scores, const ScoringOps& ops, int num_threads, float* concordance_P, float* leave_one_out_M) {
    const int64_t M = scores.num_scorers, P = scores.num_prompts;
    const std::vector<double> ones(M, 1.0);
    const PaddedScorers padded(ones.data(), M);
    const Scorers& scorers = padded.view;
    const Reader reader(scores, scorers, ops);
    std::atomic<bool> is_finite{true};

    // Sums are taken by blocks of prompts, whatever the number of threads.
    constexpr int64_t kBlock = 1024;
    const int64_t num_blocks = (P + kBlock - 1) / kBlock;
    std::vector<std::vector<double>> blocks(num_blocks);
    const int64_t thread_count = choose_num_threads(num_threads, num_pairs_of_scores(scores));
    parallel_for(num_blocks, thread_count, [&](int64_t block) {
        Scratch scratch(scorers.padded);
        Sums sums(M);
        std::vector<double> num_present_M(M), rank_M(M), is_present_M(M);
        for (int64_t p = block * kBlock; p < std::min((block + 1) * kBlock, P); ++p) {
            Rows rows;
            if (!reader.read(p, scratch, &rows)) {
                is_finite = false;
                return;
            }
            concordance_P[p] = static_cast<float>(kNaN);
            if (rows.n < 2 || M == 0) continue;
            const Rows table = ranks(scorers, rows, ops, scratch);
            std::fill(num_present_M.begin(), num_present_M.end(), 0.0);
            for (int64_t i = 0; i < rows.n; ++i)
                for (int64_t m = 0; m < M; ++m)
                    num_present_M[m] += table.scores[i * table.stride + m] == table.scores[i * table.stride + m];
            concordance_P[p] = static_cast<float>(concordance(scorers, table, num_present_M.data()));
            add_leave_one_out(scorers, table, num_present_M.data(), rank_M.data(), is_present_M.data(), sums);
        }
        blocks[block] = std::move(sums.buffer);
    });
    if (!is_finite) return false;
    std::vector<double> total(6 * M);
    for (const std::vector<double>& block : blocks)
        for (int64_t i = 0; i < 6 * M; ++i) total[i] += block[i];
    for (int64_t m = 0; m < M; ++m)
        leave_one_out_M[m] = static_cast<float>(
            correlation(total[m], total[M + m], total[2 * M + m], total[3 * M + m], total[4 * M + m], total[5 * M + m]));
    return true;
}

int64_t bradley_terry(const int64_t* pairs, const double* wins, int64_t num_comparisons, const int64_t* offsets,
                      int64_t num_prompts, const BradleyTerryOptions& options, int num_threads, float* strengths_R,
                      int64_t* num_unfinished) {
    // Comparisons by prompt, in their order: a counting sort.
    std::vector<int64_t> prompts(num_comparisons), starts(num_prompts + 2, 0), order(num_comparisons);
    const int64_t num_rows = offsets[num_prompts];
    int64_t p = 0;
    for (int64_t c = 0; c < num_comparisons; ++c) {
        const int64_t low = std::min(pairs[2 * c], pairs[2 * c + 1]), high = std::max(pairs[2 * c], pairs[2 * c + 1]);
        if (low < 0 || high >= num_rows || low == high) return c;
        if (low < offsets[p] || low >= offsets[p + 1])
            p = std::upper_bound(offsets, offsets + num_prompts + 1, low) - offsets - 1;
        if (high >= offsets[p + 1]) return c;
        prompts[c] = p;
        ++starts[p + 2];
    }
    for (int64_t i = 2; i < num_prompts + 2; ++i) starts[i] += starts[i - 1];
    for (int64_t c = 0; c < num_comparisons; ++c) order[starts[prompts[c] + 1]++] = c;

    std::atomic<int64_t> unfinished{0};
    constexpr int64_t kLikelyIterations = 16;
    const int64_t thread_count = choose_num_threads(num_threads, num_comparisons * kLikelyIterations);
    for_each_range(num_prompts, thread_count, [&](int64_t first, int64_t last) {
        BradleyTerry model;
        std::vector<Comparison> comparisons;
        for (int64_t prompt = first; prompt < last; ++prompt) {
            const int64_t begin = offsets[prompt];
            comparisons.clear();
            for (int64_t i = starts[prompt]; i < starts[prompt + 1]; ++i) {
                const int64_t c = order[i];
                comparisons.push_back({pairs[2 * c] - begin, pairs[2 * c + 1] - begin, wins[2 * c], wins[2 * c + 1]});
            }
            unfinished += !model.fit(comparisons, offsets[prompt + 1] - begin, options, strengths_R + begin);
        }
    });
    *num_unfinished = unfinished;
    return -1;
}

}  // namespace tso
