// bitmap_linear for few tokens on the GPU: checks, choice of the kernel, launch, registration. The contracts are in
// bitmap_linear.cuh and bitmap_vector.cuh.
#include "bitmap_linear.cuh"

#include "bitmap_launch.h"
#include "bitmap_vector.cuh"
#include "split_launch.h"

namespace pyfast::cuda {
namespace {

constexpr const char* kName = "bitmap_linear";
constexpr int64_t kFewTokens = 64;
constexpr int64_t kLeastRows = BitmapLinearPlan<1>::kRows;  // of a block
constexpr int64_t kMaxColumns = 1 << 26;  // of a row of 16 × 2^26 values, counted in 32 bits on the device

template <class T, int TokenTiles>
void launch_matrix(const Tensor& x, BitmapLinearArgs args) {
  using Plan = BitmapLinearPlan<TokenTiles>;
  constexpr auto kKernel = bitmap_linear_kernel<T, TokenTiles>;
  const int64_t row_blocks = ceil_div(args.out.n, Plan::kRows);
  const int64_t stages = ceil_div(args.weight.tiles_a_row, Plan::kStageTiles);
  const Residents& residents =
      resident_in_clusters<kKernel>(x.get_device_index(), Plan::kThreads, Plan::kSharedBytes, kName);
  const int64_t splits = count_splits(row_blocks, stages, residents);
  args.split_stages = static_cast<int32_t>(ceil_div(stages, splits));
  set_token_tiles(args);
  constexpr Start kStart = Plan::kOverlaps ? Start::Early : Start::InOrder;
  launch_splits<T, kKernel>(x, args, kStart, splits, row_blocks, Plan::kThreads, Plan::kSharedBytes, kName);
}

template <class T, int Tokens>
void launch_vector(const Tensor& x, BitmapLinearArgs args) {
  using Plan = BitmapVectorPlan<Tokens>;
  constexpr auto kKernel = bitmap_vector_kernel<T, Tokens>;
  const int64_t row_blocks = ceil_div(args.out.n, Plan::kRows);
  const int64_t stages = ceil_div(args.weight.tiles_a_row, Plan::kColumnTiles);
  const KernelFacts& facts = kernel_facts<kKernel>(x.get_device_index(), kName);
  const int64_t wanted =
      count_splits(row_blocks, stages, resident_blocks(facts, Plan::shared_bytes(args.room, Plan::kMostStages / 4)));
  const int64_t splits = std::max(wanted, ceil_div(stages, Plan::kMostStages));
  args.split_stages = static_cast<int32_t>(ceil_div(stages, splits));
  launch_splits<T, kKernel>(x, args, Start::InOrder, splits, row_blocks, Plan::kThreads,
                            Plan::shared_bytes(args.room, args.split_stages), kName);
}

template <class T>
void choose(const Tensor& x, const BitmapLinearArgs& args) {
  if (args.tokens == 1)
    launch_vector<T, 1>(x, args);
  else if (args.tokens == 2)
    launch_vector<T, 2>(x, args);
  else if (args.tokens <= 4)
    launch_vector<T, 4>(x, args);
  else if (args.tokens <= 8)
    launch_matrix<T, 1>(x, args);
  else if (args.tokens <= 16)
    launch_matrix<T, 2>(x, args);
  else if (args.tokens <= 32)
    launch_matrix<T, 4>(x, args);
  else
    launch_matrix<T, 8>(x, args);
}

// x [tokens, k], values [stored], bitmaps int64 [tiles, 16], offsets int64 [tiles + 1], bias [n], mul [tokens, n] ->
// [tokens, n].
Tensor bitmap_linear_few(const Tensor& x, const Tensor& values, const Tensor& bitmaps, const Tensor& offsets,
                         const std::optional<Tensor>& bias, int64_t n, int64_t activation,
                         const std::optional<Tensor>& mul) {
  check_tensor(values, "values", 1, values);
  check_halves(values, "values");
  check_x(x, values, kFewTokens);
  const int64_t tokens = x.size(0), k = x.size(1);
  STD_TORCH_CHECK(k <= kMaxColumns, "x: has ", k, " columns, at most ", kMaxColumns);
  STD_TORCH_CHECK(n <= kLeastRows * kMaxBlocksY, "n: ", n, " rows, at most ", kLeastRows * kMaxBlocksY);
  check_tables(values, bitmaps, offsets, n, k);

  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  Tensor y = torch::stable::new_empty(x, {tokens, n});
  BitmapLinearArgs args{};
  args.out = make_epilogue(y, bias, activation, mul);
  if (tokens == 0 || n == 0) return y;
  const Tensor rows = aligned_rows(x, tokens > 4 ? kTileColumns : 8), read = aligned_start(values),
               bits = aligned_start(bitmaps);
  args.weight = bitmap_view(static_cast<const uint16_t*>(read.const_data_ptr()), read.size(0), bits, offsets, k);
  args.x = static_cast<const uint16_t*>(rows.const_data_ptr());
  args.x_stride = rows.stride(0);
  args.tokens = static_cast<int32_t>(tokens);
  args.k = static_cast<int32_t>(rows.size(1));
  args.room = bitmap_room(ceil_div(values.size(0), std::max<int64_t>(1, args.weight.tiles)));
  if (values.scalar_type() == ScalarType::BFloat16)
    choose<BFloat16>(rows, args);
  else
    choose<Float16>(rows, args);
  return y;
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) { m.impl("bitmap_linear_few", TORCH_BOX(&pyfast::cuda::bitmap_linear_few)); }
