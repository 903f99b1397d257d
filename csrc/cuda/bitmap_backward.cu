// Backward of bitmap_linear on the GPU: checks, launch, registration. The contract is in bitmap_backward.cuh.
#include "bitmap_backward.cuh"

#include "bitmap_launch.h"
#include "split_launch.h"

namespace pyfast::cuda {
namespace {

constexpr const char* kName = "bitmap_backward";
constexpr int64_t kFewTokens = 32;
constexpr int64_t kMaxColumns = 1 << 26;

const uint16_t* bits_of(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.const_data_ptr()); }

template <class T, int TokenTiles>
void launch_grad_x(const Tensor& grad, BitmapLinearArgs args) {
  using Plan = BitmapGradXPlan<TokenTiles>;
  constexpr auto kKernel = bitmap_grad_x_kernel<T, TokenTiles>;
  const int64_t column_blocks = ceil_div(args.out.n, Plan::kColumns);
  const int64_t stages = ceil_div(args.weight.tiles / args.weight.tiles_a_row, Plan::kStageTiles);
  const Residents& residents =
      resident_in_clusters<kKernel>(grad.get_device_index(), Plan::kThreads, Plan::kSharedBytes, kName);
  const int64_t splits = count_splits(column_blocks, stages, residents);
  args.split_stages = static_cast<int32_t>(ceil_div(stages, splits));
  set_token_tiles(args);
  launch_splits<T, kKernel>(grad, args, Start::InOrder, splits, column_blocks, Plan::kThreads, Plan::kSharedBytes,
                            kName);
}

template <class T>
void choose(const Tensor& grad, const BitmapLinearArgs& args) {
  if (args.tokens <= 8)
    launch_grad_x<T, 1>(grad, args);
  else
    launch_grad_x<T, 4>(grad, args);
}

// grad [tokens, n], values [stored], bitmaps, offsets -> grad·W [tokens, k], at most 32 tokens.
Tensor bitmap_grad_x_few(const Tensor& grad, const Tensor& values, const Tensor& bitmaps, const Tensor& offsets,
                         int64_t k) {
  check_tensor(values, "values", 1, values);
  check_halves(values, "values");
  check_x(grad, values, kFewTokens);
  const int64_t tokens = grad.size(0), n = grad.size(1);
  STD_TORCH_CHECK(n <= kMaxColumns && k <= kMaxColumns, "grad: the weight has ", n, " rows and ", k,
                  " columns, at most ", kMaxColumns);
  STD_TORCH_CHECK(k <= kTileColumns * kMaxBlocksY, "k: ", k, " columns, at most ", kTileColumns * kMaxBlocksY);
  check_tables(values, bitmaps, offsets, n, k);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  if (n == 0) return torch::stable::new_zeros(grad, {tokens, k});
  Tensor out = torch::stable::new_empty(grad, {tokens, k});
  if (tokens == 0 || k == 0) return out;
  const Tensor rows = aligned_rows(grad, kTileRows), read = aligned_start(values), bits = aligned_start(bitmaps);
  BitmapLinearArgs args{};
  args.weight = bitmap_view(bits_of(read), read.size(0), bits, offsets, k);
  args.x = bits_of(rows);
  args.x_stride = rows.stride(0);
  args.tokens = static_cast<int32_t>(tokens);
  args.k = static_cast<int32_t>(rows.size(1));
  args.out = {nullptr, nullptr, out.mutable_data_ptr(), k, Activation::none};
  if (values.scalar_type() == ScalarType::BFloat16)
    choose<BFloat16>(rows, args);
  else
    choose<Float16>(rows, args);
  return out;
}

template <class T>
void launch_grad_values(const Tensor& grad, const BitmapGradValuesArgs& args) {
  using Plan = BitmapGradValuesPlan;
  constexpr auto kKernel = bitmap_grad_values_kernel<T>;
  kernel_facts<kKernel>(grad.get_device_index(), kName);
  const int64_t across = ceil_div(args.weight.tiles_a_row * int64_t{kTileColumns}, Plan::kColumns);
  const int64_t down = ceil_div(args.weight.tiles / args.weight.tiles_a_row * kTileRows, Plan::kRows);
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  kKernel<<<grid, Plan::kThreads, Plan::kSharedBytes, current_stream(grad)>>>(args);
  check_launch(kName);
}

// grad [tokens, n], x [tokens, k] -> the gradient of the values, [stored]. That `stored` is the last offset is the
// caller's word, as in bitmap_gather.
Tensor bitmap_grad_values(const Tensor& grad, const Tensor& x, const Tensor& bitmaps, const Tensor& offsets,
                          int64_t stored) {
  check_halves(x, "x");
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 2, "x: must be a CUDA tensor [tokens, in_features]");
  STD_TORCH_CHECK(grad.is_cuda() && grad.get_device_index() == x.get_device_index() && grad.dim() == 2 &&
                      grad.scalar_type() == x.scalar_type() && grad.size(0) == x.size(0),
                  "grad: must be [tokens, out_features] of the dtype and device of x");
  const int64_t tokens = x.size(0), n = grad.size(1), k = x.size(1);
  STD_TORCH_CHECK(n <= kMaxBlocksY * BitmapGradValuesPlan::kRows && k <= kMaxColumns, "bitmaps: of shape [", n, ", ", k,
                  "], at most [", kMaxBlocksY * BitmapGradValuesPlan::kRows, ", ", kMaxColumns, "]");
  STD_TORCH_CHECK(tokens <= int64_t{1} << 31, "x: has ", tokens, " tokens, at most 2^31");
  check_tables(x, bitmaps, offsets, n, k);
  STD_TORCH_CHECK(stored >= 0 && stored <= bitmaps.size(0) * kTileElements, "stored: got ", stored, ", at most ",
                  bitmaps.size(0) * kTileElements);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor values = torch::stable::new_empty(x, {stored});
  if (stored == 0) return values;
  const Tensor rows = aligned_rows(grad), columns = aligned_rows(x);
  const BitmapGradValuesArgs args{
      bits_of(rows),
      bits_of(columns),
      rows.stride(0),
      columns.stride(0),
      tokens,
      static_cast<int32_t>(rows.size(1)),
      static_cast<int32_t>(columns.size(1)),
      bitmap_view(static_cast<uint16_t*>(values.mutable_data_ptr()), stored, bitmaps, offsets, k)};
  if (x.scalar_type() == ScalarType::BFloat16)
    launch_grad_values<BFloat16>(rows, args);
  else
    launch_grad_values<Float16>(rows, args);
  return values;
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("bitmap_grad_x_few", TORCH_BOX(&pyfast::cuda::bitmap_grad_x_few));
  m.impl("bitmap_grad_values", TORCH_BOX(&pyfast::cuda::bitmap_grad_values));
}
