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

#include "words.h"

template <typename T>
struct Prefill {
    typedef WordsOf<T> Words;
    typedef typename Words::Product Product;

    // The parts of a thread's scratch memory.
    struct Memory {
        uint32_t *q, *k, *v, *staged;
        float *s, *o, *most, *total;              // of the part under way
        float *all, *all_most, *all_total;        // of the parts before it
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
            all = (float*)take(rows * columns);
            all_most = (float*)take(rows);
            all_total = (float*)take(rows);
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

    // Whether a tile's packed values are all numbers.
    static bool finite(const uint32_t* v, int words) {
        vi broken{};
        for (int i = 0; i < words; i += W) {
            const vu word = load(v + i);
            for (const uint32_t exponent : Words::exponents) broken |= (vi)((word & exponent) == (vu{} + exponent));
        }
        int32_t lanes[W], any = 0;
        std::memcpy(lanes, &broken, sizeof lanes);
        for (int i = 0; i < W; i++) any |= lanes[i];
        return any == 0;
    }

    // The keys of a tile that a row sees, [from, to).
    struct Seen {
        int from, to;

        Seen(const Attention& a, const Unit& u, int tile, int row) {
            const int position = a.starts[u.span] + u.first + row / a.heads;
            from = u.begin - tile, to = (position + 1 < u.end && !a.both ? position + 1 : u.end) - tile;
            if (a.window && position - a.window + 1 - tile > from) from = position - a.window + 1 - tile;
        }

        INLINE bool nothing() const { return from >= KEY_TILE || to <= 0 || from >= to; }
    };

    // Adds a tile's weighted values, row by row, each with nothing but what it sees: where there is a NaN or inf, a
    // weight of zero hides nothing. Keys are not needed any more; their memory takes the values.
    static void add_values_apart(const Attention& a, const Unit& u, const Memory& m, const Tile& tile, int first,
                                 int keys) {
        const int columns = Words::columns(a.dim);
        for (int row = 0; row < u.tokens * a.heads; row++) {
            const Seen seen(a, u, first, row);
            if (seen.nothing()) continue;
            const T* values[KEY_TILE] = {};
            for (int i = std::max(seen.from, tile.from); i < std::min(seen.to, tile.to); i++)
                values[i] = (const T*)a.values + tile.offsets[i];
            Words::values(values, keys, a.dim, columns, m.k);
            for (int d = 0; d < columns; d += W)
                gemm_block<Product, 1, 1>((uint32_t*)m.s + row * KEY_TILE, KEY_TILE, m.k + d, columns,
                                          m.o + row * columns + d, columns, Words::key_steps(keys), true);
        }
    }

    static void run(const Attention& a, const Unit& u, char* scratch) {
        const int heads = a.heads, rows = u.tokens * heads, padded = round_up(rows, ROWS);
        const int steps = Words::steps(a.dim), columns = Words::columns(a.dim);
        const bool one_part = u.begin / PARTITION == (u.end - 1) / PARTITION;
        Memory m(scratch, a.dim, TILE_ROWS > heads ? TILE_ROWS : heads);
        for (int row = 0; row < rows; row++) {
            Words::words(query<T>(a, u, row), a.dim, m.q + row * steps);
            m.most[row] = -INF, m.total[row] = 0;
            m.all_most[row] = -INF, m.all_total[row] = 0;
        }
        std::memset(m.q + rows * steps, 0, (padded - rows) * steps * sizeof(uint32_t));
        std::memset(m.o, 0, padded * columns * sizeof(float));
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
                next.fetch(a, row, rows);
                const Seen seen(a, u, tile, row);
                float* s = m.s + row * KEY_TILE;
                if (seen.nothing())
                    std::memset(s, 0, width * sizeof *s);
                else
                    soften(s, width, seen.from, seen.to, scale, m.most[row], m.total[row], m.o + row * columns, columns);
                Words::weights(s, width);
            }
            if (finite(m.v, Words::key_steps(keys) * columns))
                gemm<Product>((uint32_t*)m.s, KEY_TILE, m.v, columns, m.o, columns, padded, columns,
                              Words::key_steps(keys), true);
            else
                add_values_apart(a, u, m, here, tile, keys);
            if (!one_part && ((tile + KEY_TILE) % PARTITION == 0 || tile + KEY_TILE >= u.end)) end_part(m, rows, columns);
        }
        for (int row = 0; row < rows; row++) {
            if (one_part)
                finish_row<T>(a, u, row, m.o + row * columns, m.most[row], m.total[row]);
            else
                finish_row<T>(a, u, row, m.all + row * columns, m.all_most[row], m.all_total[row]);
        }
    }

    // Adds a part to what the rows have of those before it, and begins the next one.
    static void end_part(const Memory& m, int rows, int columns) {
        for (int row = 0; row < rows; row++) {
            add_part(m.all_most[row], m.all_total[row], m.all + row * columns, m.most[row], m.total[row],
                     m.o + row * columns, columns);
            m.most[row] = -INF, m.total[row] = 0;
        }
        std::memset(m.o, 0, rows * columns * sizeof(float));
    }
};
