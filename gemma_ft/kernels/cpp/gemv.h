// A linear layer on few rows (gemv.py): out[m, o] = sum of x[m, i] w[o, i]; limited by the reading of w.
//
// Multiplied in float32, as wide as any vector unit does it: products of bf16 pairs are half as fast where there are no
// tiles for them. x comes as float32 in the order in which numbers leave their storage.
#pragma once
#include "nf4.h"

namespace gemma_ft {

#ifdef __AVX512BW__
constexpr bool WIDE_VECTORS = true;
#else
constexpr bool WIDE_VECTORS = false;
#endif
constexpr int AT_ONCE = 8;  // rows of x that share a reading of w
// How far ahead memory is asked for, in bytes: what the processor foresees ends with a page. It is asked for in the order
// in which it lies, though two rows are read side by side (one would wait for its own sums): some processors read
// memory twice as fast in one stream as in two.
constexpr i64 AHEAD = 6144;

// The sums of two rows of w with M rows of x: each in one order, however many there are, so that a sequence's answer does
// not depend on its neighbours.
#ifdef __AVX512BW__
template <int M> struct Sums {
    __m512 sum[2][M] = {};
    // 32 numbers of each row, 16 by 16, and where those of x lie
    void add(const __m512 (&w)[2][2], const float* x, i64 stride) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
            for (int half = 0; half < 2; ++half) {
                const __m512 given = _mm512_loadu_ps(x + m * stride + 16 * half);
                for (int r = 0; r < 2; ++r) sum[r][m] = _mm512_fmadd_ps(w[r][half], given, sum[r][m]);
            }
    }
    float of(int r, int m) const { return _mm512_reduce_add_ps(sum[r][m]); }
};
#else
constexpr int PART = 256;
template <int M> struct Sums {
    float sum[2][M] = {};
    void add(const float* w, int r, i64 count, const float* x, i64 stride) {
        for (int m = 0; m < M; ++m) {
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (i64 i = 0; i < count; ++i) part += w[i] * x[m * stride + i];
            sum[r][m] += part;
        }
    }
    float of(int r, int m) const { return sum[r][m]; }
};
#endif

// Storages of the weight: `two` gives the products of its rows at, at + 1.
template <class T> struct Stored {
    static constexpr bool BY_HALVES = WIDE_VECTORS && sizeof(T) == 2;  // of 32 numbers of x those at even places first
    const T* w;
    i64 I;
#ifdef __AVX512BW__
    static void widen(const T* from, __m512 (&to)[2]) {  // 32 numbers
        if constexpr (sizeof(T) == 2) {
            const __m512i pairs = _mm512_loadu_si512(from);
            to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            to[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
        } else {
            to[0] = _mm512_loadu_ps(from), to[1] = _mm512_loadu_ps(from + 16);
        }
    }
#endif
    template <int M> Sums<M> two(i64 at, const float* x) const {
        const T* rows[2] = {w + at * I, w + (at + 1) * I};
        Sums<M> sums;
#ifdef __AVX512BW__
        constexpr i64 READ = 2 * 32 * sizeof(T);  // bytes at a time
        const char* soon = reinterpret_cast<const char*>(rows[0]) + AHEAD;
        for (i64 i = 0; i < I; i += 32) {
            __m512 numbers[2][2];
            for (int r = 0; r < 2; ++r) widen(rows[r] + i, numbers[r]);
            for (i64 line = 0; line < READ; line += 64) __builtin_prefetch(soon + line);
            soon += READ;
            sums.add(numbers, x + i, I);
        }
#else
        float numbers[PART];
        for (i64 i = 0; i < I; i += PART) {
            const i64 count = I - i < PART ? I - i : PART;
            for (int r = 0; r < 2; ++r) {
#pragma omp simd
                for (i64 j = 0; j < count; ++j) numbers[j] = wide(rows[r][i + j]);
                sums.add(numbers, r, count, x + i, I);
            }
        }
#endif
        return sums;
    }
};

constexpr i64 MOST_BLOCKS = 1024;  // of a row

template <class T> struct Quantized {
    static constexpr bool BY_HALVES = WIDE_VECTORS;
    Packed p;
    i64 I;
    template <int M> Sums<M> two(i64 at, const float* x) const {
        const i64 blocks = I >> p.block_bits;
        Sums<M> sums;
#ifdef __AVX512BW__
        const __m512 code = _mm512_loadu_ps(p.code);
        float scales[2][MOST_BLOCKS];
        for (int r = 0; r < 2; ++r) scales_of(p, (at + r) * blocks, blocks, scales[r]);
        const std::uint8_t* bytes = p.bytes + at * I / 2;
        for (i64 i = 0; i < I; i += 64) {
            __m512 tables[2];
            for (int r = 0; r < 2; ++r) tables[r] = table_of<T>(code, scales[r][i >> p.block_bits]);
#pragma GCC unroll 2
            for (int part = 0; part < 64; part += 32) {
                __m512 numbers[2][2];
                for (int r = 0; r < 2; ++r) {
                    const auto in = reinterpret_cast<const __m128i*>(bytes + (r * I + i + part) / 2);
                    const __m512i packed = _mm512_cvtepu8_epi32(_mm_loadu_si128(in));
                    numbers[r][0] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4), tables[r]);
                    numbers[r][1] = _mm512_permutexvar_ps(packed, tables[r]);  // by the lowest 4 bits
                }
                sums.add(numbers, x + i + part, I);
            }
        }
#else
        T numbers[LARGEST_BLOCK];
        float wides[LARGEST_BLOCK];
        for (i64 block = 0; block < blocks; ++block)
            for (int r = 0; r < 2; ++r) {
                unpack_block(p, (at + r) * blocks + block, numbers);
#pragma omp simd
                for (i64 j = 0; j < p.block; ++j) wides[j] = wide(numbers[j]);
                sums.add(wides, r, p.block, x + block * p.block, I);
            }
#endif
        return sums;
    }
};

