// Softmax of a row of logits, written once over Vec (vec_serial.h, vec_avx2.h, vec_avx512.h): the log-sum-exp of a row
// in one pass. Everything is in an unnamed namespace: nothing compiled for a newer ISA can be picked by the linker for
// an older one.
#pragma once

#include <cstdint>

#include "../exp_log.h"
#include "ranged_exp2.h"
#include "scalars.h"

namespace pyfast {
namespace {

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }     // into L2
inline void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }  // and into L1

constexpr int64_t kPair = 2 * Vec::width;
constexpr float kLowest = -3.40282347e+38f;  // stands in for -inf as a shift, so that -inf - shift is -inf

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

struct RowSum {
  float shift;  // a logit of the row, or kLowest
  double sum;   // of 2^((z - shift) * scale)
  Ranged near;  // the same shift; not usable either once logits were found to lie too far from it

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

// Σ 2^((z - shift) * scale) of one chunk, whose logits need not lie near the shift.
template <class T>
double any_sum(const T* z, int64_t n, float shift, float scale) {
  const Vec m = broadcast(shift), a = broadcast(scale);
  Total sum0{}, sum1{};
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
  return static_cast<double>(reduce_add(sum0 + sum1));
}

// The same of logits near the shift, n a multiple of 2 kPair; marks `near` where they are not, and is no sum then.
template <class T>
double near_sum(const T* z, int64_t n, Ranged& near) {
  const Ranged of[1] = {near};
  const Powers powers;
  Outside outside;
  Total sum[4] = {};
  for (int64_t i = 0; i < n; i += 2 * kPair) {
    const VecPair p = load_pair(z + i), q = load_pair(z + i + kPair);
    Vec e[4] = {p.a, p.b, q.a, q.b};
    ranged_exp2(e, of, powers, outside);
    for (int j = 0; j < 4; ++j) sum[j] = sum[j] + e[j];
  }
  near.usable = !outside.any();
  return static_cast<double>(reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]))) * near.unit;
}

template <bool may_be_near, class T>
double chunk_sum(RowSum& r, const T* z, int64_t n, float scale) {
  if (may_be_near && r.near.usable) {
    const int64_t whole = n / (2 * kPair) * (2 * kPair);
    const double sum = near_sum(z, whole, r.near);
    if (r.near.usable) return sum + any_sum(z + whole, n - whole, r.shift, scale);
  }
  return any_sum(z, n, r.shift, scale);
}

// Nothing summed yet. The first shift: any logit of the row will do.
inline RowSum no_sum(float logit, float scale) {
  const float shift = logit >= kLowest && logit <= -kLowest ? logit : kLowest;
  return {shift, 0.0, ranged(shift, scale)};
}

// Moves the shift to the largest logit of a chunk whose sum is large or NaN; a logit of +inf leaves the row NaN.
template <class T>
void raise_shift(RowSum& r, const T* z, int64_t n, float scale) {
  const float top = chunk_max(z, n);
  if (top > -kLowest) r.sum = __builtin_nan("");
  if (top > r.shift) {
    r.sum *= __builtin_exp2((static_cast<double>(r.shift) - top) * scale);
    r.shift = top;
  }
  r.near = ranged(r.shift, scale);
}

// One chunk more. A chunk that rises too far above the shift is summed again with a new one. may_be_near: false for a
// chunk of which words were made -inf.
template <bool may_be_near = true, class T>
void add_chunk(RowSum& r, const T* z, int64_t n, float scale) {
  double sum = chunk_sum<may_be_near>(r, z, n, scale);
  if (!(sum <= kMuch)) {
    raise_shift(r, z, n, scale);
    sum = chunk_sum<may_be_near>(r, z, n, scale);
  }
  r.sum += sum;
}

// One pass over a row: log-sum-exp as (shift, sum). The shift need not be the maximum, only so near that no chunk's sum
// is large.
template <class T>
RowSum row_sum(const T* z, int64_t vocab, float scale) {
  RowSum r = no_sum(widen(z[0]), scale);
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
