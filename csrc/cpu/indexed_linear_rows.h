// The algorithm of indexed_linear over Vec. See indexed_linear.h.
#pragma once

#include "../inline.h"
#include "indexed_linear.h"

namespace pyfast {
namespace {

constexpr int kAhead = 2048;  // bytes of values to ask for early; the columns are a quarter of them

// A panel's way through one block of columns.
struct Quads {
  const int32_t* starts;
  const uint8_t* rows;
  int64_t count;

  template <class Value>
  Quads(const IndexedLinearArgs<Value>& a, int64_t panel, int64_t block)
      : starts(a.starts + (panel * a.blocks + block) * (a.panel / kQuad)),
        rows(a.rows + (panel * a.blocks + block) * a.panel),
        count(a.panel / kQuad) {}
};

inline void prefetch_steps(const float* w, const uint8_t* columns) {
  __builtin_prefetch(reinterpret_cast<const char*>(w) + kAhead, 0, 3);
  __builtin_prefetch(columns + kAhead / 4, 0, 3);
}

// The columns of one or two steps by one load: loads are what an entry has most of.
template <int steps>
struct Columns {
  uint64_t word = 0;

  explicit Columns(const uint8_t* columns) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
    __builtin_memcpy(&word, columns, steps * kQuad);
  }
  int64_t at(int i) const { return (word >> (8 * i)) & 0xff; }

  // The same times `tile`, a power of 2. Of few tokens by a rotation and a mask in place of a copy, a shift and a mask:
  // more tokens wait for loads.
  template <int tile>
  int64_t first_of(int i) const {
    if constexpr (tile > 16) return at(i) * tile;
    constexpr int log2_tile = __builtin_ctz(tile);
    const int right = (8 * i - log2_tile) & 63;
    const uint64_t turned = right == 0 ? word : (word >> right) | (word << (64 - right));
    return static_cast<int64_t>(turned & (uint64_t{0xff} << log2_tile));
  }
};

// Of one token. sum_steps: the sums of a quad's rows over its steps.
using SumSteps = void (*)(const float* values, const uint8_t* columns, int64_t steps, const float* x, float* sum);
template <SumSteps sum_steps>
void indexed_single(const IndexedLinearArgs<float>& a, int64_t panel, const float* x, float* sums) {
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

// One step of the rows [part, part + side) of a quad: its entries w, at its columns, to the rows' sums.
template <int tile, int side, int steps>
PYFAST_INLINE void add_step(Vec (&sum)[side][tile / Vec::width], const float* w, const Columns<steps>& columns,
                            int step, int part, const float* x) {
  const auto add_entry = [&](int i, Vec value) __attribute__((always_inline)) {
    const float* at = x + columns.template first_of<tile>(kQuad * step + part + i);
#pragma GCC unroll 8
    for (int v = 0; v < tile / Vec::width; ++v) sum[i][v] = fma(value, load(at + v * Vec::width), sum[i][v]);
  };
  if constexpr (side == kQuad) {
    const Four four(w);
    add_entry(0, four.one<0>());
    add_entry(1, four.one<1>());
    add_entry(2, four.one<2>());
    add_entry(3, four.one<3>());
  } else {
#pragma GCC unroll 2
    for (int i = 0; i < side; ++i) add_entry(i, broadcast(w[part + i]));
  }
}

// tile: tokens side by side; side: rows of a quad that are summed at once, as many as registers hold the sums of: they
// take chains · side · tile / width registers. chains, 1 or 2: sums of a row, to which its steps are added in turn: an
// FMA waits for the one before it of its chain, and fewer than eight chains at once leave units idle.
template <int tile, int side, int chains = 1>
void indexed_panel(const IndexedLinearArgs<float>& a, int64_t panel, const float* x, float* sums) {
  constexpr int vectors = tile / Vec::width;
  for (int64_t i = 0; i < a.panel * tile; i += Vec::width) store(sums + i, broadcast(0.0f));
  for (int64_t block = 0; block < a.blocks; ++block) {
    const Quads quads(a, panel, block);
    const float* xb = x + block * (a.block + 1) * tile;
    for (int64_t q = 0; q < quads.count; ++q) {
      const int64_t first = kQuad * int64_t{quads.starts[q]}, end = kQuad * int64_t{quads.starts[q + 1]};
      for (int part = 0; part < kQuad; part += side) {
        float* out[side];
        Vec sum[chains][side][vectors];
#pragma GCC unroll 4
        for (int i = 0; i < side; ++i) {
          out[i] = sums + int64_t{quads.rows[kQuad * q + part + i]} * tile;
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) {
            sum[0][i][v] = load(out[i] + v * Vec::width);
            if constexpr (chains == 2) sum[1][i][v] = broadcast(0.0f);
          }
        }
        int64_t at = first;
        for (; at + kQuad < end; at += 2 * kQuad) {
          prefetch_steps(a.values + at, a.columns + at);
          const Columns<2> columns(a.columns + at);
          add_step<tile, side>(sum[0], a.values + at, columns, 0, part, xb);
          add_step<tile, side>(sum[chains - 1], a.values + at + kQuad, columns, 1, part, xb);
        }
        if (at < end) add_step<tile, side>(sum[0], a.values + at, Columns<1>(a.columns + at), 0, part, xb);
#pragma GCC unroll 4
        for (int i = 0; i < side; ++i) {
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) {
            if constexpr (chains == 2) sum[0][i][v] = sum[0][i][v] + sum[1][i][v];
            store(out[i] + v * Vec::width, sum[0][i][v]);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace pyfast
