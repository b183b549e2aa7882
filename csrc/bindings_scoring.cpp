// Checks that buffers fit together (messages for users are in tso_fast/scoring), releases the GIL.
#include "bindings.h"
#include "scoring.h"

namespace bindings {
namespace {

const std::unordered_map<std::string, tso::Method> kMethods = {{"mean", tso::Method::mean},
                                                               {"median", tso::Method::median},
                                                               {"borda", tso::Method::borda},
                                                               {"win_rate", tso::Method::win_rate}};
const std::unordered_map<std::string, tso::Normalize> kNormalizations = {{"none", tso::Normalize::none},
                                                                         {"z", tso::Normalize::z},
                                                                         {"rank", tso::Normalize::rank},
                                                                         {"minmax", tso::Normalize::minmax}};

py::tuple consensus(const Array<float>& scores_RM, const Array<int64_t>& offsets, const Array<double>& weights_M,
                    const std::string& method, const std::string& normalize, int num_threads) {
    if (scores_RM.ndim() != 2) throw py::value_error("scores must be [R, M]");
    const int64_t R = scores_RM.shape(0), M = scores_RM.shape(1);
    if (weights_M.ndim() != 1 || weights_M.shape(0) != M) throw py::value_error("weights must be [M]");
    const std::vector<int64_t> rows = checked_offsets(offsets, R);
    const tso::Method method_ = named(kMethods, method);
    const tso::Normalize normalize_ = named(kNormalizations, normalize);
    Array<float> consensus_R(R);
    Array<int32_t> num_scores_R(R);
    const float* scores = scores_RM.data();
    const double* weights = weights_M.data();
    float* out = consensus_R.mutable_data();
    int32_t* num_out = num_scores_R.mutable_data();
    {
        const py::gil_scoped_release release;
        tso::consensus(scores, rows.data(), weights, rows.size() - 1, M, method_, normalize_, num_threads, out,
                       num_out);
    }
    return py::make_tuple(consensus_R, num_scores_R);
}

}  // namespace

void bind_scoring(py::module_& m) {
    m.def("consensus", &consensus, py::arg("scores").noconvert(), py::arg("offsets").noconvert(),
          py::arg("weights").noconvert(), py::arg("method"), py::arg("normalize"), py::arg("num_threads"),
          "scores [R, M] float32, offsets [P+1] int64, weights [M] float64, all C-contiguous -> "
          "(scores [R] float32, num_scores [R] int32).");
}

}  // namespace bindings
