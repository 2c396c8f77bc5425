// Rotary positions (rotary.py): x and out [B, heads, T, H] by strides, angles [B, T, H] by the first
#pragma once
#include "numbers.h"

namespace gemma_ft {

// One head [H] at one position; sign -1 turns back.
template <class T> inline void turn_row(const T* in, const float* c, const float* s, T* out, i64 H, float sign) {
    const i64 half = H / 2;
#pragma omp simd
    for (i64 i = 0; i < half; ++i) {
        const float first = wide(in[i]), second = wide(in[i + half]), turn = sign * s[i];
        out[i] = narrow<T>(first * c[i] - second * turn);
        out[i + half] = narrow<T>(second * c[i] + first * turn);
    }
}

template <class T>
void rotate(const T* x, const float* cos, const float* sin, T* out, i64 B, i64 heads, i64 tokens, i64 H, const i64* from,
            const i64* to, i64 angles_of_row, float sign, int threads) {
#pragma omp parallel for collapse(3) num_threads(threads) schedule(static) if (B * heads * tokens * H > SMALL)
    for (i64 b = 0; b < B; ++b)
        for (i64 t = 0; t < tokens; ++t)
            for (i64 head = 0; head < heads; ++head) {
                const i64 at = b * angles_of_row + t * H;
                turn_row(x + b * from[0] + head * from[1] + t * from[2], cos + at, sin + at,
                         out + b * to[0] + head * to[1] + t * to[2], H, sign);
            }
}

}  // namespace gemma_ft
