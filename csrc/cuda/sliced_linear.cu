// sliced_linear on the GPU: checks, launch, registration. The contract is in sliced_linear.cuh.
#include "sliced_linear.cuh"

#include "split_launch.h"
#include "ticket_counters.h"

namespace pyfast::cuda {
namespace {

constexpr const char* kName = "sliced_linear";
constexpr int64_t kMostColumns = 65536;   // starts have 16 bits
constexpr int64_t kMostChunks = 1 << 26;  // counted in 32 bits on the device, a warp's share of them included

template <class T, int Tokens, int Bits>
void launch(const Tensor& x, const SlicedLinearArgs& args, int64_t blocks) {
  using Plan = SlicedLinearPlan<Tokens, Bits>;
  constexpr auto kKernel = sliced_linear_kernel<T, Tokens, Bits>;
  const KernelFacts& facts = kernel_facts<kKernel>(x.get_device_index(), kName);
  launch_kernel<kKernel>(facts, Start::Early, dim3(static_cast<unsigned>(blocks)), Plan::kThreads,
                         Plan::shared_bytes(args.columns), 1, current_stream(x), args, kName);
}

template <class T, int Bits>
void choose(const Tensor& x, const SlicedLinearArgs& args, int64_t blocks, int tokens) {
  if (tokens == 1)
    launch<T, 1, Bits>(x, args, blocks);
  else if (tokens == 2)
    launch<T, 2, Bits>(x, args, blocks);
  else if (tokens == 4)
    launch<T, 4, Bits>(x, args, blocks);
  else
    launch<T, 8, Bits>(x, args, blocks);
}

// The most tokens of a launch whose x fits in shared memory: 8, 4, 2 or 1; 0 where none do.
int most_tokens(int columns, int shared_bytes) {
  if (SlicedLinearPlan<8, 4>::shared_bytes(columns) <= shared_bytes) return 8;
  if (SlicedLinearPlan<4, 4>::shared_bytes(columns) <= shared_bytes) return 4;
  if (SlicedLinearPlan<2, 4>::shared_bytes(columns) <= shared_bytes) return 2;
  return SlicedLinearPlan<1, 4>::shared_bytes(columns) <= shared_bytes ? 1 : 0;
}

template <class T, int Bits>
void launch_all(const Tensor& x, SlicedLinearArgs args, int64_t blocks) {
  const KernelFacts& facts = kernel_facts<sliced_linear_kernel<T, 1, Bits>>(x.get_device_index(), kName);
  const int most = most_tokens(args.columns, facts.most_shared);
  STD_TORCH_CHECK(most > 0, "x: ", args.columns, " columns do not fit in the ", facts.most_shared,
                  " bytes of shared memory that a block has on this device");
  const int64_t all = x.size(0);
  const auto wanted = [&](int64_t left) { return left == 1 ? 1 : left == 2 ? 2 : left <= 4 ? 4 : 8; };
  const int widest = std::min(most, wanted(all));
  const Tensor partial = torch::stable::new_empty(x, {blocks, 2, widest, kSliceRows}, ScalarType::Float);
  std::optional<Tensor> held;
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  args.counters = take_counters(x, blocks, held, kName);
  // Launches of one call follow each other on the stream: they share the workspace.
  launch_token_groups(args, all, widest, [&](const SlicedLinearArgs& part) {
    choose<T, Bits>(x, part, blocks, std::min(widest, wanted(part.tokens)));
  });
}

// x [tokens, k]; values [chunks, 32, 8], deltas uint8 [chunks, 32, 4 or 8], starts int16 [warps, 32], segments
// int32 [warps, 4], ends int32 [slices], rows int32 [slices, 32] of the layout; bias [n], mul [tokens, n] -> [tokens,
// n].
Tensor sliced_linear(const Tensor& x, const Tensor& values, const Tensor& deltas, const Tensor& starts,
                     const Tensor& segments, const Tensor& ends, const Tensor& rows, const std::optional<Tensor>& bias,
                     int64_t n, int64_t activation, const std::optional<Tensor>& mul) {
  constexpr int kWarps = SlicedLinearPlan<1, 4>::kWarps;
  check_tensor(values, "values", 3, values);
  check_halves(values, "values");
  check_x(x, values, kMostChunks);
  const int64_t tokens = x.size(0), k = x.size(1), chunks = values.size(0);
  const int64_t slices = ceil_div(n, kSliceRows), blocks = starts.dim() == 2 ? starts.size(0) / kWarps : 0;
  STD_TORCH_CHECK(n > 0 && k > 0 && k <= kMostColumns, "n, k: must be at least 1, and k at most ", kMostColumns,
                  ", got ", n, " and ", k);
  STD_TORCH_CHECK(chunks >= slices && chunks <= kMostChunks && values.size(1) == 32 && values.size(2) == kChunkEntries,
                  "values: must be [chunks, 32, 8] with a chunk a slice at least and ", kMostChunks, " at most");
  check_tensor(deltas, "deltas", 3, values);
  const int64_t bits = deltas.size(2);
  STD_TORCH_CHECK(deltas.scalar_type() == ScalarType::Byte && deltas.size(0) == chunks && deltas.size(1) == 32 &&
                      (bits == 4 || bits == 8),
                  "deltas: must be uint8 [", chunks, ", 32, 4 or 8]");
  check_tensor(starts, "starts", 2, values);
  STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Short && blocks >= 1 && blocks <= chunks &&
                      starts.size(0) == blocks * kWarps && starts.size(1) == 32,
                  "starts: must be int16 [warps, 32] with ", kWarps, " warps for each of 1 to ", chunks, " blocks");
  const auto check_ints = [&](const Tensor& tensor, const char* name, int64_t size, int64_t columns) {
    check_tensor(tensor, name, 2, values);
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.size(0) == size && tensor.size(1) == columns,
                    name, ": must be int32 [", size, ", ", columns, "]");
  };
  check_ints(segments, "segments", blocks * kWarps, 4);
  check_ints(rows, "rows", slices, kSliceRows);
  check_tensor(ends, "ends", 1, values);
  STD_TORCH_CHECK(ends.scalar_type() == ScalarType::Int && ends.size(0) == slices, "ends: must be int32 [", slices,
                  "]");

  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  Tensor y = torch::stable::new_empty(x, {tokens, n});
  SlicedLinearArgs args{};
  args.out = make_epilogue(y, bias, activation, mul);
  if (tokens == 0) return y;
  const Tensor read = aligned_rows(x);
  args.values = static_cast<const uint16_t*>(values.const_data_ptr());
  args.deltas = static_cast<const uint8_t*>(deltas.const_data_ptr());
  args.starts = static_cast<const uint16_t*>(starts.const_data_ptr());
  args.segments = static_cast<const int32_t*>(segments.const_data_ptr());
  args.ends = static_cast<const int32_t*>(ends.const_data_ptr());
  args.rows = static_cast<const int32_t*>(rows.const_data_ptr());
  STD_TORCH_CHECK(is_aligned(args.values, 16) && is_aligned(args.deltas, 16) && is_aligned(args.segments, 16),
                  "values, deltas, segments: must begin at multiples of 16 bytes");
  args.x = static_cast<const uint16_t*>(read.const_data_ptr());
  args.x_stride = read.stride(0);
  args.columns = static_cast<int32_t>(read.size(1));
  args.block_chunks = static_cast<int32_t>(chunks / blocks);
  args.longer = static_cast<int32_t>(chunks % blocks);
  const auto launch_bits = [&](auto type) {
    using T = decltype(type);
    if (bits == 4)
      launch_all<T, 4>(read, args, blocks);
    else
      launch_all<T, 8>(read, args, blocks);
  };
  if (values.scalar_type() == ScalarType::BFloat16)
    launch_bits(BFloat16{});
  else
    launch_bits(Float16{});
  return y;
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) { m.impl("sliced_linear", TORCH_BOX(&pyfast::cuda::sliced_linear)); }
