// A warp's own pipeline of bitmap tiles through shared memory, two tiles side by side a stage, by cp.async. The lanes
// of the warp fetch and read it; no other warp is waited for. bitmap_vector.cuh uses it; bitmap_ring.cuh costs less.
//
//   slot of a tile   bitmaps 128 bytes, values `room` bytes: the 16-byte chunks that hold them, as they lie in memory
//   offsets          [2·Stages][4]: begin and end of the two tiles of a stage
//
// Where a tile's values begin is itself read from memory: the offsets of stage i + Stages − 1 travel in the group of
// stage i, and lie in shared memory when the values of that stage are asked for.
//
// `room` is chosen by the launch from the mean number of values of a tile, with a margin. A tile that holds more does
// not fit, is not fetched, and is read where it lies: any weight is served, no bound on its tiles is needed (it would
// cost a synchronisation with the host), and a few dense tiles do not make the stages of all others large.
//
// The pipeline is short (three stages): the kernels are bound by the instructions that decode, and more warps on a
// multiprocessor hide more than more bytes on their way.
//
// Damaged tables give wrong values but no access outside the tensors: a tile whose offsets do not match its bits counts
// as empty.
#pragma once

#include "bitmap_tiles.cuh"

namespace pyfast::cuda {

inline constexpr int kTileBitmapBytes = kTileElements / 8;

// Bytes for the values of a tile of `mean` values on average: a quarter and 64 values more, at most 768 values. Above
// that share (75 %) a dense weight is faster.
constexpr int bitmap_room(int64_t mean) {
  const int64_t values = mean + mean / 4 + 64 < 768 ? mean + mean / 4 + 64 : 768;
  return static_cast<int>((2 * values + 15) / 16 * 16 + 16);
}

#if defined(PYFAST_KERNELS)

// The stages follow each other along a row of tiles.
template <int Stages>
struct BitmapStream {
  const BitmapWeight<const uint16_t>& weight;
  unsigned char* slots;   // of stage 0
  int stage_bytes, room;  // from stage to stage; of a tile's values
  int64_t* offsets;
  int64_t row_tile;
  int first_column_tile, stages;
  int lane;

  PYFAST_DEVICE int slot_bytes() const { return kTileBitmapBytes + room; }

  // The number of tile `tile` (0 or 1) of a stage, or −1 outside the weight.
  PYFAST_DEVICE int64_t number(int stage, int tile) const {
    const int column_tile = first_column_tile + 2 * stage + tile;
    const int64_t row = row_tile * weight.tiles_a_row;
    return column_tile < static_cast<int>(weight.tiles_a_row) && row < weight.tiles ? row + column_tile : -1;
  }

  PYFAST_DEVICE int64_t* entry(int stage) const { return offsets + stage % (2 * Stages) * 4; }

  PYFAST_DEVICE void fetch_offsets(int stage) const {
    if (lane >= 4 || stage >= stages) return;
    const int64_t at = number(stage, lane / 2);
    ptx::cp_async<8>(entry(stage) + lane, weight.offsets + (at < 0 ? 0 : at + lane % 2), at >= 0);
  }

  // What lies in a slot. `head` is the number of values in its first chunk that belong to the tile before.
  struct Tile {
    int64_t begin;
    int count, head;  // count −1: damaged
    bool fits;
  };

  PYFAST_DEVICE Tile tile_of(int stage, int tile) const {
    const int64_t* const ends = entry(stage) + 2 * tile;
    const int64_t begin = ends[0], count = ends[1] - begin;
    const bool sound = begin >= 0 && count >= 0 && count <= kTileElements && ends[1] <= weight.stored;
    const int head = static_cast<int>(begin & 7);
    // One word beyond the last value is there to be read.
    const bool fits = sound && 2 * (head + static_cast<int>(count)) + 4 <= room;
    return {begin, sound ? static_cast<int>(count) : -1, head, fits};
  }

  // Begins the copies of a stage and of the offsets of the one that is Stages − 1 later. The offsets of `stage` lie in
  // shared memory.
  PYFAST_DEVICE void fetch(int stage) const {
    fetch_offsets(stage + Stages - 1);
    if (stage >= stages) return;
    unsigned char* const slot = slots + stage % Stages * stage_bytes;
    if (lane < 16) {
      const int64_t at = number(stage, lane / 8);
      const unsigned char* const from = reinterpret_cast<const unsigned char*>(weight.bitmaps);
      ptx::cp_async<16>(slot + lane / 8 * slot_bytes() + lane % 8 * 16,
                        from + (at < 0 ? 0 : at * kTileBitmapBytes + lane % 8 * 16), at >= 0);
    }
    PYFAST_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Tile tile = tile_of(stage, i);
      if (!tile.fits) continue;
      unsigned char* const to = slot + i * slot_bytes() + kTileBitmapBytes;
      const int64_t first = tile.begin - tile.head;
      const int chunks = (2 * (tile.head + tile.count) + 4 + 15) / 16;
      for (int chunk = lane; chunk < chunks; chunk += 32) {
        const int64_t left = weight.stored - first - 8 * chunk;  // values
        const uint16_t* const from = weight.values + (first + 8 * chunk);
        if (left >= 8)
          ptx::cp_async<16>(to + 16 * chunk, from);
        else
          copy_last_chunk(to + 16 * chunk, reinterpret_cast<const unsigned char*>(from), static_cast<int>(2 * left));
      }
    }
  }

  // Before anything else: the offsets of the first stages, then their tiles.
  PYFAST_DEVICE void begin() const {
    for (int stage = 0; stage < Stages - 1; ++stage) fetch_offsets(stage);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::syncwarp();
    for (int stage = 0; stage < Stages - 1; ++stage) {
      fetch(stage);
      ptx::cp_async_commit();
    }
  }
};

#endif

}  // namespace pyfast::cuda
