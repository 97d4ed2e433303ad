// One query token against the keys of one part, read in place.
//
// Memory is the limit here. A key and a value are read once and serve all query heads of their KV head, four,
// two or one at a time. They are read in the order in which they lie, the KV heads of a block one after the
// other: on a Zen 4 core runs of 32 KiB come at 14 GB/s, single pieces of 4 KiB at 9. What is computed, and in
// which order, is what the prefill kernel does: see attention.h.

#pragma once

#include <algorithm>

#include "words.h"

// Keys that are transposed together.
constexpr int KEYS = 16;

// weights [R][KEY_TILE + KEYS], values, out[R][…]: what a product of floats adds.
template <typename T>
struct FloatSums {
    static constexpr int LANES = W;  // dimensions per vector

    // out[r][…] += Σ weights[r][i] values[i] for i in [from, to), for C vectors of columns.
    template <int R, int C, bool whole>
    static INLINE void columns(const float* weights, const T* const* values, int from, int to, int dim, int d,
                               float* out, int out_row) {
        vf acc[R][C];
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) acc[r][c] = load(out + r * out_row + d + c * W);
        for (int i = from; i < to; i++)
            for (int c = 0; c < C; c++) {
                const T* at = values[i] + d + c * W;
                vf value = whole ? load(at) : load(at, dim - d - c * W);
                for (int r = 0; r < R; r++) acc[r][c] = fma(splat(weights[r * (KEY_TILE + KEYS) + i]), value, acc[r][c]);
            }
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) store(out + r * out_row + d + c * W, acc[r][c]);
    }

    static void in_order(float*, int) {}
};

#if PENSTOCK_DOT

// Pairs of keys, the first of which is even: weights are words of bfloat16. `from` and `to` are keys; the half of a
// pair beyond them is zero.
struct PairSums {
    static constexpr int LANES = 32;

