// Eight floats in a ymm register. Include only from a file whose target pragma names AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "power_table.h"
#include "scalars.h"

namespace pyfast {
namespace {

struct Vec {
  static constexpr int width = 8;
  using Mask = __m256;
  __m256 v;
};

using Total = Vec;  // what sums of a row are added up in: lanes enough for float32

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }                  // b where a is NaN
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }                  // b where b is NaN
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec reciprocal(Vec a) { return broadcast(1.0f) / a; }

inline float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline __m256 equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
inline __m256 not_at_most(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ); }  // or NaN
inline __m256 above(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
inline bool any(__m256 m) { return _mm256_movemask_ps(m) != 0; }
inline Vec select(__m256 m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m)}; }

inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec round_nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// n less its floor, in [0, 1]. NaN for -inf: scale_by_floor clears it.
inline Vec above_floor(Vec n) {
  return {_mm256_sub_ps(n.v, _mm256_round_ps(n.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC))};
}

// 2^k for integral k; 0 at or below -127, +inf above 127; NaN gives some number.
inline Vec power_of_two(Vec k) {
  const __m256 inside = _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), k.v));
  const __m256i exponent = _mm256_cvtps_epi32(inside);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23))};
}

// p * 2^floor(n); 0 where n <= -126; NaN where n is NaN.
inline Vec scale_by_floor(Vec p, Vec n) {
  const Vec scale = power_of_two({_mm256_round_ps(n.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)});
  const __m256 alive = _mm256_cmp_ps(n.v, _mm256_set1_ps(-126.0f), _CMP_NLE_UQ);
  return {_mm256_and_ps(_mm256_mul_ps(p.v, scale.v), alive)};
}

// a = 2^k m with m in [sqrt(1/2), sqrt(2)), for a normal positive number: k and 2^-k.
struct Exponent {
  Vec k, inverse;
};
inline Exponent exponent(Vec a) {
  const __m256i above = _mm256_sub_epi32(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x3f3504f3));
  const __m256i k = _mm256_srai_epi32(above, 23);
  const __m256i inverse = _mm256_sub_epi32(_mm256_set1_epi32(0x3f800000), _mm256_slli_epi32(k, 23));
  return {{_mm256_cvtepi32_ps(k)}, {_mm256_castsi256_ps(inverse)}};
}

inline __m256 widen_bf16(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline __m128i narrow_bf16(__m256 a) {  // round to nearest even; NaN made quiet
  const __m256i u = _mm256_castps_si256(a);
  const __m256i high = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i even = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(even, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}

inline __m128i narrow_f16(__m256 a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) { return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}

inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a.v)); }
inline void store(f16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(a.v)); }

// Two vectors of neighbouring elements. bfloat16 comes as even and odd elements, which costs one operation a vector.
struct VecPair {
  Vec a, b;
};
template <class T>
inline VecPair load_pair(const T* p) {
  return {load(p), load(p + Vec::width)};
}
inline VecPair load_pair(const bf16* p) {
  const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i odd = _mm256_and_si256(u, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(u, 16))}, {_mm256_castsi256_ps(odd)}};
}

// Where element i of a pair is: lane i of a and b laid end to end.
template <class T>
inline int64_t pair_lane(const T*, int64_t i) {
  return i;
}
inline int64_t pair_lane(const bf16*, int64_t i) { return i / 2 + (i % 2) * Vec::width; }

inline __m256i round_bf16(__m256 a) {  // the upper half rounded to nearest even
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
}

// The order of load_pair. NaN stays NaN where its low 16 bits are 0, as in whatever is computed from bfloat16.
inline __m256i narrow_pair(VecPair p) {
  return _mm256_blend_epi16(_mm256_srli_epi32(round_bf16(p.a.v), 16), round_bf16(p.b.v), 0xaa);
}

// Non-temporal: p aligned to the size of the store.
inline void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
inline void stream(bf16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a.v)); }
inline void stream(f16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_f16(a.v)); }

template <class T>
inline void store_pair(T* p, VecPair a) {
  store(p, a.a);
  store(p + Vec::width, a.b);
}
inline void store_pair(bf16* p, VecPair a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_pair(a)); }
template <class T>
inline void stream_pair(T* p, VecPair a) {
  stream(p, a.a);
  stream(p + Vec::width, a.b);
}
inline void stream_pair(bf16* p, VecPair a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_pair(a)); }
inline void stream_fence() { _mm_sfence(); }

// The first n < 8 elements, through a buffer on the stack: no read or write past the end.
template <class T>
inline Vec load_partial(const T* p, int64_t n, float fill) {
  T raw[8] = {};
  for (int64_t i = 0; i < n; ++i) raw[i] = p[i];
  const __m256 lane = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 inside = _mm256_cmp_ps(lane, _mm256_set1_ps(static_cast<float>(n)), _CMP_LT_OQ);
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), load(raw).v, inside)};
}
template <class T>
inline void store_partial(T* p, int64_t n, Vec a) {
  T raw[8];
  store(raw, a);
  for (int64_t i = 0; i < n; ++i) p[i] = raw[i];
}

// Rows become columns: pairs, pairs of pairs, halves.
inline void transpose(Vec (&v)[8]) {
  __m256 pair[8], four[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v);
    pair[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    v[j].v = _mm256_permute2f128_ps(four[j], four[4 + j], 0x20);
    v[4 + j].v = _mm256_permute2f128_ps(four[j], four[4 + j], 0x31);
  }
}

// Four floats, each of which `one` brings into every lane: one load and a shuffle each.
struct Four {
  __m256 v;
  explicit Four(const float* p) : v(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))) {}
  template <int i>
  Vec one() const {
    return {_mm256_permute_ps(v, i * 0x55)};
  }
};

// power_table.h: 8 powers in a register. The steps are wider than those of 32: degree 3 (minimax, error below 3e-8).
constexpr PowerTable<3> kPowers8{1.0};

struct Powers {
  static constexpr int kBits = 3;
  static constexpr float kOffset = 0.0f;
  __m256 table;
  Powers() : table(_mm256_load_ps(reinterpret_cast<const float*>(kPowers8.entry))) {}
  Vec at(Vec n) const {
    const __m256i bits = _mm256_castps_si256(n.v);
    const __m256i found = _mm256_castps_si256(_mm256_permutevar8x32_ps(table, bits));
    return {_mm256_castsi256_ps(_mm256_add_epi32(found, _mm256_slli_epi32(bits, 23 - kBits)))};
  }
  static Vec times(Vec power, Vec f) {
    const Vec p = fma(fma(broadcast(0.055496223f), f, broadcast(0.24025764f)), f, broadcast(0.69314724f));
    return fma(power, p * f, power);
  }
};

struct Outside {
  __m256i bits;
  Outside() : bits(_mm256_setzero_si256()) {}
  void note(Vec n) {
    const __m256i magic = _mm256_castps_si256(_mm256_set1_ps(kMagic<Powers::kBits>));
    bits = _mm256_or_si256(bits, _mm256_xor_si256(_mm256_castps_si256(n.v), magic));
  }
  bool any() const { return _mm256_testz_si256(bits, _mm256_set1_epi32(static_cast<int>(kPlace<Powers::kBits>))) == 0; }
};

}  // namespace
}  // namespace pyfast
