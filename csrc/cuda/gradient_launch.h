// What the launchers of gradients of products with sparse weights share. Only <op>.cu files include it.
#pragma once

#include "grad_values_tiles.cuh"
#include "grad_x_tiles.cuh"
#include "split_launch.h"

namespace pyfast::cuda {

inline constexpr int64_t kGradXTokens = 32;
inline constexpr int64_t kMaxGradColumns = 1 << 26;  // of grad and x: counted in 32 bits on the device

// grad [tokens, n] for a weight [n, k], k of it in blocks of `columns`; values: the weight's.
inline void check_grad(const Tensor& grad, const Tensor& values, int64_t k, int64_t columns) {
  check_halves(values, "values");
  check_x(grad, values, kGradXTokens);
  STD_TORCH_CHECK(grad.size(1) <= kMaxGradColumns && k <= kMaxGradColumns, "grad: the weight has ", grad.size(1),
                  " rows and ", k, " columns, at most ", kMaxGradColumns);
  STD_TORCH_CHECK(k <= columns * kMaxBlocksY, "k: ", k, " columns, at most ", columns * kMaxBlocksY);
}

// grad·W by Kernel, for a weight of so many tiles of 16 rows below each other. grad: as args.x holds it.
template <class T, class Plan, auto Kernel, class Args>
void launch_grad_x(const Tensor& grad, Args args, int64_t row_tiles, const char* name) {
  const int64_t column_blocks = ceil_div(args.out.n, Plan::kColumns);
  const int64_t stages = ceil_div(row_tiles, Plan::kStageTiles);
  const Residents& residents =
      resident_in_clusters<Kernel>(grad.get_device_index(), Plan::kThreads, Plan::kSharedBytes, name);
  const int64_t splits = count_splits(column_blocks, stages, residents);
  args.split_stages = static_cast<int32_t>(ceil_div(stages, splits));
  set_token_tiles(args);
  launch_splits<T, Kernel>(grad, args, Start::InOrder, splits, column_blocks, Plan::kThreads, Plan::kSharedBytes, name);
}

// grad [tokens, n] for x [tokens, k], and what the kernels can count.
inline void check_operands(const Tensor& grad, const Tensor& x) {
  check_halves(x, "x");
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 2, "x: must be a CUDA tensor [tokens, in_features]");
  STD_TORCH_CHECK(grad.is_cuda() && grad.get_device_index() == x.get_device_index() && grad.dim() == 2 &&
                      grad.scalar_type() == x.scalar_type() && grad.size(0) == x.size(0),
                  "grad: must be [tokens, out_features] of the dtype and device of x");
  STD_TORCH_CHECK(grad.size(1) <= kMaxBlocksY * GradValuesPlan::kRows && x.size(1) <= kMaxGradColumns,
                  "grad: the weight is [", grad.size(1), ", ", x.size(1), "], at most [",
                  kMaxBlocksY * GradValuesPlan::kRows, ", ", kMaxGradColumns, "]");
  STD_TORCH_CHECK(x.size(0) <= int64_t{1} << 31, "x: has ", x.size(0), " tokens, at most 2^31");
}

// Both of aligned rows.
inline GradValuesOperands operands_of(const Tensor& grad, const Tensor& x) {
  return {half_bits(grad),
          half_bits(x),
          grad.stride(0),
          x.stride(0),
          x.size(0),
          static_cast<int32_t>(grad.size(1)),
          static_cast<int32_t>(x.size(1))};
}

// Kernel(args) over the tiles of a weight [n, k].
template <auto Kernel, class Args>
void launch_grad_values(const Tensor& grad, const Args& args, int64_t n, int64_t k, const char* name) {
  using Plan = GradValuesPlan;
  kernel_facts<Kernel>(grad.get_device_index(), name);
  const dim3 grid(static_cast<unsigned>(ceil_div(k, Plan::kColumns)), static_cast<unsigned>(ceil_div(n, Plan::kRows)));
  Kernel<<<grid, Plan::kThreads, Plan::kSharedBytes, current_stream(grad)>>>(args);
  check_launch(name);
}

}  // namespace pyfast::cuda
