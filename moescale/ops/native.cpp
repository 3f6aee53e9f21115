// What a processor computes in one pass over its rows, for float and bfloat16: norms, rotations, losses of the head,
// routing, and the steps between the products of experts; and a thread's whole share of experts' rows, in which it waits
// for no other in Python.
//
// Rows are contiguous; `stride` is the distance between two rows of a matrix that is a part of a wider one. Arithmetic
// is float and is rounded once, when it is stored. Products are those of native_products.h where there are such, and
// torch's elsewhere, called through the stable C interface that torch.export's compiled models use
// (torch/csrc/inductor/aoti_torch/c/shim.h). Work is split among the threads that torch's own products run on: those of
// another team would wait for the cores on which these look for work. Every function returns 0, or what torch returned
// when it failed. Compiled at its first use by moescale/ops/native.py.

#include <algorithm>
#include <cmath>

#include "native_attention.h"
#include "native_numbers.h"
#include "native_products.h"

namespace {

// ---- steps between the products of experts

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

// out: of each token the sum of its rows, each times its factor; without factors they count once, and row -1 not at all.
template <typename T>
void sum_rows(const T* rows, const float* factor, const int64_t* row, int64_t tokens, int64_t choices, int64_t width,
              T* out) {
    constexpr int64_t most = 256;
    float sum[most];
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t begin = 0; begin < width; begin += most) {
            const int64_t size = std::min(most, width - begin);
            std::fill(sum, sum + size, 0.0f);
            for (int64_t choice = token * choices; choice < (token + 1) * choices; ++choice) {
                if (row[choice] < 0) continue;
                const T* from = rows + row[choice] * width + begin;
                const float f = factor ? factor[choice] : 1.0f;
#pragma omp simd
                for (int64_t i = 0; i < size; ++i) sum[i] += load(from[i]) * f;
            }
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) store(out[token * width + begin + i], sum[i]);
        }
    }
}

template <typename T>
void activate(const T* gate, const T* up, int64_t stride, const float* factor, int64_t rows, int64_t width, T* hidden) {
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
void activate_backward(const T* gate, const T* up, int64_t stride, const float* factor, const T* grad_hidden,
                       int64_t rows, int64_t width, T* hidden, T* grad_gate, T* grad_up, int64_t grad_stride,
                       float* grad_factor) {
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

// Writes the two halves of `made`, of `size` numbers each, to two places, or adds them to what is there.
template <typename T>
void part(const T* made, int64_t size, bool accumulate, const T* first, const T* second) {
    const T* to[2] = {first, second};
    for (int half = 0; half < 2; ++half) {
        T* out = const_cast<T*>(to[half]);
        if (accumulate) {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) store(out[i], load(out[i]) + load(made[half * size + i]));
        } else {
            std::memcpy(out, made + half * size, size * sizeof(T));
        }
    }
}

// ---- norms and rotations

// inverse: 1 / root mean square of each row, kept for backward.
template <typename T>
void norm(const T* x, const T* weight, double eps, int64_t rows, int64_t width, T* out, float* inverse) {
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = x + row * width;
        T* to = out + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; ++i) sum += load(from[i]) * load(from[i]);
        const float scale = inverse[row] = 1.0f / std::sqrt(sum / float(width) + float(eps));
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) store(to[i], load(from[i]) * scale * load(weight[i]));
    }
}

// grad_weight: to which the gradient of these rows is added.
template <typename T>
void norm_backward(const T* grad, const T* x, const T* weight, const float* inverse, int64_t rows, int64_t width,
                   T* grad_x, float* grad_weight) {
    for (int64_t row = 0; row < rows; ++row) {
        const T *g = grad + row * width, *from = x + row * width;
        T* to = grad_x + row * width;
        const float scale = inverse[row];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; ++i) sum += load(g[i]) * load(from[i]) * load(weight[i]);
        const float slope = -sum * scale * scale * scale / float(width);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            const float d = load(g[i]), f = load(from[i]);
            grad_weight[i] += d * f * scale;
            store(to[i], d * load(weight[i]) * scale + f * slope);
        }
    }
}

