// A linear layer on few rows (few_rows.py): out[m, o] = sum of x[m, i] w[o, i]; limited by the reading of w
#pragma once
#include "nf4.h"

namespace gemma_ft {

// Sources of the weight: row `at` is opened, and gives its numbers i .. i + 31, or one by one.
template <class T> struct Stored {
    const T* w;
    i64 I;
    struct Row {
        const T* w;
        float at(i64 i) const { return wide(w[i]); }
#ifdef __AVX512BF16__
        __m512bh part(i64 i) { return (__m512bh)_mm512_loadu_si512(w + i); }
#endif
    };
    Row row(i64 at) const { return {w + at * I}; }
};

template <class T> struct Quantized {
    Packed p;
    i64 I;
    struct Row {
        const Packed& p;
        const i64 first;
        i64 open = -1;
        float scale = 0.0f;
        Row(const Packed& from, i64 begin) : p(from), first(begin) {}
        float at(i64 i) {
            const i64 place = first + i;
            if (place >> p.block_bits != open) open = place >> p.block_bits, scale = scale_of(p, open);
            const std::uint8_t byte = p.bytes[place >> 1];
            return wide(narrow<T>(p.code[place & 1 ? byte & 15 : byte >> 4] * scale));
        }
#ifdef __AVX512BF16__
        __m512i table;
        __m512bh part(i64 i) {
            const i64 place = first + i;
            if (place >> p.block_bits != open) {
                open = place >> p.block_bits;
                const __m512 sixteen = _mm512_mul_ps(_mm512_loadu_ps(p.code), _mm512_set1_ps(scale_of(p, open)));
                table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(sixteen));
            }
            return (__m512bh)unpack_32(p.bytes + (place >> 1), table);
        }
#endif
    };
    Row row(i64 at) const { return Row(p, at * I); }
};

constexpr int AT_ONCE = 4;  // rows of x that share a reading of w

template <class T, class Source, int M> inline void products(const Source& source, const T* x, T* out, i64 O, i64 I, i64 at) {
    auto one = source.row(at), two = source.row(at + 1);
#ifdef __AVX512BF16__
    if constexpr (sizeof(T) == 2) {
        __m512 sums[2][M] = {};
        for (i64 i = 0; i < I; i += 32) {
            const __m512bh parts[2] = {one.part(i), two.part(i)};
            for (int m = 0; m < M; ++m) {
                const auto given = (__m512bh)_mm512_loadu_si512(x + m * I + i);
                sums[0][m] = _mm512_dpbf16_ps(sums[0][m], parts[0], given);
                sums[1][m] = _mm512_dpbf16_ps(sums[1][m], parts[1], given);
            }
        }
        for (int m = 0; m < M; ++m) {
            out[m * O + at] = narrow<T>(_mm512_reduce_add_ps(sums[0][m]));
            out[m * O + at + 1] = narrow<T>(_mm512_reduce_add_ps(sums[1][m]));
        }
        return;
    }
#endif
    float sums[2][M] = {};
    for (i64 i = 0; i < I; ++i) {
        const float parts[2] = {one.at(i), two.at(i)};
        for (int m = 0; m < M; ++m) {
            sums[0][m] += parts[0] * wide(x[m * I + i]);
            sums[1][m] += parts[1] * wide(x[m * I + i]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int row = 0; row < 2; ++row) out[m * O + at + row] = narrow<T>(sums[row][m]);
}

template <class T, class Source>
void few_rows_of(const Source& source, const T* x, T* out, i64 M, i64 O, i64 I, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (O * I > SMALL)
    for (i64 at = 0; at < O; at += 2)
        for (i64 m = 0; m < M;) {
            const T* rows = x + m * I;
            T* to = out + m * O;
            switch (M - m < AT_ONCE ? M - m : AT_ONCE) {
                case 1: products<T, Source, 1>(source, rows, to, O, I, at), m += 1; break;
                case 2: case 3: products<T, Source, 2>(source, rows, to, O, I, at), m += 2; break;
                default: products<T, Source, AT_ONCE>(source, rows, to, O, I, at), m += AT_ONCE;
            }
        }
}

template <class T> void few_rows(const T* w, const T* x, T* out, i64 M, i64 O, i64 I, int threads) {
    few_rows_of(Stored<T>{w, I}, x, out, M, O, I, threads);
}

template <class T>
void few_rows_nf4(const std::uint8_t* packed, const float* scales, const std::uint8_t* scales8, const float* code2,
                  const float* scales2, float offset, const float* code, const T* x, T* out, i64 M, i64 O, i64 I, i64 block,
                  i64 block2, int threads) {
    const Packed p = packed_of(packed, scales, scales8, code2, scales2, offset, code, block, block2);
    few_rows_of(Quantized<T>{p, I}, x, out, M, O, I, threads);
}

}  // namespace gemma_ft
