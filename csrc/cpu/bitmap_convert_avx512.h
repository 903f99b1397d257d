// What the two AVX-512 forms of bitmap_convert share: the words, and elements of 4 bytes. Include only from a file
// whose target pragma names AVX-512 F/BW/DQ/VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pyfast {
namespace {

inline uint64_t stored(const uint8_t* p) {
  const __m512i v = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(v, v);
}
inline uint64_t stored(const uint16_t* p) {
  const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + 32);
  return static_cast<uint64_t>(_mm512_test_epi16_mask(high, high)) << 32 | _mm512_test_epi16_mask(low, low);
}
inline uint64_t stored(const uint32_t* p) {
  uint64_t word = 0;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i v = _mm512_loadu_si512(p + 16 * i);
    word |= static_cast<uint64_t>(_mm512_test_epi32_mask(v, v)) << (16 * i);
  }
  return word;
}

template <class U>
struct Piece;

// Stores are masked, so that none reaches the end.
template <>
struct Piece<uint32_t> {
  static constexpr int columns = 16;

  [[gnu::always_inline]] static void pack(const uint32_t* dense, uint64_t bits, int count, uint32_t* values,
                                          const uint32_t*) {
    const __m512i kept = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), _mm512_loadu_si512(dense));
    _mm512_mask_storeu_epi32(values, static_cast<__mmask16>((1u << count) - 1u), kept);
  }
  [[gnu::always_inline]] static void expand(const uint32_t* values, uint64_t bits, uint32_t* dense) {
    const __m512i v = _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), _mm512_loadu_si512(values));
    _mm512_storeu_si512(dense, v);
  }
};

}  // namespace
}  // namespace pyfast
