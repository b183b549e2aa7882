// Body of scoring_portable.cpp, scoring_avx2.cpp and scoring_avx512.cpp: the same loops in GCC's vector types of
// TSO_VECTOR_BYTES. Included after the target pragma, in namespace tso, in an anonymous namespace.

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off,no-math-errno")
#endif

constexpr int kLanes = TSO_VECTOR_BYTES / 8;  // of doubles
constexpr int kParts = 8 / kLanes;            // vectors that make 8 lanes
constexpr int kWideLanes = TSO_VECTOR_BYTES / 4;

typedef double Doubles __attribute__((vector_size(kLanes * 8)));
typedef int64_t Longs __attribute__((vector_size(kLanes * 8)));
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef float WideFloats __attribute__((vector_size(kWideLanes * 4)));
typedef int32_t WideInts __attribute__((vector_size(kWideLanes * 4)));

template <typename Vector, typename T>
inline Vector load(const T* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <typename Vector, typename T>
inline void store(T* p, Vector v) {
    __builtin_memcpy(p, &v, sizeof v);
}
// GCC 12 converts halves, and takes square roots one by one.
#if TSO_VECTOR_BYTES == 64
inline Doubles widen(Floats v) { return (Doubles)_mm512_cvtps_pd((__m256)v); }
inline Doubles root(Doubles v) { return (Doubles)_mm512_sqrt_pd((__m512d)v); }
#elif TSO_VECTOR_BYTES == 32
inline Doubles widen(Floats v) { return (Doubles)_mm256_cvtps_pd((__m128)v); }
inline Doubles root(Doubles v) { return (Doubles)_mm256_sqrt_pd((__m256d)v); }
#else
inline Doubles widen(Floats v) { return __builtin_convertvector(v, Doubles); }
inline Doubles root(Doubles v) {
    for (int lane = 0; lane < kLanes; ++lane) v[lane] = __builtin_sqrt(v[lane]);
    return v;
}
#endif

// Lanes without a scorer become 0 in a complete prompt and NaN in another; so do there the lanes of weight 0.
template <bool kComplete, bool kFull = false>
inline Floats load_scores(const Scorers& scorers, const float* row, int64_t column) {
    if (kComplete && kFull) return load<Floats>(row + column);
    const Ints bits = load<Ints>(row + column);
    if (kComplete) return (Floats)(bits & ~load<Ints>(scorers.beyond + column));
    return (Floats)(bits | load<Ints>(scorers.absent + column));
}
template <bool kComplete>
inline WideFloats load_wide(const Scorers& scorers, const float* row, int64_t column) {
    const WideInts bits = load<WideInts>(row + column);
    if (kComplete) return (WideFloats)(bits & ~load<WideInts>(scorers.beyond + column));
    return (WideFloats)(bits | load<WideInts>(scorers.absent + column));
}

// Calls use(bits without sign, of kWideLanes scores); some scores may be seen twice.
template <typename Use>
inline void for_all_magnitudes(const float* scores, int64_t count, const Use& use) {
    if (count >= kWideLanes) {
        for (int64_t i = 0; i < count - kWideLanes; i += kWideLanes) use(load<WideInts>(scores + i) & 0x7fffffff);
        use(load<WideInts>(scores + count - kWideLanes) & 0x7fffffff);
    } else {
        WideInts bits = {};
        __builtin_memcpy(&bits, scores, count * 4);
        use(bits & 0x7fffffff);
    }
}

inline bool any(WideInts mask) {
    int64_t parts[sizeof mask / 8], all = 0;
    __builtin_memcpy(parts, &mask, sizeof mask);
    for (int64_t part : parts) all |= part;
    return all != 0;
}

Found classify(const float* scores, int64_t count) {
    constexpr int32_t kInfinity = 0x7f800000;
    WideInts not_finite = {}, infinite = {};
    for_all_magnitudes(scores, count, [&](WideInts bits) {
        not_finite |= bits >= kInfinity;
        infinite |= bits == kInfinity;
    });
    return any(infinite) ? Found::infinite : any(not_finite) ? Found::missing : Found::complete;
}

template <bool kComplete, bool kFull>
inline void affine_z(const Scorers& scorers, const Rows& rows, int64_t column, Doubles weight, const Affine& out) {
    // Sums of differences from a score of the column, for which the textbook formula is safe: mean^2 <= (n - 1) variance.
    Floats origin_ = load_scores<kComplete, kFull>(scorers, rows.scores, column);
    if (!kComplete) {
        for (int64_t r = 1; r < rows.n; ++r) {
            const Floats other = load_scores<kComplete, kFull>(scorers, rows.scores + r * rows.stride, column);
            origin_ = origin_ == origin_ ? origin_ : other;
        }
    }
    const Doubles origin = widen(origin_);
    Doubles sum = {}, squares = {}, count = {};
    for (int64_t r = 0; r < rows.n; ++r) {
        Doubles difference = widen(load_scores<kComplete, kFull>(scorers, rows.scores + r * rows.stride, column)) - origin;
        if (!kComplete) {
            const Longs present = difference == difference;
            difference = present ? difference : Doubles{};
            count += present ? Doubles{} + 1.0 : Doubles{};
        }
        sum += difference;
        squares += difference * difference;
    }
    const Doubles share = kComplete ? Doubles{} + 1.0 / static_cast<double>(rows.n) : 1.0 / count;
    const Doubles mean = sum * share;
    const Doubles variance = squares * share - mean * mean;
    // No difference but 0: all are equal.
    const Doubles scale = squares > Doubles{} ? weight / root(variance) : Doubles{};
    store(out.shift + column, origin + mean);
    store(out.scale + column, scale);
    store(out.constant + column, Doubles{});
}

template <bool kComplete>
inline void affine_minmax(const Scorers& scorers, const Rows& rows, int64_t column, Doubles weight, const Affine& out) {
    const Floats infinity = Floats{} + __builtin_inff();
    Floats low = infinity, high = -infinity;
    for (int64_t r = 0; r < rows.n; ++r) {
        const Floats v = load_scores<kComplete>(scorers, rows.scores + r * rows.stride, column);
        low = v < low ? v : low;
        high = v > high ? v : high;
    }
    const Doubles range = widen(high) - widen(low);
    store(out.shift + column, widen(low));
    store(out.scale + column, range > Doubles{} ? weight / range : Doubles{});
    store(out.constant + column, range > Doubles{} ? Doubles{} : 0.5 * weight);
}

template <bool kComplete>
inline void affine_rank(const Scorers& scorers, const Rows& rows, int64_t column, Doubles weight, const Affine& out) {
    Doubles others = Doubles{} + static_cast<double>(rows.n - 1);
    if (!kComplete) {
        others = Doubles{} - 1.0;
        for (int64_t r = 0; r < rows.n; ++r) {
            const Doubles v = widen(load_scores<kComplete>(scorers, rows.scores + r * rows.stride, column));
            others += v == v ? Doubles{} + 1.0 : Doubles{};
        }
    }
    store(out.shift + column, Doubles{});
    store(out.scale + column, others > Doubles{} ? weight / others : Doubles{});
    store(out.constant + column, others > Doubles{} ? Doubles{} : 0.5 * weight);
}

template <bool kComplete>
inline void affine_of(const Scorers& scorers, const Rows& rows, Normalize normalize, const Affine& out) {
    for (int64_t column = 0; column < scorers.count; column += kLanes) {
        const Doubles weight = load<Doubles>(scorers.weights + column);
        if (normalize == Normalize::z) {
            if (column + kLanes <= scorers.count)
                affine_z<kComplete, true>(scorers, rows, column, weight, out);
            else
                affine_z<kComplete, false>(scorers, rows, column, weight, out);
        } else if (normalize == Normalize::minmax) {
            affine_minmax<kComplete>(scorers, rows, column, weight, out);
        } else if (normalize == Normalize::rank) {
            affine_rank<kComplete>(scorers, rows, column, weight, out);
        } else {
            store(out.shift + column, Doubles{});
            store(out.scale + column, weight);
            store(out.constant + column, Doubles{});
        }
    }
}

void affine(const Scorers& scorers, const Rows& rows, Normalize normalize, const Affine& out) {
    if (rows.is_complete)
        affine_of<true>(scorers, rows, normalize, out);
    else
        affine_of<false>(scorers, rows, normalize, out);
}

template <bool kComplete>
inline void rank_table_of(const Scorers& scorers, const Rows& rows, float* table) {
    for (int64_t column = 0; column < scorers.count; column += kWideLanes) {
        for (int64_t r = 0; r < rows.n; ++r) {
            const WideFloats v = load_wide<kComplete>(scorers, rows.scores + r * rows.stride, column);
            WideInts above = {}, below_or_tied = {};  // as minus counts
            for (int64_t other = 0; other < rows.n; ++other) {
                const WideFloats u = load_wide<kComplete>(scorers, rows.scores + other * rows.stride, column);
                above += u < v;
                below_or_tied += u <= v;
            }
            // The tie with itself is not counted.
            const WideFloats rank = -0.5f * (1.0f + __builtin_convertvector(above + below_or_tied, WideFloats));
            store(table + r * scorers.padded + column, v == v ? rank : v);
        }
    }
}

void rank_table(const Scorers& scorers, const Rows& rows, float* table) {
    if (rows.is_complete)
        rank_table_of<true>(scorers, rows, table);
    else
        rank_table_of<false>(scorers, rows, table);
}

struct Lanes8 {
    Doubles part[kParts];
};

inline double sum(const Lanes8& lanes) {
    typedef double Two __attribute__((vector_size(16)));
    Two v[4];
    __builtin_memcpy(v, &lanes, sizeof v);
    const Two both = (v[0] + v[2]) + (v[1] + v[3]);
    return both[0] + both[1];
}

template <bool kComplete, bool kUniform>
inline void mean_of(const Scorers& scorers, const Rows& rows, const Affine& affine, double* sums, float* mean_n,
                    int32_t* num_scores_n) {
    const int64_t n = rows.n, padded_n = (n + 7) / 8 * 8;
    double *weights = sums + padded_n, *counts = sums + 2 * padded_n;
    double constant = 0.0;
    if (kComplete) {
        Lanes8 constants = {};
        for (int64_t column = 0; column < scorers.count; column += kLanes)
            constants.part[column / kLanes % kParts] += load<Doubles>(affine.constant + column);
        constant = sum(constants);
    }
    for (int64_t r = 0; r < n; ++r) {
        const float* row = rows.scores + r * rows.stride;
        Lanes8 total = {}, weight = {}, count = {};
        const auto take = [&](int64_t column, int part, Floats score_) {
            const Doubles score = widen(score_);
            const Doubles value = (score - load<Doubles>(affine.shift + column)) * load<Doubles>(affine.scale + column);
            if (kComplete) {
                total.part[part] += value;
            } else {
                const Longs present = score == score;
                total.part[part] += present ? value + load<Doubles>(affine.constant + column) : Doubles{};
                count.part[part] += present ? Doubles{} + 1.0 : Doubles{};
                if (!kUniform) weight.part[part] += present ? load<Doubles>(scorers.weights + column) : Doubles{};
            }
        };
        int64_t first = 0;
        for (; first + 8 <= scorers.count; first += 8) {
            for (int part = 0; part < kParts; ++part) {
                const int64_t column = first + part * kLanes;
                take(column, part, load_scores<kComplete, true>(scorers, row, column));
            }
        }
        for (int part = 0; part < kParts; ++part) {
            const int64_t column = first + part * kLanes;
            if (column >= scorers.count) break;
            take(column, part, load_scores<kComplete>(scorers, row, column));
        }
        sums[r] = sum(total) + constant;
        if (!kComplete) counts[r] = sum(count);
        if (!kComplete && !kUniform) weights[r] = sum(weight);
    }
    const Doubles nan = Doubles{} + __builtin_nan("");
    for (int64_t r = 0; r < n; r += kLanes) {
        Doubles weight = Doubles{} + scorers.total_weight;
        Ints count = Ints{} + scorers.num_weighted;
        if (!kComplete) {
            weight = load<Doubles>((kUniform ? counts : weights) + r);
            count = __builtin_convertvector(load<Doubles>(counts + r), Ints);
        }
        const Doubles quotient = load<Doubles>(sums + r) / weight;
        const Floats mean = __builtin_convertvector(kComplete ? quotient : (weight > Doubles{} ? quotient : nan), Floats);
        const int64_t size = 4 * (n - r < kLanes ? n - r : kLanes);
        if (size == sizeof mean) {
            store(mean_n + r, mean);
            store(num_scores_n + r, count);
        } else {
            __builtin_memcpy(mean_n + r, &mean, size);
            __builtin_memcpy(num_scores_n + r, &count, size);
        }
    }
}

void mean(const Scorers& scorers, const Rows& rows, const Affine& affine, double* sums, float* mean_n, int32_t* num_scores_n) {
    if (rows.is_complete)
        mean_of<true, true>(scorers, rows, affine, sums, mean_n, num_scores_n);
    else if (scorers.is_uniform)
        mean_of<false, true>(scorers, rows, affine, sums, mean_n, num_scores_n);
    else
        mean_of<false, false>(scorers, rows, affine, sums, mean_n, num_scores_n);
}

// kLanes rows of kLanes floats, in the shuffles that the instruction sets have.
inline void transpose(Floats (&rows)[kLanes]) {
#if TSO_VECTOR_BYTES == 64
    Floats a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        a[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int half = 0; half < 2; ++half) {
            b[i + 2 * half] = __builtin_shufflevector(a[i + half], a[i + 2 + half], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + 2 * half + 1] = __builtin_shufflevector(a[i + half], a[i + 2 + half], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        rows[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#elif TSO_VECTOR_BYTES == 32
    Floats a[4];
    for (int i = 0; i < 4; i += 2) {
        a[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 4, 1, 5);
        a[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 6, 3, 7);
    }
    for (int half = 0; half < 2; ++half) {
        rows[2 * half] = __builtin_shufflevector(a[half], a[half + 2], 0, 1, 4, 5);
        rows[2 * half + 1] = __builtin_shufflevector(a[half], a[half + 2], 2, 3, 6, 7);
    }
#else
    const Floats first = {rows[0][0], rows[1][0]}, second = {rows[0][1], rows[1][1]};
    rows[0] = first;
    rows[1] = second;
#endif
}

inline Doubles masked(Doubles v, Longs mask) { return (Doubles)((Longs)v & mask); }

// Of a whole number in [0, 2^52).
inline Doubles to_double(Longs v) {
    constexpr double k2To52 = 4503599627370496.0;
    return (Doubles)(v | (Longs)(Doubles{} + k2To52)) - k2To52;
}

// Where the lanes of a batch keep what they compute; a table is [most_rows, num_weighted].
struct BatchScratch {
    Doubles* differences;  // from the scorer's first score
    Doubles *scale, *constant, *weight;
    Floats *scores, *mean;
    Ints* num_scores;
};

// Score times weight becomes scale * difference - constant, for kColumns scorers from `first` on: their sums do not wait for
// each other.
template <bool kComplete, Normalize kNormalize, int kColumns>
inline void differences_of(const Scorers& scorers, int64_t n, int64_t first, const BatchScratch& s) {
    const int64_t M = scorers.count, width = scorers.num_weighted;
    const Floats* scores[kColumns];
    Doubles origin[kColumns], sum[kColumns] = {}, squares[kColumns] = {}, low[kColumns] = {}, high[kColumns] = {};
    Longs count[kColumns] = {};
    Floats start[kColumns];
    for (int c = 0; c < kColumns; ++c) {
        scores[c] = s.scores + scorers.weighted[first + c];
        start[c] = scores[c][0];
    }
    if (!kComplete) {
        for (int64_t r = n - 1; r >= 0; --r)
            for (int c = 0; c < kColumns; ++c) start[c] = scores[c][r * M] == scores[c][r * M] ? scores[c][r * M] : start[c];
    }
    for (int c = 0; c < kColumns; ++c) origin[c] = widen(start[c]);
    for (int64_t r = 0; r < n; ++r) {
        for (int c = 0; c < kColumns; ++c) {
            Doubles difference = widen(scores[c][r * M]) - origin[c];
            s.differences[r * width + first + c] = difference;
            if (!kComplete) {
                const Longs present = difference == difference;
                difference = masked(difference, present);
                count[c] -= present;
            }
            if (kNormalize == Normalize::z) {
                sum[c] += difference;
                squares[c] += difference * difference;
            }
            if (kNormalize == Normalize::minmax) {  // the difference 0 is always among them
                low[c] = difference < low[c] ? difference : low[c];
                high[c] = difference > high[c] ? difference : high[c];
            }
        }
    }
    for (int c = 0; c < kColumns; ++c) {
        const int64_t i = first + c;
        const Doubles weight = Doubles{} + scorers.weights[scorers.weighted[i]];
        s.weight[i] = weight;
        if (kNormalize == Normalize::z) {
            // With a difference of 0 among them, sum^2 <= (n - 1) squares: the textbook formula is safe, and positive unless
            // all are equal.
            const Doubles num = kComplete ? Doubles{} + static_cast<double>(n) : to_double(count[c]);
            const Doubles unit = masked(weight / root(num * squares[c] - sum[c] * sum[c]), squares[c] > Doubles{});
            s.scale[i] = unit * num;
            s.constant[i] = unit * sum[c];
        } else if (kNormalize == Normalize::minmax) {
            const Doubles range = high[c] - low[c], unit = weight / range;
            s.scale[i] = masked(unit, range > Doubles{});
            s.constant[i] = range > Doubles{} ? unit * low[c] : -0.5 * weight;
        } else {
            s.scale[i] = weight;
            s.constant[i] = -weight * origin[c];
        }
    }
}

template <bool kComplete, Normalize kNormalize>
inline void differences_of(const Scorers& scorers, int64_t n, const BatchScratch& s) {
    constexpr int kColumns = kComplete ? 1 : 4;
    int64_t i = 0;
    for (; i + kColumns <= scorers.num_weighted; i += kColumns)
        differences_of<kComplete, kNormalize, kColumns>(scorers, n, i, s);
    for (; i < scorers.num_weighted; ++i) differences_of<kComplete, kNormalize, 1>(scorers, n, i, s);
}

template <bool kComplete, bool kUniform>
inline void means_of(const Scorers& scorers, int64_t n, const BatchScratch& s) {
    const int64_t width = scorers.num_weighted;
    const Doubles share = Doubles{} + 1.0 / scorers.total_weight;
    Doubles constant = {};
    for (int64_t i = 0; i < width; ++i) constant += s.constant[i];
    for (int64_t r = 0; r < n; ++r) {
        const Doubles* differences = s.differences + r * width;
        Doubles sum = {};
        if (kComplete) {
            for (int64_t i = 0; i < width; ++i) sum += differences[i] * s.scale[i];
            s.mean[r] = __builtin_convertvector((sum - constant) * share, Floats);
            continue;
        }
        Doubles taken = {}, weight = {};
        Longs count = {};
        for (int64_t i = 0; i < width; ++i) {
            const Longs present = differences[i] == differences[i];
            sum += masked(differences[i] * s.scale[i], present);
            taken += masked(s.constant[i], present);
            count -= present;
            if (!kUniform) weight += masked(s.weight[i], present);
        }
        if (kUniform) weight = to_double(count);
        const Doubles mean = (sum - taken) * (1.0 / weight);  // 0 * inf where all are missing
        s.mean[r] = __builtin_convertvector(mean, Floats);
        s.num_scores[r] = __builtin_convertvector(count, Ints);
    }
}

template <typename T, typename Vector>
inline void write_rows(const Vector* rows, int first_lane, const int64_t* n, int64_t most_rows, T* const* out) {
    for (int64_t r = 0; r < most_rows; r += kLanes) {
        Floats block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = (Floats)rows[r + i];
        transpose(block);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t left = n[first_lane + lane] - r;
            if (left >= kLanes)
                store(out[first_lane + lane] + r, block[lane]);
            else if (left > 0)
                __builtin_memcpy(out[first_lane + lane] + r, &block[lane], left * sizeof(T));
        }
    }
}

template <bool kComplete>
inline void mean_of_lanes(const Scorers& scorers, const Batch& batch, int first_lane, Normalize normalize, double* scratch) {
    const int64_t n = batch.most_rows, M = scorers.count, width = scorers.num_weighted, size = (n + kLanes) * M;
    BatchScratch s;
    s.differences = (Doubles*)scratch;
    s.scale = s.differences + size;
    s.constant = s.scale + width;
    s.weight = s.constant + width;
    s.scores = (Floats*)(s.weight + width);
    s.mean = s.scores + 2 * ((size + 1) / 2);
    s.num_scores = (Ints*)(s.mean + n + kLanes);
    for (int64_t i = 0; i < n * M; i += kLanes) {
        Floats block[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) block[lane] = load<Floats>(batch.scores[first_lane + lane] + i);
        transpose(block);
        for (int lane = 0; lane < kLanes; ++lane) s.scores[i + lane] = block[lane];
    }
    if (normalize == Normalize::z)
        differences_of<kComplete, Normalize::z>(scorers, n, s);
    else if (normalize == Normalize::minmax)
        differences_of<kComplete, Normalize::minmax>(scorers, n, s);
    else
        differences_of<kComplete, Normalize::none>(scorers, n, s);
    if (scorers.is_uniform)
        means_of<kComplete, true>(scorers, n, s);
    else
        means_of<kComplete, false>(scorers, n, s);
    write_rows(s.mean, first_lane, batch.n, n, batch.mean);
    if (!kComplete) write_rows(s.num_scores, first_lane, batch.n, n, batch.num_scores);
    if (kComplete) {
        for (int lane = first_lane; lane < first_lane + kLanes; ++lane)
            for (int64_t r = 0; r < batch.n[lane]; ++r) batch.num_scores[lane][r] = scorers.num_weighted;
    }
}

void mean_of_batch(const Scorers& scorers, const Batch& batch, Normalize normalize, double* scratch) {
    for (int lane = 0; lane < kMaxBatch; lane += kLanes) {
        if (batch.is_complete)
            mean_of_lanes<true>(scorers, batch, lane, normalize, scratch);
        else
            mean_of_lanes<false>(scorers, batch, lane, normalize, scratch);
    }
}

void values(const Scorers& scorers, const Rows& rows, const Affine& affine, int64_t row, double* values_M) {
    for (int64_t column = 0; column < scorers.count; column += kLanes) {
        const Doubles score = widen(load_scores<false>(scorers, rows.scores + row * rows.stride, column));
        store(values_M + column, (score - load<Doubles>(affine.shift + column)) * load<Doubles>(affine.scale + column) +
                                     load<Doubles>(affine.constant + column));
    }
}

void compare(const Scorers& scorers, const Rows& rows, int64_t row, double* wins, double* games) {
    const float* a = rows.scores + row * rows.stride;
    for (int64_t other = row + 1; other < rows.n; ++other) {
        const float* b = rows.scores + other * rows.stride;
        Lanes8 won = {}, played = {};
        for (int64_t first = 0; first < scorers.count; first += 8) {
            for (int part = 0; part < kParts; ++part) {
                const int64_t column = first + part * kLanes;
                if (column >= scorers.count) break;
                const Doubles u = widen(load_scores<false>(scorers, a, column));
                const Doubles v = widen(load_scores<false>(scorers, b, column));
                const Doubles weight = load<Doubles>(scorers.weights + column), half = 0.5 * weight;
                const Longs both = (u == u) & (v == v);
                won.part[part] += (u > v ? half : Doubles{}) + (u >= v ? half : Doubles{});
                played.part[part] += both ? weight : Doubles{};
            }
        }
        wins[other - row - 1] = sum(won);
        games[other - row - 1] = sum(played);
    }
}

void sort_columns(double* values, int64_t num_values) {
    // Odd-even transposition: as many rounds as values.
    for (int64_t round = 0; round < num_values; ++round) {
        for (int64_t i = round & 1; i + 1 < num_values; i += 2) {
            for (int part = 0; part < kParts; ++part) {
                double *a = values + i * 8 + part * kLanes, *b = a + 8;
                const Doubles u = load<Doubles>(a), v = load<Doubles>(b);
                store(a, u < v ? u : v);
                store(b, u < v ? v : u);
            }
        }
    }
}

void best_and_worst(const float* scores, int64_t n, int32_t* best, int32_t* worst, float* margin) {
    for (int lane = 0; lane < kMaxBatch; lane += kLanes, scores += kLanes * n) {
        const Floats infinity = Floats{} + __builtin_inff();
        Floats high = -infinity, low = infinity;
        Ints highest = {}, lowest = {};
        for (int64_t r = 0; r < n; r += kLanes) {
            Floats block[kLanes];
            for (int i = 0; i < kLanes; ++i) block[i] = load<Floats>(scores + i * n + r);
            transpose(block);
            const int left = static_cast<int>(n - r < kLanes ? n - r : kLanes);
            for (int i = 0; i < left; ++i) {
                const Ints row = Ints{} + static_cast<int32_t>(r + i), is_higher = block[i] > high, is_lower = block[i] < low;
                high = is_higher ? block[i] : high;
                highest = is_higher ? row : highest;
                low = is_lower ? block[i] : low;
                lowest = is_lower ? row : lowest;
            }
        }
        store(best + lane, highest);
        store(worst + lane, lowest);
        store(margin + lane, high - low);
    }
}

constexpr ScoringOps kOps = {
    TSO_ISA, classify, affine, rank_table, mean, mean_of_batch, values, compare, sort_columns, best_and_worst,
};
