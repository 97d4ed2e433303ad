// Products of floats with a weight of floats, or of bfloat16 that becomes floats on the way: for processors that have
// nothing better, and for whoever wants a row's bits to depend on it alone.
//
//     float      [N / 64][64 / STRIP][K    ][STRIP]
//     bfloat16   [N / 64][64 / STRIP][K / 2][STRIP][2]     pairs of k; K is rounded up to 2, with zeros
//
// A strip is what a block of ROWS rows keeps in registers. An output is summed from the first k to the last, in one
// accumulator, whatever the rows and threads beside it.

#pragma once

#include "linear.h"

constexpr int STRIP = VECTORS * W;
constexpr int STRIPS = PANEL / STRIP;

// The words of a strip: an input's weights, or two of them.
struct FloatWeight {
    static constexpr int KS = 1;

    static INLINE vf part(vu word, int) { return (vf)word; }
};

struct WideWeight {
    static constexpr int KS = 2;

    static INLINE vf part(vu word, int k) { return (vf)(k ? word & 0xffff0000u : word << 16); }
};

// c[r][s · STRIP …] += x[r] · strips s … s + S of a panel, for inputs [first, last); strips lie `stride` words apart.
template <typename Weight, int R, int S>
INLINE void strips(const uint32_t* x, int x_row, const uint32_t* w, int64_t stride, float* c, int steps) {
    vf acc[R][S * VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < S * VECTORS; v++) acc[r][v] = load(c + r * PANEL + v * W);
    for (int k = 0; k < steps; k++, w += STRIP, x += Weight::KS)
        for (int i = 0; i < Weight::KS; i++)
            for (int s = 0; s < S; s++) {
                vf weight[VECTORS];
                for (int v = 0; v < VECTORS; v++) weight[v] = Weight::part(load(w + s * stride + v * W), i);
                for (int r = 0; r < R; r++) {
                    float input;
                    std::memcpy(&input, x + (int64_t)r * x_row + i, sizeof input);
                    for (int v = 0; v < VECTORS; v++)
                        acc[r][s * VECTORS + v] = fma(splat(input), weight[v], acc[r][s * VECTORS + v]);
                }
            }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < S * VECTORS; v++) store(c + r * PANEL + v * W, acc[r][v]);
}

// All of a panel. Few rows take several strips at once: one sum would wait for itself.
template <typename Weight, int R>
void float_panel(const uint32_t* x, int x_row, const uint32_t* weight, int depth, int first, int last, float* c) {
    constexpr int most = R == 1 ? 4 : R <= 3 ? 2 : 1, S = most < STRIPS ? most : STRIPS;
    const int64_t stride = (int64_t)round_up(depth, Weight::KS) / Weight::KS * STRIP;
    const uint32_t* w = weight + (int64_t)first / Weight::KS * STRIP;
    const int steps = (last - first + Weight::KS - 1) / Weight::KS;
    for (int s = 0; s < STRIPS; s += S)
        strips<Weight, R, S>(x + first, x_row, w + s * stride, stride, c + s * STRIP, steps);
}
