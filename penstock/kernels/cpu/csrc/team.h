// Threads: the OpenMP runtime that torch has loaded, reached through its GNU entry points.
//
// libgomp, libomp and libiomp5 all export GOMP_parallel. Calling it by address instead of compiling with
// -fopenmp leaves exactly one thread pool in the process, whatever compiler this is built with and whatever
// runtime torch came with.

#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

struct Runtime {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    int (*thread)();
    int (*threads)();
};

inline Runtime runtime{};  // set once, by penstock_init

// Runs body(thread, threads) on up to `wanted` threads; a body may wait at a Barrier.
template <typename Body>
void run_team(int wanted, Body& body) {
    if (wanted <= 1 || !runtime.parallel) return body(0, 1);
    runtime.parallel(
        [](void* data) { (*static_cast<Body*>(data))(runtime.thread(), runtime.threads()); }, &body, wanted, 0);
}

// Where the threads of a team wait for each other, again and again. They spin: what they wait for takes
// microseconds, waking from sleep takes tens. If one has lost its core, the others give theirs up.
class Barrier {
    std::atomic<int> arrived{0};

public:
    // turn: how often this thread has waited here before.
    void wait(int threads, int turn = 0) {
        if (threads <= 1) return;
        arrived.fetch_add(1, std::memory_order_acq_rel);
        for (int spins = 0; arrived.load(std::memory_order_acquire) < threads * (turn + 1); spins++) {
            if (spins > 20000) sched_yield();
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
    }
};

// Runs what allocates; 1 if there is no memory. Exceptions must not reach C.
template <typename Work>
int guarded(const Work& work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// The part of [0, n) that falls to a thread.
inline void share(int64_t n, int thread, int threads, int64_t& first, int64_t& last) {
    first = n * thread / threads;
    last = n * (thread + 1) / threads;
}
