// indexed_linear for AVX2. See indexed_linear_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")

#include "vec_avx2.h"
#include "../inline.h"
#include "indexed_linear_rows.h"

namespace pyfast {
namespace {

// The activations of a step come by four scalar loads, side by side into one register: a gather does the same loads
// and is slower.
inline __m128 look_up(const float* x, const uint8_t* columns) {
  uint32_t four;
  __builtin_memcpy(&four, columns, sizeof four);
  __m128 found = _mm_load_ss(x + (four & 255));
  found = _mm_insert_ps(found, _mm_load_ss(x + ((four >> 8) & 255)), 0x10);
  found = _mm_insert_ps(found, _mm_load_ss(x + ((four >> 16) & 255)), 0x20);
  return _mm_insert_ps(found, _mm_load_ss(x + (four >> 24)), 0x30);
}

PYFAST_INLINE void sum_steps(const float* w, const uint8_t* columns, int64_t steps, const float* x, float* sum) {
  __m128 total = _mm_setzero_ps();
  for (const float* end = w + kQuad * steps; w < end; w += kQuad, columns += kQuad) {
    prefetch_step(w, columns);
    total = _mm_fmadd_ps(_mm_loadu_ps(w), look_up(x, columns), total);
  }
  _mm_storeu_ps(sum, total);
}

}  // namespace

const IndexedLinearTable kIndexedLinearAvx2 = {
    {indexed_single<sum_steps>, indexed_panel<8, 4>, indexed_panel<16, 4>, indexed_panel<32, 2>, indexed_panel<64, 1>},
};

}  // namespace pyfast
#endif
