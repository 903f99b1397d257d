// bitmap_linear, portable: the definition of the product, one stored weight at a time.
#include "bitmap_linear.h"

namespace pyfast {
namespace {

template <class T>
void bitmap_linear(const BitmapLinearArgs& a, int64_t begin, int64_t end) {
  const int64_t tiles = a.k / kTileColumns;
  for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
    for (int64_t token = 0; token < a.tokens; ++token) {
      float sum[kTileRows] = {};
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* x = a.x + token * a.x_stride + tile * kTileColumns;
        const uint64_t* words = a.bitmaps + (tile_row * tiles + tile) * kTileRows;
        const T* w = static_cast<const T*>(a.values) + a.offsets[tile_row * tiles + tile];
        for (int r = 0; r < kTileRows; ++r)
          for (uint64_t bits = words[r]; bits != 0; bits &= bits - 1) sum[r] += widen(*w++) * x[__builtin_ctzll(bits)];
      }
      for (int r = 0; r < kTileRows; ++r) write_output(a.out, tile_row * kTileRows + r, token, sum[r]);
    }
  }
}

}  // namespace

const BitmapLinearTable kBitmapLinearSerial = {
    {bitmap_linear<float>, bitmap_linear<bf16>, bitmap_linear<f16>, bitmap_linear<int8_t>},
};

}  // namespace pyfast
