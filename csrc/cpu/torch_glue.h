// What the CPU registrations share: stable-ABI spellings of dtypes, argument checks, huge pages.
// Only <op>.cpp files include it; kernels never see torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "scalars.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, ": dtype must be float32, bfloat16 or float16");
  }
  return Dtype::f32;
}

// The last dimension contiguous; a copy only where it is not (transposed or expanded views).
inline Tensor rows_contiguous(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) <= 1 || t.stride(last) == 1) return t;
  return torch::stable::contiguous(t);
}

// body(begin, end, worker) over [0, count) on all threads, in chunks: each thread takes those of a share of its own,
// one after another, then what is left of the others'. A thread that the system holds up delays the call by one chunk,
// not by its whole share; and from call to call a thread writes the same part of an output, whose lines are in its own
// cache. About 16 chunks a thread, none smaller than `least` but at the ends of shares; no more threads than there are
// such chunks, and none but the caller where there is one. worker, from 0 to max_workers() - 1, is never that of
// another chunk that runs at the same time: scratch goes by it.
//
// Waking a thread takes 5 to 10 us. `least` should stand for about as much work of one thread: two such chunks are then
// done no later by two threads than by one, and anything smaller stays with the caller.
inline int64_t max_workers() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

template <class Body>
void parallel_workers(int64_t count, int64_t least, const Body& body) {
  const int64_t workers = std::min(max_workers(), (count + least - 1) / least);
  if (workers <= 1) {
    body(0, count, 0);
    return;
  }
  const int64_t chunk = std::max(least, count / (16 * workers));
  struct alignas(64) Share {  // a cache line each
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(static_cast<size_t>(workers));
  for (int64_t w = 0; w < workers; ++w) {
    shares[w].next = count * w / workers;
    shares[w].end = count * (w + 1) / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t w = 0; w < workers; ++w) {
      Share& share = shares[(worker + w) % workers];
      for (int64_t i = share.next.fetch_add(chunk); i < share.end; i = share.next.fetch_add(chunk))
        body(i, std::min(i + chunk, share.end), worker);
    }
  });
}

template <class Body>
void parallel_chunks(int64_t count, int64_t least, const Body& body) {
  parallel_workers(count, least, [&](int64_t begin, int64_t end, int64_t) { body(begin, end); });
}

// Asks for 2 MiB pages under a fresh large output: 512 times fewer page faults on the first write.
inline void advise_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(t.numel()) * t.element_size()) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

}  // namespace pyfast
