// sparse24_linear for AVX2: 8 kept weights of 16 columns a step. See sparse24_linear_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2")

#include "vec_avx2.h"

namespace pyfast {
namespace {

// 16 bits of metadata are 8 two-bit columns; lane j adds the base of its group, 4·(j/2), so the index has four
// bits: vpermps looks up the low three in both registers and bit 3 chooses between them.
struct Fields {
  __m256i shift = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  __m256i base = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
  __m256i two_bits = _mm256_set1_epi32(3);
};

struct Lookup {
  __m256i index;

  Lookup(const uint16_t* metadata, const Fields& f) {
    const __m256i bits = _mm256_srlv_epi32(_mm256_set1_epi32(*metadata), f.shift);
    index = _mm256_or_si256(_mm256_and_si256(bits, f.two_bits), f.base);
  }

  Vec operator()(Vec low, Vec high) const {
    const __m256 from_low = _mm256_permutevar8x32_ps(low.v, index);
    const __m256 from_high = _mm256_permutevar8x32_ps(high.v, index);
    return {_mm256_blendv_ps(from_low, from_high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)))};
  }
};

}  // namespace
}  // namespace pyfast

#include "sparse24_linear_rows.h"

namespace pyfast {

const Sparse24LinearTable kSparse24LinearAvx2 = {
    {sparse24_linear<float>, sparse24_linear<bf16>, sparse24_linear<f16>, sparse24_linear<int8_t>},
};

}  // namespace pyfast
#endif
