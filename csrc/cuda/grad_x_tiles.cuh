// The gradient to x, grad·W for up to 32 tokens, behind the expansion of W: of a tile of 16 rows × 64 columns lane
// 4g + t holds columns 16t … 16t + 15 of the rows g and g + 8, its two runs, two columns a register. W is wanted
// transposed: the registers of a run (columns 16t + 2p and + 1 of the row g) are an 8×8 matrix of rows against columns,
// and movmatrix, one instruction, turns it into the fragment of Wᵀ:
//
//   a[0]  columns 16(g / 2) + 4q + g % 2,      rows 2t, 2t + 1       c[0], c[1]  these columns, tokens 2t, 2t + 1
//   a[1]  columns 16(g / 2) + 4q + 2 + g % 2,  the same rows         c[2], c[3]  the columns of a[1]
//   a[2]  columns of a[0], rows 2t + 8, 2t + 9
//   a[3]  columns of a[1], the same                                  q = 0 … 3: 16 columns each
#pragma once

#include "split_sums.cuh"
#include "token_tiles.cuh"

namespace pyfast::cuda {

inline constexpr int kGradXRows = 16, kGradXColumns = 64;  // of a tile

// Sums of a block, in shared memory: of `Columns` columns, by warps that go down `Parts` parts of the rows.
template <int TokenTiles, int Columns, int Parts>
struct GradXSums {
  static constexpr int kTokens = 8 * TokenTiles;
  static constexpr int kColumns = Columns;
  static constexpr int kParts = Parts;
  static constexpr int kSumStride = kColumns + 4;  // floats from token to token
  static constexpr int kSumBytes = kTokens * kSumStride * 4;

  // Shared memory of a block that has `pipeline` bytes of it before the sums.
  static constexpr int or_sums(int pipeline) { return pipeline > kParts * kSumBytes ? pipeline : kParts * kSumBytes; }
};

#if defined(PYFAST_KERNELS)

// Where the lane's part of grad begins, args.x, for rows of W from `row` on: its token of the first token tile.
template <class Args>
PYFAST_DEVICE const unsigned char* first_grad(const Args& args, int64_t row) {
  const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
  return reinterpret_cast<const unsigned char*>(args.x) + 2 * ((g < args.tokens ? g : 0) * args.x_stride + row + 2 * t);
}

// grad at the rows of a tile, as mma takes it.
template <int TokenTiles, int Most>
PYFAST_DEVICE void load_grad(uint32_t (&b)[TokenTiles][2], const unsigned char* grad,
                             const int64_t (&token_tiles)[Most]) {
  PYFAST_UNROLL
  for (int token_tile = 0; token_tile < TokenTiles; ++token_tile) {
    const unsigned char* const row = grad + (token_tile == 0 ? 0 : token_tiles[token_tile]);
    b[token_tile][0] = ptx::ld_global(reinterpret_cast<const uint32_t*>(row));
    b[token_tile][1] = ptx::ld_global(reinterpret_cast<const uint32_t*>(row + 16));
  }
}

// [warp] Multiplies columns 8·Half … + 7 of the lanes' runs, which come to lie transposed: q = 2·Half and 2·Half + 1.
template <class T, int Half, int TokenTiles>
PYFAST_DEVICE void multiply_transposed(float (&sums)[4][TokenTiles][4], uint32_t (&upper)[4], uint32_t (&lower)[4],
                                       const uint32_t (&b)[TokenTiles][2]) {
  PYFAST_UNROLL
  for (int pair = 0; pair < 4; ++pair) {
    upper[pair] = ptx::transpose_matrix(upper[pair]);
    lower[pair] = ptx::transpose_matrix(lower[pair]);
  }
  PYFAST_UNROLL
  for (int token_tile = 0; token_tile < TokenTiles; ++token_tile) PYFAST_UNROLL
  for (int q = 0; q < 2; ++q) {
    const uint32_t a[4] = {upper[2 * q], upper[2 * q + 1], lower[2 * q], lower[2 * q + 1]};
    float (&sum)[4] = sums[2 * Half + q][token_tile];
    ptx::mma_m16n8k16<T>(sum, a, b[token_tile], sum);
  }
}

// The sums of all warps, each of part `part` and of 64 columns from `column` on of the block's, become the output. All
// of shared memory is free. Grid: x over the splits of the rows of W, y over its columns.
template <class T, class Plan, class Args, int TokenTiles>
PYFAST_DEVICE void finish_grad_x(unsigned char* shared, const float (&sums)[4][TokenTiles][4], const Args& args,
                                 int part, int column) {
  const int g = static_cast<int>(threadIdx.x % 32 / 4);
  float* const totals = reinterpret_cast<float*>(shared);
  float* const own = totals + part * (Plan::kSumBytes / 4) + column + 16 * (g / 2) + g % 2;
  store_token_sums<Plan::kSumStride, 4, 2>(own, sums, args.tokens);
  ptx::syncthreads();
  finish_sums<T, Plan::kThreads, Plan::kTokens, Plan::kColumns, Plan::kSumStride, Plan::kParts, Plan::kSumBytes / 4>(
      totals, args.out, args.partial, args.tokens, 0, static_cast<int64_t>(blockIdx.y) * Plan::kColumns);
}

#endif

}  // namespace pyfast::cuda
