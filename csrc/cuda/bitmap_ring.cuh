// The values of a row of bitmap tiles as one stream: tiles that follow each other in a row lie side by side in memory,
// so that a warp reads from its first tile's values on, without looking where each tile begins: that it learns from the
// bits, which it counts anyway.
//
//   stream      position 0 is the 16-byte chunk that holds the first value
//   ring        positions modulo Bytes, in shared memory; its first 32 bytes once more behind its end, so that a run
//               of 16 values that begins in the ring is never cut
//
// Copies come in steps of `Step` bytes, as far ahead as the ring holds: after `fetch` the Bytes − Step from `at` on are
// asked for, which is more than a tile takes, whatever is stored in it.
//
// Damaged tables give wrong values but no access outside the tensors: a stream ends where the table says, not after the
// last value that is stored, and a tile that asks for more counts as empty.
#pragma once

#include "bitmap_expand.cuh"

namespace pyfast::cuda {

inline constexpr int kRingMirrorBytes = 32;

#if defined(PYFAST_KERNELS)

// Bytes: a power of two.
template <int Bytes, int Step>
struct BitmapRing {
  static constexpr int kCopy = 512;  // of a warp's cp.async
  static constexpr int kMirrorLanes = kRingMirrorBytes / 16;
  static_assert(Bytes - Step >= 2 * kTileElements + 14);  // a tile, its first value anywhere in a chunk

  unsigned char* ring;
  const unsigned char* source;  // of the lane's chunk of the first step
  uint32_t at, fetched, end;    // positions: of the next value, of the next step, behind the last chunk or value

  // The values of `tiles` tiles of a row from tile `first` on; `memory`: Bytes and the mirror, at a multiple of 16.
  PYFAST_DEVICE void open(const BitmapWeight<const uint16_t>& weight, unsigned char* memory, int64_t first, int tiles,
                          int lane) {
    int64_t from = 0, to = 0;
    if (tiles > 0) from = weight.offsets[first], to = weight.offsets[first + tiles];
    const bool sound = from >= 0 && to >= from && to <= weight.stored && to - from <= int64_t{tiles} * kTileElements;
    if (!sound) from = to = 0;
    const uint32_t head = static_cast<uint32_t>(from & 7);
    ring = memory;
    source = reinterpret_cast<const unsigned char*>(weight.values + (from - head)) + 16 * lane;
    at = 2 * head;
    fetched = 0;
    // Chunks are read whole but for one that the end of all values cuts.
    const uint32_t values = head + static_cast<uint32_t>(to - from), whole = (values + 7) & ~7u;
    end = 2 * (from - head + whole <= weight.stored ? whole : values);
  }

  // Where the two runs of the tile at `at` begin: shared addresses. `at` moves behind the tile.
  PYFAST_DEVICE void take(const BitmapRuns& runs, uint32_t (&from)[2]) {
    const uint32_t base = ptx::shared_address(ring);
    at = place_runs(runs, at, from);
    from[0] = base + (from[0] & (Bytes - 1));
    from[1] = base + (from[1] & (Bytes - 1));
  }

  // Begins copies until the ring is full: what lies before `kept` is read no more.
  PYFAST_DEVICE void fetch(int lane, uint32_t kept) {
    unsigned char* const own = ring + 16 * lane;
    const uint32_t room = kept + Bytes, whole = room < end ? room : end;
    for (; fetched + Step <= whole; fetched += Step) {
      const uint32_t place = fetched & (Bytes - 1);
      const unsigned char* const from = source + fetched;
      PYFAST_UNROLL
      for (int i = 0; i < Step; i += kCopy) ptx::cp_async<16>(own + place + i, from + i);
      if (place == 0 && lane < kMirrorLanes) ptx::cp_async<16>(own + Bytes, from);
    }
    if (fetched >= end || fetched + Step > room) return;
    // Whole chunks, then the one that the end cuts.
    const uint32_t place = fetched & (Bytes - 1);
    const unsigned char* const from = source + fetched;
    const int rest = static_cast<int>(end - fetched) - 16 * lane, cut = rest % kCopy;
    PYFAST_UNROLL
    for (int i = 0; i < Step; i += kCopy)
      if (rest >= i + 16) ptx::cp_async<16>(own + place + i, from + i);
    const bool mirrored = place == 0 && lane < kMirrorLanes;
    if (mirrored && rest >= 16) ptx::cp_async<16>(own + Bytes, from);
    if (cut > 0 && cut < 16) {
      copy_last_chunk(own + place + rest - cut, from + rest - cut, cut);
      if (mirrored && rest < 16) *reinterpret_cast<Words4*>(own + Bytes) = *reinterpret_cast<const Words4*>(own);
    }
    fetched = end;
  }
};

#endif

}  // namespace pyfast::cuda
