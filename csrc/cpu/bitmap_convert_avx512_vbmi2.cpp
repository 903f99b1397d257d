// bitmap_convert for AVX-512 with VBMI2: elements of 1 and 2 bytes in their own width, 64 and 32 columns a step. See
// bitmap_convert_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,bmi,bmi2,popcnt")

#include "bitmap_convert_avx512.h"

namespace pyfast {
namespace {

template <>
struct Piece<uint8_t> {
  static constexpr int columns = 64;

  [[gnu::always_inline]] static void pack(const uint8_t* dense, uint64_t bits, int count, uint8_t* values,
                                          const uint8_t*) {
    const __mmask64 first = _bzhi_u64(~0ull, static_cast<unsigned>(count));
    _mm512_mask_storeu_epi8(values, first, _mm512_maskz_compress_epi8(bits, _mm512_loadu_si512(dense)));
  }
  [[gnu::always_inline]] static void expand(const uint8_t* values, uint64_t bits, uint8_t* dense) {
    _mm512_storeu_si512(dense, _mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(values)));
  }
};

template <>
struct Piece<uint16_t> {
  static constexpr int columns = 32;

  [[gnu::always_inline]] static void pack(const uint16_t* dense, uint64_t bits, int count, uint16_t* values,
                                          const uint16_t*) {
    const __mmask32 first = static_cast<__mmask32>(_bzhi_u64(~0ull, static_cast<unsigned>(count)));
    const __m512i kept = _mm512_maskz_compress_epi16(static_cast<__mmask32>(bits), _mm512_loadu_si512(dense));
    _mm512_mask_storeu_epi16(values, first, kept);
  }
  [[gnu::always_inline]] static void expand(const uint16_t* values, uint64_t bits, uint16_t* dense) {
    const __m512i v = _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits), _mm512_loadu_si512(values));
    _mm512_storeu_si512(dense, v);
  }
};

}  // namespace
}  // namespace pyfast

#include "bitmap_convert_rows.h"

namespace pyfast {

const BitmapConvertTable kBitmapConvertAvx512Vbmi2 = {
    {scan<uint8_t>, scan<uint16_t>, scan<uint32_t>},
    {pack<uint8_t>, pack<uint16_t>, pack<uint32_t>},
    {expand<uint8_t>, expand<uint16_t>, expand<uint32_t>},
};

}  // namespace pyfast
#endif
