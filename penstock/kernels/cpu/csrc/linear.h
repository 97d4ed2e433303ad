// x Wᵀ + b for weights that lie in panels of 64 output columns: bfloat16, 8-bit and grouped 4-bit; and floats.h.
//
// The input's dimension k runs inside a panel, so that a panel is read from its first byte to its last:
//
//     bfloat16   [N / 64][K / 2 ][64 columns][2]     pairs of k: what oneDNN packs to, read in place
//     int8       [N / 64][K / group]: [group / 4][64 columns][4] quads of k, each weight + 128, then [64] scales
//     int4       [N / 64][K / 8 ][64 columns][4]     low half bytes are k … k + 3, high ones k + 4 … k + 7
//
// K of the integer kinds is rounded up to GROUP, N of all to 64; what is added is zero.
//
// Integers are multiplied with integers (AVX512-VNNI, AVX-VNNI, Arm's i8mm: four products of unsigned and signed bytes per lane
// and instruction), so x is made one: for every row and span of k, a float factor and 15-bit integers in two bytes,
//
//     x ≈ factor · (128 high + low)      |128 high + low| ≤ 16256
//
// or, where activations may be rounded to eight bits as well (parts = 1), to one byte: x ≈ factor · high. The error of
// two bytes, 3e-5 of the span's greatest, is below the rounding of bfloat16 itself for all but elements that are 128
// times smaller than it. AVX2 alone has no such instruction, but one that multiplies pairs of 16-bit integers and adds
// them: there x stays one integer of 16 bits, in quads (k, k + 2, k + 1, k + 3) beside the even and the odd bytes of the
// weights, and two bytes cost what one does. Sums of integers are exact, and groups are added in order, as floats, so a
// row's bits do not depend on the rows beside it, nor on threads. To end a group's sums takes a tenth of its time.

#pragma once

#include "gemm.h"
#include "team.h"

#if defined(__AVX512F__) ? defined(__AVX512VNNI__) : defined(__AVXVNNI__)
#define PENSTOCK_VNNI 1
#else
#define PENSTOCK_VNNI 0
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
#include <arm_neon.h>
#define PENSTOCK_USDOT 1
#else
#define PENSTOCK_USDOT 0
#endif

#if defined(__AVX2__) && !defined(__AVX512F__) && !PENSTOCK_VNNI
#define PENSTOCK_WORDS 1
#else
#define PENSTOCK_WORDS 0
#endif

constexpr int PANEL = 64;
constexpr int GROUP = 128;
constexpr int PANEL_VECTORS = PANEL / W;
// Vectors of columns that are computed together, and rows of so many parts: their sums stay in registers.
constexpr int TOGETHER = VECTORS;
constexpr int integer_rows(int parts) { return PENSTOCK_WORDS ? 4 : parts == 2 ? 3 : 6; }
constexpr int MOST = 127;                  // the greatest integer of an activation of one byte
constexpr int MOST_OF_TWO = 127 * 128;     // of two

// Of k that share a factor of an activation.
constexpr int span_of(int parts) { return parts == 2 ? 2 * GROUP : GROUP; }

// Of a group of a panel of int8, with its scales.
constexpr int64_t int8_bytes(int group) { return (group + 2) * PANEL; }

enum Kind { BF16 = 0, INT8 = 1, INT4 = 2, FLOAT = 3, WIDE = 4 };  // the last two: floats.h

// What Python hands over; see LinearArguments in library.py. Strides count elements.
struct Linear {
    const void* x;  // [rows][depth], bfloat16 or float
    void* out;      // [rows][columns], of the same type
    const void* bias;
    const uint8_t* weight;
    const bf16* scales;    // int4: [N / 64][K / group][64]; those of int8 lie behind their groups: one way from memory
    const uint8_t* zeros;  // int4: likewise, 0 … 15
    char* scratch;              // penstock_linear_scratch bytes
    int64_t x_row, out_row;
    int32_t rows, columns, depth, kind, group, is_bf16, threads;
    int32_t adds;   // out += instead of out =
    int32_t parts;  // bytes of an activation: 2, or 1
    int32_t gated;  // columns are [gate | up], both in whole panels, and out = silu(gate) · up
};

// ------------------------------------------------------------------------------------------------ activations

