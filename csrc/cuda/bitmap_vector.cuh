// bitmap_linear for 1 to 4 tokens, driven by the stored values: y = f(x Wᵀ + bias) · mul, arguments and results as in
// bitmap_linear.cuh.
//
// A lane owns a half row of a tile, 32 bits and the values that belong to them, which lie side by side. It walks over
// the set bits: the work is that of the values and not of the positions.
//
//   two values      1 load of the next word of values (the run may begin at an odd place: the word is cut out of two
//                   neighbours by a funnel shift)
//   each value      lowest bit, its place, its removal: 4 instructions; 1 load of x; 2 widenings, 1 FMA a token
//   a tile          1 POPC and one scan over the warp tell each lane where its values begin
//
// Why so: the alternative, a lane a column that looks whether the row has a value for it, costs about 13 instructions
// for 64 positions and ends at 2.3 times dense however few values there are. Here a tile takes as long as its fullest
// half row: 22, 15, 12, 8 steps of about 10 instructions at 50, 70, 80, 90 % where the mean is 16, 9.6, 6.4, 3.2, and
// about 60 for the tile itself.
//
// x lies in shared memory as it is, [column][token] of 16 bits: the 64 columns of a tile are then 32 words for one
// token, and whichever of them the lanes ask for, no two meet in a bank. The words of values do, 2 to 4 of 32 lanes,
// which is why they are loaded in pairs.
//
// An H100 issues 612 instructions of a warp an SM in the 153 cycles that 1024 dense positions take at 3.0 TB/s, and has
// bytes for 1.78, 2.76, 3.81, 6.15 times dense. Measured there at one token: 0.6 to 0.8, 0.75 to 0.95, 0.9 to 1.1 and
// 1.1 to 1.3 times dense at 50, 70, 80 and 90 %, bound by instructions (632 a warp for 1024 positions at 50 %). So
// sliced_linear serves where its layout may be kept in memory, and this kernel where nothing but the container may.
//
// A block is 4 warps of 16 rows each, with a pipeline each (bitmap_stream.cuh); where n gives too few blocks, several
// share the columns (split_sums.cuh).
#pragma once

#include "bitmap_linear.cuh"
#include "bitmap_stream.cuh"

namespace pyfast::cuda {

template <int Tokens>
struct BitmapVectorPlan {
  static_assert(Tokens == 1 || Tokens == 2 || Tokens == 4);
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kColumnTiles = 2;  // of a stage
  static constexpr int kColumns = kTileColumns * kColumnTiles;
  static constexpr int kRows = kTileRows * kWarps;
  static constexpr int kStages = 3;
  static constexpr int kXStageBytes = kColumns * Tokens * 2;
  static constexpr int kMostStages = 32768 / kXStageBytes;  // of a block: x takes 32 KB
  static constexpr int kSumStride = kRows;

