// Backward of bitmap_linear at a fixed pattern, 16-bit elements, float32 sums, with the stored weight
// (bitmap_tiles.cuh):
//
//   grad_x [tokens, k] = grad·W         up to 32 tokens; more of them decompress and use the dense library
//   grad_values [stored]: Σ over tokens of grad[token, row]·x[token, column], for the stored places alone
//
// grad_x moves the weight's bytes once, as the forward product does, with the same pipeline and the same decode. A warp
// goes down a column of tiles. W is wanted transposed: the registers of a quarter row (columns 16t + 2p and + 1 of the
// row g, for lane 4g + t) are an 8×8 matrix of rows against columns, and movmatrix, one instruction, turns it into the
// fragment of Wᵀ:
//
//   a[0]  columns 16(g / 2) + 4q + g % 2,      rows 2t, 2t + 1       c[0], c[1]  these columns, tokens 2t, 2t + 1
//   a[1]  columns 16(g / 2) + 4q + 2 + g % 2,  the same rows         c[2], c[3]  the columns of a[1]
//   a[2]  columns of a[0], rows 2t + 8, 2t + 9
//   a[3]  columns of a[1], the same                                  q = 0 … 3: 16 columns each
//
// grad_values does the dense product's arithmetic, 2·n·k·tokens, tile by tile of 128 × 128, and stores d·n·k values: no
// dense matrix of n·k is written or held, and reading grad and x again from L2 costs 2·(1/128 + 1/128) bytes for each
// multiplication. Both operands have the summed index, the token, as their outer one: ldmatrix.trans. At many tokens
// mma.sync reaches about 60 % of what the dense library does on an H100; what is bought is the memory.
//
// Resources (the shared memory of grad_x depends on the density, here at 50 %):
//
//   bitmap_grad_x_kernel<T, 1>         80 registers    39552 bytes of shared memory    up to 8 tokens
//   bitmap_grad_x_kernel<T, 4>        160 registers    44160 bytes of shared memory    up to 32
//   bitmap_grad_values_kernel<T>      128 registers    49152 bytes of shared memory
//   reduce_splits_kernel<T>            40 registers        0 bytes of shared memory
#pragma once

#include "bitmap_convert.cuh"
#include "bitmap_linear.cuh"
#include "bitmap_stream.cuh"

namespace pyfast::cuda {

template <int TokenTiles>
struct BitmapGradXPlan {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTokens = 8 * TokenTiles;
  static constexpr int kRowTiles = 2;  // of a stage
  static constexpr int kRows = kRowTiles * kTileRows;
  static constexpr int kColumns = kTileColumns * kWarps;
  static constexpr int kStages = 3;
  static constexpr int kGradBytes = kTokens * kRows * 2;  // of a stage
  static constexpr int kSumStride = kColumns + 4;         // floats from token to token

