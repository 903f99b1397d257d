// bitmap_linear for AVX-512 with VBMI2: 16-bit and 8-bit values are expanded in their own width, 32 or 64 columns an
// instruction, and widened afterwards. See bitmap_linear_rows.h. float32 is served by bitmap_linear_avx512.cpp.
//
//   bfloat16   32 columns:  vpexpandw ──► shifted left: the even columns; masked: the odd ones ──► FMA each with the
//                           even and the odd activations, which are sorted once a tile
//   float16    32 columns:  vpexpandw ──► two halves, converted
//   int8       64 columns:  vpexpandb ──► every fourth column by two shifts, converted ──► FMA with every fourth
//                           activation, which are sorted once a tile
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "bitmap_linear.h"
#include "vec_avx512.h"

namespace pyfast {
namespace {

constexpr int kUsualValues = 32;
constexpr int kOverread = kTileColumns + 32;

// 64 columns of a token as four registers: in order; for bfloat16 the even and the odd ones of each half; for int8
// every fourth, from the first, second, third and fourth one on.
template <class T, int tokens>
struct Columns {
  Vec x[tokens][4];

  [[gnu::always_inline]] inline Columns(const float* p, int64_t stride) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[t][i] = load(p + t * stride + 16 * i);
    if constexpr (!__is_same(T, f16)) {
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
      const auto sort = [&](Vec& a, Vec& b) __attribute__((always_inline)) {
        const __m512 low = a.v, high = b.v;
        a = {_mm512_permutex2var_ps(low, even, high)};
        b = {_mm512_permutex2var_ps(low, odd, high)};
      };
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        sort(x[t][0], x[t][1]);
        sort(x[t][2], x[t][3]);
        if constexpr (sizeof(T) == 1) {
          sort(x[t][0], x[t][2]);  // columns 0, 4, 8 … and 2, 6, 10 …
          sort(x[t][1], x[t][3]);  // columns 1, 5, 9 … and 3, 7, 11 …
        }
      }
    }
  }
};

// 32 columns as two registers of the order of Columns.
[[gnu::always_inline]] inline void widen_columns(__m512i e, const bf16*, Vec* out) {
  out[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(e, 16))};
  out[1] = {_mm512_castsi512_ps(_mm512_and_si512(e, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
[[gnu::always_inline]] inline void widen_columns(__m512i e, const f16*, Vec* out) {
  out[0] = {_mm512_cvtph_ps(_mm512_castsi512_si256(e))};
  out[1] = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(e, 1))};
}

template <class T, int tokens>
[[gnu::always_inline]] inline void add_row(const T* w, uint64_t word, const Columns<T, tokens>& c, Vec* sum) {
  Vec e[4];
  if constexpr (sizeof(T) == 1) {
    const __m512i four = _mm512_maskz_expand_epi8(word, _mm512_loadu_si512(w));
    e[0] = {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 24), 24))};
    e[1] = {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 16), 24))};
    e[2] = {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 8), 24))};
    e[3] = {_mm512_cvtepi32_ps(_mm512_srai_epi32(four, 24))};
  } else {
    const uint32_t low = static_cast<uint32_t>(word), high = static_cast<uint32_t>(word >> 32);
    widen_columns(_mm512_maskz_expand_epi16(low, _mm512_loadu_si512(w)), w, e);
    widen_columns(_mm512_maskz_expand_epi16(high, _mm512_loadu_si512(w + __builtin_popcount(low))), w, e + 2);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sum[t] = fma(e[i], c.x[t][i], sum[t]);
}

}  // namespace
}  // namespace pyfast

#include "bitmap_linear_rows.h"

namespace pyfast {
namespace {

void linear_f32(const BitmapLinearArgs& a, int64_t begin, int64_t end) {
  kBitmapLinearAvx512.linear[static_cast<int>(Stored::f32)](a, begin, end);
}

}  // namespace

const BitmapLinearTable kBitmapLinearAvx512Vbmi2 = {
    {linear_f32, bitmap_linear<bf16>, bitmap_linear<f16>, bitmap_linear<int8_t>},
};

}  // namespace pyfast
#endif
