// RMSNorm (rms_norm.py)
#pragma once
#include "numbers.h"

namespace gemma_ft {

// One row [D], gain(i) the factor of its i-th number; returns 1 / rms. `to` is neither `in` nor `before`.
template <class T, class Gain> inline float norm_row(const T* in, Gain gain, const T* before, T* to, i64 D, float eps) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (i64 i = 0; i < D; ++i) squares += wide(in[i]) * wide(in[i]);
    const float scale = 1.0f / std::sqrt(squares / float(D) + eps);
#pragma omp simd
    for (i64 i = 0; i < D; ++i) to[i] = narrow<T>(wide(in[i]) * scale * gain(i));
    if (!before) return scale;
#pragma omp simd
    for (i64 i = 0; i < D; ++i) to[i] = narrow<T>(wide(before[i]) + wide(to[i]));  // the sum is of the rounded norm
    return scale;
}

template <class T>
void rms_norm(const T* x, const float* gain, const T* residual, T* out, float* rstd, i64 R, i64 D, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (R * D > SMALL)
    for (i64 row = 0; row < R; ++row) {
        const T* before = residual ? residual + row * D : nullptr;
        rstd[row] = norm_row(x + row * D, [gain](i64 i) { return gain[i]; }, before, out + row * D, D, eps);
    }
}

template <class T>
void rms_norm_backward(const T* upstream, const T* x, const float* gain, const float* rstd, T* grad, i64 R, i64 D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (R * D > SMALL)
    for (i64 row = 0; row < R; ++row) {
        const T *in = x + row * D, *up = upstream + row * D;
        T* to = grad + row * D;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (i64 i = 0; i < D; ++i) dot += wide(up[i]) * gain[i] * wide(in[i]);
        const float scale = rstd[row], pull = dot * scale * scale * scale / float(D);
#pragma omp simd
        for (i64 i = 0; i < D; ++i) to[i] = narrow<T>(wide(up[i]) * gain[i] * scale - wide(in[i]) * pull);
    }
}

// The gradient of a gain [D]: a thread sums some of its numbers over all rows, so that no sum depends on how many there are.
template <class T>
void rms_norm_weight_gradient(const T* upstream, const T* x, const float* rstd, float* grad, i64 R, i64 D, int threads) {
    constexpr i64 COLUMNS = 64, ROWS = 64;  // sums of as many rows are added up: long sums of float32 lose digits
#pragma omp parallel for num_threads(threads) schedule(static) if (R * D > SMALL)
    for (i64 first = 0; first < D; first += COLUMNS) {
        const i64 size = D - first < COLUMNS ? D - first : COLUMNS;
        float total[COLUMNS] = {};
        for (i64 start = 0; start < R; start += ROWS) {
            float part[COLUMNS] = {};
            const i64 end = start + ROWS < R ? start + ROWS : R;
            for (i64 row = start; row < end; ++row) {
                const T *up = upstream + row * D + first, *in = x + row * D + first;
#pragma omp simd
                for (i64 i = 0; i < size; ++i) part[i] += wide(up[i]) * wide(in[i]) * rstd[row];
            }
            for (i64 i = 0; i < size; ++i) total[i] += part[i];
        }
        for (i64 i = 0; i < size; ++i) grad[first + i] = total[i];
    }
}

}  // namespace gemma_ft