  static PYFAST_HOST_DEVICE constexpr int stage_bytes(int room) {
    return kGradBytes + kWarps * 2 * (kTileBitmapBytes + room);
  }
  static PYFAST_HOST_DEVICE constexpr int shared_bytes(int room) {
    const int pipeline = kStages * stage_bytes(room) + kWarps * 2 * kStages * 4 * 8;
    const int sums = kTokens * kSumStride * 4;
    return pipeline > sums ? pipeline : sums;
  }
};

struct BitmapGradValuesPlan {
  static constexpr int kThreads = 256;
  static constexpr int kRows = 128, kColumns = 128;
  static constexpr int kTokens = 32;                   // of a stage
  static constexpr int kOperandBytes = kTokens * 256;  // grad or x of a stage
  static constexpr int kStages = 3;
  static constexpr int kSharedBytes = kStages * 2 * kOperandBytes;
};

struct BitmapGradValuesArgs {
  const uint16_t *grad, *x;       // [tokens, n], [tokens, k]: rows at multiples of 16 bytes
  int64_t grad_stride, x_stride;  // elements from token to token
  int64_t tokens;
  int32_t grad_columns, x_columns;  // that may be read, multiples of 8
  BitmapWeight<uint16_t> weight;    // the values are written
};

#if defined(PYFAST_KERNELS)

// The 16 columns of a run whose values lie in global memory.
PYFAST_DEVICE void gather_run(uint32_t bits, const uint16_t* values, uint32_t (&words)[2][4]) {
  PYFAST_UNROLL
  for (int pair = 0; pair < 8; ++pair) {
    uint32_t first = 0, second = 0;
    if (bits >> 2 * pair & 1u) first = *values++;
    if (bits >> 2 * pair & 2u) second = *values++;
    words[pair / 4][pair % 4] = ptx::byte_permute(first, second, 0x5410u);
  }
}

// [warp] The elements of a tile that lies in a slot of the stream: upper[half][i] holds columns 16t + 8·half + 2i and +
// 1 of the row g, lower those of the row g + 8.
template <class Stream>
PYFAST_DEVICE void expand_tile(const Stream& stream, const unsigned char* slot, const typename Stream::Tile& tile,
                               uint32_t (&upper)[2][4], uint32_t (&lower)[2][4]) {
  const uint16_t* const quarters = reinterpret_cast<const uint16_t*>(slot) + stream.lane;
  BitmapRuns runs = bitmap_runs(static_cast<uint32_t>(quarters[0]) | static_cast<uint32_t>(quarters[32]) << 16);
  if (ptx::dot2(runs.total, 0x0101u, 0) != static_cast<uint32_t>(2 * tile.count)) runs.bits = 0;
  if (tile.fits) {
    const uint32_t values = ptx::shared_address(slot + kTileBitmapBytes) + static_cast<uint32_t>(2 * tile.head);
    uint32_t from[2];
    bitmap_runs_begin(runs, values, from);
    expand_half<0, 0>(runs, from[0], upper[0]);
    expand_half<0, 1>(runs, from[0], upper[1]);
    expand_half<1, 0>(runs, from[1], lower[0]);
    expand_half<1, 1>(runs, from[1], lower[1]);
  } else {
    uint32_t from[2];
    bitmap_runs_begin(runs, 0, from);
    gather_run(runs.bits & 0xffffu, stream.weight.values + tile.begin + from[0] / 2, upper);
    gather_run(runs.bits >> 16, stream.weight.values + tile.begin + from[1] / 2, lower);
  }
}

// args.x is grad [tokens, n], args.k its columns that may be read, args.out.n the columns of W. Grid: x over the splits
// of the rows of W, y over 256 columns.
template <class T, int TokenTiles>
__global__ void __launch_bounds__(BitmapGradXPlan<TokenTiles>::kThreads)
    bitmap_grad_x_kernel(const BitmapLinearArgs args) {
  using Plan = BitmapGradXPlan<TokenTiles>;
  using Stream = BitmapStream<Plan::kStages, 2, true>;
  PYFAST_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int stage_bytes = Plan::stage_bytes(args.room);
  const int row_tiles = static_cast<int>(args.weight.tiles / args.weight.tiles_a_row);
  const int all_stages = (row_tiles + 1) / 2, first_stage = static_cast<int>(blockIdx.x) * args.split_stages;
  const Stream stream{args.weight,
                      shared + Plan::kGradBytes + warp * 2 * (kTileBitmapBytes + args.room),
                      stage_bytes,
                      args.room,
                      reinterpret_cast<int64_t*>(shared + Plan::kStages * stage_bytes) + warp * 8 * Plan::kStages,
                      static_cast<int64_t>(first_stage) * 2,
                      static_cast<int>(blockIdx.y) * Plan::kWarps + warp,
                      all_stages - first_stage < args.split_stages ? all_stages - first_stage : args.split_stages,
                      lane};

  // Chunk c of token m lies at c ^ (m / 2 % 4): eight tokens of a chunk meet no bank twice.
  const auto fetch_grad = [&](int stage) {
    if (stage >= stream.stages) return;
    unsigned char* const to = shared + stage % Plan::kStages * stage_bytes;
    for (int i = thread; i < Plan::kTokens * 4; i += Plan::kThreads) {
      const int token = i / 4, chunk = i % 4, row = (first_stage + stage) * Plan::kRows + 8 * chunk;
      const bool there = token < args.tokens && row < args.k;
      ptx::cp_async<16>(to + token * 64 + (chunk ^ (token / 2 & 3)) * 16,
                        args.x + (there ? token * args.x_stride + row : 0), there ? 16 : 0);
    }
  };
  stream.begin(fetch_grad);

  float sums[4][TokenTiles][4] = {};
  for (int stage = 0; stage < stream.stages; ++stage) {
    ptx::cp_async_wait<Plan::kStages - 2>();
    ptx::syncthreads();
    fetch_grad(stage + Plan::kStages - 1);
    stream.fetch(stage + Plan::kStages - 1);
    ptx::cp_async_commit();
    const unsigned char* const grad = shared + stage % Plan::kStages * stage_bytes;
    const unsigned char* const slots = stream.slots + stage % Plan::kStages * stage_bytes;
    PYFAST_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      uint32_t upper[2][4], lower[2][4];
      expand_tile(stream, slots + tile * stream.slot_bytes(), stream.tile_of(stage, tile), upper, lower);
      PYFAST_UNROLL
      for (int pair = 0; pair < 8; ++pair) {
        upper[pair / 4][pair % 4] = ptx::transpose_matrix(upper[pair / 4][pair % 4]);
        lower[pair / 4][pair % 4] = ptx::transpose_matrix(lower[pair / 4][pair % 4]);
      }
      PYFAST_UNROLL
      for (int token_tile = 0; token_tile < TokenTiles; ++token_tile) {
        const int token = 8 * token_tile + lane % 8, chunk = 2 * tile + lane / 8 % 2;
        uint32_t b[2];
        ptx::ldmatrix<2>(b, grad + token * 64 + (chunk ^ (token / 2 & 3)) * 16);
        PYFAST_UNROLL
        for (int q = 0; q < 4; ++q) {
          const int half = q / 2, pair = q % 2 * 2;
          const uint32_t a[4] = {upper[half][pair], upper[half][pair + 1], lower[half][pair], lower[half][pair + 1]};
          ptx::mma_m16n8k16<T>(sums[q][token_tile], a, b, sums[q][token_tile]);
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
  ptx::syncthreads();

  float* const totals = reinterpret_cast<float*>(shared);
  float* const own = totals + warp * kTileColumns + 16 * (g / 2) + g % 2;
  PYFAST_UNROLL
  for (int q = 0; q < 4; ++q) PYFAST_UNROLL
  for (int token_tile = 0; token_tile < TokenTiles; ++token_tile) PYFAST_UNROLL
  for (int i = 0; i < 4; ++i)
    own[(8 * token_tile + 2 * t + i % 2) * Plan::kSumStride + 4 * q + i / 2 * 2] = sums[q][token_tile][i];
  ptx::syncthreads();
  finish_sums<T, Plan::kThreads, Plan::kTokens, Plan::kColumns, Plan::kSumStride>(
      totals, args.out, args.partial, args.tokens, 0, static_cast<int64_t>(blockIdx.y) * Plan::kColumns);
}

// Begins the copies of 32 tokens × 128 columns from `column` on; chunk c of token m lies at c ^ (m & 7).
PYFAST_DEVICE void fetch_operand(unsigned char* to, const uint16_t* from, int64_t stride, int columns, int64_t tokens,
                                 int64_t first_token, int column) {
  PYFAST_UNROLL
  for (int i = static_cast<int>(threadIdx.x); i < BitmapGradValuesPlan::kTokens * 16;
       i += BitmapGradValuesPlan::kThreads) {
    const int token = i / 16, chunk = i % 16, at = column + 8 * chunk;
    const bool there = first_token + token < tokens && at < columns;
    ptx::cp_async<16>(to + token * 256 + (chunk ^ (token & 7)) * 16,
                      from + (there ? (first_token + token) * stride + at : 0), there ? 16 : 0);
  }
}

// Grid: x over 128 columns, y over 128 rows of W. 8 warps, 4 down and 2 across: 2 row tiles and a column tile each.
template <class T>
__global__ void __launch_bounds__(BitmapGradValuesPlan::kThreads, 2)
    bitmap_grad_values_kernel(const BitmapGradValuesArgs args) {
  using Plan = BitmapGradValuesPlan;
  PYFAST_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * kTileColumns;
  const int first_row = static_cast<int>(blockIdx.y) * Plan::kRows;
  const int first_column = static_cast<int>(blockIdx.x) * Plan::kColumns;
  const int stages = static_cast<int>((args.tokens + Plan::kTokens - 1) / Plan::kTokens);

  const auto fetch = [&](int stage) {
    if (stage < stages) {
      unsigned char* const to = shared + stage % Plan::kStages * 2 * Plan::kOperandBytes;
      const int64_t token = static_cast<int64_t>(stage) * Plan::kTokens;
      fetch_operand(to, args.grad, args.grad_stride, args.grad_columns, args.tokens, token, first_row);
      fetch_operand(to + Plan::kOperandBytes, args.x, args.x_stride, args.x_columns, args.tokens, token, first_column);
    }
    ptx::cp_async_commit();
  };
  for (int stage = 0; stage < Plan::kStages - 1; ++stage) fetch(stage);

  float sums[2][8][4] = {};  // row tile, 8 columns each
  for (int stage = 0; stage < stages; ++stage) {
    ptx::cp_async_wait<Plan::kStages - 2>();
    ptx::syncthreads();
    fetch(stage + Plan::kStages - 1);
    const unsigned char* const grad = shared + stage % Plan::kStages * 2 * Plan::kOperandBytes;
    const unsigned char* const x = grad + Plan::kOperandBytes;
    PYFAST_UNROLL
    for (int step = 0; step < Plan::kTokens / 16; ++step) {
      uint32_t a[2][4];
      PYFAST_UNROLL
      for (int tile = 0; tile < 2; ++tile) {
        const int token = 16 * step + lane / 16 * 8 + lane % 8;
        const int chunk = (warp_row + 16 * tile) / 8 + lane / 8 % 2;
        ptx::ldmatrix<4, true>(a[tile], grad + token * 256 + (chunk ^ (token & 7)) * 16);
      }
      PYFAST_UNROLL
      for (int columns = 0; columns < 4; ++columns) {  // 16 each
        const int token = 16 * step + lane / 8 % 2 * 8 + lane % 8;
        const int chunk = (warp_column + 16 * columns) / 8 + lane / 16;
        uint32_t b[4];
        ptx::ldmatrix<4, true>(b, x + token * 256 + (chunk ^ (token & 7)) * 16);
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
        PYFAST_UNROLL
        for (int tile = 0; tile < 2; ++tile) {
          ptx::mma_m16n8k16<T>(sums[tile][2 * columns], a[tile], left, sums[tile][2 * columns]);
          ptx::mma_m16n8k16<T>(sums[tile][2 * columns + 1], a[tile], right, sums[tile][2 * columns + 1]);
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
  ptx::syncthreads();

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
