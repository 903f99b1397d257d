// sparse24_convert: dense rows to and from the 2:4 form of sparse24_linear.h. Portable code; elements are moved as
// integers of their size, so −0.0, subnormals and NaN survive and to_dense gives back the same bits.
//
// A group of four columns keeps two. Where fewer are stored (bits other than +0.0), zeros fill the free places; the
// pair is the first legal one that covers what is stored:
//
//   stored   —     0     1     2     3    01    02    03    12    13    23     three or four
//   kept    0,1   0,1   0,1   0,2   0,3   0,1   0,2   0,3   1,2   1,3   2,3    error: not 2:4
#pragma once

#include <cstdint>

#include "scalars.h"

namespace pyfast {

struct Sparse24Pair {
  uint8_t nibble;  // first | second << 2; 0 where the mask is not 2:4
  uint8_t first, second;
};

// By the mask of stored columns, bit c for column c.
inline constexpr Sparse24Pair kSparse24Pairs[16] = {
    {0x4, 0, 1}, {0x4, 0, 1}, {0x4, 0, 1}, {0x4, 0, 1},  // none, 0, 1, 01
    {0x8, 0, 2}, {0x8, 0, 2}, {0x9, 1, 2}, {0x0, 0, 0},  // 2, 02, 12, 012
    {0xC, 0, 3}, {0xC, 0, 3}, {0xD, 1, 3}, {0x0, 0, 0},  // 3, 03, 13, 013
    {0xE, 2, 3}, {0x0, 0, 0}, {0x0, 0, 0}, {0x0, 0, 0},  // 23, 023, 123, 0123
};

struct Sparse24ConvertArgs {
  int64_t k;             // dense columns
  int64_t k_padded;      // rounded up to a multiple of 32
  int64_t dense_stride;  // elements between dense rows
};

// Rows [begin, end). Returns the dense position row * k + column of the first group that is not 2:4, or -1.
template <class U>
int64_t sparse24_compress(const Sparse24ConvertArgs& a, const U* dense, U* values, uint16_t* metadata, int64_t begin,
                          int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const U* p = dense + row * a.dense_stride;
    U* v = values + row * (a.k_padded / 2);
    for (int64_t k = 0; k < a.k_padded; k += 16) {
      unsigned word = 0;
      for (int64_t group = k; group < k + 16; group += 4) {
        U four[4] = {};
        const int64_t inside = a.k - group;
        for (int c = 0; c < 4; ++c)
          if (c < inside) four[c] = p[group + c];
        const unsigned mask = (four[0] != 0) | (four[1] != 0) << 1 | (four[2] != 0) << 2 | (four[3] != 0) << 3;
        const Sparse24Pair pair = kSparse24Pairs[mask];
        if (pair.nibble == 0) return row * a.k + group;
        v[group / 2] = four[pair.first];
        v[group / 2 + 1] = four[pair.second];
        word |= static_cast<unsigned>(pair.nibble) << (group - k);
      }
      metadata[row * (a.k_padded / 16) + k / 16] = static_cast<uint16_t>(word);
    }
  }
  return -1;
}

// Calls visit(column, position in the row's values) for every kept column below k of one row.
template <class Visit>
void for_each_kept(const Sparse24ConvertArgs& a, const uint16_t* metadata, Visit visit) {
  for (int64_t j = 0; j < a.k_padded / 2; ++j) {
    const int64_t column = j / 2 * 4 + ((metadata[j / 8] >> (2 * (j % 8))) & 3);
    if (column < a.k) visit(column, j);
  }
}

// values at the kept places, taken from dense; zeros in the padding.
template <class U>
void sparse24_gather(const Sparse24ConvertArgs& a, const U* dense, const uint16_t* metadata, U* values, int64_t begin,
                     int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    U* v = values + row * (a.k_padded / 2);
    clear_bytes(v, static_cast<uint64_t>(a.k_padded / 2) * sizeof(U));
    for_each_kept(a, metadata + row * (a.k_padded / 16),
                  [&](int64_t column, int64_t j) { v[j] = dense[row * a.dense_stride + column]; });
  }
}

// Dense rows [begin, end); dense points at row begin.
template <class U>
void sparse24_scatter(const Sparse24ConvertArgs& a, const U* values, const uint16_t* metadata, U* dense, int64_t begin,
                      int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    U* p = dense + (row - begin) * a.dense_stride;
    const U* v = values + row * (a.k_padded / 2);
    clear_bytes(p, static_cast<uint64_t>(a.k) * sizeof(U));
    for_each_kept(a, metadata + row * (a.k_padded / 16), [&](int64_t column, int64_t j) { p[column] = v[j]; });
  }
}

}  // namespace pyfast
