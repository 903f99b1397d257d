// indexed_linear of pairs, for AVX-512 with VBMI2 and BF16. See indexed_pairs.h.
//
//   columns c, d of a pair:   x[c] ×32 ─┬─ vpunpcklwd ─► (c, d) of the tokens  0 … 15 ─► vdpbf16ps ─► sum
//                             x[d] ×32 ─┴─ vpunpckhwd ─► (c, d) of the tokens 16 … 31 ─► vdpbf16ps ─► sum
//
// Up to 16 tokens are half a register. Two columns of 64 tokens are four loads, four shuffles and four products, where
// widened ones are eight loads and eight products: loads are what widened ones wait for. vdpbf16ps adds in float32, one
// product after the other, and takes subnormal numbers for 0.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "vec_avx512.h"
#include "../inline.h"
#include "indexed_linear_rows.h"
#include "indexed_pairs.h"

namespace pyfast {
namespace {

PYFAST_INLINE __m512bh pairs(__m512i words) { return reinterpret_cast<__m512bh>(words); }
PYFAST_INLINE __m256bh pairs(__m256i words) { return reinterpret_cast<__m256bh>(words); }

// Tokens side by side: 32 in a whole register, 16 in half of one, in sums of 16 and of 8.
struct Whole {
  static constexpr int lanes = 32;
  using Words = __m512i;
  using Sum = __m512;
  PYFAST_INLINE static Words load(const void* p) { return _mm512_loadu_si512(p); }
  PYFAST_INLINE static Words broadcast(int32_t pair) { return _mm512_set1_epi32(pair); }
  PYFAST_INLINE static Words low(Words a, Words b) { return _mm512_unpacklo_epi16(a, b); }
  PYFAST_INLINE static Words high(Words a, Words b) { return _mm512_unpackhi_epi16(a, b); }
  PYFAST_INLINE static Sum dot(Sum sum, Words a, Words b) { return _mm512_dpbf16_ps(sum, pairs(a), pairs(b)); }
  PYFAST_INLINE static Sum load_sum(const float* p) { return _mm512_loadu_ps(p); }
  PYFAST_INLINE static void store_sum(float* p, Sum sum) { _mm512_storeu_ps(p, sum); }
};

struct Half {
  static constexpr int lanes = 16;
  using Words = __m256i;
  using Sum = __m256;
  PYFAST_INLINE static Words load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  PYFAST_INLINE static Words broadcast(int32_t pair) { return _mm256_set1_epi32(pair); }
  PYFAST_INLINE static Words low(Words a, Words b) { return _mm256_unpacklo_epi16(a, b); }
  PYFAST_INLINE static Words high(Words a, Words b) { return _mm256_unpackhi_epi16(a, b); }
  PYFAST_INLINE static Sum dot(Sum sum, Words a, Words b) { return _mm256_dpbf16_ps(sum, pairs(a), pairs(b)); }
  PYFAST_INLINE static Sum load_sum(const float* p) { return _mm256_loadu_ps(p); }
  PYFAST_INLINE static void store_sum(float* p, Sum sum) { _mm256_storeu_ps(p, sum); }
};

PYFAST_INLINE void prefetch_pairs(const bf16* w, const uint8_t* columns) {
  __builtin_prefetch(reinterpret_cast<const char*>(w) + kAhead, 0, 3);
  __builtin_prefetch(columns + kAhead / 2, 0, 3);
}

// One pair to the sums of its row. w: both values, in every lane; c, d: where the tokens of its columns begin in x.
template <class Register, int tile>
PYFAST_INLINE void add_pair(typename Register::Sum (&sum)[2 * tile / Register::lanes], typename Register::Words w,
                            const bf16* x, int64_t c, int64_t d) {
#pragma GCC unroll 2
  for (int i = 0; i < tile / Register::lanes; ++i) {
    const bf16* at = x + i * Register::lanes;
    typename Register::Words first = Register::load(at + c), second = Register::load(at + d);
    asm("" : "+v"(first), "+v"(second));  // one load each: GCC would read memory again for the other half
    sum[2 * i] = Register::dot(sum[2 * i], w, Register::low(first, second));
    sum[2 * i + 1] = Register::dot(sum[2 * i + 1], w, Register::high(first, second));
  }
}

template <class Register, int tile>
void pairs_panel(const IndexedLinearArgs<bf16>& a, int64_t panel, const bf16* x, float* sums) {
  constexpr int vectors = 2 * tile / Register::lanes, width = Register::lanes / 2;
  for (int64_t i = 0; i < a.panel * tile; ++i) sums[i] = 0.0f;
  for (int64_t block = 0; block < a.blocks; ++block) {
    const Quads quads(a, panel, block);
    const bf16* xb = x + block * (a.block + 1) * tile;
    for (int64_t q = 0; q < quads.count; ++q) {
      float* out[kQuad];
      typename Register::Sum sum[kQuad][vectors];
#pragma GCC unroll 4
      for (int i = 0; i < kQuad; ++i) {
        out[i] = sums + int64_t{quads.rows[kQuad * q + i]} * tile;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[i][v] = Register::load_sum(out[i] + width * v);
      }
      const int64_t end = 2 * kQuad * int64_t{quads.starts[q + 1]};
      for (int64_t at = 2 * kQuad * int64_t{quads.starts[q]}; at < end; at += 2 * kQuad) {
        prefetch_pairs(a.values + at, a.columns + at);
        const Columns<2> columns(a.columns + at);
#pragma GCC unroll 4
        for (int i = 0; i < kQuad; ++i) {
          int32_t both;
          __builtin_memcpy(&both, a.values + at + 2 * i, sizeof(both));
          add_pair<Register, tile>(sum[i], Register::broadcast(both), xb, columns.first_of<tile>(2 * i),
                                   columns.first_of<tile>(2 * i + 1));
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kQuad; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) Register::store_sum(out[i] + width * v, sum[i][v]);
      }
    }
  }
}

// One token: a block's activations lie in registers, two by two, 64 columns each, looked up by their low six bits, as
// in indexed_linear_avx512.cpp with twice as many lanes: 32 columns are the pairs of four steps.
template <int tables>
PYFAST_INLINE void add_block(const IndexedLinearArgs<bf16>& a, const Quads& quads, const bf16* from, float* sums) {
  __m512i x[2 * tables];
#pragma GCC unroll 6
  for (int i = 0; i < 2 * tables; ++i) {
    const int64_t here = a.block - 32 * i;
    const __mmask32 there = here >= 32 ? ~__mmask32{0} : here > 0 ? (__mmask32{1} << here) - 1 : 0;
    x[i] = _mm512_maskz_loadu_epi16(there, from + 32 * i);
  }
  const __m512i filled_up = _mm512_set1_epi16(static_cast<int16_t>(a.block));
  for (int64_t q = 0; q < quads.count; ++q) {
    const bf16* w = a.values + 2 * kQuad * int64_t{quads.starts[q]};
    const uint8_t* columns = a.columns + 2 * kQuad * int64_t{quads.starts[q]};
    int64_t steps = quads.starts[q + 1] - quads.starts[q];
    __m512 sum = _mm512_setzero_ps();
    const auto add_steps = [&](__mmask32 there) __attribute__((always_inline)) {
      const __m512i column = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, columns));
      const __mmask32 entries = _mm512_mask_cmpneq_epi16_mask(there, column, filled_up);
      __m512i found = _mm512_permutex2var_epi16(x[0], column, x[1]);
      if constexpr (tables > 1) {
        const __mmask32 bit6 = _mm512_test_epi16_mask(column, _mm512_set1_epi16(64));
        found = _mm512_mask_mov_epi16(found, bit6, _mm512_permutex2var_epi16(x[2], column, x[3]));
      }
      if constexpr (tables > 2) {
        const __mmask32 bit7 = _mm512_test_epi16_mask(column, _mm512_set1_epi16(128));
        found = _mm512_mask_mov_epi16(found, bit7, _mm512_permutex2var_epi16(x[4], column, x[5]));
      }
      found = _mm512_maskz_mov_epi16(entries, found);
      sum = _mm512_dpbf16_ps(sum, pairs(_mm512_maskz_loadu_epi16(there, w)), pairs(found));
    };
    for (; steps >= 4; steps -= 4, w += 8 * kQuad, columns += 8 * kQuad) {
      prefetch_pairs(w, columns);
      add_steps(~__mmask32{0});
    }
    add_steps((__mmask32{1} << (2 * kQuad * steps)) - 1);  // none, as often as one, two or three
    float of_rows[kQuad];
    reduce_add_by_four({sum}, of_rows);
    for (int i = 0; i < kQuad; ++i) sums[quads.rows[kQuad * q + i]] += of_rows[i];
  }
}

