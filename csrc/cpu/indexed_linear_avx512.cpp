// indexed_linear for AVX-512. 8 tokens are half a register: there the AVX2 variant serves. See indexed_linear_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "vec_avx512.h"
#include "indexed_linear_rows.h"
#include "indexed_linear_lookup.h"

namespace pyfast {
namespace {

void eight(const IndexedLinearArgs& a, int64_t panel, const float* x, float* sums) {
  kIndexedLinearAvx2.panel[1](a, panel, x, sums);
}

// Sixteen entries at a time, of which a mask leaves those of the list: as many turns for most lists, so that the end of
// a list is seldom mispredicted. Columns after its end are those of other lists, and as good as any.
float list_sum(const float* w, const uint8_t* columns, int64_t count, int64_t room, const float* x) {
  __m128 sum[4] = {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps()};
  for (; count > 0 && room >= 16; count -= 16, room -= 16, w += 16, columns += 16) {
    _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(columns) + kAhead / 4, _MM_HINT_T0);
    const unsigned mask = count >= 16 ? 0xffffu : (1u << count) - 1u;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __mmask8 own = static_cast<__mmask8>(mask >> (4 * i) & 15u);
      const __m128 values = _mm_maskz_loadu_ps(own, w + 4 * i);
      sum[i] = _mm_mask3_fmadd_ps(values, look_up(x, columns + 4 * i), sum[i], own);
    }
  }
  sum[0] = add_fours(w, columns, count, x, sum[0]);  // at the end of the last list
  return sum_lanes(_mm_add_ps(_mm_add_ps(sum[0], sum[1]), _mm_add_ps(sum[2], sum[3])));
}

// Shorter lists leave most of a mask empty: four entries a turn, as AVX2 does, are faster below sixteen in the mean.
void single(const IndexedLinearArgs& a, int64_t panel, const float* x, float* sums) {
  if (a.entries < 16 * a.n * a.blocks) return kIndexedLinearAvx2.panel[0](a, panel, x, sums);
  indexed_single(a, panel, x, sums, list_sum);
}

}  // namespace

const IndexedLinearTable kIndexedLinearAvx512 = {
    {single, eight, indexed_panel<16, 4>, indexed_panel<32, 4>, indexed_panel<64, 2>},
};

}  // namespace pyfast
#endif
