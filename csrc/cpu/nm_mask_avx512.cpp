// nm_mask for AVX-512 F/BW/DQ/VL: sixteen scores at a time. See nm_mask_rows.h for the algorithm.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")

#include "vec_avx512.h"

namespace pyfast {
namespace {

using Order = __m512i;
using Ties = __mmask16;
struct Rank {
  __m512i counted = _mm512_setzero_si512();
};

inline Order lanes_from(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Ties ties_from(const int32_t* p) { return _mm512_movepi32_mask(_mm512_loadu_si512(p)); }
inline Vec rotated(Vec v, Order order) { return {_mm512_permutexvar_ps(order, v.v)}; }

inline void count(Rank& rank, Vec other, Vec own, Ties ties) {
  const __mmask16 before =
      _mm512_cmp_ps_mask(other.v, own.v, _CMP_GT_OQ) | _mm512_mask_cmp_ps_mask(ties, other.v, own.v, _CMP_EQ_OQ);
  rank.counted = _mm512_sub_epi32(rank.counted, _mm512_movm_epi32(before));
}

inline uint32_t kept(Rank rank, int n) { return _mm512_cmplt_epi32_mask(rank.counted, _mm512_set1_epi32(n)); }

inline void store_kept(uint8_t* p, uint32_t bits, int64_t lanes) {
  const __m128i bytes = _mm_maskz_set1_epi8(static_cast<__mmask16>(bits), 1);
  _mm_mask_storeu_epi8(p, static_cast<__mmask16>((1u << lanes) - 1u), bytes);
}

}  // namespace
}  // namespace pyfast

#include "nm_mask_rows.h"

namespace pyfast {

const NmMaskTable kNmMaskAvx512 = {{nm_mask<float>, nm_mask<bf16>, nm_mask<f16>}};

}  // namespace pyfast
#endif
