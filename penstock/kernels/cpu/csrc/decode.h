// One query token against at most PARTITION keys, read in place.
//
// Memory is the limit here. A key and a value are read once and serve all query heads of their KV head, four,
// two or one at a time. They are read in the order in which they lie, the KV heads of a block one after the
// other: on a Zen 4 core runs of 32 KiB come at 14 GB/s, single pieces of 4 KiB at 9. Scores of all keys are
// kept, hence an ordinary softmax.

#pragma once

#include <algorithm>
#include <type_traits>

#include "attention.h"


// From the scores of one row to those of the next: four_scores may write beyond the last key.
constexpr int SCORES = PARTITION + 16;

// Arithmetic on float vectors, for any cache type.
template <typename T>
struct Floats {
    typedef float Query;
    static constexpr int LANES = W;  // dimensions per vector

    static INLINE int width(int dim) { return round_up(dim, W); }

    static void queries(const Attention& a, const Unit& u, float* to) {
        for (int row = 0; row < rows_of(a, u); row++, to += width(a.dim))
            for (int d = 0; d < a.dim; d += W) store(to + d, load(query<T>(a, u, row) + d, a.dim - d));
    }

    // scores[r][i] = q[r] · keys[i], for four keys.
    template <int R, bool whole>
    static INLINE void four_scores(const float* q, const T* const* keys, int dim, float* scores) {
        vf acc[R][4] = {};
        for (int d = 0; d < dim; d += W)
            for (int i = 0; i < 4; i++) {
                vf key = whole ? load(keys[i] + d) : load(keys[i] + d, dim - d);
                for (int r = 0; r < R; r++) acc[r][i] += load(q + r * width(dim) + d) * key;
            }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < 4; i++) scores[r * SCORES + i] = sum(acc[r][i]);
    }

    // out[r][…] += Σ weights[r][i] values[i], for C vectors of columns.
    template <int R, int C, bool whole>
    static INLINE void columns(const float* weights, const T* const* values, int keys, int dim, int d, float* out) {
        vf acc[R][C];
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) acc[r][c] = load(out + r * width(dim) + d + c * W);
        for (int i = 0; i < keys; i++)
            for (int c = 0; c < C; c++) {
                const T* at = values[i] + d + c * W;
                vf value = whole ? load(at) : load(at, dim - d - c * W);
                for (int r = 0; r < R; r++) acc[r][c] += value * weights[r * SCORES + i];
            }
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) store(out + r * width(dim) + d + c * W, acc[r][c]);
    }

    static void in_order(float*, int) {}
};

#if PENSTOCK_DOT

// Pairs of bfloat16: dimensions in the scores, keys in the output (whose probabilities are rounded to bfloat16).
struct Pairs {
    typedef bf16 Query;
    static constexpr int LANES = 32;

    static INLINE int width(int dim) { return round_up(dim, 32); }

    static void queries(const Attention& a, const Unit& u, bf16* to) {
        for (int row = 0; row < rows_of(a, u); row++, to += width(a.dim))
            for (int d = 0; d < a.dim; d += 32)
                _mm512_storeu_si512(to + d, load_pairs(query<bf16>(a, u, row) + d, a.dim - d));
    }

