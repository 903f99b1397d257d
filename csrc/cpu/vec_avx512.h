// Sixteen floats in a zmm register. Include only from a file whose target pragma names AVX-512 F/BW/DQ/VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "power_table.h"
#include "scalars.h"

namespace pyfast {
namespace {

struct Vec {
  static constexpr int width = 16;
  using Mask = __mmask16;
  __m512 v;
};

using Total = Vec;  // what sums of a row are added up in: lanes enough for float32

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }                  // b where a is NaN
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }                  // b where b is NaN
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

// out[i]: the sum of the lanes i, i + 4, i + 8 and i + 12.
inline void reduce_add_by_four(Vec a, float (&out)[4]) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

inline __mmask16 equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline __mmask16 not_at_most(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }  // or NaN
inline __mmask16 above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline bool any(__mmask16 m) { return m != 0; }
inline Vec select(__mmask16 m, Vec yes, Vec no) { return {_mm512_mask_mov_ps(no.v, m, yes.v)}; }

inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec round_nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }

// n less its floor, in [0, 1); 0 for -inf, so that 2^-inf below is 0 and not NaN.
inline Vec above_floor(Vec n) { return {_mm512_reduce_ps(n.v, _MM_FROUND_TO_NEG_INF)}; }

// 1 / a to within a bit, for a normal number.
inline Vec reciprocal(Vec a) {
  const Vec r = {_mm512_rcp14_ps(a.v)};
  return fma(fnma(a, r, broadcast(1.0f)), r, r);
}

// p * 2^floor(n), by one instruction that knows every special case.
inline Vec scale_by_floor(Vec p, Vec n) { return {_mm512_scalef_ps(p.v, n.v)}; }

// 2^k for integral k.
inline Vec power_of_two(Vec k) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), k.v)}; }

// a = 2^k m with m in [sqrt(1/2), sqrt(2)), for a normal positive number: k and 2^-k.
struct Exponent {
  Vec k, inverse;
};
inline Exponent exponent(Vec a) {
  const __m512i above = _mm512_sub_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x3f3504f3));
  const __m512i k = _mm512_srai_epi32(above, 23);
  const __m512i inverse = _mm512_sub_epi32(_mm512_set1_epi32(0x3f800000), _mm512_slli_epi32(k, 23));
  return {{_mm512_cvtepi32_ps(k)}, {_mm512_castsi512_ps(inverse)}};
}

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }  // 0 <= n < 16

inline __m512 widen_bf16(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m256i narrow_bf16(__m512 a) {  // round to nearest even; NaN made quiet
  const __m512i u = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(r);
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) { return {widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }

inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

// The lanes of the mask, 0 elsewhere; nothing is read outside it.
inline Vec load_first(const float* p, __mmask16 m) { return {_mm512_maskz_loadu_ps(m, p)}; }
inline Vec load_first(const bf16* p, __mmask16 m) { return {widen_bf16(_mm256_maskz_loadu_epi16(m, p))}; }
inline Vec load_first(const f16* p, __mmask16 m) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p))}; }
inline Vec load_first(const int8_t* p, __mmask16 m) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, p)))};
}

inline Vec load_partial(const float* p, int64_t n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p)};
}
inline Vec load_partial(const bf16* p, int64_t n, float fill) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)))};
}
inline Vec load_partial(const f16* p, int64_t n, float fill) {
  return {_mm512_mask_cvtph_ps(_mm512_set1_ps(fill), first(n), _mm256_maskz_loadu_epi16(first(n), p))};
}

inline __m256i narrow_f16(__m512 a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a.v)); }
inline void store(f16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a.v)); }

// Two vectors of neighbouring elements. bfloat16 comes as even and odd elements, which costs one operation a vector.
struct VecPair {
  Vec a, b;
};
template <class T>
inline VecPair load_pair(const T* p) {
  return {load(p), load(p + Vec::width)};
}
inline VecPair load_pair(const bf16* p) {
  const __m512i u = _mm512_loadu_si512(p);
  const __m512i odd = _mm512_and_si512(u, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))}, {_mm512_castsi512_ps(odd)}};
}

