// A library of kernels against naive loops, where there is no Python: under an emulator, for another processor.
//
//     self_test LIBRARY     prints its instructions and what it checked; status 1 with the first wrong number
//
// Inputs are small: this tells whether the instructions of a variant do what its code means, and no more. What the
// kernels compute in every corner is told by tests/kernels, on processors that are there.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "attention.h"
#include "linear.h"

namespace {

void* library;

template <typename F>
F* function(const char* name) {
    void* found = dlsym(library, name);
    if (!found) std::printf("no %s\n", name), std::exit(1);
    return (F*)found;
}

// The same numbers everywhere: in [-1, 1).
float next_number() {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(int32_t)state / 2147483648.0f;
}

bf16 to_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

float to_float(float x) { return x; }
float to_float(bf16 x) {
    const uint32_t u = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

void assign(float& to, float x) { to = x; }
void assign(bf16& to, float x) { to = to_bf16(x); }

template <typename T>
std::vector<T> random_numbers(size_t count) {
    std::vector<T> numbers(count);
    for (T& number : numbers) assign(number, next_number());
    return numbers;
}

template <typename T>
constexpr int is_bf16 = sizeof(T) == 2;

template <typename T>
void compare(const char* what, const std::vector<T>& got, const std::vector<double>& want, double tolerance) {
    for (size_t i = 0; i < want.size(); i++) {
        const double error = std::fabs(to_float(got[i]) - want[i]);
        if (!(error <= tolerance * (1 + std::fabs(want[i])))) {
            std::printf("%s: number %zu is %g, not %g\n", what, i, (double)to_float(got[i]), want[i]);
            std::exit(1);
        }
    }
    std::printf("%s%s: %zu numbers\n", what, is_bf16<T> ? " of bfloat16" : "", want.size());
}

// ------------------------------------------------------------------------------------------- norms, activations

template <typename T>
void check_rows(double tolerance) {
    const int rows = 3, width = 101;
    const auto x = random_numbers<T>(rows * width), weight = random_numbers<T>(width);
    std::vector<T> out(rows * width);
    std::vector<double> want;
    for (int r = 0; r < rows; r++) {
        double squares = 0;
        for (int i = 0; i < width; i++) squares += std::pow(to_float(x[r * width + i]), 2);
        for (int i = 0; i < width; i++)
            want.push_back(to_float(x[r * width + i]) / std::sqrt(squares / width + 1e-6) * to_float(weight[i]));
    }
    function<void(const T*, const T*, T*, int64_t, int, float, int, int)>("penstock_rms_norm")(
        x.data(), weight.data(), out.data(), rows, width, 1e-6f, 1, is_bf16<T>);
    compare("rms_norm", out, want, tolerance);

    std::vector<T> gated = random_numbers<T>(rows * 2 * width);
    assign(gated[0], 1e30f), assign(gated[1], -1e30f);
    want.clear();
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < width; i++) {
            const double gate = to_float(gated[2 * r * width + i]), up = to_float(gated[(2 * r + 1) * width + i]);
            want.push_back(gate / (1 + std::exp(-gate)) * up);
        }
    function<void(const T*, T*, int64_t, int, int, int, int, int)>("penstock_activate")(
        gated.data(), out.data(), rows, width, 0, 1, 1, is_bf16<T>);
    compare("silu_mul", out, want, tolerance);
}

// ------------------------------------------------------------------------------------------------ linear layers

template <typename T>
void check_integers(Kind kind, int parts, double tolerance) {
    const int rows = 5, columns = 70, depth = 200, group = 64;  // nothing is whole
    const int panels = (columns + PANEL - 1) / PANEL, padded = round_up(depth, GROUP);
    const auto x = random_numbers<T>(rows * depth), weight = random_numbers<T>(columns * depth);
    const int groups = padded / group;
    std::vector<uint8_t> zeros((size_t)panels * groups * PANEL);
    std::vector<uint8_t> packed(kind == INT8 ? panels * groups * int8_bytes(group) : (size_t)panels * padded * PANEL / 2);
    std::vector<bf16> scales(zeros.size());
    if (kind == INT8)
        function<int(const void*, int, int, int, int, uint8_t*)>("penstock_pack_int8")(
            weight.data(), is_bf16<T>, columns, depth, group, packed.data());
    else
        function<int(const void*, int, int, int, int, uint8_t*, bf16*, uint8_t*)>("penstock_pack_int4")(
            weight.data(), is_bf16<T>, columns, depth, group, packed.data(), scales.data(), zeros.data());

    std::vector<double> want;
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < columns; n++) {
            double sum = 0;
            for (int k = 0; k < depth; k++) {
                const int lane = n % PANEL * 4 + k % 4;
                const size_t of = (size_t)n / PANEL * groups + k / group, at = of * PANEL + n % PANEL;
                double w;
                if (kind == INT8) {
                    const uint8_t* there = packed.data() + of * int8_bytes(group);
                    const bf16* scale = (const bf16*)(there + group * PANEL) + n % PANEL;
                    w = (there[k % group / 4 * 4 * PANEL + lane] - 128.0) * (double)to_float(*scale);
                } else {
                    const int byte = packed[(size_t)n / PANEL * padded * PANEL / 2 + k / 8 * 4 * PANEL + lane];
                    w = ((k % 8 < 4 ? byte & 15 : byte >> 4) - zeros[at]) * (double)to_float(scales[at]);
                }
                sum += w * to_float(x[r * depth + k]);
            }
            want.push_back(sum);
        }

