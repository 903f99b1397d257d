// bitmap_linear for AVX-512: vexpandps spreads a row's next popcount(mask) values to 16 columns. See
// bitmap_linear_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "bitmap_linear.h"
#include "vec_avx512.h"

namespace pyfast {
namespace {

constexpr int kUsualValues = 32;
constexpr int kOverread = kTileColumns + 16;
constexpr int kSteps = 4;  // of 16 columns, in a row of a tile

template <class T, int tokens>
struct Columns {
  Vec x[tokens][kSteps];

  [[gnu::always_inline]] inline Columns(const float* p, int64_t stride) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < kSteps; ++i) x[t][i] = load(p + t * stride + 16 * i);
  }
};

//   word      ··· 0 1 1 0 1 │ 16 bits a step
//   w         a b c ···          ──(expand)──►   · c b · a   ──► FMA with the 16 activations of the step
//
// No step waits for the one before: each counts for itself where its values begin.
template <class T>
struct Row {
  uint64_t word;
  Vec e[kSteps];

  [[gnu::always_inline]] inline Row(const T* w, uint64_t word) : word(word) {
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) e[i] = load(w + __builtin_popcountll(word & ((uint64_t{1} << (16 * i)) - 1)));
    // gcc would fold the loads into the expansions, which then wait for their masks: slower on Zen 5 by far.
    asm("" : "+v"(e[0].v), "+v"(e[1].v), "+v"(e[2].v), "+v"(e[3].v));
  }

  [[gnu::always_inline]] inline void spread() {
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) e[i] = {_mm512_maskz_expand_ps(static_cast<__mmask16>(word >> (16 * i)), e[i].v)};
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

const BitmapLinearTable kBitmapLinearAvx512 = {
    {bitmap_linear<float>, bitmap_linear<bf16>, bitmap_linear<f16>, bitmap_linear<int8_t>},
};

}  // namespace pyfast
#endif
