// bitmap_linear on tensor cores: y = f(x Wᵀ + bias) · mul with W in bitmap form (bitmap_tiles.cuh), for 5 to 64 tokens.
//
//   x [tokens, k]   16 bits, rows at multiples of 16 bytes, k a multiple of 64: where W has fewer columns, x is zero
//   y [tokens, n]   sums and epilogue in float32, rounded once
//
// Bytes. At density d a position costs 2d + 1/8 (values, bitmap) of the dense 2, each read from memory once. Every
// block reads x again, from L2: 8·⌈tokens/8⌉/(d·rows) of the values' bytes, rows = 32 up to 16 tokens and 64 above.
//
// A warp goes along a row of tiles, or two of them above 16 tokens, where they share the loads of x. Two tiles are a
// stage, side by side or one below the other. For each stage it
//
//   waits for the copies that it began a stage ago; no other warp is waited for
//   counts the bits of both tiles, which tells where each lane's values lie (bitmap_expand.cuh), and begins to load
//   those of the next stage for each tile, half of the columns at a time: loads x from L1, where the warps of a block
//   meet, expands, multiplies before the last tile: begins to copy what follows, in stream order, into its ring
//   (bitmap_ring.cuh)
//
// Half of the columns, because that is half of the registers that wait for mma: the lane's 16 columns of x are two
// loads of 16 bytes anyway. A ring holds two full tiles; above 50 % density a tile may not have been asked for in time.
// Then it is asked for when its turn comes, and waited for.
//
// Bound by latency: the first kernel of this form, with 5 warps a scheduler, issued 1.3 to 1.7 instructions a cycle on
// an H100 and waited for shared and global memory in turn. So what counts is warps (8 blocks of 4 up to 16 tokens, 4
// blocks up to 32), a grid that fills them once at every shape (blocks of few rows, two warps side by side, splits by
// the launch's occupancy: count_splits), and no load whose result is touched soon: x comes before the expansion, bits a
// stage ahead.
//
// Instructions of a warp for a tile, counted in the code for sm_90; fetching depends on what is stored, here at 50 and
// 80 %, the rest does not:
//
//   token tiles           1     2     4     8
//   expand, multiply    174   187   203   224
//   fetch, 50 %          21    21    24    24
//   fetch, 80 %           9     9    10    10
//
// An H100 takes 1024 dense positions in 183 cycles of a multiprocessor at the 2.7 TB/s that a dense product reaches, in
// which it issues about 470 instructions of a warp. The loads from shared memory weigh as much: simulated at random
// bits, the 32 loads of a tile take 69, 52, 40, 31 passes at 50, 70, 80, 90 % (the lanes' runs meet in the banks), and
// about 30 more go to copies, shuffles and x.
//
// Where n gives too few blocks, several share the columns (split_sums.cuh).
//
// Resources, those of bitmap_vector.cuh too (tests/test_cuda_build.py compares; the shared memory of
// bitmap_vector_kernel is the launch's and depends on the density: here at 50 %, and for 8 stages of x):
//
//   bitmap_linear_kernel<T, 1>      64 registers    16512 bytes of shared memory    up to 8 tokens
//   bitmap_linear_kernel<T, 2>      64 registers    16512 bytes of shared memory    up to 16
//   bitmap_linear_kernel<T, 4>     128 registers    33024 bytes of shared memory    up to 32
//   bitmap_linear_kernel<T, 8>     216 registers    34816 bytes of shared memory    up to 64
//   bitmap_vector_kernel<T, 1>      40 registers    40064 bytes of shared memory    1 token
//   bitmap_vector_kernel<T, 2>      40 registers    42112 bytes of shared memory    2
//   bitmap_vector_kernel<T, 4>      40 registers    46208 bytes of shared memory    3 and 4
//   reduce_splits_kernel<T>         40 registers        0 bytes of shared memory
#pragma once

#include "bitmap_expand.cuh"
#include "bitmap_ring.cuh"
#include "split_sums.cuh"
#include "token_tiles.cuh"

