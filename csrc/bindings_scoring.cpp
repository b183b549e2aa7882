// Checks that buffers fit together (messages for users are in tso_fast/scoring), releases the GIL.
#include "bindings.h"
#include "scoring.h"

namespace bindings {

const tso::ScoringOps& ops_of(const std::string& isa) {
    const tso::ScoringOps* const* ops = tso::available_scoring_ops();
    if (isa.empty()) return **ops;
    for (; *ops; ++ops)
        if (isa == (*ops)->isa) return **ops;
    throw py::value_error("instruction set '" + isa + "' is unknown or missing here");
}

namespace {

const std::unordered_map<std::string, tso::Method> kMethods = {
    {"mean", tso::Method::mean},
    {"median", tso::Method::median},
    {"borda", tso::Method::borda},
    {"win_rate", tso::Method::win_rate},
    {"bradley_terry", tso::Method::bradley_terry},
};
const std::unordered_map<std::string, tso::Normalize> kNormalizations = {
    {"none", tso::Normalize::none},
    {"z", tso::Normalize::z},
    {"rank", tso::Normalize::rank},
    {"minmax", tso::Normalize::minmax},
};

std::vector<std::string> scoring_isas() {
    std::vector<std::string> names;
    for (const tso::ScoringOps* const* ops = tso::available_scoring_ops(); *ops; ++ops) names.push_back((*ops)->isa);
    return names;
}

tso::BradleyTerryOptions checked_options(double regularization, int64_t max_iterations, double tolerance) {
    if (!(regularization > 0.0)) throw py::value_error("regularization must be > 0");
    return {regularization, max_iterations, tolerance};
}

py::object consensus(const Array<float>& scores_RM, const Array<int64_t>& offsets, const Array<double>& weights_M,
                     const std::string& method, const std::string& normalize, double regularization, int64_t max_iterations,
                     double tolerance, int num_threads, const std::string& isa) {
    if (scores_RM.ndim() != 2) throw py::value_error("scores must be [R, M]");
    const int64_t R = scores_RM.shape(0), M = scores_RM.shape(1);
    if (weights_M.ndim() != 1 || weights_M.shape(0) != M) throw py::value_error("weights must be [M]");
    const std::vector<int64_t> rows = checked_offsets(offsets, R);
    const tso::Method method_ = named(kMethods, method);
    const tso::Normalize normalize_ = named(kNormalizations, normalize);
    const tso::BradleyTerryOptions options = checked_options(regularization, max_iterations, tolerance);
    const tso::ScoringOps& ops = ops_of(isa);
    Array<float> consensus_R(R);
    Array<int32_t> num_scores_R(R);
    const tso::Scores scores{scores_RM.data(), rows.data(), static_cast<int64_t>(rows.size()) - 1, M};
    const double* weights = weights_M.data();
    float* out = consensus_R.mutable_data();
    int32_t* num_out = num_scores_R.mutable_data();
    bool is_finite;
    int64_t num_unfinished;
    {
        const py::gil_scoped_release release;
        is_finite =
            tso::consensus(scores, weights, method_, normalize_, options, ops, num_threads, out, num_out, &num_unfinished);
    }
    if (!is_finite) return py::none();
    return py::make_tuple(consensus_R, num_scores_R, num_unfinished);
}

py::object agreement(const Array<float>& scores_RM, const Array<int64_t>& offsets, int num_threads, const std::string& isa) {
    if (scores_RM.ndim() != 2) throw py::value_error("scores must be [R, M]");
    const int64_t R = scores_RM.shape(0), M = scores_RM.shape(1);
    const std::vector<int64_t> rows = checked_offsets(offsets, R);
    const tso::ScoringOps& ops = ops_of(isa);
    const int64_t P = static_cast<int64_t>(rows.size()) - 1;
    Array<float> concordance_P(P), leave_one_out_M(M);
    const tso::Scores scores{scores_RM.data(), rows.data(), P, M};
    float *concordance = concordance_P.mutable_data(), *leave_one_out = leave_one_out_M.mutable_data();
    bool is_finite;
    {
        const py::gil_scoped_release release;
        is_finite = tso::agreement(scores, ops, num_threads, concordance, leave_one_out);
    }
    if (!is_finite) return py::none();
    return py::make_tuple(concordance_P, leave_one_out_M);
}

py::object bradley_terry(const Array<int64_t>& pairs, const Array<double>& wins, const Array<int64_t>& offsets,
                         int64_t num_rows, double regularization, int64_t max_iterations, double tolerance, int num_threads) {
    if (pairs.ndim() != 2 || pairs.shape(1) != 2) throw py::value_error("pairs must be [C, 2]");
    if (wins.ndim() != 2 || wins.shape(1) != 2 || wins.shape(0) != pairs.shape(0)) throw py::value_error("wins must be [C, 2]");
    const std::vector<int64_t> rows = checked_offsets(offsets, num_rows);
    const tso::BradleyTerryOptions options = checked_options(regularization, max_iterations, tolerance);
    // A copy, like that of the offsets: pairs decide where we write.
    const std::vector<int64_t> pairs_(pairs.data(), pairs.data() + pairs.size());
    Array<float> strengths_R(num_rows);
    const double* wins_ = wins.data();
    float* out = strengths_R.mutable_data();
    int64_t bad, num_unfinished;
    {
        const py::gil_scoped_release release;
        bad = tso::bradley_terry(pairs_.data(), wins_, pairs_.size() / 2, rows.data(), rows.size() - 1, options, num_threads,
                                 out, &num_unfinished);
    }
    if (bad >= 0) return py::int_(bad);
    return py::make_tuple(strengths_R, num_unfinished);
}

}  // namespace

void bind_scoring(py::module_& m) {
    m.def("scoring_isas", &scoring_isas, "What `isa` may be here, best first; empty: the best. The results are the same bits.");
    m.def("consensus", &consensus, py::arg("scores").noconvert(), py::arg("offsets").noconvert(),
          py::arg("weights").noconvert(), py::arg("method"), py::arg("normalize"), py::arg("regularization"),
          py::arg("max_iterations"), py::arg("tolerance"), py::arg("num_threads"), py::arg("isa") = "",
          "scores [R, M] float32, offsets [P+1] int64, weights [M] float64, all C-contiguous -> "
          "(scores [R] float32, num_scores [R] int32, number of prompts short of the tolerance), or None if a score is "
          "infinite.");
    m.def("agreement", &agreement, py::arg("scores").noconvert(), py::arg("offsets").noconvert(), py::arg("num_threads"),
          py::arg("isa") = "",
          "scores [R, M] float32, offsets [P+1] int64 -> (concordance [P] float32, leave_one_out [M] float32), or None if a "
          "score is infinite.");
    m.def("bradley_terry", &bradley_terry, py::arg("pairs").noconvert(), py::arg("wins").noconvert(),
          py::arg("offsets").noconvert(), py::arg("num_rows"), py::arg("regularization"), py::arg("max_iterations"),
          py::arg("tolerance"), py::arg("num_threads"),
          "pairs [C, 2] int64, wins [C, 2] float64, offsets [P+1] int64 -> (strengths [R] float32, number of prompts short "
          "of the tolerance), or the index of the first pair that is not two rows of one prompt.");
}

}  // namespace bindings
