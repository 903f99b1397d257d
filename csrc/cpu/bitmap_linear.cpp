// bitmap_linear on the CPU: checks, threads, registration. The contract is in bitmap_linear.h.
#include "bitmap_linear.h"

#include "sparse_driver.h"

namespace pyfast {
namespace {

class BitmapProduct final : public StoredProduct<BitmapLinearArgs> {
 public:
  BitmapProduct(const Tensor& x, const Tensor& values, const Tensor& bitmaps, const Tensor& offsets, int64_t n,
                int64_t k_padded, const LinearOptions& options)
      : StoredProduct(x, n, k_padded, options) {
    const double elements = static_cast<double>(std::max<int64_t>(1, n * k_));
    const double density = static_cast<double>(values.size(0)) / elements;
    kernel_ = bitmap_linear_table(active_isa(), density).linear[static_cast<int>(stored_as(values))];
    args_.values = keep(values);
    args_.bitmaps = static_cast<const uint64_t*>(keep(bitmaps));
    args_.offsets = static_cast<const int64_t*>(keep(offsets));
    args_.nnz = values.size(0);
  }

 protected:
  // About 10 positions a nanosecond at one token; each further token adds less than half of that time.
  void multiply_all(const BitmapLinearArgs& args) const override {
    parallel_chunks((n_ + kTileRows - 1) / kTileRows, 1 + 65536 / ((args.k + 1) * kTileRows * (1 + tokens_ / 2)),
                    [&](int64_t begin, int64_t end) { kernel_(args, begin, end); });
  }

 private:
  BitmapLinearKernel kernel_;
};

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
  if (tokens > few_tokens() && stored != Stored::i8)
    return linear_by_panels(x, n, options, [&](Tensor& dense, int64_t begin) {
      bitmap_decompress_rows(values, bitmaps, offsets, n, dense, begin);
    });
  return LinearProduct::serve(
      std::make_unique<BitmapProduct>(x, values, bitmaps, offsets, n, tiles * kTileColumns, options), x, mul);
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("bitmap_linear", TORCH_BOX(&pyfast::bitmap_linear)); }