// Rows as integers. A row is two of bytes: high, then low, which is not written where there is one part; or, with
// PENSTOCK_WORDS, one of 16-bit integers, whose sums stand where those of the high bytes do.
struct Activations {
    uint32_t* quads;  // [2 · rows][depth / 4]
    float* factors;   // [rows][spans]
    int32_t* sums;    // [2 · rows][depth / 64]
    int depth;        // rounded up to GROUP
    int parts, spans;

    Activations(char* at, int rows, int in, int parts)
        : depth(round_up(in, GROUP)), parts(parts), spans((depth + span_of(parts) - 1) / span_of(parts)) {
        quads = (uint32_t*)at;
        factors = (float*)(at + (int64_t)2 * rows * depth);
        sums = (int32_t*)(factors + (int64_t)rows * (depth / GROUP));
    }

    static int64_t bytes(int rows, int in) {
        const int64_t depth = round_up(in, GROUP);
        return (rows * (2 * depth + depth / GROUP * 4 + 2 * depth / 64 * 4) + 63) / 64 * 64;
    }

    template <typename T>
    void quantize(const T* x, int in, int row) {
        for (int first = 0; first < depth; first += span_of(parts)) {
            if (parts == 1)
                quantize_span<1, 1>(x, in, row, first);
            else if (first + span_of(2) <= depth)
                quantize_span<2, 2>(x, in, row, first);
            else
                quantize_span<2, 1>(x, in, row, first);
        }
    }

    // A span of G groups.
    template <int P, int G, typename T>
    INLINE void quantize_span(const T* x, int in, int row, int first) {
        constexpr float limit = P == 1 ? MOST : MOST_OF_TWO;
        constexpr float least = limit * std::numeric_limits<float>::min();  // below, its inverse would not be a number
        int8_t* high = (int8_t*)(quads + (int64_t)2 * row * (depth / 4)) + first;
        int32_t* sum_high = sums + (int64_t)2 * row * (depth / 64) + first / 64;
        vf values[G * GROUP / W];
        vi bits{};  // of the greatest: those of positive floats are ordered as they are, then come inf and NaN
        for (int i = 0; i < G * GROUP / W; i++) {
            const int left = in - first - i * W;
            values[i] = left > 0 ? load(x + first + i * W, left) : vf{};
            bits = max(bits, (vi)values[i] & 0x7fffffff);
        }
        const int32_t most = max(bits);
        float greatest;
        std::memcpy(&greatest, &most, sizeof greatest);
        const bool fine = greatest < INF;
        factors[row * spans + first / span_of(P)] = fine ? greatest / limit : std::numeric_limits<float>::quiet_NaN();
        const vf inverse = splat(greatest >= least && fine ? limit / greatest : 0.0f);
        for (int part = 0; part < G * GROUP / 64; part++) {
            vi all_high{}, all_low{};
            for (int i = part * (64 / W); i < (part + 1) * (64 / W); i++) {
                vi q = nearest(values[i] * inverse);
#if PENSTOCK_WORDS
                words((int16_t*)(high - first) + first + i * W, q);
                all_high += q;
                continue;
#endif
                vi h = P == 1 ? q : (q + 64) >> 7, l = P == 1 ? vi{} : q - (h << 7);
                narrow(high + i * W, h);
                if (P == 2) narrow(high + depth + i * W, l);
                all_high += h, all_low += l;
            }
            sum_high[part] = sum(all_high);
            if (P == 2) sum_high[depth / 64 + part] = sum(all_low);
        }
    }

    // Rounds to the nearest integer, to even from the middle.
    static INLINE vi nearest(vf v) {
#if defined(__AVX512F__)
        return (vi)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
        return (vi)_mm256_cvtps_epi32((__m256)v);
#else
        vi whole;
        for (int i = 0; i < W; i++) whole[i] = (int32_t)std::nearbyint(v[i]);
        return whole;
#endif
    }

#if PENSTOCK_WORDS
    // Two quads, each in the order 0, 2, 1, 3.
    static INLINE void words(int16_t* to, vi v) {
        const __m256i both = _mm256_shufflelo_epi16(_mm256_packs_epi32((__m256i)v, (__m256i)v), 0xd8);
        _mm_storel_epi64((__m128i*)to, _mm256_castsi256_si128(both));
        _mm_storel_epi64((__m128i*)(to + 4), _mm256_extracti128_si256(both, 1));
    }
#endif

