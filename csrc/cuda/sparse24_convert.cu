// sparse24_convert on the GPU: checks, stream, launch, registration. The contract is in sparse24_convert.cuh.
#include "sparse24_convert.cuh"

#include <optional>

#include "sparse24_launch.h"

namespace pyfast::cuda {
namespace {

// Threads side by side on the `units` of a row, the rest of the block on other rows, `rows` a thread and round.
struct Plan {
  dim3 block, grid;
  Plan(int64_t units, int64_t all_rows, int64_t rows) {
    unsigned across = 1;
    while (across < kSparse24Threads && across < units) across *= 2;
    block = dim3(across, kSparse24Threads / across);
    const int64_t down = ceil_div(all_rows, static_cast<int64_t>(block.y) * rows);
    grid = dim3(static_cast<unsigned>(ceil_div(units, across)),
                static_cast<unsigned>(down < kMaxBlocksY ? down : kMaxBlocksY));
  }
};

template <class U>
void launch(const Tensor& values, const Tensor& metadata, const Tensor& out) {
  const Sparse24Weight<U> weight{static_cast<const U*>(values.const_data_ptr()),
                                 static_cast<const uint8_t*>(metadata.const_data_ptr()), 2 * values.size(1)};
  STD_TORCH_CHECK(is_aligned(weight.values, sizeof(Sparse24Chunk<U>)), "values: must start at a multiple of 8 bytes");
  const Dense<U> dense = dense_view<U>(out);
  const Plan plan(ceil_div(dense.columns, kPackColumns<U>), dense.rows, kRowsAThread);
  sparse24_decompress_kernel<U><<<plan.grid, plan.block, 0, current_stream(values)>>>(weight, dense);
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

// The outputs of a conversion of dense, fresh.
struct Converted {
  Tensor values, metadata;
  int64_t padded_columns;

  explicit Converted(const Tensor& dense) : Converted(dense, dense.size(0), container_columns(dense.size(1))) {}

 private:
  Converted(const Tensor& dense, int64_t n, int64_t padded)
      : values(torch::stable::new_empty(dense, {n, padded / 2})),
        metadata(torch::stable::new_empty(dense, {n, padded / kUnitColumns}, ScalarType::Short)),
        padded_columns(padded) {}
};

template <Keep How>
void convert(const Tensor& rows, const Tensor* scores, const Converted& to, uint64_t* violation) {
  if (rows.size(0) == 0 || rows.size(1) == 0) return;
  const Plan plan(to.padded_columns / kUnitColumns, rows.size(0), 1);
  by_size(rows.scalar_type() == ScalarType::Float, [&](auto unit) {
    using U = decltype(unit);
    const Sparse24Out<U> out{static_cast<U*>(to.values.mutable_data_ptr()),
                             static_cast<uint16_t*>(to.metadata.mutable_data_ptr()), to.padded_columns};
    sparse24_compress_kernel<U, How><<<plan.grid, plan.block, 0, current_stream(rows)>>>(
        rows_view<U>(rows), scores == nullptr ? DenseRows<uint32_t>{} : rows_view<uint32_t>(*scores), out, violation);
  });
  check_launch("sparse24_compress");
}

// dense [n, k] -> values [n, K/2], metadata int16 [n, K/16], and int64 [1]: the first position row * k + column of a
// group that is not 2:4, or -1.
std::tuple<Tensor, Tensor, Tensor> sparse24_compress(const Tensor& dense) {
  const Tensor rows = rows_of(dense);
  is_wide(dense, "dense");
  const torch::stable::accelerator::DeviceGuard guard(dense.get_device_index());
  const Converted to(rows);
  Tensor violation = torch::stable::new_empty(dense, {1}, ScalarType::Long);
  // -1: all bits set.
  check(cudaMemsetAsync(violation.mutable_data_ptr(), 0xff, sizeof(int64_t), current_stream(rows)),
        "sparse24_compress");
  convert<Keep::stored>(rows, nullptr, to, static_cast<uint64_t*>(violation.mutable_data_ptr()));
  return {to.values, to.metadata, violation};
}

// dense [n, k], scores float32 [n, k] or none (magnitude) -> values, metadata of the two largest of every group.
std::tuple<Tensor, Tensor> sparse24_prune(const Tensor& dense, const std::optional<Tensor>& scores) {
  const Tensor rows = rows_of(dense);
  is_wide(dense, "dense");
  const torch::stable::accelerator::DeviceGuard guard(dense.get_device_index());
  const Converted to(rows);
  if (!scores.has_value()) {
    convert<Keep::magnitude>(rows, nullptr, to, nullptr);
    return {to.values, to.metadata};
  }
  const Tensor ranks = rows_of(*scores);
  STD_TORCH_CHECK(ranks.scalar_type() == ScalarType::Float && ranks.get_device_index() == rows.get_device_index() &&
                      ranks.size(0) == rows.size(0) && ranks.size(1) == rows.size(1),
                  "scores: must be float32 of the shape and on the device of dense");
  convert<Keep::scores>(rows, &ranks, to, nullptr);
  return {to.values, to.metadata};
}

// dense [n, k], metadata int16 [n, K/16] -> values [n, K/2] at the kept places.
Tensor sparse24_gather(const Tensor& dense, const Tensor& metadata) {
  const Tensor rows = rows_of(dense);
  const bool wide = is_wide(dense, "dense");
  const int64_t n = rows.size(0), padded = container_columns(rows.size(1));
  check_metadata(metadata, dense, n, rows.size(1));
  const torch::stable::accelerator::DeviceGuard guard(dense.get_device_index());
  Tensor values = torch::stable::new_empty(dense, {n, padded / 2});
  if (n == 0 || padded == 0) return values;
  const Plan plan(padded / kUnitColumns, n, 1);
  by_size(wide, [&](auto unit) {
    using U = decltype(unit);
    sparse24_gather_kernel<U><<<plan.grid, plan.block, 0, current_stream(dense)>>>(
        rows_view<U>(rows), static_cast<const uint16_t*>(metadata.const_data_ptr()),
        static_cast<U*>(values.mutable_data_ptr()), padded);
  });
  check_launch("sparse24_gather");
  return values;
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("sparse24_compress", TORCH_BOX(&pyfast::cuda::sparse24_compress));
  m.impl("sparse24_prune", TORCH_BOX(&pyfast::cuda::sparse24_prune));
  m.impl("sparse24_gather", TORCH_BOX(&pyfast::cuda::sparse24_gather));
  m.impl("sparse24_decompress", TORCH_BOX(&pyfast::cuda::sparse24_decompress));
}
