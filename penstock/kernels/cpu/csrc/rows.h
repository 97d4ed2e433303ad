// One row of what stands between two matrix products: norms, rotations, activations.
//
// Values are rounded where the torch code of penstock/model/layers.py rounds them, so that both agree to the last
// bit but for the order of sums.

#pragma once

#include "simd.h"

// 1 / sqrt(mean of squares + eps)
template <typename T>
INLINE float inverse_rms(const T* x, int n, float eps) {
    vf squares[2]{};
    int i = 0;
    for (; i + 2 * W <= n; i += 2 * W)
        for (int j = 0; j < 2; j++) {
            vf v = load(x + i + j * W);
            squares[j] += v * v;
        }
    for (; i < n; i += W) {
        vf v = load(x + i, n - i);
        squares[0] += v * v;
    }
    return 1.0f / std::sqrt(sum(squares[0] + squares[1]) / n + eps);
}

// out = x / rms(x) · weight
template <typename T>
INLINE void norm_row(const T* x, const T* weight, T* out, int n, float eps) {
    const float factor = inverse_rms(x, n, eps);
    for (int i = 0; i < n; i += W)
        store(out + i, rounded(x, load(x + i, n - i) * factor) * load(weight + i, n - i), n - i);
}

// One head, in place: the optional norm, then the rotation of the first `width` dimensions, whose halves are pairs.
template <typename T>
INLINE void head(T* x, const T* weight, int dim, float eps, const T* cos, const T* sin, int width) {
    if (weight) norm_row(x, weight, x, dim, eps);
    const int half = width / 2;
    for (int i = 0; i < half; i += W) {
        const int n = half - i;
        vf a = load(x + i, n), b = load(x + half + i, n);
        // sin carries the minus of the first half
        vf first = rounded(x, a * load(cos + i, n)) + rounded(x, b * load(sin + i, n));
        vf second = rounded(x, b * load(cos + half + i, n)) + rounded(x, a * load(sin + half + i, n));
        store(x + i, first, n);
        store(x + half + i, second, n);
    }
}

// All heads of a token, side by side.
template <typename T>
INLINE void rotate_heads(T* x, const T* weight, int heads, int dim, float eps, const T* cos, const T* sin, int width) {
    for (int h = 0; h < heads; h++) head(x + h * dim, weight ? weight + h * dim : nullptr, dim, eps, cos, sin, width);
}

// The activations of penstock/kernels/cpu/elementwise.py, by number.
enum { SILU = 0, GELU = 1, GELU_TANH = 2 };

template <int kind>
INLINE vf activated(vf x) {
    if (kind == SILU) return x / (1.0f + exp2(x * -LOG2E));
    if (kind == GELU_TANH) {  // 0.5 (1 + tanh y) is 1 / (1 + e^-2y)
        const vf y = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        return x / (1.0f + exp2(y * (-2 * LOG2E)));
    }
    // x · Φ(x); the complement of the error function by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7
    const vf z = (x < 0.0f ? -x : x) * 0.7071067811865476f;
    const vf t = 1.0f / (1.0f + 0.3275911f * z);
    vf p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = (p * t + 0.254829592f) * t;
    const vf half = 0.5f * p * exp2(z * z * -LOG2E);
    return x * (x < 0.0f ? half : 1.0f - half);
}

// activation(x), or activation(x) · up.
template <int kind, typename T>
INLINE void activate_row(const T* x, const T* up, T* out, int n) {
    for (int i = 0; i < n; i += W) {
        const vf value = activated<kind>(load(x + i, n - i));
        store(out + i, up ? rounded(out, value) * load(up + i, n - i) : value, n - i);
    }
}