// Rows of `heads` heads each, with the angles of the row; sign -1 rotates back. half: of a head's features.
template <typename T>
void rotate(const T* x, const T* cosine, const T* sine, int64_t sign, int64_t rows, int64_t heads, int64_t half,
            T* out) {
    for (int64_t row = 0; row < rows; ++row) {
        const T *c = cosine + row * half, *s = sine + row * half;
        for (int64_t head = 0; head < heads; ++head) {
            const T* first = x + (row * heads + head) * 2 * half;
            T* to = out + (row * heads + head) * 2 * half;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float a = load(first[i]), b = load(first[half + i]);
                const float cos = load(c[i]), sin = float(sign) * load(s[i]);
                store(to[i], a * cos - b * sin);
                store(to[half + i], b * cos + a * sin);
            }
        }
    }
}

// ---- losses of the head

// log_sum: of exp(scale * logit) over each row. chosen: the scaled logit at the column, 0 where that is -1.
template <typename T>
void normalise(const T* logits, const int64_t* column, float scale, int64_t rows, int64_t width, float* log_sum,
               float* chosen) {
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = logits + row * width;
        float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < width; ++i) top = load(from[i]) * scale > top ? load(from[i]) * scale : top;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; ++i) sum += exponential(load(from[i]) * scale - top);
        log_sum[row] = top + std::log(sum);
        chosen[row] = column[row] < 0 ? 0.0f : load(from[column[row]]) * scale;
    }
}

// out: probability * grad_probs, less grad_chosen at the column; it may be the logits.
template <typename T>
void grad_logits(const T* logits, const int64_t* column, const float* log_sum, const float* grad_probs,
                 const float* grad_chosen, float scale, int64_t rows, int64_t width, T* out) {
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = logits + row * width;
        T* to = out + row * width;
        const float shift = log_sum[row], factor = grad_probs[row];
        const int64_t at = column[row] < 0 ? 0 : column[row];
        const float last = exponential(load(from[at]) * scale - shift) * factor - grad_chosen[row];
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) store(to[i], exponential(load(from[i]) * scale - shift) * factor);
        if (column[row] >= 0) store(to[at], last);
    }
}

// ---- the optimizer

// Rounds to one of the two nearest numbers, up where the last bits and `draw`, of 16 bits, have a carry. What is not
// finite becomes no number.
inline bfloat16 rounded(float x, uint32_t draw) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return {uint16_t(x - x == 0 ? (bits + draw) >> 16 : 0x7fc0)};
}

// One step of AdamW (Loshchilov and Hutter, algorithm 2) by moments that are not yet rounded. number: of each row's
// first element, mixed with the step; the draws of an element are those of optim/rounding.py. kept1, kept2: 1 less beta.
inline void adamw(float* weight, const float* grad, bfloat16* mean, bfloat16* square, const int32_t* number,
                  int64_t rows, int64_t width, float decay, float kept1, float beta2, float kept2, float rate,
                  float root, float eps) {
    for (int64_t row = 0; row < rows; ++row) {
        float* w = weight + row * width;
        const float* g = grad + row * width;
        bfloat16 *m = mean + row * width, *s = square + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            uint32_t draw = uint32_t(number[row]) + uint32_t(i);
            draw = (draw ^ draw >> 16) * 0x7feb352du;
            draw = (draw ^ draw >> 15) * 0x846ca68bu;
            draw ^= draw >> 16;
            const float gradient = g[i], old = load(m[i]);
            const float first = old + (gradient - old) * kept1;
            const float second = load(s[i]) * beta2 + gradient * gradient * kept2;
            w[i] = w[i] * decay - rate * first / (std::sqrt(second) / root + eps);
            m[i] = rounded(first, draw & 0xffff);
            s[i] = rounded(second, draw >> 16);
        }
    }
}

// ---- routing

// Whether a comes before b, the largest first, as torch sorts: what is not a number before all.
inline bool before(float a, float b) { return a > b || (a != a && b == b); }

// The k largest of each row, the first among equals.
inline void largest(const float* scores, int64_t rows, int64_t width, int64_t k, float* values, int64_t* indices) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = scores + row * width;
        float* value = values + row * k;
        int64_t* index = indices + row * k;
        for (int64_t i = 0; i < width; ++i) {
            if (i >= k && !before(from[i], value[k - 1])) continue;
            int64_t at = i < k ? i : k - 1;
            for (; at > 0 && before(from[i], value[at - 1]); --at) {
                value[at] = value[at - 1];
                index[at] = index[at - 1];
            }
            value[at] = from[i];
            index[at] = i;
        }
    }
}

