// bitmap_linear on tensor cores: y = f(x Wᵀ + bias) · mul with W in bitmap form (bitmap_tiles.cuh), for 5 to 64 tokens.
//
//   x [tokens, k]   16 bits, rows at multiples of 16 bytes (k a multiple of 8)
//   y [tokens, n]   sums and epilogue in float32, rounded once
//
// Bytes. At density d a position costs 2d + 1/8 + 1/128 (values, bitmap, offset) of the dense 2, each read from memory
// once. Every block reads x again, from L2: 8·⌈tokens/8⌉/(8d·rows) of the values' bytes, rows = 64 up to 16 tokens and
// 128 above.
//
// Decode. mma.m16n8k16 adds over columns, in any order that its two operands agree on. In the order chosen here lane
// 4g + t owns columns 16t … 16t + 15 of the rows g and g + 8 of a tile, four of them a step:
//
//   step s, register    a[0]  row g      columns 16t + 4s, + 1        b[0]  x of the token g, columns 16t + 4s, + 1
//                       a[1]  row g + 8  the same                     b[1]                             + 2, + 3
//                       a[2]  row g      columns 16t + 4s + 2, + 3
//                       a[3]  row g + 8  the same
//
// so that a lane's values are two runs of neighbours. Where they begin: one POPC for each run and one scan of both at
// once over the warp, for 1024 positions. From there on the pointer moves by the bits themselves: a predicated 2-byte
// load and a predicated add a position, a PRMT a pair, and no further POPC. x needs no ldmatrix: the 16 columns of a
// lane are two 16-byte loads for all four steps.
//
// Instructions of a warp for a tile, in round numbers: 32 × 4 + 16 to expand, 25 for the scan, 35 to fetch, and 4
// mma.sync, 2 loads for each 8 tokens. An H100 takes 1024 dense positions in 153 cycles of an SM at 3.0 TB/s, in which
// its four schedulers issue 612. The loads from shared memory weigh as much: simulated at random bits, the 32 loads of
// a tile take 69, 52, 40, 31 passes at 50, 70, 80, 90 % (the lanes' runs meet in the banks), and about 25 more go to
// copies, bitmaps, shuffles and x. Predicted at 8 tokens, the larger of bytes, issue at 80 % and passes at 85 %, over
// dense: 1.35, 1.7, 2.0, 2.4 times.
//
// A block is 4 warps. Each does the tiles of its own rows through its own pipeline (bitmap_stream.cuh), two tiles of a
// stage: side by side up to 16 tokens, one below the other above, where they share the loads of x. x of a stage is
// fetched by the whole block, 16-byte chunk c of token m at c ^ (m & 1), so that the loads of two tokens meet no bank
// twice. Where n gives too few blocks, several share the columns (split_sums.cuh).
//
// Resources, those of bitmap_vector.cuh too (tests/test_cuda_build.py compares; the shared memory is the launch's and
// depends on the density: here at 50 %, and for 8 stages of x):
//
//   bitmap_linear_kernel<T, 1>      72 registers    44160 bytes of shared memory    up to 8 tokens
//   bitmap_linear_kernel<T, 2>      80 registers    50304 bytes of shared memory    up to 16
//   bitmap_linear_kernel<T, 4>     128 registers    50304 bytes of shared memory    up to 32
//   bitmap_linear_kernel<T, 8>     168 registers    62592 bytes of shared memory    up to 64
//   bitmap_vector_kernel<T, 1>      56 registers    40064 bytes of shared memory    1 token
//   bitmap_vector_kernel<T, 2>      48 registers    42112 bytes of shared memory    2
//   bitmap_vector_kernel<T, 4>      56 registers    46208 bytes of shared memory    3 and 4
//   reduce_splits_kernel<T>         40 registers        0 bytes of shared memory
#pragma once

#include "bitmap_stream.cuh"
#include "split_sums.cuh"

