// The kernels of csrc/cuda/bitmap_convert.cuh on the host, launched as in bitmap_convert.cu.
#include "simt.h"

#include "bitmap_convert.cuh"

using namespace pyfast::cuda;

namespace {

uint32_t across(int64_t k) { return static_cast<uint32_t>((k + kTileColumns - 1) / kTileColumns); }
uint32_t tiles_of(int64_t n, int64_t k) { return static_cast<uint32_t>((n + kTileRows - 1) / kTileRows) * across(k); }

simt::Shape shape_of(uint32_t tiles) { return {{(tiles + kBitmapWarps - 1) / kBitmapWarps}, {32 * kBitmapWarps}}; }

template <class U>
void compress(const U* dense, int64_t stride, uint32_t* bitmaps, int64_t* offsets, U* values, int64_t n, int64_t k,
              int64_t stored, int64_t packed) {
  const uint32_t tiles = tiles_of(n, k);
  const DenseRows<U> rows{dense, n, k, stride, packed != 0};
  if (values == nullptr)
    simt::launch(shape_of(tiles), bitmap_scan_kernel<U>, rows, bitmaps, offsets, tiles);
  else
    simt::launch(shape_of(tiles), bitmap_gather_kernel<U>, rows,
                 BitmapWeight<U>{values, bitmaps, offsets, stored, tiles, across(k)});
}

template <class U>
void decompress(const U* values, const uint32_t* bitmaps, const int64_t* offsets, U* dense, int64_t n, int64_t k,
                int64_t stored, int64_t packed) {
  const uint32_t tiles = tiles_of(n, k);
  simt::launch(shape_of(tiles), bitmap_decompress_kernel<U>,
               BitmapWeight<const U>{values, bitmaps, offsets, stored, tiles, across(k)},
               Dense<U>{dense, n, k, packed != 0});
}

}  // namespace

#define EXPORTS(size, U)                                                                                               \
  SIMT_EXPORT compress_##size(const U* dense, int64_t stride, uint32_t* bitmaps, int64_t* offsets, U* values,          \
                              int64_t n, int64_t k, int64_t stored, int64_t packed) {                                  \
    compress(dense, stride, bitmaps, offsets, values, n, k, stored, packed);                                           \
  }                                                                                                                    \
  SIMT_EXPORT decompress_##size(const U* values, const uint32_t* bitmaps, const int64_t* offsets, U* dense, int64_t n, \
                                int64_t k, int64_t stored, int64_t packed) {                                           \
    decompress(values, bitmaps, offsets, dense, n, k, stored, packed);                                                 \
  }

EXPORTS(2, uint16_t)
EXPORTS(4, uint32_t)
