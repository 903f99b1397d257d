// Tokens of a product in tiles of 8, the width of mma, as the kernels take them that read x from L1: where each tile
// begins, and how their sums come to shared memory for split_sums.cuh.
#pragma once

#include <iterator>

#include "common.cuh"

namespace pyfast::cuda {

// Token tiles have 8 tokens. Above 8 in all, the last ones end with the last token and repeat some of those before;
// what is summed twice is stored once.
PYFAST_HOST_DEVICE int first_token(int token_tile, int tokens) {
  return token_tile == 0 || 8 * token_tile <= tokens - 8 ? 8 * token_tile : tokens - 8;
}

// args.token_tiles: bytes from x to the first row of each tile. The kernels read them where they are used: computed
// there, such addresses are 64-bit numbers that the compiler moves out of the loop.
template <class Args>
void set_token_tiles(Args& args) {
  for (int i = 0; i < static_cast<int>(std::size(args.token_tiles)); ++i)
    args.token_tiles[i] = first_token(i, args.tokens) * args.x_stride * 2;
}

#if defined(PYFAST_KERNELS)

// totals[token][row] = what mma_m16n8k16 has summed; `own`: of the lane's row of token 0. Floats from token to token,
// from tile to tile of rows, and from the lane's upper to its lower row in a tile.
template <int Stride, int Tile, int Half, int RowTiles, int TokenTiles>
PYFAST_DEVICE void store_token_sums(float* own, const float (&sums)[RowTiles][TokenTiles][4], int tokens) {
  const int t = static_cast<int>(threadIdx.x % 4);
  PYFAST_UNROLL
  for (int i = 0; i < RowTiles; ++i) PYFAST_UNROLL
  for (int token_tile = 0; token_tile < TokenTiles; ++token_tile) PYFAST_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int token = first_token(token_tile, tokens) + 2 * t + j % 2;
    if (token >= 8 * token_tile) own[token * Stride + Tile * i + Half * (j / 2)] = sums[i][token_tile][j];
  }
}

#endif

}  // namespace pyfast::cuda
