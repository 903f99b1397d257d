// BitmapWeight to dense on the GPU: checks, stream, launch, registration. The contract is in bitmap_convert.cuh.
#include "bitmap_convert.cuh"

#include "launch.h"

namespace pyfast::cuda {
namespace {

// Tiles are counted in 32 bits on the device: 2^31 of them are 2^41 elements.
constexpr int64_t kMaxTiles = 2147483647;

template <class U>
void launch(const Tensor& values, const Tensor& bitmaps, const Tensor& offsets, const Tensor& out) {
  const Dense<U> dense = dense_view<U>(out);
  const BitmapWeight<U> weight{static_cast<const U*>(values.const_data_ptr()),
                               static_cast<const uint32_t*>(bitmaps.const_data_ptr()),
                               static_cast<const int64_t*>(offsets.const_data_ptr()),
                               values.size(0),
                               static_cast<uint32_t>(bitmaps.size(0)),
                               static_cast<uint32_t>(ceil_div(dense.columns, kTileColumns))};
  const int64_t blocks = ceil_div(weight.tiles, kBitmapWarps);
  bitmap_decompress_kernel<U>
      <<<static_cast<unsigned>(blocks), 32 * kBitmapWarps, 0, current_stream(values)>>>(weight, dense);
  check_launch("bitmap_decompress");
}

// values [stored], bitmaps int64 [tiles, 16], offsets int64 [tiles + 1] -> dense [n, k] in the dtype of values.
Tensor bitmap_decompress(const Tensor& values, const Tensor& bitmaps, const Tensor& offsets, int64_t n, int64_t k) {
  check_tensor(values, "values", 1, values);
  check_tensor(bitmaps, "bitmaps", 2, values);
  check_tensor(offsets, "offsets", 1, values);
  const bool wide = is_wide(values, "values");
  STD_TORCH_CHECK(n >= 0 && k >= 0, "n and k: must not be negative, got ", n, " and ", k);
  const int64_t tiles = ceil_div(n, kTileRows) * ceil_div(k, kTileColumns);
  STD_TORCH_CHECK(bitmaps.scalar_type() == ScalarType::Long && bitmaps.size(0) == tiles && bitmaps.size(1) == 16,
                  "bitmaps: must be int64 [", tiles, ", 16] for the given shape");
  STD_TORCH_CHECK(tiles <= kMaxTiles, "bitmaps: ", tiles, " tiles, more than ", kMaxTiles, " in one weight");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.size(0) == tiles + 1, "offsets: must be int64 [",
                  tiles + 1, "] for the given shape");
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  Tensor dense = torch::stable::new_empty(values, {n, k});
  if (n == 0 || k == 0) return dense;
  if (wide)
    launch<uint32_t>(values, bitmaps, offsets, dense);
  else
    launch<uint16_t>(values, bitmaps, offsets, dense);
  return dense;
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) { m.impl("bitmap_decompress", TORCH_BOX(&pyfast::cuda::bitmap_decompress)); }
