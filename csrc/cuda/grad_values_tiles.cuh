// The gradient to a weight, gradᵀ·x, up to its sums: the dense product's arithmetic, 2·n·k·tokens, tile by tile of
// 128 × 128. A kernel keeps the sums at the places that its format stores: no dense matrix of n·k is written or held,
// and reading grad and x again from L2 costs 2·(1/128 + 1/128) bytes for each multiplication. Both operands have the
// summed index, the token, as their outer one: ldmatrix.trans. At many tokens mma.sync reaches about 60 % of what the
// dense library does on an H100; what is bought is the memory.
#pragma once

#include "common.cuh"

namespace pyfast::cuda {

struct GradValuesPlan {
  static constexpr int kThreads = 256;
  static constexpr int kRows = 128, kColumns = 128;
  static constexpr int kWarpRows = 32, kWarpColumns = 64;  // 8 warps, 4 down and 2 across
  static constexpr int kTokens = 32;                       // of a stage
  static constexpr int kOperandBytes = kTokens * 256;      // grad or x of a stage
  static constexpr int kStages = 3;
  static constexpr int kSharedBytes = kStages * 2 * kOperandBytes;
};

struct GradValuesOperands {
  const uint16_t *grad, *x;       // [tokens, n], [tokens, k]: rows at multiples of 16 bytes
  int64_t grad_stride, x_stride;  // elements from token to token
  int64_t tokens;
  int32_t grad_columns, x_columns;  // that may be read, multiples of 8
};

#if defined(PYFAST_KERNELS)

// Begins the copies of 32 tokens × 128 columns from `column` on; chunk c of token m lies at c ^ (m & 7).
PYFAST_DEVICE void fetch_operand(unsigned char* to, const uint16_t* from, int64_t stride, int columns, int64_t tokens,
                                 int64_t first_token, int column) {
  PYFAST_UNROLL
  for (int i = static_cast<int>(threadIdx.x); i < GradValuesPlan::kTokens * 16; i += GradValuesPlan::kThreads) {
    const int token = i / 16, chunk = i % 16, at = column + 8 * chunk;
    const bool there = first_token + token < tokens && at < columns;
    ptx::cp_async<16>(to + token * 256 + (chunk ^ (token & 7)) * 16,
                      from + (there ? (first_token + token) * stride + at : 0), there);
  }
}

// The sums of the warp's two row tiles of 16, one below the other, and of its 8 times 8 columns: those of the block
// begin at first_row and first_column, the warp's within at warp_row and warp_column. Leaves shared memory free.
template <class T>
PYFAST_DEVICE void sum_tokens(float (&sums)[2][8][4], unsigned char* shared, const GradValuesOperands& args,
                              int first_row, int first_column, int warp_row, int warp_column) {
  using Plan = GradValuesPlan;
  const int lane = static_cast<int>(threadIdx.x) % 32;
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
}

#endif

}  // namespace pyfast::cuda
