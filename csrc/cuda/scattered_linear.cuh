// scattered_linear: y = f(x Wᵀ + bias) · mul on tensor cores for up to 32 tokens, W as lists of its stored values that
// the lanes scatter to where mma wants them: 16 bits, float32 sums.
//
// Why. bitmap_linear finds each of 1024 positions in its bits: 200 instructions of a warp and 60 to 100 passes of
// shared memory, whatever is stored. Here only what is stored costs anything, and its place comes for two instructions.
//
// Image. A tile of 64 rows × 64 columns is an image in shared memory: 16 fragments of mma.m16n8k16, one after the
// other, each as the lanes hold it, so that a lane reads its four registers at once. 32 words are a line; the lines of
// the four warps of a block lie between each other.
//
//   word      128 · fragment + 4 · lane + register; line = word / 32
//   fragment  4 · row tile + step          row     16 · row tile + g + 8 · (register % 2)
//   half      of the word                  column  32 · (step / 2) + 8 t + 4 · (step % 2) + 2 · (register / 2) + half
//
// so that the 8 columns of a lane in two steps lie side by side in x: one load of 16 bytes.
//
// Layout, derived from a bitmap weight (pyfast/sparse/scattered.py). Lane l writes the words of bank l alone, so that
// no two lanes meet in a bank, however the stored values lie. Its way goes down the lower halves of its 64 words, then
// down the upper ones. An entry is a value and the distance on the way from the entry before, in 4 bits; the first
// counts from the place before the first. Longer distances are bridged by entries of distance 15 and value +0.0, which
// write a zero where a zero is. All lanes of a tile have the same number of entries, whole chunks of 8, as many as make
// the tile smallest: a lane that has fewer writes its last one again (distance 0), what a lane has beyond goes to the
// extras of the tile, with its place.
//
//   chunk    values   lane 0: v0 v1 v2 v3 v4 v5 v6 v7 │ lane 1: … │ … lane 31            16 bytes a lane
//            deltas   byte i is d(i) | d(i + 4) << 4                                      4 bytes a lane
//   extras   4 words a group: value | byte in the image << 16; the last one again where fewer are left
//   ends     [tiles + 1]: chunks and groups of extras before each tile
//
// Bytes of a random pattern: dense has 1.51, 2.42, 3.52, 5.84, 9.83 times as many at 50, 70, 80, 90, 95 % sparsity.
//
// A warp goes along a row of tiles. Of each it
//
//   scatters    the chunks, of which kAhead are on their way to its ring (each lane copies and reads its own part), and
//               the extras, which came a tile before
//   multiplies  fragment after fragment: reads it, puts zeros in its place, mma with x from L1
//
// and waits for no other warp until the end. Warps of a block lie side by side, above 16 tokens two below two, where
// they share loads of x; blocks share the columns (split_sums.cuh) where n is small.
//
// What a multiprocessor does for 1024 positions at 8 tokens, by count. Passes of its shared memory and L1:
//
//                                          50 %   70 %   80 %   90 %
//   entries, a pass a store                 16      9      6      4
//   extras                                   5      7      5      2
//   chunks into the ring and out of it      20     12      8      5
//   fragments read, zeros                   32     32     32     32
//   x (at 32 tokens 16)                      2      2      2      2
//   all                                     75     62     53     45
//   cycles of these bytes                  104     65     45     27    at 3.0 TB/s, 132 multiprocessors, 1.75 GHz
//   cycles of a dense product's            158
//
// and 155 to 70 instructions of a warp: 57 a chunk, 130 a tile, in the code for sm_90. Bytes bind to 70 %, passes
// beyond.
//
// Resources:
//
//   scattered_linear_kernel<T, 1>      96 registers    43008 bytes of shared memory    up to 8 tokens
//   scattered_linear_kernel<T, 2>     120 registers    43008 bytes of shared memory    up to 16
//   scattered_linear_kernel<T, 4>     160 registers    43008 bytes of shared memory    up to 32
//   reduce_splits_kernel<T>            40 registers        0 bytes of shared memory
#pragma once