// x [count] in float32, in the order in which a storage is read.
template <class Source, class T> void arrange(const T* x, float* to, i64 count) {
    if constexpr (!Source::BY_HALVES) {
#pragma omp simd
        for (i64 i = 0; i < count; ++i) to[i] = wide(x[i]);
    } else {
        for (i64 at = 0; at < count; at += 32)
#pragma omp simd
            for (int i = 0; i < 16; ++i) {
                to[at + i] = wide(x[at + 2 * i]);
                to[at + 16 + i] = wide(x[at + 2 * i + 1]);
            }
    }
}

template <int M, class Source, class Emit> inline void emit_two(const Source& source, const float* x, i64 at, i64 m, Emit emit) {
    const Sums<M> sums = source.template two<M>(at, x + m * source.I);
    for (int row = 0; row < M; ++row)
        for (int r = 0; r < 2; ++r) emit(m + row, at + r, sums.of(r, row));
}

// Products of rows [first, last) of w with M rows of x, each given to emit(m, o, value).
template <class Source, class Emit>
void few_products(const Source& source, const float* x, i64 M, i64 first, i64 last, Emit emit) {
    for (i64 at = first; at < last; at += 2)
        for (i64 m = 0; m < M;) {
            const i64 left = M - m;
            if (left >= AT_ONCE) emit_two<AT_ONCE>(source, x, at, m, emit), m += AT_ONCE;
            else if (left >= 4) emit_two<4>(source, x, at, m, emit), m += 4;
            else if (left >= 2) emit_two<2>(source, x, at, m, emit), m += 2;
            else emit_two<1>(source, x, at, m, emit), m += 1;
        }
}

template <class T, class Source>
void gemv_of(const Source& source, const T* x, T* out, i64 M, i64 O, i64 I, int threads) {
    Floats given(M * I);
    arrange<Source>(x, given.data(), M * I);
    const auto emit = [=](i64 m, i64 o, float value) { out[m * O + o] = narrow<T>(value); };
#pragma omp parallel for num_threads(threads) schedule(static) if (O * I > SMALL)
    for (i64 at = 0; at < O; at += 2) few_products(source, given.data(), M, at, at + 2, emit);
}

template <class T> void gemv(const T* w, const T* x, T* out, i64 M, i64 O, i64 I, int threads) {
    gemv_of(Stored<T>{w, I}, x, out, M, O, I, threads);
}

template <class T>
void gemv_nf4(const std::uint8_t* packed, const float* scales, const std::uint8_t* scales8, const float* code2,
                  const float* scales2, float offset, const float* code, const T* x, T* out, i64 M, i64 O, i64 I, i64 block,
                  i64 block2, int threads) {
    const Packed p = packed_of(packed, scales, scales8, code2, scales2, offset, code, block, block2);
    gemv_of(Quantized<T>{p, I}, x, out, M, O, I, threads);
}

}  // namespace gemma_ft
