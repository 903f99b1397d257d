// nm_mask for AVX2: eight scores at a time. See nm_mask_rows.h for the algorithm.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2")

#include "vec_avx2.h"

namespace pyfast {
namespace {

using Order = __m256i;
using Ties = __m256;
struct Rank {
  __m256i counted = _mm256_setzero_si256();
};

inline Order lanes_from(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Ties ties_from(const int32_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
inline Vec rotated(Vec v, Order order) { return {_mm256_permutevar8x32_ps(v.v, order)}; }

inline void count(Rank& rank, Vec other, Vec own, Ties ties) {
  const __m256 equal = _mm256_and_ps(_mm256_cmp_ps(other.v, own.v, _CMP_EQ_OQ), ties);
  const __m256 before = _mm256_or_ps(_mm256_cmp_ps(other.v, own.v, _CMP_GT_OQ), equal);
  rank.counted = _mm256_sub_epi32(rank.counted, _mm256_castps_si256(before));
}

// A 0 or 1 a lane, as eight bytes.
inline uint64_t kept(Rank rank, int n) {
  const __m256i stay = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), rank.counted);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(stay), _mm256_extracti128_si256(stay, 1));
  const __m128i bytes = _mm_and_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(1));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(bytes));
}

inline void store_kept(uint8_t* p, uint64_t bytes, int64_t lanes) {
  if (lanes == Vec::width)
    __builtin_memcpy(p, &bytes, sizeof bytes);
  else
    __builtin_memcpy(p, &bytes, static_cast<uint64_t>(lanes));
}

}  // namespace
}  // namespace pyfast

#include "nm_mask_rows.h"

namespace pyfast {

const NmMaskTable kNmMaskAvx2 = {{nm_mask<float>, nm_mask<bf16>, nm_mask<f16>}};

}  // namespace pyfast
#endif
