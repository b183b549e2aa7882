#include "bradley_terry.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tso {

bool BradleyTerry::fit(const std::vector<Comparison>& comparisons, int64_t n, const BradleyTerryOptions& options,
                       float* strengths_n) {
    wins.assign(n, 0.0);
    games.assign(n, 0.0);
    for (const Comparison& c : comparisons) {
        const double both = c.first_wins + c.second_wins;
        wins[c.first] += c.first_wins;
        wins[c.second] += c.second_wins;
        games[c.first] += both;
        games[c.second] += both;
    }
    const double ghost_games = options.regularization;
    int64_t num_compared = 0;
    strength.assign(n, 1.0);
    for (int64_t i = 0; i < n; ++i) {
        wins[i] += 0.5 * ghost_games;
        num_compared += games[i] > 0.0;
    }
    // The opponent is a player like the others: its strength is fitted, so the updates do not depend on a common scale.
    double ghost = 1.0;
    const double ghost_wins = 0.5 * ghost_games * num_compared;
    bool is_done = num_compared == 0;
    for (int64_t iteration = 0; iteration < options.max_iterations && !is_done; ++iteration) {
        expected.assign(n, 0.0);
        for (const Comparison& c : comparisons) {
            const double both = c.first_wins + c.second_wins;
            const double share = both / (strength[c.first] + strength[c.second]);
            expected[c.first] += share;
            expected[c.second] += share;
        }
        double ghost_expected = 0.0, change = 0.0;
        for (int64_t i = 0; i < n; ++i) {
            if (games[i] == 0.0) continue;
            const double share = ghost_games / (strength[i] + ghost);
            ghost_expected += share;
            const double next = wins[i] / (expected[i] + share);
            change = std::max(change, std::abs(next / strength[i] - 1.0));
            strength[i] = next;
        }
        ghost = ghost_wins / ghost_expected;
        is_done = change <= options.tolerance;
    }
    double mean = 0.0;
    for (int64_t i = 0; i < n; ++i)
        if (games[i] > 0.0) mean += std::log(strength[i]);
    mean /= num_compared;
    for (int64_t i = 0; i < n; ++i)
        strengths_n[i] = games[i] > 0.0 ? std::log(strength[i]) - mean : std::numeric_limits<double>::quiet_NaN();
    return is_done;
}

}  // namespace tso