#include "common.cuh"
#include "split_sums.cuh"
#include "token_tiles.cuh"

namespace pyfast::cuda {

inline constexpr int kImageRows = 64, kImageColumns = 64;
inline constexpr int kImageLines = kImageRows * kImageColumns / 64;
inline constexpr int kImageWarps = 4;                      // of a block
inline constexpr uint32_t kLineBytes = 128 * kImageWarps;  // from a line of an image to its next
inline constexpr int kAllImageBytes = kImageLines * static_cast<int>(kLineBytes);
inline constexpr int kChunkEntries = 8;  // of a lane
inline constexpr int kChunkBytes = 32 * (2 * kChunkEntries + kChunkEntries / 2);

struct ScatteredLinearArgs {
  const uint16_t* values;  // [chunks, 32, 8]
  const uint8_t* deltas;   // [chunks, 32, 4]
  const uint32_t* extras;  // [groups, 4]
  const int32_t* ends;     // [tiles + 1, 2]
  const uint16_t* x;       // [tokens, 64 · tiles_a_row], rows at multiples of 16 bytes
  int64_t x_stride;        // elements from token to token
  int32_t tokens, tiles_a_row;
  int32_t split_stages;  // of a block: tiles of each warp
  float* partial;        // split_sums.cuh
  Epilogue out;
  int64_t token_tiles[4];
};

template <int TokenTiles>
struct ScatteredLinearPlan {
  static constexpr int kTokens = 8 * TokenTiles;
  static constexpr int kRowTiles = kImageRows / 16;
  static constexpr int kRowWarps = TokenTiles <= 2 ? 1 : 2;     // one below the other
  static constexpr int kColumnWarps = kImageWarps / kRowWarps;  // side by side, their sums are added
  static constexpr int kWarps = kRowWarps * kColumnWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = TokenTiles <= 2 ? 4 : 3;  // of a multiprocessor, as the registers are meant to allow
  static constexpr int kRows = kImageRows * kRowWarps;
  static constexpr int kAhead = 4;  // chunks on their way to a warp
  static constexpr int kRingBytes = kAhead * kChunkBytes;
  static constexpr int kSumStride = kRows + 4;  // floats from token to token: the four tokens of a store differ in bank
  static constexpr int kSumBytes = kTokens * kSumStride * 4;  // of the warps of a column
  static constexpr int kAllSumBytes = kColumnWarps * kSumBytes, kPipelineBytes = kAllImageBytes + kWarps * kRingBytes;
  static constexpr int kSharedBytes = kPipelineBytes > kAllSumBytes ? kPipelineBytes : kAllSumBytes;
};

#if defined(PYFAST_KERNELS)

// Where an entry lies, from the beginning of the images on. `at` counts lines of kLineBytes on the lane's way, whose
// second half goes to the upper halves of the words. One instruction: below kBack the difference is a large number.
PYFAST_DEVICE uint32_t entry_place(uint32_t at) {
  constexpr uint32_t kBack = kAllImageBytes - 2;
  return at < at - kBack ? at : at - kBack;
}

// Writes 8 entries of a lane; `at` is where on its way the one before lies. `images`, the shared address of all images,
// is added last: in a cluster its upper bits say whose shared memory it is.
PYFAST_DEVICE void scatter(const Words4& values, uint32_t deltas, uint32_t images, uint32_t& at) {
  constexpr uint32_t kScale = kLineBytes / 16 * 0x01010101u;
  const uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
  PYFAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t sixteenfold = (half == 0 ? deltas << 4 : deltas) & 0xf0f0f0f0u, from = at;
    PYFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      at = ptx::dot4(sixteenfold, kScale >> 8 * (3 - i), from);
      ptx::st_shared_half(images + entry_place(at), pairs[2 * half + i / 2] >> 16 * (i % 2));
    }
  }
}

