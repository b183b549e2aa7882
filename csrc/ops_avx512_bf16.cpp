// bf16 operands and stored exponentials: AVX512-BF16 dot products, and AMX tiles on top of the same packing.
#include "ops.h"

#ifdef TSO_X86
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")

#define TSO_ISA "avx512_bf16"
#define TSO_VECTOR_BYTES 64
#define TSO_MICRO_ROWS 6
#define TSO_MICRO_VECTORS 4

namespace tso {
namespace {
#include "ops_generic.inl"

inline __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline void store_exps(Bf16* p, Vector<float> v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v)); }

// Words of two bf16: the even one is the low half.
inline __m512i words(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}
inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }
inline __m256i load_bf16(const Bf16* p, int64_t count) {
    return count >= 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(first(count), p);
}

template <int kRows, int kVectors>
inline void micro_bf16(const uint32_t* A, int64_t row_stride, int64_t group_stride, const uint32_t* B, int64_t width, float* C,
                       int64_t ldc, int64_t num_groups, bool accumulate) {
    __m512 c[kRows][kVectors];
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j) c[i][j] = accumulate ? _mm512_loadu_ps(C + i * ldc + 16 * j) : _mm512_setzero_ps();
    for (int64_t k = 0; k < num_groups; ++k, A += group_stride, B += width) {
        __m512bh b[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) b[j] = (__m512bh)_mm512_loadu_si512(B + 16 * j);
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(A[i * row_stride]));
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) c[i][j] = _mm512_dpbf16_ps(c[i][j], a, b[j]);
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(C + i * ldc + 16 * j, c[i][j]);
}

template <int kVectors>
void gemm_columns_bf16(const uint32_t* A, int64_t row_stride, int64_t group_stride, const uint32_t* B, int64_t width, float* C,
                       int64_t ldc, int64_t M, int64_t num_groups, bool accumulate) {
    // 24 accumulators, 4 of B and 1 of A fill the 32 registers and hide the latency of 6 cycles.
    int64_t m = 0;
    for (; m + 6 <= M; m += 6)
        micro_bf16<6, kVectors>(A + m * row_stride, row_stride, group_stride, B, width, C + m * ldc, ldc, num_groups,
                                accumulate);
    for (; m + 2 <= M; m += 2)
        micro_bf16<2, kVectors>(A + m * row_stride, row_stride, group_stride, B, width, C + m * ldc, ldc, num_groups,
                                accumulate);
    if (m < M)
        micro_bf16<1, kVectors>(A + m * row_stride, row_stride, group_stride, B, width, C + m * ldc, ldc, num_groups,
                                accumulate);
}

void gemm_bf16(const void* A_, int64_t row_stride, int64_t group_stride, const void* B_, int64_t width, void* C_, int64_t ldc,
               int64_t M, int64_t num_groups, bool accumulate) {
    const uint32_t* A = static_cast<const uint32_t*>(A_);
    const uint32_t* B = static_cast<const uint32_t*>(B_);
    float* C = static_cast<float*>(C_);
    switch (width / 16) {
        case 1: return gemm_columns_bf16<1>(A, row_stride, group_stride, B, width, C, ldc, M, num_groups, accumulate);
        case 2: return gemm_columns_bf16<2>(A, row_stride, group_stride, B, width, C, ldc, M, num_groups, accumulate);
        case 3: return gemm_columns_bf16<3>(A, row_stride, group_stride, B, width, C, ldc, M, num_groups, accumulate);
        case 4: return gemm_columns_bf16<4>(A, row_stride, group_stride, B, width, C, ldc, M, num_groups, accumulate);
    }
}

void convert_bf16(const void* src_, Dtype, int64_t ld_src, int64_t rows, int64_t columns, void* dst_, int64_t ld_dst) {
    const Bf16* src = static_cast<const Bf16*>(src_);
    Bf16* dst = static_cast<Bf16*>(dst_);
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(dst + r * ld_dst, src + r * ld_src, 2 * columns);
}

