// Backward of bitmap_linear at a fixed pattern, 16-bit elements, float32 sums, with the stored weight
// (bitmap_tiles.cuh):
//
//   grad_x [tokens, k] = grad·W         up to 32 tokens; more of them decompress and use the dense library
//   grad_values [stored]: Σ over tokens of grad[token, row]·x[token, column], for the stored places alone
//
// grad_x moves the weight's bytes once, as the forward product does, with the same decode (bitmap_expand.cuh), and
// multiplies by grad_x_tiles.cuh. A warp goes down a part of a column of tiles, two a stage; the four warps of a block
// have parts below each other. Tiles below each other do not follow each other in memory: each has a slot that a full
// tile fits in, and its offsets are read. grad comes from L2, 16·tokens elements for each tile.
//
// Instructions of a warp for a tile, counted in the code for sm_90: about 205 at 8 tokens and 240 at 32, and 12 for
// each 512 bytes of values.
//
// grad_values sums by grad_values_tiles.cuh and stores d·n·k of the values.
//
// Resources:
//
//   bitmap_grad_x_kernel<T, 1>         80 registers    33024 bytes of shared memory    up to 8 tokens
//   bitmap_grad_x_kernel<T, 4>        152 registers    34816 bytes of shared memory    up to 32; 156 on sm_100
//   bitmap_grad_values_kernel<T>      128 registers    49152 bytes of shared memory
//   reduce_splits_kernel<T>            40 registers        0 bytes of shared memory
#pragma once

#include "bitmap_convert.cuh"
#include "bitmap_linear.cuh"
#include "grad_values_tiles.cuh"
#include "grad_x_tiles.cuh"

