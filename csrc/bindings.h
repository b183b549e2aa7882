// Shared by the bindings; one bind_ function a file of them.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "scoring_ops.h"

namespace bindings {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
T named(const std::unordered_map<std::string, T>& known, const std::string& name) {
    const auto found = known.find(name);
    if (found == known.end()) throw py::value_error("unknown name '" + name + "'");
    return found->second;
}

// A copy: the caller's array may change while the GIL is released, and offsets decide where we write.
inline std::vector<int64_t> checked_offsets(const Array<int64_t>& offsets, int64_t num_rows) {
    if (offsets.ndim() != 1 || offsets.size() == 0) throw py::value_error("offsets must be [P+1]");
    std::vector<int64_t> copy(offsets.data(), offsets.data() + offsets.size());
    if (copy.front() != 0 || copy.back() != num_rows) throw py::value_error("offsets must run from 0 to R");
    for (size_t p = 1; p < copy.size(); ++p)
        if (copy[p] < copy[p - 1]) throw py::value_error("offsets must not decrease");
    return copy;
}

// Empty: the best there is.
const tso::ScoringOps& ops_of(const std::string& isa);

void bind_logprob(py::module_& m);
void bind_scoring(py::module_& m);
void bind_selection(py::module_& m);

}  // namespace bindings
