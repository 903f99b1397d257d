#include "sparse_driver.h"

#include "bitmap_linear.h"
#include "dense_linear.h"

namespace pyfast {

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

Scratch::Scratch(int64_t floats) {
  constexpr size_t kLine = 64;
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(floats, 1)) * sizeof(float);
  memory_.reset(static_cast<float*>(std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine)));
  STD_TORCH_CHECK(memory_ != nullptr, "out of memory: ", bytes, " bytes");
}

namespace {

// rows [count, k], `stride` elements apart, to float32 [count, k_padded] with zeros behind.
void widen_rows(Dtype dtype, const void* rows, int64_t stride, int64_t count, int64_t k, int64_t k_padded, float* out) {
  const auto copy = [&](const auto* in) {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t i = 0; i < k; ++i) out[t * k_padded + i] = widen(in[t * stride + i]);
      for (int64_t i = k; i < k_padded; ++i) out[t * k_padded + i] = 0.0f;
    }
  };
  switch (dtype) {
    case Dtype::f32:
      return copy(static_cast<const float*>(rows));
    case Dtype::bf16:
      return copy(static_cast<const bf16*>(rows));
    case Dtype::f16:
      return copy(static_cast<const f16*>(rows));
  }
}

}  // namespace

LinearProduct::LinearProduct(const Tensor& x, int64_t n, const LinearOptions& options)
    : tokens_(x.size(0)), n_(n), k_(x.size(1)), dtype_(dtype_of(x, "x")) {
  epilogue_.n = epilogue_.y_stride = n;
  epilogue_.dtype = dtype_;
  epilogue_.activation = static_cast<Activation>(options.activation);
  const auto contiguous = [&](const Tensor& t) {
    live_ = live_ && t.is_contiguous();
    return keep(t.is_contiguous() ? t : torch::stable::contiguous(t));
  };
  if (options.bias.has_value()) bias_ = contiguous(*options.bias);
  if (options.scales.has_value()) epilogue_.scales = static_cast<const float*>(contiguous(*options.scales));
}

Tensor LinearProduct::serve(std::unique_ptr<LinearProduct> product, const Tensor& x, const std::optional<Tensor>& mul) {
  Tensor y = torch::stable::new_empty(x, {product->tokens_, product->n_});
  if (product->tokens_ == 0 || product->n_ == 0) return y;
  const Tensor rows = rows_contiguous(x);
  const std::optional<Tensor> factors = mul.has_value() ? std::optional<Tensor>(rows_contiguous(*mul)) : std::nullopt;
  product->multiply(rows.const_data_ptr(), rows.stride(0), factors.has_value() ? factors->const_data_ptr() : nullptr,
                    factors.has_value() ? factors->stride(0) : 0, y.mutable_data_ptr());
  if (recording() && product->live_) set_recorded(std::move(product));
  return y;
}

void LinearProduct::multiply(const void* x, int64_t stride, const void* mul, int64_t mul_stride, void* y) const {
  Epilogue e = epilogue_;
  e.mul = mul;
  e.mul_stride = mul_stride;
  e.y = y;
  std::optional<Scratch> wide_bias;
  if (bias_ != nullptr && dtype_ == Dtype::f32) {
    e.bias = static_cast<const float*>(bias_);
  } else if (bias_ != nullptr) {
    e.bias = wide_bias.emplace(n_).get();
    widen_rows(dtype_, bias_, n_, 1, n_, n_, wide_bias->get());
  }
  multiply_rows(x, stride, e);
}

const float* LinearProduct::widen_activations(const void* x, int64_t stride, int64_t k_padded,
                                              std::optional<Scratch>& copy) const {
  if (dtype_ == Dtype::f32 && k_ == k_padded && (tokens_ <= 1 || stride == k_)) return static_cast<const float*>(x);
  copy.emplace(tokens_ * k_padded);
  widen_rows(dtype_, x, stride, tokens_, k_, k_padded, copy->get());
  return copy->get();
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
