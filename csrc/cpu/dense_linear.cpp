#include "dense_linear.h"

#include <array>
#include <string>

namespace pyfast {
namespace {

namespace values = torch::stable::detail;

std::atomic<bool> onednn{false};

}  // namespace

void multiply_by_onednn(bool chosen) { onednn.store(chosen, std::memory_order_relaxed); }

Tensor dense_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::optional<Tensor> row = bias;
  if (row) row = torch::stable::contiguous(*row);  // oneDNN reads it as it lies
  std::array<StableIValue, 6> stack{values::from(x), values::from(weight), values::from(row)};
  const bool chosen = onednn.load(std::memory_order_relaxed) && x.scalar_type() == ScalarType::Float;
  if (chosen && x.numel() > 0 && weight.numel() > 0) {
    // (X, W, B, str attr, Scalar?[] scalars, str? algorithm): what it may fuse behind the product is nothing
    StableListHandle no_scalars;
    TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(0, &no_scalars));
    stack[3] = values::from(std::string("none"));
    stack[4] = values::from(no_scalars);
    stack[5] = values::from(std::optional<std::string>());
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION));
  } else {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  }
  return values::to<Tensor>(stack[0]);
}

}  // namespace pyfast
