// indexed_linear for AVX2. See indexed_linear_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")

#include "vec_avx2.h"
#include "../inline.h"
#include "indexed_linear_rows.h"

namespace pyfast {
namespace {

// The activations of four entries come by four scalar loads, side by side into one register: a gather does the same
// loads and is slower.
inline __m128 look_up(const float* x, const uint8_t* columns) {
  uint32_t four;
  __builtin_memcpy(&four, columns, sizeof four);
  __m128 found = _mm_load_ss(x + (four & 255));
  found = _mm_insert_ps(found, _mm_load_ss(x + ((four >> 8) & 255)), 0x10);
  found = _mm_insert_ps(found, _mm_load_ss(x + ((four >> 16) & 255)), 0x20);
  return _mm_insert_ps(found, _mm_load_ss(x + (four >> 24)), 0x30);
}

PYFAST_INLINE float list_sum(const float* w, const uint8_t* columns, int64_t count, const float* x) {
  __m128 sum = _mm_setzero_ps();
  for (int64_t i = 0; i < count; i += kIndexedUnit) {
    if (i % 16 == 0) {
      _mm_prefetch(reinterpret_cast<const char*>(w + i) + kAhead, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(columns + i) + kAhead / 4, _MM_HINT_T0);
    }
    sum = _mm_fmadd_ps(_mm_loadu_ps(w + i), look_up(x, columns + i), sum);
  }
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

}  // namespace

const IndexedLinearTable kIndexedLinearAvx2 = {
    {indexed_single<list_sum>, indexed_panel<8, 4>, indexed_panel<16, 4>, indexed_panel<32, 2>, indexed_panel<64, 1>},
};

}  // namespace pyfast
#endif
