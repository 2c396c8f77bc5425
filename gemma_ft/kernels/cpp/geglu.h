// GeGLU (geglu.py)
#pragma once
#include "numbers.h"

namespace gemma_ft {

constexpr float ROOT = 0.7978845608028654f, CUBE = 0.044715f;  // gelu's tanh approximation, arXiv:1606.08415

template <class T> ALWAYS T bent(T gate, T up) {
    const float g = wide(gate), gelu = 0.5f * g * (1.0f + tanh_of(ROOT * (g + CUBE * g * g * g)));
    return narrow<T>(wide(narrow<T>(gelu)) * wide(up));
}

template <class T> void geglu(const T* gate, const T* up, T* out, i64 count, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static) if (parallel : count > SMALL)
    for (i64 i = 0; i < count; ++i) out[i] = bent(gate[i], up[i]);
}

template <class T>
void geglu_backward(const T* upstream, const T* gate, const T* up, T* grad_gate, T* grad_up, i64 count, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static) if (parallel : count > SMALL)
    for (i64 i = 0; i < count; ++i) {
        const float g = wide(gate[i]), given = wide(upstream[i]);
        const float tanh = tanh_of(ROOT * (g + CUBE * g * g * g));
        const float slope = 0.5f * (1.0f + tanh) + 0.5f * g * (1.0f - tanh * tanh) * ROOT * (1.0f + 3.0f * CUBE * g * g);
        grad_gate[i] = narrow<T>(given * wide(up[i]) * slope);
        grad_up[i] = narrow<T>(given * 0.5f * g * (1.0f + tanh));
    }
}

}  // namespace gemma_ft