namespace pyfast::cuda {

struct BitmapLinearArgs {
  BitmapWeight<const uint16_t> weight;
  const uint16_t* x;
  int64_t x_stride;      // elements from token to token
  int32_t tokens, k;     // k: columns of x that may be read
  int32_t split_stages;  // of a block
  int32_t room;          // bitmap_room
  float* partial;        // split_sums.cuh
  Epilogue out;
};

template <int TokenTiles>
struct BitmapLinearPlan {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTokens = 8 * TokenTiles;
  static constexpr int kRowTiles = TokenTiles <= 2 ? 1 : 2;  // of a warp
  static constexpr int kColumnTiles = 2 / kRowTiles;         // of a stage
  static constexpr int kRows = kTileRows * kRowTiles * kWarps;
  static constexpr int kColumns = kTileColumns * kColumnTiles;
  static constexpr int kStages = 3;
  static constexpr int kXBytes = kTokens * kColumns * 2;
  static constexpr int kSumStride = kRows + 4;  // floats from token to token: the four tokens of a store differ in bank

  static PYFAST_HOST_DEVICE constexpr int stage_bytes(int room) {
    return kXBytes + kWarps * 2 * (kTileBitmapBytes + room);
  }
  static PYFAST_HOST_DEVICE constexpr int shared_bytes(int room, int) {
    const int pipeline = kStages * stage_bytes(room) + kWarps * 2 * kStages * 4 * 8;
    const int sums = kTokens * kSumStride * 4;
    return pipeline > sums ? pipeline : sums;
  }
};

#if defined(PYFAST_KERNELS)

// The 16 elements of a quarter row as eight registers: values[0], values[1], … where a bit is set, else zero.
PYFAST_DEVICE void expand_quarter(uint32_t bits, const uint16_t* values, uint32_t (&pairs)[8]) {
  PYFAST_UNROLL
  for (int pair = 0; pair < 8; ++pair) {
    uint32_t first = 0, second = 0;
    if (bits >> 2 * pair & 1u) first = *values++;
    if (bits >> 2 * pair & 2u) second = *values++;
    pairs[pair] = ptx::byte_permute(first, second, 0x5410u);
  }
}

// [warp] The elements of a tile as fragments: upper[2s], lower[2s], upper[2s + 1], lower[2s + 1] are a[0 … 3] of step
// s.
template <class Stream>
PYFAST_DEVICE void expand_tile(const Stream& stream, const unsigned char* slot, const typename Stream::Tile& tile,
                               uint32_t (&upper)[8], uint32_t (&lower)[8]) {
  const uint16_t* const quarters = reinterpret_cast<const uint16_t*>(slot);
  uint32_t first = quarters[stream.lane], second = quarters[32 + stream.lane];
  const uint32_t counts = static_cast<uint32_t>(ptx::popc(first) | ptx::popc(second) << 16);
  const uint32_t scan = inclusive_scan(counts, stream.lane);
  const uint32_t total = ptx::shfl(scan, 31), before = scan - counts;
  const int rows_0_to_7 = static_cast<int>(total & 0xffffu);
  if (rows_0_to_7 + static_cast<int>(total >> 16) != tile.count) first = second = 0;
  const int at = static_cast<int>(before & 0xffffu), below = rows_0_to_7 + static_cast<int>(before >> 16);
  if (tile.fits) {
    const uint16_t* const values = reinterpret_cast<const uint16_t*>(slot + kTileBitmapBytes) + tile.head;
    expand_quarter(first, values + at, upper);
    expand_quarter(second, values + below, lower);
  } else {
    const uint16_t* const values = stream.weight.values + tile.begin;
    expand_quarter(first, values + at, upper);
    expand_quarter(second, values + below, lower);
  }
}

template <class T, int TokenTiles>
__global__ void __launch_bounds__(BitmapLinearPlan<TokenTiles>::kThreads)
    bitmap_linear_kernel(const BitmapLinearArgs args) {
  using Plan = BitmapLinearPlan<TokenTiles>;
  using Stream = BitmapStream<Plan::kStages, Plan::kRowTiles>;
  PYFAST_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int stage_bytes = Plan::stage_bytes(args.room);
  const int all_stages = (static_cast<int>(args.weight.tiles_a_row) + Plan::kColumnTiles - 1) / Plan::kColumnTiles;
  const int first_stage = static_cast<int>(blockIdx.x) * args.split_stages;
  const int64_t first_row_tile = (static_cast<int64_t>(blockIdx.y) * Plan::kWarps + warp) * Plan::kRowTiles;
  const Stream stream{args.weight,
                      shared + Plan::kXBytes + warp * 2 * (kTileBitmapBytes + args.room),
                      stage_bytes,
                      args.room,
                      reinterpret_cast<int64_t*>(shared + Plan::kStages * stage_bytes) + warp * 8 * Plan::kStages,
                      first_row_tile,
                      first_stage * Plan::kColumnTiles,
                      all_stages - first_stage < args.split_stages ? all_stages - first_stage : args.split_stages,
                      lane};

  const auto fetch_x = [&](int stage) {
    if (stage >= stream.stages) return;
    constexpr int kChunks = Plan::kColumns / 8;  // of a token
    unsigned char* const to = shared + stage % Plan::kStages * stage_bytes;
    const int column = (first_stage + stage) * Plan::kColumns;
    PYFAST_UNROLL
    for (int i = thread; i < Plan::kTokens * kChunks; i += Plan::kThreads) {
      const int token = i / kChunks, chunk = i % kChunks;
      const bool there = token < args.tokens && column + 8 * chunk < args.k;
      ptx::cp_async<16>(to + (token * kChunks + (chunk ^ (token & 1))) * 16,
                        args.x + (there ? token * args.x_stride + column + 8 * chunk : 0), there ? 16 : 0);
    }
  };
  stream.begin(fetch_x);

  float sums[Plan::kRowTiles][TokenTiles][4] = {};
  for (int stage = 0; stage < stream.stages; ++stage) {
    ptx::cp_async_wait<Plan::kStages - 2>();
    ptx::syncthreads();
    fetch_x(stage + Plan::kStages - 1);  // where every warp has done the stage before
    stream.fetch(stage + Plan::kStages - 1);
    ptx::cp_async_commit();
    const unsigned char* const x = shared + stage % Plan::kStages * stage_bytes;
    const unsigned char* const slots = stream.slots + stage % Plan::kStages * stage_bytes;
    PYFAST_UNROLL
    for (int column_tile = 0; column_tile < Plan::kColumnTiles; ++column_tile) {
      uint32_t upper[Plan::kRowTiles][8], lower[Plan::kRowTiles][8];
      PYFAST_UNROLL
      for (int row_tile = 0; row_tile < Plan::kRowTiles; ++row_tile) {
        const int tile = column_tile + row_tile;
        expand_tile(stream, slots + tile * stream.slot_bytes(), stream.tile_of(stage, tile), upper[row_tile],
                    lower[row_tile]);
      }
      PYFAST_UNROLL
      for (int token_tile = 0; token_tile < TokenTiles; ++token_tile) {
        const int token = 8 * token_tile + g, chunk = 8 * column_tile + 2 * t;
        const unsigned char* const row = x + token * Plan::kColumns * 2;
        const Words4 b[2] = {*reinterpret_cast<const Words4*>(row + (chunk ^ (token & 1)) * 16),
                             *reinterpret_cast<const Words4*>(row + ((chunk + 1) ^ (token & 1)) * 16)};
        PYFAST_UNROLL
        for (int step = 0; step < 4; ++step) {
          const Words4& words = b[step / 2];
          const uint32_t both[2] = {step % 2 == 0 ? words.x : words.z, step % 2 == 0 ? words.y : words.w};
          PYFAST_UNROLL
          for (int row_tile = 0; row_tile < Plan::kRowTiles; ++row_tile) {
            const uint32_t a[4] = {upper[row_tile][2 * step], lower[row_tile][2 * step], upper[row_tile][2 * step + 1],
                                   lower[row_tile][2 * step + 1]};
            ptx::mma_m16n8k16<T>(sums[row_tile][token_tile], a, both, sums[row_tile][token_tile]);
          }
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
  ptx::syncthreads();

  float* const totals = reinterpret_cast<float*>(shared);
  float* const own = totals + warp * Plan::kRowTiles * kTileRows;
  PYFAST_UNROLL
  for (int row_tile = 0; row_tile < Plan::kRowTiles; ++row_tile) PYFAST_UNROLL
  for (int token_tile = 0; token_tile < TokenTiles; ++token_tile) PYFAST_UNROLL
  for (int i = 0; i < 4; ++i)
    own[(8 * token_tile + 2 * t + i % 2) * Plan::kSumStride + 16 * row_tile + g + i / 2 * 8] =
        sums[row_tile][token_tile][i];
  ptx::syncthreads();
  finish_sums<T, Plan::kThreads, Plan::kTokens, Plan::kRows, Plan::kSumStride>(
      totals, args.out, args.partial, args.tokens, 0, static_cast<int64_t>(blockIdx.y) * Plan::kRows);
}

#endif

}  // namespace pyfast::cuda
