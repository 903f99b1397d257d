// Conversions of Sparse24Weight on the CPU: threads and registration. The contract is in sparse24_convert.h.
#include "sparse24_convert.h"

#include <atomic>

#include "sparse_driver.h"

namespace pyfast {
namespace {

constexpr int64_t kColumnUnit = 32;  // one m16n8k32 step, one AVX-512 step

Sparse24ConvertArgs convert_args(int64_t k, int64_t dense_stride) {
  return {k, (k + kColumnUnit - 1) / kColumnUnit * kColumnUnit, dense_stride};
}

void check_metadata(const Tensor& metadata, int64_t n, int64_t k_padded) {
  STD_TORCH_CHECK(metadata.scalar_type() == ScalarType::Short && metadata.dim() == 2 && metadata.size(0) == n &&
                      metadata.size(1) == k_padded / 16 && metadata.is_contiguous(),
                  "metadata: must be contiguous int16 [out_features, padded in_features / 16]");
}

const uint16_t* words(const Tensor& metadata) { return static_cast<const uint16_t*>(metadata.const_data_ptr()); }

// Runs body(U{}, begin, end) over rows, U the unsigned integer of the element's size.
template <class Body>
void for_rows(const Tensor& elements, const char* name, int64_t rows, int64_t k, Body body) {
  with_bits_of(elements, name, [&](auto unit) {
    const int64_t least = 1 + 65536 / (k + 1);
    torch::stable::parallel_for(0, rows, least, [&](int64_t begin, int64_t end) { body(unit, begin, end); });
  });
}

// The third result holds the position row * k + column of a group that is not 2:4 (the first of its thread), or -1.
std::tuple<Tensor, Tensor, Tensor> compress(const Tensor& dense) {
  STD_TORCH_CHECK(dense.dim() == 2, "dense: must have shape [out_features, in_features]");
  const Tensor d = rows_contiguous(dense);
  const int64_t n = d.size(0), k = d.size(1);
  const Sparse24ConvertArgs args = convert_args(k, d.stride(0));
  Tensor values = torch::stable::new_empty(dense, {n, args.k_padded / 2});
  Tensor metadata = torch::stable::new_empty(dense, {n, args.k_padded / 16}, ScalarType::Short);
  Tensor violation = torch::stable::new_empty(dense, {1}, ScalarType::Long);
  std::atomic<int64_t> bad{-1};
  for_rows(d, "dense", n, k, [&](auto unit, int64_t begin, int64_t end) {
    using U = decltype(unit);
    const int64_t found =
        sparse24_compress(args, static_cast<const U*>(d.const_data_ptr()), static_cast<U*>(values.mutable_data_ptr()),
                          static_cast<uint16_t*>(metadata.mutable_data_ptr()), begin, end);
    if (found >= 0) bad.store(found, std::memory_order_relaxed);
  });
  *violation.mutable_data_ptr<int64_t>() = bad.load();
  return {values, metadata, violation};
}

Tensor gather(const Tensor& dense, const Tensor& metadata) {
  STD_TORCH_CHECK(dense.dim() == 2, "dense: must have shape [out_features, in_features]");
  const Tensor d = rows_contiguous(dense);
  const int64_t n = d.size(0), k = d.size(1);
  const Sparse24ConvertArgs args = convert_args(k, d.stride(0));
  check_metadata(metadata, n, args.k_padded);
  Tensor values = torch::stable::new_empty(dense, {n, args.k_padded / 2});
  for_rows(d, "dense", n, k, [&](auto unit, int64_t begin, int64_t end) {
    using U = decltype(unit);
    sparse24_gather(args, static_cast<const U*>(d.const_data_ptr()), words(metadata),
                    static_cast<U*>(values.mutable_data_ptr()), begin, end);
  });
  return values;
}

}  // namespace

void sparse24_decompress_rows(const Tensor& values, const Tensor& metadata, Tensor& dense, int64_t begin) {
  const int64_t rows = dense.size(0), k = dense.size(1), n = values.size(0);
  const Sparse24ConvertArgs args = convert_args(k, k);
  check_metadata(metadata, n, args.k_padded);
  STD_TORCH_CHECK(values.dim() == 2 && values.size(1) == args.k_padded / 2 && values.is_contiguous(),
                  "values: must be contiguous [out_features, padded in_features / 2]");
  STD_TORCH_CHECK(begin + rows <= n, "n: got ", begin + rows, ", but the weight has ", n, " rows");
  for_rows(values, "values", rows, k, [&](auto unit, int64_t from, int64_t to) {
    using U = decltype(unit);
    sparse24_scatter(args, static_cast<const U*>(values.const_data_ptr()), values.numel(), words(metadata),
                     static_cast<U*>(dense.mutable_data_ptr()) + from * k, begin + from, begin + to);
  });
}

namespace {

Tensor decompress(const Tensor& values, const Tensor& metadata, int64_t n, int64_t k) {
  Tensor dense = torch::stable::new_empty(values, {n, k});
  advise_huge_pages(dense);
  sparse24_decompress_rows(values, metadata, dense, 0);
  return dense;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("sparse24_compress", TORCH_BOX(&pyfast::compress));
  m.impl("sparse24_decompress", TORCH_BOX(&pyfast::decompress));
  m.impl("sparse24_gather", TORCH_BOX(&pyfast::gather));
}
