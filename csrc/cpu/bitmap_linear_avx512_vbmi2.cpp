// bitmap_linear for AVX-512 with VBMI2: bfloat16 and int8 values are expanded in their own width, 32 or 64 columns an
// instruction, and widened afterwards. See bitmap_linear_rows.h. float32 and float16, whose conversion has no cheap
// form for the upper half of a register, are served by bitmap_linear_avx512.cpp.
//
//   bfloat16   32 columns:  vpexpandw ──► shifted left: the even columns; masked: the odd ones ──► FMA each with the
//                           even and the odd activations, which are sorted once a tile
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

// 64 columns of a token as four registers: for bfloat16 the even and the odd ones of each half; for int8
// every fourth, from the first, second, third and fourth one on.
template <class T, int tokens>
struct Columns {
  Vec x[tokens][4];

  [[gnu::always_inline]] inline Columns(const float* p, int64_t stride) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[t][i] = load(p + t * stride + 16 * i);
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
};

// 32 columns as two registers of the order of Columns.
[[gnu::always_inline]] inline void widen_columns(__m512i e, Vec* out) {
  out[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(e, 16))};
  out[1] = {_mm512_castsi512_ps(_mm512_and_si512(e, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}

template <class T>
struct Row {
  uint64_t word;
  __m512i stored[sizeof(T)];  // of 64 columns, or of 32 each
  Vec e[4];

  [[gnu::always_inline]] inline Row(const T* w, uint64_t word) : word(word) {
    stored[0] = _mm512_loadu_si512(w);
    if constexpr (sizeof(T) == 2) stored[1] = _mm512_loadu_si512(w + __builtin_popcount(static_cast<uint32_t>(word)));
  }

  [[gnu::always_inline]] inline void spread() {
    if constexpr (sizeof(T) == 1) {
      const __m512i four = _mm512_maskz_expand_epi8(word, stored[0]);
      e[0] = {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 24), 24))};
      e[1] = {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 16), 24))};
      e[2] = {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(four, 8), 24))};
      e[3] = {_mm512_cvtepi32_ps(_mm512_srai_epi32(four, 24))};
    } else {
      widen_columns(_mm512_maskz_expand_epi16(static_cast<uint32_t>(word), stored[0]), e);
      widen_columns(_mm512_maskz_expand_epi16(static_cast<uint32_t>(word >> 32), stored[1]), e + 2);
    }
  }

  template <int tokens>
  [[gnu::always_inline]] inline void add(const Columns<T, tokens>& c, Vec* sum) const {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t)  // in two chains
      sum[t] = fma(e[0], c.x[t][0], fma(e[2], c.x[t][2], sum[t])) + fma(e[1], c.x[t][1], e[3] * c.x[t][3]);
  }
};

}  // namespace
}  // namespace pyfast

#include "bitmap_linear_rows.h"

namespace pyfast {
namespace {

template <Stored stored>
void elsewhere(const BitmapLinearArgs& a, int64_t begin, int64_t end) {
  kBitmapLinearAvx512.linear[static_cast<int>(stored)](a, begin, end);
}

}  // namespace

const BitmapLinearTable kBitmapLinearAvx512Vbmi2 = {
    {elsewhere<Stored::f32>, bitmap_linear<bf16>, elsewhere<Stored::f16>, bitmap_linear<int8_t>},
};

}  // namespace pyfast
#endif
