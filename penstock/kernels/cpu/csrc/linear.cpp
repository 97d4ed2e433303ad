// Matrix products with packed weights; see linear.h.

#include <cmath>
#include <vector>

#include "multiply.h"

template void quantize_rows<bf16>(const Linear&, int, int);
template void quantize_rows<float>(const Linear&, int, int);
template void multiply_lots<bf16>(const Linear&, int, int, std::atomic<int>&, const Linear*);
template void multiply_lots<float>(const Linear&, int, int, std::atomic<int>&, const Linear*);

namespace {

template <typename T>
void multiply(const Linear& a) {
    std::atomic<int> next{0};
    Barrier quantized;
    auto body = [&](int thread, int threads) {
        quantize_rows<T>(a, thread, threads);
        quantized.wait(threads);
        multiply_lots<T>(a, thread, threads, next, nullptr);
    };
    run_team(a.threads, body);
}

// ---------------------------------------------------------------------------------------------------- packing

// Quantises as penstock/kernels/quantization.py does, bit for bit.
template <typename T>
struct Packer {
    const T* weight;  // [columns][depth]
    int columns, depth;
    std::vector<float> row;

    const float* column(int n) {
        row.assign(round_up(depth, GROUP), 0.0f);
        for (int i = 0; i < depth; i += W)
            store(row.data() + i, load(weight + (int64_t)n * depth + i, depth - i), depth - i);
        return row.data();
    }

    void int8(uint8_t* to, int group) {
        const int groups = round_up(depth, GROUP) / group;
        for (int n = 0; n < round_up(columns, PANEL); n++) {
            const float* w = n < columns ? column(n) : nullptr;
            for (int g = 0; g < groups; g++) {
                uint8_t* at = to + ((int64_t)(n / PANEL) * groups + g) * int8_bytes(group);
                float most = 0.0f, broken = 0.0f;
                for (int k = g * group; w && k < (g + 1) * group; k++)
                    most = std::max(most, std::fabs(w[k])), broken += w[k] * 0.0f;
                bf16 scale = nearest((broken == 0.0f ? most : 0.0f) / 127.0f);
                if (scale.bits == 0) scale.bits = 0x3f80;  // 1
                const float step = value(scale);
                // a group with a NaN or inf gives nothing but such numbers: they must not be hidden
                if (broken != 0.0f) scale.bits = 0x7fc0;
                ((bf16*)(at + group * PANEL))[n % PANEL] = scale;
                for (int k = 0; k < group; k++) {
                    const float q = w && broken == 0.0f ? std::nearbyintf(w[g * group + k] / step) : 0.0f;
                    at[k / 4 * 4 * PANEL + n % PANEL * 4 + k % 4] = (uint8_t)(128 + (int)std::max(-127.0f, std::min(127.0f, q)));
                }
            }
        }
    }

    void int4(uint8_t* to, bf16* scales, uint8_t* zeros, int group) {
        const int padded = round_up(depth, GROUP), groups = padded / group;
        for (int n = 0; n < round_up(columns, PANEL); n++) {
            uint8_t* panel = to + (int64_t)(n / PANEL) * padded * (PANEL / 2) + n % PANEL * 4;
            const float* w = n < columns ? column(n) : nullptr;
            for (int g = 0; g < groups; g++) {
                float low = 0.0f, high = 0.0f, broken = 0.0f;
                for (int k = g * group; w && k < std::min(depth, (g + 1) * group); k++)
                    low = std::min(low, w[k]), high = std::max(high, w[k]), broken += w[k] * 0.0f;
                if (broken != 0.0f) low = high = 0.0f;  // NaN or inf
                bf16 scale = nearest((high - low) / 15.0f);
                if (scale.bits == 0) scale.bits = 0x3f80;  // 1
                const float step = value(scale);
                if (broken != 0.0f) scale.bits = 0x7fc0;  // NaN: all that the group is multiplied with
                const float zero = std::min(15.0f, std::nearbyintf(-low / step));
                const int64_t at = ((int64_t)(n / PANEL) * groups + g) * PANEL + n % PANEL;
                scales[at] = scale, zeros[at] = (uint8_t)zero;
                for (int k = g * group; k < (g + 1) * group; k++) {
                    const float q = w ? std::nearbyintf(w[k] / step) + zero : zero;
                    const uint8_t bits = q > 0.0f ? (uint8_t)std::min(15.0f, q) : 0;  // 0 for a NaN
                    uint8_t* byte = panel + k / 8 * 4 * PANEL + k % 4;
                    *byte = k % 8 < 4 ? bits : (uint8_t)(*byte | bits << 4);
                }
            }
        }
    }

    static bf16 nearest(float x) {
        uint32_t u;
        std::memcpy(&u, &x, 4);
        return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
    }

