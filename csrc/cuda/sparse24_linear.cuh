// sparse24_linear on tensor cores: y = f(x Wᵀ + bias) · mul with W in 2:4 form.
// Made for 1 to 64 tokens, where the weights' bytes are the bound; many tokens run in tiles of 128.
//
//   x         [tokens, k]       16 bits, rows at multiples of 16 bytes (k a multiple of 8)
//   values    [n, K/2]          16 bits, K = k rounded up to a multiple of 32 (the container pads)
//   metadata  [n, K/16]         uint16, a nibble for each group of four columns (docs/formats.md)
//   y         [tokens, n]       sums in float32, then epilogue.cuh
//
// Bytes. The weights, n·K·9/8, are read from memory once. Every block reads x again, from L2: 16/9·tokens/rows of the
// weights' bytes for blocks of `rows` rows. At 128 rows that is 11 % at 8 tokens and 44 % at 32. The metadata stay as
// they are stored: a warp's share of a stage is 8 bytes a row, so that a lane's two loads of 8 bytes and one byte
// permutation a step make the word that mma.sp wants. A layout of its own would save nothing of the bytes and cost a
// second copy of them.
//
// Work. A block does 128 rows of W over its share of the columns, in stages of 128 columns (64 from 33 tokens on),
// kStages of them in shared memory, all but one under way by cp.async:
//
//   a stage    values   128 × columns/2 · 2 bytes     16 KB   in chunks of 16 bytes, swizzled: ldmatrix meets no
//              metadata 128 × columns/8 bytes         2 KB    bank twice
//              x        8·TokenTiles × columns · 2 bytes      chunks likewise
//
// Each warp does 32 rows × 64 columns of it for up to 64 tokens: two steps of 32 columns. The warps lie along the rows
// (4), then the columns, then the tokens. In a step the warp's 32 rows are two tiles of 16, stacked, so that one
// metadata word a lane serves both, by mma.sp's two selectors:
//
//   lane 4g + t     bits 0–15: row g + 16·(t / 2),  bits 16–31: row g + 8 + 16·(t / 2),  columns 16·(t % 2) … + 15
//   instructions    2 ldmatrix (values), T ldmatrix (x), 2·T mma.sp for T tiles of 8 tokens, 1 prmt; 2 loads for both
//
// A stage costs a warp 74, 82, 91 and 124 instructions at 8, 16, 32 and 64 tokens on sm_90. At the rate of the memory
// that is under half an instruction a cycle and multiprocessor to 32 tokens, two thirds at 64. For that nothing of a
// copy may be computed anew (Sparse24Copies); ptx::keep and the second argument of __launch_bounds__ hold the compiler
// to it.
//
// Two blocks share a multiprocessor. Where n gives too few blocks, `splits` of them share a row tile's columns, so
// that all run at once; 2 to 4 stages of each are asked for before anything else. Warps that share rows add their sums
// in shared memory, in order, and blocks theirs, in order too: through distributed shared memory where they form a
// cluster (sm_90 and up), through float32 partial sums in global memory and reduce_splits_kernel elsewhere. Either way
// the result does not depend on which block is first.
//
// While the grid before this one still runs, a block works out its addresses and asks for its first stages of values
// and for its metadata in L2; x, which that grid may write, and all copies wait for its end.
//
// Rows past n repeat the last one and are not stored. Steps past K have values of zero and metadata that are legal;
// columns of x past k and tokens past the last are zero.
//
// Resources (tests/test_cuda_build.py compares; the shared memory is the launch's):
//
//   sparse24_linear_kernel<T, 1>     80 registers    81920 bytes of shared memory    up to 8 tokens
//   sparse24_linear_kernel<T, 2>     96 registers    90112 bytes of shared memory    up to 16
//   sparse24_linear_kernel<T, 4>    128 registers    79872 bytes of shared memory    up to 32
//   sparse24_linear_kernel<T, 8>    184 registers    87040 bytes of shared memory    up to 64
//   sparse24_linear_kernel<T, 16>   128 registers    76800 bytes of shared memory    any number
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

inline constexpr uint32_t kNoColumns = 0x44444444u;  // metadata for steps whose values are zeros

