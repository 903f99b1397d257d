// sparse24_convert on the GPU: dense rows to the 2:4 form and back.
//
//   values   [n, K/2]   U, K = columns rounded up to a multiple of 16 or more
//   metadata [n, K/8]   bytes; a nibble for each group of four columns, the lower nibble first
//                       (low two bits of a nibble: column of the group's first value; high two: of the second)
//   dense    [n, k]
//
// Every kernel moves n·K·(sizeof(U)/2 + 1/8) bytes on the sparse side and n·k·sizeof(U) on the dense one, nothing
// twice: bound by memory. (Selection by scores reads them besides, n·k·4.)
//
// Dense to 2:4: one thread does 16 columns of a row, four groups: 32 or 64 bytes in, 16 or 32 bytes of values and a
// word of metadata out. Which two of a group are kept:
//
//   stored      those whose bits are not +0.0; a group with more than two is reported (the first of the matrix)
//   magnitude   the two largest, of equals the earlier; NaN is larger than infinity. Bits without the sign order so
//   scores      the two with the largest scores (float32), likewise
//   metadata    given: gather
//
// 2:4 to dense: one thread writes 16 bytes of a row: 8 columns of 16 bits or 4 of 32 bits, from 8 bytes of values and a
// byte or a nibble of metadata. Threads side by side write side by side:
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

inline constexpr int kGroupColumns = 4;
inline constexpr int kUnitColumns = 16;  // of a thread, and of a word of metadata

enum class Keep { stored, magnitude, scores };

// What is written: values [n, K/2], metadata [n, K/16].
template <class U>
struct Sparse24Out {
  U* values;
  uint16_t* metadata;
  int64_t padded_columns;  // K, a multiple of 32
};

template <class U>
struct Sparse24Unit {
  Pack<U> packs[kUnitColumns / kPackColumns<U>];

  PYFAST_DEVICE Sparse24Unit(const DenseRows<U>& dense, int64_t row, int64_t unit) {
    PYFAST_UNROLL
    for (int i = 0; i < kUnitColumns / kPackColumns<U>; ++i)
      packs[i] = load_pack(dense, row, unit * kUnitColumns + i * kPackColumns<U>);
  }
  PYFAST_DEVICE U at(int column) const { return packs[column / kPackColumns<U>].element[column % kPackColumns<U>]; }

  // Column `place` (0 to 3) of a group, found at run time.
  PYFAST_DEVICE U pick(int group, unsigned place) const {
    const U low = place & 1u ? at(4 * group + 1) : at(4 * group),
            high = place & 1u ? at(4 * group + 3) : at(4 * group + 2);
    return place & 2u ? high : low;
  }
};

// The nibble of the first pair of columns that covers a mask of at most two, bit c for column c; 0 for more than two.
PYFAST_DEVICE unsigned sparse24_nibble(unsigned mask) {
  return static_cast<unsigned>(0x000E0DCC09884444ull >> 4 * mask) & 15u;
}

// A float32's bits as a number that orders as the float does, NaN last and below 2^32 − 1.
PYFAST_DEVICE uint32_t order_of(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xfffffffeu;
  if (bits == 0x80000000u) bits = 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The mask of the two largest keys; of equal keys the earlier are larger.
PYFAST_DEVICE unsigned two_largest(const uint32_t (&keys)[kGroupColumns]) {
  unsigned ahead[kGroupColumns] = {};
  PYFAST_UNROLL
  for (int i = 0; i < kGroupColumns; ++i) PYFAST_UNROLL
  for (int j = i + 1; j < kGroupColumns; ++j) {
    const bool later = keys[j] > keys[i];
    ahead[i] += later;
    ahead[j] += !later;
  }
  unsigned mask = 0;
  PYFAST_UNROLL
  for (int i = 0; i < kGroupColumns; ++i) mask |= (ahead[i] < 2 ? 1u : 0u) << i;
  return mask;
}

// Writes the 8 values of a unit.
template <class U>
PYFAST_DEVICE void store_values(U* values, int64_t padded_columns, int64_t row, int64_t unit,
                                const Sparse24Unit<U>& from, unsigned word) {
  constexpr int kElements = kPackColumns<U>;
  PYFAST_UNROLL
  for (int first = 0; first < kUnitColumns / 2; first += kElements) {
    Pack<U> pack;
    PYFAST_UNROLL
    for (int i = 0; i < kElements; ++i) pack.element[i] = from.pick((first + i) / 2, word >> 2 * (first + i) & 3u);
    store_whole(values + row * (padded_columns / 2) + unit * (kUnitColumns / 2) + first, pack);
  }
}

// Block and grid as in sparse24_decompress_kernel, a unit of 16 columns for a chunk, one row a thread and round.
// violation, for Keep::stored: begins as 2^64 − 1.
template <class U, Keep How>
__global__ void __launch_bounds__(kSparse24Threads)
    sparse24_compress_kernel(const DenseRows<U> dense, const DenseRows<uint32_t> scores, const Sparse24Out<U> out,
                             uint64_t* violation) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (unit * kUnitColumns >= out.padded_columns) return;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < dense.rows; row += step) {
    const Sparse24Unit<U> from(dense, row, unit);
    unsigned word = 0;
    PYFAST_UNROLL
    for (int group = 0; group < kUnitColumns / kGroupColumns; ++group) {
      unsigned mask = 0;
      if constexpr (How == Keep::stored) {
        PYFAST_UNROLL
        for (int i = 0; i < kGroupColumns; ++i) mask |= (from.at(4 * group + i) != 0 ? 1u : 0u) << i;
      } else {
        // One more for what lies in the matrix: the padding is kept last.
        uint32_t keys[kGroupColumns];
        const int64_t column = unit * kUnitColumns + group * kGroupColumns;
        if constexpr (How == Keep::scores) {
          const Pack<uint32_t> four = load_pack(scores, row, column);
          PYFAST_UNROLL
          for (int i = 0; i < kGroupColumns; ++i) keys[i] = order_of(four.element[i]);
        } else {
          constexpr U kMagnitude = static_cast<U>(U(~U{0}) >> 1);
          PYFAST_UNROLL
          for (int i = 0; i < kGroupColumns; ++i) keys[i] = from.at(4 * group + i) & kMagnitude;
        }
        PYFAST_UNROLL
        for (int i = 0; i < kGroupColumns; ++i) keys[i] = column + i < dense.columns ? keys[i] + 1 : 0;
        mask = two_largest(keys);
      }
      const unsigned nibble = sparse24_nibble(mask);
      if (How == Keep::stored && nibble == 0)
        ptx::atomic_min(violation, static_cast<uint64_t>(row * dense.columns + unit * kUnitColumns + 4 * group));
      word |= nibble << 4 * group;
    }
    store_values(out.values, out.padded_columns, row, unit, from, word);
    out.metadata[row * (out.padded_columns / kUnitColumns) + unit] = static_cast<uint16_t>(word);
  }
}

// The elements at the places of the metadata.
template <class U>
__global__ void __launch_bounds__(kSparse24Threads)
    sparse24_gather_kernel(const DenseRows<U> dense, const uint16_t* metadata, U* values, int64_t padded_columns) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (unit * kUnitColumns >= padded_columns) return;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < dense.rows; row += step) {
    const unsigned word = metadata[row * (padded_columns / kUnitColumns) + unit];
    store_values(values, padded_columns, row, unit, Sparse24Unit<U>(dense, row, unit), word);
  }
}

#endif

}  // namespace pyfast::cuda