    static INLINE void narrow(int8_t* to, vi v) {
#if defined(__AVX512F__)
        _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
        const __m256i pairs = _mm256_packs_epi32((__m256i)v, (__m256i)v), bytes = _mm256_packs_epi16(pairs, pairs);
        _mm_storeu_si32(to, _mm256_castsi256_si128(bytes));
        _mm_storeu_si32(to + 4, _mm256_extracti128_si256(bytes, 1));
#else
        for (int i = 0; i < W; i++) to[i] = (int8_t)v[i];
#endif
    }
};

// -------------------------------------------------------------------------------------------- integer products

// acc[i] += Σ_j w[i].byte[j] · a.byte[j] of unsigned and signed bytes
INLINE vi dot4(vi acc, vu w, uint32_t a) {
#if PENSTOCK_VNNI && defined(__AVX512F__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32((int)a));
#elif PENSTOCK_VNNI
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32((int)a));
#elif PENSTOCK_USDOT
    return (vi)vusdotq_s32((int32x4_t)acc, (uint8x16_t)w, vreinterpretq_s8_u32(vdupq_n_u32(a)));
#else
    for (int j = 0; j < 4; j++) acc += (vi)((w >> (8 * j)) & 255u) * (int32_t)(int8_t)(a >> (8 * j));
    return acc;
#endif
}

// One panel for R rows of P parts and k from `first` to `last`, whole spans but for the end: c[r][64] += …
template <int R, int P>
struct IntegerPanel {
    static constexpr int SPAN = span_of(P);
    static constexpr int SUMS = PENSTOCK_WORDS ? R : P * R;  // of a column

    const uint32_t* quads;
    const float* factors;
    const int32_t* sums;
    int stride_quads, stride_factors, stride_sums;
    float* c;

    IntegerPanel(const Activations& a, int row, float* c)
        : quads(a.quads + (int64_t)2 * row * (a.depth / 4)),
          factors(a.factors + (int64_t)row * a.spans),
          sums(a.sums + (int64_t)2 * row * (a.depth / 64)),
          stride_quads(a.depth / 4),
          stride_factors(a.spans),
          stride_sums(a.depth / 64),
          c(c) {}

