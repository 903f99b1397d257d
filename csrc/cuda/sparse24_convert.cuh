// sparse24_convert on the GPU: the 2:4 form back to dense rows.
//
//   values   [n, K/2]   U, K = columns rounded up to a multiple of 16 or more
//   metadata [n, K/8]   bytes; a nibble for each group of four columns, the lower nibble first
//                       (low two bits of a nibble: column of the group's first value; high two: of the second)
//   dense    [n, k]
//
// Moves n·K·(sizeof(U)/2 + 1/8) bytes in and n·k·sizeof(U) out, nothing twice: bound by memory.
//
// One thread writes 16 bytes of a row: 8 columns of 16 bits or 4 of 32 bits, from 8 bytes of values and a byte
// or a nibble of metadata. Threads side by side write side by side:
//
//   16 bits:   v0 v1 │ v2 v3    metadata 0x4E     32 bits:   v0 v1    nibble 9
//              ↓  ↓    ↘  ↘     (E, then 4)                    ↘  ↘
//           0 0 v0 v1 │ v2 v3 0 0                           0 v0 v1 0
//
// A thread does kRowsAThread rows, whose loads are under way together.
#pragma once

#include "common.cuh"

namespace pyfast::cuda {

template <class U>
struct Sparse24Weight {
  const U* values;
  const uint8_t* metadata;
  int64_t padded_columns;  // K
};

// 16 bytes of a row as they lie in memory: half as many values, and their nibbles, the first one lowest.
template <class U>
struct alignas(8) Sparse24Chunk {
  U value[kPackColumns<U> / 2];
};

template <class U>
PYFAST_HOST_DEVICE Sparse24Chunk<U> sparse24_values(const Sparse24Weight<U>& weight, int64_t row, int64_t chunk) {
  const int64_t at = row * (weight.padded_columns / 2) + chunk * (kPackColumns<U> / 2);
  return *reinterpret_cast<const Sparse24Chunk<U>*>(weight.values + at);
}

template <class U>
PYFAST_HOST_DEVICE unsigned sparse24_nibbles(const Sparse24Weight<U>& weight, int64_t row, int64_t chunk) {
  const int64_t group = chunk * (kPackColumns<U> / 4);
  const unsigned byte = weight.metadata[row * (weight.padded_columns / 8) + group / 2];
  return byte >> (group % 2 * 4);
}

template <class U>
PYFAST_HOST_DEVICE Pack<U> sparse24_expand(const Sparse24Chunk<U>& chunk, unsigned nibbles) {
  Pack<U> pack;
  PYFAST_UNROLL
  for (int column = 0; column < kPackColumns<U>; ++column) {
    const unsigned nibble = nibbles >> (column / 4 * 4);
    const unsigned place = static_cast<unsigned>(column % 4);
    const U first = (nibble & 3u) == place ? chunk.value[column / 4 * 2] : U{0};
    pack.element[column] = (nibble >> 2 & 3u) == place ? chunk.value[column / 4 * 2 + 1] : first;
  }
  return pack;
}

#if defined(PYFAST_KERNELS)

inline constexpr int kSparse24Threads = 256;
inline constexpr int kRowsAThread = 4;

// Block: x over the chunks of a row, y over rows, kSparse24Threads threads together. Grid: x likewise, y over
// groups of blockDim.y * kRowsAThread rows, in as many rounds as it takes.
template <class U>
__global__ void __launch_bounds__(kSparse24Threads)
    sparse24_decompress_kernel(const Sparse24Weight<U> weight, const Dense<U> dense) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (chunk * kPackColumns<U> >= dense.columns) return;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y * kRowsAThread;
  int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y * kRowsAThread + threadIdx.y;
  for (; row < dense.rows; row += step) {
    Sparse24Chunk<U> chunks[kRowsAThread];
    unsigned nibbles[kRowsAThread];
    PYFAST_UNROLL
    for (int i = 0; i < kRowsAThread; ++i) {
      const int64_t at = row + i * static_cast<int64_t>(blockDim.y);
      if (at >= dense.rows) continue;
      chunks[i] = sparse24_values(weight, at, chunk);
      nibbles[i] = sparse24_nibbles(weight, at, chunk);
    }
    PYFAST_UNROLL
    for (int i = 0; i < kRowsAThread; ++i) {
      const int64_t at = row + i * static_cast<int64_t>(blockDim.y);
      if (at < dense.rows) store_pack(dense, at, chunk * kPackColumns<U>, sparse24_expand(chunks[i], nibbles[i]));
    }
  }
}

#endif

}  // namespace pyfast::cuda