// Counts the choices of each expert, then gives each choice its row, in order; those of none, -1, come last.
// next: room for experts + 1 numbers.
inline void sort_rows(const int64_t* expert, int64_t choices, int64_t experts, int64_t* order, int64_t* row,
                      int64_t* counts, int64_t* next) {
    for (int64_t e = 0; e < experts; ++e) counts[e] = 0;
    for (int64_t i = 0; i < choices; ++i)
        if (expert[i] >= 0) ++counts[expert[i]];
    next[0] = 0;
    for (int64_t e = 0; e < experts; ++e) next[e + 1] = next[e] + counts[e];
    int64_t last = next[experts];
    for (int64_t i = 0; i < choices; ++i) {
        const bool none = expert[i] < 0;
        const int64_t at = none ? last++ : next[expert[i]]++;
        order[at] = i;
        row[i] = none ? -1 : at;
    }
}

// ---- products

using Handle = void*;

struct {
    int32_t (*addmm_out)(Handle out, Handle self, Handle a, Handle b, double beta, double alpha);
    int32_t (*from_blob)(void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides, int64_t offset,
                         int32_t dtype, int32_t device_type, int32_t device, Handle* made);
    int32_t (*drop)(Handle);
} torch;

inline int32_t type_of(const float*) { return 6; }  // c10::ScalarType
inline int32_t type_of(const bfloat16*) { return 15; }

// A matrix whose numbers lie elsewhere, stride 1 along its rows.
template <typename T>
struct Matrix {
    const T* data;
    int64_t rows, columns, stride;
};

template <typename T>
class Tensor {
  public:
    Tensor(Matrix<T> of, bool transposed) {
        const int64_t sizes[2][2] = {{of.rows, of.columns}, {of.columns, of.rows}};
        const int64_t strides[2][2] = {{of.stride, 1}, {1, of.stride}};
        error = torch.from_blob(const_cast<T*>(of.data), 2, sizes[transposed], strides[transposed], 0,
                                type_of(of.data), 0, 0, &handle);
    }
    ~Tensor() {
        if (handle) torch.drop(handle);
    }
    Tensor(const Tensor&) = delete;
    Handle handle = nullptr;
    int32_t error;
};

// Writes the product of a and b, each transposed where it says so, into `out`, or adds it to what is there. What
// native_products.h cannot multiply, torch does.
template <typename T>
int32_t multiply(Matrix<T> a, bool a_transposed, Matrix<T> b, bool b_transposed, Matrix<T> out, bool accumulate) {
#ifdef OWN_PRODUCTS
    const int64_t inner = a_transposed ? a.rows : a.columns;
    if (can_multiply<T>(out.rows, inner, out.columns, a_transposed)) {
        const Factor<T> left{a.data, a.stride, a_transposed}, right{b.data, b.stride, b_transposed};
        multiply_here(out.rows, inner, out.columns, left, right, const_cast<T*>(out.data), out.stride, accumulate);
        return 0;
    }
#endif
    const Tensor<T> left(a, a_transposed), right(b, b_transposed), to(out, false);
    if (left.error || right.error || to.error) return 1;
    return torch.addmm_out(to.handle, to.handle, left.handle, right.handle, accumulate, 1.0);
}

// ---- shares

// Rows of one expert within a share: as RowBlock in shares.py.
struct Block {
    int64_t expert, start, size, length, first, borrowed;
};

// Matrices of experts, [experts, d_ff, d_model] or down [experts, d_model, d_ff], or of gradients. `both` is
// [2 d_ff, d_model] for gate above up where one product makes both, and null elsewhere.
template <typename T>
struct Experts {
    T *gate, *up, *down, *both;
    int64_t d_model, d_ff, made_of = -1;

    int64_t size() const { return d_ff * d_model; }
    Matrix<T> take_gate(int64_t expert) const { return {gate + expert * size(), d_ff, d_model, d_model}; }
    Matrix<T> take_up(int64_t expert) const { return {up + expert * size(), d_ff, d_model, d_model}; }
    Matrix<T> take_down(int64_t expert) const { return {down + expert * size(), d_model, d_ff, d_ff}; }
    Matrix<T> take_both(int64_t expert) {
        if (expert != made_of) {
            std::memcpy(both, gate + expert * size(), size() * sizeof(T));
            std::memcpy(both + size(), up + expert * size(), size() * sizeof(T));
            made_of = expert;
        }
        return {both, 2 * d_ff, d_model, d_model};
    }
};