  static PYFAST_HOST_DEVICE constexpr int stage_bytes(int room) { return kWarps * 2 * (kTileBitmapBytes + room); }
  static PYFAST_HOST_DEVICE constexpr int shared_bytes(int room, int split_stages) {
    return split_stages * kXStageBytes + kStages * stage_bytes(room) + kWarps * 2 * kStages * 4 * 8;
  }
};

#if defined(PYFAST_KERNELS)

// sums[token] += value · x[column][token]
template <class T, int Tokens>
PYFAST_DEVICE void multiply_add(float (&sums)[Tokens], uint32_t value, const uint16_t* x) {
  const float weight = ptx::to_float(T{static_cast<uint16_t>(value)});
  if constexpr (Tokens == 1) {
    sums[0] += weight * ptx::to_float(T{*x});
  } else {
    uint32_t words[Tokens / 2];
    if constexpr (Tokens == 2) {
      words[0] = *reinterpret_cast<const uint32_t*>(x);
    } else {
      const Words2 both = *reinterpret_cast<const Words2*>(x);
      words[0] = both.x, words[1] = both.y;
    }
    PYFAST_UNROLL
    for (int pair = 0; pair < Tokens / 2; ++pair) {
      const Floats2 floats = ptx::unpack<T>(words[pair]);
      sums[2 * pair] += weight * floats.x;
      sums[2 * pair + 1] += weight * floats.y;
    }
  }
}

// The place of the lowest set bit, which is removed.
PYFAST_DEVICE int take_lowest(uint32_t& bits) {
  const uint32_t lowest = bits & (0u - bits);
  bits ^= lowest;
  return ptx::highest_bit(lowest);
}

// Tokens: 1, 2 or 4; 3 tokens run as 4, x and sums of the fourth being zero.
template <class T, int Tokens>
__global__ void __launch_bounds__(BitmapVectorPlan<Tokens>::kThreads)
    bitmap_vector_kernel(const BitmapLinearArgs args) {
  using Plan = BitmapVectorPlan<Tokens>;
  using Stream = BitmapStream<Plan::kStages>;
  PYFAST_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int stage_bytes = Plan::stage_bytes(args.room);
  const int all_stages = (static_cast<int>(args.weight.tiles_a_row) + 1) / 2;
  const int first_stage = static_cast<int>(blockIdx.x) * args.split_stages;
  unsigned char* const slots = shared + args.split_stages * Plan::kXStageBytes;
  const Stream stream{args.weight,
                      slots + warp * 2 * (kTileBitmapBytes + args.room),
                      stage_bytes,
                      args.room,
                      reinterpret_cast<int64_t*>(slots + Plan::kStages * stage_bytes) + warp * 8 * Plan::kStages,
                      static_cast<int64_t>(blockIdx.y) * Plan::kWarps + warp,
                      first_stage * 2,
                      all_stages - first_stage < args.split_stages ? all_stages - first_stage : args.split_stages,
                      lane};
  stream.begin();

  uint16_t* const x = reinterpret_cast<uint16_t*>(shared);
  const int chunks = stream.stages * (Plan::kColumns / 8);
  for (int i = thread; i < chunks * Tokens; i += Plan::kThreads) {
    const int token = i / chunks, column = i % chunks * 8, at = first_stage * Plan::kColumns + column;
    Words4 words{};
    if (token < args.tokens && at < args.k)
      words = ptx::ld_global(reinterpret_cast<const Words4*>(args.x + token * args.x_stride + at));
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
    PYFAST_UNROLL
    for (int j = 0; j < 8; ++j) x[(column + j) * Tokens + token] = static_cast<uint16_t>(pairs[j / 2] >> j % 2 * 16);
  }
  ptx::syncthreads();

  float sums[Tokens] = {};
  for (int stage = 0; stage < stream.stages; ++stage) {
    ptx::cp_async_wait<Plan::kStages - 2>();
    ptx::syncwarp();
    stream.fetch(stage + Plan::kStages - 1);
    ptx::cp_async_commit();
    PYFAST_UNROLL
    for (int i = 0; i < 2; ++i) {
      const typename Stream::Tile tile = stream.tile_of(stage, i);
      const unsigned char* const slot = stream.slots + stage % Plan::kStages * stage_bytes + i * stream.slot_bytes();
      const uint16_t* const row = x + (stage * Plan::kColumns + i * kTileColumns + lane % 2 * 32) * Tokens;
      uint32_t bits = reinterpret_cast<const uint32_t*>(slot)[lane];
      const uint32_t count = static_cast<uint32_t>(ptx::popc(bits)), scan = inclusive_scan(count);
      if (static_cast<int>(ptx::shfl(scan, 31)) != tile.count || bits == 0) continue;
      if (tile.fits) {
        const int at = tile.head + static_cast<int>(scan - count);
        const uint32_t* next = reinterpret_cast<const uint32_t*>(slot + kTileBitmapBytes) + at / 2;
        const uint32_t odd = static_cast<uint32_t>(at % 2) * 16;
        uint32_t word = *next;
        do {
          const uint32_t following = *++next;
          const uint32_t pair = ptx::funnel_right(word, following, odd);
          word = following;
          multiply_add<T>(sums, pair, row + take_lowest(bits) * Tokens);
          if (bits != 0) multiply_add<T>(sums, pair >> 16, row + take_lowest(bits) * Tokens);
        } while (bits != 0);
      } else {
        const uint16_t* values = args.weight.values + tile.begin + (scan - count);
        do multiply_add<T>(sums, *values++, row + take_lowest(bits) * Tokens);
        while (bits != 0);
      }
    }
  }
  ptx::cp_async_wait<0>();
  ptx::syncthreads();

  float* const totals = reinterpret_cast<float*>(shared);
  PYFAST_UNROLL
  for (int token = 0; token < Tokens; ++token) {
    const float sum = sums[token] + ptx::shfl_xor(sums[token], 1);
    if (lane % 2 == 0) totals[token * Plan::kSumStride + warp * kTileRows + lane / 2] = sum;
  }
  ptx::syncthreads();
  finish_sums<T, Plan::kThreads, Tokens, Plan::kRows, Plan::kSumStride>(totals, args.out, args.partial, args.tokens, 0,
                                                                        static_cast<int64_t>(blockIdx.y) * Plan::kRows);
}

#endif

}  // namespace pyfast::cuda
