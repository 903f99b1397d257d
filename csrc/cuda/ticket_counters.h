// The counters of a kernel that takes tickets (ptx::atomic_ticket). Only <op>.cu files include it.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <optional>

#include "launch.h"

namespace pyfast::cuda {
namespace {

constexpr int64_t kCounters = 1 << 20;
constexpr int64_t kCountersOfStream = 1024;

// In the memory of the module, which CUDA sets to zero when it loads it. Every launch leaves its counters at zero, so
// that nothing has to be written before one: a memset would be another node of a graph.
__device__ uint32_t counter_pool[kCounters];

// `count` counters, all zero, for a launch on the current stream of x, whose device is the current one. Launches that
// may run at the same time get different ones:
//
//   on a stream   they follow one another, and share
//   captured      the graph may be replayed on any stream, beside anything but itself: counters of its own, for good
//
// A launch that may begin before its predecessor on the stream ends takes its tickets behind ptx::wait_prerequisites.
// Two executable graphs made from one capture may not run at once. Where the pool is used up a launch gets memory that
// is set to zero before it, kept by `held`.
uint32_t* take_counters(const Tensor& x, int64_t count, std::optional<Tensor>& held, const char* name) {
  struct Range {
    int64_t begin = 0, size = 0;
  };
  struct Pool {
    std::mutex mutex;
    uint32_t* address = nullptr;
    int64_t used = 0;
    std::map<cudaStream_t, Range> of_stream;
  };
  constexpr int kDevices = 64;
  static std::array<Pool, kDevices> pools;
  const int device = x.get_device_index();
  STD_TORCH_CHECK(device >= 0 && device < kDevices, "x: device index ", device, " is more than ", kDevices - 1);
  Pool& pool = pools[static_cast<size_t>(device)];

  const cudaStream_t stream = current_stream(x);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), name);
  const std::lock_guard<std::mutex> lock(pool.mutex);
  if (pool.address == nullptr) {
    void* address = nullptr;
    check(cudaGetSymbolAddress(&address, counter_pool), name);
    pool.address = static_cast<uint32_t*>(address);
  }
  Range fresh;
  Range& range = status == cudaStreamCaptureStatusNone ? pool.of_stream[stream] : fresh;
  if (range.size < count) {
    const int64_t size = &range == &fresh ? count : std::max(count, kCountersOfStream);
    if (pool.used + size > kCounters) {
      held = torch::stable::new_zeros(x, {count}, ScalarType::Int);
      return static_cast<uint32_t*>(held->mutable_data_ptr());
    }
    range = {pool.used, size};
    pool.used += size;
  }
  return pool.address + range.begin;
}

}  // namespace
}  // namespace pyfast::cuda
