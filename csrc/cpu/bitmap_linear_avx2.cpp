// bitmap_linear for AVX2: 8 columns a step, values spread by vpermps with indices from a table. See
// bitmap_linear_rows.h.
//
//   8 values ──► spread by the table's row of 8 bits of the word (expand_avx2.h) ──► FMA with the step's 8 activations
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")

#include "bitmap_linear.h"
#include "expand_avx2.h"
#include "vec_avx2.h"

namespace pyfast {
namespace {

constexpr int kUsualValues = 32;
constexpr int kOverread = kTileColumns + 8;
constexpr int kSteps = 8;  // of 8 columns, in a row of a tile

// 32 times the 8 bits of a step: their row of the table as an offset in bytes, by one shift and one mask.
inline uint64_t table_offset(uint64_t word, int step) {
  return (step == 0 ? word << 5 : word >> (8 * step - 5)) & 0x1fe0;
}

template <class T, int tokens>
struct Columns {
  const float* x;
  int64_t stride;

  [[gnu::always_inline]] inline Columns(const float* p, int64_t stride) : x(p), stride(stride) {}
};

// Sixteen registers hold no second row beside the first: all is done at the end.
template <class T>
struct Row {
  const T* w;
  uint64_t word;

  [[gnu::always_inline]] inline Row(const T* w, uint64_t word) : w(w), word(word) {}

  [[gnu::always_inline]] inline void spread() {}

  template <int tokens>
  [[gnu::always_inline]] inline void add(const Columns<T, tokens>& c, Vec* sum) const {
    const T* next = w;
    Vec s[tokens];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) s[t] = sum[t];
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; ++i) {
      const uint64_t offset = table_offset(word, i);
      const char* row = reinterpret_cast<const char*>(kExpandTable.lane) + offset;
      const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(row));
      const Vec e = {_mm256_castsi256_ps(pyfast::spread(_mm256_castps_si256(load(next).v), index))};
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) s[t] = fma(e, load(c.x + t * c.stride + 8 * i), s[t]);
      next += __builtin_popcountll(offset);
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sum[t] = s[t];
  }
};

}  // namespace
}  // namespace pyfast

#include "bitmap_linear_rows.h"

namespace pyfast {

const BitmapLinearTable kBitmapLinearAvx2 = {
    {bitmap_linear<float>, bitmap_linear<bf16>, bitmap_linear<f16>, bitmap_linear<int8_t>},
};

}  // namespace pyfast
#endif
