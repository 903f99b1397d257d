// Rows of logits and their softmax: exponentials, log-sum-exp and what else the distillation kernels share, over Vec
// (vec_serial.h, vec_avx2.h, vec_avx512.h). Everything is in an unnamed namespace, as in the files that include it.
#pragma once

#include <cstdint>

#include "scalars.h"

namespace pyfast {
namespace {

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into L2

constexpr int64_t kChunk = 1024;  // words summed in float32 before the sum goes to double
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr double kLn2Double = 0.69314718055994530942;
constexpr float kLowest = -3.40282347e+38f;  // stands in for -inf as a maximum, so that -inf - max is -inf
constexpr float kNegInf = -__builtin_inff();

// 2^n, relative error below 2e-7; 0 for -inf and below the normal numbers. Degree 5 on [0, 1] (minimax).
inline Vec exp2(Vec n) {
  const Vec f = above_floor(n);
  Vec p = fma(broadcast(0.0018775767f), f, broadcast(0.00898934f));
  p = fma(p, f, broadcast(0.055826318f));
  p = fma(p, f, broadcast(0.24015361f));
  p = fma(p, f, broadcast(0.6931531f));
  p = fma(p, f, broadcast(0.99999994f));
  return scale_by_floor(p, n);
}

struct ExpParts {
  Vec expm1;    // e^x - 1
  Vec expm1_x;  // e^x - 1 - x
};

// For |x| <= kFar. With x = k ln 2 + f, q = e^f - 1 - f and c = 2^k,
//   e^x - 1 - x = c q + (c f + (c - 1 - x)),
// which is q itself where k = 0: c f - x is then exactly 0. So both parts keep their relative accuracy down to x = 0.
inline ExpParts exp_parts(Vec x) {
  const Vec k = round_nearest(x * broadcast(kLog2e));
  const Vec f = fnma(k, broadcast(kLn2), x);
  const Vec f2 = f * f;
  const Vec low = fma(broadcast(0.16666578f), f, broadcast(0.5f));
  const Vec high = fma(broadcast(0.0013901287f), f2, fma(broadcast(0.008363146f), f, broadcast(0.041666854f)));
  const Vec q = fma(high, f2, low) * f2;
  const Vec c = power_of_two(k);
  const Vec expm1_x = fma(c, q, fma(c, f, (c - broadcast(1.0f)) - x));
  return {expm1_x + x, expm1_x};
}

struct RowSum {
  float shift;  // near the maximum of the raw logits; at least kLowest
  double sum;   // of 2^((z - shift) * scale)
};

// Σ 2^((z - shift) * scale) of one chunk, and its largest z.
struct ChunkSum {
  float max, sum;
};

template <class T>
ChunkSum chunk_sum(const T* z, int64_t n, float shift, float scale) {
  const Vec m = broadcast(shift), a = broadcast(scale);
  Vec top = broadcast(kLowest), sum0 = broadcast(0.0f), sum1 = broadcast(0.0f);
  int64_t i = 0;
  for (; i + 2 * Vec::width <= n; i += 2 * Vec::width) {
    const Vec z0 = load(z + i), z1 = load(z + i + Vec::width);
    top = max(z0, max(z1, top));
    sum0 = sum0 + exp2((z0 - m) * a);
    sum1 = sum1 + exp2((z1 - m) * a);
  }
  for (; i < n; i += Vec::width) {
    const Vec z0 = i + Vec::width <= n ? load(z + i) : load_partial(z + i, n - i, kNegInf);
    top = max(z0, top);
    sum0 = sum0 + exp2((z0 - m) * a);
  }
  return {reduce_max(top), reduce_add(sum0 + sum1)};
}

// One chunk more. The shift need not be the maximum, only so near that nothing overflows: a chunk that rises more than
// kHeadroom above it is summed again with a new one.
template <class T>
void add_chunk(RowSum& r, const T* z, int64_t n, float scale) {
  constexpr float kHeadroom = 8.0f;  // in powers of two
  ChunkSum chunk = chunk_sum(z, n, r.shift, scale);
  if ((chunk.max - r.shift) * scale > kHeadroom) {
    r.sum *= __builtin_exp2((static_cast<double>(r.shift) - chunk.max) * scale);
    r.shift = chunk.max;
    chunk = chunk_sum(z, n, r.shift, scale);
  }
  r.sum += static_cast<double>(chunk.sum);
}

// The shift to begin with: the first logit, or what stands in for it where it is infinite or NaN.
inline float first_shift(float logit) { return logit >= kLowest && logit <= -kLowest ? logit : kLowest; }

// One pass over a row: log-sum-exp as (shift, sum).
template <class T>
RowSum row_sum(const T* z, int64_t vocab, float scale) {
  RowSum r{first_shift(widen(z[0])), 0.0};
  for (int64_t begin = 0; begin < vocab; begin += kChunk)
    add_chunk(r, z + begin, vocab - begin < kChunk ? vocab - begin : kChunk, scale);
  return r;
}

template <class T>
void zero_row(T* p, int64_t n) {
  const Vec zero = broadcast(0.0f);
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) store(p + i, zero);
  if (i < n) store_partial(p + i, n - i, zero);
}

}  // namespace
}  // namespace pyfast
