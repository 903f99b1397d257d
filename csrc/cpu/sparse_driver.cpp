#include "sparse_driver.h"

#include <array>

namespace pyfast {

Tensor widen_activations(const Tensor& x, int64_t k_padded) {
  const int64_t tokens = x.size(0), k = x.size(1);
  if (x.scalar_type() == ScalarType::Float && k == k_padded && (tokens <= 1 || x.stride(0) == k) &&
      (k <= 1 || x.stride(1) == 1))
    return x;
  const Tensor from = rows_contiguous(x);
  Tensor wide = torch::stable::new_empty(x, {tokens, k_padded}, ScalarType::Float);
  float* out = wide.mutable_data_ptr<float>();
  const auto copy = [&](const auto* in) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < k; ++i) out[t * k_padded + i] = widen(in[t * from.stride(0) + i]);
      for (int64_t i = k; i < k_padded; ++i) out[t * k_padded + i] = 0.0f;
    }
  };
  switch (dtype_of(x, "x")) {
    case Dtype::f32:
      copy(static_cast<const float*>(from.const_data_ptr()));
      break;
    case Dtype::bf16:
      copy(static_cast<const bf16*>(from.const_data_ptr()));
      break;
    case Dtype::f16:
      copy(static_cast<const f16*>(from.const_data_ptr()));
      break;
  }
  return wide;
}

std::optional<Tensor> widen_bias(const std::optional<Tensor>& bias) {
  if (!bias.has_value()) return std::nullopt;
  const int64_t n = bias->size(0);
  Tensor row = torch::stable::view(torch::stable::contiguous(*bias), {1, n});
  return widen_activations(row, n);
}

void check_linear(const Tensor& x, const Tensor& values, int64_t n, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 2, "x: must have shape [tokens, in_features]");
  STD_TORCH_CHECK(x.scalar_type() == values.scalar_type(), "x: dtype must be that of the weight");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias: must have shape [out_features]");
    STD_TORCH_CHECK(bias->scalar_type() == values.scalar_type(), "bias: dtype must be that of the weight");
  }
}

namespace {

Tensor dense_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

constexpr int64_t kPanelBytes = int64_t{8} << 20;

}  // namespace

Tensor linear_by_panels(const Tensor& x, int64_t n, const std::optional<Tensor>& bias,
                        const std::function<void(Tensor&, int64_t)>& decompress) {
  const int64_t row_bytes = std::max<int64_t>(1, x.size(1) * static_cast<int64_t>(x.element_size()));
  const int64_t panel = std::max<int64_t>(64, kPanelBytes / row_bytes / 64 * 64);
  Tensor y = torch::stable::new_empty(x, {x.size(0), n});
  Tensor scratch = torch::stable::new_empty(x, {std::min(panel, n), x.size(1)});
  for (int64_t begin = 0; begin < n; begin += panel) {
    const int64_t rows = std::min(panel, n - begin);
    Tensor dense = torch::stable::narrow(scratch, 0, 0, rows);
    decompress(dense, begin);
    std::optional<Tensor> part_bias;
    if (bias.has_value()) {
      Tensor whole = *bias;
      part_bias = torch::stable::narrow(whole, 0, begin, rows);
    }
    Tensor part = torch::stable::narrow(y, 1, begin, rows);
    torch::stable::copy_(part, dense_linear(x, dense, part_bias));
  }
  return y;
}

}  // namespace pyfast
