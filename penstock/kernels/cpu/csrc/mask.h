// Conditions on the lanes of a vector, and what can be done with them: bits with AVX512, whole lanes elsewhere.

#pragma once

#include "simd.h"

#if defined(__AVX512F__)

typedef __mmask16 Mask;

INLINE Mask at_least(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
INLINE Mask but_not(Mask a, Mask b) { return a & (Mask)~b; }
INLINE bool any(Mask m) { return m; }
INLINE int number_of(Mask m) { return __builtin_popcount(m); }
INLINE vf where(Mask m, vf v) { return (vf)_mm512_maskz_mov_ps(m, (__m512)v); }

// Calls use(i) for the lanes i below n in which the condition holds, in order.
template <typename Use>
INLINE void for_lanes(Mask m, int n, const Use& use) {
    for (unsigned set = n < W ? m & ((1u << n) - 1) : m; set; set &= set - 1) use(__builtin_ctz(set));
}

// Stores the lanes in which the condition holds, side by side, and garbage behind them; returns their number.
INLINE int pack(float* to, Mask m, vf v) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(m, (__m512)v));  // compressing to memory directly is slow
    return number_of(m);
}

#else

typedef vi Mask;

INLINE Mask at_least(vf a, vf b) { return (vi)(a >= b); }
INLINE Mask but_not(Mask a, Mask b) { return a & ~b; }
INLINE vf where(Mask m, vf v) { return (vf)(m & (vi)v); }

INLINE int number_of(Mask m) {
    int32_t lanes[W], total = 0;
    std::memcpy(lanes, &m, sizeof lanes);
    for (int i = 0; i < W; i++) total -= lanes[i];
    return total;
}

INLINE bool any(Mask m) { return number_of(m); }

template <typename Use>
INLINE void for_lanes(Mask m, int n, const Use& use) {
    int32_t lanes[W];
    std::memcpy(lanes, &m, sizeof lanes);
    for (int i = 0; i < W && i < n; i++)
        if (lanes[i]) use(i);
}

INLINE int pack(float* to, Mask m, vf v) {
    int32_t lanes[W];
    float values[W];
    std::memcpy(lanes, &m, sizeof lanes);
    store(values, v);
    int count = 0;
    for (int i = 0; i < W; i++) {
        to[count] = values[i];
        count -= lanes[i];
    }
    return count;
}

#endif
