// Backward of sparse24_linear on the GPU: checks, launch, registration. The contract is in sparse24_backward.cuh.
#include "sparse24_backward.cuh"

#include "gradient_launch.h"
#include "sparse24_launch.h"

namespace pyfast::cuda {
namespace {

constexpr const char* kName = "sparse24_backward";

template <class T, int TokenTiles>
void launch(const Tensor& grad, const Sparse24GradXArgs& args) {
  launch_grad_x<T, Sparse24GradXPlan<TokenTiles>, sparse24_grad_x_kernel<T, TokenTiles>>(grad, args,
                                                                                         args.k / kGradXRows, kName);
}

template <class T>
void choose(const Tensor& grad, const Sparse24GradXArgs& args) {
  if (args.tokens <= 8)
    launch<T, 1>(grad, args);
  else
    launch<T, 4>(grad, args);
}

// grad [tokens, n], values [n, K/2], metadata int16 [n, K/16] -> grad·W [tokens, k], at most 32 tokens.
Tensor sparse24_grad_x_few(const Tensor& grad, const Tensor& values, const Tensor& metadata, int64_t k) {
  check_tensor(values, "values", 2, values);
  check_grad(grad, values, k, Sparse24GradXPlan<1>::kColumns);
  const int64_t tokens = grad.size(0), n = grad.size(1);
  check_metadata(metadata, values, n, k);
  STD_TORCH_CHECK(values.size(0) == n && values.size(1) * 2 == container_columns(k), "values: must be [", n, ", ",
                  container_columns(k) / 2, "] for the given shape");
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  if (n == 0) return torch::stable::new_zeros(grad, {tokens, k});
  Tensor out = torch::stable::new_empty(grad, {tokens, k});
  if (tokens == 0 || k == 0) return out;
  const Tensor rows = aligned_rows(grad, kGradXRows), read = aligned_start(values), words = aligned_start(metadata);
  Sparse24GradXArgs args{};
  args.values = half_bits(read);
  args.metadata = half_bits(words);
  args.rows = static_cast<int32_t>(n);
  args.padded_k = static_cast<int32_t>(container_columns(k));
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

// grad [tokens, n], x [tokens, k], metadata int16 [n, K/16] -> the gradient of the values, [n, K/2].
Tensor sparse24_grad_values(const Tensor& grad, const Tensor& x, const Tensor& metadata) {
  check_operands(grad, x);
  const int64_t n = grad.size(1), k = x.size(1), padded_k = container_columns(k);
  check_metadata(metadata, x, n, k);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor values = torch::stable::new_empty(x, {n, padded_k / 2});
  if (n == 0 || k == 0) return values;
  const Tensor rows = aligned_rows(grad), columns = aligned_rows(x), words = aligned_start(metadata);
  const Sparse24GradValuesArgs args{
      operands_of(rows, columns), half_bits(words),        static_cast<uint16_t*>(values.mutable_data_ptr()),
      static_cast<int32_t>(n),    static_cast<int32_t>(k), static_cast<int32_t>(padded_k)};
  if (x.scalar_type() == ScalarType::BFloat16)
    launch_grad_values<sparse24_grad_values_kernel<BFloat16>>(rows, args, n, k, kName);
  else
    launch_grad_values<sparse24_grad_values_kernel<Float16>>(rows, args, n, k, kName);
  return values;
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("sparse24_grad_x_few", TORCH_BOX(&pyfast::cuda::sparse24_grad_x_few));
  m.impl("sparse24_grad_values", TORCH_BOX(&pyfast::cuda::sparse24_grad_values));
}