// Writes 4 extras of the image that begins at the address.
PYFAST_DEVICE void scatter(const Words4& extras, uint32_t image) {
  const uint32_t words[4] = {extras.x, extras.y, extras.z, extras.w};
  PYFAST_UNROLL
  for (int i = 0; i < 4; ++i) ptx::st_shared_half(image + (words[i] >> 16), words[i]);
}

template <class T, int TokenTiles>
__global__ void __launch_bounds__(ScatteredLinearPlan<TokenTiles>::kThreads, ScatteredLinearPlan<TokenTiles>::kBlocks)
    scattered_linear_kernel(const ScatteredLinearArgs args) {
  using Plan = ScatteredLinearPlan<TokenTiles>;
  PYFAST_DYNAMIC_SHARED(shared);
  ptx::launch_dependents();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int row_warp = warp % Plan::kRowWarps, part = warp / Plan::kRowWarps;

  // `left` tiles of row `row` of tiles, from column `first` on.
  const int rows = static_cast<int>((args.out.n + kImageRows - 1) / kImageRows);
  const int row = static_cast<int>(blockIdx.y) * Plan::kRowWarps + row_warp;
  const int first = (static_cast<int>(blockIdx.x) * Plan::kColumnWarps + part) * args.split_stages;
  const int rest = args.tiles_a_row - first;
  int left = row >= rows || rest < 0 ? 0 : rest < args.split_stages ? rest : args.split_stages;
  const Words2* ends =
      reinterpret_cast<const Words2*>(args.ends) + static_cast<int64_t>(row) * args.tiles_a_row + first;

  // Of the warp's image: where it begins, where the lane's way begins (before its first word), and the lane's part of
  // the first fragment.
  const uint32_t images = ptx::shared_address(shared), image = images + static_cast<uint32_t>(warp) * 128;
  const uint32_t way = static_cast<uint32_t>(warp) * 128 + static_cast<uint32_t>(lane) * 4 - kLineBytes;
  const uint32_t own = image + static_cast<uint32_t>(lane / 8) * kLineBytes + static_cast<uint32_t>(lane % 8) * 16;
  PYFAST_UNROLL
  for (uint32_t i = 0; i < kImageLines / 4; ++i) ptx::st_shared(own + i * 4 * kLineBytes, Words4{});
  ptx::syncwarp();
  if (left > 0 && lane < 2) ptx::prefetch_l2(ends + lane * left);
  ptx::wait_prerequisites();

  float sums[Plan::kRowTiles][TokenTiles][4] = {};
  if (left > 0) {
    // Where this tile begins and ends, and the next one: loaded a tile before they are used.
    Words2 begin = ptx::ld_global(ends), end = ptx::ld_global(ends + 1);
    Words2 next_end = ptx::ld_global(ends + (left > 1 ? 2 : 1));
    // The lane's part of the ring, which no other lane touches, and of the chunks that come next.
    unsigned char* const ring = shared + kAllImageBytes + warp * Plan::kRingBytes;
    int more = static_cast<int>(ptx::ld_global(ends + left).x - begin.x), slot = 0;
    const uint16_t* values = args.values + (static_cast<int64_t>(begin.x) * 32 + lane) * kChunkEntries;
    const uint8_t* deltas = args.deltas + (static_cast<int64_t>(begin.x) * 32 + lane) * (kChunkEntries / 2);
    const auto fetch = [&] {
      if (more > 0) {
        ptx::cp_async<16>(ring + slot + lane * 16, values);
        ptx::cp_async<4>(ring + slot + 512 + lane * 4, deltas);
      }
      ptx::cp_async_commit();
      values += 32 * kChunkEntries, deltas += 32 * kChunkEntries / 2;
      slot = slot == Plan::kRingBytes - kChunkBytes ? 0 : slot + kChunkBytes;
      --more;
    };
    PYFAST_UNROLL
    for (int i = 0; i < Plan::kAhead; ++i) fetch();
    const Words4* const extras = reinterpret_cast<const Words4*>(args.extras) + lane;
    Words4 extra{};
    if (lane < static_cast<int>(end.y - begin.y)) extra = ptx::ld_streaming(extras + begin.y);
    // The lane's columns of x, of the token g of the first token tile; with up to 8 tokens there may be none.
    const unsigned char* x = reinterpret_cast<const unsigned char*>(args.x) +
                             2 * ((g < args.tokens ? g : 0) * args.x_stride + int64_t{first} * kImageColumns + 8 * t);

    for (;;) {
      Words4 b[TokenTiles][2];
      PYFAST_UNROLL
      for (int i = 0; i < TokenTiles; ++i) PYFAST_UNROLL
      for (int half = 0; half < 2; ++half)
        b[i][half] =
            ptx::ld_global(reinterpret_cast<const Words4*>(x + (i == 0 ? 0 : args.token_tiles[i]) + 64 * half));

      uint32_t at = way;
      for (int chunks = static_cast<int>(end.x - begin.x); chunks > 0; --chunks) {
        ptx::cp_async_wait<Plan::kAhead - 1>();
        const uint32_t from = ptx::shared_address(ring + slot);
        scatter(ptx::ld_shared<Words4>(from + static_cast<uint32_t>(lane) * 16),
                ptx::ld_shared<uint32_t>(from + 512 + static_cast<uint32_t>(lane) * 4), images, at);
        fetch();
      }
      const int groups = static_cast<int>(end.y - begin.y);
      if (lane < groups) scatter(extra, image);
      PYFAST_UNROLL_NOT
      for (int i = 32; i < groups; i += 32)
        if (i + lane < groups) scatter(ptx::ld_streaming(extras + begin.y + i), image);

      begin = end, end = next_end;
      if (left > 1 && lane < static_cast<int>(end.y - begin.y)) extra = ptx::ld_streaming(extras + begin.y);
      if (left > 2) next_end = ptx::ld_global(ends + 3);
      ++ends;

      ptx::syncwarp();
      PYFAST_UNROLL
      for (int step = 0; step < 4; ++step) PYFAST_UNROLL
      for (int row_tile = 0; row_tile < Plan::kRowTiles; ++row_tile) {
        const uint32_t from = own + static_cast<uint32_t>(4 * row_tile + step) * 4 * kLineBytes;
        const Words4 words = ptx::ld_shared<Words4>(from);
        ptx::st_shared(from, Words4{});
        const uint32_t a[4] = {words.x, words.y, words.z, words.w};
        PYFAST_UNROLL
        for (int i = 0; i < TokenTiles; ++i) {
          const Words4& four = b[i][step / 2];
          const uint32_t two[2] = {step % 2 == 0 ? four.x : four.z, step % 2 == 0 ? four.y : four.w};
          ptx::mma_m16n8k16<T>(sums[row_tile][i], a, two, sums[row_tile][i]);
        }
      }
      if (--left == 0) break;
      x += 2 * kImageColumns;
      ptx::syncwarp();
    }
    ptx::cp_async_wait<0>();
  }
  ptx::syncthreads();

  float* const totals = reinterpret_cast<float*>(shared);
  float* const own_sums = totals + part * (Plan::kSumBytes / 4) + row_warp * kImageRows + g;
  store_token_sums<Plan::kSumStride, 16, 8>(own_sums, sums, args.tokens);
  ptx::syncthreads();
  finish_sums<T, Plan::kThreads, Plan::kTokens, Plan::kRows, Plan::kSumStride, Plan::kColumnWarps, Plan::kSumBytes / 4>(
      totals, args.out, args.partial, args.tokens, 0, static_cast<int64_t>(blockIdx.y) * Plan::kRows);
}

#endif

}  // namespace pyfast::cuda