void pairs_one_token(const IndexedLinearArgs<bf16>& a, int64_t panel, const bf16* x, float* sums) {
  for (int64_t r = 0; r < a.panel; ++r) sums[r] = 0.0f;
  for (int64_t block = 0; block < a.blocks; ++block) {
    const Quads quads(a, panel, block);
    const bf16* from = x + block * (a.block + 1);
    if (a.block <= 64) {
      add_block<1>(a, quads, from, sums);
    } else if (a.block <= 128) {
      add_block<2>(a, quads, from, sums);
    } else {
      add_block<3>(a, quads, from, sums);
    }
  }
}

// Nothing is rounded: the floats came from bfloat16. Packing takes words of both in turn, four by four: pair_slot().
void pack(const float* in, int64_t columns, int lanes, bf16* out, int64_t stride) {
  for (int64_t c = 0; c < columns; ++c, in += lanes, out += stride) {
    if (lanes == 32) {
      const __m512i low = _mm512_srli_epi32(_mm512_loadu_si512(in), 16);
      const __m512i high = _mm512_srli_epi32(_mm512_loadu_si512(in + 16), 16);
      _mm512_storeu_si512(out, _mm512_packus_epi32(low, high));
    } else {
      const __m256i low = _mm256_srli_epi32(Half::load(in), 16), high = _mm256_srli_epi32(Half::load(in + 8), 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_packus_epi32(low, high));
    }
  }
}

}  // namespace

const IndexedPairsTable kIndexedPairsAvx512Bf16 = {
    {pairs_one_token, pairs_panel<Half, 16>, pairs_panel<Whole, 32>, pairs_panel<Whole, 64>}, pack};

}  // namespace pyfast
#endif
