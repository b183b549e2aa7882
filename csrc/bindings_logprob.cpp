// Checks that buffers fit together (messages for users are in tso_fast/logprob), releases the GIL.
#include <optional>

#include "bindings.h"
#include "logprob.h"

namespace bindings {
namespace {

const std::unordered_map<std::string, tso::Dtype> kDtypes = {
    {"float64", tso::Dtype::f64},
    {"float32", tso::Dtype::f32},
    {"bfloat16", tso::Dtype::bf16},
    {"float16", tso::Dtype::f16},
};
constexpr py::ssize_t kRowFields = sizeof(tso::Row) / sizeof(double);

// The table of that name, or the best one for "".
const tso::Ops& chosen_ops(tso::Dtype dtype, const std::string& isa) {
    for (const tso::Ops* const* ops = tso::available_ops(dtype); *ops != nullptr; ++ops)
        if (isa.empty() || isa == (*ops)->isa) return **ops;
    throw py::value_error("this machine has no '" + isa + "'");
}

std::vector<std::string> logprob_isas(const std::string& dtype) {
    std::vector<std::string> names;
    for (const tso::Ops* const* ops = tso::available_ops(named(kDtypes, dtype)); *ops != nullptr; ++ops)
        names.emplace_back((*ops)->isa);
    return names;
}

int64_t logprob_exps_bytes(int64_t T, int64_t V, const std::string& dtype, const std::string& isa) {
    const tso::Ops& ops = chosen_ops(named(kDtypes, dtype), isa);
    return tso::exps_stride(ops, T) * V * ops.element_size;
}

// The data of a contiguous array of that size; null for None.
const void* data_of(const std::optional<py::array>& array, const char* name, int64_t count, int64_t item_size) {
    if (!array) return nullptr;
    if (!(array->flags() & py::array::c_style) || array->size() != count || array->itemsize() != item_size)
        throw py::value_error(std::string(name) + " must be " + std::to_string(count) + " contiguous items of " +
                              std::to_string(item_size) + " bytes");
    return array->data();
}
void* writable(std::optional<py::array>& array, const char* name, int64_t count, int64_t item_size) {
    if (array && !array->writeable()) throw py::value_error(std::string(name) + " must be writable");
    return const_cast<void*>(data_of(array, name, count, item_size));
}

// The head that the arrays describe; targets are copied, as they decide where we read and write.
struct CheckedHead {
    tso::Head head;
    std::vector<int64_t> targets;