    template <int R, int C, bool whole>
    static INLINE void columns(const float* weights, const bf16* const* values, int from, int to, int dim, int d,
                               float* out, int out_row) {
        vf acc[R][2 * C];
        for (int r = 0; r < R; r++)
            for (int c = 0; c < 2 * C; c++) acc[r][c] = load(out + r * out_row + d + c * W);
        for (int i = from & ~1; i < to; i += 2) {
            const bool first = i >= from, second = i + 1 < to;
            for (int c = 0; c < C; c++) {
                const int at = d + 32 * c, n = whole ? 32 : dim - at;
                __m512i low, high;
                interleave(first ? load_pairs(values[i] + at, n) : __m512i{},
                           second ? load_pairs(values[i + 1] + at, n) : __m512i{}, low, high);
                for (int r = 0; r < R; r++) {
                    uint32_t word;
                    std::memcpy(&word, (const bf16*)(weights + r * (KEY_TILE + KEYS)) + i, sizeof word);
                    if (!first) word &= 0xffff0000u;
                    if (!second) word &= 0xffffu;
                    const __m512i weight = _mm512_set1_epi32((int)word);
                    acc[r][2 * c] = dot(acc[r][2 * c], weight, low);
                    acc[r][2 * c + 1] = dot(acc[r][2 * c + 1], weight, high);
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int c = 0; c < 2 * C; c++) store(out + r * out_row + d + c * W, acc[r][c]);
    }

    static void in_order(float* out, int dim) {
        for (int d = 0; d < dim; d += 32) {
            vf low = load(out + d), high = load(out + d + W);
            ::in_order(low, high);
            store(out + d, low), store(out + d + W, high);
        }
    }
};

template <typename T>
using SumsOf = std::conditional_t<std::is_same_v<T, bf16>, PairSums, FloatSums<T>>;
#else
template <typename T>
using SumsOf = FloatSums<T>;
#endif

template <typename T>
struct Decode {
    typedef WordsOf<T> Words;
    typedef SumsOf<T> Sums;
    typedef typename Words::Product Product;

    // Lives in a thread's scratch memory; behind it the rows' outputs and queries, and some keys.
    alignas(64) float scores[UNIT_HEADS][KEY_TILE + KEYS];  // those of the last rows may lie behind the last key
    float most[UNIT_HEADS], total[UNIT_HEADS];
    const T* rows[KEY_TILE];
    int64_t offsets[PARTITION];

    static int64_t bytes(int dim) {
        const int words = UNIT_HEADS * (Words::columns(dim) + Words::steps(dim)) + 2 * KEYS * Words::steps(dim);
        return round_up(sizeof(Decode), 64) + words * (int64_t)sizeof(uint32_t);
    }

    // Keys [i, end) of the unit in one head, which lies `step` elements after the first, as the rows of a tile.
    INLINE void find(const T* cache, const Unit& u, int i, int end, int64_t step) {
        for (int j = i; j < end; j++) rows[(u.begin + j) % KEY_TILE] = cache + offsets[j] + step;
    }

    // What is read next, into the second-level cache. Into the first-level cache it would come too fast: a fourth
    // slower.
    INLINE void fetch(const T* cache, int i, int end, int64_t step, int dim) const {
        for (int j = i; j < end; j++)
            for (int d = 0; d < dim; d += 64 / (int)sizeof(T)) prefetch_far(cache + offsets[j] + step + d);
    }

    // visit(from, to, row): pieces of the tile's keys [begin, end) of the unit, and in each the heads, in the order in
    // which they lie. `then`: the other cache, of which [next, …) follows.
    template <typename Visit>
    INLINE void read(const T* cache, const T* then, int next, const Attention& a, const Unit& u, int begin, int end,
                     const Visit& visit) {
        const int piece = a.block_size < 16 ? 16 : a.block_size > 64 ? 64 : a.block_size, keys = u.end - u.begin;
        const int64_t head_step = (int64_t)a.block_size * a.dim;
        for (int i = begin, stop; i < end; i = stop) {
            stop = std::min(end, i + piece - (u.begin + i) % piece);
            for (int head = 0; head < u.kv_heads; head++) {
                find(cache, u, i, stop, head * head_step);
                if (head + 1 < u.kv_heads)
                    fetch(cache, i, stop, (head + 1) * head_step, a.dim);
                else if (stop < end)
                    fetch(cache, stop, std::min(end, stop + piece), 0, a.dim);
                else
                    fetch(then, next, std::min(keys, next + piece), 0, a.dim);
                const int from = (u.begin + i) % KEY_TILE;
                visit(from, from + stop - i, head * a.heads);
            }
        }
    }

    // The tile's keys [at, at + KEYS) as columns; those from `to` on are zero.
    INLINE void transpose_keys(int at, int to, int dim, int steps, uint32_t* staged, uint32_t* transposed) const {
#if defined(__AVX2__) && !defined(__AVX512F__)
        if constexpr (std::is_same_v<T, float>) {  // from where they lie; bfloat16 is faster by way of a copy
            for (int i = 0; i < KEYS; i += 8)
                for (int d = 0; d < steps; d += 8) {
                    __m256 r[8];
                    for (int k = 0; k < 8; k++)
                        r[k] = at + i + k < to && d < dim ? load(rows[at + i + k] + d, dim - d) : vf{};
                    transpose8(r, (float*)transposed + d * KEYS + i, KEYS);
                }
            return;
        }
#endif
        for (int i = 0; i < KEYS; i++) {
            if (at + i < to)
                Words::words(rows[at + i], dim, staged + i * steps);
            else
                std::memset(staged + i * steps, 0, steps * sizeof(uint32_t));
        }
        transpose(staged, steps, transposed, KEYS, KEYS, steps);
    }

    // Scores of some rows at keys [from, to) of the tile, by KEYS transposed ones.
    template <int R>
    INLINE void score(const uint32_t* q, int row, const uint32_t* keys, int at, int steps) {
        gemm_block<Product, R, KEYS / W>(q, steps, keys, KEYS, &scores[row][at], KEY_TILE + KEYS, steps, false);
    }

    template <int R>
    INLINE void accumulate(int row, int from, int to, int dim, float* out, int out_row) const {
        constexpr int C = 8 / R < 4 ? 8 / R : 4;
        const float* weights = scores[row];
        int d = 0;
        for (; d + C * Sums::LANES <= dim; d += C * Sums::LANES)
            Sums::template columns<R, C, true>(weights, rows, from, to, dim, d, out, out_row);
        for (; d < dim; d += Sums::LANES)
            Sums::template columns<R, 1, false>(weights, rows, from, to, dim, d, out, out_row);
    }

    void run(const Attention& a, const Unit& u) {
        const int keys = u.end - u.begin, dim = a.dim, all = rows_of(a, u);
        const int steps = Words::steps(dim), columns = Words::columns(dim);
        float* out = (float*)((char*)this + round_up(sizeof(Decode), 64));
        uint32_t* q = (uint32_t*)(out + UNIT_HEADS * columns);
        uint32_t *staged = q + UNIT_HEADS * steps, *transposed = staged + KEYS * steps;
        locate(a, u, u.begin, u.end, offsets);
        for (int row = 0; row < all; row++) {
            Words::words(query<T>(a, u, row), dim, q + row * steps);
            most[row] = -INF, total[row] = 0;
        }
        std::memset(out, 0, all * columns * sizeof(float));
        const float scale = a.scale * LOG2E;
        for (int begin = 0, end; begin < keys; begin = end) {
            end = std::min(keys, begin + KEY_TILE - (u.begin + begin) % KEY_TILE);
            const int first = (u.begin + begin) % KEY_TILE, last = first + end - begin, width = round_up(last, 16);
            const auto *k = (const T*)a.keys, *v = (const T*)a.values;
            read(k, v, begin, a, u, begin, end, [&](int from, int to, int row) {
                for (int at = from; at < to; at += KEYS) {
                    transpose_keys(at, to, dim, steps, staged, transposed);
                    int r = row;
                    for (; r + 4 <= row + a.heads; r += 4) score<4>(q + r * steps, r, transposed, at, steps);
                    for (; r + 2 <= row + a.heads; r += 2) score<2>(q + r * steps, r, transposed, at, steps);
                    if (r < row + a.heads) score<1>(q + r * steps, r, transposed, at, steps);
                }
            });
            for (int row = 0; row < all; row++) {
                soften(scores[row], width, first, last, scale, most[row], total[row], out + row * columns, columns);
                Words::weights(scores[row], width);
            }
            read(v, k, end, a, u, begin, end, [&](int from, int to, int row) {
                int r = row;
                for (; r + 4 <= row + a.heads; r += 4) accumulate<4>(r, from, to, dim, out + r * columns, columns);
                for (; r + 2 <= row + a.heads; r += 2) accumulate<2>(r, from, to, dim, out + r * columns, columns);
                if (r < row + a.heads) accumulate<1>(r, from, to, dim, out + r * columns, columns);
            });
        }
        for (int row = 0; row < all; row++) {
            Sums::in_order(out + row * columns, dim);
            finish_row<T>(a, u, row, out + row * columns, most[row], total[row]);
        }
    }
};
