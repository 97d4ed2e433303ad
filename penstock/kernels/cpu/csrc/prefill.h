// Several query tokens (or many heads): tiles of rows against tiles of KEY_TILE keys, with an online softmax.
//
//     rows     row i is query token i / heads, head i % heads of the KV head
//     Q        [rows][steps]         words of the product, see gemm.h
//     K        [steps][KEY_TILE]     packed: transposed
//     S        [rows][KEY_TILE]      float scores, then words of the weights in place
//     V        [keys][columns]       packed
//     O        [rows][columns]       float, unnormalised
//
// A key or value that no query of the tile may see is not read: it is packed as zero and its score is -inf.

#pragma once

#include <algorithm>
#include <type_traits>

#include "attention.h"
#include "gemm.h"

// Words are floats, whatever the cache holds.
template <typename T>
struct FloatWords {
    typedef FloatProduct Product;
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

template <typename T>
struct Prefill {
#if PENSTOCK_DOT
    typedef std::conditional_t<std::is_same_v<T, bf16>, PairWords, FloatWords<T>> Words;
#else
    typedef FloatWords<T> Words;
#endif
    typedef typename Words::Product Product;

    // The parts of a thread's scratch memory.
    struct Memory {
        uint32_t *q, *k, *v, *staged;
        float *s, *o, *most, *total;
        int64_t bytes;

        Memory(char* base, int dim, int rows) {
            rows = round_up(rows, ROWS);
            const int steps = Words::steps(dim), columns = Words::columns(dim);
            char* at = base;
            auto take = [&](int64_t words) {
                char* mine = at;
                at += round_up(words * 4, 64);
                return mine;
            };
            q = (uint32_t*)take(rows * steps);
            k = (uint32_t*)take(steps * KEY_TILE);
            staged = (uint32_t*)take(steps * KEY_TILE);
            v = (uint32_t*)take(KEY_TILE * columns);
            s = (float*)take(rows * KEY_TILE);
            o = (float*)take(rows * columns);
            most = (float*)take(rows);
            total = (float*)take(rows);
            bytes = at - base;
        }
    };

    // A tile's keys at positions [first + from, first + to), as offsets into the cache; none if from >= to.
    struct Tile {
        int from, to;
        int64_t offsets[KEY_TILE];

        void find(const Attention& a, const Unit& u, int first) {
            from = std::max(u.begin - first, 0), to = std::min(u.end - first, KEY_TILE);
            if (from < to) locate(a, u, first + from, first + to, offsets + from);
        }

        // Part `part` of `parts` of its keys and values into the cache of the processor.
        INLINE void fetch(const Attention& a, int part, int parts) const {
            const int count = std::max(to - from, 0);
            for (int i = from + count * part / parts; i < from + count * (part + 1) / parts; i++)
                for (int d = 0; d < a.dim; d += 64 / (int)sizeof(T)) {
                    prefetch((const T*)a.keys + offsets[i] + d);
                    prefetch((const T*)a.values + offsets[i] + d);
                }
        }
    };

    // Keys (transposed) and values of a tile, with zeros for what is not there.
    static void pack(const Attention& a, const Memory& m, const Tile& tile) {
        const int steps = Words::steps(a.dim), columns = Words::columns(a.dim);
        const T* rows[KEY_TILE] = {};
        for (int i = 0; i < KEY_TILE; i++) {
            if (i >= tile.from && i < tile.to)
                Words::words((const T*)a.keys + tile.offsets[i], a.dim, m.staged + i * steps);
            else
                std::memset(m.staged + i * steps, 0, steps * sizeof(uint32_t));
        }
        transpose(m.staged, steps, m.k, KEY_TILE, KEY_TILE, steps);
        for (int i = tile.from; i < tile.to; i++) rows[i] = (const T*)a.values + tile.offsets[i];
        Words::values(rows, tile.to, a.dim, columns, m.v);
    }

    // Scores of a row to weights; keys outside [from, to) of the tile are hidden. Rescales what the row has.
    static INLINE void soften(float* s, int width, int from, int to, float scale, float& most, float& total, float* o,
                              int columns) {
        const float hidden = -std::copysign(INF, scale);
        for (int i = 0; i < from; i++) s[i] = hidden;
        for (int i = to; i < width; i++) s[i] = hidden;
        vf top = splat(-INF), sums{};
        for (int i = 0; i < width; i += W) top = max(load(s + i) * scale, top);
        const float next = std::fmax(most, max(top)), base = next == -INF ? 0.0f : next;
        for (int i = 0; i < width; i += W) {
            vf weight = exp2(load(s + i) * scale - base);
            sums += weight;
            store(s + i, weight);
        }
        if (next != most) {
            const float shrink = most == -INF ? 0.0f : std::exp2(most - next);
            total *= shrink;
            for (int d = 0; d < columns; d += W) store(o + d, load(o + d) * shrink);
            most = next;
        }
        total += sum(sums);
    }

    static void run(const Attention& a, const Unit& u, char* scratch) {
        const int heads = a.heads, rows = u.tokens * heads, padded = round_up(rows, ROWS);
        const int steps = Words::steps(a.dim), columns = Words::columns(a.dim);
        Memory m(scratch, a.dim, TILE_ROWS > heads ? TILE_ROWS : heads);
        for (int row = 0; row < rows; row++) {
            Words::words(query<T>(a, u, row), a.dim, m.q + row * steps);
            m.most[row] = -INF, m.total[row] = 0;
        }
        std::memset(m.q + rows * steps, 0, (padded - rows) * steps * sizeof(uint32_t));
        std::memset(m.o, 0, padded * columns * sizeof(float));
        const int start = a.starts[u.span] + u.first;
        const float scale = a.scale * LOG2E;
        Tile here, next;
        next.find(a, u, u.begin / KEY_TILE * KEY_TILE);
        for (int tile = u.begin / KEY_TILE * KEY_TILE; tile < u.end; tile += KEY_TILE) {
            here = next;
            next.find(a, u, tile + KEY_TILE);
            const int keys = u.end - tile < KEY_TILE ? u.end - tile : KEY_TILE, width = round_up(keys, 16);
            pack(a, m, here);
            gemm<Product>(m.q, steps, m.k, KEY_TILE, m.s, KEY_TILE, padded, width, steps, false);
            for (int row = 0; row < rows; row++) {
                const int position = start + row / heads;
                next.fetch(a, row, rows);
                int from = u.begin - tile, to = (position + 1 < u.end ? position + 1 : u.end) - tile;
                if (a.window && position - a.window + 1 - tile > from) from = position - a.window + 1 - tile;
                float* s = m.s + row * KEY_TILE;
                if (from >= KEY_TILE || to <= 0 || from >= to)
                    std::memset(s, 0, width * sizeof *s);
                else
                    soften(s, width, from, to, scale, m.most[row], m.total[row], m.o + row * columns, columns);
                Words::weights(s, width);
            }
            gemm<Product>((uint32_t*)m.s, KEY_TILE, m.v, columns, m.o, columns, padded, columns, Words::key_steps(keys),
                          true);
        }
        for (int row = 0; row < rows; row++)
            finish_row<T>(a, u, row, m.o + row * columns, m.most[row], m.total[row]);
    }
};
