// bitmap_linear of bfloat16 for AVX-512 with VBMI2 and BF16: nothing is widened. See bitmap_linear_rows.h.
//
//   32 columns:  vpexpandw ──► vdpbf16ps with the 32 activations, which are bfloat16 too: two columns a lane
//
// A row of a tile takes two of each for a token, a third of what widening takes, so that even at 50 % memory is waited
// for, and looking up activations for a few values has nothing left to gain. vdpbf16ps adds in float32, one product
// after the other, and takes subnormal numbers for 0.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "bitmap_linear.h"
#include "vec_avx512.h"

namespace pyfast {
namespace {

constexpr int kUsualValues = 32;
constexpr int kOverread = kTileColumns + 32;

inline __m512bh pairs(__m512i words) { return reinterpret_cast<__m512bh>(words); }

// The columns 32i … 32i + 31 of a token, in order. They came from bfloat16: nothing is rounded.
template <class T, int tokens>
struct Columns {
  __m512i x[tokens][2];

  [[gnu::always_inline]] inline Columns(const float* p, int64_t stride) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const float* at = p + t * stride + 32 * i;
        x[t][i] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(load(at + 16).v, load(at).v));
      }
  }
};

template <class T>
struct Row {
  uint32_t low, high;
  __m512i e[2];

  [[gnu::always_inline]] inline Row(const T* w, uint64_t word)
      : low(static_cast<uint32_t>(word)),
        high(static_cast<uint32_t>(word >> 32)),
        e{_mm512_loadu_si512(w), _mm512_loadu_si512(w + __builtin_popcount(low))} {
    asm("" : "+v"(e[0]), "+v"(e[1]));  // as in bitmap_linear_avx512.cpp
  }

  [[gnu::always_inline]] inline void spread() {
    e[0] = _mm512_maskz_expand_epi16(low, e[0]);
    e[1] = _mm512_maskz_expand_epi16(high, e[1]);
  }

  template <int tokens>
  [[gnu::always_inline]] inline void add(const Columns<T, tokens>& c, Vec* sum) const {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) sum[t] = {_mm512_dpbf16_ps(sum[t].v, pairs(e[i]), pairs(c.x[t][i]))};
  }
};

}  // namespace
}  // namespace pyfast

#include "bitmap_linear_rows.h"

namespace pyfast {

const BitmapLinearKernel kBitmapLinearAvx512Bf16 = bitmap_linear<bf16>;

}  // namespace pyfast
#endif