namespace pyfast::cuda {

struct BitmapLinearArgs {
  BitmapWeight<const uint16_t> weight;
  const uint16_t* x;
  int64_t x_stride;      // elements from token to token
  int32_t tokens, k;     // k: columns of x that may be read
  int32_t split_stages;  // of a block
  int32_t room;          // bitmap_room, of bitmap_stream.cuh
  float* partial;        // split_sums.cuh
  Epilogue out;
  int64_t token_tiles[8];  // of bitmap_linear_kernel: bytes from x to the first row of each token tile
};

template <int TokenTiles>
struct BitmapLinearPlan {
  static constexpr int kTokens = 8 * TokenTiles;
  static constexpr int kRowTiles = TokenTiles <= 2 ? 1 : 2;        // of a warp
  static constexpr int kColumnTiles = 2 / kRowTiles;               // of a stage
  static constexpr int kRowWarps = 2;                              // one below the other
  static constexpr int kColumnWarps = 2;                           // side by side, their sums are added
  static constexpr int kStageTiles = kColumnTiles * kColumnWarps;  // of a block
  static constexpr int kWarps = kRowWarps * kColumnWarps;
  static constexpr int kThreads = 32 * kWarps;
  // Of a multiprocessor, as the registers are meant to allow.
  static constexpr int kBlocks = TokenTiles <= 2 ? 8 : TokenTiles == 4 ? 4 : 2;
  static constexpr int kRows = kTileRows * kRowTiles * kRowWarps;
  static constexpr bool kOverlaps = TokenTiles > 2;  // begins early and lets the next grid begin (split_launch.h)
  static constexpr int kRingBytes = 4096, kRingSpace = kRingBytes + kRingMirrorBytes;
  static constexpr int kSumStride = kRows + 4;  // floats from token to token: the four tokens of a store differ in bank
  static constexpr int kSumBytes = kTokens * kSumStride * 4;  // of the warps of a column
  static constexpr int kAllSumBytes = kColumnWarps * kSumBytes, kPipelineBytes = kWarps * kRowTiles * kRingSpace;
  static constexpr int kSharedBytes = kPipelineBytes > kAllSumBytes ? kPipelineBytes : kAllSumBytes;
};

#if defined(PYFAST_KERNELS)

template <class T, int TokenTiles>
__global__ void __launch_bounds__(BitmapLinearPlan<TokenTiles>::kThreads, BitmapLinearPlan<TokenTiles>::kBlocks)
    bitmap_linear_kernel(const BitmapLinearArgs args) {
  using Plan = BitmapLinearPlan<TokenTiles>;
  using Ring = BitmapRing<Plan::kRingBytes, Plan::kRingBytes / 4>;
  PYFAST_DYNAMIC_SHARED(shared);
  if constexpr (Plan::kOverlaps) {
    ptx::launch_dependents();
    ptx::wait_prerequisites();
  }
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
  const int row_warp = static_cast<int>(threadIdx.x / 32 % Plan::kRowWarps);
  const int part = Plan::kColumnWarps == 1 ? 0 : static_cast<int>(threadIdx.x / (32 * Plan::kRowWarps));
  const int tiles_a_row = static_cast<int>(args.weight.tiles_a_row);

  // `left` tiles from column tile `first` on, of kRowTiles row tiles from `row` on. Below the last one the last one is
  // done once more, and not stored.
  const int row_tiles = static_cast<int>((args.out.n + kTileRows - 1) / kTileRows);
  const int row = (static_cast<int>(blockIdx.y) * Plan::kRowWarps + row_warp) * Plan::kRowTiles;
  const int share = args.split_stages * Plan::kColumnTiles;
  const int first = (static_cast<int>(blockIdx.x) * Plan::kColumnWarps + part) * share;
  int left = row >= row_tiles ? 0 : tiles_a_row - first < share ? tiles_a_row - first : share;

  Ring rings[Plan::kRowTiles];
  const int64_t number = static_cast<int64_t>(row) * tiles_a_row + first;
  const int below = row + 1 < row_tiles ? tiles_a_row : 0;  // from a row tile to the next
  PYFAST_UNROLL
  for (int i = 0; i < Plan::kRowTiles; ++i)
    rings[i].open(args.weight, shared + (warp * Plan::kRowTiles + i) * Plan::kRingSpace, number + i * below, left,
                  lane);
  // The lane's columns of x, of the token g of the first token tile; with up to 8 tokens there may be none.
  const unsigned char* x = reinterpret_cast<const unsigned char*>(args.x) +
                           2 * ((g < args.tokens ? g : 0) * args.x_stride + int64_t{first} * kTileColumns + 16 * t);

  // The bits of the two tiles of a stage, a stage ahead. Where no tile follows, the last one's bits come once more:
  // loads under a condition would be merged with what was there, and waited for at once.
  uint32_t bits[2][2] = {};
  const uint16_t* quarters = reinterpret_cast<const uint16_t*>(args.weight.bitmaps) + number * 64 + lane;
  const auto fetch_bits = [&](bool second) {
    PYFAST_UNROLL
    for (int slot = 0; slot < 2; ++slot) {
      const uint16_t* const from = quarters + (slot == 0 ? 0 : Plan::kRowTiles == 2 ? 64 * below : second ? 64 : 0);
      bits[slot][0] = ptx::ld_global(from);
      bits[slot][1] = ptx::ld_global(from + 32);
    }
  };
  const auto arrive = [] {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::syncwarp();
  };
  if (left > 0) fetch_bits(left > 1);
  PYFAST_UNROLL
  for (int i = 0; i < Plan::kRowTiles; ++i) rings[i].fetch(lane, rings[i].at);

  float sums[Plan::kRowTiles][TokenTiles][4] = {};
  for (; left > 0; left -= Plan::kColumnTiles) {
    uint32_t held[2];
    arrive();
    PYFAST_UNROLL
    for (int slot = 0; slot < 2; ++slot) held[slot] = bits[slot][0] | bits[slot][1] << 16;
    if (Plan::kColumnTiles == 2 && left == 1) held[1] = 0;  // none is there
    BitmapRuns runs[2];
    uint32_t begin[Plan::kRowTiles], at[Plan::kRowTiles][2];
    count_runs(held, runs);
    if (left > Plan::kColumnTiles) quarters += 64 * Plan::kColumnTiles;
    fetch_bits(left > Plan::kColumnTiles + 1);

    // Half of a tile's columns: steps 2·half and 2·half + 1.
    const auto multiply = [&](auto half, int right) {
      constexpr int kHalf = decltype(half)::value;
      uint32_t b[TokenTiles][2][2];
      PYFAST_UNROLL
      for (int token_tile = 0; token_tile < TokenTiles; ++token_tile) {
        const unsigned char* const from =
            x + (token_tile == 0 ? 0 : args.token_tiles[token_tile]) + 2 * right * kTileColumns + 16 * kHalf;
        const Words4 words = ptx::ld_global(reinterpret_cast<const Words4*>(from));
        b[token_tile][0][0] = words.x, b[token_tile][0][1] = words.y;
        b[token_tile][1][0] = words.z, b[token_tile][1][1] = words.w;
      }
      uint32_t upper[Plan::kRowTiles][4], lower[Plan::kRowTiles][4];
      PYFAST_UNROLL
      for (int i = 0; i < Plan::kRowTiles; ++i) {
        expand_half<0, kHalf>(runs[i + right], at[i][0], upper[i]);
        expand_half<1, kHalf>(runs[i + right], at[i][1], lower[i]);
      }
      PYFAST_UNROLL
      for (int token_tile = 0; token_tile < TokenTiles; ++token_tile) {
        PYFAST_UNROLL
        for (int step = 0; step < 2; ++step) PYFAST_UNROLL
        for (int i = 0; i < Plan::kRowTiles; ++i) {
          const uint32_t a[4] = {upper[i][2 * step], lower[i][2 * step], upper[i][2 * step + 1],
                                 lower[i][2 * step + 1]};
          ptx::mma_m16n8k16<T>(sums[i][token_tile], a, b[token_tile][step], sums[i][token_tile]);
        }
      }
    };
    PYFAST_UNROLL
    for (int right = 0; right < Plan::kColumnTiles; ++right) {
      if (right > 0 && left <= right) break;
      if (right > 0) ptx::syncwarp();  // the tile on the left is written over
      bool late = false;
      PYFAST_UNROLL
      for (int i = 0; i < Plan::kRowTiles; ++i) {
        const uint32_t arrived = rings[i].fetched;
        if (right == Plan::kColumnTiles - 1) rings[i].fetch(lane, rings[i].at);
        begin[i] = rings[i].at;
        rings[i].take(runs[i + right], at[i]);
        late = late || rings[i].at > arrived;
      }
      if (late) {
        PYFAST_UNROLL
        for (int i = 0; i < Plan::kRowTiles; ++i) {
          if (rings[i].at > rings[i].end) runs[i + right].bits = 0;
          if (right < Plan::kColumnTiles - 1) rings[i].fetch(lane, begin[i]);
        }
        arrive();
      }
      multiply(std::integral_constant<int, 0>{}, right);
      multiply(std::integral_constant<int, 1>{}, right);
    }
    x += 2 * Plan::kColumnTiles * kTileColumns;
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::syncthreads();

  float* const totals = reinterpret_cast<float*>(shared);
  float* const own = totals + part * (Plan::kSumBytes / 4) + row_warp * Plan::kRowTiles * kTileRows + g;
  store_token_sums<Plan::kSumStride, kTileRows, 8>(own, sums, args.tokens);
  ptx::syncthreads();
  finish_sums<T, Plan::kThreads, Plan::kTokens, Plan::kRows, Plan::kSumStride, Plan::kColumnWarps, Plan::kSumBytes / 4>(
      totals, args.out, args.partial, args.tokens, 0, static_cast<int64_t>(blockIdx.y) * Plan::kRows);
}

#endif

}  // namespace pyfast::cuda
