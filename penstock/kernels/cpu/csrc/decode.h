// One query token: the heads that share a KV head against at most PARTITION keys, read in place.
//
// Memory is the limit here, so a key and a value are read once and serve all heads. The scores of all keys
// fit in the first-level cache, hence an ordinary softmax; heads are taken four, two or one at a time.

#pragma once

#include <type_traits>

#include "attention.h"

constexpr int AHEAD = 12;  // rows of keys or values to prefetch

// Arithmetic on float vectors, for any cache type.
template <typename T>
struct Floats {
    typedef float Query;
    static constexpr int LANES = W;  // dimensions per vector

    static INLINE int width(int dim) { return round_up(dim, W); }

    static void queries(const Attention& a, const Unit& u, float* to) {
        for (int row = 0; row < a.heads; row++, to += width(a.dim))
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
            for (int i = 0; i < 4; i++) scores[r * PARTITION + i] = sum(acc[r][i]);
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
                for (int r = 0; r < R; r++) acc[r][c] += value * weights[r * PARTITION + i];
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
        for (int row = 0; row < a.heads; row++, to += width(a.dim))
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
            _mm_storeu_ps(scores + r * PARTITION, sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
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
                const float* w = weights + r * PARTITION + i;
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

    // Lives in a thread's scratch memory.
    alignas(64) float scores[DECODE_HEADS][PARTITION];
    const T* rows[PARTITION + 4];
    int64_t offsets[PARTITION];

    static int64_t bytes(int dim) {
        const int width = round_up(dim, 64);
        return round_up(sizeof(Decode), 64) + DECODE_HEADS * width * (int64_t)(sizeof(float) + sizeof(Query));
    }

    void find(const T* cache, int keys) {
        for (int i = 0; i < keys; i++) rows[i] = cache + offsets[i];
        for (int i = keys; i < keys + 4; i++) rows[i] = rows[keys - 1];  // four_scores reads fours
    }

    static INLINE void fetch(const T* row, int dim) {
        for (int d = 0; d < dim; d += 64 / (int)sizeof(T)) prefetch(row + d);
    }

    template <int R>
    INLINE void score(const Query* q, int head, int i, int dim) {
        if (dim % Math::LANES == 0)
            Math::template four_scores<R, true>(q, rows + i, dim, &scores[head][i]);
        else
            Math::template four_scores<R, false>(q, rows + i, dim, &scores[head][i]);
    }

    template <int R>
    INLINE void accumulate(int head, int begin, int end, int dim, float* out) {
        constexpr int C = 8 / R < 4 ? 8 / R : 4;
        const float* weights = &scores[head][begin];
        int d = 0;
        for (; d + C * Math::LANES <= dim; d += C * Math::LANES)
            Math::template columns<R, C, true>(weights, rows + begin, end - begin, dim, d, out);
        for (; d < dim; d += Math::LANES)
            Math::template columns<R, 1, false>(weights, rows + begin, end - begin, dim, d, out);
    }

    // scale · scores to weights 2^(score - most), in units of log2; returns their sum.
    static float softmax(float* s, int keys, float scale, float& most) {
        const int whole = round_up(keys, W);
        for (int i = keys; i < whole; i++) s[i] = -INF;
        vf top = splat(-INF), total{};
        for (int i = 0; i < whole; i += W) {
            vf x = load(s + i) * scale;
            if (i + W > keys)
                for (int lane = keys - i; lane < W; lane++) x[lane] = -INF;  // the sign of scale is free
            store(s + i, x);
            top = max(x, top);
        }
        most = max(top);
        const float base = most == -INF ? 0.0f : most;
        for (int i = 0; i < whole; i += W) {
            vf weight = exp2(load(s + i) - base);
            store(s + i, weight);
            total += weight;
        }
        return sum(total);
    }

    void run(const Attention& a, const Unit& u) {
        const int keys = u.end - u.begin, dim = a.dim, heads = a.heads, width = Math::width(dim);
        char* after = (char*)this + round_up(sizeof(Decode), 64);
        float* out = (float*)after;
        Query* q = (Query*)(out + DECODE_HEADS * round_up(dim, 64));
        locate(a, u, u.begin, u.end, offsets);
        Math::queries(a, u, q);

        const T* values = (const T*)a.values;
        find((const T*)a.keys, keys);
        for (int i = 0; i < keys; i += 4) {
            for (int j = i + AHEAD; j < i + AHEAD + 4; j++)
                fetch(j < keys ? rows[j] : values + offsets[j - keys < keys ? j - keys : 0], dim);
            int head = 0;
            for (; head + 4 <= heads; head += 4) score<4>(q + head * width, head, i, dim);
            for (; head + 2 <= heads; head += 2) score<2>(q + head * width, head, i, dim);
            if (head < heads) score<1>(q + head * width, head, i, dim);
        }

        float most[DECODE_HEADS], total[DECODE_HEADS];
        for (int head = 0; head < heads; head++)
            total[head] = softmax(scores[head], keys, a.scale * LOG2E, most[head]);

        find(values, keys);
        std::memset(out, 0, heads * width * sizeof(float));
        for (int i = 0; i < keys; i += AHEAD) {
            const int end = i + AHEAD < keys ? i + AHEAD : keys;
            for (int j = end; j < end + AHEAD && j < keys; j++) fetch(rows[j], dim);
            int head = 0;
            for (; head + 4 <= heads; head += 4) accumulate<4>(head, i, end, dim, out + head * width);
            for (; head + 2 <= heads; head += 2) accumulate<2>(head, i, end, dim, out + head * width);
            if (head < heads) accumulate<1>(head, i, end, dim, out + head * width);
        }
        for (int head = 0; head < heads; head++) {
            Math::in_order(out + head * width, dim);
            finish_row<T>(a, u, head, out + head * width, most[head], total[head]);
        }
    }
};
