// bitmap_linear on the CPU: checks, threads, registration. The contract is in bitmap_linear.h.
#include "bitmap_linear.h"

#include "sparse_driver.h"

namespace pyfast {
namespace {

Tensor bitmap_linear(const Tensor& x, const Tensor& values, const Tensor& bitmaps, const Tensor& offsets,
                     const std::optional<Tensor>& bias, int64_t n) {
  check_linear(x, values, n, bias);
  const int64_t tokens = x.size(0), k = x.size(1);
  const int64_t tiles = (k + kTileColumns - 1) / kTileColumns, tile_rows = (n + kTileRows - 1) / kTileRows;
  STD_TORCH_CHECK(bitmaps.scalar_type() == ScalarType::Long && bitmaps.is_contiguous() && bitmaps.dim() == 2 &&
                      bitmaps.size(0) == tiles * tile_rows && bitmaps.size(1) == kTileWords,
                  "bitmaps: must be contiguous int64 [tiles, 16] for in_features and out_features");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.is_contiguous() && offsets.dim() == 1 &&
                      offsets.size(0) == tiles * tile_rows + 1,
                  "offsets: must be contiguous int64 [tiles + 1]");
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "values: must be contiguous and flat");
  const double density = static_cast<double>(values.size(0)) / static_cast<double>(std::max<int64_t>(1, n * k));
  const BitmapLinearTable& table = bitmap_linear_table(active_isa(), density, tokens);
  if (tokens > table.few_tokens)
    return linear_by_panels(x, n, bias, [&](Tensor& dense, int64_t begin) {
      bitmap_decompress_rows(values, bitmaps, offsets, n, dense, begin);
    });
  Tensor y = torch::stable::new_empty(x, {tokens, n});
  if (tokens == 0 || n == 0) return y;
  const Tensor wide = widen_activations(x, tiles * kTileColumns);
  const std::optional<Tensor> wide_bias = widen_bias(bias);
  BitmapLinearArgs args{};
  args.x = wide.const_data_ptr<float>();
  args.values = values.const_data_ptr();
  args.bitmaps = reinterpret_cast<const uint64_t*>(bitmaps.const_data_ptr<int64_t>());
  args.offsets = offsets.const_data_ptr<int64_t>();
  args.bias = wide_bias.has_value() ? wide_bias->const_data_ptr<float>() : nullptr;
  args.y = y.mutable_data_ptr();
  args.tokens = tokens;
  args.n = n;
  args.k = tiles * kTileColumns;
  args.x_stride = args.k;
  args.y_stride = n;
  args.nnz = values.size(0);
  STD_TORCH_CHECK(args.offsets[tiles * tile_rows] == args.nnz, "values: must have as many elements as offsets say");
  const BitmapLinearKernel kernel = table.linear[static_cast<int>(dtype_of(values, "values"))];
  parallel_chunks(tile_rows, 1 + 16384 / (args.k * kTileRows),
                  [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("bitmap_linear", TORCH_BOX(&pyfast::bitmap_linear)); }
