// One float as a "vector" of one lane: the portable twin of vec_avx2.h and vec_avx512.h. Written so that
// the same kernel template compiles for every ISA and the serial build is the easiest one to step through.
#pragma once

#include <cstdint>

#include "power_table.h"
#include "scalars.h"

namespace pyfast {
namespace {

struct Vec {
  static constexpr int width = 1;
  using Mask = bool;
  float v;
};

inline Vec broadcast(float x) { return {x}; }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {__builtin_fmaf(a.v, b.v, c.v)}; }    // a * b + c
inline Vec fnma(Vec a, Vec b, Vec c) { return {__builtin_fmaf(-a.v, b.v, c.v)}; }  // c - a * b
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }                   // b where a is NaN
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }                   // b where b is NaN
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec reciprocal(Vec a) { return {1.0f / a.v}; }
inline float reduce_add(Vec a) { return a.v; }
inline float reduce_max(Vec a) { return a.v; }

// What sums of a row are added up in: in one lane a thousand words would cost digits of a float.
struct Total {
  double v;
};
inline Total operator+(Total a, Vec b) { return {a.v + static_cast<double>(b.v)}; }
inline Total operator+(Total a, Total b) { return {a.v + b.v}; }
inline double reduce_add(Total a) { return a.v; }

inline bool equal(Vec a, Vec b) { return a.v == b.v; }
inline bool not_at_most(Vec a, Vec b) { return !(a.v <= b.v); }  // true where either is NaN
inline bool above(Vec a, Vec b) { return a.v > b.v; }
inline bool any(bool m) { return m; }
inline Vec select(bool m, Vec yes, Vec no) { return m ? yes : no; }

inline Vec abs(Vec a) { return {__builtin_fabsf(a.v)}; }
inline Vec round_nearest(Vec a) { return {__builtin_rintf(a.v)}; }

// n less its floor, in [0, 1]; 0 for -inf.
inline Vec above_floor(Vec n) { return {n.v == -__builtin_inff() ? 0.0f : n.v - __builtin_floorf(n.v)}; }

// 2^k for integral k; 0 at or below -127, +inf above 127, NaN for NaN.
inline Vec power_of_two(Vec k) {
  if (k.v != k.v) return k;
  if (k.v <= -127.0f) return {0.0f};
  if (k.v > 127.0f) return {__builtin_inff()};
  return {from_bits(static_cast<uint32_t>(static_cast<int>(k.v) + 127) << 23)};
}

// p * 2^floor(n).
inline Vec scale_by_floor(Vec p, Vec n) { return p * power_of_two({__builtin_floorf(n.v)}); }

// a = 2^k m with m in [sqrt(1/2), sqrt(2)), for a normal positive number: k and 2^-k.
struct Exponent {
  Vec k, inverse;
};
inline Exponent exponent(Vec a) {
  const int32_t k = static_cast<int32_t>(to_bits(a.v) - 0x3f3504f3u) >> 23;
  return {{static_cast<float>(k)}, {from_bits(0x3f800000u - (static_cast<uint32_t>(k) << 23))}};
}

template <class T>
inline Vec load(const T* p) {
  return {widen(*p)};
}
template <class T>
inline Vec load_partial(const T* p, int64_t n, float fill) {
  return {n > 0 ? widen(*p) : fill};
}
template <class T>
inline void store(T* p, Vec a) {
  narrow(a.v, p);
}
template <class T>
inline void stream(T* p, Vec a) {
  narrow(a.v, p);
}
template <class T>
inline void store_partial(T* p, int64_t n, Vec a) {
  if (n > 0) narrow(a.v, p);
}

// Two neighbouring elements, and where element i of them is.
struct VecPair {
  Vec a, b;
};
template <class T>
inline VecPair load_pair(const T* p) {
  return {load(p), load(p + 1)};
}
template <class T>
inline int64_t pair_lane(const T*, int64_t i) {
  return i;
}
template <class T>
inline void store_pair(T* p, VecPair a) {
  store(p, a.a);
  store(p + 1, a.b);
}
template <class T>
inline void stream_pair(T* p, VecPair a) {
  store_pair(p, a);
}
inline void stream_fence() {}

inline void transpose(Vec (&)[1]) {}

// Four floats, each of which `one` brings into every lane.
struct Four {
  const float* p;
  explicit Four(const float* p) : p(p) {}
  template <int i>
  Vec one() const {
    return {p[i]};
  }
};

// power_table.h: 32 powers.
struct Powers {
  static constexpr int kBits = 5;
  static constexpr float kOffset = kCenter;  // of what `times` takes
  Vec at(Vec n) const { return {from_bits(kPowers32.entry[to_bits(n.v) % 32] + (to_bits(n.v) << (23 - kBits)))}; }
  static Vec times(Vec power, Vec f) { return power * fma(f, f, broadcast(kSquare)); }
};

struct Outside {
  uint32_t bits = 0;
  void note(Vec n) { bits |= to_bits(n.v) ^ to_bits(kMagic<Powers::kBits>); }
  bool any() const { return (bits & kPlace<Powers::kBits>) != 0; }
};

}  // namespace
}  // namespace pyfast