// Features of rows on the side of gate and up: side by side where one product makes both.
template <typename T>
struct Features {
    T *gate, *up;
    int64_t d_ff, stride;
    bool together() const { return stride == 2 * d_ff; }
    Matrix<T> both(int64_t start, int64_t rows) const { return {gate + start * stride, rows, stride, stride}; }
    Matrix<T> of_gate(int64_t start, int64_t rows) const { return {gate + start * stride, rows, d_ff, stride}; }
    Matrix<T> of_up(int64_t start, int64_t rows) const { return {up + start * stride, rows, d_ff, stride}; }
};

#define RETURN_IF_FAILED(call)                                                                                         \
    do {                                                                                                               \
        const int32_t failed = (call);                                                                                 \
        if (failed) return failed;                                                                                     \
    } while (0)

// What a thread computes: an int64 each, as Python writes them.
template <typename T>
struct Share {
    const Block* blocks;
    int64_t count;
    T* both;
    const int64_t* token;
    const float* factor;
    T *first_gate, *first_up;
};

template <typename T>
struct Forward : Share<T> {
    T *rows, *answers, *hidden;
    float* total;
};

template <typename T>
int64_t forward_share(const Forward<T>& share, Experts<T> experts, const T* x, int64_t stride) {
    const int64_t d_model = experts.d_model, d_ff = experts.d_ff;
    const Features<T> first{share.first_gate, share.first_up, d_ff, stride};
    experts.both = share.both;
    for (const Block* block = share.blocks; block != share.blocks + share.count; ++block) {
        const int64_t expert = block->expert, start = block->start, size = block->size, length = block->length;
        if (size == 0) continue;
        const Matrix<T> rows{share.rows, length, d_model, d_model}, answers{share.answers, length, d_model, d_model};
        const Matrix<T> hidden{share.hidden, length, d_ff, d_ff};
        gather(x, share.token + start, size, d_model, share.rows);
        if (first.together()) {
            RETURN_IF_FAILED(multiply(rows, false, experts.take_both(expert), true, first.both(start, length), false));
        } else {
            const Matrix<T> gates = first.of_gate(start, length), ups = first.of_up(start, length);
            RETURN_IF_FAILED(multiply(rows, false, experts.take_gate(expert), true, gates, false));
            RETURN_IF_FAILED(multiply(rows, false, experts.take_up(expert), true, ups, false));
        }
        activate(first.of_gate(start, size).data, first.of_up(start, size).data, stride, share.factor + start, size,
                 d_ff, share.hidden);
        RETURN_IF_FAILED(multiply(hidden, false, experts.take_down(expert), true, answers, false));
        add(share.answers, share.token + start, size, d_model, share.total);
    }
    return 0;
}

// borrowed: gradients of the one expert that begins in another share. grad_both: holds the product that is parted among
// gate and up.
template <typename T>
struct Backward : Share<T> {
    T *rows, *grad_out, *hidden, *grad_hidden, *grad_first_gate, *grad_first_up, *grad_both,
        *borrowed_gate, *borrowed_up, *borrowed_down;
    float *grad_x, *grad_factor;
};

