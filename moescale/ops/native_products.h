// Products of matrices on one thread, for processors that multiply bfloat16 but have no tiles (AVX512-BF16, no AMX).
//
// There they take less time than oneDNN's, which compiles a kernel for every shape, and whose call costs a tenth of a
// small product. Numbers go through in words of 32 bits: a float, or two bfloat16 of neighbouring steps of the inner
// dimension, which one instruction multiplies and adds up. The factor on the right is rewritten a panel of 64 columns
// at a time, a row for each step of words. Sums are floats, and are rounded once.
#pragma once

#include "native_numbers.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define OWN_PRODUCTS

#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace {

using Word = uint32_t;
constexpr int64_t word_lanes = 16;
constexpr int64_t panel = 4 * word_lanes;  // columns

template <typename T>
constexpr int64_t numbers_of_word = sizeof(Word) / sizeof(T);

// Room of a thread's own, which stays for its next product.
class Room {
  public:
    Word* take(int64_t count) {
        if (count > size) {
            kept.reset(static_cast<Word*>(std::aligned_alloc(64, (count * sizeof(Word) + 63) / 64 * 64)));
            size = count;
        }
        return kept.get();
    }

  private:
    struct Free {
        void operator()(Word* at) const { std::free(at); }
    };
    std::unique_ptr<Word, Free> kept;
    int64_t size = 0;
};

// Writes a panel of a matrix whose rows are steps of the inner dimension.
inline void write_panel(const float* from, int64_t stride, int64_t words, Word* to) {
    for (int64_t k = 0; k < words; ++k) std::memcpy(to + k * panel, from + k * stride, panel * sizeof(float));
}

inline void write_panel(const bfloat16* from, int64_t stride, int64_t words, Word* to) {
    for (int64_t k = 0; k < words; ++k) {
        const bfloat16 *first = from + 2 * k * stride, *second = first + stride;
        for (int64_t i = 0; i < panel; ++i) to[k * panel + i] = first[i].bits | Word(second[i].bits) << 16;
    }
}

// Makes columns the rows of sixteen by sixteen words.
inline void transpose(__m512i (&row)[16]) {
    __m512i half[16];
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // then row i + j has columns j, 4 + j, 8 + j and 12 + j of four rows
        row[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        half[j] = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x88);
        half[4 + j] = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xdd);
        half[8 + j] = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x88);
        half[12 + j] = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; ++j) {
        row[j] = _mm512_shuffle_i32x4(half[j], half[8 + j], 0x88);
        row[4 + j] = _mm512_shuffle_i32x4(half[4 + j], half[12 + j], 0x88);
        row[8 + j] = _mm512_shuffle_i32x4(half[j], half[8 + j], 0xdd);
        row[12 + j] = _mm512_shuffle_i32x4(half[4 + j], half[12 + j], 0xdd);
    }
}

// The same of a matrix whose columns are these steps.
template <typename T>
void write_transposed_panel(const T* from, int64_t stride, int64_t words, Word* to) {
    for (int64_t i = 0; i < panel; i += word_lanes) {
        for (int64_t k = 0; k < words; k += word_lanes) {
            const int64_t count = std::min(word_lanes, words - k);
            const __mmask16 there = __mmask16((1u << count) - 1);
            __m512i row[16];
            for (int r = 0; r < 16; ++r)
                row[r] = _mm512_maskz_loadu_epi32(there, from + (i + r) * stride + k * numbers_of_word<T>);
            transpose(row);
            for (int64_t r = 0; r < count; ++r) _mm512_store_si512(to + (k + r) * panel + i, row[r]);
        }
    }
}

inline void add_product(__m512& sum, Word left, __m512i right, const float*) {
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(int(left))), _mm512_castsi512_ps(right), sum);
}

inline void add_product(__m512& sum, Word left, __m512i right, const bfloat16*) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)right);
}

inline __m512 read_lanes(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 read_lanes(const bfloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void write_lanes(float* to, __m512 sum) { _mm512_storeu_ps(to, sum); }

inline void write_lanes(bfloat16* to, __m512 sum) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(sum));
}

