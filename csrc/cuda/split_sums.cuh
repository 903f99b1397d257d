// The end of a product whose columns are shared by several blocks ("splits"): their float32 sums are added in the order
// of the splits, so that the result does not depend on which block is first, and go through the epilogue.
//
//   one split        the block's own sums
//   a cluster        (sm_90 and up) blocks read each other's shared memory
//   several blocks   partial sums [splits, tokens, n] in global memory; reduce_splits_kernel adds them
//
// Grid: x over the splits, y over the blocks of rows, z over blocks of tokens where there are more than one. A cluster
// is the splits of a block of rows and tokens.
#pragma once

#include "common.cuh"
#include "epilogue.cuh"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

// All threads of the block call this after a barrier. totals[copy][token][row]: the sums of the block in shared memory,
// Copies of them to be added, Stride floats from token to token, CopyStride from copy to copy, for at most Tokens of
// the `tokens` from first_token on. partial is null where the splits are one or a cluster.
template <class T, int Threads, int Tokens, int Rows, int Stride, int Copies = 1, int CopyStride = 0>
PYFAST_DEVICE void finish_sums(float* totals, const Epilogue& out, float* partial, int tokens, int first_token,
                               int64_t first_row) {
  const int thread = static_cast<int>(threadIdx.x);
  const int elements = (tokens - first_token < Tokens ? tokens - first_token : Tokens) * Rows;
  const bool alone = gridDim.x == 1;
  for (int i = thread; i < elements; i += Threads) {
    const int token = i / Rows;
    const int64_t row = first_row + i % Rows;
    float* const total = totals + token * Stride + i % Rows;
    float sum = total[0];
    PYFAST_UNROLL
    for (int copy = 1; copy < Copies; ++copy) sum += total[copy * CopyStride];
    if (!alone && partial == nullptr)
      total[0] = sum;
    else if (row < out.n && alone)
      write_output<T>(out, first_token + token, row, sum);
    else if (row < out.n)
      partial[(static_cast<int64_t>(blockIdx.x) * tokens + first_token + token) * out.n + row] = sum;
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (alone || partial != nullptr) return;
  ptx::cluster_sync();
  constexpr int kTogether = 4;  // that are read before any is added: each is a round trip to another multiprocessor
  const int ranks = static_cast<int>(gridDim.x);
  for (int i = static_cast<int>(blockIdx.x) * Threads + thread; i < elements; i += ranks * Threads) {
    const int token = i / Rows;
    const int64_t row = first_row + i % Rows;
    float sum = 0.0f;
    for (int first = 0; first < ranks; first += kTogether) {
      float read[kTogether] = {};
      PYFAST_UNROLL
      for (int j = 0; j < kTogether; ++j)
        if (first + j < ranks)
          read[j] = ptx::ld_cluster(totals + token * Stride + i % Rows, static_cast<uint32_t>(first + j));
      PYFAST_UNROLL
      for (int j = 0; j < kTogether; ++j) sum += read[j];
    }
    if (row < out.n) write_output<T>(out, first_token + token, row, sum);
  }
  ptx::cluster_leave();
#endif
}

// Adds the partial sums of the splits. Grid: x over blocks of 256 rows of W, y over tokens.
template <class T>
__global__ void __launch_bounds__(256) reduce_splits_kernel(const Epilogue out, const float* partial, int splits) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int token = static_cast<int>(blockIdx.y), tokens = static_cast<int>(gridDim.y);
  if (row >= out.n) return;
  float sum = 0.0f;
  for (int split = 0; split < splits; ++split)
    sum += partial[(static_cast<int64_t>(split) * tokens + token) * out.n + row];
  write_output<T>(out, token, row, sum);
}

#endif

}  // namespace pyfast::cuda
