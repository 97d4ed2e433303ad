// Threads: the OpenMP runtime that torch has loaded, reached through its GNU entry points.
//
// libgomp, libomp and libiomp5 all export GOMP_parallel. Calling it by address instead of compiling with
// -fopenmp leaves exactly one thread pool in the process, whatever compiler this is built with and whatever
// runtime torch came with.

#pragma once

struct Runtime {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    void (*barrier)();
    int (*thread)();
    int (*threads)();
};

inline Runtime runtime{};  // set once, by penstock_init

// Runs body(thread, threads) on up to `wanted` threads; a body may call barrier().
template <typename Body>
void run_team(int wanted, Body& body) {
    if (wanted <= 1 || !runtime.parallel) return body(0, 1);
    runtime.parallel(
        [](void* data) { (*static_cast<Body*>(data))(runtime.thread(), runtime.threads()); }, &body, wanted, 0);
}

inline void barrier(int threads) {
    if (threads > 1) runtime.barrier();
}

// The part of [0, n) that falls to a thread.
inline void share(int64_t n, int thread, int threads, int64_t& first, int64_t& last) {
    first = n * thread / threads;
    last = n * (thread + 1) / threads;
}
