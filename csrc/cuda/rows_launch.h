// What the launchers of kernels on rows of logits share. Only <op>.cu files include it.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "launch.h"
#include "resident_plan.h"

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

// [rows, words] of a dtype that the kernels take.
inline void check_logits(const Tensor& logits, const char* name) {
  STD_TORCH_CHECK(logits.is_cuda(), name, ": must be a CUDA tensor");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, name, ": must have shape [rows, words] with words above 0");
  STD_TORCH_CHECK(logits.size(1) <= 2147483647 - 64, name, ": got ", logits.size(1),
                  " words, accepted: below 2^31 - 64");
  (void)is_wide(logits, name);
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

// A launch that fails leaves no error behind, or the next one would report it.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  check(error, what);
}

inline int attribute_of(cudaDeviceAttr attribute, int device, const char* what) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), what);
  return value;
}

inline DeviceLimits limits_of(int device, const char* what) {
  return {attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, what),
          attribute_of(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device, what),
          attribute_of(cudaDevAttrComputeCapabilityMajor, device, what) >= 9};
}

struct GroupLaunch {
  int cluster, threads;
  int64_t shared_bytes;
};

// How many groups of such blocks the device runs at once; lets the kernel have so much shared memory. The driver takes
// longer to answer than to launch: it is asked once for each kernel, device and shape.
template <class Args>
int groups_at_once(const char* what, void (*kernel)(Args), const GroupLaunch& shape, int device,
                   const cudaLaunchConfig_t& config) {
  static std::mutex mutex;
  static std::map<std::tuple<void (*)(Args), int, int, int, int64_t>, int> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  int& groups = answers[{kernel, device, shape.cluster, shape.threads, shape.shared_bytes}];
  if (groups > 0) return groups;
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), what);
  if (shape.shared_bytes > attributes.maxDynamicSharedSizeBytes)  // a launch of another shape may need what there was
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)),
        what);
  int found = 0;
  if (shape.cluster > 1) {
    check_cuda(cudaOccupancyMaxActiveClusters(&found, kernel, &config), what);
  } else {
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, shape.threads, config.dynamicSmemBytes),
               what);
    found *= attribute_of(cudaDevAttrMultiProcessorCount, device, what);
  }
  STD_TORCH_CHECK(found > 0, what, ": this GPU has no room for ", shape.cluster, " block(s) of ", shape.shared_bytes,
                  " bytes");
  return groups = found;
}

// As many groups of blocks as the device runs at once, and no more than there are rows: each does rows in turn. Sets
// args.cluster and args.groups.
template <class Args>
void launch_groups(const char* what, void (*kernel)(Args), Args args, const GroupLaunch& shape, int device,
                   cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  config.gridDim = dim3(static_cast<unsigned>(shape.cluster));
  const int groups = groups_at_once(what, kernel, shape, device, config);
  args.cluster = shape.cluster;
  args.groups = std::min<int64_t>(groups, args.count);
  config.gridDim = dim3(static_cast<unsigned>(args.groups) * static_cast<unsigned>(shape.cluster));
  check_cuda(cudaLaunchKernelEx(&config, kernel, args), what);
}

}  // namespace pyfast::cuda
