// A linear layer, as the members of a team do it together.

#pragma once

#include <algorithm>
#include <type_traits>

#include "floats.h"
#include "linear.h"
#include "rows.h"

// The part of a panel that many rows read from the second-level cache, in inputs k.
constexpr int CHUNK = 4096;
// Shares of a thread: enough to make up for a core that others use as well, few enough for long runs of memory.
constexpr int LOTS = 4;

// Rows of a block: as many as leave their sums, and a row of the panel, in registers.
constexpr int BLOCK_ROWS = 6;
INLINE bool is_integer(const Linear& a) { return a.kind == INT8 || a.kind == INT4; }
INLINE int block_rows(const Linear& a) {
    if (a.kind == FLOAT || a.kind == WIDE) return ROWS;
    return is_integer(a) ? integer_rows(a.parts) : BLOCK_ROWS;
}

inline int64_t panel_bytes(const Linear& a) {
    switch (a.kind) {
        case BF16: return (int64_t)a.depth * PANEL * 2;
        case FLOAT: return (int64_t)a.depth * PANEL * 4;
        case WIDE: return (int64_t)round_up(a.depth, 2) * PANEL * 2;
        case INT8: return round_up(a.depth, GROUP) / a.group * int8_bytes(a.group);
        default: return (int64_t)round_up(a.depth, GROUP) * PANEL / 2;
    }
}

// Loop steps of a block of rows, over so many inputs. (int4 does not read ahead: what it does to unpack leaves no room
// for that, it would be 6 % slower.)
INLINE int64_t steps_of(const Linear& a, int depth) {
    return a.kind == BF16 ? depth / 2 : std::max(1, depth / 4 * (PANEL_VECTORS / TOGETHER));
}

// What a block of rows needs to know.
struct Block {
    int panel, row, first, last;  // inputs [first, last)
    Fetch fetch;
    float* c;  // [rows][64], added to
};

template <int R, int P>
void integers(const Linear& a, const Activations& activations, const Block& b, const uint8_t* weight) {
    const IntegerPanel<R, P> panel_of(activations, b.row, b.c);
    if (a.kind == INT8) return panel_of.int8(weight, a.group, b.first, b.last, b.fetch);
    const int64_t at = (int64_t)b.panel * (round_up(a.depth, GROUP) / a.group) * PANEL;
    panel_of.int4(weight, a.scales + at, a.zeros + at, a.group, b.first, b.last);
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
                                                      (b.last - b.first) / 2, true, b.fetch);
        }
#endif
        return;
    }
    if constexpr (R <= ROWS) {
        if (a.kind == FLOAT) {
            const uint32_t* x = (const uint32_t*)a.x + b.row * a.x_row;
            return float_panel<FloatWeight, R>(x, (int)a.x_row, (const uint32_t*)weight, a.depth, b.first, b.last, b.c);
        }
        if (a.kind == WIDE) {
            const int row = round_up(a.depth, 2);
            const uint32_t* x = (const uint32_t*)a.scratch + (int64_t)b.row * row;
            return float_panel<WideWeight, R>(x, row, (const uint32_t*)weight, a.depth, b.first, b.last, b.c);
        }
    }
    if (a.parts == 1) {
        if constexpr (R <= integer_rows(1)) integers<R, 1>(a, activations, b, weight);
        return;
    }
    if constexpr (R <= integer_rows(2)) integers<R, 2>(a, activations, b, weight);
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

inline int panels_of(const Linear& a) { return (a.columns + PANEL - 1) / PANEL; }

// Of a deep layer, each thread keeps the sums of all rows between two parts of a panel.
inline int64_t sum_bytes(int rows, int depth) { return depth > CHUNK ? (int64_t)rows * PANEL * 4 : 0; }

// Of a gated layer, each thread keeps the gates of one panel until the other factor is there.
inline int64_t gate_bytes(int rows) { return (int64_t)rows * PANEL * 4; }

inline int64_t activation_bytes(int kind, int rows, int depth) {
    if (kind == BF16 || kind == FLOAT) return 0;
    if (kind == WIDE) return ((int64_t)rows * round_up(depth, 2) * 4 + 63) / 64 * 64;
    return Activations::bytes(rows, depth);
}

inline int64_t linear_scratch(int kind, int rows, int depth, int threads) {
    return activation_bytes(kind, rows, depth) + threads * (sum_bytes(rows, depth) + gate_bytes(rows));
}

// A thread's part of the scratch memory.
inline char* own_scratch(const Linear& a, int thread) {
    return a.scratch + linear_scratch(a.kind, a.rows, a.depth, thread);
}

// Where the columns of a panel go: to the output, or those of a gate to where its factor finds them.
template <typename T>
struct Target {
    T *at, *gates;  // of the first row; gates only for their factors
    int64_t row;    // from one row to the next

    Target(const Linear& a, int panel, int first, T* all_gates) {
        const int half = a.gated ? a.columns / 2 : 0, column = panel * PANEL;
        const bool is_gate = column < half;
        T* own = all_gates + first * PANEL;
        at = is_gate ? own : (T*)a.out + first * a.out_row + column - half;
        gates = half && !is_gate ? own : nullptr;
        row = is_gate ? PANEL : a.out_row;
    }

    // Has the memory of some rows ready for writing.
    INLINE void expect(int count) const {
        for (int r = 0; r < count; r++)
            for (int i = 0; i < PANEL; i += 64 / (int)sizeof(T)) __builtin_prefetch(at + r * row + i, 1, 3);
    }

