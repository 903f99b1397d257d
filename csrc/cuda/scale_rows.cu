// scale_rows on the GPU: checks, stream, launch, registration. What is computed is said in scale_rows.cuh.
#include "scale_rows.cuh"

#include "rows_launch.h"

namespace pyfast::cuda {
namespace {

void check_scale(const Tensor& grad, const Tensor& scale) {
  STD_TORCH_CHECK(grad.is_cuda() && grad.dim() == 2, "grad: must be a CUDA tensor [rows, words]");
  (void)is_wide(grad, "grad");
  check_per_row(scale, "scale", ScalarType::Float, grad);
  STD_TORCH_CHECK(grad.size(0) <= 2147483647, "grad: got ", grad.size(0), " rows, accepted: below 2^31");
}

void scale_into(const Tensor& grad, const Tensor& scale, Tensor& out) {
  const int64_t count = grad.size(0), words = grad.size(1);
  if (count == 0 || words == 0) return;
  with_element(grad, [&](auto element) {
    using T = decltype(element);
    const int64_t pieces = ceil_div(words + 16 / static_cast<int64_t>(sizeof(T)) - 1, kScaleWords<T>);
    STD_TORCH_CHECK(pieces <= kMaxBlocksY, "grad: got ", words,
                    " words a row, accepted: ", (kMaxBlocksY - 1) * kScaleWords<T>);
    const ScaleRowsArgs<T> args{static_cast<const T*>(grad.const_data_ptr()),
                                scale.const_data_ptr<float>(),
                                static_cast<T*>(out.mutable_data_ptr()),
                                grad.stride(0),
                                scale.stride(0),
                                out.stride(0),
                                words};
    const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(pieces));
    scale_rows_kernel<T><<<grid, kScaleThreads, 0, current_stream(grad)>>>(args);
    check_launch("scale_rows");
  });
}

Tensor scale_rows(const Tensor& grad, const Tensor& scale) {
  check_scale(grad, scale);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), grad.size(1)});
  scale_into(words_together(grad), scale, out);
  return out;
}

void scale_rows_(Tensor grad, const Tensor& scale) {
  check_scale(grad, scale);
  STD_TORCH_CHECK(grad.size(1) <= 1 || grad.stride(1) == 1, "grad: the words of a row must lie next to each other");
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  scale_into(grad, scale, grad);
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("scale_rows", TORCH_BOX(&pyfast::cuda::scale_rows));
  m.impl("scale_rows_", TORCH_BOX(&pyfast::cuda::scale_rows_));
}
