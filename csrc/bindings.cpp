// Module tso_fast._C: checks that buffers fit together (messages for users are in tso_fast/*.py), releases the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "scoring.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

const std::unordered_map<std::string, tso::Method> kMethods = {{"mean", tso::Method::mean},
                                                               {"median", tso::Method::median},
                                                               {"borda", tso::Method::borda},
                                                               {"win_rate", tso::Method::win_rate}};
const std::unordered_map<std::string, tso::Normalize> kNormalizations = {{"none", tso::Normalize::none},
                                                                         {"z", tso::Normalize::z},
                                                                         {"rank", tso::Normalize::rank},
                                                                         {"minmax", tso::Normalize::minmax}};

template <typename T>
T named(const std::unordered_map<std::string, T>& known, const std::string& name) {
    const auto found = known.find(name);
    if (found == known.end()) throw py::value_error("unknown name '" + name + "'");
    return found->second;
}

// A copy: the caller's array may change while the GIL is released, and offsets decide where we write.
std::vector<int64_t> checked_offsets(const Array<int64_t>& offsets, int64_t num_rows) {
    if (offsets.ndim() != 1 || offsets.size() == 0) throw py::value_error("offsets must be [P+1]");
    std::vector<int64_t> copy(offsets.data(), offsets.data() + offsets.size());
    if (copy.front() != 0 || copy.back() != num_rows) throw py::value_error("offsets must run from 0 to R");
    for (size_t p = 1; p < copy.size(); ++p)
        if (copy[p] < copy[p - 1]) throw py::value_error("offsets must not decrease");
    return copy;
}

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

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ core of tso_fast; call it through tso_fast.scoring.";
    m.def("consensus", &consensus, py::arg("scores").noconvert(), py::arg("offsets").noconvert(),
          py::arg("weights").noconvert(), py::arg("method"), py::arg("normalize"), py::arg("num_threads"),
          "scores [R, M] float32, offsets [P+1] int64, weights [M] float64, all C-contiguous -> "
          "(scores [R] float32, num_scores [R] int32).");
}
