// x Wᵀ + b for weights that lie in panels of 64 output columns: bfloat16, 8-bit and grouped 4-bit.
//
// The input's dimension k runs inside a panel, so that a panel is read from its first byte to its last:
//
//     bfloat16   [N / 64][K / 2 ][64 columns][2]     pairs of k: what oneDNN packs to, read in place
//     int8       [N / 64][K / 4 ][64 columns][4]     quads of k, each weight + 128
//     int4       [N / 64][K / 8 ][64 columns][4]     low half bytes are k … k + 3, high ones k + 4 … k + 7
//
// K of the integer kinds is rounded up to GROUP, N of all to 64; what is added is zero.
//
// Integers are multiplied with integers (AVX512-VNNI: four products of unsigned and signed bytes per lane and
// instruction), so x is made one: for every row and GROUP of k, a float factor and 15-bit integers in two bytes,
//
//     x ≈ factor · (128 high + low)      |128 high + low| ≤ 16256
//
// or, where activations may be rounded to eight bits as well (parts = 1), to one byte: x ≈ factor · high. The error of
// two bytes, 3e-5 of the group's greatest is below the rounding of bfloat16 itself for all but elements that
// are 128 times smaller than it. Sums of integers are exact and groups are added in order, as floats, so a row's bits do
// not depend on the rows beside it, nor on threads.

#pragma once

#include "gemm.h"
#include "team.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define PENSTOCK_VNNI 1
#else
#define PENSTOCK_VNNI 0
#endif

constexpr int PANEL = 64;
constexpr int GROUP = 128;
constexpr int PANEL_VECTORS = PANEL / W;
constexpr int MOST = 127;                  // the greatest integer of an activation of one byte
constexpr int MOST_OF_TWO = 127 * 128;     // of two

enum Kind { BF16 = 0, INT8 = 1, INT4 = 2 };

// What Python hands over; see LinearArguments in library.py. Strides count elements.
struct Linear {
    const void* x;  // [rows][depth], bfloat16 or float
    void* out;      // [rows][columns], of the same type
    const void* bias;
    const uint8_t* weight;
    const float* scales;        // int8: [N]
    const bf16* group_scales;   // int4: [N / 64][K / group][64]
    const uint8_t* zeros;       // int4: likewise, 0 … 15
    char* scratch;              // penstock_linear_scratch bytes
    int64_t x_row, out_row;
    int32_t rows, columns, depth, kind, group, is_bf16, threads;
    int32_t adds;   // out += instead of out =
    int32_t parts;  // bytes of an activation: 2, or 1
};

// ------------------------------------------------------------------------------------------------ activations

// Rows as integers. A row is two of bytes: high, then low, which is not written where there is one part.
struct Activations {
    uint32_t* quads;  // [2 · rows][depth / 4]
    float* factors;   // [rows][depth / GROUP]
    int32_t* sums;    // [2 · rows][depth / 64]
    int depth;        // rounded up to GROUP

    Activations(char* at, int rows, int in) : depth(round_up(in, GROUP)) {
        quads = (uint32_t*)at;
        factors = (float*)(at + (int64_t)2 * rows * depth);
        sums = (int32_t*)(factors + (int64_t)rows * (depth / GROUP));
    }

    static int64_t bytes(int rows, int in) {
        const int64_t depth = round_up(in, GROUP);
        return (rows * (2 * depth + depth / GROUP * 4 + 2 * depth / 64 * 4) + 63) / 64 * 64;
    }

    template <typename T>
    void quantize(const T* x, int in, int row, int parts) {
        const float limit = parts == 1 ? MOST : MOST_OF_TWO;
        const float least = limit * std::numeric_limits<float>::min();  // below, its inverse would not be a number
        int8_t* high = (int8_t*)(quads + (int64_t)2 * row * (depth / 4));
        int8_t* low = high + depth;
        int32_t* sum_high = sums + (int64_t)2 * row * (depth / 64);
        int32_t* sum_low = sum_high + depth / 64;
        for (int g = 0; g < depth / GROUP; g++) {
            vf values[GROUP / W];
            vf most{}, broken{};  // broken: zeros, or NaN
            for (int i = 0; i < GROUP / W; i++) {
                const int left = in - g * GROUP - i * W;
                values[i] = left > 0 ? load(x + g * GROUP + i * W, left) : vf{};
                most = max(most, values[i] < 0.0f ? -values[i] : values[i]);
                broken += values[i] * 0.0f;
            }
            const float greatest = max(most);
            factors[row * (depth / GROUP) + g] = greatest / limit + sum(broken);
            const vf inverse = splat(greatest >= least && greatest < INF ? limit / greatest : 0.0f);
            for (int half = 0; half < 2; half++) {
                vi all_high{}, all_low{};
                for (int i = half * (64 / W); i < (half + 1) * (64 / W); i++) {
                    vi q = nearest(values[i] * inverse);
                    vi h = parts == 1 ? q : (q + 64) >> 7, l = parts == 1 ? vi{} : q - (h << 7);
                    narrow(high + g * GROUP + i * W, h);
                    if (parts == 2) narrow(low + g * GROUP + i * W, l);
                    all_high += h, all_low += l;
                }
                int32_t a = 0, b = 0;
                for (int i = 0; i < W; i++) a += all_high[i], b += all_low[i];
                sum_high[2 * g + half] = a, sum_low[2 * g + half] = b;
            }
        }
    }

