// Softmax of a row of logits, written once over Vec (vec_serial.h, vec_avx2.h, vec_avx512.h): exponentials and
// logarithms that keep their digits near 0, and the log-sum-exp of a row in one pass. Everything is in an unnamed
// namespace: nothing compiled for a newer ISA can be picked by the linker for an older one.
#pragma once

#include <cstdint>

#include "scalars.h"

// All 512-bit registers are the caller's to save: a call in a loop over vectors moves every one of them to memory.
#define PYFAST_INLINE [[gnu::always_inline]] inline

namespace pyfast {
namespace {

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into L2

constexpr int64_t kChunk = 1024;  // words summed in float32 before the sum goes to double
constexpr int64_t kPair = 2 * Vec::width;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr double kLn2Double = 0.69314718055994530942;
constexpr float kLowest = -3.40282347e+38f;  // stands in for -inf as a shift, so that -inf - shift is -inf
constexpr float kNegInf = -__builtin_inff();

// n <= Vec::width elements.
template <class T>
Vec load_up_to(const T* p, int64_t n, float fill) {
  return n == Vec::width ? load(p) : load_partial(p, n, fill);
}
template <class T>
void store_up_to(T* p, int64_t n, Vec a) {
  if (n == Vec::width)
    store(p, a);
  else
    store_partial(p, n, a);
}

// 2^n, relative error below 2e-7; 0 for -inf and below the normal numbers. Degree 5 on [0, 1] (minimax).
PYFAST_INLINE Vec exp2(Vec n) {
  const Vec f = above_floor(n);
  Vec p = fma(broadcast(0.0018775767f), f, broadcast(0.00898934f));
  p = fma(p, f, broadcast(0.055826318f));
  p = fma(p, f, broadcast(0.24015361f));
  p = fma(p, f, broadcast(0.6931531f));
  p = fma(p, f, broadcast(0.99999994f));
  return scale_by_floor(p, n);
}

struct ExpParts {
  Vec exp;      // e^x
  Vec expm1;    // e^x - 1
  Vec expm1_x;  // e^x - 1 - x
};

// For |x| <= 16. With x = k ln 2 + f, q = e^f - 1 - f and c = 2^k,
//   e^x - 1 - x = c q + (c f + (c - 1 - x)),
// which is q itself where k = 0: c f - x is then exactly 0. So both parts keep their relative accuracy down to x = 0.
PYFAST_INLINE ExpParts exp_parts(Vec x) {
  const Vec k = round_nearest(x * broadcast(kLog2e));
  const Vec f = fnma(k, broadcast(kLn2), x);
  const Vec f2 = f * f;
  const Vec low = fma(broadcast(0.16666578f), f, broadcast(0.5f));
  const Vec high = fma(broadcast(0.0013901287f), f2, fma(broadcast(0.008363146f), f, broadcast(0.041666854f)));
  const Vec q = fma(high, f2, low) * f2;
  const Vec c = power_of_two(k);
  const Vec expm1_x = fma(c, q, fma(c, f, (c - broadcast(1.0f)) - x));
  return {fma(c, f + q, c), expm1_x + x, expm1_x};
}

struct LogParts {
  Vec log1p;    // log(1 + v)
  Vec v_log1p;  // v - log(1 + v), never negative
};

// For v > -1 with y = 1 + v a normal number. With y = 2^k (1 + r), r in [-0.3, 0.42), and l = r - log(1 + r) = r² p(r),
//   v - log(1 + v) = l + (v - r - k ln 2),
// which is l itself where k = 0: r is then v, exactly. Degree 7 (minimax, relative error of l below 4e-7).
PYFAST_INLINE LogParts log_parts(Vec v) {
  const Exponent e = exponent(v + broadcast(1.0f));
  const Vec r = fma(e.inverse, v, e.inverse - broadcast(1.0f));
  Vec p = fma(broadcast(-0.08901954f), r, broadcast(0.14212723f));
  p = fma(p, r, broadcast(-0.14820293f));
  p = fma(p, r, broadcast(0.16581242f));
  p = fma(p, r, broadcast(-0.19972554f));
  p = fma(p, r, broadcast(0.25001395f));
  p = fma(p, r, broadcast(-0.33333665f));
  p = fma(p, r, broadcast(0.49999997f));
  const Vec l = p * (r * r);
  return {fma(e.k, broadcast(kLn2), r - l), l + fnma(e.k, broadcast(kLn2), v - r)};
}

// tanh(x) = E / (E + 2), E = e^2x - 1; NaN for NaN.
inline Vec tanh(Vec x) {
  const Vec e = exp_parts(min(broadcast(16.0f), abs(x) + abs(x))).expm1;
  const Vec t = e / (e + broadcast(2.0f));
  return select(above(broadcast(0.0f), x), broadcast(0.0f) - t, t);
}

struct RowSum {
  float shift;  // a logit of the row, or kLowest
  double sum;   // of 2^((z - shift) * scale)

  double log2() const { return __builtin_log2(sum); }
};

// A sum above this has a shift that is too low: exponents far above 0 would cost digits of the sum.
constexpr float kMuch = 4096.0f;

template <class T>
float chunk_max(const T* z, int64_t n) {
  Vec top = broadcast(kLowest);
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) top = max(load(z + i), top);
  if (i < n) top = max(load_partial(z + i, n - i, kNegInf), top);
  return reduce_max(top);
}

// Σ 2^((z - shift) * scale) of one chunk.
template <class T>
float chunk_sum(const T* z, int64_t n, float shift, float scale) {
  const Vec m = broadcast(shift), a = broadcast(scale);
  Vec sum0 = broadcast(0.0f), sum1 = broadcast(0.0f);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const VecPair p = load_pair(z + i);
    sum0 = sum0 + exp2((p.a - m) * a);
    sum1 = sum1 + exp2((p.b - m) * a);
  }
  for (; i < n; i += Vec::width) {
    const Vec last = load_up_to(z + i, n - i < Vec::width ? n - i : Vec::width, kNegInf);
    sum0 = sum0 + exp2((last - m) * a);
  }
  return reduce_add(sum0 + sum1);
}

// The first shift: any logit of the row will do.
inline float first_shift(float logit) { return logit >= kLowest && logit <= -kLowest ? logit : kLowest; }

// Moves the shift to the largest logit of a chunk whose sum is large or NaN; a logit of +inf leaves the row NaN.
template <class T>
void raise_shift(RowSum& r, const T* z, int64_t n, float scale) {
  const float top = chunk_max(z, n);
  if (top > -kLowest) r.sum = __builtin_nan("");
  if (!(top > r.shift)) return;
  r.sum *= __builtin_exp2((static_cast<double>(r.shift) - top) * scale);
  r.shift = top;
}

// One chunk more. A chunk that rises too far above the shift is summed again with a new one.
template <class T>
void add_chunk(RowSum& r, const T* z, int64_t n, float scale) {
  float sum = chunk_sum(z, n, r.shift, scale);
  if (!(sum <= kMuch)) {
    raise_shift(r, z, n, scale);
    sum = chunk_sum(z, n, r.shift, scale);
  }
  r.sum += static_cast<double>(sum);
}

// One pass over a row: log-sum-exp as (shift, sum). The shift need not be the maximum, only so near that no chunk's sum
// is large.
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
