// A stack of decoder layers in one call: what a step does between the embedding and the last norm.
//
//     x ─┬─ norm ─ qkv ─ (head norm) rotate ─ attention ─ out ─(+)─┬─ norm ─ gate, up ─ silu · ─ down ─(+)─
//        └─────────────────────────────────────────────────────────┘└────────────────────────────────────┘
//
// One team goes through all layers, with a barrier between two stages: some thousand calls and as many wakings of
// threads are one. Each stage computes and rounds as its own entry point does, so the result is the same to the
// last bit.

#include <vector>

#include "attend.h"
#include "multiply.h"
#include "rows.h"

// Mirrored by penstock/kernels/cpu/decoder.py. The products' inputs, outputs and rows are set here.
struct DecoderLayer {
    const void *attention_norm, *mlp_norm;  // [hidden]
    const void* head_norm;                  // [heads + kv_heads, dim], or none
    const Linear *qkv, *out, *gate_up, *down;
};

struct DecoderStep {
    void* x;  // [rows][hidden]: embedded tokens, then the sum after the last layer
    void *normed, *heads, *attended, *gate_up, *active;
    char* scratch;          // of activations
    const void *cos, *sin;  // [rows][rotary]
    const DecoderLayer* layers;
    const Attention* const* attention;  // per layer; its inputs, output and cache are set here
    void* const* caches;                // per layer: keys, values
    int32_t num_layers, rows, hidden, rotary, intermediate, is_bf16, threads;
    float eps;
};

namespace {

template <typename T>
struct Stack {
    const DecoderStep& s;
    std::vector<Attention> attention;
    std::vector<std::atomic<int>> next;
    Barrier barrier;

    explicit Stack(const DecoderStep& s) : s(s), next((size_t)s.num_layers * 5) {
        for (int i = 0; i < s.num_layers; i++) {
            attention.push_back(*s.attention[i]);
            Attention& a = attention.back();
            const int64_t q = a.kv_heads * a.heads, token = (q + 2 * a.kv_heads) * a.dim;
            T* heads = (T*)s.heads;
            a.q = heads, a.k = heads + q * a.dim, a.v = heads + (q + a.kv_heads) * a.dim;
            a.q_token = a.k_token = a.v_token = token;
            a.q_head = a.k_head = a.v_head = a.dim;
            a.out = s.attended;
            a.keys = s.caches[2 * i], a.values = s.caches[2 * i + 1];
        }
    }

    struct Member {
        Stack& stack;
        int thread, threads, turn = 0, stage = 0;

        void wait() { stack.barrier.wait(threads, turn++); }

        template <typename Row>
        void rows(const Row& row) const {
            int64_t first, last;
            share(stack.s.rows, thread, threads, first, last);
            for (int64_t r = first; r < last; r++) row(r);
        }

        // The rows of x are this thread's own work: they become integers without waiting.
        Linear product(const Linear* weight, const void* x, void* out, bool adds) const {
            Linear a = *weight;
            a.x = x, a.out = out, a.scratch = stack.s.scratch;
            a.rows = stack.s.rows, a.x_row = a.depth, a.out_row = a.columns;
            a.adds = adds;
            quantize_rows<T>(a, thread, threads);
            return a;
        }

        void multiply(const Linear& a) {
            wait();
            multiply_lots<T>(a, thread, threads, stack.next[stage++]);
            wait();
        }

        void layer(int number) {
            const DecoderStep& s = stack.s;
            const DecoderLayer& l = s.layers[number];
            const Attention& a = stack.attention[number];
            const int hidden = s.hidden, middle = s.intermediate;
            T *x = (T*)s.x, *normed = (T*)s.normed, *heads = (T*)s.heads, *gate_up = (T*)s.gate_up;
            T* active = (T*)s.active;

            rows([=](int64_t r) { norm_row(x + r * hidden, (const T*)l.attention_norm, normed + r * hidden, hidden, s.eps); });
            multiply(product(l.qkv, normed, heads, false));

            const int rotated = a.kv_heads * (a.heads + 1);
            rows([&](int64_t r) {
                rotate_heads(heads + r * a.q_token, (const T*)l.head_norm, rotated, a.dim, s.eps,
                             (const T*)s.cos + r * s.rotary, (const T*)s.sin + r * s.rotary, s.rotary);
                write_cache<T>(a, (int)r, (int)r + 1);
            });
            if (thread == 0) start_groups(a);
            wait();
            attend_lots<T>(a, thread, stack.next[stage++]);
            wait();
            multiply(product(l.out, s.attended, x, true));

            rows([=](int64_t r) { norm_row(x + r * hidden, (const T*)l.mlp_norm, normed + r * hidden, hidden, s.eps); });
            multiply(product(l.gate_up, normed, gate_up, false));
            rows([=](int64_t r) {
                silu_mul_row(gate_up + 2 * r * middle, gate_up + (2 * r + 1) * middle, active + r * middle, middle);
            });
            multiply(product(l.down, active, x, true));
        }
    };

    void run() {
        auto body = [&](int thread, int threads) {
            Member member{*this, thread, threads};
            for (int i = 0; i < s.num_layers; i++) member.layer(i);
        };
        run_team(s.threads, body);
    }
};

}  // namespace

extern "C" int penstock_decoder(const DecoderStep* s) {
    return guarded([=] { s->is_bf16 ? Stack<bf16>(*s).run() : Stack<float>(*s).run(); });
}
