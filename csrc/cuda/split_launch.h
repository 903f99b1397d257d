// Launches of products whose columns may be shared by several blocks (split_sums.cuh). Only <op>.cu files include it.
#pragma once

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>

#include "linear_launch.h"
#include "split_count.h"
#include "split_sums.cuh"

namespace pyfast::cuda {

// What a launch must know of the device and of the code that runs on it.
struct KernelFacts {
  int multiprocessors = 0;
  int shared_bytes = 0;   // of a multiprocessor
  int most_shared = 0;    // of a block
  bool clusters = false;  // the code that is loaded is for sm_90 or later
};

inline constexpr int kDevices = 64;

// Asks once for each kernel and device, and allows the kernel all the shared memory that a block may have there.
template <auto Kernel>
const KernelFacts& kernel_facts(int device, const char* name) {
  static std::array<std::once_flag, kDevices> asked;
  static std::array<KernelFacts, kDevices> answers;
  STD_TORCH_CHECK(device >= 0 && device < kDevices, "x: device index ", device, " is more than ", kDevices - 1);
  std::call_once(asked[static_cast<size_t>(device)], [device, name] {
    KernelFacts facts;
    const auto ask = [&](int* value, cudaDeviceAttr what) { check(cudaDeviceGetAttribute(value, what, device), name); };
    ask(&facts.multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(&facts.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    ask(&facts.most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, Kernel), name);
    facts.clusters = attributes.ptxVersion >= 90;
    check(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, facts.most_shared), name);
    answers[static_cast<size_t>(device)] = facts;
  });
  return answers[static_cast<size_t>(device)];
}

// Blocks of 4 warps that a multiprocessor runs at once; above 16 warps more of them gain nothing.
inline int64_t resident_blocks(const KernelFacts& facts, int shared_bytes) {
  const int64_t fit = facts.shared_bytes / (shared_bytes + 1024);
  return facts.multiprocessors * std::clamp<int64_t>(fit, 1, 4);
}

// A cluster along x.
inline cudaLaunchAttribute cluster_attribute(int64_t blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// When a kernel may begin where the code is for sm_90 or later: Early while the kernel ahead of it on the stream still
// runs, for which it waits itself (ptx::wait_prerequisites), or InOrder after it. Its blocks take room on the
// multiprocessors while they wait: on an H200 Early saves sparse24_linear and sliced_linear 1.0 to 1.7 µs and
// bitmap_linear above 16 tokens up to 4 %, but costs bitmap_vector 20 to 35 % and bitmap_grad_x 7 to 14.
// A kernel that starts in order does not let the next grid begin either: the same blocks would wait on it.
enum class Start { Early, InOrder };

// Launches Kernel(args) in clusters of so many blocks along x; 1: none.
template <auto Kernel, class Args>
void launch_kernel(const KernelFacts& facts, Start start, dim3 grid, int threads, int shared_bytes, int64_t cluster,
                   cudaStream_t stream, const Args& args, const char* name) {
  std::array<cudaLaunchAttribute, 2> attributes{};
  unsigned count = 0;
  if (facts.clusters && start == Start::Early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (facts.clusters && cluster > 1) attributes[count++] = cluster_attribute(cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, Kernel, args), name);
}

// How many blocks run at once when they come in clusters of 1 … kClusterBlocks: fewer than without, for a cluster lies
// in one group of multiprocessors as a whole. For a kernel that is always launched with these threads and bytes; asks
// once for each device.
template <auto Kernel>
const Residents& resident_in_clusters(int device, int threads, int shared_bytes, const char* name) {
  static std::array<std::once_flag, kDevices> asked;
  static std::array<Residents, kDevices> answers;
  const KernelFacts& facts = kernel_facts<Kernel>(device, name);
  std::call_once(asked[static_cast<size_t>(device)], [&] {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, Kernel, threads, static_cast<size_t>(shared_bytes)),
          name);
    Residents residents;
    residents.fill(std::max<int64_t>(1, static_cast<int64_t>(blocks) * facts.multiprocessors));
    for (int64_t splits = 2; facts.clusters && splits <= kClusterBlocks; ++splits) {
      cudaLaunchAttribute attribute = cluster_attribute(splits);
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(splits));
      config.blockDim = dim3(static_cast<unsigned>(threads));
      config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
      config.attrs = &attribute;
      config.numAttrs = 1;
      int clusters = 0;
      check(cudaOccupancyMaxActiveClusters(&clusters, Kernel, &config), name);
      residents[static_cast<size_t>(splits)] = std::max<int64_t>(1, clusters * splits);
    }
    answers[static_cast<size_t>(device)] = residents;
  });
  return answers[static_cast<size_t>(device)];
}

// Launches Kernel(args) with `splits` blocks for each of row_blocks × token_blocks. Args holds tokens, out, partial.
template <class T, auto Kernel, class Args>
void launch_splits(const Tensor& x, Args args, Start start, int64_t splits, int64_t row_blocks, int threads,
                   int shared_bytes, const char* name, int64_t token_blocks = 1) {
  const KernelFacts& facts = kernel_facts<Kernel>(x.get_device_index(), name);
  STD_TORCH_CHECK(shared_bytes <= facts.most_shared, name, ": needs ", shared_bytes,
                  " bytes of shared memory, the device has ", facts.most_shared);
  const bool cluster = splits > 1 && splits <= kClusterBlocks && facts.clusters;
  std::optional<Tensor> partial;
  if (splits > 1 && !cluster) {
    const int64_t tokens = args.tokens, n = args.out.n;
    partial = torch::stable::new_empty(x, {splits, tokens, n}, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  const dim3 blocks(static_cast<unsigned>(splits), static_cast<unsigned>(row_blocks),
                    static_cast<unsigned>(token_blocks));
  const cudaStream_t stream = current_stream(x);
  launch_kernel<Kernel>(facts, start, blocks, threads, shared_bytes, cluster ? splits : 1, stream, args, name);
  if (!partial.has_value()) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.out.n, 256)), static_cast<unsigned>(args.tokens));
  reduce_splits_kernel<T><<<grid, 256, 0, stream>>>(args.out, args.partial, static_cast<int>(splits));
  check_launch(name);
}

}  // namespace pyfast::cuda
