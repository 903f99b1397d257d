// Expansion of a bitmap tile into the fragments of mma.m16n8k16, for a warp.
//
// mma adds over columns, in any order that its two operands agree on. In the order chosen here lane 4g + t owns columns
// 16t … 16t + 15 of the rows g and g + 8 of a tile, its two runs; four columns of each are a step:
//
//   step s, register    a[0]  row g      columns 16t + 4s, + 1        b[0]  x of the token g, columns 16t + 4s, + 1
//                       a[1]  row g + 8  the same                     b[1]                             + 2, + 3
//                       a[2]  row g      columns 16t + 4s + 2, + 3
//                       a[3]  row g + 8  the same
//
// The values of a run lie side by side. Where a pair of columns begins and where it ends is enough to load it: its
// first value is at the beginning, its second one before the end, each loaded where its bit is set. These 2 · 8
// addresses come from sums of bits, kept in bytes, by one IDP each; the same sums, over the warp, tell where each run
// begins. No address waits for another one's load or bit.
//
// Instructions of a warp for a tile (sm_90): 13 for the sums, 13 for the scan, 16 IDP, 32 loads, 16 PRMT, 23 zeros and
// 8 tests of bits. The same by a pointer that moves under each bit's predicate is a chain of 16 steps, and half of them
// become an addition and a select, or an addition and two moves: 144 for loads, additions, zeros and tests instead
// of 95.
#pragma once

#include "bitmap_tiles.cuh"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

// The lane's two runs of a tile, in numbers of values.
struct BitmapRuns {
  uint32_t bits;     // row g in the lower half, row g + 8 in the upper one
  uint32_t sums[4];  // byte b of sums[j]: how many of the bits 8b … 8b + 2j + 1 are set
  uint32_t before;   // of the lanes below: rows 0–7 in the lower half, rows 8–15 in the upper one
  uint32_t total;    // of the tile, likewise
};

// [warp] The runs of two tiles, whose counts go through the scan together as long as they fit in a byte: over 8 lanes.
PYFAST_DEVICE void count_runs(const uint32_t (&bits)[2], BitmapRuns (&runs)[2]) {
  PYFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t pairs = bits[i] - (bits[i] >> 1 & 0x55555555u);
    runs[i].bits = bits[i];
    runs[i].sums[0] = pairs & 0x03030303u;
    PYFAST_UNROLL
    for (int j = 1; j < 4; ++j) runs[i].sums[j] = runs[i].sums[j - 1] + (pairs >> 2 * j & 0x03030303u);
  }
  // Bytes 1 and 3 of a product with 0x101 are sums of two neighbours.
  const uint32_t counts = ptx::byte_permute(runs[0].sums[3] * 0x101u, runs[1].sums[3] * 0x101u, 0x7531u);
  const uint32_t scan = ptx::add_from_below<4>(ptx::add_from_below<2>(ptx::add_from_below<1>(counts)));
  PYFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t bytes = i == 0 ? 0x4140u : 0x4342u;
    const uint32_t all = ptx::add_from_below<16>(ptx::add_from_below<8>(ptx::byte_permute(scan, 0, bytes)));
    runs[i].total = ptx::shfl(all, 31);
    runs[i].before = all - ptx::byte_permute(counts, 0, bytes);
  }
}

// Where the values of the lane's runs begin, in bytes, when those of the tile begin at `begin`; and where the tile's
// end.
PYFAST_DEVICE uint32_t place_runs(const BitmapRuns& runs, uint32_t begin, uint32_t (&from)[2]) {
  const uint32_t middle = ptx::dot2(runs.total, 0x0002u, begin);
  from[0] = ptx::dot2(runs.before, 0x0002u, begin);
  from[1] = ptx::dot2(runs.before, 0x0200u, middle);
  return ptx::dot2(runs.total, 0x0200u, middle);
}

// Columns 8·Half to 8·Half + 7 of a run whose values from there on begin at the shared address `from`, which moves
// behind them: words[i] holds columns 2i and 2i + 1 of the half. Run 0 is row g, run 1 row g + 8.
template <int Run, int Half>
PYFAST_DEVICE void expand_half(const BitmapRuns& runs, uint32_t& from, uint32_t (&words)[4]) {
  constexpr int kFirst = 16 * Run + 8 * Half;
  uint32_t at[5];
  at[0] = from;
  PYFAST_UNROLL
  for (int j = 0; j < 4; ++j) at[1 + j] = ptx::dot4(runs.sums[j], 2u << kFirst, from);
  ptx::load_marked<kFirst>(words, runs.bits, at);
  from = at[4];
}

#endif

}  // namespace pyfast::cuda