    template <int R, bool whole>
    static INLINE void four_scores(const bf16* q, const bf16* const* keys, int dim, float* scores) {
        vf acc[R][4] = {};
        for (int d = 0; d < dim; d += 32)
            for (int i = 0; i < 4; i++) {
                __m512i key = load_pairs(keys[i] + d, whole ? 32 : dim - d);
                for (int r = 0; r < R; r++)
                    acc[r][i] = dot(acc[r][i], _mm512_loadu_si512(q + r * width(dim) + d), key);
            }
        for (int r = 0; r < R; r++)
            _mm_storeu_ps(scores + r * SCORES, sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
    }

    template <int R, int C, bool whole>
    static INLINE void columns(const float* weights, const bf16* const* values, int keys, int dim, int d, float* out) {
        vf acc[R][2 * C];
        for (int r = 0; r < R; r++)
            for (int c = 0; c < 2 * C; c++) acc[r][c] = load(out + r * width(dim) + d + c * W);
        for (int i = 0; i < keys; i += 2) {
            const bool alone = i + 1 == keys;  // the key after the last is not ours to read
            __m512i weight[R];
            for (int r = 0; r < R; r++) {
                const float* w = weights + r * SCORES + i;
                __m128 pair = _mm_setr_ps(w[0], alone ? 0.0f : w[1], 0, 0);
                weight[r] = _mm512_broadcastd_epi32((__m128i)_mm_cvtneps_pbh(pair));
            }
            for (int c = 0; c < C; c++) {
                const int at = d + 32 * c, n = whole ? 32 : dim - at;
                __m512i low, high;
                interleave(load_pairs(values[i] + at, n),
                           alone ? __m512i{} : load_pairs(values[i + 1] + at, n), low, high);
                for (int r = 0; r < R; r++) {
                    acc[r][2 * c] = dot(acc[r][2 * c], weight[r], low);
                    acc[r][2 * c + 1] = dot(acc[r][2 * c + 1], weight[r], high);
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int c = 0; c < 2 * C; c++) store(out + r * width(dim) + d + c * W, acc[r][c]);
    }

    static void in_order(float* out, int dim) {
        for (int d = 0; d < dim; d += 32) {
            vf low = load(out + d), high = load(out + d + W);
            ::in_order(low, high);
            store(out + d, low), store(out + d + W, high);
        }
    }
};

#endif

template <typename T>
struct Decode {
#if PENSTOCK_DOT
    typedef std::conditional_t<std::is_same_v<T, bf16>, Pairs, Floats<T>> Math;
#else
    typedef Floats<T> Math;
#endif
    typedef typename Math::Query Query;

    // Lives in a thread's scratch memory, with the output and the queries of UNIT_HEADS rows after it.
    alignas(64) float scores[UNIT_HEADS][SCORES];
    const T* rows[64 + 4];
    int64_t offsets[PARTITION];

    static int64_t bytes(int dim) {
        return round_up(sizeof(Decode), 64) + UNIT_HEADS * round_up(dim, 64) * (int64_t)(sizeof(float) + sizeof(Query));
    }

    // The tile of keys that begins at i: rows of one head, which lies `step` elements after the first.
    INLINE void find(const T* cache, int i, int end, int64_t step) {
        for (int j = i; j < end; j++) rows[j - i] = cache + offsets[j] + step;
        for (int j = end; j < end + 4; j++) rows[j - i] = rows[end - 1 - i];  // four_scores reads fours
    }

    // What follows tile [i, end) of one head in reading order. Into the first-level cache it would come too fast:
    // a fourth slower.
    INLINE void fetch(const T* cache, int i, int end, int keys, int head, int heads, const Attention& a) {
        const int64_t piece = (int64_t)a.block_size * a.dim;
        const int count = end - i;
        const bool same = head + 1 < heads;
        for (int j = 0; j < count; j++) {
            const int key = same ? i + j : end + j;
            if (key >= keys) return;
            const T* row = cache + offsets[key] + (same ? (head + 1) * piece : 0);
            for (int d = 0; d < a.dim; d += 64 / (int)sizeof(T)) prefetch_far(row + d);
        }
    }

    template <int R>
    INLINE void score(const Query* q, int row, int at, int count, int dim) {
        for (int i = 0; i < count; i += 4) {
            if (dim % Math::LANES == 0)
                Math::template four_scores<R, true>(q, rows + i, dim, &scores[row][at + i]);
            else
                Math::template four_scores<R, false>(q, rows + i, dim, &scores[row][at + i]);
        }
    }

    template <int R>
    INLINE void accumulate(int row, int at, int count, int dim, float* out) {
        constexpr int C = 8 / R < 4 ? 8 / R : 4;
        const float* weights = &scores[row][at];
        int d = 0;
        for (; d + C * Math::LANES <= dim; d += C * Math::LANES)
            Math::template columns<R, C, true>(weights, rows, count, dim, d, out);
        for (; d < dim; d += Math::LANES)
            Math::template columns<R, 1, false>(weights, rows, count, dim, d, out);
    }

    // visit(at, count, head, row): tiles of keys, and in each the heads, in the order in which they lie.
    template <typename Visit>
    INLINE void read(const T* cache, const Attention& a, const Unit& u, const Visit& visit) {
        const int tile = a.block_size < 16 ? 16 : a.block_size > 64 ? 64 : a.block_size, keys = u.end - u.begin;
        for (int i = 0, end; i < keys; i = end) {
            end = std::min(keys, i + tile - (u.begin + i) % tile);
            for (int head = 0; head < u.kv_heads; head++) {
                find(cache, i, end, head * (int64_t)a.block_size * a.dim);
                fetch(cache, i, end, keys, head, u.kv_heads, a);
                visit(i, end - i, head * a.heads);
            }
        }
    }

    // scale · scores to weights 2^(score - most), in units of log2; returns their sum.
    static float softmax(float* s, int keys, float scale, float& most) {
        const int padded = round_up(keys, W);
        for (int i = keys; i < padded; i++) s[i] = -std::copysign(INF, scale);
        vf top = splat(-INF), total{};
        for (int i = 0; i < padded; i += W) top = max(load(s + i) * scale, top);
        most = max(top);
        const float base = most == -INF ? 0.0f : most;
        for (int i = 0; i < padded; i += W) {
            vf weight = exp2(load(s + i) * scale - base);
            store(s + i, weight);
            total += weight;
        }
        return sum(total);
    }

    void run(const Attention& a, const Unit& u) {
        const int keys = u.end - u.begin, dim = a.dim, width = Math::width(dim), all = rows_of(a, u);
        float* out = (float*)((char*)this + round_up(sizeof(Decode), 64));
        Query* q = (Query*)(out + UNIT_HEADS * round_up(dim, 64));
        locate(a, u, u.begin, u.end, offsets);
        Math::queries(a, u, q);
        read((const T*)a.keys, a, u, [&](int at, int count, int row) {
            const int end = row + a.heads;
            for (; row + 4 <= end; row += 4) score<4>(q + row * width, row, at, count, dim);
            for (; row + 2 <= end; row += 2) score<2>(q + row * width, row, at, count, dim);
            if (row < end) score<1>(q + row * width, row, at, count, dim);
        });
        float most[UNIT_HEADS], total[UNIT_HEADS];
        for (int row = 0; row < all; row++) total[row] = softmax(scores[row], keys, a.scale * LOG2E, most[row]);
        std::memset(out, 0, all * width * sizeof(float));
        read((const T*)a.values, a, u, [&](int at, int count, int row) {
            const int end = row + a.heads;
            for (; row + 4 <= end; row += 4) accumulate<4>(row, at, count, dim, out + row * width);
            for (; row + 2 <= end; row += 2) accumulate<2>(row, at, count, dim, out + row * width);
            if (row < end) accumulate<1>(row, at, count, dim, out + row * width);
        });
        for (int row = 0; row < all; row++) {
            Math::in_order(out + row * width, dim);
            finish_row<T>(a, u, row, out + row * width, most[row], total[row]);
        }
    }
};
