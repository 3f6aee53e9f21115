// Causal attention on a processor over keys that lie side by side: all of the past, those of a window or a document.
//
// A few queries at a time are multiplied with the keys that any of them sees, and with no others; what of these one of
// them does not see counts nothing. Every number is a float until it is stored. Scores are not kept for the backward
// pass, which makes them again from the logarithms of their sums (FlashAttention-2).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "native_numbers.h"

namespace {

// ---- products of matrices that are in the cache

#ifdef __AVX512F__
constexpr int64_t lanes = 16;
#else
constexpr int64_t lanes = 8;
#endif
constexpr int tile_rows = 6, tile_vectors = lanes / 4;  // as many sums as there are registers for

typedef float Vector __attribute__((vector_size(lanes * sizeof(float))));

inline Vector read(const float* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline int64_t rounded_up(int64_t columns) { return (columns + lanes - 1) / lanes * lanes; }

// Of a matrix, the distances between neighbours in a column and in a row.
struct Strides {
    int64_t row, column;
};

template <int rows, int vectors>
void multiply_tile(int64_t inner, const float* a, Strides of_a, const float* b, int64_t b_row, float* out,
                   int64_t out_row, bool accumulate) {
    Vector sum[rows][vectors];
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < vectors; ++c) sum[r][c] = accumulate ? read(out + r * out_row + c * lanes) : Vector{};
    for (int64_t k = 0; k < inner; ++k) {
        Vector right[vectors];
        for (int c = 0; c < vectors; ++c) right[c] = read(b + k * b_row + c * lanes);
        for (int r = 0; r < rows; ++r) {
            const float left = a[r * of_a.row + k * of_a.column];
            for (int c = 0; c < vectors; ++c) sum[r][c] += left * right[c];
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < vectors; ++c) std::memcpy(out + r * out_row + c * lanes, &sum[r][c], sizeof(Vector));
}

template <int rows>
void multiply_rows(int64_t columns, int64_t inner, const float* a, Strides of_a, const float* b, int64_t b_row,
                   float* out, int64_t out_row, bool accumulate) {
    int64_t at = 0;
    for (; at + tile_vectors * lanes <= columns; at += tile_vectors * lanes)
        multiply_tile<rows, tile_vectors>(inner, a, of_a, b + at, b_row, out + at, out_row, accumulate);
    if (tile_vectors > 2 && at + 2 * lanes <= columns) {
        multiply_tile<rows, 2>(inner, a, of_a, b + at, b_row, out + at, out_row, accumulate);
        at += 2 * lanes;
    }
    if (at < columns) multiply_tile<rows, 1>(inner, a, of_a, b + at, b_row, out + at, out_row, accumulate);
}

// Writes a b, or adds it to what is there. a: at most `tile_rows` rows. columns: a multiple of `lanes`.
inline void multiply_few(int64_t rows, int64_t columns, int64_t inner, const float* a, Strides of_a, const float* b,
                         int64_t b_row, float* out, int64_t out_row, bool accumulate) {
    static_assert(tile_rows == 6, "one case each");
    switch (rows) {
        case 6: return multiply_rows<6>(columns, inner, a, of_a, b, b_row, out, out_row, accumulate);
        case 5: return multiply_rows<5>(columns, inner, a, of_a, b, b_row, out, out_row, accumulate);
        case 4: return multiply_rows<4>(columns, inner, a, of_a, b, b_row, out, out_row, accumulate);
        case 3: return multiply_rows<3>(columns, inner, a, of_a, b, b_row, out, out_row, accumulate);
        case 2: return multiply_rows<2>(columns, inner, a, of_a, b, b_row, out, out_row, accumulate);
        case 1: return multiply_rows<1>(columns, inner, a, of_a, b, b_row, out, out_row, accumulate);
    }
}

// ---- attention

// What forward and backward are given. q: [batch, seq_q, heads, head_dim], of the last of the keys' positions. k, v:
// [batch, seq_k, kv_heads, head_dim]. first: the first key that each query sees, never decreasing; `first_row` numbers
// a sequence, or none where all have the same. slopes: [heads], or null. log_sum: [batch, heads, seq_q].
template <typename T>
struct Attention {
    const T *q, *k, *v;
    const int64_t* first;
    int64_t first_row;
    const float* slopes;
    float scale;
    int64_t batch, seq_q, seq_k, heads, kv_heads, head_dim;
    T* out;
    float* log_sum;

    int64_t group() const { return heads / kv_heads; }
    int64_t last(int64_t query) const { return seq_k - seq_q + query; }
    int64_t query_at(int64_t sequence, int64_t query, int64_t head) const {
        return ((sequence * seq_q + query) * heads + head) * head_dim;
    }
    int64_t key_at(int64_t sequence, int64_t key, int64_t head) const {
        return ((sequence * seq_k + key) * kv_heads + head) * head_dim;
    }
    int64_t sum_at(int64_t sequence, int64_t query, int64_t head) const {
        return (sequence * heads + head) * seq_q + query;
    }
};

// Numbers of a thread's own, from a boundary of the cache.
class Numbers {
  public:
    explicit Numbers(int64_t count)
        : at(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)), &std::free) {}
    operator float*() const { return at.get(); }