template <typename T>
int64_t backward_share(const Backward<T>& share, Experts<T> experts, Experts<T> grads, const T* x, const T* grad,
                       int64_t stride) {
    const int64_t d_model = experts.d_model, d_ff = experts.d_ff;
    const Features<T> first{share.first_gate, share.first_up, d_ff, stride};
    const Features<T> grad_first{share.grad_first_gate, share.grad_first_up, d_ff, stride};
    Experts<T> borrowed{share.borrowed_gate, share.borrowed_up, share.borrowed_down, nullptr, d_model, d_ff};
    experts.both = share.both;
    for (const Block* block = share.blocks; block != share.blocks + share.count; ++block) {
        const int64_t expert = block->expert, start = block->start, size = block->size, length = block->length;
        Experts<T>& own = block->borrowed ? borrowed : grads;
        const int64_t at = block->borrowed ? 0 : expert, behind = length - size;
        const Matrix<T> down = own.take_down(at), gate = own.take_gate(at), up = own.take_up(at);
        if (size == 0) {
            std::memset(const_cast<T*>(down.data), 0, own.size() * sizeof(T));
            std::memset(const_cast<T*>(gate.data), 0, own.size() * sizeof(T));
            std::memset(const_cast<T*>(up.data), 0, own.size() * sizeof(T));
            continue;
        }
        const Matrix<T> rows{share.rows, length, d_model, d_model}, grad_out{share.grad_out, length, d_model, d_model};
        const Matrix<T> hidden{share.hidden, length, d_ff, d_ff}, grad_hidden{share.grad_hidden, length, d_ff, d_ff};
        const bool accumulate = !block->first;
        // The rows and their gradients, and zeros behind the block.
        gather(x, share.token + start, size, d_model, share.rows);
        gather(grad, share.token + start, size, d_model, share.grad_out);
        std::memset(share.rows + size * d_model, 0, behind * d_model * sizeof(T));
        std::memset(share.grad_out + size * d_model, 0, behind * d_model * sizeof(T));
        std::memset(share.hidden + size * d_ff, 0, behind * d_ff * sizeof(T));
        RETURN_IF_FAILED(multiply(grad_out, false, experts.take_down(expert), false, grad_hidden, false));
        // Hidden features again, and the gradients of weights and of the products of gate and up.
        for (int64_t row = size; row < length; ++row) {
            std::memset(grad_first.gate + row * stride, 0, d_ff * sizeof(T));
            std::memset(grad_first.up + row * stride, 0, d_ff * sizeof(T));
        }
        activate_backward(first.of_gate(start, size).data, first.of_up(start, size).data, stride, share.factor + start,
                          share.grad_hidden, size, d_ff, share.hidden, grad_first.gate, grad_first.up, stride,
                          share.grad_factor + start);
        // The gradients of the matrices, and of the rows in the place of the output's.
        RETURN_IF_FAILED(multiply(grad_out, true, hidden, false, down, accumulate));
        if (first.together()) {
            const Matrix<T> both = grad_first.both(0, length);
            RETURN_IF_FAILED(multiply(both, false, experts.take_both(expert), false, grad_out, false));
            const Matrix<T> made{share.grad_both, 2 * d_ff, d_model, d_model};
            RETURN_IF_FAILED(multiply(both, true, rows, false, made, false));
            part(share.grad_both, own.size(), accumulate, gate.data, up.data);
        } else {
            const Matrix<T> of_gate = grad_first.of_gate(0, length), of_up = grad_first.of_up(0, length);
            RETURN_IF_FAILED(multiply(of_gate, false, experts.take_gate(expert), false, grad_out, false));
            RETURN_IF_FAILED(multiply(of_up, false, experts.take_up(expert), false, grad_out, true));
            RETURN_IF_FAILED(multiply(of_gate, true, rows, false, gate, accumulate));
            RETURN_IF_FAILED(multiply(of_up, true, rows, false, up, accumulate));
        }
        add(share.grad_out, share.token + start, size, d_model, share.grad_x);
    }
    return 0;
}

// Computes all shares, each on a thread of its own. -> what one that failed returned, or 0
template <typename Kind, typename Body>
int64_t run_shares(const Kind* shares, int64_t count, const Body& body) {
    std::atomic<int64_t> status{0};
    run_parts(count, count, [&](int64_t number) {
        if (const int64_t failed = body(shares[number])) status = failed;
    });
    return status;
}

}  // namespace

