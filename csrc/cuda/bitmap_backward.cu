// Backward of bitmap_linear on the GPU: checks, launch, registration. The contract is in bitmap_backward.cuh.
#include "bitmap_backward.cuh"

#include "bitmap_launch.h"
#include "gradient_launch.h"

namespace pyfast::cuda {
namespace {

constexpr const char* kName = "bitmap_backward";

template <class T, int TokenTiles>
void launch(const Tensor& grad, const BitmapLinearArgs& args) {
  launch_grad_x<T, BitmapGradXPlan<TokenTiles>, bitmap_grad_x_kernel<T, TokenTiles>>(
      grad, args, args.weight.tiles / args.weight.tiles_a_row, kName);
}

template <class T>
void choose(const Tensor& grad, const BitmapLinearArgs& args) {
  if (args.tokens <= 8)
    launch<T, 1>(grad, args);
  else
    launch<T, 4>(grad, args);
}

// grad [tokens, n], values [stored], bitmaps, offsets -> grad·W [tokens, k], at most 32 tokens.
Tensor bitmap_grad_x_few(const Tensor& grad, const Tensor& values, const Tensor& bitmaps, const Tensor& offsets,
                         int64_t k) {
  check_tensor(values, "values", 1, values);
  check_grad(grad, values, k, kTileColumns);
  const int64_t tokens = grad.size(0), n = grad.size(1);
  check_tables(values, bitmaps, offsets, n, k);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  if (n == 0) return torch::stable::new_zeros(grad, {tokens, k});
  Tensor out = torch::stable::new_empty(grad, {tokens, k});
  if (tokens == 0 || k == 0) return out;
  const Tensor rows = aligned_rows(grad, kTileRows), read = aligned_start(values), bits = aligned_start(bitmaps);
  BitmapLinearArgs args{};
  args.weight = bitmap_view(half_bits(read), read.size(0), bits, offsets, k);
  args.x = half_bits(rows);
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

// grad [tokens, n], x [tokens, k] -> the gradient of the values, [stored]. That `stored` is the last offset is the
// caller's word, as in bitmap_gather.
Tensor bitmap_grad_values(const Tensor& grad, const Tensor& x, const Tensor& bitmaps, const Tensor& offsets,
                          int64_t stored) {
  check_operands(grad, x);
  const int64_t n = grad.size(1), k = x.size(1);
  check_tables(x, bitmaps, offsets, n, k);
  STD_TORCH_CHECK(stored >= 0 && stored <= bitmaps.size(0) * kTileElements, "stored: got ", stored, ", at most ",
                  bitmaps.size(0) * kTileElements);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor values = torch::stable::new_empty(x, {stored});
  if (stored == 0) return values;
  const Tensor rows = aligned_rows(grad), columns = aligned_rows(x);
  const BitmapGradValuesArgs args{
      operands_of(rows, columns),
      bitmap_view(static_cast<uint16_t*>(values.mutable_data_ptr()), stored, bitmaps, offsets, k)};
  if (x.scalar_type() == ScalarType::BFloat16)
    launch_grad_values<bitmap_grad_values_kernel<BFloat16>>(rows, args, n, k, kName);
  else
    launch_grad_values<bitmap_grad_values_kernel<Float16>>(rows, args, n, k, kName);
  return values;
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("bitmap_grad_x_few", TORCH_BOX(&pyfast::cuda::bitmap_grad_x_few));
  m.impl("bitmap_grad_values", TORCH_BOX(&pyfast::cuda::bitmap_grad_values));
}
