// Queries, keys and values as the words of matrix products (see gemm.h): floats, or pairs of bfloat16.
//
// Both attention kernels multiply these, in the same order, so that they agree to the last bit.

#pragma once

#include <type_traits>

#include "attention.h"
#include "gemm.h"

// Words are floats, whatever the cache holds.
template <typename T>
struct FloatWords {
    typedef FloatProduct Product;
    static constexpr uint32_t exponents[] = {0x7f800000};  // all ones: NaN or inf
    static INLINE int steps(int dim) { return round_up(dim, 16); }
    static INLINE int columns(int dim) { return round_up(dim, 16); }
    static INLINE int key_steps(int keys) { return keys; }

    static void words(const T* from, int dim, uint32_t* to) {
        for (int d = 0; d < steps(dim); d += W) {
            vf x = d < dim ? load(from + d, dim - d) : vf{};
            std::memcpy(to + d, &x, sizeof x);
        }
    }

    static void values(const T* const* rows, int keys, int dim, int columns, uint32_t* to) {
        for (int i = 0; i < keys; i++) {
            if (rows[i])
                words(rows[i], dim, to + i * columns);
            else
                std::memset(to + i * columns, 0, columns * sizeof *to);
        }
    }

    static void weights(float*, int) {}
};

#if PENSTOCK_DOT

struct PairWords {
    typedef PairProduct Product;
    static constexpr uint32_t exponents[] = {0x7f800000, 0x7f80};
    static INLINE int steps(int dim) { return round_up(dim, 32) / 2; }
    static INLINE int columns(int dim) { return round_up(dim, 32); }
    static INLINE int key_steps(int keys) { return (keys + 1) / 2; }

    static void words(const bf16* from, int dim, uint32_t* to) {
        for (int d = 0; d < dim; d += 32) _mm512_storeu_si512(to + d / 2, load_pairs(from + d, dim - d));
    }

    // Words of one column: values of keys 2i and 2i + 1.
    static void values(const bf16* const* rows, int keys, int dim, int columns, uint32_t* to) {
        const __m512i first = indices(0), second = indices(16);
        for (int i = 0; i < keys; i += 2, to += columns)
            for (int d = 0; d < columns; d += 32) {
                const int n = dim - d;
                __m512i a = rows[i] ? load_pairs(rows[i] + d, n) : __m512i{};
                __m512i b = i + 1 < keys && rows[i + 1] ? load_pairs(rows[i + 1] + d, n) : __m512i{};
                _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(a, first, b));
                _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(a, second, b));
            }
    }

    static INLINE void weights(float* scores, int count) {
        bf16* to = (bf16*)scores;
        for (int i = 0; i < count; i += W) store(to + i, load(scores + i));
    }

  private:
    static __m512i indices(int from) {
        uint16_t lanes[32];
        for (int i = 0; i < 16; i++) lanes[2 * i] = from + i, lanes[2 * i + 1] = 32 + from + i;
        return _mm512_loadu_si512(lanes);
    }
};

#endif

#if PENSTOCK_DOT
template <typename T>
using WordsOf = std::conditional_t<std::is_same_v<T, bf16>, PairWords, FloatWords<T>>;
#else
template <typename T>
using WordsOf = FloatWords<T>;
#endif