// The factor on the left: the next row, and the next word of a row, lie so many numbers on.
template <typename T>
struct Left {
    const T* at;
    int64_t row, word;
};

// Six rows have as many sums as there are registers for.
template <int rows, typename T>
void multiply_rows(int64_t words, Left<T> a, const Word* b, T* out, int64_t stride, bool accumulate) {
    __m512 sum[rows][4];
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; ++k) {
        __m512i right[4];
        for (int c = 0; c < 4; ++c) right[c] = _mm512_load_si512(b + k * panel + c * word_lanes);
        for (int r = 0; r < rows; ++r) {
            Word left;
            std::memcpy(&left, a.at + r * a.row + k * a.word, sizeof left);
            for (int c = 0; c < 4; ++c) add_product(sum[r][c], left, right[c], a.at);
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < 4; ++c) {
            T* to = out + r * stride + c * word_lanes;
            write_lanes(to, accumulate ? _mm512_add_ps(sum[r][c], read_lanes(to)) : sum[r][c]);
        }
    }
}

template <typename T>
void multiply_panel(int64_t rows, int64_t words, Left<T> a, const Word* b, T* out, int64_t stride, bool accumulate) {
    for (; rows >= 6; rows -= 6, a.at += 6 * a.row, out += 6 * stride)
        multiply_rows<6>(words, a, b, out, stride, accumulate);
    if (rows == 4) multiply_rows<4>(words, a, b, out, stride, accumulate);
    if (rows == 2) multiply_rows<2>(words, a, b, out, stride, accumulate);
}

// A factor whose numbers lie elsewhere, stride 1 along its rows, before it is transposed.
template <typename T>
struct Factor {
    const T* data;
    int64_t stride;
    bool transposed;
};

// Whether `multiply_here` can, and takes less time: panels that lie far out of the cache are read again and again.
template <typename T>
bool can_multiply(int64_t rows, int64_t inner, int64_t columns, bool a_transposed) {
    const bool near = a_transposed || inner * int64_t(sizeof(T)) <= 8192;
    return near && columns % panel == 0 && inner % 2 == 0 && rows % (a_transposed ? panel : 2) == 0;
}

// Whether it does so for all products of experts of these sizes, whose rows are even.
template <typename T>
bool can_multiply_experts(int64_t d_model, int64_t d_ff) {
    return can_multiply<T>(2, d_model, d_ff, false) && can_multiply<T>(2, d_ff, d_model, false) &&
           can_multiply<T>(d_model, 2, d_ff, true) && can_multiply<T>(d_ff, 2, d_model, true);
}

// Writes a b into `out`, [rows, columns], or adds it to what is there.
template <typename T>
void multiply_here(int64_t rows, int64_t inner, int64_t columns, Factor<T> a, Factor<T> b, T* out, int64_t stride,
                   bool accumulate) {
    thread_local Room of_left, of_right;
    const int64_t words = inner / numbers_of_word<T>;
    Word* const right = of_right.take(words * panel);
    Word* left = nullptr;  // of a transposed factor, panels of rows
    if (a.transposed) {
        left = of_left.take(words * rows);
        for (int64_t row = 0; row < rows; row += panel) write_panel(a.data + row, a.stride, words, left + row * words);
    }
    for (int64_t column = 0; column < columns; column += panel) {
        if (b.transposed) write_transposed_panel(b.data + column * b.stride, b.stride, words, right);
        else write_panel(b.data + column, b.stride, words, right);
        if (!a.transposed)
            multiply_panel<T>(rows, words, {a.data, a.stride, numbers_of_word<T>}, right, out + column, stride,
                              accumulate);
        else
            for (int64_t row = 0; row < rows; row += panel)
                multiply_panel<T>(panel, words,
                                  {reinterpret_cast<const T*>(left + row * words), numbers_of_word<T>,
                                   panel * numbers_of_word<T>},
                                  right, out + row * stride + column, stride, accumulate);
    }
}

}  // namespace

#else
namespace {
template <typename T>
bool can_multiply_experts(int64_t, int64_t) {
    return false;
}
}  // namespace
#endif
