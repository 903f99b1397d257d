// sparse24_linear on tensor cores: y = f(x Wᵀ + bias) · mul with W in 2:4 form.
// Made for 1 to 64 tokens, where the weights' bytes are the bound; many tokens run in tiles of 128.
//
//   x         [tokens, k]       16 bits, rows at multiples of 16 bytes (k a multiple of 8)
//   values    [n, K/2]          16 bits, K = k rounded up to a multiple of 32 (the container pads)
//   metadata  [n, K/16]         uint16, a nibble for each group of four columns (docs/formats.md)
//   y         [tokens, n]       sums in float32, then epilogue.cuh
//
// Bytes. The weights, n·K·9/8, are read from memory once; nothing else counts at few tokens. Every block reads x again,
// from L2: that is 16/9·tokens/rows of the weights' bytes for blocks of `rows` rows, so the block is 32 rows tall up to
// 16 tokens, 64 up to 64 tokens and 128 above. The metadata stay as they are stored: a warp's share of a stage is 8
// bytes a row, so that a lane's two loads of 8 bytes and one byte permutation a step make the word that mma.sp wants. A
// layout of its own would save nothing of the bytes and cost a second copy of them.
//
// Work. A block does `rows` rows of W over its share of the columns, in stages of 8192 positions (32 rows × 256
// columns, 64 × 128 or 128 × 64), kStages of them in shared memory, all but one under way by cp.async:
//
//   a stage    values   rows × columns/2 · 2 bytes    8 KB    in chunks of 16 bytes, swizzled: ldmatrix meets no
//              metadata rows × columns/8 bytes        1 KB    bank twice
//              x        8·TokenTiles × columns · 2 bytes      chunks likewise
//
// Each warp does 32 rows × 64 columns of it for up to 64 tokens: two steps of 32 columns. The 4 warps (8 for tiles of
// 128 tokens) lie along the rows, then the columns, then the tokens. In a step the warp's 32 rows are two tiles of 16,
// stacked, so that one metadata word a lane serves both, by mma.sp's two selectors:
//
//   lane 4g + t     bits 0–15: row g + 16·(t / 2),  bits 16–31: row g + 8 + 16·(t / 2),  columns 16·(t % 2) … + 15
//   instructions    2 ldmatrix (values), T ldmatrix (x), 2·T mma.sp for T tiles of 8 tokens, 1 prmt; 2 loads for both
//
// The warps that share rows add their sums in shared memory, in order. Where n gives too few blocks, `splits` blocks
// share a row tile's columns and their sums are added in order too: through distributed shared memory where they form a
// cluster (sm_90 and up), through float32 partial sums in global memory and reduce_splits_kernel elsewhere. Either
// way the result does not depend on which block is first.
//
// Rows past n repeat the last one and are not stored. Steps past K are skipped, for their metadata would be no legal
// nibbles; columns of x past k and tokens past the last are zero.
//
// Resources (tests/test_cuda_build.py compares; the shared memory is the launch's):
//
//   sparse24_linear_kernel<T, 1>     96 registers    79872 bytes of shared memory    up to 8 tokens
//   sparse24_linear_kernel<T, 2>     96 registers    87040 bytes of shared memory    up to 16
//   sparse24_linear_kernel<T, 4>    128 registers    87040 bytes of shared memory    up to 32
//   sparse24_linear_kernel<T, 8>    168 registers    76800 bytes of shared memory    up to 64
//   sparse24_linear_kernel<T, 16>   168 registers    76800 bytes of shared memory    any number
//   reduce_splits_kernel<T>          40 registers        0 bytes of shared memory
#pragma once

#include "split_sums.cuh"

