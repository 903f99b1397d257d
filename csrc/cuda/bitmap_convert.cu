// bitmap_convert on the GPU: checks, stream, launch, registration. The contract is in bitmap_convert.cuh.
#include "bitmap_convert.cuh"

#include "bitmap_launch.h"

namespace pyfast::cuda {
namespace {

unsigned blocks_of(int64_t tiles) { return static_cast<unsigned>(ceil_div(tiles, kBitmapWarps)); }

// dense [n, k] -> bitmaps int64 [tiles, 16], counts int64 [tiles] of stored values.
std::tuple<Tensor, Tensor> bitmap_scan(const Tensor& dense) {
  const Tensor rows = rows_of(dense);
  const bool wide = is_wide(dense, "dense");
  const int64_t tiles = ceil_div(rows.size(0), kTileRows) * ceil_div(rows.size(1), kTileColumns);
  STD_TORCH_CHECK(tiles <= kMaxTiles, "dense: ", tiles, " tiles, more than ", kMaxTiles, " in one weight");
  const torch::stable::accelerator::DeviceGuard guard(dense.get_device_index());
  Tensor bitmaps = torch::stable::new_empty(dense, {tiles, kTileRows}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(dense, {tiles}, ScalarType::Long);
  if (tiles == 0) return {bitmaps, counts};
  by_size(wide, [&](auto unit) {
    using U = decltype(unit);
    bitmap_scan_kernel<U><<<blocks_of(tiles), 32 * kBitmapWarps, 0, current_stream(dense)>>>(
        rows_view<U>(rows), static_cast<uint32_t*>(bitmaps.mutable_data_ptr()),
        static_cast<int64_t*>(counts.mutable_data_ptr()), static_cast<uint32_t>(tiles));
  });
  check_launch("bitmap_scan");
  return {bitmaps, counts};
}

// dense [n, k], bitmaps, offsets -> values [stored]. That `stored` is the last offset is the caller's word: to look
// would cost a synchronisation; places beyond `stored` are not
// written.
Tensor bitmap_gather(const Tensor& dense, const Tensor& bitmaps, const Tensor& offsets, int64_t stored) {
  const Tensor rows = rows_of(dense);
  const bool wide = is_wide(dense, "dense");
  check_tables(dense, bitmaps, offsets, rows.size(0), rows.size(1));
  STD_TORCH_CHECK(stored >= 0 && stored <= bitmaps.size(0) * kTileElements, "stored: got ", stored, ", at most ",
                  bitmaps.size(0) * kTileElements);
  const torch::stable::accelerator::DeviceGuard guard(dense.get_device_index());
  Tensor values = torch::stable::new_empty(dense, {stored});
  if (stored == 0) return values;
  by_size(wide, [&](auto unit) {
    using U = decltype(unit);
    bitmap_gather_kernel<U><<<blocks_of(bitmaps.size(0)), 32 * kBitmapWarps, 0, current_stream(dense)>>>(
        rows_view<U>(rows),
        bitmap_view(static_cast<U*>(values.mutable_data_ptr()), stored, bitmaps, offsets, rows.size(1)));
  });
  check_launch("bitmap_gather");
  return values;
}

// values [stored], bitmaps, offsets -> dense [n, k] in the dtype of values.
Tensor bitmap_decompress(const Tensor& values, const Tensor& bitmaps, const Tensor& offsets, int64_t n, int64_t k) {
  check_tensor(values, "values", 1, values);
  const bool wide = is_wide(values, "values");
  check_tables(values, bitmaps, offsets, n, k);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  Tensor dense = torch::stable::new_empty(values, {n, k});
  if (n == 0 || k == 0) return dense;
  const Tensor read = aligned_start(values);
  by_size(wide, [&](auto unit) {
    using U = decltype(unit);
    bitmap_decompress_kernel<U><<<blocks_of(bitmaps.size(0)), 32 * kBitmapWarps, 0, current_stream(values)>>>(
        bitmap_view(static_cast<const U*>(read.const_data_ptr()), values.size(0), bitmaps, offsets, k),
        dense_view<U>(dense));
  });
  check_launch("bitmap_decompress");
  return dense;
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("bitmap_scan", TORCH_BOX(&pyfast::cuda::bitmap_scan));
  m.impl("bitmap_gather", TORCH_BOX(&pyfast::cuda::bitmap_gather));
  m.impl("bitmap_decompress", TORCH_BOX(&pyfast::cuda::bitmap_decompress));
}