  private:
    std::unique_ptr<float, decltype(&std::free)> at;
};

// The keys or values of one head, from `low` on: rows, or columns, of which those behind the last are zeros.
template <typename T>
struct Keys {
    const T* from;
    int64_t count, width, stride, head_dim;

    void write_rows(float* to) const {
        for (int64_t key = 0; key < count; ++key)
#pragma omp simd
            for (int64_t i = 0; i < head_dim; ++i) to[key * head_dim + i] = load(from[key * stride + i]);
        std::memset(to + count * head_dim, 0, (width - count) * head_dim * sizeof(float));
    }
    void write_columns(float* to) const {
        for (int64_t begin = 0; begin < count; begin += lanes)  // of a few keys at a time, for the cache
            for (int64_t i = 0; i < head_dim; ++i)
                for (int64_t key = begin; key < std::min(begin + lanes, count); ++key)
                    to[i * width + key] = load(from[key * stride + i]);
        for (int64_t i = 0; i < head_dim; ++i)
            std::memset(to + i * width + count, 0, (width - count) * sizeof(float));
    }
};

// The keys that some queries see between them, counted from `low`, and widened to whole vectors.
template <typename T>
struct Span {
    int64_t begin, end;

    Span(const Attention<T>& of, const int64_t* first, int64_t low, int64_t query, int64_t queries)
        : begin((first[query] - low) / lanes * lanes), end(rounded_up(of.last(query + queries - 1) + 1 - low)) {}
    int64_t size() const { return end - begin; }
};

// Makes a row of scores their exponentials, 0 where the query sees nothing. low, high: what it sees. bias: what a
// score loses per position. log_sum: null where it is to be found, in which case it is. -> the exponentials' sum
inline float exponentials(float* row, int64_t size, int64_t low, int64_t high, float bias, bool find, float& log_sum) {
    if (bias != 0)
#pragma omp simd
        for (int64_t i = low; i < high; ++i) row[i] -= bias * float(high - 1 - i);
    float most = log_sum;
    if (find) {
        most = row[low];
#pragma omp simd reduction(max : most)
        for (int64_t i = low; i < high; ++i) most = row[i] > most ? row[i] : most;
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = low; i < high; ++i) sum += row[i] = exponential(row[i] - most);
    if (find) log_sum = most + std::log(sum);
    std::memset(row, 0, low * sizeof(float));
    std::memset(row + high, 0, (size - high) * sizeof(float));
    return sum;
}

constexpr int64_t segment = 256;  // queries that a thread takes at a time
constexpr int64_t block = 8 * tile_rows;  // queries whose gradients go to the keys at a time

template <typename T>
void attend(const Attention<T>& of, int64_t sequence, int64_t kv_head, int64_t begin, int64_t end) {
    const int64_t head_dim = of.head_dim, *first = of.first + sequence * of.first_row, low = first[begin];
    const int64_t count = of.last(end - 1) + 1 - low, width = rounded_up(count), stride = of.kv_heads * head_dim;
    const int64_t at = of.key_at(sequence, low, kv_head);
    const Numbers keys(head_dim * width), values(width * head_dim), queries(tile_rows * head_dim);
    const Numbers scores(tile_rows * width), answers(tile_rows * head_dim);
    Keys<T>{of.k + at, count, width, stride, head_dim}.write_columns(keys);
    Keys<T>{of.v + at, count, width, stride, head_dim}.write_rows(values);
    for (int64_t head = kv_head * of.group(); head < (kv_head + 1) * of.group(); ++head) {
        const float bias = of.slopes ? of.slopes[head] : 0;
        for (int64_t query = begin; query < end; query += tile_rows) {
            const int64_t rows = std::min<int64_t>(tile_rows, end - query);
            const Span<T> seen(of, first, low, query, rows);
            for (int64_t r = 0; r < rows; ++r) {
                const T* from = of.q + of.query_at(sequence, query + r, head);
#pragma omp simd
                for (int64_t i = 0; i < head_dim; ++i) queries[r * head_dim + i] = load(from[i]) * of.scale;
            }
            multiply_few(rows, seen.size(), head_dim, queries, {head_dim, 1}, keys + seen.begin, width, scores, width,
                         false);
            float inverse[tile_rows];
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t origin = low + seen.begin;
                inverse[r] = 1 / exponentials(scores + r * width, seen.size(), first[query + r] - origin,
                                              of.last(query + r) + 1 - origin, bias, true,
                                              of.log_sum[of.sum_at(sequence, query + r, head)]);
            }
            multiply_few(rows, head_dim, seen.size(), scores, {width, 1}, values + seen.begin * head_dim, head_dim,
                         answers, head_dim, false);
            for (int64_t r = 0; r < rows; ++r) {
                T* to = of.out + of.query_at(sequence, query + r, head);
#pragma omp simd
                for (int64_t i = 0; i < head_dim; ++i) store(to[i], answers[r * head_dim + i] * inverse[r]);
            }
        }
    }
}

