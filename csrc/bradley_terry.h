// Bradley-Terry strengths of the responses to one prompt from weighted wins.
#pragma once
#include <cstdint>
#include <vector>

namespace tso {

struct Comparison {
    int64_t first, second;  // rows within the prompt
    double first_wins, second_wins;
};

struct BradleyTerryOptions {
    double regularization;
    int64_t max_iterations;
    double tolerance;
};

// The contract of the numbers is tso_fast.scoring.bradley_terry_reference.
class BradleyTerry {
public:
    // strengths_n: log-strengths of mean 0; NaN where all games of a response weigh 0. False if the tolerance was not reached.
    bool fit(const std::vector<Comparison>& comparisons, int64_t n, const BradleyTerryOptions& options, float* strengths_n);

private:
    std::vector<double> wins, games, strength, expected;
};

}  // namespace tso
