// What the compiled functions share: the threads that they run on, and the numbers that they read and write.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

// ---- threads

void (*run_team)(void (*run)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel, of torch's OpenMP

// Calls body(number) for each number below `parts`, on at most so many threads, which take one after another.
template <typename Body>
void run_parts(int64_t parts, int64_t threads, const Body& body) {
    struct Job {
        const Body& body;
        const int64_t parts;
        std::atomic<int64_t> next;
    } job{body, parts, {0}};
    const auto run = [](void* data) {
        Job& job = *static_cast<Job*>(data);
        for (int64_t number; (number = job.next++) < job.parts;) job.body(number);
    };
    if (threads > parts) threads = parts;
    threads > 1 ? run_team(run, &job, unsigned(threads), 0) : run(&job);
}

// Calls body(first, last, part) for consecutive rows, which together are all.
template <typename Body>
void split_rows(int64_t rows, int64_t parts, const Body& body) {
    run_parts(parts, parts, [&](int64_t part) { body(rows * part / parts, rows * (part + 1) / parts, part); });
}

// ---- numbers

struct bfloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(float& to, float x) { to = x; }

inline void store(bfloat16& to, float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t(x != x ? 0x7fc0 : rounded);
}

// exp(x) to 2e-7 of its value: 2^k by its exponent's bits, times a polynomial of what is left. Beyond +-87 that of 87.
inline float exponential(float x) {
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;  // not a number stays what it is
    const float shifted = x * 1.44269504f + 12582912.0f;  // whose last bits are the nearest integer
    const float k = shifted - 12582912.0f;
    const float r = (x - k * 0.693145752f) - k * 1.42860677e-6f;
    float p = 1.98756915e-4f;
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345190e-3f;
    p = p * r + 4.16657959e-2f;
    p = p * r + 1.66666655e-1f;
    p = p * r + 5.00000012e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = int32_t(uint32_t(bits) << 23) + 0x3f800000;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

inline float sigmoid(float x) { return x < -87.0f ? 0.0f : 1.0f / (1.0f + exponential(-x)); }

}  // namespace
