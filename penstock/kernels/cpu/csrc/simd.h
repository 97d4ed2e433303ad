// Vectors of one register, bfloat16, exp2: the vocabulary of the kernels.
//
// Everything is written with the vector extensions of GCC and Clang, so it compiles for any processor; `W` is
// the number of float lanes of the widest register that the target has. Intrinsics stand where the extensions
// have no words: the AVX512-BF16 dot product and shuffles (PENSTOCK_DOT), behind the compiler's own macros.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define PENSTOCK_DOT 1
#else
#define PENSTOCK_DOT 0
#endif

#if defined(__AVX512F__)
#define PENSTOCK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PENSTOCK_VECTOR_BYTES 32
#else
#define PENSTOCK_VECTOR_BYTES 16
#endif

#define INLINE inline __attribute__((always_inline))

constexpr int W = PENSTOCK_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(PENSTOCK_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(PENSTOCK_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(PENSTOCK_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(PENSTOCK_VECTOR_BYTES / 2)));

struct bf16 {
    uint16_t bits;
};

constexpr float LOG2E = 1.4426950408889634f;
constexpr float INF = std::numeric_limits<float>::infinity();

INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

INLINE vf splat(float x) { return x - vf{}; }

// ------------------------------------------------------------------------------------------ loads and stores

INLINE vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf load(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

INLINE vu load(const uint32_t* p) {
    vu v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest even; a NaN stays one.
INLINE void store(bf16* p, vf v) {
#if PENSTOCK_DOT
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
    vu u = (vu)v;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vh h = __builtin_convertvector(v == v ? rounded : (u >> 16) | 0x40u, vh);
#endif
    std::memcpy(p, &h, sizeof h);
}

// The first n lanes; the others are zero, and their memory is not touched.
template <typename T>
INLINE vf load(const T* p, int n) {
    if (n >= W) return load(p);
    T lanes[W] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}

template <typename T>
INLINE void store(T* p, vf v, int n) {
    if (n >= W) return store(p, v);
    T lanes[W];
    store(lanes, v);
    std::memcpy(p, lanes, n * sizeof(T));
}

// What x becomes in memory of type T, as a float again.
INLINE vf rounded(const float*, vf x) { return x; }

INLINE vf rounded(const bf16*, vf x) {
    bf16 lanes[W];
    store(lanes, x);
    return load(lanes);
}

INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Into the second-level cache only.
INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// ------------------------------------------------------------------------------------------------ arithmetic

INLINE vf max(vf a, vf b) { return a > b ? a : b; }

// a · b + c, rounded once where the processor can. Written out where bits must be those of another loop: whether the
// compiler makes one of two operations depends on what stands around them.
INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float a[W];
    std::memcpy(a, &v, sizeof v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
#endif
}

INLINE float max(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float a[W];
    std::memcpy(a, &v, sizeof v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
    return a[0];
#endif
}

INLINE vi max(vi a, vi b) { return a > b ? a : b; }

INLINE int32_t max(vi v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t most = v[0];
    for (int i = 1; i < W; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

INLINE int32_t sum(vi v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t all = 0;
    for (int i = 0; i < W; i++) all += v[i];
    return all;
#endif
}

// 2^x, relative error below 3e-7; 0 where that would be below the smallest normal number or a little later,
// infinity where it would be above the greatest or a little earlier (from 2^127.5 on), NaN for NaN. The polynomial
// has the least greatest relative error on [-1/2, 1/2] among those with p(0) = 1: 1.1e-7.
INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
    // of the operands of min and max, the second survives when one is NaN
    __m512 y = _mm512_min_ps(_mm512_set1_ps(200.0f), _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x));
    __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf f = (vf)_mm512_sub_ps(y, whole);
#else
    const vf rounder = splat(12582912.0f);  // 1.5 · 2^23: adding it leaves no fraction bits
    vf y = x < -126.0f ? splat(-126.0f) : x;
    y = y > 128.0f ? splat(128.0f) : y;
    vf whole = y + rounder;
    vf f = y - (whole - rounder);
#endif
    vf p = f * 1.3264727e-3f + 9.671513e-3f;
    p = p * f + 5.5507336e-2f;
    p = p * f + 2.4022242e-1f;
    p = p * f + 6.93147e-1f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, whole);
#else
    vf scale = (vf)(((vi)whole + 127) << 23);  // the integer sits in the low bits; 128 makes infinity
    return x < -126.0f ? vf{} : p * scale;
#endif
}

// --------------------------------------------------------------------------------- pairs of bfloat16 (AVX512)

#if PENSTOCK_DOT

INLINE __m512i load_pairs(const bf16* p, int n) {
    if (n >= 32) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p);
}

// acc[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1]
INLINE vf dot(vf acc, __m512i a, __m512i b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}

// Sums of four vectors, in one.
INLINE __m128 sums(vf a, vf b, vf c, vf d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Even lanes of the result are a's, odd lanes b's; their order is that of unpacklo and unpackhi (see in_order).
INLINE void interleave(__m512i a, __m512i b, __m512i& low, __m512i& high) {
    low = _mm512_unpacklo_epi16(a, b);
    high = _mm512_unpackhi_epi16(a, b);
}

// 32 floats that belong to the lanes of interleave, in the order of the rows that were interleaved.
INLINE void in_order(vf& low, vf& high) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    __m512 a = (__m512)low, b = (__m512)high;
    low = (vf)_mm512_permutex2var_ps(a, first, b);
    high = (vf)_mm512_permutex2var_ps(a, second, b);
}

#endif
