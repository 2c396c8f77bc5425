// What Gemma does to rows between its matrix products, on one CPU: each row is read and written once.
//
// A plain C interface, so that no header of torch or Python is needed: native.py compiles this file where it runs and
// calls it with the addresses of tensors. Arithmetic is float32 as in the plain-torch references (their files name
// them); a row is worked on by one thread, so that no result depends on how many there are.
// Letters: R rows, D their size.
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace {

using i64 = std::int64_t;
constexpr i64 SMALL = 32768;  // elements below which threads cost more than they bring

struct bf16 {
    std::uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(bf16 x) { return std::bit_cast<float>(std::uint32_t(x.bits) << 16); }

template <class T> inline T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) {  // to the nearest, ties to even; NaN stays one
    const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t near = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return bf16{std::uint16_t(x != x ? 0x7fc0u : near)};
}

// exp(x) to 2 ulp for x <= 88; the comparisons let NaN through. Polynomial: Cephes, expf.
inline float exp_of(float x) {
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
inline float tanh_of(float x) {
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

// ---- RMSNorm (rms_norm.py) ----

template <class T>
void rms_norm(const T* x, const float* gain, const T* residual, T* out, float* rstd, i64 R, i64 D, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (R * D > SMALL)
    for (i64 row = 0; row < R; ++row) {
        const T* in = x + row * D;
        T* to = out + row * D;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (i64 i = 0; i < D; ++i) squares += wide(in[i]) * wide(in[i]);
        const float scale = 1.0f / std::sqrt(squares / float(D) + eps);
        if (rstd) rstd[row] = scale;
#pragma omp simd
        for (i64 i = 0; i < D; ++i) to[i] = narrow<T>(wide(in[i]) * scale * gain[i]);
        if (!residual) continue;
        const T* before = residual + row * D;  // a loop of its own: the sum is of the rounded norm
#pragma omp simd
        for (i64 i = 0; i < D; ++i) to[i] = narrow<T>(wide(before[i]) + wide(to[i]));
    }
}

template <class T>
void rms_norm_backward(const T* upstream, const T* x, const float* gain, const float* rstd, T* grad, i64 R, i64 D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (R * D > SMALL)
    for (i64 row = 0; row < R; ++row) {
        const T *in = x + row * D, *up = upstream + row * D;
        T* to = grad + row * D;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (i64 i = 0; i < D; ++i) dot += wide(up[i]) * gain[i] * wide(in[i]);
        const float scale = rstd[row], pull = dot * scale * scale * scale / float(D);
#pragma omp simd
        for (i64 i = 0; i < D; ++i) to[i] = narrow<T>(wide(up[i]) * gain[i] * scale - wide(in[i]) * pull);
    }
}

// ---- rotary positions (rotary.py): x and out [B, heads, T, H] by strides, angles [B, T, H] by the first ----

template <class T>
void rotate(const T* x, const float* cos, const float* sin, T* out, i64 B, i64 heads, i64 tokens, i64 H, const i64* from,
            const i64* to, i64 angles_of_row, float sign, int threads) {
    const i64 half = H / 2;
#pragma omp parallel for collapse(3) num_threads(threads) schedule(static) if (B * heads * tokens * H > SMALL)
    for (i64 b = 0; b < B; ++b)
        for (i64 t = 0; t < tokens; ++t)
            for (i64 head = 0; head < heads; ++head) {
                const T* in = x + b * from[0] + head * from[1] + t * from[2];
                T* result = out + b * to[0] + head * to[1] + t * to[2];
                const float *c = cos + b * angles_of_row + t * H, *s = sin + b * angles_of_row + t * H;
#pragma omp simd
                for (i64 i = 0; i < half; ++i) {
                    const float first = wide(in[i]), second = wide(in[i + half]), turn = sign * s[i];
                    result[i] = narrow<T>(first * c[i] - second * turn);
                    result[i + half] = narrow<T>(second * c[i] + first * turn);
                }
            }
}

// ---- GeGLU (geglu.py) ----

constexpr float ROOT = 0.7978845608028654f, CUBE = 0.044715f;  // gelu's tanh approximation, arXiv:1606.08415

template <class T> void geglu(const T* gate, const T* up, T* out, i64 count, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static) if (parallel : count > SMALL)
    for (i64 i = 0; i < count; ++i) {
        const float g = wide(gate[i]);
        const float bent = 0.5f * g * (1.0f + tanh_of(ROOT * (g + CUBE * g * g * g)));
        out[i] = narrow<T>(wide(narrow<T>(bent)) * wide(up[i]));
    }
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

// ---- attention (blockwise_attention.py): scores [heads, Q, S] of a block; query i sees keys low[i] .. last + i ----

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

// ---- the head's loss (head_rows.py): logits [R, V] become their gradient, where one is wanted ----

template <class T>
void head_rows(T* logits, const i64* targets, const float* weights, float* losses, std::uint8_t* correct, i64 R, i64 V,
               float cap, int with_grad, int threads) {
    const float size = cap > 0.0f ? cap : 1.0f;
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<float[]> rows(new float[2 * V]);
        float *bent = rows.get(), *e = rows.get() + V;
#pragma omp for schedule(static)
        for (i64 row = 0; row < R; ++row) {
            T* io = logits + row * V;
            const i64 target = targets[row];
            float top = -INFINITY, total = 0.0f;
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
#pragma omp simd reduction(+ : total)
            for (i64 i = 0; i < V; ++i) {
                e[i] = exp_of(size * (bent[i] - top));
                total += e[i];
            }
            i64 best = 0;
            while (best < V - 1 && bent[best] != top) ++best;
            correct[row] = bent[best] == top && best == target;
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

// ---- NF4 (nf4.py): packed [count / 2], a scale for each block, itself in 8 bits where code2 is given ----

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

template <class T> inline void unpack_block(const Packed& p, i64 at, T* to) {
    const float scale = scale_of(p, at);
    alignas(64) T table[32];
#pragma omp simd
    for (int i = 0; i < 16; ++i) table[i] = narrow<T>(p.code[i] * scale);
    const std::uint8_t* in = p.bytes + at * p.block / 2;
#ifdef __AVX512BW__
    if constexpr (sizeof(T) == 2) {
        const __m512i values = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
        for (i64 i = 0; i < p.block / 2; i += 16) {  // 16 bytes are 32 numbers, the high half of a byte first
            const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
            const __m512i low = _mm512_slli_epi32(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), 16);
            const __m512i places = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), low);
            _mm512_storeu_si512(to + 2 * i, _mm512_permutexvar_epi16(places, values));
        }
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

// ---- a linear layer on few rows (few_rows.py): out[m, o] = sum of x[m, i] w[o, i]; limited by the reading of w ----

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
        __m512bh part(i64 i) {  // see unpack_block
            const i64 place = first + i;
            if (place >> p.block_bits != open) {
                open = place >> p.block_bits;
                const __m512 sixteen = _mm512_mul_ps(_mm512_loadu_ps(p.code), _mm512_set1_ps(scale_of(p, open)));
                table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(sixteen));
            }
            const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p.bytes + (place >> 1))));
            const __m512i low = _mm512_slli_epi32(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), 16);
            return (__m512bh)_mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(bytes, 4), low), table);
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

}  // namespace

