// Four floats of a GPU thread as a vector: the twin of csrc/cpu/vec_*.h, for what csrc/*.h writes over Vec. Four,
// because a branch for rare words (any) costs four words as much as one, and their instructions fill each other's
// latency.
//
// Powers and quotients come from the special function unit (2 units in the last place); what must keep its digits near
// 0 is built from multiplications in exp_log.h. Rounding and exponents avoid the conversion instructions, of which a
// multiprocessor does few a clock.
#pragma once

#include <cstdint>

#include "../inline.h"
#include "common.cuh"

#if defined(PYFAST_KERNELS)

#define PYFAST_VEC_HAS_EXP2 1

namespace pyfast {
namespace {

struct Vec {
  static constexpr int width = 4;
  struct Mask {
    bool at[width];
  };
  float at[width];
};

// each(f): f(i) of every lane; f gives a float or a bool.
template <class F>
PYFAST_INLINE Vec each(const F& f) {
  return {f(0), f(1), f(2), f(3)};
}
template <class F>
PYFAST_INLINE Vec::Mask each_mask(const F& f) {
  return {f(0), f(1), f(2), f(3)};
}

PYFAST_INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
PYFAST_INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

PYFAST_INLINE Vec broadcast(float x) { return {x, x, x, x}; }
PYFAST_INLINE Vec operator+(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.at[i] + b.at[i]; });
}
PYFAST_INLINE Vec operator-(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.at[i] - b.at[i]; });
}
PYFAST_INLINE Vec operator*(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.at[i] * b.at[i]; });
}
PYFAST_INLINE Vec fma(const Vec& a, const Vec& b, const Vec& c) {  // a * b + c
  return each([&](int i) { return __builtin_fmaf(a.at[i], b.at[i], c.at[i]); });
}
PYFAST_INLINE Vec fnma(const Vec& a, const Vec& b, const Vec& c) {  // c - a * b
  return each([&](int i) { return __builtin_fmaf(-a.at[i], b.at[i], c.at[i]); });
}
PYFAST_INLINE Vec min(const Vec& a, const Vec& b) {  // b where b is NaN
  return each([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
}
PYFAST_INLINE Vec abs(const Vec& a) {
  return each([&](int i) { return __builtin_fabsf(a.at[i]); });
}
PYFAST_INLINE Vec reciprocal(const Vec& a) {
  return each([&](int i) { return cuda::ptx::reciprocal_approx(a.at[i]); });
}
PYFAST_INLINE Vec operator/(const Vec& a, const Vec& b) { return a * reciprocal(b); }
PYFAST_INLINE Vec exp2(const Vec& a) {
  return each([&](int i) { return cuda::ptx::exp2_approx(a.at[i]); });
}

PYFAST_INLINE Vec::Mask equal(const Vec& a, const Vec& b) {
  return each_mask([&](int i) { return a.at[i] == b.at[i]; });
}
PYFAST_INLINE Vec::Mask not_at_most(const Vec& a, const Vec& b) {  // true where either is NaN
  return each_mask([&](int i) { return !(a.at[i] <= b.at[i]); });
}
PYFAST_INLINE Vec::Mask above(const Vec& a, const Vec& b) {
  return each_mask([&](int i) { return a.at[i] > b.at[i]; });
}
PYFAST_INLINE bool any(const Vec::Mask& m) { return m.at[0] || m.at[1] || m.at[2] || m.at[3]; }
PYFAST_INLINE Vec select(const Vec::Mask& m, const Vec& yes, const Vec& no) {
  return each([&](int i) { return m.at[i] ? yes.at[i] : no.at[i]; });
}

// An integer k of at most 22 bits stands in the lowest bits of k + kInteger.
constexpr float kInteger = 12582912.0f;  // 1.5 · 2^23

PYFAST_INLINE Vec round_nearest(const Vec& a) {
  return each([&](int i) { return (a.at[i] + kInteger) - kInteger; });
}

// 2^k for integral k from -126 to 127.
PYFAST_INLINE Vec power_of_two(const Vec& k) {
  return each([&](int i) { return float_of(bits_of(k.at[i] + (kInteger + 127.0f)) << 23); });
}

// a = 2^k m with m in [sqrt(1/2), sqrt(2)), for a normal positive number: k and 2^-k.
struct Exponent {
  Vec k, inverse;
};
PYFAST_INLINE Exponent exponent(const Vec& a) {
  const auto power = [&](int i) { return static_cast<int32_t>(bits_of(a.at[i]) - 0x3f3504f3u) >> 23; };
  return {each([&](int i) { return float_of(bits_of(kInteger) + static_cast<uint32_t>(power(i))) - kInteger; }),
          each([&](int i) { return float_of(0x3f800000u - (static_cast<uint32_t>(power(i)) << 23)); })};
}

}  // namespace
}  // namespace pyfast

#endif