struct alignas(64) Interleave {
    uint16_t index[32];
};
constexpr Interleave interleave(int first) {
    Interleave out{};
    for (int i = 0; i < 16; ++i) out.index[2 * i] = first + i, out.index[2 * i + 1] = 32 + first + i;
    return out;
}
constexpr Interleave kInterleaveLow = interleave(0), kInterleaveHigh = interleave(16);

void pack_rows_bf16(const void* src_, Dtype, int64_t ld, int64_t rows, int64_t columns, const void* row_scale_,
                    int64_t num_groups, int64_t width, void* dst_) {
    const Bf16* src = static_cast<const Bf16*>(src_);
    const float* row_scale = static_cast<const float*>(row_scale_);
    uint32_t* dst = static_cast<uint32_t*>(dst_);
    const auto row = [=](int64_t k, int64_t c) -> __m256i {
        if (k >= rows || (row_scale != nullptr && row_scale[k] == 0)) return _mm256_setzero_si256();
        const __m256i x = load_bf16(src + k * ld + c, columns - c);
        if (row_scale == nullptr) return x;
        const __m512 wide = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
        return to_bf16(_mm512_mul_ps(wide, _mm512_set1_ps(row_scale[k])));
    };
    const int64_t plain = row_scale == nullptr && columns >= kPanel ? rows / 2 : 0;
    const __m512i low = _mm512_load_si512(kInterleaveLow.index), high = _mm512_load_si512(kInterleaveHigh.index);
    for (int64_t g = 0; g < plain; ++g) {
        const Bf16* even = src + 2 * g * ld;
        uint32_t* out = dst + g * kPanel;
#pragma GCC unroll 2
        for (int64_t c = 0; c < kPanel; c += 32) {
            const __m512i x = _mm512_loadu_si512(even + c), y = _mm512_loadu_si512(even + ld + c);
            _mm512_storeu_si512(out + c, _mm512_permutex2var_epi16(x, low, y));
            _mm512_storeu_si512(out + c + 16, _mm512_permutex2var_epi16(x, high, y));
        }
    }
    for (int64_t g = plain; g < num_groups; ++g)
        for (int64_t c = 0; c < width; c += 16)
            _mm512_storeu_si512(dst + g * width + c, words(row(2 * g, c), row(2 * g + 1, c)));
}

// Transposes 16 x 16 words: out[j][i] = in[i][j].
inline void transpose_words(__m512i* x) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
        x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
        y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
        y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
        x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
    }
}

void pack_columns_bf16(const void* src_, Dtype, int64_t ld, int64_t rows, int64_t columns, int64_t num_groups, int64_t width,
                       void* dst_) {
    const Bf16* src = static_cast<const Bf16*>(src_);
    uint32_t* dst = static_cast<uint32_t*>(dst_);
    for (int64_t r = 0; r < width; r += 16)
        for (int64_t g = 0; g < num_groups; g += 16) {
            __m512i x[16];
            const int64_t left = columns - 2 * g;
            const __mmask32 mask = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1;
            for (int i = 0; i < 16; ++i)
                x[i] = r + i < rows ? _mm512_maskz_loadu_epi16(mask, src + (r + i) * ld + 2 * g) : _mm512_setzero_si512();
            transpose_words(x);
            for (int j = 0; j < 16 && g + j < num_groups; ++j) _mm512_storeu_si512(dst + (g + j) * width + r, x[j]);
        }
}

// dst[g][token]: broadcasts take any address. An odd number of cache lines from group to group spreads them over its sets.
const void* vocab_operand_bf16(const void* exps_, int64_t ld, int64_t num_vocab, int64_t tokens, int64_t num_groups, void* dst_,
                               int64_t* row_stride, int64_t* group_stride) {
    const Bf16* exps = static_cast<const Bf16*>(exps_);
    uint32_t* dst = static_cast<uint32_t*>(dst_);
    const __m256i zero = _mm256_setzero_si256();
    const int64_t stride = (tokens / 16 | 1) * 16;
    for (int64_t g = 0; g < num_groups; ++g)
        for (int64_t t = 0; t < tokens; t += 16) {
            const __m256i even = 2 * g < num_vocab ? load_bf16(exps + 2 * g * ld + t, 16) : zero;
            const __m256i odd = 2 * g + 1 < num_vocab ? load_bf16(exps + (2 * g + 1) * ld + t, 16) : zero;
            _mm512_storeu_si512(dst + g * stride + t, words(even, odd));
        }
    *row_stride = 1;
    *group_stride = stride;
    return dst;
}