// parts: how many threads compute it, each some of the rows.
#define FOR_EACH_TYPE(T, NAME)                                                                                         \
    int64_t gather_##NAME(int64_t parts, const T* x, const int64_t* token, int64_t rows, int64_t width, T* out) {      \
        split_rows(rows, parts, [&](int64_t low, int64_t high, int64_t) {                                              \
            gather(x, token + low, high - low, width, out + low * width);                                              \
        });                                                                                                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    int64_t add_##NAME(int64_t parts, const T* in, const int64_t* token, int64_t rows, int64_t width, float* total) {  \
        split_rows(rows, parts, [&](int64_t low, int64_t high, int64_t) {                                              \
            add(in + low * width, token + low, high - low, width, total);                                              \
        });                                                                                                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    int64_t sum_rows_##NAME(int64_t parts, const T* rows, const float* factor, const int64_t* row, int64_t tokens,     \
                            int64_t choices, int64_t width, T* out) {                                                  \
        split_rows(tokens, parts, [&](int64_t low, int64_t high, int64_t) {                                            \
            sum_rows(rows, factor ? factor + low * choices : nullptr, row + low * choices, high - low, choices, width, \
                     out + low * width);                                                                               \
        });                                                                                                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    int64_t activate_##NAME(int64_t parts, const T* gate, const T* up, int64_t stride, const float* factor,            \
                            int64_t rows, int64_t width, T* hidden) {                                                  \
        split_rows(rows, parts, [&](int64_t low, int64_t high, int64_t) {                                              \
            activate(gate + low * stride, up + low * stride, stride, factor + low, high - low, width,                  \
                     hidden + low * width);                                                                            \
        });                                                                                                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    int64_t activate_backward_##NAME(int64_t parts, const T* gate, const T* up, int64_t stride, const float* factor,   \
                                     const T* grad_hidden, int64_t rows, int64_t width, T* hidden, T* grad_gate,       \
                                     T* grad_up, int64_t grad_stride, float* grad_factor) {                            \
        split_rows(rows, parts, [&](int64_t low, int64_t high, int64_t) {                                              \
            activate_backward(gate + low * stride, up + low * stride, stride, factor + low, grad_hidden + low * width, \
                              high - low, width, hidden + low * width, grad_gate + low * grad_stride,                  \
                              grad_up + low * grad_stride, grad_stride, grad_factor + low);                            \
        });                                                                                                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    int64_t norm_##NAME(int64_t parts, const T* x, const T* weight, double eps, int64_t rows, int64_t width, T* out,   \
                        float* inverse) {                                                                              \
        split_rows(rows, parts, [&](int64_t low, int64_t high, int64_t) {                                              \
            norm(x + low * width, weight, eps, high - low, width, out + low * width, inverse + low);                   \
        });                                                                                                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    int64_t norm_backward_##NAME(int64_t parts, const T* grad, const T* x, const T* weight, const float* inverse,      \
                                 int64_t rows, int64_t width, T* grad_x, float* grad_weights) {                        \
        split_rows(rows, parts, [&](int64_t low, int64_t high, int64_t part) {                                         \
            norm_backward(grad + low * width, x + low * width, weight, inverse + low, high - low, width,               \
                          grad_x + low * width, grad_weights + part * width);                                          \
        });                                                                                                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    int64_t rotate_##NAME(int64_t parts, const T* x, const T* cosine, const T* sine, int64_t sign, int64_t rows,       \
                          int64_t heads, int64_t half, T* out) {                                                       \
        split_rows(rows, parts, [&](int64_t low, int64_t high, int64_t) {                                              \
            const int64_t at = low * heads * 2 * half;                                                                 \
            rotate(x + at, cosine + low * half, sine + low * half, sign, high - low, heads, half, out + at);           \
        });                                                                                                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    int64_t normalise_##NAME(int64_t parts, const T* logits, const int64_t* column, double scale, int64_t rows,        \
                             int64_t width, float* log_sum, float* chosen) {                                           \
        split_rows(rows, parts, [&](int64_t low, int64_t high, int64_t) {                                              \
            normalise(logits + low * width, column + low, float(scale), high - low, width, log_sum + low,              \
                      chosen + low);                                                                                   \
        });                                                                                                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    int64_t grad_logits_##NAME(int64_t parts, const T* logits, const int64_t* column, const float* log_sum,            \
                               const float* grad_probs, const float* grad_chosen, double scale, int64_t rows,          \
                               int64_t width, T* out) {                                                                \
        split_rows(rows, parts, [&](int64_t low, int64_t high, int64_t) {                                              \
            grad_logits(logits + low * width, column + low, log_sum + low, grad_probs + low, grad_chosen + low,        \
                        float(scale), high - low, width, out + low * width);                                           \
        });                                                                                                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    int64_t multiplies_##NAME(int64_t d_model, int64_t d_ff) { return can_multiply_experts<T>(d_model, d_ff); }        \
    int64_t forward_shares_##NAME(const Forward<T>* shares, int64_t count, int64_t d_model, int64_t d_ff, T* gate,     \
                                  T* up, T* down, const T* x, int64_t stride) {                                        \
        return run_shares(shares, count, [&](const Forward<T>& share) {                                                \
            return forward_share<T>(share, {gate, up, down, nullptr, d_model, d_ff}, x, stride);                       \
        });                                                                                                            \
    }                                                                                                                  \
    int64_t backward_shares_##NAME(const Backward<T>* shares, int64_t count, int64_t d_model, int64_t d_ff, T* gate,   \
                                   T* up, T* down, const T* x, int64_t stride, const T* grad, T* grad_gate,            \
                                   T* grad_up, T* grad_down) {                                                         \
        return run_shares(shares, count, [&](const Backward<T>& share) {                                               \
            return backward_share<T>(share, {gate, up, down, nullptr, d_model, d_ff},                                  \
                                     {grad_gate, grad_up, grad_down, nullptr, d_model, d_ff}, x, grad, stride);        \
        });                                                                                                            \
    }                                                                                                                  \
    int64_t attend_##NAME(int64_t threads, const T* q, const T* k, const T* v, const int64_t* first,                   \
                          int64_t first_row, const float* slopes, double scale, int64_t batch, int64_t seq_q,          \
                          int64_t seq_k, int64_t heads, int64_t kv_heads, int64_t head_dim, T* out, float* log_sum) {  \
        const Attention<T> of{q,     k,     v,     first,    first_row, slopes, float(scale), batch,                   \
                              seq_q, seq_k, heads, kv_heads, head_dim,  out,    log_sum};                              \
        const int64_t segments = (seq_q + segment - 1) / segment;                                                      \
        run_parts(batch * kv_heads * segments, threads, [&](int64_t number) {                                          \
            const int64_t begin = number % segments * segment, head = number / segments;                               \
            attend(of, head / kv_heads, head % kv_heads, begin, std::min(begin + segment, seq_q));                     \
        });                                                                                                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    int64_t attend_backward_##NAME(int64_t threads, const T* q, const T* k, const T* v, const int64_t* first,          \
                                   int64_t first_row, const float* slopes, double scale, int64_t batch, int64_t seq_q, \
                                   int64_t seq_k, int64_t heads, int64_t kv_heads, int64_t head_dim, T* out,           \
                                   float* log_sum, const T* grad, T* grad_q, T* grad_k, T* grad_v) {                   \
        const Attention<T> of{q,     k,     v,     first,    first_row, slopes, float(scale), batch,                   \
                              seq_q, seq_k, heads, kv_heads, head_dim,  out,    log_sum};                              \
        run_parts(batch * kv_heads, threads, [&](int64_t number) {                                                     \
            attend_backward(of, grad, grad_q, grad_k, grad_v, number / kv_heads, number % kv_heads);                   \
        });                                                                                                            \
        return 0;                                                                                                      \
    }

