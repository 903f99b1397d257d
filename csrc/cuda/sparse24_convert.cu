// Sparse24Weight to dense on the GPU: checks, stream, launch, registration. The contract is in
// sparse24_convert.cuh.
#include "sparse24_convert.cuh"

#include "launch.h"

namespace pyfast::cuda {
namespace {

template <class U>
void launch(const Tensor& values, const Tensor& metadata, const Tensor& out) {
  const Sparse24Weight<U> weight{static_cast<const U*>(values.const_data_ptr()),
                                 static_cast<const uint8_t*>(metadata.const_data_ptr()), 2 * values.size(1)};
  STD_TORCH_CHECK(is_aligned(weight.values, sizeof(Sparse24Chunk<U>)), "values: must start at a multiple of 8 bytes");
  const Dense<U> dense = dense_view<U>(out);
  const int64_t chunks = ceil_div(dense.columns, kPackColumns<U>);
  unsigned across = 1;
  while (across < kSparse24Threads && across < chunks) across *= 2;
  const dim3 block(across, kSparse24Threads / across);
  const int64_t rows_a_block = static_cast<int64_t>(block.y) * kRowsAThread;
  const int64_t down = ceil_div(dense.rows, rows_a_block);
  const dim3 grid(static_cast<unsigned>(ceil_div(chunks, across)),
                  static_cast<unsigned>(down < kMaxBlocksY ? down : kMaxBlocksY));
  sparse24_decompress_kernel<U><<<grid, block, 0, current_stream(values)>>>(weight, dense);
  check_launch("sparse24_decompress");
}

// values [n, K/2], metadata int16 [n, K/16] -> dense [n, k] in the dtype of values.
Tensor sparse24_decompress(const Tensor& values, const Tensor& metadata, int64_t n, int64_t k) {
  check_tensor(values, "values", 2, values);
  check_tensor(metadata, "metadata", 2, values);
  const bool wide = is_wide(values, "values");
  STD_TORCH_CHECK(n >= 0 && values.size(0) == n, "values: has ", values.size(0), " rows, must have n = ", n);
  STD_TORCH_CHECK(k >= 0 && values.size(1) % 8 == 0 && 2 * values.size(1) >= k, "values: has ", values.size(1),
                  " columns, must have a multiple of 8 that covers k / 2, k = ", k);
  STD_TORCH_CHECK(
      metadata.scalar_type() == ScalarType::Short && metadata.size(0) == n && metadata.size(1) * 8 == values.size(1),
      "metadata: must be int16 [n, columns of values / 8]");
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  Tensor dense = torch::stable::new_empty(values, {n, k});
  if (n == 0 || k == 0) return dense;
  if (wide)
    launch<uint32_t>(values, metadata, dense);
  else
    launch<uint16_t>(values, metadata, dense);
  return dense;
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("sparse24_decompress", TORCH_BOX(&pyfast::cuda::sparse24_decompress));
}
