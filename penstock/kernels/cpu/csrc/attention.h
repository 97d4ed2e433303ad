// Paged attention of one step: its inputs, its units of work, and what the two kernels share.
//
//     unit    some KV heads of one span, a tile of its query tokens, a range of its keys
//     row     of a unit: one query token, one query head
//     group   the units that have the same rows and different keys; whoever finishes last combines them
//     lot     consecutive units of roughly equal total cost; a free thread takes the next lot
//
// A row's bits depend on its query and on the keys and values that it sees, in order, and on nothing else: not on the
// other rows of its unit, the other spans of its step, the threads, or on how many tokens its span has. Both kernels
// therefore compute the same thing in the same order, which lies at absolute positions of keys:
//
//     score     the sum over dimensions, from the first to the last
//     tile      of KEY_TILE keys: online softmax (`soften`), weighted values added one key after the other
//     part      of PARTITION keys: tiles one after the other; parts are added in order (`add_part`)
//
// A unit is one part, or all of a span's. What a row does not see has no part in it, not even with a weight of zero:
// zero times NaN is NaN.

#pragma once

#include "simd.h"

// Keys of one part. The parts of a span of more than SPLIT_TOKENS tokens are one unit.
constexpr int PARTITION = 512;
constexpr int SPLIT_TOKENS = 4;
// One query token with at most so many heads per KV head goes to the decode kernel.
constexpr int DECODE_HEADS = 8;
// A decode unit has so many query heads at most: their scores stay in the second-level cache.
constexpr int UNIT_HEADS = 32;
// Keys of one tile of the prefill kernel, and its rows (query tokens times heads per KV head) at most.
constexpr int KEY_TILE = 128;
constexpr int TILE_ROWS = 192;
// A span that begins before this has half as many: of the keys beyond the diagonal, fewer are computed in vain.
constexpr int LONG_START = 256;

struct Unit {
    int32_t span;
    int32_t head, kv_heads;  // the first KV head, and how many
    int32_t first, tokens;   // query tokens of the span
    int32_t begin, end;      // positions of keys
    int32_t group;           // -1: the unit is alone and writes to `out`
    int32_t part;
};

struct Group {
    int32_t first_row;  // in `partials`: parts × rows, each row {max, sum, out[dim]}
    int32_t parts;
};

// Mirrored by penstock/kernels/cpu/library.py. Strides are in elements; the last dimension is dense.
struct Attention {
    const void *q, *k, *v;
    void *keys, *values;  // [blocks, kv_heads, block_size, dim]
    void* out;            // [tokens, kv_heads * heads, dim]
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    const int32_t *starts, *lengths, *rows;  // per span: first position, tokens, first flat row
    const int64_t* table_at;                 // per span: where its block table begins in `tables`
    const int32_t* tables;
    const int64_t* slots;  // per token
    const Unit* units;
    const Group* groups;
    const int32_t* lots;  // first unit of each lot, and the end
    float* partials;
    int32_t* remaining;  // per group, set by the call
    char* scratch;       // threads × scratch_bytes
    int64_t scratch_bytes;
    int32_t spans, tokens, num_units, num_groups, num_lots;
    int32_t kv_heads, heads, dim, block_size;  // heads: query heads per KV head
    int32_t window;                            // 0: none
    int32_t threads;
    int32_t both;                              // directions: each query sees its whole span
    float scale;
};

// Element offsets of the keys (and values) at positions [begin, end), for the unit's first head.
INLINE void locate(const Attention& a, const Unit& u, int begin, int end, int64_t* offsets) {
    const int32_t* table = a.tables + a.table_at[u.span];
    const int64_t piece = (int64_t)a.block_size * a.dim;
    int block = begin / a.block_size, inside = begin % a.block_size;
    for (int i = 0; i < end - begin; block++, inside = 0) {
        int64_t at = ((int64_t)table[block] * a.kv_heads + u.head) * piece + (int64_t)inside * a.dim;
        for (; inside < a.block_size && i < end - begin; inside++, at += a.dim) offsets[i++] = at;
    }
}

INLINE int rows_of(const Attention& a, const Unit& u) { return u.tokens * u.kv_heads * a.heads; }

template <typename T>
INLINE const T* query(const Attention& a, const Unit& u, int row) {
    const int heads = u.kv_heads * a.heads;  // of one token
    int64_t token = a.rows[u.span] + u.first + row / heads;
    return (const T*)a.q + token * a.q_token + (u.head * a.heads + row % heads) * a.q_head;
}

template <typename T>
INLINE T* output(const Attention& a, const Unit& u, int row) {
    const int heads = u.kv_heads * a.heads;
    int64_t token = a.rows[u.span] + u.first + row / heads;
    return (T*)a.out + (token * a.kv_heads * a.heads + u.head * a.heads + row % heads) * a.dim;
}

INLINE float* partial(const Attention& a, const Unit& u, int part, int row) {
    const int64_t first = a.groups[u.group].first_row + (int64_t)part * rows_of(a, u);
    return a.partials + (first + row) * (a.dim + 2);
}

// Scores of a row at the keys of one tile to weights; keys outside [from, to) of the tile are hidden. Rescales what the
// row has. Compiled once: inlined, it would be contracted to other sums here and there.
__attribute__((noinline)) inline void soften(float* s, int width, int from, int to, float scale, float& most,
                                             float& total, float* o, int columns) {
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

// What a row has of the parts so far, and the next part. A part of which it sees nothing changes nothing.
__attribute__((noinline)) inline void add_part(float& most, float& total, float* all, float part_most, float part_total,
                                               const float* part, int dim) {
    if (part_most == -INF && part_total == 0) return;
    if (most == -INF && total == 0) {
        most = part_most, total = part_total;
        std::memcpy(all, part, dim * sizeof(float));
        return;
    }
    const float next = std::fmax(most, part_most);
    const float mine = most == next ? 1.0f : std::exp2(most - next);
    const float its = part_most == next ? 1.0f : std::exp2(part_most - next);
    most = next;
    total = total * mine + part_total * its;
    for (int d = 0; d < dim; d += W)
        store(all + d, load(all + d, dim - d) * mine + load(part + d, dim - d) * its, dim - d);
}

template <typename T>
INLINE void divide(T* out, const float* values, float total, int dim) {
    const vf factor = splat(1.0f / total);
    for (int d = 0; d < dim; d += W) store(out + d, load(values + d, dim - d) * factor, dim - d);
}

// Ends a row: values / total to `out`, or everything to `partials`. `most` is in units of log2.
template <typename T>
INLINE void finish_row(const Attention& a, const Unit& u, int row, const float* values, float most, float total) {
    if (u.group < 0) return divide(output<T>(a, u, row), values, total, a.dim);
    float* to = partial(a, u, u.part, row);
    to[0] = most, to[1] = total;
    std::memcpy(to + 2, values, a.dim * sizeof(float));
}

// Ends a unit; the last one of a group adds the parts, in order, to the first one.
template <typename T>
void finish_unit(const Attention& a, const Unit& u) {
    if (u.group < 0) return;
    if (__atomic_sub_fetch(a.remaining + u.group, 1, __ATOMIC_ACQ_REL) != 0) return;
    for (int row = 0; row < rows_of(a, u); row++) {
        float* all = partial(a, u, 0, row);
        for (int i = 1; i < a.groups[u.group].parts; i++) {
            const float* part = partial(a, u, i, row);
            add_part(all[0], all[1], all + 2, part[0], part[1], part + 2, a.dim);
        }
        divide(output<T>(a, u, row), all + 2, all[1], a.dim);
    }
}
