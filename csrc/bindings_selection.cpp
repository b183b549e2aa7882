// Checks that buffers fit together (messages for users are in tso_fast/scoring), releases the GIL.
#include <algorithm>
#include <limits>
#include <optional>

#include "bindings.h"
#include "diversity.h"
#include "selection.h"

namespace bindings {
namespace {

const std::unordered_map<std::string, tso::Strategy> kStrategies = {
    {"best_worst", tso::Strategy::best_worst},
    {"best_random", tso::Strategy::best_random},
    {"random", tso::Strategy::random},
    {"baseline", tso::Strategy::baseline},
    {"tournament", tso::Strategy::tournament},
    {"first_round", tso::Strategy::first_round},
    {"all", tso::Strategy::all},
    {"diverse", tso::Strategy::diverse},
};

template <typename T>
using Optional = std::optional<Array<T>>;

template <typename T>
const T* optional_data(const Optional<T>& array, int64_t size, const char* message) {
    if (!array) return nullptr;
    if (array->ndim() != 1 || array->shape(0) != size) throw py::value_error(message);
    return array->data();
}

tso::SelectionOptions make_options(const std::string& strategy, int64_t max_pairs, float min_margin, float band,
                                   bool reuses_texts, uint64_t seed, int num_threads) {
    if (max_pairs < 1) throw py::value_error("max_pairs must be > 0");
    return {named(kStrategies, strategy), max_pairs, min_margin, band, reuses_texts, seed, num_threads};
}

// Gives memory back beyond the first rows.
template <typename T>
void keep_rows(Array<T>& array, std::vector<py::ssize_t> shape) {
    if (array.shape(0) != shape[0]) array.resize(shape, false);
}

py::tuple select_pairs(const Array<float>& consensus_R, const Array<int64_t>& offsets, const std::string& strategy,
                       int64_t max_pairs, float min_margin, const Optional<bool>& positives, const Optional<bool>& negatives,
                       const Optional<int64_t>& text_ids, const Optional<int64_t>& forbidden, const Optional<uint64_t>& keys,
                       const Optional<int64_t>& baseline, const Optional<float>& distances, float band, bool reuses_texts,
                       uint64_t seed, int num_threads, const std::string& isa) {
    if (consensus_R.ndim() != 1) throw py::value_error("consensus must be [R]");
    const int64_t R = consensus_R.shape(0);
    const std::vector<int64_t> rows = checked_offsets(offsets, R);
    const int64_t P = rows.size() - 1;
    const tso::SelectionOptions options = make_options(strategy, max_pairs, min_margin, band, reuses_texts, seed, num_threads);

    const tso::ScoringOps& ops = ops_of(isa);

    tso::SelectionInput input{};
    input.consensus_R = consensus_R.data();
    input.offsets = rows.data();
    input.num_prompts = P;
    input.positives_R = optional_data(positives, R, "positives must be [R]");
    input.negatives_R = optional_data(negatives, R, "negatives must be [R]");
    input.text_ids_R = optional_data(text_ids, R, "text_ids must be [R]");
    input.keys_P = optional_data(keys, P, "keys must be [P]");

    constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();
    int64_t num_distances = 0;
    for (int64_t p = 0; p < P && (distances || R > kMostRows); ++p) {
        const int64_t n = rows[p + 1] - rows[p];
        if (n > kMostRows) throw py::value_error("a prompt has too many rows");
        num_distances += n * n;
    }
    input.distances = optional_data(distances, num_distances, "distances must be [sum of n^2]");
    if (options.strategy == tso::Strategy::diverse && !distances) throw py::value_error("distances are missing");

    std::vector<int64_t> baseline_P;  // a copy: its entries decide where we read
    if (const int64_t* data = optional_data(baseline, P, "baseline must be [P]")) {
        baseline_P.assign(data, data + P);
        for (int64_t p = 0; p < P; ++p)
            if (baseline_P[p] >= 0 && (baseline_P[p] < rows[p] || baseline_P[p] >= rows[p + 1]))
                throw py::value_error("baseline is not a row of its prompt");
        input.baseline_P = baseline_P.data();
    }
    std::vector<std::pair<int64_t, int64_t>> pairs;
    if (forbidden) {
        if (forbidden->ndim() != 2 || forbidden->shape(1) != 2) throw py::value_error("forbidden must be [F, 2]");
        for (py::ssize_t f = 0; f < forbidden->shape(0); ++f)
            pairs.push_back(std::minmax(forbidden->data()[2 * f], forbidden->data()[2 * f + 1]));
        std::sort(pairs.begin(), pairs.end());
        input.forbidden = pairs.data();
        input.num_forbidden = pairs.size();
    }

    const py::ssize_t capacity = tso::selection_capacity(rows.data(), P, options);
    Array<int64_t> pairs_N2(std::vector<py::ssize_t>{capacity, 2});
    Array<float> margin_N(capacity);
    int64_t* pairs_out = pairs_N2.mutable_data();
    float* margin_out = margin_N.mutable_data();
    tso::Selection selection;
    {
        const py::gil_scoped_release release;
        selection = tso::select_pairs(input, options, ops, pairs_out, margin_out);
    }
    keep_rows(pairs_N2, {static_cast<py::ssize_t>(selection.num_pairs), 2});
    keep_rows(margin_N, {static_cast<py::ssize_t>(selection.num_pairs)});
    return py::make_tuple(pairs_N2, margin_N, selection.is_finite);
}

Array<int64_t> select_decided(const Array<int64_t>& pairs_C2, const Array<float>& margin_C, const Array<int64_t>& offsets,
                              const std::string& strategy, int64_t max_pairs, const Optional<int64_t>& text_ids,
                              const Optional<uint64_t>& keys, bool reuses_texts, uint64_t seed, int num_threads) {
    if (pairs_C2.ndim() != 2 || pairs_C2.shape(1) != 2) throw py::value_error("pairs must be [C, 2]");
    const int64_t C = pairs_C2.shape(0);
    if (margin_C.ndim() != 1 || margin_C.shape(0) != C) throw py::value_error("margin must be [C]");
    const std::vector<int64_t> begins = checked_offsets(offsets, C);
    const int64_t P = begins.size() - 1;
    // A copy: the rows decide where text_ids is read.
    const std::vector<int64_t> pairs(pairs_C2.data(), pairs_C2.data() + 2 * C);
    if (text_ids)
        for (const int64_t row : pairs)
            if (row < 0 || row >= text_ids->size()) throw py::value_error("a pair names a row without text id");
    const tso::SelectionOptions options = make_options(strategy, max_pairs, 0, 0, reuses_texts, seed, num_threads);
    const tso::DecidedInput input{pairs.data(),
                                  margin_C.data(),
                                  begins.data(),
                                  P,
                                  text_ids ? text_ids->data() : nullptr,
                                  optional_data(keys, P, "keys must be [P]")};
    Array<int64_t> index_N(static_cast<py::ssize_t>(tso::decided_capacity(begins.data(), P, options)));
    int64_t* out = index_N.mutable_data();
    int64_t count;
    {
        const py::gil_scoped_release release;
        count = tso::select_decided(input, options, out);
    }
    keep_rows(index_N, {static_cast<py::ssize_t>(count)});
    return index_N;
}

struct Texts {
    std::vector<int64_t> offsets, token_offsets;
    tso::RaggedTokens view;
};

Texts checked_texts(const Array<int32_t>& tokens, const Array<int64_t>& token_offsets, const Array<int64_t>& offsets) {
    if (tokens.ndim() != 1) throw py::value_error("tokens must be [T]");
    Texts texts{{}, checked_offsets(token_offsets, tokens.size()), {}};
    texts.offsets = checked_offsets(offsets, texts.token_offsets.size() - 1);
    const int64_t P = texts.offsets.size() - 1;
    for (int64_t p = 0; p < P; ++p)
        if (texts.token_offsets[texts.offsets[p + 1]] - texts.token_offsets[texts.offsets[p]] > tso::kMaxPromptTokens)
            throw py::value_error("a prompt has too many tokens: at most 2^30");
    texts.view = {tokens.data(), texts.token_offsets.data(), texts.offsets.data(), P};
    return texts;
}

void check_n(int n) {
    if (n < 1) throw py::value_error("n must be > 0");
}

Array<float> pairwise_distances(const Array<int32_t>& tokens, const Array<int64_t>& token_offsets,
                                const Array<int64_t>& offsets, int n, int num_threads) {
    check_n(n);
    const Texts texts = checked_texts(tokens, token_offsets, offsets);
    int64_t size = 0;
    for (size_t p = 1; p < texts.offsets.size(); ++p) {
        const int64_t rows = texts.offsets[p] - texts.offsets[p - 1];
        size += rows * rows;
    }
    Array<float> distances(static_cast<py::ssize_t>(size));
    float* out = distances.mutable_data();
    {
        const py::gil_scoped_release release;
        tso::pairwise_distances(texts.view, n, num_threads, out);
    }
    return distances;
}

Array<float> distinct_n(const Array<int32_t>& tokens, const Array<int64_t>& token_offsets, const Array<int64_t>& offsets, int n,
                        int num_threads) {
    check_n(n);
    const Texts texts = checked_texts(tokens, token_offsets, offsets);
    Array<float> distinct_P(static_cast<py::ssize_t>(texts.view.num_prompts));
    float* out = distinct_P.mutable_data();
    {
        const py::gil_scoped_release release;
        tso::distinct_n(texts.view, n, num_threads, out);
    }
    return distinct_P;
}

Array<float> self_bleu(const Array<int32_t>& tokens, const Array<int64_t>& token_offsets, const Array<int64_t>& offsets,
                       int max_n, int num_threads) {
    check_n(max_n);
    const Texts texts = checked_texts(tokens, token_offsets, offsets);
    Array<float> bleu_R(static_cast<py::ssize_t>(texts.token_offsets.size() - 1));
    float* out = bleu_R.mutable_data();
    {
        const py::gil_scoped_release release;
        tso::self_bleu(texts.view, max_n, num_threads, out);
    }
    return bleu_R;
}

}  // namespace

void bind_selection(py::module_& m) {
    m.def("select_pairs", &select_pairs, py::arg("consensus").noconvert(), py::arg("offsets").noconvert(), py::kw_only(),
          py::arg("strategy"), py::arg("max_pairs"), py::arg("min_margin"), py::arg("positives").noconvert(),
          py::arg("negatives").noconvert(), py::arg("text_ids").noconvert(), py::arg("forbidden").noconvert(),
          py::arg("keys").noconvert(), py::arg("baseline").noconvert(), py::arg("distances").noconvert(), py::arg("band"),
          py::arg("reuse_texts"), py::arg("seed"), py::arg("num_threads"), py::arg("isa") = "",
          "consensus [R] float32, offsets [P+1] int64, ... -> (pairs [N, 2] int64, margin [N] float32, whether no "
          "score is infinite).");
    m.def("select_decided", &select_decided, py::arg("pairs").noconvert(), py::arg("margin").noconvert(),
          py::arg("offsets").noconvert(), py::kw_only(), py::arg("strategy"), py::arg("max_pairs"),
          py::arg("text_ids").noconvert(), py::arg("keys").noconvert(), py::arg("reuse_texts"), py::arg("seed"),
          py::arg("num_threads"), "pairs [C, 2] int64, margin [C] float32, offsets [P+1] int64 -> index [N] int64.");
    const auto def = [&m](const char* name, auto function, const char* order, const char* doc) {
        m.def(name, function, py::arg("tokens").noconvert(), py::arg("token_offsets").noconvert(),
              py::arg("offsets").noconvert(), py::arg(order), py::arg("num_threads"), doc);
    };
    def("pairwise_distances", &pairwise_distances, "n", "-> [sum of n_p^2] float32.");
    def("distinct_n", &distinct_n, "n", "-> [P] float32.");
    def("self_bleu", &self_bleu, "max_n", "-> [R] float32.");
}

}  // namespace bindings
