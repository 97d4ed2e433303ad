// Entry points of attention: cut a step into units of work, and compute a layer of it.

#include <algorithm>
#include <vector>

#include "attend.h"

template void attend_lots<bf16>(const Attention&, int, std::atomic<int>&);
template void attend_lots<float>(const Attention&, int, std::atomic<int>&);

namespace {

// Query tokens of a tile: as many as fit, fewer if the threads would have too little to share.
int query_tile(const Attention& a) {
    int tile = std::max(1, TILE_ROWS / a.heads);
    for (; tile > 1 && tile * a.heads > 16; tile /= 2) {
        int64_t units = 0;
        for (int s = 0; s < a.spans; s++)
            if (a.lengths[s] > 1) units += (a.lengths[s] + tile - 1) / tile * (int64_t)a.kv_heads;
        if (units == 0 || units >= 4 * a.threads) break;
    }
    return tile;
}

// KV heads of a decode unit: all, for long reads, or fewer if the threads would have too little to share.
int head_tile(const Attention& a) {
    int64_t units = 0;
    for (int s = 0; s < a.spans; s++)
        if (is_decode(a, a.lengths[s])) units += 1 + a.starts[s] / PARTITION;
    int tile = std::min(a.kv_heads, std::max(1, UNIT_HEADS / a.heads));
    while (tile > 1 && units * ((a.kv_heads + tile - 1) / tile) < 2 * a.threads) tile = (tile + 1) / 2;
    return tile;
}

struct Plan {
    std::vector<Unit> units;
    std::vector<Group> groups;
    std::vector<int32_t> lots;
    int64_t partial_rows = 0;

    explicit Plan(const Attention& a) {
        const int tile = query_tile(a), heads = head_tile(a);
        const int half = std::max(1, std::min(tile, TILE_ROWS / 2 / a.heads));
        for (int s = 0; s < a.spans; s++) {
            const int mine = a.starts[s] < LONG_START ? half : tile;
            for (int first = 0; first < a.lengths[s]; first += mine)
                add(a, s, first, std::min(mine, a.lengths[s] - first), is_decode(a, a.lengths[s]) ? heads : 1);
        }
        cut(a);
    }

    void add(const Attention& a, int span, int first, int tokens, int heads) {
        const int length = a.lengths[span];
        const int end = a.starts[span] + (a.both ? length : first + tokens);
        const int begin = a.window ? std::max(0, a.starts[span] + first - a.window + 1) : 0;
        const int width = length <= SPLIT_TOKENS ? PARTITION : end;
        const int from = begin / width, parts = (end - 1) / width - from + 1;
        for (int head = 0; head < a.kv_heads; head += heads) {
            const int count = std::min(heads, a.kv_heads - head);
            int group = -1;
            if (parts > 1) {
                group = (int)groups.size();
                groups.push_back({(int32_t)partial_rows, parts});
                partial_rows += (int64_t)parts * tokens * count * a.heads;
            }
            for (int i = 0; i < parts; i++)
                units.push_back({span, head, count, first, tokens, std::max(begin, (from + i) * width),
                                 std::min(end, (from + i + 1) * width), group, i});
        }
    }

    // Lots of equal cost, a few per thread: enough to balance, few enough to be cheap to hand out.
    void cut(const Attention& a) {
        int64_t total = 0, sum = 0;
        for (const Unit& u : units) total += cost(a, u);
        const int64_t most = std::max<int64_t>(64, total / (8 * a.threads));
        lots.push_back(0);
        for (size_t i = 0; i < units.size(); i++) {
            const int64_t mine = cost(a, units[i]);
            if (sum && sum + mine > most) lots.push_back((int32_t)i), sum = 0;
            sum += mine;
        }
        lots.push_back((int32_t)units.size());
    }

    static int64_t cost(const Attention& a, const Unit& u) {
        return 8 + (int64_t)(u.end - u.begin) * u.kv_heads * (is_decode(a, u.tokens) ? 1 : 2 + u.tokens * a.heads / 8);
    }
};

template <typename T>
void attend(const Attention& a) {
    start_groups(a);
    std::atomic<int> next{0};
    Barrier written;
    auto body = [&](int thread, int threads) {
        int64_t first, last;
        share(a.tokens, thread, threads, first, last);
        write_cache<T>(a, (int)first, (int)last);
        written.wait(threads);
        attend_lots<T>(a, thread, next);
    };
    run_team(a.threads, body);
}

template <typename T>
int64_t scratch_of(int heads, int dim) {
    typename Prefill<T>::Memory prefill(nullptr, dim, std::max(TILE_ROWS, heads));
    return round_up((int)std::max(prefill.bytes, Decode<T>::bytes(dim)), 4096);
}

}  // namespace

extern "C" {

// Of the OpenMP runtime in this process; without them everything runs on the calling thread.
void penstock_init(void* parallel, void* thread, void* threads) {
    runtime.parallel = (decltype(runtime.parallel))parallel;
    runtime.thread = (decltype(runtime.thread))thread;
    runtime.threads = (decltype(runtime.threads))threads;
}

// The instructions that this library was compiled for.
const char* penstock_isa() {
#if PENSTOCK_DOT
    return "AVX512-BF16";
#elif defined(__AVX512F__)
    return "AVX512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__aarch64__)
    return "NEON";
#else
    return "generic";
#endif
}

// Bytes of scratch memory that a thread needs.
int64_t penstock_scratch_bytes(int is_bf16, int heads, int dim) {
    return is_bf16 ? scratch_of<bf16>(heads, dim) : scratch_of<float>(heads, dim);
}

// Writes units, groups and lots one after the other to `to`, if it has room for them, and their numbers and the
// rows of partial results to `sizes`. Reads the spans, heads, window and threads of `a`.
int penstock_plan(const Attention* a, int32_t* to, int64_t room, int64_t sizes[4]) {
    return guarded([=] {
        Plan plan(*a);
        sizes[0] = (int64_t)plan.units.size(), sizes[1] = (int64_t)plan.groups.size();
        sizes[2] = (int64_t)plan.lots.size() - 1, sizes[3] = plan.partial_rows;
        const int64_t bytes = sizes[0] * (int64_t)sizeof(Unit) + sizes[1] * (int64_t)sizeof(Group) + (sizes[2] + 1) * 4;
        if (bytes > room * 4) return;
        auto* groups = (Group*)std::copy(plan.units.begin(), plan.units.end(), (Unit*)to);
        std::copy(plan.lots.begin(), plan.lots.end(), (int32_t*)std::copy(plan.groups.begin(), plan.groups.end(), groups));
    });
}

// Writes the step's keys and values to the cache, then attends.
void penstock_attention(const Attention* a, int is_bf16) { is_bf16 ? attend<bf16>(*a) : attend<float>(*a); }
}
