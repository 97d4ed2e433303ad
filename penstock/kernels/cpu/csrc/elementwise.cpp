// Entry points of rows.h: the rows of a tensor, shared between threads.

#include "rows.h"
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

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int n, float eps, int threads) {
    for_rows(rows, n, threads, [=](int64_t r) { norm_row(x + r * n, weight, out + r * n, n, eps); });
}

template <typename T>
void norm_rotate(T* x, int64_t stride, const T* weight, const T* cos, const T* sin, int64_t rows, int heads, int dim,
                 int width, float eps, int threads) {
    for_rows(rows, heads * dim, threads, [=](int64_t r) {
        rotate_heads(x + r * stride, weight, heads, dim, eps, cos + r * width, sin + r * width, width);
    });
}

// Of rows [x], or [gate | up], in which `x` and `out` are n wide.
template <typename T>
void activate(const T* x, T* out, int64_t rows, int n, int kind, bool gated, int threads) {
    const int64_t row = gated ? 2 * (int64_t)n : n;
    for_rows(rows, n, threads, [=](int64_t r) {
        const T *from = x + r * row, *up = gated ? from + n : nullptr;
        T* to = out + r * n;
        if (kind == SILU) return activate_row<SILU>(from, up, to, n);
        if (kind == GELU) return activate_row<GELU>(from, up, to, n);
        activate_row<GELU_TANH>(from, up, to, n);
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

void penstock_activate(const void* x, void* out, int64_t rows, int n, int kind, int gated, int threads, int is_bf16) {
    BOTH(activate((const bf16*)x, (bf16*)out, rows, n, kind, gated, threads),
         activate((const float*)x, (float*)out, rows, n, kind, gated, threads));
}
}
