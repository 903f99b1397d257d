// bitmap_linear for AVX-512: vexpandps spreads the next popcount(mask) values to 16 lanes, which are two rows of an
// 8×8 block, lanes 0–7 the even row and 8–15 the odd one; the block's 8 activations are broadcast to both halves of
// a register. A word is four such steps, and the 8 sums of a strip of 16 rows stay in registers.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,popcnt")

#include "vec_avx512.h"
#include "bitmap_linear_strip.h"

namespace pyfast {
namespace {

constexpr int kPairs = kTileRows / 2;  // two rows a register

template <class T, int tokens>
void bitmap_strip(const BitmapLinearArgs& a, int64_t tile_row, int64_t token) {
  const int64_t tiles = a.k / kTileColumns;
  TileValues<T> buffer;
  Vec sum[tokens][kPairs];
  // Every loop over sums is unrolled, or gcc keeps them in memory: an array whose index is not a constant has an
  // address.
#pragma GCC unroll 3
  for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
    for (int pair = 0; pair < kPairs; ++pair) sum[t][pair] = broadcast(0.0f);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const uint64_t* words = a.bitmaps + (tile_row * tiles + tile) * kTileWords;
    const float* x = a.x + token * a.x_stride + tile * kTileColumns;
    const T* w = buffer.at(a, tile_row * tiles + tile);
    for (int block = 0; block < kTileColumns / 8; ++block) {
      Vec x8[tokens];
      for (int t = 0; t < tokens; ++t)
        x8[t] = {_mm512_broadcast_f32x8(_mm256_loadu_ps(x + t * a.x_stride + 8 * block))};
#pragma GCC unroll 8
      for (int pair = 0; pair < kPairs; ++pair) {
        if (pair % 4 == 0) prefetch_values(w);
        const unsigned mask = (words[2 * block + pair / 4] >> (16 * (pair % 4))) & 0xffff;
        const Vec e = {_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), load(w).v)};
#pragma GCC unroll 3
        for (int t = 0; t < tokens; ++t) sum[t][pair] = fma(e, x8[t], sum[t][pair]);
        w += __builtin_popcount(mask);
      }
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (int pair = 0; pair < kPairs; ++pair) {
      const int64_t row = tile_row * kTileRows + 2 * pair;
      const __m512 s = sum[t][pair].v;
      write_output<T>(a, row, token + t, _mm512_mask_reduce_add_ps(0x00ff, s));
      write_output<T>(a, row + 1, token + t, _mm512_mask_reduce_add_ps(0xff00, s));
    }
  }
}

template <class T>
void bitmap_linear(const BitmapLinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
    int64_t token = 0;
    for (; token + 3 <= a.tokens; token += 3) bitmap_strip<T, 3>(a, tile_row, token);
    for (; token < a.tokens; ++token) bitmap_strip<T, 1>(a, tile_row, token);
  }
}

}  // namespace

const BitmapLinearTable kBitmapLinearAvx512 = {
    {bitmap_linear<float>, bitmap_linear<bf16>, bitmap_linear<f16>},
    32,
};

}  // namespace pyfast
#endif