    CheckedHead(const py::array& hidden_TD, const py::array& weight_VD, const std::optional<py::array>& bias_V,
                const Array<int64_t>& targets_T, const std::string& dtype_name, double softcap, double scale, int num_threads,
                const std::string& isa, bool is_shard)
        : targets(targets_T.data(), targets_T.data() + targets_T.size()) {
        if (hidden_TD.ndim() != 2 || weight_VD.ndim() != 2) throw py::value_error("hidden must be [T, D], weight [V, D]");
        head.dtype = named(kDtypes, dtype_name);
        head.ops = &chosen_ops(head.dtype, isa);
        head.T = hidden_TD.shape(0), head.D = hidden_TD.shape(1), head.V = weight_VD.shape(0);
        const int64_t size = tso::dtype_size(head.dtype);
        head.hidden_TD = data_of(hidden_TD, "hidden", head.T * head.D, size);
        head.weight_VD = data_of(weight_VD, "weight", head.V * head.D, size);
        head.bias_V = data_of(bias_V, "bias", head.V, size);
        if (static_cast<int64_t>(targets.size()) != head.T) throw py::value_error("targets must be [T]");
        for (const int64_t target : targets)
            if (target < (is_shard ? -1 : 0) || target >= head.V) throw py::value_error("targets must be in [0, V)");
        head.targets_T = targets.data();
        head.softcap = softcap, head.scale = scale, head.num_threads = num_threads;
    }
};

py::tuple logprob_forward(const py::array& hidden_TD, const py::array& weight_VD, const std::optional<py::array>& bias_V,
                          const Array<int64_t>& targets_T, const std::string& dtype, double softcap, double scale,
                          int num_threads, const std::string& isa, std::optional<py::array> exps, const py::object& reduce) {
    const CheckedHead checked(hidden_TD, weight_VD, bias_V, targets_T, dtype, softcap, scale, num_threads, isa,
                              !reduce.is_none());
    const tso::Head& head = checked.head;
    void* exps_ = writable(exps, "exps", tso::exps_stride(*head.ops, head.T) * head.V * head.ops->element_size, 1);
    Array<double> logprob_T(head.T);
    Array<double> rows({static_cast<py::ssize_t>(head.T), kRowFields});
    double* logprob = logprob_T.mutable_data();
    tso::Row* row_T = reinterpret_cast<tso::Row*>(rows.mutable_data());
    tso::Reduce over_ranks;
    if (!reduce.is_none())
        over_ranks = [&reduce](double* values, int64_t count, bool find_max) {
            const py::gil_scoped_acquire acquire;
            // A view of our memory, as it has an owner.
            reduce(py::array_t<double>(count, values, py::capsule(values, [](void*) {})), find_max);
        };
    {
        const py::gil_scoped_release release;
        tso::logprob_forward(head, over_ranks, logprob, row_T, exps_);
    }
    return py::make_tuple(logprob_T, rows);
}

void logprob_backward(const py::array& hidden_TD, const py::array& weight_VD, const std::optional<py::array>& bias_V,
                      const Array<int64_t>& targets_T, const std::string& dtype, double softcap, double scale, int num_threads,
                      const std::string& isa, py::array exps, const Array<double>& rows, const Array<double>& dlogprob_T,
                      std::optional<py::array> dhidden_TD, const std::string& dhidden_dtype,
                      std::optional<py::array> dweight_VD, std::optional<py::array> dweight_rest_VD,
                      std::optional<py::array> dbias_V, bool is_first, bool is_last) {
    const CheckedHead checked(hidden_TD, weight_VD, bias_V, targets_T, dtype, softcap, scale, num_threads, isa, true);
    const tso::Head& head = checked.head;
    if (dlogprob_T.size() != head.T || rows.size() != head.T * kRowFields)
        throw py::value_error("dlogprob and rows must be those of [T] tokens");
    std::optional<py::array> exps_array = exps;
    void* exps_ = writable(exps_array, "exps", tso::exps_stride(*head.ops, head.T) * head.V * head.ops->element_size, 1);
    tso::Gradients gradients;
    gradients.dhidden_dtype = named(kDtypes, dhidden_dtype);
    gradients.dhidden_TD = writable(dhidden_TD, "dhidden", head.T * head.D, tso::dtype_size(gradients.dhidden_dtype));
    gradients.dweight_VD = writable(dweight_VD, "dweight", head.V * head.D, tso::dtype_size(head.dtype));
    const bool is_half = head.dtype == tso::Dtype::bf16 || head.dtype == tso::Dtype::f16;
    gradients.dweight_rest_VD = writable(dweight_rest_VD, "dweight_rest", head.V * head.D, 1);
    if (is_half && dweight_VD && !dweight_rest_VD && !(is_first && is_last))
        throw py::value_error("a sum of several chunks in half precision needs dweight_rest");
    gradients.dbias_V = static_cast<double*>(writable(dbias_V, "dbias", head.V, sizeof(double)));
    gradients.is_first = is_first, gradients.is_last = is_last;
    const double* dlogprob = dlogprob_T.data();
    const tso::Row* row_T = reinterpret_cast<const tso::Row*>(rows.data());
    const py::gil_scoped_release release;
    tso::logprob_backward(head, dlogprob, row_T, exps_, gradients);
}

}  // namespace

void bind_logprob(py::module_& m) {
    m.def("logprob_isas", &logprob_isas, py::arg("dtype"), "Instruction sets for inputs of that dtype, best first");
    m.def("logprob_exps_bytes", &logprob_exps_bytes, py::arg("T"), py::arg("V"), py::arg("dtype"), py::arg("isa"));
    m.def("logprob_forward", &logprob_forward, py::arg("hidden_TD"), py::arg("weight_VD"), py::arg("bias_V"),
          py::arg("targets_T").noconvert(), py::arg("dtype"), py::arg("softcap"), py::arg("scale"), py::arg("num_threads"),
          py::arg("isa"), py::arg("exps"), py::arg("reduce") = py::none(),
          "reduce(values [n] float64, find_max): replaces the numbers by their sum or maximum over ranks");
    m.def("logprob_backward", &logprob_backward, py::arg("hidden_TD"), py::arg("weight_VD"), py::arg("bias_V"),
          py::arg("targets_T").noconvert(), py::arg("dtype"), py::arg("softcap"), py::arg("scale"), py::arg("num_threads"),
          py::arg("isa"), py::arg("exps"), py::arg("rows").noconvert(), py::arg("dlogprob_T").noconvert(),
          py::arg("dhidden_TD"), py::arg("dhidden_dtype"), py::arg("dweight_VD"), py::arg("dweight_rest_VD"),
          py::arg("dbias_V"), py::arg("is_first"), py::arg("is_last"));
}

}  // namespace bindings
