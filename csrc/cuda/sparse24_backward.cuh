// Backward of sparse24_linear at a fixed pattern, 16-bit elements, float32 sums, with the stored weight
// (sparse24_linear.cuh, docs/formats.md):
//
//   grad_x [tokens, k] = grad·W    up to 32 tokens; more of them decompress and use the dense library
//   grad_values [n, K/2]           Σ over tokens of grad[token, row]·x[token, column] at the kept places, K being k
//                                  rounded up to a multiple of 32; 0 at places past k
//
// grad_x reads the weight's bytes, n·K·9/8, from memory once. mma.sp wants its pattern along the summed index, which is
// the row here: the groups of four are expanded in registers, and grad_x_tiles.cuh multiplies. A tile of 16 rows × 64
// columns is 1024 bytes of values and 128 of metadata:
//
//   lane 4g + t    columns 16t … 16t + 15 of the rows g and g + 8: of each a chunk of 16 bytes, 8 values,
//                  and a word of 16 bits, 4 nibbles
//
// A warp goes down a part of a column of tiles with a ring of its own in shared memory. It copies chunks to where the
// same lane reads them and metadata in words of 4 bytes, which two lanes read, and waits for no other warp. Two warps
// lie side by side, so that a block reads 128 bytes of values and 16 of metadata of a row, and four below each other.
// All but one slot of each ring is under way:
//
//   up to 8 tokens     5 tiles a ring    36864 bytes of a block
//   up to 32           7                 55296, in what the sums need anyway
//
// grad comes from L2, 32·tokens bytes for each tile, once for the two warps side by side.
//
// What each column takes, its group's first value, the second or none, is a byte of a selector of prmt. Three bits tell
// the legal nibbles apart, nibble ^ nibble >> 1, so that prmt itself looks the bytes of one column up for four groups
// at once, the word of such codes being its selector and a table of 8 bytes its operands. Then one prmt puts the bytes
// of two columns together, and one takes the values: 20 for the 16 columns of a word, without a shift or a mask.
//
// Instructions of a warp for a tile, counted in the code for sm_90: 121 at 8 tokens and 141 at 32, 41 of them prmt and
// 16 movmatrix. At the 2.7 TB/s that a dense product reaches on an H100 a tile takes about 100 cycles of a
// multiprocessor, in which it can issue 400.
//
// grad_values sums by grad_values_tiles.cuh and stores n·K bytes. Two lanes hold the sums of a group, so that each
// finishes half of their groups and gives the other the sums of the rest; prmt takes two columns of four, and the
// values go through shared memory into stores of 16 bytes.
//
// Damaged metadata make wrong numbers in their own groups and nowhere else: grad_x takes a nibble that is none of 4, 8,
// 9, C, D, E for another one, or for zeros, and grad_values reads it as it is, as sparse24_gather does.
//
// Resources (tests/test_cuda_build.py compares; the shared memory is the launch's):
//
//   sparse24_grad_x_kernel<T, 1>       80 registers    46080 bytes of shared memory    up to 8 tokens
//   sparse24_grad_x_kernel<T, 4>      128 registers    67584 bytes of shared memory    up to 32
//   sparse24_grad_values_kernel<T>    128 registers    49152 bytes of shared memory
//   reduce_splits_kernel<T>            40 registers        0 bytes of shared memory
#pragma once

#include "grad_values_tiles.cuh"
#include "grad_x_tiles.cuh"

