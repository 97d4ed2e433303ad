// Everything between two matrix products, one pass each: norms, rotations, activations.
//
// Values are rounded where the torch code of penstock/model/layers.py rounds them, so that both agree to the last
// bit but for the order of sums. Rows are shared between threads.

#include "simd.h"
#include "team.h"

namespace {

// Elements that are worth a second thread.
constexpr int64_t GRAIN = 32768;

template <typename Row>
void for_rows(int64_t rows, int64_t width, int threads, const Row& row) {
    const int64_t most = 1 + rows * width / GRAIN;
    auto body = [&](int thread, int team) {
        int64_t first, last;
        share(rows, thread, team, first, last);
        for (int64_t i = first; i < last; i++) row(i);
    };
    run_team(most < threads ? (int)most : threads, body);
}

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

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int n, float eps, int threads) {
    for_rows(rows, n, threads, [=](int64_t r) { norm_row(x + r * n, weight, out + r * n, n, eps); });
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

template <typename T>
void norm_rotate(T* x, int64_t stride, const T* weight, const T* cos, const T* sin, int64_t rows, int heads, int dim,
                 int width, float eps, int threads) {
    for_rows(rows, heads * dim, threads, [=](int64_t r) {
        for (int h = 0; h < heads; h++)
            head(x + r * stride + h * dim, weight ? weight + h * dim : nullptr, dim, eps, cos + r * width,
                 sin + r * width, width);
    });
}

// out = silu(gate) · up of rows [gate | up]
template <typename T>
void silu_mul(const T* x, T* out, int64_t rows, int n, int threads) {
    for_rows(rows, n, threads, [=](int64_t r) {
        const T *gate = x + 2 * r * n, *up = gate + n;
        for (int i = 0; i < n; i += W) {
            vf g = load(gate + i, n - i);
            vf active = g / (1.0f + exp2(g * -LOG2E));
            store(out + r * n + i, rounded(x, active) * load(up + i, n - i), n - i);
        }
    });
}

}  // namespace

#define BOTH(call_bf16, call_float) \
    if (is_bf16)                    \
        call_bf16;                  \
    else                            \
        call_float

extern "C" {

void penstock_rms_norm(const void* x, const void* weight, void* out, int64_t rows, int n, float eps, int threads,
                       int is_bf16) {
    BOTH(rms_norm((const bf16*)x, (const bf16*)weight, (bf16*)out, rows, n, eps, threads),
         rms_norm((const float*)x, (const float*)weight, (float*)out, rows, n, eps, threads));
}

void penstock_norm_rotate(void* x, int64_t stride, const void* weight, const void* cos, const void* sin, int64_t rows,
                          int heads, int dim, int width, float eps, int threads, int is_bf16) {
    BOTH(norm_rotate((bf16*)x, stride, (const bf16*)weight, (const bf16*)cos, (const bf16*)sin, rows, heads, dim,
                     width, eps, threads),
         norm_rotate((float*)x, stride, (const float*)weight, (const float*)cos, (const float*)sin, rows, heads, dim,
                     width, eps, threads));
}

void penstock_silu_mul(const void* x, void* out, int64_t rows, int n, int threads, int is_bf16) {
    BOTH(silu_mul((const bf16*)x, (bf16*)out, rows, n, threads),
         silu_mul((const float*)x, (float*)out, rows, n, threads));
}
}