    // Ends the sums of some rows: bias, activation, what is added to.
    void write(const Linear& a, int panel, int count, const float* c) const {
        const int column = panel * PANEL, columns = std::min(PANEL, a.columns - column);
        for (int i = 0; i < columns; i += W) {
            const int n = columns - i;
            const vf bias = a.bias ? load((const T*)a.bias + column + i, n) : vf{};
            for (int r = 0; r < count; r++) {
                vf value = load(c + r * PANEL + i);
                if (a.bias) value += bias;
                T* out = at + r * row + i;
                if (gates) value = rounded(out, activated<SILU>(load(gates + r * PANEL + i))) * rounded(out, value);
                store(out, a.adds ? load(out, n) + rounded(out, value) : value, n);
            }
        }
    }
};

// What is read meanwhile.
struct Following {
    const void* at;
    int64_t bytes;
};

template <typename T>
void multiply_panel(const Linear& a, const Activations& activations, int panel, const Following& following, int thread) {
    const int most = block_rows(a);
    const int blocks = (a.rows + most - 1) / most;
    const int depth = is_integer(a) ? activations.depth : a.depth;
    const bool whole = a.depth <= CHUNK;
    alignas(64) float own[BLOCK_ROWS * PANEL];
    char* const scratch = own_scratch(a, thread);
    float* const sums = (float*)scratch;
    T* const gates = (T*)(scratch + sum_bytes(a.rows, a.depth));
    // Memory would rest from the second block of rows on, which finds the panel in the cache.
    const int64_t steps = blocks * steps_of(a, depth);
    Fetch fetch{(const char*)following.at, std::min<int64_t>(128, (following.bytes + steps - 1) / steps)};
    for (int first = 0; first < depth; first += CHUNK) {
        const int last = std::min(depth, first + CHUNK);
        for (int i = 0; i < blocks; i++) {
            const int row = (int)((int64_t)a.rows * i / blocks), end = (int)((int64_t)a.rows * (i + 1) / blocks);
            float* c = whole ? own : sums + row * PANEL;
            if (first == 0) std::fill(c, c + (end - row) * PANEL, 0.0f);
            const Target<T> target(a, panel, row, gates);
            if (last == depth) target.expect(end - row);
            some_rows<T>(a, activations, end - row, {panel, row, first, last, fetch, c});
            fetch.at += fetch.pace * steps_of(a, last - first);
            if (last == depth) target.write(a, panel, end - row, c);
        }
    }
}

// The integers (or floats) of the rows that fall to a thread; all must be there before any is multiplied.
template <typename T>
void quantize_rows(const Linear& a, int thread, int threads) {
    if (a.kind == BF16 || a.kind == FLOAT) return;
    int64_t first, last;
    share(a.rows, thread, threads, first, last);
    if (a.kind == WIDE) {
        const int row = round_up(a.depth, 2);
        for (int64_t r = first; r < last; r++) {
            float* to = (float*)a.scratch + r * row;
            to[row - 1] = 0.0f;
            for (int i = 0; i < a.depth; i += W)
                store(to + i, load((const T*)a.x + r * a.x_row + i, a.depth - i), a.depth - i);
        }
        return;
    }
    Activations activations(a.scratch, a.rows, a.depth, a.parts);
    for (int64_t row = first; row < last; row++)
        activations.quantize((const T*)a.x + row * a.x_row, a.depth, (int)row);
}

// Panels in the order in which they are multiplied: of a gated layer, a gate's and then its factor's.
struct Order {
    const Linear& a;
    int panels, lot, first;  // the lots of a thread begin with panel `first` in this order

    Order(const Linear& a, int thread, int threads) : a(a), panels(panels_of(a)) {
        const int each = a.gated ? 2 : 1;
        lot = std::max(each, panels / (LOTS * threads) / each * each);
        first = thread * lot;
    }

    int panel(int i) const { return a.gated ? i % 2 * (panels / 2) + i / 2 : i; }

    Following following(int i) const { return {a.weight + panel(i) * panel_bytes(a), panel_bytes(a)}; }
};

// Multiplies panels until there are none. A thread's first lot is given, and it takes the next one before it
// multiplies the last panel of the one before: what follows is always known, and read ahead. What follows the last
// panel is the first of the product that comes `then`.
template <typename T>
void multiply_lots(const Linear& a, int thread, int threads, std::atomic<int>& taken, const Linear* then) {
    if (a.rows == 0) return;
    const Activations activations(a.scratch, a.rows, a.depth, a.parts);
    const Order order(a, thread, threads);
    for (int i = order.first, end = i + order.lot; i < order.panels;) {
        int next = i + 1;
        if (next == end) {
            next = (threads + taken.fetch_add(1, std::memory_order_relaxed)) * order.lot;
            end = next + order.lot;
        }
        Following following{a.weight, 0};
        if (next < order.panels) {
            following = order.following(next);
        } else if (then) {
            const Order after(*then, thread, threads);
            if (after.first < after.panels) following = after.following(after.first);
        }
        multiply_panel<T>(a, activations, order.panel(i), following, thread);
        i = next;
    }
}

// Compiled once, in linear.cpp.
extern template void quantize_rows<bf16>(const Linear&, int, int);
extern template void quantize_rows<float>(const Linear&, int, int);
extern template void multiply_lots<bf16>(const Linear&, int, int, std::atomic<int>&, const Linear*);
extern template void multiply_lots<float>(const Linear&, int, int, std::atomic<int>&, const Linear*);
