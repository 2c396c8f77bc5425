// One token of each of a few sequences through all layers (fused_decode.py), in one parallel region: between the products
// of single rows everything else is small, and calling it would cost more than doing it.
//
// Rounded to T where the layers in torch round, but for the scores, which stay float32. Every thread has a copy of the
// residual stream and norms it for itself; outputs of products, heads and keys are divided among threads. Each number is
// computed by one thread in one order, so that no result depends on how many there are.
// Letters: B sequences, D hidden, N query heads, K key/value heads, H head dim, F feed-forward, S keys, R rank.
#pragma once
#include <omp.h>

#include <algorithm>
#include <array>

#include "gemv.h"
#include "geglu.h"
#include "rms_norm.h"
#include "rotary.h"

namespace gemma_ft {

struct Linear {        // weight [O, I] in T, or NF4 where block > 0; with LoRA where rank > 0
    const void* weight;
    const float* scales;
    const std::uint8_t* scales8;
    const float *code2, *scales2, *code;
    const float *lora_a, *lora_b;  // [R, I], [O, R]
    i64 block, block2, O, I, rank;
    float offset, scaling;
};

struct Layer {
    Linear q, k, v, o, gate, up, down;
    const void *before_attention, *after_attention, *before_mlp, *after_mlp;  // norms [D]; the second and last: or null
    const void *query_norm, *key_norm;  // of each head [H], before it is turned; or null
    const float *cos, *sin;             // [B, H]
    void *keys, *values;                // [rows, K, places, H], from this pass's first row on
    i64 places, limit;                  // a ring of at most `limit`
};

struct Shape {
    i64 B, D, N, K, H, F, layers;
    float eps, scale, cap;
};

constexpr i64 HEADS = 4;  // that share a reading of their keys, at most

template <class T> class Decoder {
  public:
    Decoder(const Shape& shape, const Layer* layers, const i64* starts)
        : s(shape), layers(layers), starts(starts), queries(s.B * s.N * s.H), keys(s.B * s.K * s.H),
          values(s.B * s.K * s.H), heads(s.B * s.N * s.H), gates(s.B * s.F), ups(s.B * s.F), sums(s.B * s.D) {
        for (i64 at = 0; at < s.layers; ++at)
            for (const Linear* one : linears(layers[at])) low_width = std::max(low_width, one->rank);
        low.resize(3 * s.B * low_width);
    }

    void run(T* x, int threads) {
#pragma omp parallel num_threads(threads)
        {
            Own own(*this, x);
            for (i64 at = 0; at < s.layers; ++at) layer(layers[at], own);
            if (own.first()) std::copy(own.x.begin(), own.x.end(), x);
        }
    }

  private:
    struct Own {  // what a thread has for itself
        std::vector<T> x, h, query, head;
        Floats given, scores, out;
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Own(const Decoder& d, const T* x)
            : x(x, x + d.s.B * d.s.D), h(d.s.B * d.s.D), query(HEADS * d.s.H), head(d.s.H), given(d.s.B * std::max({d.s.D, d.s.F, d.s.N * d.s.H, HEADS * d.s.H})),
              out(HEADS * d.s.H) {}
        bool first() const { return thread == 0; }
        i64 begin(i64 count, i64 unit) const { return count / unit * thread / threads * unit; }
        i64 end(i64 count, i64 unit) const { return count / unit * (thread + 1) / threads * unit; }
    };

    const Shape s;
    const Layer* layers;
    const i64* starts;
    std::vector<T> queries, keys, values, heads, gates, ups, sums, low;
    i64 low_width = 0;

    static std::array<const Linear*, 7> linears(const Layer& l) { return {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}; }

    void layer(const Layer& l, Own& own) {
        norm(own.x.data(), l.before_attention, nullptr, own.h.data());
        products<3>({&l.q, &l.k, &l.v}, {queries.data(), keys.data(), values.data()}, own.h.data(), own);
        attend(l, own);
        products<1>({&l.o}, {sums.data()}, heads.data(), own);
        add(l.after_attention, own);
        norm(own.x.data(), l.before_mlp, nullptr, own.h.data());
        products<2>({&l.gate, &l.up}, {gates.data(), ups.data()}, own.h.data(), own);
        bend(own);
        products<1>({&l.down}, {sums.data()}, gates.data(), own);
        add(l.after_mlp, own);
    }

    void norm(const T* x, const void* weight, const T* residual, T* out) const {
        for (i64 at = 0; at < s.B * s.D; at += s.D)
            norm_one(x + at, weight, residual ? residual + at : nullptr, out + at, s.D);
    }

    void norm_one(const T* x, const void* weight, const T* residual, T* out, i64 size) const {
        const T* w = static_cast<const T*>(weight);
        norm_row(x, [w](i64 i) { return 1.0f + wide(w[i]); }, residual, out, size, s.eps);
    }

    // The residual stream and what a block gave, normed where the model norms it.
    void add(const void* weight, Own& own) const {
        if (weight) {
            norm(sums.data(), weight, own.x.data(), own.h.data());
            own.x.swap(own.h);
        } else {
            for (i64 i = 0; i < s.B * s.D; ++i) own.x[i] = narrow<T>(wide(own.x[i]) + wide(sums[i]));
        }
    }

    // Linear layers of one input, to outs [B, O]; every thread has them when it returns.
    template <int COUNT> void products(const Linear* const (&ones)[COUNT], T* const (&outs)[COUNT], const T* x, Own& own) {
        bool adapted = false;
        for (int n = 0; n < COUNT; ++n) adapted = adapted || ones[n]->rank;
        if (adapted) {
            for (int n = 0; n < COUNT; ++n) lower(*ones[n], x, low.data() + n * s.B * low_width, own);
#pragma omp barrier
        }
        const float* given = own.given.data();
        int arranged_for = -1;  // whether for a quantized weight
        for (int n = 0; n < COUNT; ++n) {
            const Linear& one = *ones[n];
            const i64 first = own.begin(one.O, 2), last = own.end(one.O, 2);
            const T* below = low.data() + n * s.B * low_width;
            T* out = outs[n];
            const auto emit = [&, below, out](i64 b, i64 o, float value) {
                T& to = out[b * one.O + o] = narrow<T>(value);
                if (!one.rank) return;
                float sum = 0.0f;
                for (i64 r = 0; r < one.rank; ++r) sum += wide(below[b * one.rank + r]) * wide(narrow<T>(one.lora_b[o * one.rank + r]));
                to = narrow<T>(wide(to) + sum);
            };
            const bool packed = one.block > 0;
            if (packed != arranged_for) {
                if (packed) arrange<Quantized<T>>(x, own.given.data(), s.B * one.I);
                else arrange<Stored<T>>(x, own.given.data(), s.B * one.I);
                arranged_for = packed;
            }
            if (packed) few_products(quantized(one), given, s.B, first, last, emit);
            else few_products(Stored<T>{static_cast<const T*>(one.weight), one.I}, given, s.B, first, last, emit);
        }
#pragma omp barrier
    }

    static Quantized<T> quantized(const Linear& one) {
        return {packed_of(static_cast<const std::uint8_t*>(one.weight), one.scales, one.scales8, one.code2, one.scales2,
                          one.offset, one.code, one.block, one.block2), one.I};
    }

    // x Aᵀ [B, R], this thread's columns of it.
    void lower(const Linear& one, const T* x, T* out, const Own& own) const {
        for (i64 r = own.begin(one.rank, 1); r < own.end(one.rank, 1); ++r)
            for (i64 b = 0; b < s.B; ++b) {
                const float* a = one.lora_a + r * one.I;
                const T* given = x + b * one.I;
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (i64 i = 0; i < one.I; ++i) sum += wide(narrow<T>(a[i])) * wide(given[i]);
                out[b * one.rank + r] = narrow<T>(one.scaling * sum);
            }
    }

    // gelu(gate) * up, in the place of gate.
    void bend(const Own& own) {
        T *gate = gates.data(), *up = ups.data();
#pragma omp simd
        for (i64 i = own.begin(s.B * s.F, 1); i < own.end(s.B * s.F, 1); ++i) gate[i] = bent(gate[i], up[i]);
#pragma omp barrier
    }

    void attend(const Layer& l, Own& own) {
        for (i64 unit = own.begin(s.B * s.K, 1); unit < own.end(s.B * s.K, 1); ++unit) {  // the new key and value
            const i64 b = unit / s.K, place = (unit * l.places + starts[b] % l.limit) * s.H;
            turn(l, l.key_norm, keys.data() + unit * s.H, b, static_cast<T*>(l.keys) + place, own);
            std::copy_n(values.data() + unit * s.H, s.H, static_cast<T*>(l.values) + place);
        }
#pragma omp barrier
        const i64 group = s.N / s.K;
        i64 share = HEADS;  // heads that read keys together: fewer where threads would wait
        while (share > 1 && s.B * s.K * ((group + share - 1) / share) < own.threads) share /= 2;
        const i64 parts = (group + share - 1) / share;
        for (i64 unit = own.begin(s.B * s.K * parts, 1); unit < own.end(s.B * s.K * parts, 1); ++unit) {
            const i64 pair = unit / parts, first = unit % parts * share, count = std::min(group - first, share);
            const i64 b = pair / s.K, at = (pair * group + first) * s.H, seen = std::min(starts[b] + 1, l.limit);
            for (i64 head = 0; head < count * s.H; head += s.H)
                turn(l, l.query_norm, queries.data() + at + head, b, own.query.data() + head, own);
            arrange<Stored<T>>(own.query.data(), own.given.data(), count * s.H);
            const i64 ring = pair * l.places * s.H;
            heads_of(static_cast<const T*>(l.keys) + ring, static_cast<const T*>(l.values) + ring, seen, count, heads.data() + at, own);
        }
#pragma omp barrier
    }

    // A head [H] of sequence b, normed where the model norms it, at its position.
    void turn(const Layer& l, const void* weight, const T* x, i64 b, T* out, Own& own) const {
        if (weight) norm_one(x, weight, nullptr, own.head.data(), s.H);
        turn_row(weight ? own.head.data() : x, l.cos + b * s.H, l.sin + b * s.H, out, s.H, 1.0f);
    }

    // `count` heads that share keys, of which the first `seen` places are seen: no older one is held than the window shows.
    void heads_of(const T* key, const T* value, i64 seen, i64 count, T* out, Own& own) const {
        const i64 stride = seen + 1;
        own.scores.resize(count * stride);
        float *scores = own.scores.data(), *sums = own.out.data();
        const auto keep = [=](i64 head, i64 at, float score) { scores[head * stride + at] = score; };
        const Stored<T> stored{key, s.H};
        few_products(stored, own.given.data(), count, 0, seen / 2 * 2, keep);
        const i64 last = std::max(seen - 2, i64(0));  // keys go two by two
        if (seen % 2) few_products(stored, own.given.data(), count, last, last + 2, keep);
        for (i64 head = 0; head < count; ++head) softmax(scores + head * stride, seen);
        std::fill_n(sums, count * s.H, 0.0f);
        for (i64 at = 0; at < seen; ++at) {
            const T* from = value + at * s.H;
            for (i64 i = 0; i < s.H; i += 32) __builtin_prefetch(from + AHEAD / i64(sizeof(T)) + i);
            for (i64 head = 0; head < count; ++head) {
                const float weight = scores[head * stride + at];
                float* sum = sums + head * s.H;
#pragma omp simd
                for (i64 i = 0; i < s.H; ++i) sum[i] += weight * wide(from[i]);
            }
        }
        for (i64 i = 0; i < count * s.H; ++i) out[i] = narrow<T>(sums[i]);
    }

    void softmax(float* scores, i64 seen) const {
        float most = -INFINITY, total = 0.0f;
        const float scale = s.scale, cap = s.cap;
#pragma omp simd reduction(max : most)
        for (i64 at = 0; at < seen; ++at) {
            const float score = scores[at] * scale;
            scores[at] = cap > 0.0f ? cap * tanh_of(score / cap) : score;
            most = scores[at] > most ? scores[at] : most;
        }
#pragma omp simd reduction(+ : total)
        for (i64 at = 0; at < seen; ++at) total += scores[at] = exp_of(scores[at] - most);
        for (i64 at = 0; at < seen; ++at) scores[at] /= total;
    }
};

template <class T>
void decode(const Shape* shape, const Layer* layers, const i64* starts, T* x, int threads) {
    Decoder<T>(*shape, layers, starts).run(x, layers->gate.O * layers->gate.I > SMALL ? threads : 1);
}

}  // namespace gemma_ft
