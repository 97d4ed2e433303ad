// Small matrix products out of the second-level cache: C (+)= A · B for the prefill kernel.
//
//     A [rows][steps]  rows of words        B [steps][columns]  a word per column        C float [rows][columns]
//
// A word is 32 bits: a float, or a pair of consecutive bfloat16 along the summed dimension. Rows come in
// multiples of ROWS, columns in multiples of W. The operands of Pairs are also those of AMX tiles (rows, columns
// and steps in multiples of 16).

#pragma once

#include "simd.h"

struct FloatProduct {
    static INLINE vf add(vf acc, uint32_t a, vu b) {
        float x;
        std::memcpy(&x, &a, sizeof x);
        return fma(splat(x), (vf)b, acc);
    }
};

#if PENSTOCK_DOT
struct PairProduct {
    static INLINE vf add(vf acc, uint32_t a, vu b) { return dot(acc, _mm512_set1_epi32((int)a), (__m512i)b); }
};
#endif

// Accumulators of ROWS × VECTORS fill the register file but for one row of B and one word of A.
constexpr int ROWS = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int VECTORS = 4;
#else
constexpr int VECTORS = 2;
#endif

struct NoFetch {
    INLINE void step() {}
};

// Reads ahead, at every step of a loop a little, what comes after it; into the second-level cache: in the first, it
// would push out what is being multiplied (a fifth slower at 8 rows).
struct Fetch {
    const char* at;
    int64_t pace;  // bytes per step, 128 at most: two lines are what a step can ask for

    INLINE void step() {
        prefetch_far(at);
        if (pace > 64) prefetch_far(at + 64);
        at += pace;
    }
};

template <typename Product, int R, int V, typename Ahead = NoFetch>
INLINE void gemm_block(const uint32_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int steps, bool add,
                       Ahead ahead = {}) {
    vf acc[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = add ? load(c + r * ldc + v * W) : vf{};
    for (int k = 0; k < steps; k++) {
        vu column[V];
        for (int v = 0; v < V; v++) column[v] = load(b + (int64_t)k * ldb + v * W);
        ahead.step();
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) acc[r][v] = Product::add(acc[r][v], a[r * lda + k], column[v]);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(c + r * ldc + v * W, acc[r][v]);
}

template <typename Product>
void gemm(const uint32_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, int rows, int columns, int steps,
          bool add) {
    int n = 0;
    for (; n + VECTORS * W <= columns; n += VECTORS * W)
        for (int m = 0; m < rows; m += ROWS)
            gemm_block<Product, ROWS, VECTORS>(a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc, steps, add);
    for (; n + 2 * W <= columns; n += 2 * W)
        for (int m = 0; m < rows; m += ROWS)
            gemm_block<Product, ROWS, 2>(a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc, steps, add);
    for (; n < columns; n += W)
        for (int m = 0; m < rows; m += ROWS)
            gemm_block<Product, ROWS, 1>(a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc, steps, add);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// to[j][i] = r[i][j] for 8 × 8 floats.
INLINE void transpose8(__m256 (&r)[8], float* to, int64_t ld_to) {
    __m256 t[8];
    for (int k = 0; k < 8; k += 2) {
        t[k] = _mm256_unpacklo_ps(r[k], r[k + 1]);
        t[k + 1] = _mm256_unpackhi_ps(r[k], r[k + 1]);
    }
    for (int k = 0; k < 8; k += 4)
        for (int h = 0; h < 2; h++) {
            r[k + 2 * h] = _mm256_shuffle_ps(t[k + h], t[k + 2 + h], 0x44);
            r[k + 2 * h + 1] = _mm256_shuffle_ps(t[k + h], t[k + 2 + h], 0xee);
        }
    // r[4g + c] holds, in 128-bit part p, column 4p + c of rows 4g … 4g + 3
    for (int c = 0; c < 4; c++) {
        _mm256_storeu_ps(to + c * ld_to, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
        _mm256_storeu_ps(to + (c + 4) * ld_to, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
    }
}
#endif

// to[j][i] = from[i][j] for `rows` × `columns` words.
inline void transpose(const uint32_t* from, int ld_from, uint32_t* to, int ld_to, int rows, int columns) {
#if defined(__AVX512F__)
    for (int i = 0; i < rows; i += 16)
        for (int j = 0; j < columns; j += 16) {
            __m512i r[16], t[16];
            for (int k = 0; k < 16; k++) r[k] = _mm512_loadu_si512(from + (i + k) * ld_from + j);
            for (int k = 0; k < 16; k += 2) {
                t[k] = _mm512_unpacklo_epi32(r[k], r[k + 1]);
                t[k + 1] = _mm512_unpackhi_epi32(r[k], r[k + 1]);
            }
            for (int k = 0; k < 16; k += 4)
                for (int h = 0; h < 2; h++) {
                    r[k + 2 * h] = _mm512_unpacklo_epi64(t[k + h], t[k + 2 + h]);
                    r[k + 2 * h + 1] = _mm512_unpackhi_epi64(t[k + h], t[k + 2 + h]);
                }
            // r[4g + c] holds, in 128-bit part p, column 4p + c of rows 4g … 4g + 3
            for (int c = 0; c < 4; c++) {
                __m512i low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88),
                        high = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
                __m512i low2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88),
                        high2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
                uint32_t* at = to + (int64_t)(j + c) * ld_to + i;
                _mm512_storeu_si512(at, _mm512_shuffle_i32x4(low, low2, 0x88));
                _mm512_storeu_si512(at + 4 * ld_to, _mm512_shuffle_i32x4(high, high2, 0x88));
                _mm512_storeu_si512(at + 8 * ld_to, _mm512_shuffle_i32x4(low, low2, 0xdd));
                _mm512_storeu_si512(at + 12 * ld_to, _mm512_shuffle_i32x4(high, high2, 0xdd));
            }
        }
#elif defined(__AVX2__)
    for (int i = 0; i < rows; i += 8)
        for (int j = 0; j < columns; j += 8) {
            __m256 r[8];
            for (int k = 0; k < 8; k++) r[k] = _mm256_loadu_ps((const float*)(from + (int64_t)(i + k) * ld_from + j));
            transpose8(r, (float*)(to + (int64_t)j * ld_to + i), ld_to);
        }
#else
    for (int i = 0; i < rows; i += 8)
        for (int j = 0; j < columns; j += 8)
            for (int y = j; y < j + 8; y++)
                for (int x = i; x < i + 8; x++) to[(int64_t)y * ld_to + x] = from[x * ld_from + y];
#endif
}
