// bitmap_linear for AVX-512VL processors whose 512-bit vexpandps is slow (Zen 4: 5 cycles for 16 lanes, against 3
// for two of these): 8 lanes, vpermi2ps by table. See bitmap_linear_narrow.h and docs/kernels.md.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,popcnt")

#include "vec_avx2.h"

namespace pyfast {
namespace {

// Indices 8 to 15 pick from the values, 0 (the low bits of an absent lane) from the register of zeros.
template <class T>
inline Vec expand(const T* values, const int32_t* lane) {
  const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(lane));
  return {_mm256_permutex2var_ps(_mm256_setzero_ps(), index, load(values).v)};
}

}  // namespace
}  // namespace pyfast

#include "bitmap_linear_narrow.h"

namespace pyfast {

const BitmapLinearTable kBitmapLinearAvx512Narrow = {
    {bitmap_linear<float, 3, true>, bitmap_linear<bf16, 3, true>, bitmap_linear<f16, 3, true>},
    32,
};

}  // namespace pyfast
#endif
