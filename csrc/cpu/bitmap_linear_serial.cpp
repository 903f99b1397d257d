// bitmap_linear, portable: the definition of the product, one stored weight at a time.
#include "bitmap_linear.h"

namespace pyfast {
namespace {

template <class T>
void bitmap_linear(const BitmapLinearArgs& a, int64_t begin, int64_t end) {
  const int64_t tiles = a.k / kTileColumns;
  for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
    const int64_t first = tile_row * kTileRows;
    const int64_t rows = a.n - first < kTileRows ? a.n - first : kTileRows;
    for (int64_t token = 0; token < a.tokens; ++token) {
      float sum[kTileRows] = {};
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* x = a.x + token * a.x_stride + tile * kTileColumns;
        const uint64_t* words = a.bitmaps + (tile_row * tiles + tile) * kTileWords;
        const T* w = static_cast<const T*>(a.values) + a.offsets[tile_row * tiles + tile];
        for (int word = 0; word < kTileWords; ++word) {
          for (uint64_t bits = words[word]; bits != 0; bits &= bits - 1) {
            const int bit = __builtin_ctzll(bits);
            sum[8 * (word % 2) + bit / 8] += widen(*w++) * x[8 * (word / 2) + bit % 8];
          }
        }
      }
      T* y = static_cast<T*>(a.y) + token * a.y_stride + first;
      for (int64_t r = 0; r < rows; ++r) narrow(sum[r] + (a.bias == nullptr ? 0.0f : a.bias[first + r]), y + r);
    }
  }
}

}  // namespace

const BitmapLinearTable kBitmapLinearSerial = {
    {bitmap_linear<float>, bitmap_linear<bf16>, bitmap_linear<f16>},
    8,
};

}  // namespace pyfast
