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
template <int step>
inline __m128 look_up(const float* x, const auto& columns) {
  __m128 found = _mm_load_ss(x + columns.at(kQuad * step + 0));
  found = _mm_insert_ps(found, _mm_load_ss(x + columns.at(kQuad * step + 1)), 0x10);
  found = _mm_insert_ps(found, _mm_load_ss(x + columns.at(kQuad * step + 2)), 0x20);
  return _mm_insert_ps(found, _mm_load_ss(x + columns.at(kQuad * step + 3)), 0x30);
}

PYFAST_INLINE void sum_steps(const float* w, const uint8_t* columns, int64_t steps, const float* x, float* sum) {
  __m128 even = _mm_setzero_ps(), odd = _mm_setzero_ps();  // an FMA waits for the one before it of its sum
  for (; steps >= 2; steps -= 2, w += 2 * kQuad, columns += 2 * kQuad) {
    prefetch_steps(w, columns);
    const Columns<2> two(columns);
    even = _mm_fmadd_ps(_mm_loadu_ps(w), look_up<0>(x, two), even);
    odd = _mm_fmadd_ps(_mm_loadu_ps(w + kQuad), look_up<1>(x, two), odd);
  }
  if (steps > 0) even = _mm_fmadd_ps(_mm_loadu_ps(w), look_up<0>(x, Columns<1>(columns)), even);
  _mm_storeu_ps(sum, _mm_add_ps(even, odd));
}

}  // namespace

const IndexedLinearTable kIndexedLinearAvx2 = {
    {indexed_single<sum_steps>, indexed_panel<8, 4, 2>, indexed_panel<16, 4>, indexed_panel<32, 2>,
     indexed_panel<64, 1>},
};

}  // namespace pyfast
#endif