namespace pyfast::cuda {

inline constexpr int kBitmapGradXWarps = 4;  // of a block, one below the other

template <int TokenTiles>
struct BitmapGradXPlan : GradXSums<TokenTiles, kTileColumns, kBitmapGradXWarps> {
  static constexpr int kWarps = kBitmapGradXWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = 2;  // of a warp's stage
  static constexpr int kStageTiles = kRowTiles * kWarps;
  static constexpr int kSlotBytes = 2 * kTileElements + 16;  // of a tile's values, which may begin within a chunk
  static constexpr int kPipelineBytes = kWarps * 2 * kRowTiles * kSlotBytes;
  static constexpr int kSharedBytes = BitmapGradXPlan::or_sums(kPipelineBytes);
};

static_assert(kTileRows == kGradXRows && kTileColumns == kGradXColumns);

struct BitmapGradValuesArgs {
  GradValuesOperands operands;
  BitmapWeight<uint16_t> weight;  // the values are written
};

#if defined(PYFAST_KERNELS)

// Once in a launch, of one tile. Below sm_90 a call: inside of the loops it would take a register more than they have.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
static __device__ __noinline__ void
#else
PYFAST_DEVICE void
#endif
call_copy_last_chunk(unsigned char* to, const unsigned char* from, int bytes) {
  copy_last_chunk(to, from, bytes);
}

// args.x is grad [tokens, n], n padded with zeros to args.k, a multiple of 16; args.out.n the columns of W. Grid: x
// over the splits of the rows of W, y over the columns of tiles.
template <class T, int TokenTiles>
__global__ void __launch_bounds__(BitmapGradXPlan<TokenTiles>::kThreads)
    bitmap_grad_x_kernel(const BitmapLinearArgs args) {
  using Plan = BitmapGradXPlan<TokenTiles>;
  PYFAST_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int tiles_a_row = static_cast<int>(args.weight.tiles_a_row), row_tiles = args.k / kTileRows;

  // `left` tiles from row tile `first` on. Tiles 0 and 1 are those of a stage.
  const int share = args.split_stages * Plan::kRowTiles;
  const int first = (static_cast<int>(blockIdx.x) * Plan::kWarps + warp) * share;
  int left = row_tiles - first < share ? row_tiles - first : share;
  const int64_t number = static_cast<int64_t>(first) * tiles_a_row + blockIdx.y;
  const int64_t* offsets = args.weight.offsets + number;
  const uint16_t* quarters = reinterpret_cast<const uint16_t*>(args.weight.bitmaps) + number * 64 + lane;
  const unsigned char* grad = first_grad(args, int64_t{first} * kTileRows);

  // The bits of a stage are fetched a stage ahead, where its values begin and end two stages. Where no tile follows,
  // those of another one come once more: bitmap_linear.cuh says why.
  uint32_t bits[2][2] = {};
  int64_t begins[2] = {}, ends[2] = {};
  const auto fetch_bits = [&](bool second) {
    PYFAST_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      const uint16_t* const from = quarters + (tile == 1 && second ? 64 * tiles_a_row : 0);
      bits[tile][0] = ptx::ld_global(from);
      bits[tile][1] = ptx::ld_global(from + 32);
    }
  };
  const auto fetch_offsets = [&](bool second) {
    PYFAST_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      const int64_t* const from = offsets + (tile == 1 && second ? tiles_a_row : 0);
      begins[tile] = from[0];
      ends[tile] = from[1];
    }
  };
  // Begins to copy the values of a stage into its slots. Of each tile: where its values begin in the slot, and their
  // bytes, −1 where the table is damaged.
  unsigned char* const slots = shared + warp * 2 * Plan::kRowTiles * Plan::kSlotBytes;
  int stage = 0, heads[2] = {}, sizes[2] = {};
  const auto fetch_values = [&](int there) {
    PYFAST_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      const uint64_t begin = static_cast<uint64_t>(begins[tile]), end = static_cast<uint64_t>(ends[tile]);
      const uint64_t stored = static_cast<uint64_t>(args.weight.stored);
      const bool sound = begin <= stored && end <= stored && end - begin <= kTileElements;
      heads[tile] = 2 * static_cast<int>(begin & 7);
      sizes[tile] = sound ? 2 * static_cast<int>(end - begin) : -1;
      if (there <= tile || !sound) continue;
      unsigned char* to = slots + (2 * stage + tile) * Plan::kSlotBytes + 16 * lane;
      const unsigned char* from =
          reinterpret_cast<const unsigned char*>(args.weight.values) + 2 * (begin - (begin & 7)) + 16 * lane;
      int rest = heads[tile] + sizes[tile] - 16 * lane;
      if (stored - end >= 8) rest = (rest + 15) & ~15;  // the last chunk may be read whole
      PYFAST_UNROLL_NOT
      for (; rest >= 16; rest -= 512, to += 512, from += 512) ptx::cp_async<16>(to, from);
      if (rest > 0) call_copy_last_chunk(to, from, rest);
    }
  };
  const auto arrive = [] {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::syncwarp();
  };
  // To the next stage, where there is one.
  const auto next_bits = [&](int there) {
    if (there > 0) quarters += 128 * int64_t{tiles_a_row};
    fetch_bits(there > 1);
  };
  const auto next_offsets = [&](int there) {
    if (there > 0) offsets += 2 * int64_t{tiles_a_row};
    fetch_offsets(there > 1);
  };
  if (left > 0) {
    fetch_bits(left > 1);
    fetch_offsets(left > 1);
    fetch_values(left);
    next_offsets(left - 2);
  }

  float sums[4][TokenTiles][4] = {};
  for (; left > 0; left -= 2) {
    BitmapRuns runs[2];
    uint32_t held[2], from[2][2];
    arrive();
    PYFAST_UNROLL
    for (int tile = 0; tile < 2; ++tile) held[tile] = bits[tile][0] | bits[tile][1] << 16;
    count_runs(held, runs);
    PYFAST_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      const uint32_t begin =
          ptx::shared_address(slots + (2 * stage + tile) * Plan::kSlotBytes) + static_cast<uint32_t>(heads[tile]);
      const uint32_t end = place_runs(runs[tile], begin, from[tile]);
      if (end - begin != static_cast<uint32_t>(sizes[tile])) runs[tile].bits = 0;
    }
    next_bits(left - 2);
    stage ^= 1;
    fetch_values(left - 2);
    next_offsets(left - 4);

    PYFAST_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      if (left <= tile) break;
      uint32_t b[TokenTiles][2];
      load_grad(b, grad + 2 * kTileRows * tile, args.token_tiles);
      const auto multiply = [&](auto half) {
        constexpr int kHalf = decltype(half)::value;
        uint32_t upper[4], lower[4];
        expand_half<0, kHalf>(runs[tile], from[tile][0], upper);
        expand_half<1, kHalf>(runs[tile], from[tile][1], lower);
        multiply_transposed<T, kHalf>(sums, upper, lower, b);
      };
      multiply(std::integral_constant<int, 0>{});
      multiply(std::integral_constant<int, 1>{});
    }
    grad += 2 * Plan::kRowTiles * kTileRows;
  }
  ptx::syncthreads();
  finish_grad_x<T, Plan>(shared, sums, args, warp, 0);
}