// Masked stores take many cycles on some machines.
inline void store_words(uint16_t* p, __m256i x, int64_t count) {
    if (count >= 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
    else
        _mm256_mask_storeu_epi16(p, first(count), x);
}

inline __m128i load_bytes(const uint8_t* p, int64_t count) {
    return count >= 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)) : _mm_maskz_loadu_epi8(first(count), p);
}
inline void store_bytes(uint8_t* p, __m128i x, int64_t count) {
    if (count >= 16)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
    else
        _mm_mask_storeu_epi8(p, first(count), x);
}
// upper_24_bits of 16 floats.
inline __m512i upper_24_bits(__m512 x) {
    const __m512i bits = (__m512i)x, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 8), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7f)), odd), 8);
    const __mmask16 is_number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    return _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fc000), is_number, rounded);
}

// kPanel or fewer columns of a sum of 24 bits: see Ops::add.
void add_tile_bf16(const void* src_, int64_t ld_src, int64_t rows, int64_t columns, void* total_, void* rest_, Dtype,
                   int64_t ld, bool is_first, bool is_last) {
    const float* src = static_cast<const float*>(src_);
    Bf16* total = static_cast<Bf16*>(total_);
    uint8_t* rest = static_cast<uint8_t*>(rest_);
    for (int64_t r = 0; r < rows; ++r, src += ld_src, total += ld)
        for (int64_t c = 0; c < columns; c += 16) {
            const int64_t left = columns - c;
            uint8_t* low = rest == nullptr ? nullptr : rest + r * ld + c;
            __m512 x = _mm512_maskz_loadu_ps(first(left), src + c);
            if (!is_first) {
                const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bf16(total + c, left)), 16);
                const __m512i lower = _mm512_slli_epi32(_mm512_cvtepu8_epi32(load_bytes(low, left)), 8);
                x = _mm512_add_ps(x, (__m512)_mm512_or_si512(upper, lower));
            }
            if (is_last) {
                store_words(&total[c].bits, to_bf16(x), left);
            } else {
                const __m512i bits = upper_24_bits(x);
                store_words(&total[c].bits, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 8)), left);
                store_bytes(low, _mm512_cvtepi32_epi8(bits), left);
            }
        }
}

// ------------------------------------------------------------------------------------------------------------------ AMX

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t colsb[16] = {};
    uint8_t rows[16] = {};
};

// The tile registers, and the same in software: so that what is built on them is tested on machines without them.
// Assembly, as the intrinsics are macros that take literals only, and that of ldtilecfg tells GCC before 14 of 8 bytes of the
// 64 that it reads.
struct HardwareTiles {
    void configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
    void release() { _tile_release(); }
    template <int kTile>
    void zero() {
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
    }
    template <int kTile>
    void load(const void* p, int64_t stride) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
    }
    template <int kTile>
    void store(void* p, int64_t stride) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
    }
    template <int kC, int kA, int kB>
    void multiply() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
    }
};

struct SoftwareTiles {
    TileConfig config;
    alignas(64) uint8_t data[8][16][64];

