// Numbers of the operations: float32 and bf16, exp and tanh as loops of vectors take them.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace gemma_ft {

using i64 = std::int64_t;
constexpr i64 SMALL = 32768;  // elements below which threads cost more than they bring

#define ALWAYS [[gnu::always_inline]] inline  // a loop with a call in it is not made one of vectors

struct bf16 {
    std::uint16_t bits;
};

ALWAYS float wide(float x) { return x; }
ALWAYS float wide(bf16 x) { return std::bit_cast<float>(std::uint32_t(x.bits) << 16); }

template <class T> ALWAYS T narrow(float x);
template <> ALWAYS float narrow<float>(float x) { return x; }
template <> ALWAYS bf16 narrow<bf16>(float x) {  // to the nearest, ties to even; NaN stays one
    const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t near = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return bf16{std::uint16_t(x != x ? 0x7fc0u : near)};
}

template <class T> struct OfWholeLines {  // an allocator: no vector of numbers lies across two lines of the cache
    using value_type = T;
    static constexpr std::align_val_t LINE{64};
    T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), LINE)); }
    void deallocate(T* place, std::size_t) { ::operator delete(place, LINE); }
    bool operator==(const OfWholeLines&) const = default;
};
using Floats = std::vector<float, OfWholeLines<float>>;

// exp(x) to 2 ulp for x <= 88; the comparisons let NaN through. Polynomial: Cephes, expf.
ALWAYS float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = std::rint(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float y = p * r * r + r + 1.0f;
    return y * std::bit_cast<float>((std::int32_t(n) + 127) << 23);
}

// tanh(x) to 2 ulp, small x included. Polynomial: Cephes, tanhf.
ALWAYS float tanh_of(float x) {
    float size = x < 0.0f ? -x : x;
    const float z = x * x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const float near = x + x * z * p;
    size = size > 10.0f ? 10.0f : size;
    const float far = 1.0f - 2.0f / (exp_of(2.0f * size) + 1.0f);
    return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

}  // namespace gemma_ft
