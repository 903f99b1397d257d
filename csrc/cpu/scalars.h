// Element types of tensors as kernels see them, and their portable conversions to and from float32
// (narrowing rounds to nearest even). The vector forms live in vec_avx2.h and vec_avx512.h.
#pragma once

#include <cstdint>

namespace pyfast {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

enum class Dtype { f32 = 0, bf16 = 1, f16 = 2 };

inline constexpr int kDtypeCount = 3;
inline constexpr int64_t kChunk = 1024;  // words of a row summed in float32 before the sum goes to double

// What the values of a sparse weight are stored as: one of Dtype, or 8-bit integers with a scale a row.
enum class Stored { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

inline constexpr int kStoredCount = 4;

// Unnamed, so that no copy compiled for a newer ISA can be linked into an older one's code.
namespace {

// memcpy and memset, which must not be given null: that of an empty tensor, with no bytes.
inline void copy_bytes(void* to, const void* from, uint64_t bytes) {
  if (bytes != 0) __builtin_memcpy(to, from, bytes);
}
inline void clear_bytes(void* to, uint64_t bytes) {
  if (bytes != 0) __builtin_memset(to, 0, bytes);
}

constexpr uint32_t to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
constexpr float from_bits(uint32_t u) { return __builtin_bit_cast(float, u); }

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return static_cast<float>(x); }
inline float widen(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0x1fu) return from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal or zero
  return from_bits(sign | to_bits(magnitude));
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, bf16* out) {
  const uint32_t u = to_bits(x);
  out->bits =
      x != x ? static_cast<uint16_t>((u >> 16) | 0x40u) : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void narrow(float x, f16* out) {
  const uint32_t u = to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds past 65504
    out->bits = sign | 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: rebias, then round to nearest even
    const uint32_t rebased = magnitude - 0x38000000u;
    out->bits = sign | static_cast<uint16_t>((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13);
  } else {  // subnormal: adding 0.5 places the bits of the result at the bottom of the significand
    out->bits = sign | static_cast<uint16_t>(to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u);
  }
}

}  // namespace
}  // namespace pyfast
