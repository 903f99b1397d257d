#include "sparse_driver.h"

#include "bitmap_linear.h"
#include "dense_linear.h"

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

Stored stored_as(const Tensor& values) {
  if (values.scalar_type() == ScalarType::Char) return Stored::i8;
  return static_cast<Stored>(dtype_of(values, "values"));
}

void check_linear(const Tensor& x, Stored stored, int64_t n, const LinearOptions& options) {
  STD_TORCH_CHECK(x.dim() == 2, "x: must have shape [tokens, in_features]");
  const Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK((stored == Stored::i8) == options.scales.has_value(), "scales: go with int8 values, and only there");
  STD_TORCH_CHECK(stored == Stored::i8 || stored == static_cast<Stored>(dtype), "x: dtype must be that of the weight");
  if (options.scales.has_value()) {
    const Tensor& scales = *options.scales;
    STD_TORCH_CHECK(scales.dim() == 1 && scales.size(0) == n && scales.scalar_type() == ScalarType::Float,
                    "scales: must be float32 [out_features]");
  }
  if (options.bias.has_value()) {
    const Tensor& bias = *options.bias;
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == n, "bias: must have shape [out_features]");
    STD_TORCH_CHECK(bias.scalar_type() == x.scalar_type(), "bias: dtype must be that of x");
  }
  STD_TORCH_CHECK(options.activation >= 0 && options.activation < kActivationCount, "activation: accepted: 0 to 4");
  if (options.mul.has_value()) {
    const Tensor& mul = *options.mul;
    STD_TORCH_CHECK(mul.dim() == 2 && mul.size(0) == x.size(0) && mul.size(1) == n,
                    "mul: must have shape [tokens, out_features]");
    STD_TORCH_CHECK(mul.scalar_type() == x.scalar_type(), "mul: dtype must be that of x");
  }
}

LinearOutput::LinearOutput(const Tensor& x, int64_t n, const LinearOptions& options)
    : y(torch::stable::new_empty(x, {x.size(0), n})) {
  epilogue.n = n;
  epilogue.y = y.mutable_data_ptr();
  epilogue.y_stride = n;
  epilogue.dtype = dtype_of(x, "x");
  epilogue.activation = static_cast<Activation>(options.activation);
  if (options.bias.has_value()) {
    Tensor row = torch::stable::view(torch::stable::contiguous(*options.bias), {1, n});
    bias_ = widen_activations(row, n);
    epilogue.bias = bias_->const_data_ptr<float>();
  }
  if (options.scales.has_value()) {
    scales_ = torch::stable::contiguous(*options.scales);
    epilogue.scales = scales_->const_data_ptr<float>();
  }
  if (options.mul.has_value()) {
    mul_ = rows_contiguous(*options.mul);
    epilogue.mul = mul_->const_data_ptr();
    epilogue.mul_stride = mul_->stride(0);
  }
}

int64_t few_tokens() {
  switch (active_isa()) {
    case Isa::serial:
      return 8;
    case Isa::avx2:
      return 12;
    case Isa::avx512:
      return 32;
  }
  return 0;
}

namespace {

constexpr int64_t kPanelBytes = int64_t{8} << 20;

// y as the dense library left it, then what follows a sum.
void finish(Tensor& y, const LinearOptions& options) {
  if (options.activation == 0 && !options.mul.has_value()) return;
  const int64_t tokens = y.size(0), n = y.size(1);
  Epilogue e{};
  e.activation = static_cast<Activation>(options.activation);
  const std::optional<Tensor> mul =
      options.mul.has_value() ? std::optional<Tensor>(rows_contiguous(*options.mul)) : std::nullopt;
  if (mul.has_value()) {
    e.mul = mul->const_data_ptr();
    e.mul_stride = mul->stride(0);
  }
  e.y = y.mutable_data_ptr();
  e.y_stride = n;
  e.n = n;
  e.dtype = dtype_of(y, "x");
  const EpilogueKernel kernel = epilogue_table(active_isa()).from_same[static_cast<int>(e.dtype)];
  const auto* sums = static_cast<const char*>(y.const_data_ptr());
  const int64_t row_bytes = n * static_cast<int64_t>(y.element_size());
  torch::stable::parallel_for(0, tokens, 1 + 32768 / (n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) kernel(e, sums + t * row_bytes, 0, t, n);
  });
}

}  // namespace

Tensor linear_by_panels(const Tensor& x, int64_t n, const LinearOptions& options,
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
    if (options.bias.has_value()) {
      Tensor whole = *options.bias;
      part_bias = torch::stable::narrow(whole, 0, begin, rows);
    }
    Tensor part = torch::stable::narrow(y, 1, begin, rows);
    torch::stable::copy_(part, dense_linear(x, dense, part_bias));
  }
  finish(y, options);
  return y;
}

}  // namespace pyfast
