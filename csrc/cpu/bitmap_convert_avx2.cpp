// bitmap_convert for AVX2: 8 columns a step, elements of 1 and 2 bytes as 32-bit integers on their way, moved by lane
// indices from tables. See bitmap_convert_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx2,bmi,bmi2,popcnt")

#include "bitmap_convert.h"
#include "expand_avx2.h"

namespace pyfast {
namespace {

inline __m256i zero_bytes(const void* p) {
  return _mm256_cmpeq_epi8(_mm256_loadu_si256(static_cast<const __m256i*>(p)), _mm256_setzero_si256());
}

inline uint64_t stored(const uint8_t* p) {
  const auto low = static_cast<uint32_t>(_mm256_movemask_epi8(zero_bytes(p)));
  const auto high = static_cast<uint32_t>(_mm256_movemask_epi8(zero_bytes(p + 32)));
  return ~(static_cast<uint64_t>(high) << 32 | low);
}

inline uint64_t stored(const uint16_t* p) {
  uint64_t word = 0;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const auto* at = reinterpret_cast<const __m256i*>(p + 32 * i);
    const __m256i low = _mm256_cmpeq_epi16(_mm256_loadu_si256(at), _mm256_setzero_si256());
    const __m256i high = _mm256_cmpeq_epi16(_mm256_loadu_si256(at + 1), _mm256_setzero_si256());
    const __m256i zero = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);  // halves in order
    word |= static_cast<uint64_t>(~static_cast<uint32_t>(_mm256_movemask_epi8(zero))) << (32 * i);
  }
  return word;
}

inline uint64_t stored(const uint32_t* p) {
  uint64_t word = 0;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
    const __m256 zero = _mm256_castsi256_ps(_mm256_cmpeq_epi32(v, _mm256_setzero_si256()));
    word |= static_cast<uint64_t>(_mm256_movemask_ps(zero)) << (8 * i);
  }
  return ~word;
}

inline __m256i widened(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i widened(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i widened(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void store_narrow(uint32_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline __m128i halves(__m256i v) { return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); }
inline void store_narrow(uint16_t* p, __m256i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves(v)); }
inline void store_narrow(uint8_t* p, __m256i v) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves(v), halves(v)));
}

// For each byte of bits the columns that are stored, one after the other.
struct PackTable {
  alignas(64) int32_t lane[256][8];

  constexpr PackTable() : lane{} {
    for (int mask = 0; mask < 256; ++mask) {
      int rank = 0;
      for (int bit = 0; bit < 8; ++bit)
        if ((mask >> bit) & 1) lane[mask][rank++] = bit;
    }
  }
};

constexpr PackTable kPackTable{};

template <class U>
struct Piece {
  static constexpr int columns = 8;

  // All eight lanes are stored where there is room: what is too much is written over by the next piece.
  [[gnu::always_inline]] static void pack(const U* dense, uint64_t bits, int, U* values, const U* end) {
    if (end - values >= columns) {
      const auto* row = reinterpret_cast<const __m256i*>(kPackTable.lane[bits]);
      store_narrow(values, _mm256_permutevar8x32_epi32(widened(dense), _mm256_load_si256(row)));
    } else {
      for (; bits != 0; bits &= bits - 1) *values++ = dense[__builtin_ctzll(bits)];
    }
  }
  [[gnu::always_inline]] static void expand(const U* values, uint64_t bits, U* dense) {
    const auto* row = reinterpret_cast<const __m256i*>(kExpandTable.lane[bits]);
    store_narrow(dense, spread(widened(values), _mm256_load_si256(row)));
  }
};

}  // namespace
}  // namespace pyfast

#include "bitmap_convert_rows.h"

namespace pyfast {

const BitmapConvertTable kBitmapConvertAvx2 = {
    {scan<uint8_t>, scan<uint16_t>, scan<uint32_t>},
    {pack<uint8_t>, pack<uint16_t>, pack<uint32_t>},
    {expand<uint8_t>, expand<uint16_t>, expand<uint32_t>},
};

}  // namespace pyfast
#endif
