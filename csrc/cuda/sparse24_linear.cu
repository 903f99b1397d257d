// sparse24_linear on the GPU: checks, plan, launch, registration. The contract is in
// sparse24_linear.cuh.
#include "sparse24_linear.cuh"

#include "split_launch.h"

namespace pyfast::cuda {
namespace {

constexpr const char* kName = "sparse24_linear";
constexpr int64_t kMaxColumns = 1 << 30;     // counted in 32 bits on the device
constexpr int64_t kMaxTokens = 65535 * 128;  // blocks along z

template <class T, int TokenTiles>
void launch(const Tensor& x, Sparse24LinearArgs args) {
  using Plan = Sparse24Plan<TokenTiles>;
  constexpr auto kKernel = sparse24_linear_kernel<T, TokenTiles>;
  const int64_t tiles = ceil_div(args.n, Plan::kRows), token_tiles = ceil_div(args.tokens, Plan::kTokens);
  STD_TORCH_CHECK(tiles <= kMaxBlocksY, "values: has ", args.n, " rows, at most ", kMaxBlocksY * Plan::kRows);
  const int64_t stages = ceil_div(args.padded_k, Plan::kColumns);
  const Residents& residents =
      resident_in_clusters<kKernel>(x.get_device_index(), Plan::kThreads, Plan::kSharedBytes, kName);
  const int64_t splits = count_splits(tiles * token_tiles, stages, residents);
  args.split_columns = static_cast<int32_t>(ceil_div(stages, splits) * Plan::kColumns);
  launch_splits<T, kKernel>(x, args, Start::Early, splits, tiles, Plan::kThreads, Plan::kSharedBytes, kName,
                            token_tiles);
}

template <class T>
void choose(const Tensor& x, const Sparse24LinearArgs& args) {
  if (args.tokens <= 8)
    launch<T, 1>(x, args);
  else if (args.tokens <= 16)
    launch<T, 2>(x, args);
  else if (args.tokens <= 32)
    launch<T, 4>(x, args);
  else if (args.tokens <= 64)
    launch<T, 8>(x, args);
  else
    launch<T, 16>(x, args);
}

// x [tokens, k], values [n, K/2], metadata int16 [n, K/16], bias [n], mul [tokens, n] -> [tokens, n].
Tensor sparse24_linear_mma(const Tensor& x, const Tensor& values, const Tensor& metadata,
                           const std::optional<Tensor>& bias, int64_t activation, const std::optional<Tensor>& mul) {
  check_tensor(values, "values", 2, values);
  check_tensor(metadata, "metadata", 2, values);
  const ScalarType dtype = values.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "values: dtype must be bfloat16 or float16");
  check_x(x, values, kMaxTokens);
  const int64_t n = values.size(0), padded_k = 2 * values.size(1), tokens = x.size(0), k = x.size(1);
  STD_TORCH_CHECK(padded_k % 32 == 0 && k <= padded_k && k > padded_k - 32 && padded_k <= kMaxColumns, "x: has ", k,
                  " columns, the weight ", padded_k, " (k rounded up to a multiple of 32)");
  STD_TORCH_CHECK(
      metadata.scalar_type() == ScalarType::Short && metadata.size(0) == n && metadata.size(1) * 16 == padded_k,
      "metadata: must be int16 [n, columns of values / 8]");
  STD_TORCH_CHECK(is_aligned(values.const_data_ptr(), 16) && is_aligned(metadata.const_data_ptr(), 4),
                  "values and metadata: must start at multiples of 16 and 4 bytes");

  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  Tensor y = torch::stable::new_empty(x, {tokens, n});
  Sparse24LinearArgs args{};
  args.out = make_epilogue(y, bias, activation, mul);
  if (tokens == 0 || n == 0) return y;
  const Tensor rows = aligned_rows(x);
  args.x = half_bits(rows);
  args.values = half_bits(values);
  args.metadata = half_bits(metadata);
  args.n = n;
  args.x_stride = rows.stride(0);
  args.tokens = static_cast<int32_t>(tokens);
  args.k = static_cast<int32_t>(rows.size(1));
  args.padded_k = static_cast<int32_t>(padded_k);
  args.wide_metadata = padded_k % 128 == 0 && is_aligned(args.metadata, 16);
  if (dtype == ScalarType::BFloat16)
    choose<BFloat16>(rows, args);
  else
    choose<Float16>(rows, args);
  return y;
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("sparse24_linear_mma", TORCH_BOX(&pyfast::cuda::sparse24_linear_mma));
}
