// bitmap_convert for AVX-512: 16 columns a step, elements of 1 and 2 bytes as 32-bit integers on their way. See
// bitmap_convert_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt")

#include "bitmap_convert_avx512.h"

namespace pyfast {
namespace {

inline __m512i widened(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i widened(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_first(uint16_t* p, int count, __m512i v) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1u), _mm512_cvtepi32_epi16(v));
}
inline void store_first(uint8_t* p, int count, __m512i v) {
  _mm_mask_storeu_epi8(p, static_cast<__mmask16>((1u << count) - 1u), _mm512_cvtepi32_epi8(v));
}

template <class U>
struct Widened {
  static constexpr int columns = 16;

  [[gnu::always_inline]] static void pack(const U* dense, uint64_t bits, int count, U* values, const U*) {
    store_first(values, count, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), widened(dense)));
  }
  [[gnu::always_inline]] static void expand(const U* values, uint64_t bits, U* dense) {
    store_first(dense, columns, _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), widened(values)));
  }
};

template <>
struct Piece<uint8_t> : Widened<uint8_t> {};
template <>
struct Piece<uint16_t> : Widened<uint16_t> {};

}  // namespace
}  // namespace pyfast

#include "bitmap_convert_rows.h"

namespace pyfast {

const BitmapConvertTable kBitmapConvertAvx512 = {
    {scan<uint8_t>, scan<uint16_t>, scan<uint32_t>},
    {pack<uint8_t>, pack<uint16_t>, pack<uint32_t>},
    {expand<uint8_t>, expand<uint16_t>, expand<uint32_t>},
};

}  // namespace pyfast
#endif
