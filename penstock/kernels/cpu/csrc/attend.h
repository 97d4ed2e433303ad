// One layer's attention of a step, as the members of a team do it together.

#pragma once

#include "decode.h"
#include "prefill.h"
#include "team.h"

INLINE bool is_decode(const Attention& a, int tokens) { return tokens == 1 && a.heads <= DECODE_HEADS; }

// Writes the keys and values of the step's tokens [first, last) to the cache.
template <typename T>
void write_cache(const Attention& a, int first, int last) {
    const int64_t head_piece = (int64_t)a.block_size * a.dim;
    for (int token = first; token < last; token++) {
        const int64_t block = a.slots[token] / a.block_size, inside = a.slots[token] % a.block_size;
        for (int head = 0; head < a.kv_heads; head++) {
            const int64_t to = (block * a.kv_heads + head) * head_piece + inside * a.dim;
            const T* k = (const T*)a.k + token * a.k_token + head * a.k_head;
            const T* v = (const T*)a.v + token * a.v_token + head * a.v_head;
            std::memcpy((T*)a.keys + to, k, a.dim * sizeof(T));
            std::memcpy((T*)a.values + to, v, a.dim * sizeof(T));
        }
    }
}

// To be called before any thread attends.
inline void start_groups(const Attention& a) {
    for (int i = 0; i < a.num_groups; i++) a.remaining[i] = a.groups[i].parts;
}

// Computes lots until there are none. The cache must have been written.
template <typename T>
void attend_lots(const Attention& a, int thread, std::atomic<int>& next) {
    char* scratch = a.scratch + thread * a.scratch_bytes;
    for (int lot; (lot = next.fetch_add(1, std::memory_order_relaxed)) < a.num_lots;)
        for (int i = a.lots[lot]; i < a.lots[lot + 1]; i++) {
            const Unit& u = a.units[i];
            if (is_decode(a, a.lengths[u.span]))
                reinterpret_cast<Decode<T>*>(scratch)->run(a, u);
            else
                Prefill<T>::run(a, u, scratch);
            finish_unit<T>(a, u);
        }
}

// Compiled once, in attention.cpp.
extern template void attend_lots<bf16>(const Attention&, int, std::atomic<int>&);
extern template void attend_lots<float>(const Attention&, int, std::atomic<int>&);
