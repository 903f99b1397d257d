// bitmap_convert on the GPU: dense rows to the bitmap form (bitmap_tiles.cuh) and back.
//
//   scan        dense → bitmaps, values of each tile      n·k·sizeof(U) bytes in, n·k/8 out
//   gather      dense, bitmaps, offsets → values          n·k·(sizeof(U) + 1/8) in, d·n·k·sizeof(U) out
//   decompress  values, bitmaps, offsets → dense          n·k·(d·sizeof(U) + 1/8) in, n·k·sizeof(U) out
//
// and 8 bytes a tile, d being the density: bound by memory. Compression is a scan, a prefix sum of the counts and a
// gather, which reads dense a second time (in part from L2). It cannot be one pass: where a tile's values go depends on
// all tiles before it, and how many there are is the size of the output.
//
// One warp does one tile in units of 16 bytes of a row, lanes side by side on units side by side:
//
//   16 bits: 8 elements a unit, 8 units a row      4 rows at once, 4 steps
//   32 bits: 4 elements a unit, 16 units a row     2 rows at once, 8 steps
//
// Scan: a lane makes the 8 (4) bits of its unit and shuffles put the words together: 4 a step, where ballots over
// columns would take one a word and loads of single elements. Gather and decompress: the tile's words lie in the lanes,
// one each; a scan over the warp tells where the values of a word begin, a shuffle brings both to the lane of the unit,
// one POPC counts the bits below it. The values of a tile pass through shared memory, placed there as they lie in
// global memory, so that they are moved in whole 16-byte chunks but for the first and the last.
//
// Damaged tables give wrong values but no access outside the tensors.
#pragma once

#include "bitmap_tiles.cuh"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

inline constexpr int kBitmapWarps = 4;

// Where a lane works in step `step` of a tile: 16 bytes of a row, and which of the tile's 32 half-row words holds their
// bits, from bit `shift` on.
template <class U>
struct BitmapUnit {
  static constexpr int kElements = kPackColumns<U>;
  static constexpr int kUnitsAWord = 32 / kElements;
  static constexpr int kSteps = kTileElements / kElements / 32;
  int row, column, word, shift;

  PYFAST_DEVICE BitmapUnit(int step, int lane) {
    const int unit = 32 * step + lane;
    word = unit / kUnitsAWord;
    shift = unit % kUnitsAWord * kElements;
    row = word / 2;
    column = word % 2 * 32 + shift;
  }
};

// The tile of a warp: its half-row words, one a lane, and how many values lie before each.
struct BitmapPlaces {
  uint32_t word, before;
  int count;  // of the tile
};

PYFAST_DEVICE BitmapPlaces bitmap_places(const uint32_t* bitmaps, uint32_t tile, int lane) {
  const uint32_t word = bitmaps[static_cast<int64_t>(tile) * 32 + lane];
  const uint32_t own = static_cast<uint32_t>(ptx::popc(word)), scan = inclusive_scan(own);
  return {word, scan - own, static_cast<int>(ptx::shfl(scan, 31))};
}

template <class U>
__global__ void __launch_bounds__(32 * kBitmapWarps)
    bitmap_scan_kernel(const DenseRows<U> dense, uint32_t* bitmaps, int64_t* counts, uint32_t tiles) {
  using Unit = BitmapUnit<U>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t tile = blockIdx.x * kBitmapWarps + threadIdx.x / 32;
  if (tile >= tiles) return;
  const uint32_t tiles_a_row = static_cast<uint32_t>((dense.columns + kTileColumns - 1) / kTileColumns);
  const int64_t top = static_cast<int64_t>(tile / tiles_a_row) * kTileRows;
  const int64_t left = static_cast<int64_t>(tile % tiles_a_row) * kTileColumns;
  Pack<U> packs[Unit::kSteps];
  PYFAST_UNROLL
  for (int step = 0; step < Unit::kSteps; ++step) {
    const Unit unit(step, lane);
    packs[step] = load_pack(dense, top + unit.row, left + unit.column);
  }
  constexpr int kWordsAStep = 32 / Unit::kUnitsAWord;
  uint32_t own = 0;
  PYFAST_UNROLL
  for (int step = 0; step < Unit::kSteps; ++step) {
    uint32_t bits = 0;
    PYFAST_UNROLL
    for (int i = 0; i < Unit::kElements; ++i) bits |= (packs[step].element[i] != 0 ? 1u : 0u) << i;
    bits <<= Unit(step, lane).shift;
    PYFAST_UNROLL
    for (int with = 1; with < Unit::kUnitsAWord; with *= 2) bits |= ptx::shfl_xor(bits, with);
    const uint32_t word = ptx::shfl(bits, lane % kWordsAStep * Unit::kUnitsAWord);
    if (lane / kWordsAStep == step) own = word;
  }
  bitmaps[static_cast<int64_t>(tile) * 32 + lane] = own;
  int count = ptx::popc(own);
  PYFAST_UNROLL
  for (int with = 16; with > 0; with /= 2) count += ptx::shfl_xor(count, with);
  if (lane == 0) counts[tile] = count;
}

// Values of a tile on their way through shared memory, as they lie in global memory: chunk c holds the values from
// begin − head + c·kPackColumns on.
template <class U>
struct alignas(16) BitmapStaged {
  U values[kBitmapWarps][kTileElements + kPackColumns<U>];
};