    // Rounds to the nearest integer, to even from the middle.
    static INLINE vi nearest(vf v) {
#if defined(__AVX512F__)
        return (vi)_mm512_cvtps_epi32((__m512)v);
#else
        vi whole;
        for (int i = 0; i < W; i++) whole[i] = (int32_t)std::nearbyint(v[i]);
        return whole;
#endif
    }

    static INLINE void narrow(int8_t* to, vi v) {
#if defined(__AVX512F__)
        _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
#else
        for (int i = 0; i < W; i++) to[i] = (int8_t)v[i];
#endif
    }
};

// -------------------------------------------------------------------------------------------- integer products

// acc[i] += Σ_j w[i].byte[j] · a.byte[j] of unsigned and signed bytes
INLINE vi dot4(vi acc, vu w, uint32_t a) {
#if PENSTOCK_VNNI
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32((int)a));
#else
    for (int j = 0; j < 4; j++) acc += (vi)((w >> (8 * j)) & 255u) * (int32_t)(int8_t)(a >> (8 * j));
    return acc;
#endif
}

// One panel for R rows of P parts from the group of k `first` to `last`: c[r][64] += …
template <int R, int P>
struct IntegerPanel {
    const uint32_t* quads;
    const float* factors;
    const int32_t* sums;
    int stride_quads, stride_factors, stride_sums;
    float* c;

    IntegerPanel(const Activations& a, int row, float* c)
        : quads(a.quads + (int64_t)2 * row * (a.depth / 4)),
          factors(a.factors + (int64_t)row * (a.depth / GROUP)),
          sums(a.sums + (int64_t)2 * row * (a.depth / 64)),
          stride_quads(a.depth / 4),
          stride_factors(a.depth / GROUP),
          stride_sums(a.depth / 64),
          c(c) {}

    INLINE void int8(const uint8_t* weight, int first, int last) const {
        for (int g = first; g < last; g++)
            for (int v = 0; v < PANEL_VECTORS; v += 4) {
                vi acc[P * R][4];
                for (int r = 0; r < P * R; r++) {
                    const int32_t* s = sums + at(r) * stride_sums + 2 * g;
                    for (int i = 0; i < 4; i++) acc[r][i] = vi{} - 128 * (s[0] + s[1]);
                }
                const uint8_t* w = weight + (int64_t)g * GROUP * PANEL + v * W * 4;
                const uint32_t* x = quads + g * (GROUP / 4);
                for (int k = 0; k < GROUP / 4; k++, w += 4 * PANEL)
                    for (int i = 0; i < 4; i++) {
                        vu column = load((const uint32_t*)w + i * W);
                        for (int r = 0; r < P * R; r++)
                            acc[r][i] = dot4(acc[r][i], column, x[at(r) * stride_quads + k]);
                    }
                for (int r = 0; r < R; r++)
                    for (int i = 0; i < 4; i++) {
                        float* to = c + r * PANEL + (v + i) * W;
                        store(to, load(to) + whole(acc, r, i) * factors[r * stride_factors + g]);
                    }
            }
    }

    // group: 64 or 128, of the weights. Per column: scale · (Σ q a − zero Σ a)
    INLINE void int4(const uint8_t* weight, const bf16* scales, const uint8_t* zeros, int group, int first,
                     int last) const {
        const int span = group / 64;
        for (int g = first * (GROUP / group); g < last * (GROUP / group); g++)
            for (int v = 0; v < PANEL_VECTORS; v += 4) {
                vi acc[P * R][4]{};
                const uint8_t* w = weight + (int64_t)g * group * (PANEL / 2) + v * W * 4;
                const uint32_t* x = quads + g * (group / 4);
                for (int k = 0; k < group / 4; k += 2, w += 4 * PANEL)
                    for (int i = 0; i < 4; i++) {
                        vu both = load((const uint32_t*)w + i * W);
                        vu low = both & 0x0f0f0f0fu, high = (both >> 4) & 0x0f0f0f0fu;
                        for (int r = 0; r < P * R; r++) {
                            acc[r][i] = dot4(acc[r][i], low, x[at(r) * stride_quads + k]);
                            acc[r][i] = dot4(acc[r][i], high, x[at(r) * stride_quads + k + 1]);
                        }
                    }
                for (int i = 0; i < 4; i++) {
                    const int64_t column = (int64_t)g * PANEL + (v + i) * W;
                    vf scale = load(scales + column);
                    vf zero = bytes(zeros + column);
                    for (int r = 0; r < R; r++) {
                        const int32_t *s = sums + 2 * r * stride_sums + g * span, *t = s + stride_sums;
                        const int32_t high = span == 1 ? s[0] : s[0] + s[1], low = span == 1 ? t[0] : t[0] + t[1];
                        const int32_t total = P == 1 ? high : 128 * high + low;
                        float* to = c + r * PANEL + (v + i) * W;
                        vf factor = scale * factors[r * stride_factors + g * group / GROUP];
                        store(to, load(to) + (whole(acc, r, i) - zero * (float)total) * factor);
                    }
                }
            }
    }

    // The row of bytes that sum r belongs to.
    static constexpr int at(int r) { return P == 1 ? 2 * r : r; }

    static INLINE vf whole(const vi (*acc)[4], int r, int i) {
        return __builtin_convertvector(P == 1 ? acc[r][i] : (acc[P * r][i] << 7) + acc[P * r + P - 1][i], vf);
    }

    static INLINE vf bytes(const uint8_t* p) {
        typedef uint8_t vb __attribute__((vector_size(W)));
        vb b;
        std::memcpy(&b, p, sizeof b);
        return __builtin_convertvector(b, vf);
    }
};
