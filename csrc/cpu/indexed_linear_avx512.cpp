// indexed_linear for AVX-512. See indexed_linear_rows.h; one token has its own way.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "vec_avx512.h"
#include "../inline.h"
#include "indexed_linear_rows.h"

namespace pyfast {
namespace {

// A block's activations of one token lie in registers, two by two: x of 16 columns each, looked up by their low five
// bits; the bits above say in which pair.
//
//   columns  u8 ×16 ─► u32 ×16 ──┬─ pair 0 ─┐
//   (4 steps of 4 rows)          ├─ pair 1 ─┴ bit 5 ─┐
//                                ├─ pair 2 ─┐        │
//                                ├─ pair 3 ─┴ bit 5 ─┴ bit 6 ─┐
//                                ├─ pair 4 ─┐                 │
//                                └─ pair 5 ─┴ bit 5 ──────────┴ bit 7 ─►  x ×16,  FMA with w ×16
template <int pairs>
struct Block {
  __m512 x[2 * pairs];

  Block(const float* from, int64_t columns) {
    for (int i = 0; i < 2 * pairs; ++i) {
      const int64_t here = columns - 16 * i;
      const __mmask16 there = static_cast<__mmask16>(here >= 16 ? 0xffff : here > 0 ? (1 << here) - 1 : 0);
      x[i] = _mm512_maskz_loadu_ps(there, from + 16 * i);
    }
  }

  PYFAST_INLINE __m512 pair(int p, __m512i column) const {
    return _mm512_permutex2var_ps(x[2 * p], column, x[2 * p + 1]);
  }

  PYFAST_INLINE __m512 look_up(__m512i column) const {
    const __mmask16 bit5 = _mm512_test_epi32_mask(column, _mm512_set1_epi32(32));
    __m512 found = _mm512_mask_mov_ps(pair(0, column), bit5, pair(1, column));
    if constexpr (pairs > 2) {
      const __mmask16 bit6 = _mm512_test_epi32_mask(column, _mm512_set1_epi32(64));
      found = _mm512_mask_mov_ps(found, bit6, _mm512_mask_mov_ps(pair(2, column), bit5, pair(3, column)));
    }
    if constexpr (pairs > 4) {
      const __mmask16 bit7 = _mm512_test_epi32_mask(column, _mm512_set1_epi32(128));
      found = _mm512_mask_mov_ps(found, bit7, _mm512_mask_mov_ps(pair(4, column), bit5, pair(5, column)));
    }
    return found;
  }
};

template <int pairs>
PYFAST_INLINE void add_block(const IndexedLinearArgs<float>& a, const Quads& quads, const float* from, float* sums) {
  const Block<pairs> x(from, a.block);
  const __m512i filled_up = _mm512_set1_epi32(static_cast<int>(a.block));
  for (int64_t q = 0; q < quads.count; ++q) {
    const float* w = a.values + kQuad * int64_t{quads.starts[q]};
    const uint8_t* columns = a.columns + kQuad * int64_t{quads.starts[q]};
    int64_t steps = quads.starts[q + 1] - quads.starts[q];
    __m512 sum = _mm512_setzero_ps();
    const auto add_steps = [&](__mmask16 there) __attribute__((always_inline)) {
      const __m512i column = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, columns));
      const __mmask16 entries = _mm512_mask_cmpneq_epi32_mask(there, column, filled_up);
      sum = _mm512_mask3_fmadd_ps(_mm512_maskz_loadu_ps(there, w), x.look_up(column), sum, entries);
    };
    for (; steps >= 4; steps -= 4, w += 4 * kQuad, columns += 4 * kQuad) {
      prefetch_steps(w, columns);
      add_steps(0xffff);
    }
    add_steps(static_cast<__mmask16>((1u << (kQuad * steps)) - 1));  // none, as often as one, two or three
    float of_rows[kQuad];
    reduce_add_by_four({sum}, of_rows);
    for (int i = 0; i < kQuad; ++i) sums[quads.rows[kQuad * q + i]] += of_rows[i];
  }
}

// Quads of so few steps are done before the activations are in registers.
constexpr int64_t kFewSteps = 6;

void indexed_one_token(const IndexedLinearArgs<float>& a, int64_t panel, const float* x, float* sums) {
  const int64_t all = a.blocks * (a.panel / kQuad);
  const int32_t* starts = a.starts + panel * all;
  if (starts[all] - starts[0] < kFewSteps * all) return kIndexedLinearAvx2.panel[0](a, panel, x, sums);
  for (int64_t r = 0; r < a.panel; ++r) sums[r] = 0.0f;
  for (int64_t block = 0; block < a.blocks; ++block) {
    const Quads quads(a, panel, block);
    const float* from = x + block * (a.block + 1);
    if (a.block <= 64) {
      add_block<2>(a, quads, from, sums);
    } else if (a.block <= 128) {
      add_block<4>(a, quads, from, sums);
    } else {
      add_block<6>(a, quads, from, sums);
    }
  }
}

// 8 tokens have use for half a register.
void indexed_8_tokens(const IndexedLinearArgs<float>& a, int64_t panel, const float* x, float* sums) {
  kIndexedLinearAvx2.panel[1](a, panel, x, sums);
}

}  // namespace

const IndexedLinearTable kIndexedLinearAvx512 = {
    {indexed_one_token, indexed_8_tokens, indexed_panel<16, 4, 2>, indexed_panel<32, 4>, indexed_panel<64, 4>},
};

}  // namespace pyfast
#endif
