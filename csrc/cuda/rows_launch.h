// What the launchers of kernels on rows of logits share. Only <op>.cu files include it.
#pragma once

#include "launch.h"

namespace pyfast::cuda {

// `values` is one number of that dtype for each row of `logits`.
inline void check_per_row(const Tensor& values, const char* name, ScalarType dtype, const Tensor& logits) {
  STD_TORCH_CHECK(values.is_cuda() && values.get_device_index() == logits.get_device_index(), name,
                  ": must be on the device of the logits");
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == logits.size(0) && values.scalar_type() == dtype, name,
                  ": must be ", dtype == ScalarType::Long ? "int64" : "float32", " with one value a row");
}

// The words of a row next to each other; a copy only where they are not.
inline Tensor words_together(const Tensor& logits) {
  return logits.size(1) == 1 || logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
}

// run(T{}) with the element type of the tensor.
template <class Run>
void with_element(const Tensor& tensor, const Run& run) {
  if (tensor.scalar_type() == ScalarType::Float)
    run(float{});
  else if (tensor.scalar_type() == ScalarType::BFloat16)
    run(BFloat16{});
  else
    run(Float16{});
}

}  // namespace pyfast::cuda