    std::vector<T> out(rows * columns);
    std::vector<char> scratch(function<int64_t(int, int, int, int)>("penstock_linear_scratch")(kind, rows, depth, 1));
    Linear a{};
    a.x = x.data(), a.out = out.data(), a.weight = packed.data(), a.scratch = scratch.data();
    a.scales = scales.data(), a.zeros = zeros.data();
    a.x_row = depth, a.out_row = columns, a.rows = rows, a.columns = columns, a.depth = depth;
    a.kind = kind, a.group = group, a.is_bf16 = is_bf16<T>, a.threads = 1, a.parts = parts;
    function<void(const Linear*)>("penstock_linear")(&a);
    compare(kind == INT4 ? "int4" : parts == 1 ? "w8a8" : "int8", out, want, tolerance);
}

template <typename T>
void check_floats(double tolerance) {
    const int rows = 9, columns = 70, depth = 201;
    const auto x = random_numbers<T>(rows * depth), weight = random_numbers<T>(columns * depth);
    std::vector<uint8_t> packed(function<int64_t(int, int, int)>("penstock_strip_bytes")(is_bf16<T>, columns, depth));
    function<void(const void*, int, int, int, void*)>("penstock_pack_strips")(weight.data(), is_bf16<T>, columns, depth,
                                                                              packed.data());
    std::vector<double> want;
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < columns; n++) {
            double sum = 0;
            for (int k = 0; k < depth; k++)
                sum += (double)to_float(weight[n * depth + k]) * to_float(x[r * depth + k]);
            want.push_back(sum);
        }
    std::vector<T> out(rows * columns), alone(columns);
    Linear a{};
    a.x = x.data(), a.out = out.data(), a.weight = packed.data();
    a.x_row = depth, a.out_row = columns, a.rows = rows, a.columns = columns, a.depth = depth;
    a.kind = is_bf16<T> ? WIDE : FLOAT, a.is_bf16 = is_bf16<T>, a.threads = 1;
    std::vector<char> scratch(function<int64_t(int, int, int, int)>("penstock_linear_scratch")(a.kind, rows, depth, 1));
    a.scratch = scratch.data();
    function<void(const Linear*)>("penstock_linear")(&a);
    compare("floats", out, want, tolerance);
    for (int r = 0; r < rows; r++) {  // the bits of a row depend on it alone
        a.x = x.data() + r * depth, a.out = alone.data(), a.rows = 1;
        function<void(const Linear*)>("penstock_linear")(&a);
        if (std::memcmp(alone.data(), out.data() + r * columns, columns * sizeof(T)) != 0) {
            std::printf("floats: row %d has other bits alone\n", r);
            std::exit(1);
        }
    }
}

// ---------------------------------------------------------------------------------------------------- attention