#define BOTH(NAME, PARAMETERS, ARGUMENTS)                                                   \
    extern "C" void NAME##_float32 PARAMETERS(float) { NAME<float> ARGUMENTS; }             \
    extern "C" void NAME##_bfloat16 PARAMETERS(bf16) { NAME<bf16> ARGUMENTS; }

#define P_RMS_NORM(T) (const T* a, const float* b, const T* c, T* d, float* e, i64 f, i64 g, float h, int i)
BOTH(rms_norm, P_RMS_NORM, (a, b, c, d, e, f, g, h, i))
#define P_RMS_NORM_B(T) (const T* a, const T* b, const float* c, const float* d, T* e, i64 f, i64 g, int h)
BOTH(rms_norm_backward, P_RMS_NORM_B, (a, b, c, d, e, f, g, h))
#define P_ROTATE(T) (const T* a, const float* b, const float* c, T* d, i64 e, i64 f, i64 g, i64 h, const i64* i, const i64* j, i64 k, float l, int m)
BOTH(rotate, P_ROTATE, (a, b, c, d, e, f, g, h, i, j, k, l, m))
#define P_GEGLU(T) (const T* a, const T* b, T* c, i64 d, int e)
BOTH(geglu, P_GEGLU, (a, b, c, d, e))
#define P_GEGLU_B(T) (const T* a, const T* b, const T* c, T* d, T* e, i64 f, int g)
BOTH(geglu_backward, P_GEGLU_B, (a, b, c, d, e, f, g))
#define P_ATTEND(T) (T* a, const i64* b, float* c, i64 d, i64 e, i64 f, i64 g, float h, float i, int j)
BOTH(attend, P_ATTEND, (a, b, c, d, e, f, g, h, i, j))
#define P_ATTEND_B(T) (T* a, T* b, const i64* c, const float* d, i64 e, i64 f, i64 g, i64 h, float i, float j, int k)
BOTH(attend_backward, P_ATTEND_B, (a, b, c, d, e, f, g, h, i, j, k))
#define P_HEAD(T) (T* a, const i64* b, const float* c, float* d, std::uint8_t* e, i64 f, i64 g, float h, int i, int j)
BOTH(head_rows, P_HEAD, (a, b, c, d, e, f, g, h, i, j))
#define P_NF4(T) (const std::uint8_t* a, const float* b, const std::uint8_t* c, const float* d, const float* e, float f, const float* g, T* h, i64 i, i64 j, i64 k, int l)
BOTH(nf4, P_NF4, (a, b, c, d, e, f, g, h, i, j, k, l))
#define P_FEW(T) (const T* a, const T* b, T* c, i64 d, i64 e, i64 f, int g)
BOTH(few_rows, P_FEW, (a, b, c, d, e, f, g))
#define P_FEW_NF4(T) (const std::uint8_t* a, const float* b, const std::uint8_t* c, const float* d, const float* e, float f, const float* g, const T* h, T* i, i64 j, i64 k, i64 l, i64 m, i64 n, int o)
BOTH(few_rows_nf4, P_FEW_NF4, (a, b, c, d, e, f, g, h, i, j, k, l, m, n, o))
