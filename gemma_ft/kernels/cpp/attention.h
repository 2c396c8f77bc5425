// Attention (blockwise_attention.py): scores [heads, Q, S] of a block; query i sees keys low[i] .. last + i
#pragma once
#include "numbers.h"

namespace gemma_ft {

template <class T>
void attend(T* scores, const i64* low, float* log_sum, i64 heads, i64 Q, i64 S, i64 last, float scale, float cap, int threads) {
#pragma omp parallel num_threads(threads) if (heads * Q * S > SMALL)
    {
        const std::unique_ptr<float[]> row(new float[S]);
        float* s = row.get();
#pragma omp for schedule(static)
        for (i64 at = 0; at < heads * Q; ++at) {
            T* io = scores + at * S;
            const i64 begin = low[at % Q], end = last + at % Q + 1;
            float top = -INFINITY, total = 0.0f;
            if (cap > 0.0f) {
#pragma omp simd reduction(max : top)
                for (i64 i = begin; i < end; ++i) {
                    s[i] = cap * tanh_of(wide(io[i]) * (scale / cap));
                    top = s[i] > top ? s[i] : top;
                }
            } else {
#pragma omp simd reduction(max : top)
                for (i64 i = begin; i < end; ++i) {
                    s[i] = wide(io[i]) * scale;
                    top = s[i] > top ? s[i] : top;
                }
            }
#pragma omp simd reduction(+ : total)
            for (i64 i = begin; i < end; ++i) {
                s[i] = exp_of(s[i] - top);
                total += s[i];
            }
            const float share = 1.0f / total;
            for (i64 i = 0; i < begin; ++i) io[i] = narrow<T>(0.0f);
#pragma omp simd
            for (i64 i = begin; i < end; ++i) io[i] = narrow<T>(s[i] * share);
            for (i64 i = end; i < S; ++i) io[i] = narrow<T>(0.0f);
            log_sum[at] = top + std::log(total);
        }
    }
}

// scores become the weights, grad (of the weights) becomes the gradient of the scores before scale and cap
template <class T>
void attend_backward(T* scores, T* grad, const i64* low, const float* log_sum, i64 heads, i64 Q, i64 S, i64 last, float scale,
                     float cap, int threads) {
#pragma omp parallel num_threads(threads) if (heads * Q * S > SMALL)
    {
        const std::unique_ptr<float[]> rows(new float[2 * S]);
        float *p = rows.get(), *slope = rows.get() + S;
#pragma omp for schedule(static)
        for (i64 at = 0; at < heads * Q; ++at) {
            T *io = scores + at * S, *g = grad + at * S;
            const i64 begin = low[at % Q], end = last + at % Q + 1;
            const float norm = log_sum[at];
            float dot = 0.0f;
            if (cap > 0.0f) {
#pragma omp simd reduction(+ : dot)
                for (i64 i = begin; i < end; ++i) {
                    const float tanh = tanh_of(wide(io[i]) * (scale / cap));
                    slope[i] = scale * (1.0f - tanh * tanh);  // d cap tanh(s / cap) / ds = 1 - tanh^2
                    p[i] = exp_of(cap * tanh - norm);
                    dot += p[i] * wide(g[i]);
                }
            } else {
#pragma omp simd reduction(+ : dot)
                for (i64 i = begin; i < end; ++i) {
                    slope[i] = scale;
                    p[i] = exp_of(wide(io[i]) * scale - norm);
                    dot += p[i] * wide(g[i]);
                }
            }
            for (i64 i = 0; i < begin; ++i) io[i] = g[i] = narrow<T>(0.0f);
#pragma omp simd
            for (i64 i = begin; i < end; ++i) {
                io[i] = narrow<T>(p[i]);
                g[i] = narrow<T>(p[i] * (wide(g[i]) - dot) * slope[i]);
            }
            for (i64 i = end; i < S; ++i) io[i] = g[i] = narrow<T>(0.0f);
        }
    }
}

}  // namespace gemma_ft
