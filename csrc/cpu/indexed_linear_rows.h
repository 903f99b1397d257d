// The algorithm of indexed_linear over Vec. See indexed_linear.h.
#pragma once

#include "indexed_linear.h"

namespace pyfast {
namespace {

constexpr int kAhead = 2048;  // bytes of values to ask for early; the columns are a quarter of them

inline int64_t panel_rows(const IndexedLinearArgs& a, int64_t panel) {
  return a.n - panel * a.panel < a.panel ? a.n - panel * a.panel : a.panel;
}

// Of one token. list: Σ of a list of `count` entries.
using ListSum = float (*)(const float* values, const uint8_t* columns, int64_t count, const float* x);
template <ListSum list>
void indexed_single(const IndexedLinearArgs& a, int64_t panel, const float* x, float* sums) {
  const int64_t rows = panel_rows(a, panel);
  for (int64_t block = 0; block < a.blocks; ++block) {
    const int32_t* starts = a.starts + (panel * a.blocks + block) * a.panel;
    const float* xb = x + block * a.block;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t begin = int64_t{kIndexedUnit} * starts[r], end = int64_t{kIndexedUnit} * starts[r + 1];
      const float sum = list(a.values + begin, a.columns + begin, end - begin, xb);
      sums[r] = block == 0 ? sum : sums[r] + sum;
    }
  }
}

// tile: tokens side by side; chains: independent sums a register of tokens, so that one entry's FMA need not wait for
// the one before. A row's sums take chains · tile / width registers.
template <int tile, int chains>
void indexed_panel(const IndexedLinearArgs& a, int64_t panel, const float* x, float* sums) {
  constexpr int vectors = tile / Vec::width;
  const int64_t rows = panel_rows(a, panel);
  for (int64_t block = 0; block < a.blocks; ++block) {
    const int32_t* starts = a.starts + (panel * a.blocks + block) * a.panel;
    const float* xb = x + block * a.block * tile;
    for (int64_t r = 0; r < rows; ++r) {
      const float* w = a.values + int64_t{kIndexedUnit} * starts[r];
      const float* end = a.values + int64_t{kIndexedUnit} * starts[r + 1];
      const uint8_t* column = a.columns + int64_t{kIndexedUnit} * starts[r];
      float* out = sums + r * tile;
      Vec sum[chains][vectors];
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) {
        sum[0][i] = block == 0 ? broadcast(0.0f) : load(out + i * Vec::width);
#pragma GCC unroll 4
        for (int c = 1; c < chains; ++c) sum[c][i] = broadcast(0.0f);
      }
      for (; w < end; w += chains, column += chains) {
        __builtin_prefetch(reinterpret_cast<const char*>(w) + kAhead, 0, 3);
        __builtin_prefetch(column + kAhead / 4, 0, 3);
#pragma GCC unroll 4
        for (int c = 0; c < chains; ++c) {
          const float* at = xb + int64_t{column[c]} * tile;
          const Vec value = broadcast(w[c]);
#pragma GCC unroll 8
          for (int i = 0; i < vectors; ++i) sum[c][i] = fma(value, load(at + i * Vec::width), sum[c][i]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) {
#pragma GCC unroll 4
        for (int c = 1; c < chains; ++c) sum[0][i] = sum[0][i] + sum[c][i];
        store(out + i * Vec::width, sum[0][i]);
      }
    }
  }
}

}  // namespace
}  // namespace pyfast
