// sparse24_linear on the CPU: checks, threads, registration. The contract is in sparse24_linear.h.
#include "sparse24_linear.h"

#include "sparse_driver.h"

namespace pyfast {
namespace {

class Sparse24Product final : public StoredProduct<Sparse24LinearArgs> {
 public:
  Sparse24Product(const Tensor& x, const Tensor& values, const Tensor& metadata, const LinearOptions& options)
      : StoredProduct(x, values.size(0), 2 * values.size(1), options),
        kernel_(sparse24_linear_table(active_isa()).linear[static_cast<int>(stored_as(values))]) {
    args_.values = keep(values);
    args_.metadata = static_cast<const uint16_t*>(keep(metadata));
  }

 protected:
  // Four rows a step: hand out multiples of four, so that only the last chunk sees a remainder. Up to 20 positions a
  // nanosecond at one token.
  void multiply_all(const Sparse24LinearArgs& args) const override {
    parallel_chunks((n_ + 3) / 4, 1 + 32768 / ((args.k + 1) * (1 + tokens_ / 2)),
                    [&](int64_t begin, int64_t end) { kernel_(args, 4 * begin, std::min(4 * end, n_)); });
  }

 private:
  Sparse24LinearKernel kernel_;
};

Tensor sparse24_linear(const Tensor& x, const Tensor& values, const Tensor& metadata,
                       const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, int64_t activation,
                       const std::optional<Tensor>& mul) {
  STD_TORCH_CHECK(values.dim() == 2 && values.is_contiguous(), "values: must be contiguous [out_features, k / 2]");
  const int64_t n = values.size(0), k_padded = 2 * values.size(1);
  const LinearOptions options{scales, bias, activation, mul};
  const Stored stored = stored_as(values);
  check_linear(x, stored, n, options);
  const int64_t tokens = x.size(0), k = x.size(1);
  STD_TORCH_CHECK(k <= k_padded && k > k_padded - 32, "x: in_features do not agree with the weight");
  STD_TORCH_CHECK(metadata.scalar_type() == ScalarType::Short && metadata.is_contiguous() && metadata.dim() == 2 &&
                      metadata.size(0) == n && metadata.size(1) == k_padded / 16,
                  "metadata: must be contiguous int16 [out_features, k / 16]");
  if (tokens > few_tokens() && stored != Stored::i8)
    return linear_by_panels(
        x, n, options, [&](Tensor& dense, int64_t begin) { sparse24_decompress_rows(values, metadata, dense, begin); });
  return LinearProduct::serve(std::make_unique<Sparse24Product>(x, values, metadata, options), x, mul);
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("sparse24_linear", TORCH_BOX(&pyfast::sparse24_linear)); }
