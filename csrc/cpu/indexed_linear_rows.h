// The algorithm of indexed_linear over Vec. See indexed_linear.h.
#pragma once

#include "indexed_linear.h"

namespace pyfast {
namespace {

constexpr int kAhead = 2048;  // bytes of values to ask for early; the columns are a quarter of them

// A panel's way through one block of columns.
struct Quads {
  const int32_t* starts;
  const uint8_t* rows;
  int64_t count;

  Quads(const IndexedLinearArgs& a, int64_t panel, int64_t block)
      : starts(a.starts + (panel * a.blocks + block) * (a.panel / kQuad)),
        rows(a.rows + (panel * a.blocks + block) * a.panel),
        count(a.panel / kQuad) {}
};

inline void prefetch_step(const float* w, const uint8_t* column) {
  __builtin_prefetch(reinterpret_cast<const char*>(w) + kAhead, 0, 3);
  __builtin_prefetch(column + kAhead / 4, 0, 3);
}

// Of one token. sum_steps: the sums of a quad's rows over its steps.
using SumSteps = void (*)(const float* values, const uint8_t* columns, int64_t steps, const float* x, float* sum);
template <SumSteps sum_steps>
void indexed_single(const IndexedLinearArgs& a, int64_t panel, const float* x, float* sums) {
  for (int64_t r = 0; r < a.panel; ++r) sums[r] = 0.0f;
  for (int64_t block = 0; block < a.blocks; ++block) {
    const Quads quads(a, panel, block);
    const float* xb = x + block * (a.block + 1);
    for (int64_t q = 0; q < quads.count; ++q) {
      const int64_t first = quads.starts[q], steps = quads.starts[q + 1] - first;
      float sum[kQuad];
      sum_steps(a.values + kQuad * first, a.columns + kQuad * first, steps, xb, sum);
      for (int i = 0; i < kQuad; ++i) sums[quads.rows[kQuad * q + i]] += sum[i];
    }
  }
}

// tile: tokens side by side; side: rows of a quad that are summed at once, as many as registers hold the sums of: they
// take side · tile / width registers.
template <int tile, int side>
void indexed_panel(const IndexedLinearArgs& a, int64_t panel, const float* x, float* sums) {
  constexpr int vectors = tile / Vec::width;
  for (int64_t i = 0; i < a.panel * tile; i += Vec::width) store(sums + i, broadcast(0.0f));
  for (int64_t block = 0; block < a.blocks; ++block) {
    const Quads quads(a, panel, block);
    const float* xb = x + block * (a.block + 1) * tile;
    for (int64_t q = 0; q < quads.count; ++q) {
      for (int part = 0; part < kQuad; part += side) {
        const float* w = a.values + kQuad * int64_t{quads.starts[q]} + part;
        const float* end = a.values + kQuad * int64_t{quads.starts[q + 1]} + part;
        const uint8_t* column = a.columns + kQuad * int64_t{quads.starts[q]} + part;
        float* out[side];
        Vec sum[side][vectors];
#pragma GCC unroll 4
        for (int i = 0; i < side; ++i) {
          out[i] = sums + int64_t{quads.rows[kQuad * q + part + i]} * tile;
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[i][v] = load(out[i] + v * Vec::width);
        }
        for (; w < end; w += kQuad, column += kQuad) {
          prefetch_step(w, column);
          const auto add = [&](int i, Vec value) __attribute__((always_inline)) {
            const float* at = xb + int64_t{column[i]} * tile;
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) sum[i][v] = fma(value, load(at + v * Vec::width), sum[i][v]);
          };
          if constexpr (side == kQuad) {
            const Four four(w);
            add(0, four.one<0>());
            add(1, four.one<1>());
            add(2, four.one<2>());
            add(3, four.one<3>());
          } else {
#pragma GCC unroll 2
            for (int i = 0; i < side; ++i) add(i, broadcast(w[i]));
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < side; ++i)
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) store(out[i] + v * Vec::width, sum[i][v]);
      }
    }
  }
}

}  // namespace
}  // namespace pyfast
