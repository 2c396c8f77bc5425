// The head's loss (cross_entropy.py): logits [R, V] become their gradient, where one is wanted
#pragma once
#include "numbers.h"

namespace gemma_ft {

template <class T>
void fused_cross_entropy(T* logits, const i64* targets, const float* weights, float* losses, std::uint8_t* correct, float* entropies, i64 R,
               i64 V, float cap, int with_grad, int threads) {
    const float size = cap > 0.0f ? cap : 1.0f;
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<float[]> rows(new float[2 * V]);
        float *bent = rows.get(), *e = rows.get() + V;
#pragma omp for schedule(static)
        for (i64 row = 0; row < R; ++row) {
            T* io = logits + row * V;
            const i64 target = targets[row];
            float top = -INFINITY, total = 0.0f, below = 0.0f;
            if (cap > 0.0f) {
#pragma omp simd reduction(max : top)
                for (i64 i = 0; i < V; ++i) {
                    bent[i] = tanh_of(wide(io[i]) * (1.0f / cap));
                    top = bent[i] > top ? bent[i] : top;
                }
            } else {
#pragma omp simd reduction(max : top)
                for (i64 i = 0; i < V; ++i) {
                    bent[i] = wide(io[i]);
                    top = bent[i] > top ? bent[i] : top;
                }
            }
#pragma omp simd reduction(+ : total, below)
            for (i64 i = 0; i < V; ++i) {
                const float gap = size * (bent[i] - top);
                e[i] = exp_of(gap);
                total += e[i];
                below += e[i] * gap;
            }
            i64 best = 0;
            while (best < V - 1 && bent[best] != top) ++best;
            correct[row] = bent[best] == top && best == target;
            entropies[row] = std::log(total) - below / total;
            losses[row] = std::log(total) + size * (top - bent[target]);
            if (!with_grad) continue;
            const float times = weights ? weights[row] : 1.0f, share = times / total;
            if (cap > 0.0f) {
#pragma omp simd
                for (i64 i = 0; i < V; ++i) io[i] = narrow<T>(e[i] * share * (1.0f - bent[i] * bent[i]));
                const float slope = 1.0f - bent[target] * bent[target];
                io[target] = narrow<T>((e[target] * share - times) * slope);
            } else {
#pragma omp simd
                for (i64 i = 0; i < V; ++i) io[i] = narrow<T>(e[i] * share);
                io[target] = narrow<T>(e[target] * share - times);
            }
        }
    }
}

}  // namespace gemma_ft
