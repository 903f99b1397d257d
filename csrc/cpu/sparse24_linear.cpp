// sparse24_linear on the CPU: checks, threads, registration. The contract is in sparse24_linear.h.
#include "sparse24_linear.h"

#include "sparse_driver.h"

namespace pyfast {
namespace {

Tensor sparse24_linear(const Tensor& x, const Tensor& values, const Tensor& metadata,
                       const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(values.dim() == 2 && values.is_contiguous(), "values: must be contiguous [out_features, k / 2]");
  const int64_t n = values.size(0), k_padded = 2 * values.size(1);
  check_linear(x, values, n, bias);
  const int64_t tokens = x.size(0), k = x.size(1);
  STD_TORCH_CHECK(k <= k_padded && k > k_padded - 32, "x: in_features do not agree with the weight");
  STD_TORCH_CHECK(metadata.scalar_type() == ScalarType::Short && metadata.is_contiguous() && metadata.dim() == 2 &&
                      metadata.size(0) == n && metadata.size(1) == k_padded / 16,
                  "metadata: must be contiguous int16 [out_features, k / 16]");
  const Sparse24LinearTable& table = sparse24_linear_table(active_isa());
  if (tokens > table.few_tokens)
    return linear_by_panels(
        x, n, bias, [&](Tensor& dense, int64_t begin) { sparse24_decompress_rows(values, metadata, dense, begin); });
  Tensor y = torch::stable::new_empty(x, {tokens, n});
  if (tokens == 0 || n == 0) return y;
  const Tensor wide = widen_activations(x, k_padded);
  const std::optional<Tensor> wide_bias = widen_bias(bias);
  Sparse24LinearArgs args{};
  args.x = wide.const_data_ptr<float>();
  args.values = values.const_data_ptr();
  args.metadata = static_cast<const uint16_t*>(metadata.const_data_ptr());
  args.bias = wide_bias.has_value() ? wide_bias->const_data_ptr<float>() : nullptr;
  args.y = y.mutable_data_ptr();
  args.tokens = tokens;
  args.k = k_padded;
  args.x_stride = k_padded;
  args.y_stride = n;
  const Sparse24LinearKernel kernel = table.linear[static_cast<int>(dtype_of(values, "values"))];
  // Four rows a step: hand out multiples of four, so that only the last chunk sees a remainder.
  parallel_chunks((n + 3) / 4, 1 + 4096 / k_padded,
                  [&](int64_t begin, int64_t end) { kernel(args, 4 * begin, std::min(4 * end, n)); });
  return y;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("sparse24_linear", TORCH_BOX(&pyfast::sparse24_linear)); }
