// A linear layer, as the members of a team do it together.

#pragma once

#include <algorithm>
#include <type_traits>

#include "linear.h"

// The part of a panel that many rows read from the second-level cache, in inputs k.
constexpr int CHUNK = 4096;
// Shares of a thread: enough to make up for a core that others use as well, few enough for long runs of memory.
constexpr int LOTS = 4;

// Rows of a block: as many as leave their sums, and a row of the panel, in registers.
constexpr int BLOCK_ROWS = 7;
INLINE int block_rows(const Linear& a) { return a.kind != BF16 && a.parts == 2 ? BLOCK_ROWS / 2 : BLOCK_ROWS; }

inline int64_t panel_bytes(const Linear& a) {
    switch (a.kind) {
        case BF16: return (int64_t)a.depth * PANEL * 2;
        case INT8: return (int64_t)round_up(a.depth, GROUP) * PANEL;
        default: return (int64_t)round_up(a.depth, GROUP) * PANEL / 2;
    }
}

// Reads the next panel while this one is multiplied. Without it, memory would rest from the second block of rows on,
// which finds the panel in the cache. Every block fetches its part. It goes to the second-level cache: in the first,
// it would push out what is being multiplied (a fifth slower at 8 rows).
struct NextPanel {
    const char *at, *end;

    INLINE void step() {
        if (at >= end) return;
        prefetch_far(at), prefetch_far(at + 64);
        at += 128;
    }
};

// What a block of rows needs to know.
struct Block {
    int panel, row, first, last;  // inputs [first, last)
    const char *fetch, *fetch_end;
    float* c;  // [rows][64], added to
};

template <int R, int P>
void integers(const Linear& a, const Activations& activations, const Block& b, const uint8_t* weight) {
    const IntegerPanel<R, P> panel_of(activations, b.row, b.c);
    if (a.kind == INT8) return panel_of.int8(weight, b.first / GROUP, b.last / GROUP);
    const int64_t at = (int64_t)b.panel * (round_up(a.depth, GROUP) / a.group) * PANEL;
    panel_of.int4(weight, a.group_scales + at, a.zeros + at, a.group, b.first / GROUP, b.last / GROUP);
}

template <typename T, int R>
void block(const Linear& a, const Activations& activations, const Block& b) {
    const uint8_t* weight = a.weight + b.panel * panel_bytes(a);
    if (a.kind == BF16) {
#if PENSTOCK_DOT
        if constexpr (std::is_same<T, bf16>::value) {
            const uint32_t* x = (const uint32_t*)((const bf16*)a.x + b.row * a.x_row + b.first);
            const uint32_t* w = (const uint32_t*)weight + b.first / 2 * PANEL;
            gemm_block<PairProduct, R, PANEL_VECTORS>(x, (int)(a.x_row / 2), w, PANEL, b.c, PANEL,
                                                      (b.last - b.first) / 2, true, NextPanel{b.fetch, b.fetch_end});
        }
#endif
        return;
    }
    if (a.parts == 1) return integers<R, 1>(a, activations, b, weight);
    if constexpr (R <= BLOCK_ROWS / 2) integers<R, 2>(a, activations, b, weight);
}

template <typename T>
void some_rows(const Linear& a, const Activations& activations, int count, const Block& b) {
    switch (count) {
        case 1: return block<T, 1>(a, activations, b);
        case 2: return block<T, 2>(a, activations, b);
        case 3: return block<T, 3>(a, activations, b);
        case 4: return block<T, 4>(a, activations, b);
        case 5: return block<T, 5>(a, activations, b);
        case 6: return block<T, 6>(a, activations, b);
        default: return block<T, 7>(a, activations, b);
    }
}