template <typename T>
void check_attention(double tolerance) {
    const int kv_heads = 2, heads = 3, dim = 40, block_size = 4, spans = 3, blocks = 24;
    const int32_t starts[spans] = {9, 0, 30}, lengths[spans] = {1, 6, 5}, first_rows[spans] = {0, 1, 7};
    const int tokens = 12;
    const int64_t table_at[spans] = {0, 3, 5};
    const int32_t tables[] = {3, 0, 5, 1, 2, 9, 4, 7, 6, 8, 20, 22, 23, 11};
    const int q_heads = kv_heads * heads;
    const auto q = random_numbers<T>(tokens * q_heads * dim), k = random_numbers<T>(tokens * kv_heads * dim),
               v = random_numbers<T>(tokens * kv_heads * dim);
    auto keys = random_numbers<T>(blocks * kv_heads * block_size * dim), values = random_numbers<T>(keys.size());
    std::vector<T> out(q.size());
    std::vector<int64_t> slots(tokens);
    for (int s = 0; s < spans; s++)
        for (int i = 0; i < lengths[s]; i++) {
            const int at = starts[s] + i;
            slots[first_rows[s] + i] = (int64_t)tables[table_at[s] + at / block_size] * block_size + at % block_size;
        }

    Attention a{};
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.keys = keys.data(), a.values = values.data(), a.out = out.data();
    a.q_token = q_heads * dim, a.q_head = dim, a.k_token = a.v_token = kv_heads * dim, a.k_head = a.v_head = dim;
    a.starts = starts, a.lengths = lengths, a.rows = first_rows, a.table_at = table_at, a.tables = tables;
    a.slots = slots.data(), a.spans = spans, a.tokens = tokens, a.kv_heads = kv_heads, a.heads = heads, a.dim = dim;
    a.block_size = block_size, a.threads = 1, a.scale = 0.3f;
    std::vector<int32_t> plan(4096);
    int64_t sizes[4];
    function<int(const Attention*, int32_t*, int64_t, int64_t*)>("penstock_plan")(&a, plan.data(), 4096, sizes);
    a.num_units = (int)sizes[0], a.num_groups = (int)sizes[1], a.num_lots = (int)sizes[2];
    a.units = (const Unit*)plan.data(), a.groups = (const Group*)(a.units + a.num_units);
    a.lots = (const int32_t*)(a.groups + a.num_groups);
    std::vector<float> partials(sizes[3] * (dim + 2) + 1);
    std::vector<int32_t> remaining(a.num_groups + 1);
    a.scratch_bytes = function<int64_t(int, int, int)>("penstock_scratch_bytes")(is_bf16<T>, heads, dim);
    std::vector<char> scratch(a.scratch_bytes + 64);
    a.scratch = (char*)(((uintptr_t)scratch.data() + 63) / 64 * 64);
    a.partials = partials.data(), a.remaining = remaining.data();
    function<void(const Attention*, int)>("penstock_attention")(&a, is_bf16<T>);

    std::vector<double> want;
    for (int s = 0; s < spans; s++)
        for (int i = 0; i < lengths[s]; i++)
            for (int h = 0; h < q_heads; h++) {
                std::vector<double> sums(dim);
                double total = 0;
                for (int at = 0; at <= starts[s] + i; at++) {
                    const int64_t block = tables[table_at[s] + at / block_size];
                    const int64_t key = ((block * kv_heads + h / heads) * block_size + at % block_size) * dim;
                    double score = 0;
                    for (int d = 0; d < dim; d++)
                        score += (double)to_float(q[((first_rows[s] + i) * q_heads + h) * dim + d]) * to_float(keys[key + d]);
                    const double weight = std::exp(score * 0.3f);
                    total += weight;
                    for (int d = 0; d < dim; d++) sums[d] += weight * to_float(values[key + d]);
                }
                for (int d = 0; d < dim; d++) want.push_back(sums[d] / total);
            }
    compare("attention", out, want, tolerance);
}

template <typename T>
void check_all(double rounding) {
    check_rows<T>(rounding);
    check_floats<T>(rounding + 1e-3);
    check_integers<T>(INT8, 2, rounding + 1e-3);
    check_integers<T>(INT8, 1, rounding + 0.05);
    check_integers<T>(INT4, 2, rounding + 1e-3);
    check_attention<T>(rounding);
}

}  // namespace

int main(int count, char** arguments) {
    library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
    if (!library) return std::printf("%s\n", count == 2 ? dlerror() : "usage: self_test LIBRARY"), 1;
    std::printf("%s\n", function<const char*()>("penstock_isa")());
    check_all<float>(1e-5);
    check_all<bf16>(1e-2);
}