template <int TokenTiles>
struct Sparse24Plan {
  static constexpr int kTokens = 8 * TokenTiles;
  static constexpr int kRows = 128;
  static constexpr int kColumns = TokenTiles <= 4 ? 128 : 64;
  static constexpr int kWarpColumns = 64;
  static constexpr int kWarpTiles = TokenTiles <= 8 ? TokenTiles : 8;  // of 8 tokens
  static constexpr int kWarpsAlongColumns = kColumns / kWarpColumns;
  static constexpr int kWarpsAlongRows = kRows / 32;
  static constexpr int kThreads = 32 * kWarpsAlongRows * kWarpsAlongColumns * (TokenTiles / kWarpTiles);
  static constexpr int kStages = TokenTiles <= 2 ? 4 : TokenTiles == 8 ? 5 : 3;
  static constexpr int kValueChunks = kColumns / 16;  // of 16 bytes, a row
  static constexpr int kXChunks = kColumns / 8;
  static constexpr int kMetadataBytes = kColumns / 8;  // a row
  static constexpr int kMetadataAt = kRows * kValueChunks * 16;
  static constexpr int kXAt = kMetadataAt + kRows * kMetadataBytes;
  static constexpr int kStageBytes = kXAt + kTokens * kXChunks * 16;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kSumStride = kRows + 4;  // floats from token to token: the four tokens of a store differ in bank
  static_assert(kWarpsAlongColumns * kTokens * kSumStride * 4 <= kSharedBytes);

  // Stages that hold so many columns; none or fewer for none or fewer.
  static PYFAST_HOST_DEVICE constexpr int stages(int columns) {
    static_assert(kColumns == 64 || kColumns == 128);
    return (columns + kColumns - 1) >> (kColumns == 64 ? 6 : 7);
  }
};

#if defined(PYFAST_KERNELS)

// Where chunk `chunk` of 16 bytes of row `row` lies among rows of Chunks chunks: eight rows' chunks of one number,
// which an ldmatrix reads together, lie in all 32 banks.
template <unsigned Chunks>
PYFAST_DEVICE unsigned swizzled(unsigned row, unsigned chunk) {
  static_assert(Chunks == 4 || Chunks % 8 == 0);
  return (row * Chunks + (chunk ^ (Chunks == 4 ? row / 2 % 4 : row % 8))) * 16;
}

// Which row's place the metadata of row `row` take: the rows g and g + 16, which a load reads together, differ in bank.
PYFAST_DEVICE unsigned metadata_place(unsigned row) { return row ^ (row / 4 & 4); }

// What a thread copies of each stage. Its chunks lie in one column of chunks, a constant number of rows apart: their
// sources move on by a constant from stage to stage, their places are one offset and constants. Stages are counted from
// the block's first on.
template <int TokenTiles>
struct Sparse24Copies {
  using Plan = Sparse24Plan<TokenTiles>;
  static constexpr unsigned kValueStep = Plan::kThreads / Plan::kValueChunks;  // rows from copy to copy
  static constexpr unsigned kXStep = Plan::kThreads / Plan::kXChunks;          // tokens
  static constexpr unsigned kValueCopies = Plan::kRows / kValueStep;
  static constexpr unsigned kXCopies = Plan::kTokens < kXStep ? 1 : Plan::kTokens / kXStep;
  static_assert(kValueStep % 8 == 0 && kXStep % 8 == 0 && Plan::kRows <= Plan::kThreads);

  const unsigned char *values[kValueCopies], *x[kXCopies], *metadata;  // of the first stage
  unsigned value_place, metadata_place, x_place;  // in a stage; past the end of the part: the thread copies none
  int value_stages, x_stages[kXCopies];           // before this one the chunk is there, from it on it is zeros
  int metadata_stages;                            // before this one in whole chunks

  PYFAST_DEVICE Sparse24Copies(const Sparse24LinearArgs& args, unsigned first_token, int begin) {
    const unsigned thread = threadIdx.x, column = static_cast<unsigned>(begin);
    const unsigned padded_k = static_cast<unsigned>(args.padded_k);
    const unsigned first_row = blockIdx.y * Plan::kRows, last_row = static_cast<unsigned>(args.n) - 1;
    const auto row_of = [&](unsigned row) {
      return static_cast<uint64_t>(first_row + row < last_row ? first_row + row : last_row);
    };
    const unsigned row = thread / Plan::kValueChunks, chunk = thread % Plan::kValueChunks;
    const unsigned char* const value_column = reinterpret_cast<const unsigned char*>(args.values) + column + 16 * chunk;
    PYFAST_UNROLL
    for (unsigned i = 0; i < kValueCopies; ++i) values[i] = value_column + row_of(row + i * kValueStep) * padded_k;
    value_place = swizzled<Plan::kValueChunks>(row, chunk);
    value_stages = Plan::stages(args.padded_k - begin - static_cast<int>(16 * chunk));

    metadata = reinterpret_cast<const unsigned char*>(args.metadata) + column / 8 + row_of(thread) * (padded_k / 8);
    metadata_place = Plan::kMetadataAt + cuda::metadata_place(thread) * Plan::kMetadataBytes;
    metadata_stages = thread < Plan::kRows && args.wide_metadata ? Plan::stages(args.padded_k - begin) : 0;

    const unsigned other = thread ^ Plan::kThreads / 2;  // where not all copy x, those do that copy no metadata
    const unsigned token = other / Plan::kXChunks, x_chunk = other % Plan::kXChunks;
    const unsigned char* const x_column = reinterpret_cast<const unsigned char*>(args.x) + 2 * column + 16 * x_chunk;
    PYFAST_UNROLL
    for (unsigned i = 0; i < kXCopies; ++i) {
      const unsigned at = first_token + token + i * kXStep;
      x[i] = x_column + at * (2 * args.x_stride);
      x_stages[i] =
          at < static_cast<unsigned>(args.tokens) ? Plan::stages(args.k - begin - static_cast<int>(8 * x_chunk)) : 0;
    }
    x_place = Plan::kXAt + swizzled<Plan::kXChunks>(token, x_chunk);
    ptx::keep(value_place), ptx::keep(metadata_place), ptx::keep(x_place), ptx::keep(metadata);
    ptx::keep(value_stages), ptx::keep(metadata_stages);
    PYFAST_UNROLL
    for (unsigned i = 0; i < kValueCopies; ++i) ptx::keep(values[i]);
    PYFAST_UNROLL
    for (unsigned i = 0; i < kXCopies; ++i) ptx::keep(x[i]), ptx::keep(x_stages[i]);
  }

