// scattered_linear on the GPU: checks, launch, registration. The contract is in scattered_linear.cuh.
#include "scattered_linear.cuh"

#include "split_launch.h"

namespace pyfast::cuda {
namespace {

constexpr const char* kName = "scattered_linear";
constexpr int64_t kMostTokens = 32;       // of a launch
constexpr int64_t kMostChunks = 1 << 26;  // counted in 32 bits on the device, as the groups of extras are

template <class T, int TokenTiles>
void launch(const Tensor& x, ScatteredLinearArgs args) {
  using Plan = ScatteredLinearPlan<TokenTiles>;
  constexpr auto kKernel = scattered_linear_kernel<T, TokenTiles>;
  const int64_t row_blocks = ceil_div(args.out.n, Plan::kRows);
  const int64_t stages = ceil_div(args.tiles_a_row, Plan::kColumnWarps);
  const KernelFacts& facts = kernel_facts<kKernel>(x.get_device_index(), kName);
  const int64_t splits = balance_splits(row_blocks, stages, facts.multiprocessors);
  args.split_stages = static_cast<int32_t>(ceil_div(stages, splits));
  set_token_tiles(args);
  launch_splits<T, kKernel>(x, args, Start::Early, splits, row_blocks, Plan::kThreads, Plan::kSharedBytes, kName);
}

template <class T>
void launch_all(const Tensor& x, const ScatteredLinearArgs& args) {
  launch_token_groups(args, x.size(0), kMostTokens, [&](const ScatteredLinearArgs& part) {
    if (part.tokens <= 8)
      launch<T, 1>(x, part);
    else if (part.tokens <= 16)
      launch<T, 2>(x, part);
    else
      launch<T, 4>(x, part);
  });
}

// x [tokens, k]; values [chunks, 32, 8], deltas uint8 [chunks, 32, 4], extras int32 [groups, 4], ends
// int32 [tiles + 1, 2] of the layout; bias [n], mul [tokens, n] -> [tokens, n].
Tensor scattered_linear(const Tensor& x, const Tensor& values, const Tensor& deltas, const Tensor& extras,
                        const Tensor& ends, const std::optional<Tensor>& bias, int64_t n, int64_t activation,
                        const std::optional<Tensor>& mul) {
  check_tensor(values, "values", 3, values);
  check_halves(values, "values");
  check_x(x, values, kMostChunks);
  const int64_t tokens = x.size(0), k = x.size(1), chunks = values.size(0);
  STD_TORCH_CHECK(n > 0 && n <= kImageRows * kMaxBlocksY && k > 0, "n, k: must be at least 1, and n at most ",
                  kImageRows * kMaxBlocksY, ", got ", n, " and ", k);
  const int64_t tiles_a_row = ceil_div(k, kImageColumns), tiles = ceil_div(n, kImageRows) * tiles_a_row;
  STD_TORCH_CHECK(chunks <= kMostChunks && values.size(1) == 32 && values.size(2) == kChunkEntries,
                  "values: must be [chunks, 32, 8] with at most ", kMostChunks, " chunks");
  check_tensor(deltas, "deltas", 3, values);
  STD_TORCH_CHECK(deltas.scalar_type() == ScalarType::Byte && deltas.size(0) == chunks && deltas.size(1) == 32 &&
                      deltas.size(2) == 4,
                  "deltas: must be uint8 [", chunks, ", 32, 4]");
  check_tensor(extras, "extras", 2, values);
  STD_TORCH_CHECK(extras.scalar_type() == ScalarType::Int && extras.size(1) == 4, "extras: must be int32 [groups, 4]");
  check_tensor(ends, "ends", 2, values);
  STD_TORCH_CHECK(ends.scalar_type() == ScalarType::Int && ends.size(0) == tiles + 1 && ends.size(1) == 2,
                  "ends: must be int32 [", tiles + 1, ", 2]");

  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  Tensor y = torch::stable::new_empty(x, {tokens, n});
  ScatteredLinearArgs args{};
  args.out = make_epilogue(y, bias, activation, mul);
  if (tokens == 0) return y;
  const Tensor read = aligned_rows(x, kImageColumns);
  args.values = static_cast<const uint16_t*>(values.const_data_ptr());
  args.deltas = static_cast<const uint8_t*>(deltas.const_data_ptr());
  args.extras = static_cast<const uint32_t*>(extras.const_data_ptr());
  args.ends = static_cast<const int32_t*>(ends.const_data_ptr());
  STD_TORCH_CHECK(is_aligned(args.values, 16) && is_aligned(args.deltas, 4) && is_aligned(args.extras, 16) &&
                      is_aligned(args.ends, 8),
                  "values, deltas, extras, ends: must begin at multiples of 16, 4, 16 and 8 bytes");
  args.x = static_cast<const uint16_t*>(read.const_data_ptr());
  args.x_stride = read.stride(0);
  args.tiles_a_row = static_cast<int32_t>(tiles_a_row);
  if (values.scalar_type() == ScalarType::BFloat16)
    launch_all<BFloat16>(read, args);
  else
    launch_all<Float16>(read, args);
  return y;
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) { m.impl("scattered_linear", TORCH_BOX(&pyfast::cuda::scattered_linear)); }
