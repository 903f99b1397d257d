// bitmap_linear for AVX2: 8 lanes, vpermps by table. See bitmap_linear_narrow.h.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2,popcnt")

#include "vec_avx2.h"

namespace pyfast {
namespace {

// vpermps reads the low three bits of each index, the rank; the sign bit then clears absent lanes.
template <class T>
inline Vec expand(const T* values, const int32_t* lane) {
  const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(lane));
  const __m256 spread = _mm256_permutevar8x32_ps(load(values).v, index);
  const __m256i absent = _mm256_srai_epi32(index, 31);
  return {_mm256_castsi256_ps(_mm256_andnot_si256(absent, _mm256_castps_si256(spread)))};
}

}  // namespace
}  // namespace pyfast

#include "bitmap_linear_narrow.h"

namespace pyfast {

const BitmapLinearTable kBitmapLinearAvx2 = {
    {bitmap_linear<float, 1, false>, bitmap_linear<bf16, 1, false>, bitmap_linear<f16, 1, false>},
    12,
};

}  // namespace pyfast
#endif