  // Asks for the block's first `stages` stages in L2, of x nothing. A row of values of a stage is a line of 128 bytes,
  // or half of one: of the threads that copy it, the one with chunk i asks for that of stage i.
  PYFAST_DEVICE void prefetch(int stages) const {
    const int stage = static_cast<int>(threadIdx.x % Plan::kValueChunks);
    PYFAST_UNROLL
    for (unsigned i = 0; i < kValueCopies; ++i)
      if (stage < stages && stage < value_stages) ptx::prefetch_l2(values[i] + stage * Plan::kColumns);
    if (threadIdx.x < Plan::kRows) ptx::prefetch_l2(metadata);
  }

  // Begins the copies of stage `number` into `stage`.
  PYFAST_DEVICE void begin(const Sparse24LinearArgs& args, unsigned char* stage, int number) const {
    unsigned moved = static_cast<unsigned>(number);
    ptx::keep(moved);
    PYFAST_UNROLL
    for (unsigned i = 0; i < kValueCopies; ++i)
      ptx::cp_async<16>(stage + value_place + i * kValueStep * Plan::kValueChunks * 16,
                        values[i] + static_cast<uint64_t>(moved) * Plan::kColumns, number < value_stages);
    PYFAST_UNROLL
    for (unsigned i = 0; i < kXCopies; ++i)
      if (Plan::kTokens >= kXStep || x_place < Plan::kStageBytes)
        ptx::cp_async<16>(stage + x_place + i * kXStep * Plan::kXChunks * 16,
                          x[i] + static_cast<uint64_t>(moved) * (2 * Plan::kColumns), number < x_stages[i]);
    const unsigned char* const from = metadata + static_cast<uint64_t>(moved) * Plan::kMetadataBytes;
    unsigned char* const to = stage + metadata_place;
    if (number < metadata_stages) ptx::cp_async<Plan::kMetadataBytes>(to, from);
    if (args.wide_metadata || metadata_place >= Plan::kXAt) return;
    const int words =
        (args.padded_k - static_cast<int>(blockIdx.x) * args.split_columns - number * Plan::kColumns) / 32;
    PYFAST_UNROLL_NOT
    for (int word = 0; word < Plan::kMetadataBytes / 4; ++word)
      ptx::cp_async<4>(to + 4 * word, from + 4 * word, word < words);
  }
};