namespace pyfast::cuda {

struct Sparse24LinearArgs {
  const uint16_t* x;
  const uint16_t* values;
  const uint16_t* metadata;
  Epilogue out;
  float* partial;  // [splits, tokens, n]; null where the splits are one or form a cluster
  int64_t n;
  int64_t x_stride;  // elements from token to token
  int32_t tokens, k, padded_k;
  int32_t split_columns;  // of a block, a multiple of the stage's
  bool wide_metadata;     // its rows lie at multiples of 16 bytes
};

template <int TokenTiles>
struct Sparse24Plan {
  static constexpr int kTokens = 8 * TokenTiles;
  static constexpr int kRows = TokenTiles <= 2 ? 32 : TokenTiles <= 8 ? 64 : 128;
  static constexpr int kColumns = 8192 / kRows;
  static constexpr int kWarpColumns = 64;
  static constexpr int kWarpTiles = TokenTiles <= 8 ? TokenTiles : 8;  // of 8 tokens
  static constexpr int kWarpsAlongColumns = kColumns / kWarpColumns;
  static constexpr int kWarpsAlongRows = kRows / 32;
  static constexpr int kThreads = 32 * kWarpsAlongRows * kWarpsAlongColumns * (TokenTiles / kWarpTiles);
  static constexpr int kStages = TokenTiles == 1 ? 6 : TokenTiles >= 8 ? 3 : 5;
  static constexpr int kValueChunks = kColumns / 16;  // of 16 bytes, a row
  static constexpr int kXChunks = kColumns / 8;
  static constexpr int kMetadataBytes = kColumns / 8;  // a row
  static constexpr int kMetadataChunk = kMetadataBytes < 16 ? kMetadataBytes : 16;
  static constexpr int kMetadataAt = kRows * kValueChunks * 16;
  static constexpr int kXAt = kMetadataAt + kRows * kMetadataBytes;
  static constexpr int kStageBytes = kXAt + kTokens * kXChunks * 16;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kSumStride = kRows + 4;  // floats from token to token: the four tokens of a store differ in bank
  static_assert(kWarpsAlongColumns * kTokens * kSumStride * 4 <= kSharedBytes);
};

#if defined(PYFAST_KERNELS)

// Where chunk `chunk` of 16 bytes of row `row` lies among rows of Chunks chunks: eight rows' chunks of one number,
// which an ldmatrix reads together, lie in all 32 banks.
template <int Chunks>
PYFAST_DEVICE int swizzled(int row, int chunk) {
  static_assert(Chunks == 4 || Chunks % 8 == 0);
  return (row * Chunks + (chunk ^ (Chunks == 4 ? row / 2 % 4 : row % 8))) * 16;
}

// Begins the copies of the stage whose first column is `column` into `stage`.
template <int TokenTiles>
PYFAST_DEVICE void sparse24_fetch(const Sparse24LinearArgs& args, unsigned char* stage, int64_t first_row,
                                  int first_token, int column) {
  using Plan = Sparse24Plan<TokenTiles>;
  const int thread = static_cast<int>(threadIdx.x);
  const auto row_of = [&](int row) { return first_row + row < args.n ? first_row + row : args.n - 1; };
  PYFAST_UNROLL
  for (int i = thread; i < Plan::kRows * Plan::kValueChunks; i += Plan::kThreads) {
    const int row = i / Plan::kValueChunks, chunk = i % Plan::kValueChunks;
    const int at = column + chunk * 16;
    const bool there = at < args.padded_k;
    const uint16_t* const from = args.values + row_of(row) * (args.padded_k / 2) + (there ? at / 2 : 0);
    ptx::cp_async<16>(stage + swizzled<Plan::kValueChunks>(row, chunk), from, there ? 16 : 0);
  }
  constexpr int kChunk = Plan::kMetadataChunk, kMetadataChunks = Plan::kMetadataBytes / kChunk;
  for (int i = thread; i < Plan::kRows * kMetadataChunks; i += Plan::kThreads) {
    const int row = i / kMetadataChunks, chunk = i % kMetadataChunks;
    const uint16_t* const from = args.metadata + row_of(row) * (args.padded_k / 16);
    unsigned char* const to = stage + Plan::kMetadataAt + row * Plan::kMetadataBytes + chunk * kChunk;
    const int at = column + chunk * kChunk * 8;
    if (args.wide_metadata) {
      const bool there = at < args.padded_k;
      ptx::cp_async<kChunk>(to, from + (there ? at / 16 : 0), there ? kChunk : 0);
    } else {
      PYFAST_UNROLL
      for (int word = 0; word < kChunk / 4; ++word) {
        const bool there = at + 32 * word < args.padded_k;
        ptx::cp_async<4>(to + 4 * word, from + (there ? at / 16 + 2 * word : 0), there ? 4 : 0);
      }
    }
  }
  PYFAST_UNROLL
  for (int i = thread; i < Plan::kTokens * Plan::kXChunks; i += Plan::kThreads) {
    const int token = i / Plan::kXChunks, chunk = i % Plan::kXChunks;
    const int at = column + chunk * 8;
    const bool there = first_token + token < args.tokens && at < args.k;
    const uint16_t* const from = args.x + (there ? (first_token + token) * args.x_stride + at : 0);
    ptx::cp_async<16>(stage + Plan::kXAt + swizzled<Plan::kXChunks>(token, chunk), from, there ? 16 : 0);
  }
}

// Grid: x over the splits, y over the row tiles, z over the token tiles. A cluster, where there is one, is the splits
// of a row tile.
template <class T, int TokenTiles>
__global__ void __launch_bounds__(Sparse24Plan<TokenTiles>::kThreads)
    sparse24_linear_kernel(const Sparse24LinearArgs args) {
  using Plan = Sparse24Plan<TokenTiles>;
  PYFAST_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_row = warp % Plan::kWarpsAlongRows * 32;
  const int warp_along_columns = warp / Plan::kWarpsAlongRows % Plan::kWarpsAlongColumns;
  const int warp_column = warp_along_columns * Plan::kWarpColumns;
  const int warp_token = warp / (Plan::kWarpsAlongRows * Plan::kWarpsAlongColumns) * Plan::kWarpTiles * 8;
  const int first_token = static_cast<int>(blockIdx.z) * Plan::kTokens;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * Plan::kRows;
  const int begin = static_cast<int>(blockIdx.x) * args.split_columns;
  const int end = args.padded_k - begin < args.split_columns ? args.padded_k : begin + args.split_columns;

  int fetched = begin;  // the first column that is not on its way
  const auto fetch = [&](int stage) {
    if (fetched < end)
      sparse24_fetch<TokenTiles>(args, shared + stage * Plan::kStageBytes, first_row, first_token, fetched);
    fetched += Plan::kColumns;
    ptx::cp_async_commit();
  };
  for (int stage = 0; stage < Plan::kStages - 1; ++stage) fetch(stage);

  float sums[2][Plan::kWarpTiles][4] = {};
  int stage_of = 0;
  for (int column = begin; column < end; column += Plan::kColumns) {
    ptx::cp_async_wait<Plan::kStages - 2>();
    ptx::syncthreads();
    fetch(stage_of == 0 ? Plan::kStages - 1 : stage_of - 1);  // where every warp has done the stage before
    const unsigned char* const stage = shared + stage_of * Plan::kStageBytes;
    stage_of = stage_of + 1 == Plan::kStages ? 0 : stage_of + 1;

    const unsigned char* const metadata =
        stage + Plan::kMetadataAt + (warp_row + g + t / 2 * 16) * Plan::kMetadataBytes + warp_column / 8;
    const Words2 upper = *reinterpret_cast<const Words2*>(metadata);
    const Words2 lower = *reinterpret_cast<const Words2*>(metadata + 8 * Plan::kMetadataBytes);
    PYFAST_UNROLL
    for (int step = 0; step < 2; ++step) {
      const int at = warp_column + 32 * step;  // in the stage
      if (column + at >= args.padded_k) break;
      const uint32_t word = ptx::byte_permute(step == 0 ? upper.x : upper.y, step == 0 ? lower.x : lower.y,
                                              t % 2 == 0 ? 0x5410u : 0x7632u);
      uint32_t a[2][4];
      PYFAST_UNROLL
      for (int tile = 0; tile < 2; ++tile) {
        const int row = warp_row + 16 * tile + lane % 16, chunk = at / 16 + lane / 16;
        ptx::ldmatrix<4>(a[tile], stage + swizzled<Plan::kValueChunks>(row, chunk));
      }
      PYFAST_UNROLL
      for (int tile = 0; tile < Plan::kWarpTiles; ++tile) {
        const int token = warp_token + 8 * tile + lane % 8, chunk = at / 8 + lane / 8;
        uint32_t b[4];
        ptx::ldmatrix<4>(b, stage + Plan::kXAt + swizzled<Plan::kXChunks>(token, chunk));
        ptx::mma_sp_m16n8k32<T, 0>(sums[0][tile], a[0], b, sums[0][tile], word);
        ptx::mma_sp_m16n8k32<T, 1>(sums[1][tile], a[1], b, sums[1][tile], word);
      }
    }
  }
  ptx::cp_async_wait<0>();
  ptx::syncthreads();

  // totals[warp along columns][token][row], over the stages.
  float* const totals = reinterpret_cast<float*>(shared);
  constexpr int kSums = Plan::kTokens * Plan::kSumStride;
  float* const own = totals + warp_along_columns * kSums + warp_token * Plan::kSumStride + warp_row;
  PYFAST_UNROLL
  for (int tile = 0; tile < 2; ++tile) PYFAST_UNROLL
  for (int token_tile = 0; token_tile < Plan::kWarpTiles; ++token_tile) PYFAST_UNROLL
  for (int i = 0; i < 4; ++i)
    own[(8 * token_tile + 2 * t + i % 2) * Plan::kSumStride + 16 * tile + g + i / 2 * 8] = sums[tile][token_tile][i];
  ptx::syncthreads();

  finish_sums<T, Plan::kThreads, Plan::kTokens, Plan::kRows, Plan::kSumStride, Plan::kWarpsAlongColumns, kSums>(
      totals, args.out, args.partial, args.tokens, first_token, first_row);
}

#endif

}  // namespace pyfast::cuda
