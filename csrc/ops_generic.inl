// Body of ops_portable.cpp, ops_avx2.cpp and ops_avx512.cpp: the same loops in GCC's vector types of TSO_VECTOR_BYTES.
// Included after the target pragma, in namespace tso, in an anonymous namespace.

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(TSO_VECTOR_BYTES)));
    typedef float unaligned __attribute__((vector_size(TSO_VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t integer __attribute__((vector_size(TSO_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(TSO_VECTOR_BYTES)));
    typedef double unaligned __attribute__((vector_size(TSO_VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t integer __attribute__((vector_size(TSO_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int64_t kWidth = TSO_VECTOR_BYTES / sizeof(T);

template <typename T>
inline Vector<T> load(const T* p) {
    return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <typename T>
inline void store(T* p, Vector<T> v) {
    *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
template <typename T>
inline Vector<T> splat(T x) {
    return Vector<T>{} + x;
}

inline float as_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t as_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(Bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(F16 x) {
    const uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    // Exponent rebias by a multiplication, which also normalises subnormals; infinities and NaNs keep a full exponent.
    const uint32_t bits = as_bits(as_float(magnitude << 13) * 0x1p112f);
    return as_float(bits | (magnitude >= 0x7c00u ? 0x7f800000u : 0u) | sign);
}

template <typename T>
inline T narrow(double x);
template <>
inline double narrow<double>(double x) {
    return x;
}
template <>
inline float narrow<float>(double x) {
    return static_cast<float>(x);
}

inline void round_to(float x, float* p) { *p = x; }
inline void round_to(double x, double* p) { *p = x; }
inline void round_to(double x, float* p) { *p = static_cast<float>(x); }
inline void round_to(float x, double* p) { *p = x; }
inline void round_to(float x, Bf16* p) {
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    p->bits = static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
}
inline void round_to(float x, F16* p) {
    const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude >= 0x47800000u) {  // 65536 and more, infinity, NaN
        half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal in half: the addition of 0.5 rounds at its last bit
        half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    p->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}
inline void round_to(double x, Bf16* p) { round_to(static_cast<float>(x), p); }
inline void round_to(double x, F16* p) { round_to(static_cast<float>(x), p); }

template <typename T>
struct RemoveConst {
    typedef T type;
};
template <typename T>
struct RemoveConst<const T> {
    typedef T type;
};

template <typename T>
struct RemovePointer;
template <typename T>
struct RemovePointer<T*> {
    typedef T type;
};

// f(typed null pointer) for the C++ type of a dtype.
template <typename Function>
inline void with_type(Dtype dtype, Function f) {
    switch (dtype) {
        case Dtype::f64: return f(static_cast<const double*>(nullptr));
        case Dtype::f32: return f(static_cast<const float*>(nullptr));
        case Dtype::bf16: return f(static_cast<const Bf16*>(nullptr));
        case Dtype::f16: return f(static_cast<const F16*>(nullptr));
    }
}

// 2^x for float, error below 2 units in the last place; x is clamped so that the result is a normal number. NaN stays NaN.
inline Vector<float> exp2_vector(Vector<float> x) {
    typedef VectorOf<float>::integer Integer;
    const Vector<float> low = splat(-126.f), high = splat(126.f);
    x = x > high ? high : x;
    x = x < low ? low : x;
    const Vector<float> magic = splat(0x1.8p23f);  // adding it rounds to an integer, whose bits are then the lowest
    const Vector<float> shifted = x + magic;
    const Vector<float> r = x - (shifted - magic);
    // Cephes' exp2f: on [-0.5, 0.5] its relative error is 1.7e-7 at most.
    Vector<float> p = splat(1.5353362e-4f);
    p = p * r + 1.3398874e-3f;
    p = p * r + 9.6184373e-3f;
    p = p * r + 5.5503324e-2f;
    p = p * r + 2.4022648e-1f;
    p = p * r + 6.9314720e-1f;
    p = p * r + 1.0f;
    const Integer n = (Integer)shifted << 23;
    return x == x ? (Vector<float>)((Integer)p + n) : x;
}
inline Vector<double> exp2_vector(Vector<double> x) {
    for (int64_t i = 0; i < kWidth<double>; ++i) x[i] = __builtin_exp2(x[i] > 1000 ? 1000 : x[i]);
    return x;
}
inline Vector<float> tanh_vector(Vector<float> x) {
    const Vector<float> magnitude = x < 0.f ? -x : x;
    const Vector<float> e = exp2_vector(magnitude * -2.88539008f);
    const Vector<float> t = (1.f - e) / (1.f + e);
    return x < 0.f ? -t : t;
}
inline Vector<double> tanh_vector(Vector<double> x) {
    for (int64_t i = 0; i < kWidth<double>; ++i) x[i] = __builtin_tanh(x[i]);
    return x;
}

template <typename T, int kRows, int kVectors>
inline void micro(const T* A, int64_t row_stride, int64_t group_stride, const T* B, int64_t width, T* C, int64_t ldc,
                  int64_t num_groups, bool accumulate) {
    constexpr int64_t W = kWidth<T>;
    Vector<T> c[kRows][kVectors];
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j) c[i][j] = accumulate ? load(C + i * ldc + j * W) : splat(T(0));
    for (int64_t k = 0; k < num_groups; ++k, A += group_stride, B += width) {
        Vector<T> b[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) b[j] = load(B + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const Vector<T> a = splat(A[i * row_stride]);
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) c[i][j] += a * b[j];
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j) store(C + i * ldc + j * W, c[i][j]);
}

template <typename T, int kVectors>
void gemm_columns(const T* A, int64_t row_stride, int64_t group_stride, const T* B, int64_t width, T* C, int64_t ldc, int64_t M,
                  int64_t num_groups, bool accumulate) {
    constexpr int kRows = TSO_MICRO_ROWS;
    int64_t m = 0;
    for (; m + kRows <= M; m += kRows)
        micro<T, kRows, kVectors>(A + m * row_stride, row_stride, group_stride, B, width, C + m * ldc, ldc, num_groups,
                                  accumulate);
    for (; m + 2 <= M; m += 2)
        micro<T, 2, kVectors>(A + m * row_stride, row_stride, group_stride, B, width, C + m * ldc, ldc, num_groups, accumulate);
    if (m < M)
        micro<T, 1, kVectors>(A + m * row_stride, row_stride, group_stride, B, width, C + m * ldc, ldc, num_groups, accumulate);
}

template <typename T>
void gemm(const void* A_, int64_t row_stride, int64_t group_stride, const void* B_, int64_t width, void* C_, int64_t ldc,
          int64_t M, int64_t num_groups, bool accumulate) {
    constexpr int64_t step = TSO_MICRO_VECTORS * kWidth<T>;
    const T* A = static_cast<const T*>(A_);
    const T* B = static_cast<const T*>(B_);
    T* C = static_cast<T*>(C_);
    int64_t n = 0;
    for (; n + step <= width; n += step)
        gemm_columns<T, TSO_MICRO_VECTORS>(A, row_stride, group_stride, B + n, width, C + n, ldc, M, num_groups, accumulate);
    for (; n < width; n += kWidth<T>)
        gemm_columns<T, 1>(A, row_stride, group_stride, B + n, width, C + n, ldc, M, num_groups, accumulate);
}

template <typename T>
void convert(const void* src_, Dtype dtype, int64_t ld_src, int64_t rows, int64_t columns, void* dst_, int64_t ld_dst) {
    T* dst = static_cast<T*>(dst_);
    with_type(dtype, [=](auto* type) {
        auto* src = static_cast<decltype(type)>(src_);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) dst[r * ld_dst + c] = narrow<T>(widen(src[r * ld_src + c]));
    });
}

template <typename T>
void pack_rows(const void* src_, Dtype dtype, int64_t ld, int64_t rows, int64_t columns, const void* row_scale_,
               int64_t num_groups, int64_t width, void* dst_) {
    T* dst = static_cast<T*>(dst_);
    const T* row_scale = static_cast<const T*>(row_scale_);
    with_type(dtype, [=](auto* type) {
        auto* src = static_cast<decltype(type)>(src_);
        for (int64_t k = 0; k < num_groups; ++k) {
            T* out = dst + k * width;
            const int64_t count = k < rows ? columns : 0;
            // A row with weight 0 is 0 whatever it holds: inf * 0 must not reach the others.
            const T factor = row_scale == nullptr ? T(1) : k < rows ? row_scale[k] : T(0);
            for (int64_t c = 0; c < count; ++c) out[c] = factor == T(0) ? T(0) : factor * narrow<T>(widen(src[k * ld + c]));
            for (int64_t c = count; c < width; ++c) out[c] = T(0);
        }
    });
}

template <typename T>
void pack_columns(const void* src_, Dtype dtype, int64_t ld, int64_t rows, int64_t columns, int64_t num_groups, int64_t width,
                  void* dst_) {
    T* dst = static_cast<T*>(dst_);
    with_type(dtype, [=](auto* type) {
        auto* src = static_cast<decltype(type)>(src_);
        for (int64_t r = 0; r < width; ++r)
            for (int64_t k = 0; k < num_groups; ++k)
                dst[k * width + r] = r < rows && k < columns ? narrow<T>(widen(src[r * ld + k])) : T(0);
    });
}

// A copy with an odd number of cache lines from one row to the next: a power of two would keep to a few sets of the cache.
template <typename T>
const void* vocab_operand(const void* exps_, int64_t ld, int64_t num_vocab, int64_t tokens, int64_t, void* dst_,
                          int64_t* row_stride, int64_t* group_stride) {
    const T* exps = static_cast<const T*>(exps_);
    T* dst = static_cast<T*>(dst_);
    const int64_t line = 64 / sizeof(T), stride = ((tokens + line - 1) / line | 1) * line;
    for (int64_t v = 0; v < num_vocab; ++v) __builtin_memcpy(dst + v * stride, exps + v * ld, tokens * sizeof(T));
    *row_stride = 1;
    *group_stride = stride;
    return dst;
}

template <typename T>
inline void store_exps(T* p, Vector<T> v) {
    store(p, v);
}

// T: accumulators, E: stored exponentials.
template <typename T, typename E>
void softmax_tile(const SoftmaxTile& tile) {
    constexpr int64_t W = kWidth<T>;
    constexpr T kLog2e = T(1.44269504088896340736);
    const T* logits = static_cast<const T*>(tile.logits);
    const T* bias = static_cast<const T*>(tile.bias);
    const T* offset = static_cast<const T*>(tile.offset);
    E* exps = static_cast<E*>(tile.exps);
    T* sums = static_cast<T*>(tile.sums);
    const bool is_capped = tile.softcap != 0;
    const T to_cap = is_capped ? T(1 / tile.softcap) : T(1);
    const T to_log2 = (is_capped ? T(tile.softcap) : T(1)) * T(tile.scale) * kLog2e;
    for (int64_t t = 0; t < tile.width; t += W) {
        const Vector<T> start = load(offset + t);
        Vector<T> sum = tile.find_max ? load(sums + t) : splat(T(0));
        for (int64_t v = 0; v < tile.num_vocab; ++v) {
            Vector<T> z = load(logits + v * kPanel + t);
            if (bias != nullptr) z += bias[v];
            Vector<T> slope{};
            if (is_capped) {
                z = tanh_vector(z * to_cap);
                slope = T(1) - z * z;
            }
            if (tile.find_max) {
                z *= to_log2;
                sum = ((z > sum) | (z != z)) ? z : sum;
                continue;
            }
            const Vector<T> e = exp2_vector(z * to_log2 - start);
            sum += e;
            if (exps != nullptr) store_exps(exps + v * tile.exps_stride + t, is_capped ? e * slope : e);
        }
        store(sums + t, tile.find_max ? sum : load(sums + t) + sum);
    }
}

template <typename T>
void store_rows(const void* src_, int64_t ld_src, const void* row_scale_, int64_t rows, int64_t columns, void* dst_,
                Dtype dtype, int64_t ld_dst) {
    const T* src = static_cast<const T*>(src_);
    const T* row_scale = static_cast<const T*>(row_scale_);
    with_type(dtype, [=](auto* type) {
        typedef typename RemoveConst<typename RemovePointer<decltype(type)>::type>::type Out;
        Out* dst = static_cast<Out*>(dst_);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) round_to(row_scale[r] * src[r * ld_src + c], dst + r * ld_dst + c);
    });
}

// One row of a sum: see Ops::add.
template <typename T, typename Total>
inline void add_row(const T* src, int64_t columns, Total* total, void*, bool is_first, bool) {
    if (is_first)
        for (int64_t c = 0; c < columns; ++c) round_to(src[c], total + c);
    else
        for (int64_t c = 0; c < columns; ++c) round_to(src[c] + total[c], total + c);
}
// A float rounded to nearest even at 24 bits, in the lower 24 of the result. The bits of a NaN may be all ones, which a carry
// would make a zero.
inline uint32_t upper_24_bits(float x) {
    const uint32_t bits = as_bits(x);
    return x == x ? (bits + 0x7fu + ((bits >> 8) & 1u)) >> 8 : 0x7fc000u;
}
template <bool kIsFirst, bool kIsLast, typename T, typename Half>
inline void add_halves(const T* src, int64_t columns, Half* total, uint8_t* rest) {
    for (int64_t c = 0; c < columns; ++c) {
        float x = static_cast<float>(src[c]);
        if (!kIsFirst) x += as_float(static_cast<uint32_t>(total[c].bits) << 16 | static_cast<uint32_t>(rest[c]) << 8);
        if (kIsLast) {
            round_to(x, total + c);
        } else {
            const uint32_t bits = upper_24_bits(x);
            total[c].bits = static_cast<uint16_t>(bits >> 8);
            rest[c] = static_cast<uint8_t>(bits);
        }
    }
}
template <typename T, typename Half>
inline void add_half_row(const T* src, int64_t columns, Half* total, void* rest_, bool is_first, bool is_last) {
    uint8_t* rest = static_cast<uint8_t*>(rest_);
    if (is_first && is_last)
        add_halves<true, true>(src, columns, total, rest);
    else if (is_first)
        add_halves<true, false>(src, columns, total, rest);
    else if (is_last)
        add_halves<false, true>(src, columns, total, rest);
    else
        add_halves<false, false>(src, columns, total, rest);
}
template <typename T>
inline void add_row(const T* src, int64_t columns, Bf16* total, void* rest, bool is_first, bool is_last) {
    add_half_row(src, columns, total, rest, is_first, is_last);
}
template <typename T>
inline void add_row(const T* src, int64_t columns, F16* total, void* rest, bool is_first, bool is_last) {
    add_half_row(src, columns, total, rest, is_first, is_last);
}

template <typename T>
void add_tile(const void* src_, int64_t ld_src, int64_t rows, int64_t columns, void* total_, void* rest, Dtype dtype,
              int64_t ld, bool is_first, bool is_last) {
    const T* src = static_cast<const T*>(src_);
    with_type(dtype, [=](auto* type) {
        typedef typename RemoveConst<typename RemovePointer<decltype(type)>::type>::type Total;
        Total* total = static_cast<Total*>(total_);
        for (int64_t r = 0; r < rows; ++r)
            add_row(src + r * ld_src, columns, total + r * ld, rest == nullptr ? nullptr : static_cast<char*>(rest) + r * ld,
                    is_first, is_last);
    });
}

template <typename E>
double dot_exps(const void* exps, const void* factor_, int64_t count) {
    typedef decltype(widen(E())) T;
    const E* e = static_cast<const E*>(exps);
    const T* factor = static_cast<const T*>(factor_);
    double sum = 0;
    for (int64_t first = 0; first < count; first += 64) {  // short chains of T, then double
        T part = 0;
        const int64_t last = first + 64 < count ? first + 64 : count;
        for (int64_t i = first; i < last; ++i)
            if (factor[i] != T(0)) part += widen(e[i]) * factor[i];
        sum += part;
    }
    return sum;
}

inline double dot(const void* a_, const void* b_, Dtype dtype, int64_t count) {
    double sum = 0;
    with_type(dtype, [=, &sum](auto* type) {
        auto* a = static_cast<decltype(type)>(a_);
        auto* b = static_cast<decltype(type)>(b_);
        double parts[8] = {};
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            for (int j = 0; j < 8; ++j) parts[j] += static_cast<double>(widen(a[i + j])) * static_cast<double>(widen(b[i + j]));
        for (int j = 0; j < 8; ++j) sum += parts[j];
        for (; i < count; ++i) sum += static_cast<double>(widen(a[i])) * static_cast<double>(widen(b[i]));
    });
    return sum;
}

template <typename E>
void store_exp(void* exps, int64_t index, double value) {
    round_to(value, static_cast<E*>(exps) + index);
}

template <typename T>
constexpr Ops make_ops(const char* isa, Dtype element) {
    Ops ops{};
    ops.isa = isa;
    ops.element = element;
    ops.element_size = sizeof(T);
    ops.acc_size = sizeof(T);
    ops.group = 1;
    ops.lanes = 16;
    ops.row_align = 1;
    ops.group_align = 1;
    ops.gemm = gemm<T>;
    ops.convert = convert<T>;
    ops.pack_rows = pack_rows<T>;
    ops.pack_columns = pack_columns<T>;
    ops.vocab_operand = vocab_operand<T>;
    ops.softmax_tile = softmax_tile<T, T>;
    ops.store = store_rows<T>;
    ops.add = add_tile<T>;
    ops.dot_exps = dot_exps<T>;
    ops.dot = dot;
    ops.store_exp = store_exp<T>;
    return ops;
}

constexpr Ops kFloat = make_ops<float>(TSO_ISA, Dtype::f32);
constexpr Ops kDouble = make_ops<double>(TSO_ISA, Dtype::f64);