// Grid: x over the splits, y over the row tiles, z over the token tiles. A cluster, where there is one, is the splits
// of a row tile.
template <class T, int TokenTiles>
__global__ void __launch_bounds__(Sparse24Plan<TokenTiles>::kThreads, 2)
    sparse24_linear_kernel(const Sparse24LinearArgs args) {
  using Plan = Sparse24Plan<TokenTiles>;
  PYFAST_DYNAMIC_SHARED(dynamic);
  unsigned char* shared = dynamic;
  ptx::keep(shared);
  ptx::launch_dependents();
  const unsigned first_token = blockIdx.z * Plan::kTokens;
  const int begin = static_cast<int>(blockIdx.x) * args.split_columns;
  const int stages =
      Plan::stages(args.padded_k - begin < args.split_columns ? args.padded_k - begin : args.split_columns);

  const Sparse24Copies<TokenTiles> copies(args, first_token, begin);
  static_assert(Plan::kStages - 1 <= Plan::kValueChunks);
  copies.prefetch(stages < Plan::kStages - 1 ? stages : Plan::kStages - 1);
  ptx::wait_prerequisites();
  const auto fetch = [&](unsigned char* stage, int number) {
    if (number < stages) copies.begin(args, stage, number);
    ptx::cp_async_commit();
  };
  PYFAST_UNROLL_NOT
  for (int stage = 0; stage < Plan::kStages - 1; ++stage) fetch(shared + stage * Plan::kStageBytes, stage);

  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const unsigned warp_row = warp % Plan::kWarpsAlongRows * 32;
  const unsigned warp_along_columns = warp / Plan::kWarpsAlongRows % Plan::kWarpsAlongColumns;
  const unsigned warp_column = warp_along_columns * Plan::kWarpColumns;
  const unsigned warp_token = warp / (Plan::kWarpsAlongRows * Plan::kWarpsAlongColumns) * Plan::kWarpTiles * 8;
  // What the lane reads of a stage. The chunks of the second step differ in one bit from those of the first.
  unsigned values_at = swizzled<Plan::kValueChunks>(warp_row + lane % 16, warp_column / 16 + lane / 16);
  unsigned x_at = Plan::kXAt + swizzled<Plan::kXChunks>(warp_token + lane % 8, warp_column / 8 + lane / 8);
  unsigned metadata_at =
      Plan::kMetadataAt + metadata_place(warp_row + g + t / 2 * 16) * Plan::kMetadataBytes + warp_column / 8;
  unsigned half = t % 2 == 0 ? 0x5410u : 0x7632u;
  ptx::keep(values_at), ptx::keep(x_at), ptx::keep(metadata_at), ptx::keep(half);
  const int columns = args.padded_k - begin - static_cast<int>(warp_column);
  const int whole[2] = {Plan::stages(columns), Plan::stages(columns - 32)};  // stages that hold the columns of a step

  float sums[2][Plan::kWarpTiles][4] = {};
  unsigned now = 0, done = Plan::kSharedBytes - Plan::kStageBytes;  // the stage to read, the one that all have read
  for (int number = 0; number < stages; ++number) {
    ptx::cp_async_wait<Plan::kStages - 2>();
    ptx::syncthreads();
    fetch(shared + done, number + Plan::kStages - 1);
    const unsigned char* const stage = shared + now;
    done = now;
    now = now + Plan::kStageBytes == Plan::kSharedBytes ? 0 : now + Plan::kStageBytes;

    const Words2 upper = ptx::ld_shared<Words2>(ptx::shared_address(stage + metadata_at));
    const Words2 lower = ptx::ld_shared<Words2>(ptx::shared_address(stage + metadata_at + 8 * Plan::kMetadataBytes));
    PYFAST_UNROLL
    for (int step = 0; step < 2; ++step) {
      uint32_t word = ptx::byte_permute(step == 0 ? upper.x : upper.y, step == 0 ? lower.x : lower.y, half);
      if (number >= whole[step]) word = kNoColumns;
      uint32_t a[2][4];
      PYFAST_UNROLL
      for (unsigned tile = 0; tile < 2; ++tile)
        ptx::ldmatrix<4>(a[tile], stage + (values_at ^ 32 * step) + tile * 16 * Plan::kValueChunks * 16);
      PYFAST_UNROLL
      for (unsigned tile = 0; tile < Plan::kWarpTiles; ++tile) {
        uint32_t b[4];
        ptx::ldmatrix<4>(b, stage + (x_at ^ 64 * step) + tile * 8 * Plan::kXChunks * 16);
        ptx::mma_sp_m16n8k32<T, 0>(sums[0][tile], a[0], b, sums[0][tile], word);
        ptx::mma_sp_m16n8k32<T, 1>(sums[1][tile], a[1], b, sums[1][tile], word);
      }
    }
  }
  ptx::cp_async_wait<0>();
  ptx::syncthreads();

  // totals[warp along columns][token][row], over the stages.
  float* const totals = reinterpret_cast<float*>(dynamic);
  constexpr int kSums = Plan::kTokens * Plan::kSumStride;
  float* const own = totals + warp_along_columns * kSums + warp_token * Plan::kSumStride + warp_row;
  PYFAST_UNROLL
  for (int tile = 0; tile < 2; ++tile) PYFAST_UNROLL
  for (int token_tile = 0; token_tile < Plan::kWarpTiles; ++token_tile) PYFAST_UNROLL
  for (int i = 0; i < 4; ++i)
    own[(8 * token_tile + 2 * t + i % 2) * Plan::kSumStride + 16 * tile + g + i / 2 * 8] = sums[tile][token_tile][i];
  ptx::syncthreads();

  finish_sums<T, Plan::kThreads, Plan::kTokens, Plan::kRows, Plan::kSumStride, Plan::kWarpsAlongColumns, kSums>(
      totals, args.out, args.partial, args.tokens, static_cast<int>(first_token),
      static_cast<int64_t>(blockIdx.y) * Plan::kRows);
}

#endif

}  // namespace pyfast::cuda
