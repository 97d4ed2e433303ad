// One row of logits: its peak, its largest logits, a draw; without a float32 copy of it, and without sorting it.
//
// Specified by penstock/sampling/choose.py and logprobs.py. A row is worked on by one thread, in one order of
// operations, so its result depends on nothing else. Kinds of rows:
//
//   greedy   the largest logit, the lowest id among equals
//   open     temperature, min_p: sums of blocks of weights, then the one block that the draw falls into
//   cut      top_k, top_p: tokens in the order (logit descending, id ascending)
//
// The cut of a row by mass is found as quickselect finds a rank: halve an interval of weights, sum what lies above,
// keep the half with the cut. Only the last few tokens are sorted. Weights are exp((x - max) / temperature), so the
// largest is 1; sums are float32 over 1,024 weights at most, float64 beyond.

#pragma once

#include <algorithm>
#include <functional>
#include <numeric>

#include "mask.h"
#include "simd.h"

namespace {

constexpr int CHUNK = 256;    // logits with one maximum on record
constexpr int BLOCK = 512;    // weights with one sum on record, of open rows
constexpr int SPAN = 1024;    // weights summed in float32
constexpr int FEW = 48;       // weights that are better sorted than divided again
constexpr int LARGE = 16384;  // weights of which some are looked at first, to guess where the cut is
constexpr int STRIDE = 128;   // one of so many
constexpr int SORTED = 1024;  // top_k tokens that are better sorted at once

struct Member {
    float logit;
    int32_t id;
};

INLINE bool before(const Member& a, const Member& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// One thread's memory, for one row.
struct Scratch {
    float *peaks, *weights, *alive, *selection, *sample;
    Member* members;
    double* sums;

    static int64_t bytes(int64_t vocab) {
        const int64_t floats = 3 * (vocab + W) + vocab / STRIDE + vocab / CHUNK + 1;
        return (floats * 4 + (vocab / BLOCK + 1) * 8 + vocab * (int64_t)sizeof(Member)) / 64 * 64 + 64;
    }

    Scratch(char* memory, int64_t vocab) {
        sums = (double*)memory;
        members = (Member*)(sums + vocab / BLOCK + 1);
        weights = (float*)(members + vocab);
        alive = weights + vocab + W;
        selection = alive + vocab + W;
        sample = selection + vocab + W;
        peaks = sample + vocab / STRIDE;
    }
};

INLINE vf min(vf a, vf b) { return a < b ? a : b; }

INLINE float number(float x) { return x; }

INLINE float number(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

INLINE uint32_t bits(float x) {
    uint32_t y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

INLINE float from_bits(uint32_t x) {
    float y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// The first n lanes; the others are -inf.
template <typename T>
INLINE vf load_first(const T* p, int n) {
    if (n >= W) return load(p);
    float lanes[W];
    for (int i = 0; i < W; i++) lanes[i] = i < n ? number(p[i]) : -INF;
    return load(lanes);
}

// ------------------------------------------------------------------------------------------------ one row

// How logits become weights.
struct Weighing {
    float peak, scale, min_p = 0, floor = -INF;
    bool limited = min_p > 0;
};

template <typename T>
struct Row {
    const T* x;
    int n;
    Scratch s;

    int chunks() const { return (n + CHUNK - 1) / CHUNK; }

    // The largest logit of each chunk; returns the largest of all, NaN if there is a NaN.
    float find_peaks() {
        vu widest{};  // of the numbers without their signs: a NaN's is larger than infinity's
        float peak = -INF;
        for (int c = 0, at = 0; at < n; c++, at += CHUNK) {
            vf best = splat(-INF);
            const int end = std::min(n, at + CHUNK);
            for (int i = at; i < end; i += W) {
                const vf v = load_first(x + i, end - i);
                const vu magnitude = (vu)v << 1;
                best = max(best, v);
                widest = magnitude > widest ? magnitude : widest;
            }
            s.peaks[c] = max(best);
            peak = std::max(peak, s.peaks[c]);
        }
        uint32_t lanes[W];
        std::memcpy(lanes, &widest, sizeof lanes);
        const bool broken = *std::max_element(lanes, lanes + W) > 0xff000000u;
        return broken ? std::numeric_limits<float>::quiet_NaN() : peak;
    }

    int first_equal(float peak) const {
        int at = 0;
        while (s.peaks[at / CHUNK] != peak) at += CHUNK;
        while (number(x[at]) != peak) at++;
        return at;
    }

    // All tokens with logit ≥ least, in order of ids, into members; chunks without any are passed over.
    int collect_logits(float least) {
        int found = 0;
        for (int c = 0, at = 0; at < n; c++, at += CHUNK) {
            if (!(s.peaks[c] >= least)) continue;
            const int end = std::min(n, at + CHUNK);
            for (int i = at; i < end; i += W)
                for_lanes(at_least(load_first(x + i, end - i), splat(least)), end - i,
                          [&](int lane) { s.members[found++] = {number(x[i + lane]), i + lane}; });
        }
        return found;
    }

    // The k largest and all equal to the last of them, unordered, into members; returns how many. 0 < k ≤ n.
    int collect_top(int k, float& kth) {
        float least = -INF;
        if (k <= chunks()) {  // k chunks have a maximum of at least this
            std::copy(s.peaks, s.peaks + chunks(), s.selection);
            std::nth_element(s.selection, s.selection + k - 1, s.selection + chunks(), std::greater<float>());
            least = s.selection[k - 1];
        }
        const int found = collect_logits(least);
        Member* end = s.members + found;
        std::nth_element(s.members, s.members + k - 1, end, before);
        const float last = kth = s.members[k - 1].logit;
        return (int)(std::partition(s.members, end, [=](const Member& m) { return m.logit >= last; }) - s.members);
    }

    // Weights of up to BLOCK logits from `at`, and their sum; zero for those that the limits exclude.
    INLINE float weigh_block(int at, const Weighing& how, float* out) const {
        return how.limited ? weigh_block<true>(at, how, out) : weigh_block<false>(at, how, out);
    }

    template <bool limited>
    INLINE float weigh_block(int at, const Weighing& how, float* out) const {
        vf total{};
        const int count = std::min(BLOCK, n - at);
        for (int i = 0; i < count; i += W) {
            const vf v = load_first(x + at + i, count - i);
            vf w = exp2((v - how.peak) * how.scale);
            if (limited) w = where(at_least(v, splat(how.floor)), where(at_least(w, splat(how.min_p)), w));
            store(out + i, w, count - i);
            total += w;
        }
        return sum(total);
    }

    // ------------------------------------------------------------------------------------------------- open

    int draw_open(const Weighing& how, double uniform) {
        total = 0;
        int blocks = 0, last = 0;
        float* block = s.weights;
        for (int at = 0; at < n; at += BLOCK, blocks++) {
            total += weigh_block(at, how, block);
            s.sums[blocks] = total;
        }
        const double target = uniform * total;
        int b = (int)(std::upper_bound(s.sums, s.sums + blocks, target) - s.sums);
        b = std::min(b, (int)(std::lower_bound(s.sums, s.sums + blocks, total) - s.sums));
        weigh_block(b * BLOCK, how, block);
        double reached = b ? s.sums[b - 1] : 0.0;
        for (int i = 0, count = std::min(BLOCK, n - b * BLOCK); i < count; i++) {
            if (!(block[i] > 0)) continue;
            last = b * BLOCK + i;  // the two sums of a block differ by rounding: never go beyond it
            reached += block[i];
            if (reached > target) break;
        }
        return last;
    }

    // -------------------------------------------------------------------------------------------------- cut

    int draw_cut(Weighing how, int top_k, double top_p, double uniform) {
        if (top_k > 0 && top_k < n) {
            const int count = collect_top(top_k, how.floor);
            if (count <= SORTED) return draw_members(count, how, top_p, uniform);
            how.limited = true;
        }
        total = 0;
        for (int at = 0; at < n; at += BLOCK) total += weigh_block(at, how, s.weights + at);
        // tokens below this, even all together, are beyond the cut; and zeros are no tokens
        const float rare = (float)(0.5 * std::max(0.0, 1 - top_p) * total / n);
        const float everything = from_bits(bits(1.0f) + 1);
        Range range{std::max(rare, std::numeric_limits<float>::min()), everything, 0};
        leave_out(range);
        double kept = total;
        if (top_p < 1) {
            range = narrow(range, top_p * total, false);
            const int end = walk(collect_weights(range), range.above, top_p * total, false, kept);
            double at;
            if (uniform * kept >= range.above)  // and never beyond the cut, whatever the rounding of another sum
                return s.members[walk(end + 1, range.above, uniform * kept, true, at)].id;
            range = {range.high, everything, 0};
        }
        range = narrow(range, uniform * kept, true);
        double at;
        return s.members[walk(collect_weights(range), range.above, uniform * kept, true, at)].id;
    }

    double total = 0;  // of all weights

    // The weights that the search begins with: those of the row, or, if few matter, these alone.
    const float* weights = nullptr;
    int num_weights = 0;

    // Weights of an interval, low ≤ w < high, with the mass of everything above it.
    struct Range {
        float low, high;
        double above;
    };

    // On a steep row, moves the weights of the range to `alive`.
    void leave_out(const Range& range) {
        weights = s.weights, num_weights = n;
        int many = 0;
        for (int i = 0; i < n; i += STRIDE) many += s.weights[i] >= range.low;
        if (n < LARGE || many > n / STRIDE / 4) return;
        Range ends = range;
        num_weights = keep(s.weights, n, ends, s.alive);
        weights = s.alive;
    }

    // The part of the range in which the cumulative mass of the row reaches (or exceeds) the target: few tokens, or
    // one weight.
    Range narrow(Range range, double target, bool exceed) {
        if (num_weights < LARGE) return bisect(range, target, exceed, weights, num_weights);
        const Range guess = guessed(range, target);
        const Split parts = split(guess, range.low);
        const double reached = parts.above + parts.mass;
        // sums in another order differ by rounding: there must be something left in the part that is taken
        if ((exceed ? parts.above > target : parts.above >= target) || !(parts.count || parts.below)) {
            range.low = guess.high;
        } else if ((exceed ? reached > target : reached >= target) || !parts.below) {
            range = {guess.low, guess.high, parts.above};
            return bisect(range, target, exceed, s.selection, parts.count);
        } else {
            range.high = guess.low, range.above = reached;
        }
        return bisect(range, target, exceed, weights, num_weights);
    }

    // Weights between which the target should lie, judging by a few of them; not more than a guess.
    Range guessed(Range range, double target) {
        const int count = num_weights / STRIDE;
        double mass = 0, squares = 0;
        for (int i = 0; i < count; i++) {
            const float w = s.sample[i] = weights[i * STRIDE];
            mass += w, squares += (double)w * w;
        }
        const double share = target / total, aim = share * mass;
        const double error = 3 * std::sqrt(squares * std::max(share * (1 - share), 1e-3));
        Range guess = range;
        if (aim > error) guess.high = bisect(range, aim - error, false, s.sample, count).high;
        if (aim + error < mass) guess.low = bisect(range, aim + error, false, s.sample, count).low;
        return guess.low < guess.high ? guess : range;
    }

    struct Split {
        int count = 0;       // weights in the range
        double mass = 0;     // theirs
        double above = 0;    // of the weights above it
        bool below = false;  // whether there is one below it
    };

    // Divides the weights ≥ least at the ends of a range, and copies those within to `selection`.
    Split split(const Range& range, float least) {
        const vf low = splat(range.low), high = splat(range.high), bottom = splat(least);
        Split parts;
        Mask under{};
        for (int at = 0; at < num_weights; at += SPAN) {
            vf inside{}, over{};
            const int end = std::min(num_weights, at + SPAN);
            for (int i = at; i < end; i += W) {
                const vf v = load(weights + i, end - i);  // lanes behind the end are 0, so below `bottom`
                const Mask top = at_least(v, high), upper = at_least(v, low), in = but_not(upper, top);
                over += where(top, v), inside += where(in, v);
                under |= but_not(at_least(v, bottom), upper);
                parts.count += pack(s.selection + parts.count, in, v);
            }
            parts.above += sum(over), parts.mass += sum(inside);
        }
        parts.below = any(under);
        return parts;
    }

    // The same as narrow, from given weights: some of the row's, with all of the range among them.
    Range bisect(Range range, double target, bool exceed, const float* from, int count) {
        while (count > FEW) {
            const uint32_t low = bits(range.low), high = bits(range.high);
            if (high - low <= 1) break;
            const float pivot = from_bits(low + (high - low) / 2);
            bool below;
            const double reached = range.above + mass_of(from, count, range.low, pivot, range.high, below);
            if ((exceed ? reached > target : reached >= target) || !below)
                range.low = pivot;
            else
                range.high = pivot, range.above = reached;
            count = keep(from, count, range, s.selection);
            from = s.selection;
        }
        return range;
    }

    // The mass of the weights in [pivot, high), and whether there is one in [low, pivot).
    static double mass_of(const float* w, int count, float low, float pivot, float high, bool& below) {
        const vf bottom = splat(low), middle = splat(pivot), top = splat(high);
        double total = 0;
        Mask under{};
        for (int at = 0; at < count; at += SPAN) {
            vf part{};
            const int end = std::min(count, at + SPAN);
            for (int i = at; i < end; i += W) {
                const vf v = load(w + i, end - i);
                const Mask upper = at_least(v, middle);
                part += where(but_not(upper, at_least(v, top)), v);
                under |= but_not(at_least(v, bottom), upper);
            }
            total += sum(part);
        }
        below = any(under);
        return total;
    }

    // Copies the weights of the range, and draws the range's ends up to them; returns their number.
    static int keep(const float* from, int count, Range& range, float* to) {
        const vf low = splat(range.low), high = splat(range.high);
        vf least = high, most = low;
        int kept = 0;
        for (int i = 0; i < count; i += W) {
            const vf v = load(from + i, count - i);
            const Mask in = but_not(at_least(v, low), at_least(v, high));
            const vf inside = where(in, v);
            most = max(most, inside);
            least = min(least, inside + where(but_not(~Mask{}, in), high));
            kept += pack(to + kept, in, v);
        }
        if (kept) range.low = -max(-least), range.high = from_bits(bits(max(most)) + 1);
        return kept;
    }

    // The tokens of the range, in order, into members; returns their number.
    int collect_weights(const Range& range) {
        const vf low = splat(range.low), high = splat(range.high);
        int count = 0;
        for (int i = 0; i < n; i += W) {
            const vf w = load(s.weights + i, n - i);
            const Mask in = but_not(at_least(w, low), at_least(w, high));
            if (any(in))
                for_lanes(in, n - i, [&](int lane) { s.members[count++] = {number(x[i + lane]), i + lane}; });
        }
        if (!std::is_sorted(s.members, s.members + count, before)) std::sort(s.members, s.members + count, before);
        return count;
    }

    // Index of the member at which the cumulative mass reaches (or exceeds) the target, else of the last one; `at` is
    // the mass there.
    int walk(int count, double above, double target, bool exceed, double& at) const {
        at = above;
        for (int i = 0; i < count; i++) {
            at += s.weights[s.members[i].id];
            if (exceed ? at > target : at >= target) return i;
        }
        return count - 1;
    }

    // The same from members that are all there is.
    int draw_members(int count, const Weighing& how, double top_p, double uniform) {
        std::sort(s.members, s.members + count, before);
        float* w = s.weights;
        double kept = 0, reached = 0;
        for (int i = 0; i < count; i += W) {
            float logits[W];
            for (int j = 0; j < W; j++) logits[j] = i + j < count ? s.members[i + j].logit : -INF;
            const vf v = exp2((load(logits) - how.peak) * how.scale);
            store(w + i, where(at_least(v, splat(how.min_p)), v), count - i);
        }
        total = std::accumulate(w, w + count, 0.0);
        int end = 0;
        for (int i = 0; i < count && w[i] > 0; i++) {
            end = i;
            kept += w[i];
            if (top_p < 1 && kept >= top_p * total) break;
        }
        for (int i = 0; i <= end; i++) {
            reached += w[i];
            if (reached > uniform * kept) return s.members[i].id;
        }
        return s.members[end].id;
    }
};

}  // namespace