// Where element i of a pair is: lane i of a and b laid end to end.
template <class T>
inline int64_t pair_lane(const T*, int64_t i) {
  return i;
}
inline int64_t pair_lane(const bf16*, int64_t i) { return i / 2 + (i % 2) * Vec::width; }

inline __m512i round_bf16(__m512 a) {  // the upper half rounded to nearest even
  const __m512i u = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
}

// The order of load_pair. NaN stays NaN where its low 16 bits are 0, as in whatever is computed from bfloat16.
inline __m512i narrow_pair(VecPair p) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(round_bf16(p.a.v), 16), round_bf16(p.b.v));
}

// Non-temporal: p aligned to the size of the store.
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
inline void stream(bf16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a.v)); }
inline void stream(f16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a.v)); }

template <class T>
inline void store_pair(T* p, VecPair a) {
  store(p, a.a);
  store(p + Vec::width, a.b);
}
inline void store_pair(bf16* p, VecPair a) { _mm512_storeu_si512(p, narrow_pair(a)); }
template <class T>
inline void stream_pair(T* p, VecPair a) {
  stream(p, a.a);
  stream(p + Vec::width, a.b);
}
inline void stream_pair(bf16* p, VecPair a) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_pair(a)); }
inline void stream_fence() { _mm_sfence(); }

inline void store_partial(float* p, int64_t n, Vec a) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void store_partial(bf16* p, int64_t n, Vec a) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a.v)); }
inline void store_partial(f16* p, int64_t n, Vec a) { _mm256_mask_storeu_epi16(p, first(n), narrow_f16(a.v)); }

// Rows become columns: pairs, pairs of pairs, then quarters of the registers.
inline void transpose(Vec (&v)[16]) {
  __m512 pair[16], four[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
    pair[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // quarter q of four[i + j]: column 4 q + j of rows i … i + 3
    four[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
    four[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xee);
    four[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    four[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_shuffle_f32x4(four[j], four[4 + j], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(four[j], four[4 + j], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0xdd);
    v[j].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    v[4 + j].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    v[8 + j].v = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    v[12 + j].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

// Four floats, each of which `one` brings into every lane: one load and a shuffle each.
struct Four {
  __m512 v;
  explicit Four(const float* p) : v(_mm512_broadcast_f32x4(_mm_loadu_ps(p))) {}
  template <int i>
  Vec one() const {
    return {_mm512_permute_ps(v, i * 0x55)};
  }
};

// power_table.h: 32 powers in two registers, looked up by the last five bits of the sum.
struct Powers {
  static constexpr int kBits = 5;
  static constexpr float kOffset = kCenter;  // of what `times` takes
  __m512 low, high;
  Powers() : low(_mm512_load_ps(kPowers32.entry)), high(_mm512_load_ps(kPowers32.entry + 16)) {}
  Vec at(Vec n) const {
    const __m512i bits = _mm512_castps_si512(n.v), found = _mm512_castps_si512(_mm512_permutex2var_ps(low, bits, high));
    return {_mm512_castsi512_ps(_mm512_add_epi32(found, _mm512_slli_epi32(bits, 23 - kBits)))};
  }
  static Vec times(Vec power, Vec f) { return power * fma(f, f, broadcast(kSquare)); }
};

struct Outside {
  __m512i bits;
  Outside() : bits(_mm512_setzero_si512()) {}
  void note(Vec n) {  // bits | (n ^ magic)
    const __m512i magic = _mm512_castps_si512(_mm512_set1_ps(kMagic<Powers::kBits>));
    bits = _mm512_ternarylogic_epi32(bits, _mm512_castps_si512(n.v), magic, 0xf6);
  }
  bool any() const {
    return _mm512_test_epi32_mask(bits, _mm512_set1_epi32(static_cast<int>(kPlace<Powers::kBits>))) != 0;
  }
};

}  // namespace
}  // namespace pyfast