// Grid: x over 128 columns, y over 128 rows of W. 8 warps, 4 down and 2 across: 2 row tiles and a column tile each.
template <class T>
__global__ void __launch_bounds__(GradValuesPlan::kThreads, 2)
    bitmap_grad_values_kernel(const BitmapGradValuesArgs args) {
  using Plan = GradValuesPlan;
  PYFAST_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_row = warp / 2 * Plan::kWarpRows, warp_column = warp % 2 * Plan::kWarpColumns;
  const int first_row = static_cast<int>(blockIdx.y) * Plan::kRows;
  const int first_column = static_cast<int>(blockIdx.x) * Plan::kColumns;
  float sums[2][8][4] = {};  // row tile, 8 columns each
  sum_tokens<T>(sums, shared, args.operands, first_row, first_column, warp_row, warp_column);

  // The sums at the stored places, a tile after the other, through shared memory.
  uint16_t* const staged = reinterpret_cast<uint16_t*>(shared) + warp * (kTileElements + 8);
  const int64_t row_tile = (first_row + warp_row) / kTileRows;
  const int column_tile = (first_column + warp_column) / kTileColumns;
  if (column_tile >= static_cast<int>(args.weight.tiles_a_row)) return;
  PYFAST_UNROLL
  for (int tile = 0; tile < 2; ++tile) {
    const int64_t at = (row_tile + tile) * args.weight.tiles_a_row + column_tile;
    if (at >= args.weight.tiles) return;
    const int64_t begin = args.weight.offsets[at];
    const BitmapPlaces places = bitmap_places(args.weight.bitmaps, static_cast<uint32_t>(at), lane);
    uint16_t* const values = staged + (begin & 7);
    PYFAST_UNROLL
    for (int half_row = 0; half_row < 4; ++half_row) {  // of the rows g and g + 8
      const int from = 2 * (g + half_row / 2 * 8) + half_row % 2;
      const uint32_t word = ptx::shfl(places.word, from), before = ptx::shfl(places.before, from);
      PYFAST_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int bit = 8 * j + 2 * t;
        const float* const pair = sums[tile][half_row % 2 * 4 + j] + half_row / 2 * 2;
        uint16_t* to = values + before + ptx::popc(word & ((1u << bit) - 1u));
        if (word >> bit & 1u) *to++ = ptx::from_float<T>(pair[0]).bits;
        if (word >> bit & 2u) *to = ptx::from_float<T>(pair[1]).bits;
      }
    }
    ptx::syncwarp();
    store_staged(args.weight, staged, begin, places.count, lane);
    ptx::syncwarp();
  }
}

#endif

}  // namespace pyfast::cuda