    void configure(const TileConfig& given) { config = given; }
    void release() {}
    template <int kTile>
    void zero() {
        __builtin_memset(data[kTile], 0, sizeof data[kTile]);
    }
    template <int kTile>
    void load(const void* p, int64_t stride) {
        zero<kTile>();
        for (int r = 0; r < config.rows[kTile]; ++r)
            __builtin_memcpy(data[kTile][r], static_cast<const char*>(p) + r * stride, config.colsb[kTile]);
    }
    template <int kTile>
    void store(void* p, int64_t stride) {
        for (int r = 0; r < config.rows[kTile]; ++r)
            __builtin_memcpy(static_cast<char*>(p) + r * stride, data[kTile][r], config.colsb[kTile]);
    }
    // The steps are those that Intel's manual gives for TDPBF16PS (volume 2, "Operation"): the products of even and of odd
    // elements go to sums of their own, from 0 on, and the sum of these two to C. VDPBF16PS has one sum, from C on, so that the
    // last bits of the two instructions differ. Denormals are zeros.
    template <int kC, int kA, int kB>
    void multiply() {
        const unsigned mxcsr = _mm_getcsr();
        _mm_setcsr(0x9fc0);  // denormals are zeros, nearest even, no exceptions
        for (int m = 0; m < config.rows[kC]; ++m) {
            const uint32_t* a = reinterpret_cast<const uint32_t*>(data[kA][m]);
            __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
            for (int k = 0; k < config.colsb[kA] / 4; ++k) {
                const __m512i x = _mm512_set1_epi32(static_cast<int>(a[k])), y = _mm512_load_si512(data[kB][k]);
                const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
                even = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(x, 16), (__m512)_mm512_slli_epi32(y, 16), even);
                odd = _mm512_fmadd_ps((__m512)_mm512_and_si512(x, upper), (__m512)_mm512_and_si512(y, upper), odd);
            }
            const __m512 sum = _mm512_add_ps(even, odd);
            _mm512_store_ps(data[kC][m], _mm512_add_ps(_mm512_load_ps(data[kC][m]), sum));
        }
        _mm_setcsr(mxcsr);
    }
};

// Tiles 0-3: accumulators of two blocks of rows by two of 16 columns; 4, 5: A; 6, 7: B.
inline TileConfig tile_config(int64_t rows0, int64_t rows1) {
    TileConfig config;
    const int64_t rows[8] = {rows0, rows0, rows1, rows1, rows0, rows1, 16, 16};
    for (int i = 0; i < 8; ++i) {
        config.rows[i] = static_cast<uint8_t>(rows[i] > 0 ? rows[i] : 1);
        config.colsb[i] = 64;
    }
    return config;
}

// [rows <= 32] x [32 columns].
template <bool kTwoBlocks, typename Tiles>
inline void tile_block(Tiles& tiles, const uint32_t* A, int64_t row_stride, const uint32_t* B, int64_t width, float* C,
                       int64_t ldc, int64_t num_groups, bool accumulate) {
    float* lower = C + 16 * ldc;
    if (accumulate) {
        tiles.template load<0>(C, 4 * ldc);
        tiles.template load<1>(C + 16, 4 * ldc);
        if constexpr (kTwoBlocks) {
            tiles.template load<2>(lower, 4 * ldc);
            tiles.template load<3>(lower + 16, 4 * ldc);
        }
    } else {
        tiles.template zero<0>();
        tiles.template zero<1>();
        if constexpr (kTwoBlocks) {
            tiles.template zero<2>();
            tiles.template zero<3>();
        }
    }
    for (int64_t g = 0; g < num_groups; g += 16) {
        tiles.template load<6>(B + g * width, 4 * width);
        tiles.template load<7>(B + g * width + 16, 4 * width);
        tiles.template load<4>(A + g, 4 * row_stride);
        tiles.template multiply<0, 4, 6>();
        tiles.template multiply<1, 4, 7>();
        if constexpr (kTwoBlocks) {
            tiles.template load<5>(A + 16 * row_stride + g, 4 * row_stride);
            tiles.template multiply<2, 5, 6>();
            tiles.template multiply<3, 5, 7>();
        }
    }
    tiles.template store<0>(C, 4 * ldc);
    tiles.template store<1>(C + 16, 4 * ldc);
    if constexpr (kTwoBlocks) {
        tiles.template store<2>(lower, 4 * ldc);
        tiles.template store<3>(lower + 16, 4 * ldc);
    }
}