// [warp] Writes the values of a tile from shared memory, where they lie from `begin` modulo kPackColumns on.
template <class U>
PYFAST_DEVICE void store_staged(const BitmapWeight<U>& weight, const U* staged, int64_t begin, int count, int lane) {
  constexpr int kElements = kPackColumns<U>;
  const int head = static_cast<int>(begin & (kElements - 1));
  const int readable = bitmap_readable(begin, count, weight.stored);
  const int chunks = (head + readable + kElements - 1) / kElements;
  for (int chunk = lane; chunk < chunks; chunk += 32) {
    const int first = chunk * kElements;  // in staged
    U* const to = weight.values + (begin - head) + first;
    if (first >= head && first + kElements <= head + readable) {
      const Words4 words = *reinterpret_cast<const Words4*>(staged + first);
      ptx::store_global_v4(to, words.x, words.y, words.z, words.w);
      continue;
    }
    for (int i = 0; i < kElements; ++i)
      if (first + i >= head && first + i < head + readable) to[i] = staged[first + i];
  }
}

template <class U>
__global__ void __launch_bounds__(32 * kBitmapWarps)
    bitmap_gather_kernel(const DenseRows<U> dense, const BitmapWeight<U> weight) {
  using Unit = BitmapUnit<U>;
  PYFAST_SHARED(BitmapStaged<U>, all_staged);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  U* const staged = all_staged.values[threadIdx.x / 32];
  const uint32_t tile = blockIdx.x * kBitmapWarps + threadIdx.x / 32;
  if (tile >= weight.tiles) return;
  const int64_t top = static_cast<int64_t>(tile / weight.tiles_a_row) * kTileRows;
  const int64_t left = static_cast<int64_t>(tile % weight.tiles_a_row) * kTileColumns;
  Pack<U> packs[Unit::kSteps];
  PYFAST_UNROLL
  for (int step = 0; step < Unit::kSteps; ++step) {
    const Unit unit(step, lane);
    packs[step] = load_pack(dense, top + unit.row, left + unit.column);
  }
  const int64_t begin = weight.offsets[tile];
  const BitmapPlaces places = bitmap_places(weight.bitmaps, tile, lane);
  const int head = static_cast<int>(begin & (Unit::kElements - 1));
  PYFAST_UNROLL
  for (int step = 0; step < Unit::kSteps; ++step) {
    const Unit unit(step, lane);
    const uint32_t word = ptx::shfl(places.word, unit.word);
    U* to = staged + head + ptx::shfl(places.before, unit.word) + ptx::popc(word & ((1u << unit.shift) - 1u));
    PYFAST_UNROLL
    for (int i = 0; i < Unit::kElements; ++i)
      if (word >> (unit.shift + i) & 1u) *to++ = packs[step].element[i];
  }
  ptx::syncwarp();

  store_staged(weight, staged, begin, places.count, lane);
}

template <class U>
__global__ void __launch_bounds__(32 * kBitmapWarps)
    bitmap_decompress_kernel(const BitmapWeight<const U> weight, const Dense<U> dense) {
  using Unit = BitmapUnit<U>;
  PYFAST_SHARED(BitmapStaged<U>, all_staged);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  U* const staged = all_staged.values[threadIdx.x / 32];
  const uint32_t tile = blockIdx.x * kBitmapWarps + threadIdx.x / 32;
  if (tile >= weight.tiles) return;
  const int64_t begin = weight.offsets[tile];
  const BitmapPlaces places = bitmap_places(weight.bitmaps, tile, lane);
  const int head = static_cast<int>(begin & (Unit::kElements - 1));
  const int readable = bitmap_readable(begin, places.count, weight.stored);
  const int chunks = (head + places.count + Unit::kElements - 1) / Unit::kElements;
  for (int chunk = lane; chunk < chunks; chunk += 32) {
    const int first = chunk * Unit::kElements;  // in staged
    const U* const from = weight.values + (begin - head) + first;
    if (first >= head && first + Unit::kElements <= head + readable) {
      *reinterpret_cast<Words4*>(staged + first) = ptx::ld_streaming(reinterpret_cast<const Words4*>(from));
      continue;
    }
    for (int i = 0; i < Unit::kElements; ++i)
      staged[first + i] = first + i >= head && first + i < head + readable ? from[i] : U{0};
  }
  ptx::syncwarp();

  const int64_t top = static_cast<int64_t>(tile / weight.tiles_a_row) * kTileRows;
  const int64_t left = static_cast<int64_t>(tile % weight.tiles_a_row) * kTileColumns;
  PYFAST_UNROLL
  for (int step = 0; step < Unit::kSteps; ++step) {
    const Unit unit(step, lane);
    const uint32_t word = ptx::shfl(places.word, unit.word);
    const U* next = staged + head + ptx::shfl(places.before, unit.word) + ptx::popc(word & ((1u << unit.shift) - 1u));
    Pack<U> pack;
    PYFAST_UNROLL
    for (int i = 0; i < Unit::kElements; ++i) {
      pack.element[i] = 0;
      if (word >> (unit.shift + i) & 1u) pack.element[i] = *next++;
    }
    store_pack(dense, top + unit.row, left + unit.column, pack);
  }
}

#endif

}  // namespace pyfast::cuda