extern "C" {
void use_torch(void* addmm_out, void* from_blob, void* drop, void* parallel) {
    torch.addmm_out = reinterpret_cast<decltype(torch.addmm_out)>(addmm_out);
    torch.from_blob = reinterpret_cast<decltype(torch.from_blob)>(from_blob);
    torch.drop = reinterpret_cast<decltype(torch.drop)>(drop);
    run_team = reinterpret_cast<decltype(run_team)>(parallel);
}
int64_t adamw_float32(int64_t parts, float* weight, const float* grad, bfloat16* mean, bfloat16* square,
                      const int32_t* number, int64_t rows, int64_t width, double decay, double kept1, double beta2,
                      double kept2, double rate, double root, double eps) {
    split_rows(rows, parts, [&](int64_t low, int64_t high, int64_t) {
        const int64_t at = low * width;
        adamw(weight + at, grad + at, mean + at, square + at, number + low, high - low, width, decay, kept1, beta2,
              kept2, rate, root, eps);
    });
    return 0;
}
int64_t largest_float32(int64_t parts, const float* scores, int64_t rows, int64_t width, int64_t k, float* values,
                        int64_t* indices) {
    split_rows(rows, parts, [&](int64_t low, int64_t high, int64_t) {
        largest(scores + low * width, high - low, width, k, values + low * k, indices + low * k);
    });
    return 0;
}
int64_t sort_rows_int64(const int64_t* expert, int64_t choices, int64_t experts, int64_t* order, int64_t* row,
                        int64_t* counts, int64_t* next) {
    sort_rows(expert, choices, experts, order, row, counts, next);
    return 0;
}
FOR_EACH_TYPE(float, float32)
FOR_EACH_TYPE(bfloat16, bfloat16)
}
