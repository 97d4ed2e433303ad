// A stack of decoder layers in one call: what a step does between the embedding and the last norm.
//
//     x ─┬─ norm ─ qkv ─ (head norm) rotate ─ attention ─ out ─(+)─┬─ norm ─ gate, up ─ silu · ─ down ─(+)─
//        └─────────────────────────────────────────────────────────┘└────────────────────────────────────┘
//
// One team goes through all layers, with a barrier between two stages: some thousand calls and as many wakings of
// threads are one. Each stage computes and rounds as its own entry point does, so the result is the same to the
// last bit.
//
// All rows must leave keys and values of the last layer in the cache; beyond its attention, only the rows that are
// wanted go on: of a prompt's chunk one, or none.

#include <vector>

#include "attend.h"
#include "multiply.h"
#include "rows.h"

// Mirrored by penstock/kernels/cpu/decoder.py. The products' inputs, outputs and rows are set here.
struct DecoderLayer {
    const void *attention_norm, *mlp_norm;  // [hidden]
    const void* head_norm;                  // [heads + kv_heads, dim], or none
    const Linear *qkv, *out, *gate_up, *down;  // gate_up is gated
};

struct DecoderStep {
    void* x;  // [rows][hidden]: embedded tokens, then the sum after the last layer of the rows wanted
    void *normed, *heads, *attended, *active;
    const int32_t* wanted;  // ascending
    char* scratch;          // of activations
    const void *cos, *sin;  // [rows][rotary]
    const DecoderLayer* layers;
    const Attention* const* attention;  // per layer; its inputs, output and cache are set here
    void* const* caches;                // per layer: keys, values
    int32_t num_layers, rows, num_wanted, hidden, rotary, is_bf16, threads;
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

    // Moves the rows that are wanted to the front.
    void gather(T* x, int width) const {
        for (int i = 0; i < s.num_wanted; i++)
            if (s.wanted[i] != i) std::memcpy(x + (int64_t)i * width, x + (int64_t)s.wanted[i] * width, width * sizeof(T));
    }

    struct Member {
        Stack& stack;
        int thread, threads, rows = stack.s.rows, turn = 0, stage = 0;

        void wait() { stack.barrier.wait(threads, turn++); }

        template <typename Row>
        void each_row(const Row& row) const {
            int64_t first, last;
            share(rows, thread, threads, first, last);
            for (int64_t r = first; r < last; r++) row(r);
        }

        void norm(const void* weight) const {
            const int hidden = stack.s.hidden;
            const T* x = (const T*)stack.s.x;
            T* normed = (T*)stack.s.normed;
            each_row([=](int64_t r) {
                norm_row(x + r * hidden, (const T*)weight, normed + r * hidden, hidden, stack.s.eps);
            });
        }

        // out = x Wᵀ, or out += x Wᵀ. `then`: the product after this one, if there is one.
        void multiply(const Linear* weight, const void* x, void* out, bool adds, const Linear* then) {
            Linear a = *weight;
            a.x = x, a.out = out, a.scratch = stack.s.scratch;
            a.rows = rows, a.x_row = a.depth, a.out_row = a.gated ? a.columns / 2 : a.columns;
            a.adds = adds;
            quantize_rows<T>(a, thread, threads);  // this thread's own, or all have waited: none is being written
            wait();
            multiply_lots<T>(a, thread, threads, stack.next[stage++], then);
            wait();
        }

        // The queries and keys of this thread's rows; keys and values go to the cache.
        void rotate(const Attention& a, const void* head_norm) const {
            const DecoderStep& s = stack.s;
            T* heads = (T*)s.heads;
            const int rotated = a.kv_heads * (a.heads + 1);
            each_row([&](int64_t r) {
                rotate_heads(heads + r * a.q_token, (const T*)head_norm, rotated, a.dim, s.eps,
                             (const T*)s.cos + r * s.rotary, (const T*)s.sin + r * s.rotary, s.rotary);
                write_cache<T>(a, (int)r, (int)r + 1);
            });
        }

        void attend(const Attention& a) {
            if (thread == 0) start_groups(a);
            wait();
            attend_lots<T>(a, thread, stack.next[stage++]);
            wait();
        }

        // From here on, there are no rows but those that are wanted.
        void keep_wanted(const Attention& a) {
            const DecoderStep& s = stack.s;
            if (s.num_wanted == s.rows) return;
            if (thread == 0) stack.gather((T*)s.x, s.hidden);
            if (thread == threads - 1) stack.gather((T*)s.attended, (int)(a.kv_heads * a.heads * a.dim));
            wait();
            rows = s.num_wanted;
        }

        void layer(int number) {
            const DecoderStep& s = stack.s;
            const DecoderLayer& l = s.layers[number];
            const Attention& a = stack.attention[number];
            const bool last = number + 1 == s.num_layers;
            norm(l.attention_norm);
            multiply(l.qkv, s.normed, s.heads, false, l.out);
            rotate(a, l.head_norm);
            if (last && s.num_wanted == 0) return;
            attend(a);
            if (last) keep_wanted(a);
            multiply(l.out, s.attended, s.x, true, l.gate_up);
            norm(l.mlp_norm);
            multiply(l.gate_up, s.normed, s.active, false, l.down);
            multiply(l.down, s.active, s.x, true, last ? nullptr : s.layers[number + 1].qkv);
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
