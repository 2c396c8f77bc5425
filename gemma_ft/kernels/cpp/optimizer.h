// A step of AdamW or Lion whose moments lie in 8 bits (optimizer_step.py): a block is read, stepped and written at once
#pragma once
#include <cstring>

#include "numbers.h"

namespace gemma_ft {

constexpr i64 MOMENT_BLOCK = 256, STEPS_OF_MAP = 65535;

struct Moment {  // of one parameter, as bitsandbytes stores it
    std::uint8_t* codes;
    float* absmax;             // of each block
    const float* map;          // what each code stands for, in units of absmax
    const std::uint8_t* near;  // the code of the number nearest to each of the steps from -1 to 1
};

// Roundings are those of the plain steps, so that the codes are too: products are fused with sums where said, and nowhere
// else.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

#ifdef __AVX512VBMI__
struct Map {  // its 256 numbers by their bytes: the lowest of all, then the next
    alignas(64) std::uint8_t bytes[4][256];
    explicit Map(const float* numbers) {
        for (int code = 0; code < 256; ++code)
            for (int byte = 0; byte < 4; ++byte) bytes[byte][code] = std::uint8_t(std::bit_cast<std::uint32_t>(numbers[code]) >> 8 * byte);
    }
};

inline __m512i looked_up(const std::uint8_t* table, __m512i codes) {  // 64 codes at a time, a byte for each
    const __m512i* rows = reinterpret_cast<const __m512i*>(table);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(rows), codes, _mm512_load_si512(rows + 1));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(rows + 2), codes, _mm512_load_si512(rows + 3));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}

inline void read_whole(const Map& map, const std::uint8_t* codes, float scale, float* to) {
    // fours of codes are put where zipping their bytes, within lanes of 16, leaves the numbers in order
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512 times = _mm512_set1_ps(scale);
    for (i64 i = 0; i < MOMENT_BLOCK; i += 64) {
        const __m512i some = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes + i));
        const __m512i a = looked_up(map.bytes[0], some), b = looked_up(map.bytes[1], some);
        const __m512i c = looked_up(map.bytes[2], some), d = looked_up(map.bytes[3], some);
        const __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
        const __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
        const __m512i found[4] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd), _mm512_unpacklo_epi16(AB, CD),
                                  _mm512_unpackhi_epi16(AB, CD)};
        for (int part = 0; part < 4; ++part)
            _mm512_storeu_ps(to + i + 16 * part, _mm512_mul_ps(_mm512_castsi512_ps(found[part]), times));
    }
}
#else
struct Map {
    explicit Map(const float*) {}
};
#endif

inline void read_moment(const Moment& moment, const Map& map, i64 start, i64 count, float* to) {
    const float scale = moment.absmax[start / MOMENT_BLOCK];
#ifdef __AVX512VBMI__
    if (count == MOMENT_BLOCK) return read_whole(map, moment.codes + start, scale, to);
#endif
    for (i64 i = 0; i < count; ++i) to[i] = moment.map[moment.codes[start + i]] * scale;
}

inline void write_moment(const Moment& moment, i64 start, i64 count, const float* from) {
    float top = 0.0f;
#pragma omp simd reduction(max : top)
    for (i64 i = 0; i < count; ++i) {
        const float size = std::fabs(from[i]);
        top = size > top ? size : top;
    }
    moment.absmax[start / MOMENT_BLOCK] = top;
    const float inverse = 1.0f / top;
    std::uint8_t* to = moment.codes + start;
    if (top == 0.0f) {
        for (i64 i = 0; i < count; ++i) to[i] = 0;
        return;
    }
    std::int32_t steps[MOMENT_BLOCK];
#pragma omp simd
    for (i64 i = 0; i < count; ++i) {
        float part = from[i] * inverse;
        part = part > -1.0f ? part : -1.0f;  // NaN too: it is no index
        part = part < 1.0f ? part : 1.0f;
        steps[i] = std::int32_t((part + 1.0f) * 0.5f * float(STEPS_OF_MAP) + 0.5f);
    }
    i64 i = 0;
    for (; i + 8 <= count; i += 8) {  // a store for eight look-ups
        std::uint64_t eight = 0;
        for (int one = 0; one < 8; ++one) eight |= std::uint64_t(moment.near[steps[i + one]]) << 8 * one;
        std::memcpy(to + i, &eight, 8);
    }
    for (; i < count; ++i) to[i] = moment.near[steps[i]];
}

// numbers: 1 - lr weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, -lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps
template <class T>
void adamw_8bit(T* weights, const T* grads, std::uint8_t* codes1, float* absmax1, const float* map1, const std::uint8_t* near1,
                std::uint8_t* codes2, float* absmax2, const float* map2, const std::uint8_t* near2, const float* numbers, i64 count,
                int threads) {
    const Moment first{codes1, absmax1, map1, near1}, second{codes2, absmax2, map2, near2};
    const Map map_of_first(map1), map_of_second(map2);
    const float keep = numbers[0], beta1 = numbers[1], rest1 = numbers[2], beta2 = numbers[3], rest2 = numbers[4],
                rate = numbers[5], correction = numbers[6], eps = numbers[7];
#pragma omp parallel for num_threads(threads) schedule(static) if (count > SMALL)
    for (i64 start = 0; start < count; start += MOMENT_BLOCK) {
        const i64 size = count - start < MOMENT_BLOCK ? count - start : MOMENT_BLOCK;
        float m[MOMENT_BLOCK], v[MOMENT_BLOCK];
        read_moment(first, map_of_first, start, size, m);
        read_moment(second, map_of_second, start, size, v);
        T* w = weights + start;
        const T* g = grads + start;
#pragma omp simd
        for (i64 i = 0; i < size; ++i) {
            const float grad = wide(g[i]);
            m[i] = std::fma(rest1, grad, m[i] * beta1);
            v[i] = std::fma(rest2 * grad, grad, v[i] * beta2);
            const float below = std::sqrt(v[i]) * correction + eps;
            w[i] = narrow<T>(wide(w[i]) * keep + rate * m[i] / below);
        }
        write_moment(first, start, size, m);
        write_moment(second, start, size, v);
    }
}

// numbers: 1 - lr weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, lr
template <class T>
void lion_8bit(T* weights, const T* grads, std::uint8_t* codes, float* absmax, const float* map, const std::uint8_t* near,
               const float* numbers, i64 count, int threads) {
    const Moment moment{codes, absmax, map, near};
    const Map map_of_moment(map);
    const float keep = numbers[0], beta1 = numbers[1], rest1 = numbers[2], beta2 = numbers[3], rest2 = numbers[4],
                rate = numbers[5];
#pragma omp parallel for num_threads(threads) schedule(static) if (count > SMALL)
    for (i64 start = 0; start < count; start += MOMENT_BLOCK) {
        const i64 size = count - start < MOMENT_BLOCK ? count - start : MOMENT_BLOCK;
        float m[MOMENT_BLOCK];
        read_moment(moment, map_of_moment, start, size, m);
        T* w = weights + start;
        const T* g = grads + start;
#pragma omp simd
        for (i64 i = 0; i < size; ++i) {
            const float grad = wide(g[i]), way = m[i] * beta1 + grad * rest1;
            const float turn = way > 0.0f ? rate : (way < 0.0f ? -rate : 0.0f);
            w[i] = narrow<T>(wide(w[i]) * keep - turn);
            m[i] = std::fma(rest2, grad, m[i] * beta2);
        }
        write_moment(moment, start, size, m);
    }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

}  // namespace gemma_ft
