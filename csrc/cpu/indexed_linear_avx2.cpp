// indexed_linear for AVX2. See indexed_linear_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")

#include "vec_avx2.h"
#include "indexed_linear_rows.h"
#include "indexed_linear_lookup.h"

namespace pyfast {
namespace {

float list_sum(const float* w, const uint8_t* columns, int64_t count, int64_t, const float* x) {
  __m128 sum = _mm_setzero_ps();
  for (; count > 0; count -= 16, w += 16, columns += 16) {
    _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(columns) + kAhead / 4, _MM_HINT_T0);
    sum = add_fours(w, columns, count < 16 ? count : 16, x, sum);
  }
  return sum_lanes(sum);
}

void single(const IndexedLinearArgs& a, int64_t panel, const float* x, float* sums) {
  indexed_single(a, panel, x, sums, list_sum);
}

}  // namespace

const IndexedLinearTable kIndexedLinearAvx2 = {
    {single, indexed_panel<8, 4>, indexed_panel<16, 4>, indexed_panel<32, 2>, indexed_panel<64, 1>},
};

}  // namespace pyfast
#endif
