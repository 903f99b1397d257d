// What the kernels of this folder share. No torch header here or in any .cuh, so that a host compiler can take
// them too: the index mathematics of a kernel is __host__ __device__ and is proved on the host by the tests.
#pragma once

#include <cstdint>

#include "ptx.cuh"

#if defined(__CUDACC__)
#define PYFAST_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(PYFAST_SIMT)
#define PYFAST_HOST_DEVICE PYFAST_DEVICE
#else
#define PYFAST_HOST_DEVICE inline
#endif

// Unrolls the loop that follows, or leaves it a loop, in device code.
#if defined(__CUDA_ARCH__)
#define PYFAST_UNROLL _Pragma("unroll")
#define PYFAST_UNROLL_NOT _Pragma("unroll 1")
#else
#define PYFAST_UNROLL
#define PYFAST_UNROLL_NOT
#endif

namespace pyfast::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements are moved as unsigned integers of their size, U: -0.0, subnormals and NaN keep their bits.

// Elements in 16 bytes, the widest store of a thread.
template <class U>
inline constexpr int kPackColumns = 16 / static_cast<int>(sizeof(U));

template <class U>
struct Pack {
  U element[kPackColumns<U>];
};

// Writes the pack to a multiple of 16 bytes, in one instruction: left to itself, nvcc takes a struct or a uint4
// whose parts are chosen one by one apart again, into stores of 4 bytes and less.
template <class U>
PYFAST_HOST_DEVICE void store_whole(U* to, const Pack<U>& pack) {
  constexpr int kElements = 4 / static_cast<int>(sizeof(U));
  uint32_t words[4] = {};
  PYFAST_UNROLL
  for (int i = 0; i < kPackColumns<U>; ++i)
    words[i / kElements] |= static_cast<uint32_t>(pack.element[i]) << (i % kElements * 16);
#if defined(__CUDA_ARCH__) || defined(PYFAST_SIMT)
  ptx::store_global_v4(to, words[0], words[1], words[2], words[3]);
#else
  __builtin_memcpy(to, words, sizeof(words));
#endif
}

// The dense matrix that is written, [rows, columns] without gaps. `packed` says that every row starts at a multiple
// of 16 bytes.
template <class U>
struct Dense {
  U* data;
  int64_t rows, columns;
  bool packed;
};

// Writes pack to row `row` from column `column` on, clipped to the matrix.
template <class U>
PYFAST_HOST_DEVICE void store_pack(const Dense<U>& dense, int64_t row, int64_t column, const Pack<U>& pack) {
  if (row >= dense.rows) return;
  U* to = dense.data + row * dense.columns + column;
  if (dense.packed && column + kPackColumns<U> <= dense.columns) {
    store_whole(to, pack);
    return;
  }
  PYFAST_UNROLL
  for (int c = 0; c < kPackColumns<U>; ++c)
    if (column + c < dense.columns) to[c] = pack.element[c];
}

// The dense matrix that is read.
template <class U>
struct DenseRows {
  const U* data;
  int64_t rows, columns, stride;
  bool packed;  // every row starts at a multiple of 16 bytes
};

#if defined(PYFAST_KERNELS)

template <class U>
PYFAST_DEVICE Pack<U> pack_of(const Words4& four) {
  const uint32_t words[4] = {four.x, four.y, four.z, four.w};
  constexpr int kElements = 4 / static_cast<int>(sizeof(U));  // of a word
  Pack<U> pack;
  PYFAST_UNROLL
  for (int i = 0; i < kPackColumns<U>; ++i)
    pack.element[i] = static_cast<U>(words[i / kElements] >> (i % kElements * 16));
  return pack;
}

// 16 bytes of a row, zeros outside the matrix.
template <class U>
PYFAST_DEVICE Pack<U> load_pack(const DenseRows<U>& dense, int64_t row, int64_t column) {
  Pack<U> pack{};
  if (row >= dense.rows) return pack;
  const U* const from = dense.data + row * dense.stride + column;
  if (dense.packed && column + kPackColumns<U> <= dense.columns)
    return pack_of<U>(ptx::ld_nc(reinterpret_cast<const Words4*>(from)));
  PYFAST_UNROLL
  for (int i = 0; i < kPackColumns<U>; ++i)
    if (column + i < dense.columns) pack.element[i] = from[i];
  return pack;
}

#endif

}  // namespace pyfast::cuda
