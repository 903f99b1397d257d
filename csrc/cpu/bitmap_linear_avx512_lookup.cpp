// bitmap_linear for AVX-512 with VBMI2, for weights of which few elements are stored: instead of spreading the values
// to the columns, the activations are looked up for the values. See bitmap_linear_rows.h.
//
//   word                        64 bits, a row of a tile
//   columns = vpcompressb       0 1 2 ··· 63 at the set bits, one byte a stored value
//   x[columns]                  64 activations lie in four registers; vpermi2ps looks up 16 among the first or the last
//                               32, bit 5 of the column says which of the two answers counts
//   w, masked                   16 values ──► one FMA for up to 16 stored values of a row
//
// The work is that of a row with 16 stored values or fewer, whatever it holds: a quarter of the expansion's, up to a
// density of a quarter. Fuller rows go on in steps of 16.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt")

#include "bitmap_linear.h"
#include "vec_avx512.h"

namespace pyfast {
namespace {

constexpr int kUsualValues = 16;
constexpr int kOverread = 0;  // loads are masked

alignas(64) constexpr uint8_t kColumnNumbers[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                                    32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                                    48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};

template <class T, int tokens>
struct Columns {
  Vec x[tokens][4];

  [[gnu::always_inline]] inline Columns(const float* p, int64_t stride) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[t][i] = load(p + t * stride + 16 * i);
  }

  // The activations of token t at 16 columns.
  [[gnu::always_inline]] inline Vec at(int t, __m512i column, __mmask16 upper) const {
    const __m512 low = _mm512_permutex2var_ps(x[t][0].v, column, x[t][1].v);
    const __m512 high = _mm512_permutex2var_ps(x[t][2].v, column, x[t][3].v);
    return {_mm512_mask_mov_ps(low, upper, high)};
  }
};

// The lanes of the first `left` of up to 16 values.
inline __mmask16 lanes(int left) { return static_cast<__mmask16>(_bzhi_u32(0xffff, static_cast<uint32_t>(left))); }

template <class T>
struct Row {
  const T* w;
  int stored;
  __m512i columns, column;  // one byte each; the first 16 widened
  Vec value;

  [[gnu::always_inline]] inline Row(const T* w, uint64_t word)
      : w(w),
        stored(__builtin_popcountll(word)),
        columns(_mm512_maskz_compress_epi8(word, _mm512_load_si512(kColumnNumbers))),
        value(load_first(w, lanes(stored))) {}

  [[gnu::always_inline]] inline void spread() { column = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(columns)); }

  template <int tokens>
  [[gnu::always_inline]] inline void add(const Columns<T, tokens>& c, Vec* sum) const {
    add_sixteen(column, value, c, sum);
    __m512i rest = columns;
    for (int done = 16; __builtin_expect(done < stored, 0); done += 16) {
      rest = _mm512_alignr_epi64(rest, rest, 2);  // the next 16
      add_sixteen(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(rest)), load_first(w + done, lanes(stored - done)), c,
                  sum);
    }
  }

 private:
  template <int tokens>
  [[gnu::always_inline]] static inline void add_sixteen(__m512i column, Vec value, const Columns<T, tokens>& c,
                                                        Vec* sum) {
    const __mmask16 upper = _mm512_test_epi32_mask(column, _mm512_set1_epi32(32));
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sum[t] = fma(value, c.at(t, column, upper), sum[t]);
  }
};

}  // namespace
}  // namespace pyfast

#include "bitmap_linear_rows.h"

namespace pyfast {

const BitmapLinearTable kBitmapLinearAvx512Lookup = {
    {bitmap_linear<float>, bitmap_linear<bf16>, bitmap_linear<f16>, bitmap_linear<int8_t>},
};

}  // namespace pyfast
#endif