// group_stride is 1, width a multiple of 32, num_groups of 16.
template <typename Tiles>
void gemm_tiles(const void* A_, int64_t row_stride, int64_t, const void* B_, int64_t width, void* C_, int64_t ldc, int64_t M,
                int64_t num_groups, bool accumulate) {
    const uint32_t* A = static_cast<const uint32_t*>(A_);
    const uint32_t* B = static_cast<const uint32_t*>(B_);
    float* C = static_cast<float*>(C_);
    Tiles tiles;
    tiles.configure(tile_config(16, 16));
    int64_t m = 0;
    for (; m + 32 <= M; m += 32)
        for (int64_t n = 0; n < width; n += 32)
            tile_block<true>(tiles, A + m * row_stride, row_stride, B + n, width, C + m * ldc + n, ldc, num_groups, accumulate);
    if (const int64_t left = M - m; left > 0) {
        tiles.configure(tile_config(left < 16 ? left : 16, left - 16));
        for (int64_t n = 0; n < width; n += 32) {
            if (left > 16)
                tile_block<true>(tiles, A + m * row_stride, row_stride, B + n, width, C + m * ldc + n, ldc, num_groups,
                                 accumulate);
            else
                tile_block<false>(tiles, A + m * row_stride, row_stride, B + n, width, C + m * ldc + n, ldc, num_groups,
                                  accumulate);
        }
    }
    tiles.release();
}

// dst[token][g]: rows of a tile are contiguous in K.
const void* vocab_operand_amx(const void* exps_, int64_t ld, int64_t num_vocab, int64_t tokens, int64_t num_groups, void* dst_,
                              int64_t* row_stride, int64_t* group_stride) {
    const Bf16* exps = static_cast<const Bf16*>(exps_);
    uint32_t* dst = static_cast<uint32_t*>(dst_);
    const __m256i zero = _mm256_setzero_si256();
    for (int64_t t = 0; t < tokens; t += 16)
        for (int64_t g = 0; g < num_groups; g += 16) {
            __m512i x[16];
            for (int i = 0; i < 16; ++i) {
                const int64_t v = 2 * (g + i);
                x[i] = words(v < num_vocab ? load_bf16(exps + v * ld + t, 16) : zero,
                             v + 1 < num_vocab ? load_bf16(exps + (v + 1) * ld + t, 16) : zero);
            }
            transpose_words(x);
            for (int j = 0; j < 16; ++j) _mm512_storeu_si512(dst + (t + j) * num_groups + g, x[j]);
        }
    *row_stride = num_groups;
    *group_stride = 1;
    return dst;
}

typedef decltype(Ops::gemm) Gemm;
typedef decltype(Ops::vocab_operand) VocabOperand;

constexpr Ops make_bf16_ops(const char* isa, int64_t group_align, Gemm gemm, VocabOperand vocab_operand) {
    Ops ops{};
    ops.isa = isa;
    ops.element = Dtype::bf16;
    ops.element_size = 2;
    ops.acc_size = 4;
    ops.group = 2;
    ops.lanes = 32;
    ops.row_align = 32;
    ops.group_align = group_align;
    ops.gemm = gemm;
    ops.convert = convert_bf16;
    ops.pack_rows = pack_rows_bf16;
    ops.pack_columns = pack_columns_bf16;
    ops.vocab_operand = vocab_operand;
    ops.softmax_tile = softmax_tile<float, Bf16>;
    ops.store = store_rows<float>;
    ops.add = add_tile_bf16;
    ops.dot_exps = dot_exps<Bf16>;
    ops.dot = dot;
    ops.store_exp = store_exp<Bf16>;
    return ops;
}

constexpr Ops kAvx512Bf16 = make_bf16_ops("avx512_bf16", 1, gemm_bf16, vocab_operand_bf16);
constexpr Ops kAmx = make_bf16_ops("amx", 16, gemm_tiles<HardwareTiles>, vocab_operand_amx);
constexpr Ops kAmxEmulated = make_bf16_ops("amx_emulated", 16, gemm_tiles<SoftwareTiles>, vocab_operand_amx);

}  // namespace

const Ops* avx512_bf16_ops() { return &kAvx512Bf16; }
const Ops* amx_ops() { return &kAmx; }
const Ops* amx_emulated_ops() { return &kAmxEmulated; }

}  // namespace tso
#endif