template <typename T>
void write_rows(const Linear& a, int panel, int row, int count, const float* c) {
    const int column = panel * PANEL, columns = std::min(PANEL, a.columns - column);
    for (int r = 0; r < count; r++)
        for (int i = 0; i < columns; i += W) {
            const int n = columns - i;
            vf value = load(c + r * PANEL + i);
            if (a.kind == INT8) value *= load(a.scales + column + i, n);
            if (a.bias) value += load((const T*)a.bias + column + i, n);
            T* out = (T*)a.out + (row + r) * a.out_row + column + i;
            store(out, a.adds ? load(out, n) + rounded(out, value) : value, n);
        }
}

// Of a deep layer, each thread keeps the sums of all rows between two parts of a panel.
inline int64_t sum_bytes(int rows, int depth) { return depth > CHUNK ? (int64_t)rows * PANEL * 4 : 0; }

inline int64_t activation_bytes(int kind, int rows, int depth) {
    return kind == BF16 ? 0 : Activations::bytes(rows, depth);
}

inline float* sums(const Linear& a, int thread) {
    return (float*)(a.scratch + activation_bytes(a.kind, a.rows, a.depth) + thread * sum_bytes(a.rows, a.depth));
}

template <typename T>
void multiply_panel(const Linear& a, const Activations& activations, int panel, bool more, int thread) {
    const int most = block_rows(a);
    const int blocks = (a.rows + most - 1) / most;
    const int depth = a.kind == BF16 ? a.depth : activations.depth;
    const bool whole = a.depth <= CHUNK;
    float own[BLOCK_ROWS * PANEL];
    float* const all = whole ? own : sums(a, thread);
    const int chunks = (depth + CHUNK - 1) / CHUNK;
    const char* following = (const char*)a.weight + (panel + 1) * panel_bytes(a);
    int64_t parts = blocks > 1 && more ? (int64_t)blocks * chunks : 0, part = 0;
    for (int first = 0; first < depth; first += CHUNK) {
        const int last = std::min(depth, first + CHUNK);
        for (int i = 0; i < blocks; i++) {
            const int row = (int)((int64_t)a.rows * i / blocks), end = (int)((int64_t)a.rows * (i + 1) / blocks);
            float* c = all + (whole ? 0 : row * PANEL);
            if (first == 0) std::fill(c, c + (end - row) * PANEL, 0.0f);
            const char *fetch = following, *fetch_end = following;
            if (parts) {
                fetch += panel_bytes(a) * part / parts / 64 * 64;
                fetch_end += panel_bytes(a) * ++part / parts / 64 * 64;
            }
            some_rows<T>(a, activations, end - row, {panel, row, first, last, fetch, fetch_end, c});
            if (last == depth) write_rows<T>(a, panel, row, end - row, c);
        }
    }
}

// The integers of the rows that fall to a thread; all must be there before any is multiplied.
template <typename T>
void quantize_rows(const Linear& a, int thread, int threads) {
    if (a.kind == BF16) return;
    Activations activations(a.scratch, a.rows, a.depth);
    int64_t first, last;
    share(a.rows, thread, threads, first, last);
    for (int64_t row = first; row < last; row++)
        activations.quantize((const T*)a.x + row * a.x_row, a.depth, (int)row, a.parts);
}

// Multiplies panels until there are none.
template <typename T>
void multiply_lots(const Linear& a, int thread, int threads, std::atomic<int>& next) {
    const Activations activations(a.scratch, a.rows, a.depth);
    const int panels = (a.columns + PANEL - 1) / PANEL;
    const int lot = std::max(1, panels / (LOTS * threads));
    for (int panel; (panel = next.fetch_add(lot, std::memory_order_relaxed)) < panels;)
        for (int end = std::min(panels, panel + lot); panel < end; panel++)
            multiply_panel<T>(a, activations, panel, panel + 1 < end, thread);
}

// Compiled once, in linear.cpp.
extern template void quantize_rows<bf16>(const Linear&, int, int);
extern template void quantize_rows<float>(const Linear&, int, int);
extern template void multiply_lots<bf16>(const Linear&, int, int, std::atomic<int>&);
extern template void multiply_lots<float>(const Linear&, int, int, std::atomic<int>&);