// grad: of `out`. grad_q, grad_k, grad_v: written, of one head of the keys and its heads of the queries.
template <typename T>
void attend_backward(const Attention<T>& of, const T* grad, T* grad_q, T* grad_k, T* grad_v, int64_t sequence,
                     int64_t kv_head) {
    const int64_t head_dim = of.head_dim, *first = of.first + sequence * of.first_row, stride = of.kv_heads * head_dim;
    const int64_t count = of.seq_k, width = rounded_up(count), at = of.key_at(sequence, 0, kv_head);
    const Numbers keys(width * head_dim), key_columns(head_dim * width), value_columns(head_dim * width);
    const Numbers sum_k(width * head_dim), sum_v(width * head_dim), queries(block * head_dim), grads(block * head_dim);
    const Numbers scores(block * width), grad_scores(block * width), answers(tile_rows * head_dim);
    Keys<T>{of.k + at, count, width, stride, head_dim}.write_rows(keys);
    Keys<T>{of.k + at, count, width, stride, head_dim}.write_columns(key_columns);
    Keys<T>{of.v + at, count, width, stride, head_dim}.write_columns(value_columns);
    std::memset(sum_k, 0, width * head_dim * sizeof(float));
    std::memset(sum_v, 0, width * head_dim * sizeof(float));
    for (int64_t head = kv_head * of.group(); head < (kv_head + 1) * of.group(); ++head) {
        const float bias = of.slopes ? of.slopes[head] : 0;
        for (int64_t begin = 0; begin < of.seq_q; begin += block) {
            const int64_t end = std::min(begin + block, of.seq_q);
            const Span<T> all(of, first, 0, begin, end - begin);
            float inner[block];  // of each output with its gradient
            for (int64_t query = begin; query < end; ++query) {
                const int64_t row = query - begin, from = of.query_at(sequence, query, head);
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < head_dim; ++i) {
                    queries[row * head_dim + i] = load(of.q[from + i]) * of.scale;
                    const float d = grads[row * head_dim + i] = load(grad[from + i]);
                    sum += d * load(of.out[from + i]);
                }
                inner[row] = sum;
            }
            for (int64_t query = begin; query < end; query += tile_rows) {
                const int64_t rows = std::min<int64_t>(tile_rows, end - query), row = query - begin;
                const Span<T> seen(of, first, 0, query, rows);
                const int64_t behind = seen.begin - all.begin;
                float *weight = scores + row * width, *grad_score = grad_scores + row * width;
                multiply_few(rows, seen.size(), head_dim, queries + row * head_dim, {head_dim, 1},
                             key_columns + seen.begin, width, weight + behind, width, false);
                multiply_few(rows, seen.size(), head_dim, grads + row * head_dim, {head_dim, 1},
                             value_columns + seen.begin, width, grad_score + behind, width, false);
                for (int64_t r = 0; r < rows; ++r) {
                    float *own = weight + r * width, *own_grad = grad_score + r * width;
                    exponentials(own, all.size(), first[query + r] - all.begin, of.last(query + r) + 1 - all.begin,
                                 bias, false, of.log_sum[of.sum_at(sequence, query + r, head)]);
                    std::memset(own_grad, 0, behind * sizeof(float));
                    const float mean = inner[row + r];
#pragma omp simd
                    for (int64_t i = behind; i < behind + seen.size(); ++i) own_grad[i] = own[i] * (own_grad[i] - mean);
                    std::memset(own_grad + behind + seen.size(), 0, (all.end - seen.end) * sizeof(float));
                }
                multiply_few(rows, head_dim, seen.size(), grad_score + behind, {width, 1}, keys + seen.begin * head_dim,
                             head_dim, answers, head_dim, false);
                for (int64_t r = 0; r < rows; ++r) {
                    T* to = grad_q + of.query_at(sequence, query + r, head);
#pragma omp simd
                    for (int64_t i = 0; i < head_dim; ++i) store(to[i], answers[r * head_dim + i] * of.scale);
                }
            }
            // To a few keys at a time, of the queries that see any of them.
            int64_t from = begin, to = begin;
            for (int64_t key = all.begin; key < std::min(all.end, count); key += tile_rows) {
                const int64_t rows = std::min<int64_t>(tile_rows, std::min(all.end, count) - key);
                while (from < end && of.last(from) < key) ++from;
                while (to < end && first[to] < key + rows) ++to;
                if (from >= to) continue;
                const int64_t row = from - begin, place = row * width + key - all.begin;
                multiply_few(rows, head_dim, to - from, scores + place, {1, width}, grads + row * head_dim, head_dim,
                             sum_v + key * head_dim, head_dim, true);
                multiply_few(rows, head_dim, to - from, grad_scores + place, {1, width}, queries + row * head_dim,
                             head_dim, sum_k + key * head_dim, head_dim, true);
            }
        }
    }
    for (int64_t key = 0; key < count; ++key)
#pragma omp simd
        for (int64_t i = 0; i < head_dim; ++i) {
            store(grad_k[at + key * stride + i], sum_k[key * head_dim + i]);
            store(grad_v[at + key * stride + i], sum_v[key * head_dim + i]);
        }
}

}  // namespace
