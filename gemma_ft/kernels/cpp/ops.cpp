// What Gemma does to rows between its matrix products, on one CPU: each row is read and written once.
//
// A plain C interface, so that no header of torch or Python is needed: cpp_backend.py compiles this file where it runs and
// calls it with the addresses of tensors. Arithmetic is float32 as in the plain-torch references (their files name
// them); a row is worked on by one thread, so that no result depends on how many there are.
// Letters: R rows, D their size.
#include "attention.h"
#include "decode.h"
#include "gemv.h"
#include "geglu.h"
#include "cross_entropy.h"
#include "nf4.h"
#include "optimizer.h"
#include "rms_norm.h"
#include "rotary.h"

using namespace gemma_ft;

#define BOTH(NAME, PARAMETERS, ARGUMENTS)                                                   \
    extern "C" void NAME##_float32 PARAMETERS(float) { NAME<float> ARGUMENTS; }             \
    extern "C" void NAME##_bfloat16 PARAMETERS(bf16) { NAME<bf16> ARGUMENTS; }

#define P_RMS_NORM(T) (const T* a, const float* b, const T* c, T* d, float* e, i64 f, i64 g, float h, int i)
BOTH(rms_norm, P_RMS_NORM, (a, b, c, d, e, f, g, h, i))
#define P_RMS_NORM_B(T) (const T* a, const T* b, const float* c, const float* d, T* e, i64 f, i64 g, int h)
BOTH(rms_norm_backward, P_RMS_NORM_B, (a, b, c, d, e, f, g, h))
#define P_RMS_NORM_W(T) (const T* a, const T* b, const float* c, float* d, i64 e, i64 f, int g)
BOTH(rms_norm_weight_gradient, P_RMS_NORM_W, (a, b, c, d, e, f, g))
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
#define P_HEAD(T) (T* a, const i64* b, const float* c, float* d, std::uint8_t* e, float* f, i64 g, i64 h, float i, int j, int k)
BOTH(fused_cross_entropy, P_HEAD, (a, b, c, d, e, f, g, h, i, j, k))
#define P_NF4(T) (const std::uint8_t* a, const float* b, const std::uint8_t* c, const float* d, const float* e, float f, const float* g, T* h, i64 i, i64 j, i64 k, int l)
BOTH(nf4, P_NF4, (a, b, c, d, e, f, g, h, i, j, k, l))
#define P_FEW(T) (const T* a, const T* b, T* c, i64 d, i64 e, i64 f, int g)
BOTH(gemv, P_FEW, (a, b, c, d, e, f, g))
#define P_FEW_NF4(T) (const std::uint8_t* a, const float* b, const std::uint8_t* c, const float* d, const float* e, float f, const float* g, const T* h, T* i, i64 j, i64 k, i64 l, i64 m, i64 n, int o)
BOTH(gemv_nf4, P_FEW_NF4, (a, b, c, d, e, f, g, h, i, j, k, l, m, n, o))
#define P_DECODE(T) (const Shape* a, const Layer* b, const i64* c, T* d, int e)
BOTH(decode, P_DECODE, (a, b, c, d, e))
#define P_ADAMW(T) (T* a, const T* b, std::uint8_t* c, float* d, const float* e, const std::uint8_t* f, std::uint8_t* g, float* h, const float* i, const std::uint8_t* j, const float* k, i64 l, int m)
BOTH(adamw_8bit, P_ADAMW, (a, b, c, d, e, f, g, h, i, j, k, l, m))
#define P_LION(T) (T* a, const T* b, std::uint8_t* c, float* d, const float* e, const std::uint8_t* f, const float* g, i64 h, int i)
BOTH(lion_8bit, P_LION, (a, b, c, d, e, f, g, h, i))