namespace pyfast::cuda {

struct Sparse24GradXArgs {
  const uint16_t *values, *metadata;  // [rows, padded_k / 2], [rows, padded_k / 16]; at multiples of 16 and 4 bytes
  int32_t rows, padded_k;
  const uint16_t* x;     // grad [tokens, rows]: rows at multiples of 16 bytes
  int64_t x_stride;      // elements from token to token
  int32_t tokens, k;     // k: columns of grad that may be read, `rows` rounded up to a multiple of 16
  int32_t split_stages;  // of a block: tiles of each warp
  float* partial;        // split_sums.cuh
  Epilogue out;          // out.n: columns of W
  int64_t token_tiles[4];
};

struct Sparse24GradValuesArgs {
  GradValuesOperands operands;
  const uint16_t* metadata;  // [rows, padded_k / 16], at a multiple of 4 bytes
  uint16_t* values;          // [rows, padded_k / 2], written
  int32_t rows, k, padded_k;
};

template <int TokenTiles>
struct Sparse24GradXPlan : GradXSums<TokenTiles, 2 * kGradXColumns, 4> {
  static constexpr int kAcross = Sparse24GradXPlan::kColumns / kGradXColumns;  // warps side by side
  static constexpr int kDown = Sparse24GradXPlan::kParts;                      // below each other; their sums are added
  static constexpr int kThreads = 32 * kAcross * kDown;
  static constexpr int kStageTiles = kDown;                // of rows, each a stage of its warp
  static constexpr int kStages = TokenTiles == 1 ? 5 : 7;  // two blocks fit into 100 KB; what the sums take anyway
  static constexpr int kHalfBytes = 8 * kGradXColumns;     // values of 8 rows
  static constexpr int kMetadataAt = 2 * kHalfBytes;
  static constexpr int kSlotBytes = kMetadataAt + 2 * kGradXColumns;
  static constexpr int kRingBytes = kStages * kSlotBytes;
  static constexpr int kSharedBytes = Sparse24GradXPlan::or_sums(kAcross * kDown * kRingBytes);
};

// A legal nibble in three bits, of each of the nibbles of a word.
PYFAST_HOST_DEVICE constexpr uint32_t sparse24_codes(uint32_t nibbles) {
  return (nibbles ^ nibbles >> 1) & 0x77777777u;
}

// Byte c, for the nibble of code c: which bytes a column takes, as half of a selector of prmt, whose first operand is
// zero and whose second one is the pair of values of the group.
PYFAST_HOST_DEVICE constexpr uint64_t sparse24_takes(unsigned column) {
  uint64_t bytes = 0;
  for (unsigned first = 0; first < 3; ++first)
    for (unsigned second = first + 1; second < 4; ++second) {
      const uint64_t taken = column == first ? 0x54 : column == second ? 0x76 : 0;
      bytes |= taken << 8 * (sparse24_codes(first | second << 2) & 7u);
    }
  return bytes;
}

#if defined(PYFAST_KERNELS)

// Of four groups, the codes of whose nibbles are given, the first lowest: byte j of takes[c] is what column c of group
// j takes.
PYFAST_DEVICE void look_up(uint32_t codes, uint32_t (&takes)[4]) {
  constexpr uint64_t kTakes[4] = {sparse24_takes(0), sparse24_takes(1), sparse24_takes(2), sparse24_takes(3)};
  PYFAST_UNROLL
  for (int column = 0; column < 4; ++column)
    takes[column] =
        ptx::byte_permute(static_cast<uint32_t>(kTakes[column]), static_cast<uint32_t>(kTakes[column] >> 32), codes);
}

// The columns of group j, two a word, of its pair of values.
PYFAST_DEVICE void expand_group(const uint32_t (&takes)[4], uint32_t j, uint32_t pair, uint32_t& left,
                                uint32_t& right) {
  const uint32_t both = j | (4 + j) << 4;
  left = ptx::byte_permute(0, pair, ptx::byte_permute(takes[0], takes[1], both));
  right = ptx::byte_permute(0, pair, ptx::byte_permute(takes[2], takes[3], both));
}

// Grid: x over the splits of the rows of W, y over 128 columns.
template <class T, int TokenTiles>
__global__ void __launch_bounds__(Sparse24GradXPlan<TokenTiles>::kThreads, TokenTiles == 1 ? 3 : 2)
    sparse24_grad_x_kernel(const Sparse24GradXArgs args) {
  using Plan = Sparse24GradXPlan<TokenTiles>;
  PYFAST_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_column = warp % Plan::kAcross * kGradXColumns, part = warp / Plan::kAcross;
  const int column = static_cast<int>(blockIdx.y) * Plan::kColumns + warp_column;

  // `tiles` of them from the first row on, none past the last column; `left` of their rows are there.
  const int first_row = (static_cast<int>(blockIdx.x) * Plan::kDown + part) * args.split_stages * kGradXRows;
  const int most = args.rows - first_row, all = args.split_stages * kGradXRows;
  const int left = column >= args.padded_k ? 0 : most < all ? most : all;
  const int tiles = (left + kGradXRows - 1) / kGradXRows;
  const unsigned char* grad = first_grad(args, first_row);

  // What the lane copies of each tile: a chunk of the row g and one of the row g + 8, and a word of metadata of the row
  // `metadata_row`. Of each, how many rows are still there: none where its columns are past the last.
  const int metadata_row = lane / 2, metadata_half = lane % 2;
  int step = kGradXRows * args.padded_k;  // bytes of values from tile to tile
  const unsigned char* upper_from = reinterpret_cast<const unsigned char*>(args.values) +
                                    static_cast<int64_t>(first_row + g) * args.padded_k + column + 16 * t;
  const unsigned char* lower_from = upper_from + step / 2;
  const unsigned char* metadata_from = reinterpret_cast<const unsigned char*>(args.metadata) +
                                       static_cast<int64_t>(first_row + metadata_row) * (args.padded_k / 8) +
                                       column / 8 + 4 * metadata_half;
  int rows = column + 16 * t < args.padded_k ? left - g : 0;
  int metadata_rows = column + 32 * metadata_half < args.padded_k ? left - metadata_row : 0;
  const uint32_t ring = ptx::shared_address(shared) + static_cast<uint32_t>(warp * Plan::kRingBytes);
  uint32_t chunk_at = ring + static_cast<uint32_t>(16 * lane);
  uint32_t metadata_to = ring + static_cast<uint32_t>(Plan::kMetadataAt + 16 * (metadata_row % 8) + 8 * metadata_half +
                                                      4 * (metadata_row / 8));
  uint32_t metadata_at = ring + static_cast<uint32_t>(Plan::kMetadataAt + 16 * g + 8 * (t / 2));
  uint32_t own_word = t % 2 == 0 ? 0x5410u : 0x7632u;
  ptx::keep(step), ptx::keep(chunk_at), ptx::keep(metadata_to), ptx::keep(metadata_at), ptx::keep(own_word);
  const auto fetch = [&](uint32_t slot) {
    ptx::cp_async<16>(chunk_at + slot, upper_from, rows > 0);
    ptx::cp_async<16>(chunk_at + slot + Plan::kHalfBytes, lower_from, rows > 8);
    ptx::cp_async<4>(metadata_to + slot, metadata_from, metadata_rows > 0);
    ptx::cp_async_commit();
    upper_from += step;
    lower_from += step;
    metadata_from += step / 8;
    rows -= kGradXRows;
    metadata_rows -= kGradXRows;
  };
  PYFAST_UNROLL_NOT
  for (uint32_t slot = 0; slot < Plan::kRingBytes - Plan::kSlotBytes; slot += Plan::kSlotBytes) fetch(slot);

  float sums[4][TokenTiles][4] = {};
  uint32_t now = 0, done = Plan::kRingBytes - Plan::kSlotBytes;  // the slot to read, the one that was read last
  for (int tile = 0; tile < tiles; ++tile) {
    uint32_t b[TokenTiles][2];
    load_grad(b, grad, args.token_tiles);
    grad += 2 * kGradXRows;
    ptx::cp_async_wait<Plan::kStages - 2>();
    ptx::syncwarp();
    fetch(done);
    const Words2 words = ptx::ld_shared<Words2>(metadata_at + now);
    const Words4 upper_pairs = ptx::ld_shared<Words4>(chunk_at + now);
    const Words4 lower_pairs = ptx::ld_shared<Words4>(chunk_at + now + Plan::kHalfBytes);
    done = now;
    now = now + Plan::kSlotBytes == Plan::kRingBytes ? 0 : now + Plan::kSlotBytes;

    const uint32_t codes = sparse24_codes(ptx::byte_permute(words.x, words.y, own_word));
    uint32_t upper_takes[4], lower_takes[4], upper[4], lower[4];
    look_up(codes, upper_takes);
    look_up(codes >> 16, lower_takes);
    expand_group(upper_takes, 0, upper_pairs.x, upper[0], upper[1]);
    expand_group(upper_takes, 1, upper_pairs.y, upper[2], upper[3]);
    expand_group(lower_takes, 0, lower_pairs.x, lower[0], lower[1]);
    expand_group(lower_takes, 1, lower_pairs.y, lower[2], lower[3]);
    multiply_transposed<T, 0>(sums, upper, lower, b);
    expand_group(upper_takes, 2, upper_pairs.z, upper[0], upper[1]);
    expand_group(upper_takes, 3, upper_pairs.w, upper[2], upper[3]);
    expand_group(lower_takes, 2, lower_pairs.z, lower[0], lower[1]);
    expand_group(lower_takes, 3, lower_pairs.w, lower[2], lower[3]);
    multiply_transposed<T, 1>(sums, upper, lower, b);
  }
  ptx::cp_async_wait<0>();
  ptx::syncthreads();
  finish_grad_x<T, Plan>(shared, sums, args, part, warp_column);
}

// Two of the four columns of a group, low and high holding two each, by its nibble.
PYFAST_DEVICE uint32_t kept_pair(uint32_t low, uint32_t high, uint32_t nibble) {
  return ptx::byte_permute(low, high, 0x1010u + 0x22u * (nibble & 3u) + 0x2200u * (nibble >> 2 & 3u));
}

// Grid: x over 128 columns, y over 128 rows of W.
template <class T>
__global__ void __launch_bounds__(GradValuesPlan::kThreads, 2)
    sparse24_grad_values_kernel(const Sparse24GradValuesArgs args) {
  using Plan = GradValuesPlan;
  PYFAST_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_row = warp / 2 * Plan::kWarpRows, warp_column = warp % 2 * Plan::kWarpColumns;
  const int first_row = static_cast<int>(blockIdx.y) * Plan::kRows;
  const int first_column = static_cast<int>(blockIdx.x) * Plan::kColumns;
  float sums[2][8][4] = {};  // row tile, 8 columns each
  sum_tokens<T>(sums, shared, args.operands, first_row, first_column, warp_row, warp_column);

  // A lane has two columns of each 8, a half of a group. Of 16 columns, a word of metadata, it finishes one of the four
  // groups: an even lane one of the first two, an odd one of the others.
  constexpr int kStride = 20;  // words from row to row: 8 rows differ in bank
  uint32_t* const staged = reinterpret_cast<uint32_t*>(shared) + warp * Plan::kWarpRows * kStride;
  const int row = first_row + warp_row, column = first_column + warp_column;
  if (column >= args.padded_k) return;
  const bool odd = t % 2 != 0;
  const int group = t % 2 * 2 + t / 2, left = args.k - column - 2 * t;
  PYFAST_UNROLL
  for (int tile = 0; tile < 2; ++tile) PYFAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int at = 16 * tile + 8 * half + g;
    uint32_t words[2] = {};  // of 32 columns each, the lane's nibble lowest
    PYFAST_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint16_t* const from = args.metadata + static_cast<int64_t>(row + at) * (args.padded_k / 16) + column / 16;
      if (row + at < args.rows && column + 32 * i < args.padded_k)
        words[i] = ptx::ld_global(reinterpret_cast<const uint32_t*>(from) + i) >> 4 * group;
    }
    const auto pair = [&](int j) {
      const float* const sum = sums[tile][j] + 2 * half;
      return ptx::pack<T>(8 * j < left ? sum[0] : 0.0f, 8 * j + 1 < left ? sum[1] : 0.0f);
    };
    PYFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t one = pair(2 * i), other = pair(2 * i + 1);
      const uint32_t own = odd ? other : one, got = ptx::shfl_xor(odd ? one : other, 1);
      staged[at * kStride + 4 * i + group] = kept_pair(odd ? got : own, odd ? own : got, words[i / 2] >> i % 2 * 16);
    }
  }
  ptx::syncwarp();
  const int chunk = lane % 4;
  PYFAST_UNROLL
  for (int at = lane / 4; at < Plan::kWarpRows; at += 8) {
    if (row + at >= args.rows || column + 16 * chunk >= args.padded_k) continue;
    const Words4 words = *reinterpret_cast<const Words4*>(staged + at * kStride + 4 * chunk);
    uint16_t* const to = args.values + static_cast<int64_t>(row + at) * (args.padded_k / 2) + column / 2 + 8 * chunk;
    ptx::store_global_v4(to, words.x, words.y, words.z, words.w);
  }
}

#endif

}  // namespace pyfast::cuda