    // group: 64 or 128, of the weights. Per column: scale · Σ q a
    INLINE void int8(const uint8_t* weight, int group, int first, int last, Fetch fetch) const {
        for (int g = first / group; g < last / group; g++)
            for (int v = 0; v < PANEL_VECTORS; v += TOGETHER) {
                vi acc[SUMS][TOGETHER];
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)  // weights are stored as q + 128
                    start(acc, r, -128 * total(r, g * group / 64, group / 64));
                const uint8_t* w = weight + g * int8_bytes(group) + v * W * 4;
                const bf16* scales = (const bf16*)(weight + g * int8_bytes(group) + group * PANEL);
                const uint32_t* x = quads + g * (group / (PENSTOCK_WORDS ? 2 : 4));
                for (int k = 0; k < group / 4; k++, w += 4 * PANEL) {
                    fetch.step();
                    vu columns[TOGETHER];
                    for (int i = 0; i < TOGETHER; i++) columns[i] = load((const uint32_t*)w + i * W);
                    add(acc, columns, x, k);
                }
                forget();
#pragma GCC unroll 8
                for (int i = 0; i < TOGETHER; i++) {
                    const vf scale = load(scales + (v + i) * W);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        float* to = c + r * PANEL + (v + i) * W;
                        const vf factor = scale * factors[r * stride_factors + g * group / SPAN];
                        store(to, fma(__builtin_convertvector(whole(acc, r, i), vf), factor, load(to)));
                    }
                }
            }
    }

    // Likewise. Per column: scale · (Σ q a − zero Σ a)
    INLINE void int4(const uint8_t* weight, const bf16* scales, const uint8_t* zeros, int group, int first,
                     int last) const {
        for (int g = first / group; g < last / group; g++)
            for (int v = 0; v < PANEL_VECTORS; v += TOGETHER) {
                vi acc[SUMS][TOGETHER]{};
                const uint8_t* w = weight + (int64_t)g * group * (PANEL / 2) + v * W * 4;
                const uint32_t* x = quads + g * (group / (PENSTOCK_WORDS ? 2 : 4));
                for (int k = 0; k < group / 4; k += 2, w += 4 * PANEL) {
                    for (int half = 0; half < 2; half++) {
                        vu columns[TOGETHER];
                        for (int i = 0; i < TOGETHER; i++)
                            columns[i] = (load((const uint32_t*)w + i * W) >> (4 * half)) & 0x0f0f0f0fu;
                        add(acc, columns, x, k + half);
                    }
                }
                float excess[R];
                for (int r = 0; r < R; r++) excess[r] = (float)total(r, g * group / 64, group / 64);
                for (int i = 0; i < TOGETHER; i++) {
                    const int64_t column = (int64_t)g * PANEL + (v + i) * W;
                    vf scale = load(scales + column);
                    vf zero = bytes(zeros + column);
                    for (int r = 0; r < R; r++) {
                        float* to = c + r * PANEL + (v + i) * W;
                        vf factor = scale * factors[r * stride_factors + g * group / SPAN];
                        vf products = __builtin_convertvector(whole(acc, r, i), vf);
                        store(to, load(to) + (products - zero * excess[r]) * factor);
                    }
                }
            }
    }

    // acc += the products of some columns' quads of weights with quad k of every row.
    INLINE void add(vi (*acc)[TOGETHER], const vu* columns, const uint32_t* x, int k) const {
#if PENSTOCK_WORDS
        __m256i even[TOGETHER], odd[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) {
            even[i] = _mm256_and_si256((__m256i)columns[i], _mm256_set1_epi32(0x00ff00ff));
            odd[i] = _mm256_srli_epi16((__m256i)columns[i], 8);
        }
        for (int r = 0; r < R; r++) {
            const uint32_t* words = x + 2 * (r * stride_quads + k);
            const __m256i first = _mm256_set1_epi32((int)words[0]), second = _mm256_set1_epi32((int)words[1]);
            for (int i = 0; i < TOGETHER; i++) {
                acc[r][i] += (vi)_mm256_madd_epi16(even[i], first);
                acc[r][i] += (vi)_mm256_madd_epi16(odd[i], second);
            }
        }
#else
        for (int r = 0; r < P * R; r++)
            for (int i = 0; i < TOGETHER; i++) acc[r][i] = dot4(acc[r][i], columns[i], x[at(r) * stride_quads + k]);
#endif
    }

    // The row of bytes that sum r belongs to.
    static constexpr int at(int r) { return P == 1 ? 2 * r : r; }

    // What is in memory is read from there: GCC would keep a second copy of c on the stack, since registers are full.
    static INLINE void forget() { asm volatile("" : : : "memory"); }

    // Sums of a row begin with this instead of zero.
    static INLINE void start(vi (*acc)[TOGETHER], int r, int32_t value) {
#pragma GCC unroll 8
        for (int i = 0; i < TOGETHER; i++) {
            if (SUMS != R) acc[P * r][i] = vi{};
            acc[SUMS == R ? r : P * r + P - 1][i] = vi{} + value;
        }
    }

    static INLINE vi whole(const vi (*acc)[TOGETHER], int r, int i) {
        return P == 1 || PENSTOCK_WORDS ? acc[r][i] : (acc[P * r][i] << 7) + acc[P * r + P - 1][i];
    }

    // Sum of row r's integers, from 64 · first on.
    INLINE int32_t total(int r, int first, int count) const {
        int32_t high = 0, low = 0;
        for (int i = first; i < first + count; i++) {
            high += sums[2 * r * stride_sums + i];
            if (P == 2 && !PENSTOCK_WORDS) low += sums[(2 * r + 1) * stride_sums + i];
        }
        return P == 1 || PENSTOCK_WORDS ? high : 128 * high + low;
    }

    static INLINE vf bytes(const uint8_t* p) {
        typedef uint8_t vb __attribute__((vector_size(W)));
        vb b;
        std::memcpy(&b, p, sizeof b);
        return __builtin_convertvector(b, vf);
    }
};
