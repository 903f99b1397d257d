// bitmap_linear on the CPU: checks, threads, registration. The contract is in bitmap_linear.h.
#include "bitmap_linear.h"

#include "sparse_driver.h"

namespace pyfast {
namespace {

Tensor bitmap_linear(const Tensor& x, const Tensor& values, const Tensor& bitmaps, const Tensor& offsets,
                     const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, int64_t n,
                     int64_t activation, const std::optional<Tensor>& mul) {
  const LinearOptions options{scales, bias, activation, mul};
  const Stored stored = stored_as(values);
  check_linear(x, stored, n, options);
  const int64_t tokens = x.size(0), k = x.size(1);
  const int64_t tiles = (k + kTileColumns - 1) / kTileColumns, tile_rows = (n + kTileRows - 1) / kTileRows;
  STD_TORCH_CHECK(bitmaps.scalar_type() == ScalarType::Long && bitmaps.is_contiguous() && bitmaps.dim() == 2 &&
                      bitmaps.size(0) == tiles * tile_rows && bitmaps.size(1) == kTileRows,
                  "bitmaps: must be contiguous int64 [tiles, 16] for in_features and out_features");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.is_contiguous() && offsets.dim() == 1 &&
                      offsets.size(0) == tiles * tile_rows + 1,
                  "offsets: must be contiguous int64 [tiles + 1]");
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "values: must be contiguous and flat");
  STD_TORCH_CHECK(offsets.const_data_ptr<int64_t>()[tiles * tile_rows] == values.size(0),
                  "values: must have as many elements as offsets say");
  const double density = static_cast<double>(values.size(0)) / static_cast<double>(std::max<int64_t>(1, n * k));
  if (tokens > few_tokens() && stored != Stored::i8)
    return linear_by_panels(x, n, options, [&](Tensor& dense, int64_t begin) {
      bitmap_decompress_rows(values, bitmaps, offsets, n, dense, begin);
    });
  LinearOutput output(x, n, options);
  if (tokens == 0 || n == 0) return output.y;
  const Tensor wide = widen_activations(x, tiles * kTileColumns);
  BitmapLinearArgs args{};
  args.x = wide.const_data_ptr<float>();
  args.values = values.const_data_ptr();
  args.bitmaps = reinterpret_cast<const uint64_t*>(bitmaps.const_data_ptr<int64_t>());
  args.offsets = offsets.const_data_ptr<int64_t>();
  args.tokens = tokens;
  args.k = args.x_stride = tiles * kTileColumns;
  args.nnz = values.size(0);
  args.out = output.epilogue;
  const BitmapLinearKernel kernel = bitmap_linear_table(active_isa(), density).linear[static_cast<int>(stored)];
  // About 10 positions a nanosecond at one token; each further token adds less than half of that time.
  parallel_chunks(tile_rows, 1 + 65536 / ((args.k + 1) * kTileRows * (1 + tokens / 2)),
                  [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return output.y;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("bitmap_linear", TORCH_BOX(&pyfast::bitmap_linear)); }
