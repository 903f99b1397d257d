// What the launchers of kernels with 2:4 weights share. Only <op>.cu files include it.
#pragma once

#include "launch.h"

namespace pyfast::cuda {

// Columns of the container of a weight with k columns.
inline int64_t container_columns(int64_t k) { return ceil_div(k, 32) * 32; }

// The metadata of a weight [n, k] on the device of `values`.
inline void check_metadata(const Tensor& metadata, const Tensor& values, int64_t n, int64_t k) {
  check_tensor(metadata, "metadata", 2, values);
  STD_TORCH_CHECK(n >= 0 && k >= 0, "n and k: must not be negative, got ", n, " and ", k);
  STD_TORCH_CHECK(metadata.scalar_type() == ScalarType::Short && metadata.size(0) == n &&
                      metadata.size(1) * 16 == container_columns(k),
                  "metadata: must be int16 [", n, ", ", container_columns(k) / 16, "] for the given shape");
}

}  // namespace pyfast::cuda
