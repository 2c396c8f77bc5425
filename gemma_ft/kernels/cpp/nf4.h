// NF4 (nf4.py): packed [count / 2], a scale for each block, itself in 8 bits where code2 is given
#pragma once
#include "numbers.h"

namespace gemma_ft {

struct Packed {
    const std::uint8_t* bytes;
    const float* scales;
    const std::uint8_t* scales8;
    const float *code2, *scales2;
    float offset;
    const float* code;
    i64 block;
    int block_bits, block2_bits;  // sizes of blocks are powers of two: a division would be most of the work
};

inline Packed packed_of(const std::uint8_t* bytes, const float* scales, const std::uint8_t* scales8, const float* code2,
                        const float* scales2, float offset, const float* code, i64 block, i64 block2) {
    const int bits = std::countr_zero(std::uint64_t(block)), bits2 = std::countr_zero(std::uint64_t(block2));
    return {bytes, scales, scales8, code2, scales2, offset, code, block, bits, bits2};
}

constexpr int LARGEST_BLOCK = 4096;  // that bitsandbytes has

// The scales of blocks at .. at + count - 1. Two roundings, as bitsandbytes has them: the compiler may not make one of
// them, so that the products are put down in between.
inline void scales_of(const Packed& p, i64 at, i64 count, float* to) {
    if (!p.code2) {
        for (i64 i = 0; i < count; ++i) to[i] = p.scales[at + i];
        return;
    }
    for (i64 i = 0; i < count; ++i) to[i] = p.code2[p.scales8[at + i]] * p.scales2[(at + i) >> p.block2_bits];
    asm volatile("" ::"r"(to) : "memory");
    for (i64 i = 0; i < count; ++i) to[i] += p.offset;
}

inline float scale_of(const Packed& p, i64 at) {
    float scale;
    scales_of(p, at, 1, &scale);
    return scale;
}

#ifdef __AVX512BW__
// a block's sixteen numbers, as T has them
template <class T> inline __m512 table_of(__m512 code, float scale) {
    const __m512 exact = _mm512_mul_ps(code, _mm512_set1_ps(scale));
    if constexpr (sizeof(T) == 4) return exact;
#ifdef __AVX512BF16__
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(exact)), 16));
#else
    const __m512i bits = _mm512_castps_si512(exact), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __m512 rounded = _mm512_castsi512_ps(_mm512_and_si512(near, _mm512_set1_epi32(int(0xffff0000u))));
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(exact, exact, _CMP_UNORD_Q), rounded, exact);  // NaN stays one
#endif
}
#endif

#ifdef __AVX512BW__
// 16 bytes are 32 numbers, the high half of a byte first; table: a block's sixteen bf16 in the lower half
inline __m512i unpack_32(const std::uint8_t* in, __m512i table) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
    const __m512i low = _mm512_slli_epi32(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), 16);
    return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(bytes, 4), low), table);
}
#endif

template <class T> inline void unpack_block(const Packed& p, i64 at, T* to) {
    const float scale = scale_of(p, at);
    alignas(64) T table[32];
#pragma omp simd
    for (int i = 0; i < 16; ++i) table[i] = narrow<T>(p.code[i] * scale);
    const std::uint8_t* in = p.bytes + at * p.block / 2;
#ifdef __AVX512BW__
    if constexpr (sizeof(T) == 2) {
        const __m512i values = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
        for (i64 i = 0; i < p.block / 2; i += 16) _mm512_storeu_si512(to + 2 * i, unpack_32(in + i, values));
        return;
    }
#endif
    for (i64 i = 0; i < p.block / 2; ++i) {
        to[2 * i] = table[in[i] >> 4];
        to[2 * i + 1] = table[in[i] & 15];
    }
}

template <class T>
void nf4(const std::uint8_t* packed, const float* scales, const std::uint8_t* scales8, const float* code2, const float* scales2,
         float offset, const float* code, T* out, i64 count, i64 block, i64 block2, int threads) {
    const Packed p = packed_of(packed, scales, scales8, code2, scales2, offset, code, block, block2);
#pragma omp parallel for num_threads(threads) schedule(static) if (count > SMALL)
    for (i64 at = 0; at < count / block; ++at) unpack_block(p, at, out + at * block);
}

}  // namespace gemma_ft
