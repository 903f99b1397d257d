// The part of ptx.cuh, which includes it for nvcc, that is about numbers: float32, and 16 bits made wide and narrow.
#pragma once

#include <cstdint>

namespace pyfast::cuda::ptx {

// ex2.approx.ftz.f32, lg2.approx.ftz.f32: 2^x and log2 x, to about 2 units in the last place.
PYFAST_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PYFAST_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// fma.rn.f32 under a predicate: sum += a·b unless bits is 0.
PYFAST_DEVICE void fma_unless_zero(uint32_t bits, float& sum, float a, float b) {
  asm("{ .reg .pred holds;\n\t"
      "setp.ne.u32 holds, %3, 0;\n\t"
      "@holds fma.rn.f32 %0, %1, %2, %0; }"
      : "+f"(sum)
      : "f"(a), "f"(b), "r"(bits));
}

// rcp.approx.ftz.f32: 1 / x, to one unit in the last place.
PYFAST_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Widening is exact; narrowing rounds to nearest even (cvt.rn).
PYFAST_DEVICE float to_float(float x) { return x; }
PYFAST_DEVICE float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
PYFAST_DEVICE float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two neighbours in one word, the first in the lower half.
template <class T>
PYFAST_DEVICE Floats2 unpack(uint32_t pair) {
  static_assert(kIsTensorCoreType<T>);
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}
template <class T>
PYFAST_DEVICE uint32_t pack(float first, float second) {
  static_assert(kIsTensorCoreType<T>);
  uint32_t pair;
  if constexpr (kIsBFloat16<T>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
template <class T>
PYFAST_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else
    return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
}

// max.bf16x2, max.f16x2: of two pairs, word by word; a NaN gives way to the other.
template <class T>
PYFAST_DEVICE uint32_t max_pair(uint32_t a, uint32_t b) {
  static_assert(kIsTensorCoreType<T>);
  uint32_t pair;
  if constexpr (kIsBFloat16<T>)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// mul.rn: a · b rounded; the compiler does not fuse it with an addition.
PYFAST_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }

// fma.rn.sat: a · b + c between 0 and 1; 0 for NaN.
PYFAST_DEVICE float fma_saturated(float a, float b, float c) { return __saturatef(__fmaf_rn(a, b, c)); }

}  // namespace pyfast::cuda::ptx
