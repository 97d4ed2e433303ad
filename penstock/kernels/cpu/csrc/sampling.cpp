// From logits to tokens and log-probabilities: all rows of a step; see sampling.h for one.

#include "sampling.h"

#include <atomic>

#include "team.h"

namespace {

struct Arguments {
    const void* logits;  // [rows, vocab]
    int64_t stride;      // elements from row to row
    const double* uniforms;
    const double* top_ps;
    const float* temperatures;  // 0: greedy
    const float* min_ps;
    const int32_t* top_ks;  // 0: off
    int64_t* tokens;
    float* checks;  // the largest logit; NaN if any is
    char* scratch;
    int32_t rows, vocab, is_bf16, threads;
};

template <typename T>
void sample_row(const Arguments& a, int r, const Scratch& scratch) {
    Row<T> row{(const T*)a.logits + r * a.stride, a.vocab, scratch};
    const float peak = row.find_peaks(), temperature = a.temperatures[r];
    a.checks[r] = peak;
    a.tokens[r] = 0;
    if (!(std::abs(peak) < INF)) return;
    // finite, so that the peak's own weight is 1 however small the temperature is
    const float scale = temperature > 0 ? std::min(LOG2E / temperature, std::numeric_limits<float>::max()) : 0.0f;
    if (temperature == 0)
        a.tokens[r] = row.first_equal(peak);
    else if (a.top_ks[r] > 0 || a.top_ps[r] < 1)
        a.tokens[r] = row.draw_cut({peak, scale, a.min_ps[r]}, a.top_ks[r], a.top_ps[r], a.uniforms[r]);
    else
        a.tokens[r] = row.draw_open({peak, scale, a.min_ps[r]}, a.uniforms[r]);
}

struct Logprobs {
    const void* logits;  // [rows, vocab]
    int64_t stride;
    const int64_t* tokens;
    const int32_t* counts;  // alternatives wanted of each row, at most `most`
    double* logprobs;       // [rows]
    int64_t* ranks;         // [rows]; 0 for a row that has no distribution
    int64_t* top_tokens;    // [rows, most]
    double* top_logprobs;   // [rows, most]
    char* scratch;
    int32_t rows, vocab, most, is_bf16, threads;
};

template <typename T>
void logprobs_row(const Logprobs& a, int r, const Scratch& scratch) {
    Row<T> row{(const T*)a.logits + r * a.stride, a.vocab, scratch};
    const float peak = row.find_peaks(), own = number(row.x[a.tokens[r]]);
    a.ranks[r] = 0;
    if (!(std::abs(peak) < INF)) return;
    double total = 0;
    for (int at = 0; at < row.n; at += BLOCK) total += row.weigh_block(at, {peak, LOG2E}, scratch.weights);
    // of a long double: the double's would tie a library that is compiled ahead to glibc 2.29
    const double normal = (double)std::log((long double)total);
    const auto logprob = [=](float x) { return (double)(float)(((double)x - peak) - normal); };
    int64_t rank = 0;
    for (int i = 0; i < row.n; i += W) rank += number_of(at_least(load_first(row.x + i, row.n - i), splat(own)));
    if (own == -INF) rank = row.n;  // lanes behind the end were counted, too
    a.ranks[r] = rank;
    a.logprobs[r] = logprob(own);
    const int count = a.counts[r];
    if (count == 0) return;
    float kth;
    const int found = row.collect_top(count, kth);
    std::partial_sort(scratch.members, scratch.members + count, scratch.members + found, before);
    for (int i = 0; i < count; i++) {
        a.top_tokens[(int64_t)r * a.most + i] = scratch.members[i].id;
        a.top_logprobs[(int64_t)r * a.most + i] = logprob(scratch.members[i].logit);
    }
}

// Rows are handed out one by one: they differ in what they cost.
template <typename Call, typename Work>
void for_each_row(const Call& call, const Work& work) {
    std::atomic<int> next{0};
    const int64_t bytes = Scratch::bytes(call.vocab);
    auto body = [&](int thread, int) {
        const Scratch scratch(call.scratch + thread * bytes, call.vocab);
        for (int r; (r = next.fetch_add(1, std::memory_order_relaxed)) < call.rows;) work(call, r, scratch);
    };
    run_team(std::min(call.rows, call.threads), body);
}

}  // namespace

extern "C" {

int64_t penstock_sampling_scratch(int vocab, int threads) { return Scratch::bytes(vocab) * threads; }

void penstock_sample(const Arguments* call) {
    for_each_row(*call, call->is_bf16 ? sample_row<bf16> : sample_row<float>);
}

void penstock_logprobs(const Logprobs* call) {
    for_each_row(*call, call->is_bf16 ? logprobs_row<bf16> : logprobs_row<float>);
}
}
