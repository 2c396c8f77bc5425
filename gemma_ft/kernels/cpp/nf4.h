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

// two roundings, as bitsandbytes has them: volatile keeps the compiler from making one of them
inline float scale_of(const Packed& p, i64 at) {
    if (!p.code2) return p.scales[at];
    volatile float product = p.code2[p.scales8[at]] * p.scales2[at >> p.block2_bits];
    return product + p.offset;
}

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
