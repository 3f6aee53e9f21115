// Steps between the products of experts on a processor, each in one pass over its rows, for float and bfloat16.
//
// Rows are contiguous; `stride` is the distance between two rows of a matrix that is a part of a wider one. Arithmetic
// is float and is rounded once, when it is stored. Compiled at its first use by moescale/ops/native.py.

#include <cstdint>
#include <cstring>

namespace {

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

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <typename T>
void gather(const T* x, const int64_t* token, int64_t rows, int64_t width, T* out) {
    for (int64_t row = 0; row < rows; ++row) {
        if (row + 4 < rows) {
            const char* next = reinterpret_cast<const char*>(x + token[row + 4] * width);
            for (int64_t byte = 0; byte < int64_t(width * sizeof(T)); byte += 64) __builtin_prefetch(next + byte);
        }
        std::memcpy(out + row * width, x + token[row] * width, width * sizeof(T));
    }
}

template <typename T>
void add(const T* in, const int64_t* token, int64_t rows, int64_t width, float* total) {
    for (int64_t row = 0; row < rows; ++row) {
        if (row + 4 < rows) {
            const char* next = reinterpret_cast<const char*>(total + token[row + 4] * width);
            for (int64_t byte = 0; byte < width * 4; byte += 64) __builtin_prefetch(next + byte, 1);
        }
        const T* from = in + row * width;
        float* to = total + token[row] * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to[i] += load(from[i]);
    }
}

template <typename T>
void forward(const T* gate, const T* up, int64_t stride, const float* factor, int64_t rows, int64_t width, T* hidden) {
    for (int64_t row = 0; row < rows; ++row) {
        const T *g = gate + row * stride, *u = up + row * stride;
        T* out = hidden + row * width;
        const float f = factor[row];
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            const float x = load(g[i]);
            store(out[i], x * sigmoid(x) * load(u[i]) * f);
        }
    }
}

// grad_hidden: of silu(gate) * up * factor, `hidden`, which is made again. The gradients of gate and up take the places
// of these; each row of `grad_factor` becomes that of the factor.
template <typename T>
void backward(const T* gate, const T* up, int64_t stride, const float* factor, const T* grad_hidden, int64_t rows,
              int64_t width, T* hidden, T* grad_gate, T* grad_up, int64_t grad_stride, float* grad_factor) {
    for (int64_t row = 0; row < rows; ++row) {
        const T *g = gate + row * stride, *u = up + row * stride, *grad = grad_hidden + row * width;
        T *out = hidden + row * width, *dg = grad_gate + row * grad_stride, *du = grad_up + row * grad_stride;
        const float f = factor[row];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; ++i) {
            const float x = load(g[i]), y = load(u[i]), d = load(grad[i]);
            const float s = sigmoid(x), silu = x * s;
            store(out[i], silu * y * f);
            store(du[i], d * silu * f);
            store(dg[i], d * y * f * s * (1.0f + x * (1.0f - s)));
            sum += d * silu * y;
        }
        grad_factor[row] = sum;
    }
}

}  // namespace

#define FOR_EACH_TYPE(T, NAME)                                                                                         \
    void gather_##NAME(const T* x, const int64_t* token, int64_t rows, int64_t width, T* out) {                        \
        gather(x, token, rows, width, out);                                                                            \
    }                                                                                                                  \
    void add_##NAME(const T* in, const int64_t* token, int64_t rows, int64_t width, float* total) {                    \
        add(in, token, rows, width, total);                                                                            \
    }                                                                                                                  \
    void forward_##NAME(const T* gate, const T* up, int64_t stride, const float* factor, int64_t rows, int64_t width,  \
                        T* hidden) {                                                                                   \
        forward(gate, up, stride, factor, rows, width, hidden);                                                        \
    }                                                                                                                  \
    void backward_##NAME(const T* gate, const T* up, int64_t stride, const float* factor, const T* grad_hidden,        \
                         int64_t rows, int64_t width, T* hidden, T* grad_gate, T* grad_up, int64_t grad_stride,        \
                         float* grad_factor) {                                                                         \
        backward(gate, up, stride, factor, grad_hidden, rows, width, hidden, grad_gate, grad_up, grad_stride,          \
                 grad_factor);                                                                                         \
    }

extern "C" {
FOR_EACH_TYPE(float, float32)
FOR_EACH_TYPE(bfloat16, bfloat16)
}
