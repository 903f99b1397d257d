// The kernels of csrc/cuda/sparse24_backward.cuh on the host, launched as in sparse24_backward.cu.
#include "simt.h"

#include "sparse24_backward.cuh"
#include "splits.h"

using namespace pyfast::cuda;

namespace {

template <class T, int TokenTiles>
void grad_x(Sparse24GradXArgs args, unsigned splits, bool cluster) {
  using Plan = Sparse24GradXPlan<TokenTiles>;
  const unsigned stages = parts(args.k / kGradXRows, Plan::kStageTiles);
  args.split_stages = static_cast<int32_t>(parts(stages, splits));
  set_token_tiles(args);
  launch_splits<T>({splits, parts(args.out.n, Plan::kColumns)}, Plan::kThreads, Plan::kSharedBytes, cluster,
                   sparse24_grad_x_kernel<T, TokenTiles>, args);
}

template <class T>
void choose(const Sparse24GradXArgs& args, unsigned splits, bool cluster) {
  if (args.tokens <= 8)
    grad_x<T, 1>(args, splits, cluster);
  else
    grad_x<T, 4>(args, splits, cluster);
}

}  // namespace

// grad [tokens, stride] with n columns that count, W [n, k] in a container of padded_k columns.
SIMT_EXPORT sparse24_grad_x(const uint16_t* grad, const uint16_t* values, const uint16_t* metadata, uint16_t* out,
                            int64_t tokens, int64_t n, int64_t stride, int64_t k, int64_t padded_k, int64_t splits,
                            int64_t cluster, int64_t bfloat16) {
  Sparse24GradXArgs args{};
  args.values = values, args.metadata = metadata;
  args.rows = static_cast<int32_t>(n), args.padded_k = static_cast<int32_t>(padded_k);
  args.x = grad, args.x_stride = stride;
  args.tokens = static_cast<int32_t>(tokens), args.k = static_cast<int32_t>(stride);
  args.out = {nullptr, nullptr, out, k, Activation::none};
  if (bfloat16) {
    choose<BFloat16>(args, static_cast<unsigned>(splits), cluster != 0);
  } else {
    choose<Float16>(args, static_cast<unsigned>(splits), cluster != 0);
  }
}

SIMT_EXPORT sparse24_grad_values(const uint16_t* grad, const uint16_t* x, const uint16_t* metadata, uint16_t* values,
                                 int64_t tokens, int64_t n, int64_t grad_stride, int64_t k, int64_t x_stride,
                                 int64_t padded_k, int64_t bfloat16) {
  const GradValuesOperands operands{
      grad, x, grad_stride, x_stride, tokens, static_cast<int32_t>(grad_stride), static_cast<int32_t>(x_stride)};
  const Sparse24GradValuesArgs args{
      operands, metadata, values, static_cast<int32_t>(n), static_cast<int32_t>(k), static_cast<int32_t>(padded_k)};
  using Plan = GradValuesPlan;
  simt::launch({{parts(k, Plan::kColumns), parts(n, Plan::kRows)}, {Plan::kThreads}, 1, Plan::kSharedBytes},
               bfloat16 ? sparse24_grad_values_kernel<BFloat16> : sparse24_grad_values_kernel<Float16>, args);
}

// Shared memory of a launch: grad_x of 1 and 4 token tiles, and grad_values.
SIMT_EXPORT sparse24_backward_shared_bytes(int32_t* bytes) {
  bytes[0] = Sparse24GradXPlan<1>::kSharedBytes;
  bytes[1] = Sparse24GradXPlan<4>::kSharedBytes;
  bytes[2] = GradValuesPlan::kSharedBytes;
}
