#include "scoring.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <thread>
#include <utility>
#include <vector>

#include "parallel.h"

namespace tso {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Scores (pairs of scores for win_rate) below which another thread costs more to start than it saves.
constexpr int64_t kMinWorkPerThread = 1 << 15;

struct Task {
    const float* scores_RM;
    const int64_t* offsets;
    const double* weights_M;
    int64_t num_prompts;
    int64_t num_scorers;
    Method method;
    Normalize normalize;
    float* consensus_R;
    int32_t* num_scores_R;
};

struct Scratch {
    std::vector<double> table;  // [n, M] normalised scores of one prompt
    std::vector<double> values;
    std::vector<int64_t> rows;
    std::vector<std::pair<double, int64_t>> sorted;
    std::vector<double> num_compared;
    std::vector<double> wins;
};

// Average rank among the values, scaled to [0, 1].
void rank_values(std::vector<double>& values, std::vector<std::pair<double, int64_t>>& sorted) {
    const int64_t n = values.size();
    sorted.clear();
    for (int64_t i = 0; i < n; ++i) sorted.emplace_back(values[i], i);
    std::sort(sorted.begin(), sorted.end());
    for (int64_t first = 0, last; first < n; first = last) {
        for (last = first + 1; last < n && sorted[last].first == sorted[first].first;) ++last;
        const double rank = 0.5 * (first + last - 1) / (n - 1);
        for (int64_t i = first; i < last; ++i) values[sorted[i].second] = rank;
    }
}

// One scorer's scores of one prompt, without the missing ones.
void normalize_values(Normalize normalize, std::vector<double>& values,
                      std::vector<std::pair<double, int64_t>>& sorted) {
    if (normalize == Normalize::none || values.empty()) return;
    const auto [min, max] = std::minmax_element(values.begin(), values.end());
    const double low = *min, high = *max;
    if (low == high) {
        std::fill(values.begin(), values.end(), normalize == Normalize::z ? 0.0 : 0.5);
    } else if (normalize == Normalize::rank) {
        rank_values(values, sorted);
    } else if (normalize == Normalize::minmax) {
        for (double& value : values) value = (value - low) / (high - low);
    } else {
        double sum = 0.0, squares = 0.0;
        for (double value : values) sum += value;
        const double mean = sum / values.size();
        for (double value : values) squares += (value - mean) * (value - mean);
        const double std = std::sqrt(squares / values.size());
        for (double& value : values) value = (value - mean) / std;
    }
}

void fill_table(const Task& task, int64_t begin, int64_t n, Scratch& scratch) {
    const int64_t M = task.num_scorers;
    // Borda counts divided by (n - 1) are these ranks.
    const Normalize normalize = task.method == Method::borda ? Normalize::rank : task.normalize;
    scratch.table.assign(n * M, kNaN);
    for (int64_t m = 0; m < M; ++m) {
        if (task.weights_M[m] == 0.0) continue;
        scratch.values.clear();
        scratch.rows.clear();
        for (int64_t row = 0; row < n; ++row) {
            const float score = task.scores_RM[(begin + row) * M + m];
            if (std::isnan(score)) continue;
            scratch.values.push_back(score);
            scratch.rows.push_back(row);
        }
        normalize_values(normalize, scratch.values, scratch.sorted);
        for (size_t i = 0; i < scratch.rows.size(); ++i) scratch.table[scratch.rows[i] * M + m] = scratch.values[i];
    }
}

double weighted_mean(const double* row_M, const double* weights_M, int64_t M) {
    double sum = 0.0, weight = 0.0;
    for (int64_t m = 0; m < M; ++m) {
        if (std::isnan(row_M[m])) continue;
        sum += weights_M[m] * row_M[m];
        weight += weights_M[m];
    }
    return weight > 0.0 ? sum / weight : kNaN;
}

double median(const double* row_M, int64_t M, std::vector<double>& values) {
    values.clear();
    std::copy_if(row_M, row_M + M, std::back_inserter(values), [](double value) { return !std::isnan(value); });
    if (values.empty()) return kNaN;
    std::sort(values.begin(), values.end());
    return 0.5 * (values[(values.size() - 1) / 2] + values[values.size() / 2]);
}

void win_rates(const Task& task, int64_t n, Scratch& scratch, float* consensus_n) {
    const int64_t M = task.num_scorers;
    scratch.wins.assign(n, 0.0);
    scratch.num_compared.assign(n, 0.0);
    for (int64_t i = 0; i < n; ++i) {
        const double* a_M = &scratch.table[i * M];
        for (int64_t j = i + 1; j < n; ++j) {
            const double* b_M = &scratch.table[j * M];
            double share = 0.0, weight = 0.0;
            for (int64_t m = 0; m < M; ++m) {
                // A comparison with NaN is false, so a scorer that lacks either score adds nothing.
                const double greater = a_M[m] > b_M[m], equal = a_M[m] == b_M[m], less = a_M[m] < b_M[m];
                share += task.weights_M[m] * (greater + 0.5 * equal);
                weight += task.weights_M[m] * (greater + equal + less);
            }
            if (weight == 0.0) continue;
            scratch.wins[i] += share / weight;
            scratch.wins[j] += 1.0 - share / weight;
            scratch.num_compared[i] += 1.0;
            scratch.num_compared[j] += 1.0;
        }
    }
    for (int64_t i = 0; i < n; ++i)
        consensus_n[i] = scratch.num_compared[i] > 0.0 ? scratch.wins[i] / scratch.num_compared[i] : kNaN;
}

void score_prompt(const Task& task, int64_t prompt, Scratch& scratch) {
    const int64_t begin = task.offsets[prompt], n = task.offsets[prompt + 1] - begin, M = task.num_scorers;
    fill_table(task, begin, n, scratch);
    for (int64_t row = 0; row < n; ++row) {
        const double* row_M = scratch.table.data() + row * M;
        task.num_scores_R[begin + row] = std::count_if(row_M, row_M + M, [](double v) { return !std::isnan(v); });
        if (task.method == Method::median)
            task.consensus_R[begin + row] = median(row_M, M, scratch.values);
        else if (task.method != Method::win_rate)
            task.consensus_R[begin + row] = weighted_mean(row_M, task.weights_M, M);
    }
    if (task.method == Method::win_rate) win_rates(task, n, scratch, task.consensus_R + begin);
}

int64_t choose_num_threads(const Task& task, int num_threads) {
    int64_t work = 0;
    for (int64_t p = 0; p < task.num_prompts; ++p) {
        const int64_t n = task.offsets[p + 1] - task.offsets[p];
        work += n * task.num_scorers * (task.method == Method::win_rate ? n : 1);
    }
    const int64_t wanted = num_threads > 0 ? num_threads : std::thread::hardware_concurrency();
    return std::max<int64_t>(1, std::min({wanted, task.num_prompts, work / kMinWorkPerThread}));
}

}  // namespace

void consensus(const float* scores_RM, const int64_t* offsets, const double* weights_M, int64_t num_prompts,
               int64_t num_scorers, Method method, Normalize normalize, int num_threads, float* consensus_R,
               int32_t* num_scores_R) {
    const Task task{scores_RM, offsets,   weights_M,   num_prompts, num_scorers,
                    method,    normalize, consensus_R, num_scores_R};
    const int64_t thread_count = choose_num_threads(task, num_threads);
    // A prompt is computed by one thread whichever it is, so who takes which range cannot change a bit of the result.
    const int64_t range = std::max<int64_t>(1, num_prompts / (8 * thread_count));
    parallel_for((num_prompts + range - 1) / range, thread_count, [&](int64_t index) {
        Scratch scratch;
        for (int64_t p = index * range; p < std::min((index + 1) * range, num_prompts); ++p) score_prompt(task, p, scratch);
    });
}

}  // namespace tso
