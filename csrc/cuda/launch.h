// What the CUDA registrations share: dtypes, argument checks, the stream, the check after a launch.
// Only <op>.cu files include it; kernels never see torch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "common.cuh"

namespace pyfast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Grids have at most so many blocks along y.
inline constexpr int64_t kMaxBlocksY = 65535;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Turns an error of the CUDA runtime into an exception.
inline void check(cudaError_t error, const char* kernel) {
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// A contiguous CUDA tensor of that many dimensions, on the device of `values`.
inline void check_tensor(const Tensor& tensor, const char* name, int64_t dimensions, const Tensor& values) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == values.get_device_index(), name,
                  ": must be on the CUDA device of values");
  STD_TORCH_CHECK(tensor.dim() == dimensions && tensor.is_contiguous(), name, ": must be contiguous with ", dimensions,
                  " dimension(s), got ", tensor.dim());
}

// True for 32-bit elements, false for 16-bit ones.
inline bool is_wide(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  ": dtype must be float32, bfloat16 or float16");
  return dtype == ScalarType::Float;
}

inline void check_halves(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  ": dtype must be bfloat16 or float16");
}

inline bool is_aligned(const void* pointer, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// The tensor, copied where it does not start at a multiple of 16 bytes.
inline Tensor aligned_start(const Tensor& tensor) {
  return is_aligned(tensor.const_data_ptr(), 16) ? tensor : torch::stable::clone(tensor);
}

// Elements of 16 bits as kernels read them.
inline const uint16_t* half_bits(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.const_data_ptr()); }

// The dense output [rows, columns] as kernels see it.
template <class U>
Dense<U> dense_view(const Tensor& tensor) {
  Dense<U> dense{static_cast<U*>(tensor.mutable_data_ptr()), tensor.size(0), tensor.size(1), false};
  dense.packed = is_aligned(dense.data, 16) && dense.columns % kPackColumns<U> == 0;
  return dense;
}

// A matrix of elements side by side, copied where its rows are not.
inline Tensor rows_of(const Tensor& dense) {
  STD_TORCH_CHECK(dense.is_cuda() && dense.dim() == 2, "dense: must be a CUDA tensor [out_features, in_features]");
  return dense.size(1) <= 1 || dense.stride(1) == 1 ? dense : torch::stable::contiguous(dense);
}

template <class U>
DenseRows<U> rows_view(const Tensor& rows) {
  const U* const data = static_cast<const U*>(rows.const_data_ptr());
  const int64_t stride = rows.stride(0);
  return {data, rows.size(0), rows.size(1), stride, is_aligned(data, 16) && stride % kPackColumns<U> == 0};
}

// Calls body(U{}) with the unsigned integer of the elements' size.
template <class Body>
void by_size(bool wide, const Body& body) {
  if (wide)
    body(uint32_t{});
  else
    body(uint16_t{});
}

}  // namespace pyfast::cuda