    static float value(bf16 x) {
        const uint32_t u = (uint32_t)x.bits << 16;
        float f;
        std::memcpy(&f, &u, 4);
        return f;
    }
};

// A weight of floats, or pairs of bfloat16, in strips: see floats.h. T: as it came, and as it is kept.
template <typename T>
void pack_strips(const T* weight, int columns, int depth, T* to) {
    constexpr int KS = 4 / sizeof(T);
    const int padded = round_up(depth, KS);
    for (int n = 0; n < round_up(columns, PANEL); n++) {
        T* strip = to + (int64_t)(n / STRIP) * padded * STRIP + n % STRIP * KS;
        for (int k = 0; k < padded; k++)
            strip[(int64_t)(k / KS) * STRIP * KS + k % KS] = n < columns && k < depth ? weight[(int64_t)n * depth + k] : T{};
    }
}

// The weight that integers stand for, as bfloat16 panels.
void restore_panel(const Linear& a, int panel, bf16* to) {
    const int padded = round_up(a.depth, GROUP);
    const uint8_t* weight = a.weight + panel * panel_bytes(a);
    for (int k = 0; k < a.depth; k += 2)
        for (int v = 0; v < PANEL; v += W) {
            vf pair[2];
            for (int j = 0; j < 2; j++) {
                const int i = k + j, g = i / a.group, inside = i % a.group;
                float whole[W];
                if (a.kind == INT8) {
                    const uint8_t* at = weight + g * int8_bytes(a.group);
                    for (int n = 0; n < W; n++)
                        whole[n] = (float)at[inside / 4 * 4 * PANEL + (v + n) * 4 + inside % 4] - 128;
                    pair[j] = load(whole) * load((const bf16*)(at + a.group * PANEL) + v);
                } else {
                    const int64_t at = ((int64_t)panel * (padded / a.group) + g) * PANEL + v;
                    for (int n = 0; n < W; n++) {
                        const uint8_t both = weight[i / 8 * 4 * PANEL + (v + n) * 4 + i % 4];
                        whole[n] = (float)(i % 8 < 4 ? both & 15 : both >> 4) - (float)a.zeros[at + n];
                    }
                    pair[j] = load(whole) * load(a.scales + at);
                }
            }
            bf16 even[W], odd[W];
            store(even, pair[0]), store(odd, pair[1]);
            bf16* out = to + ((int64_t)k / 2 * PANEL + v) * 2;
            for (int n = 0; n < W; n++) out[2 * n] = even[n], out[2 * n + 1] = odd[n];
        }
}

}  // namespace

extern "C" {

// Bytes of scratch memory for so many rows: their integers, and what each thread keeps.
int64_t penstock_linear_scratch(int kind, int rows, int depth, int threads) {
    return linear_scratch(kind, rows, depth, threads);
}

void penstock_linear(const Linear* a) { a->is_bf16 ? multiply<bf16>(*a) : multiply<float>(*a); }

// Whether bfloat16 panels can be multiplied by this library.
int penstock_multiplies_bf16() { return PENSTOCK_DOT; }

// Whether the processor multiplies integers of eight bits; without, they are many times slower than floats.
int penstock_multiplies_integers() { return PENSTOCK_VNNI || PENSTOCK_USDOT; }

int penstock_pack_int8(const void* weight, int is_bf16, int columns, int depth, int group, uint8_t* to) {
    return guarded([=] {
        if (is_bf16)
            Packer<bf16>{(const bf16*)weight, columns, depth, {}}.int8(to, group);
        else
            Packer<float>{(const float*)weight, columns, depth, {}}.int8(to, group);
    });
}

int penstock_pack_int4(const void* weight, int is_bf16, int columns, int depth, int group, uint8_t* to, bf16* scales,
                       uint8_t* zeros) {
    return guarded([=] {
        if (is_bf16)
            Packer<bf16>{(const bf16*)weight, columns, depth, {}}.int4(to, scales, zeros, group);
        else
            Packer<float>{(const float*)weight, columns, depth, {}}.int4(to, scales, zeros, group);
    });
}

// Bytes of a float or bfloat16 weight in strips, and the packing of one.
int64_t penstock_strip_bytes(int is_bf16, int columns, int depth) {
    return (int64_t)round_up(columns, PANEL) * (is_bf16 ? round_up(depth, 2) * 2 : depth * 4);
}

void penstock_pack_strips(const void* weight, int is_bf16, int columns, int depth, void* to) {
    if (is_bf16)
        pack_strips((const bf16*)weight, columns, depth, (bf16*)to);
    else
        pack_strips((const float*)weight, columns, depth, (float*)to);
}

// Writes the integer weight of `a` as bfloat16 panels; depth is a multiple of 64.
void penstock_restore(const Linear* a, bf16* to) {
    const int panels = (a->columns + PANEL - 1) / PANEL;
    auto body = [&](int thread, int threads) {
        int64_t first, last;
        share(panels, thread, threads, first, last);
        for (int64_t p = first; p < last; p++) restore_panel(*a, (int)p, to + p * a->depth * PANEL);
    };
    run_team(a->threads, body);
}
}
