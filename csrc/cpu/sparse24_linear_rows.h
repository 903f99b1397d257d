// The vector algorithm of sparse24_linear over Vec. The ISA file that includes this says how kept columns are
// looked up (struct Lookup, of struct Fields): no gather from memory, the candidates of one step lie in two registers.
//
//   step = 2·width columns:   metadata ──► width indices (2 bits each, plus 4·(lane/2))
//                             x[step]  ──► two registers ──(permute by index)──► width activations
//                             values   ──► width weights ──────────────────────► one FMA
//
// With several tokens four rows share the registers of x, and up to four tokens share the indices. One token is bound
// by memory: it takes a row at a time, so that the weights are one stream, and asks for it early.
#pragma once

#include "sparse24_linear.h"

namespace pyfast {
namespace {

constexpr int kAhead = 4096;  // bytes of a row's values to ask for early

template <class T, int rows, int tokens>
void sparse24_block(const Sparse24LinearArgs& a, int64_t row, int64_t token) {
  constexpr int64_t step = 2 * Vec::width;
  const T* values = static_cast<const T*>(a.values) + row * (a.k / 2);
  const uint16_t* metadata = a.metadata + row * (a.k / 16);
  const float* x = a.x + token * a.x_stride;
  const Fields fields{};
  Vec sum[rows][tokens];
  // Every loop over sums is unrolled, or gcc keeps them in memory: an array whose index is not a constant has an
  // address.
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sum[r][t] = broadcast(0.0f);
  for (int64_t k = 0; k < a.k; k += step) {
    Vec low[tokens], high[tokens];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) {
      low[t] = load(x + t * a.x_stride + k);
      high[t] = load(x + t * a.x_stride + k + Vec::width);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Lookup kept(metadata + r * (a.k / 16) + k / 16, fields);
      const Vec w = load(values + r * (a.k / 2) + k / 2);
      if constexpr (tokens == 1) __builtin_prefetch(reinterpret_cast<const char*>(values + k / 2) + kAhead, 0, 2);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) sum[r][t] = fma(w, kept(low[t], high[t]), sum[r][t]);
    }
  }
  float total[rows][tokens];  // first all sums, then the outputs: a call saves no vector register
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) total[r][t] = reduce_add(sum[r][t]);
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < tokens; ++t) write_output(a.out, row + r, token + t, total[r][t]);
}

template <class T, int tokens>
void sparse24_tokens(const Sparse24LinearArgs& a, int64_t begin, int64_t end, int64_t token) {
  int64_t row = begin;
  if constexpr (tokens > 1)
    for (; row + 4 <= end; row += 4) sparse24_block<T, 4, tokens>(a, row, token);
  for (; row < end; ++row) sparse24_block<T, 1, tokens>(a, row, token);
}

template <class T>
void sparse24_linear(const Sparse24LinearArgs& a, int64_t begin, int64_t end) {
  int64_t token = 0;
  for (; token + 4 <= a.tokens; token += 4) sparse24_tokens<T, 4>(a, begin, end, token);
  if (token + 2 <= a.tokens) {
    sparse24_tokens<T, 2>(a, begin, end, token);
    token += 2;
  }
  if (token < a.tokens) sparse24_tokens<T, 1>(a, begin, end, token);
}

}  // namespace
}  // namespace pyfast
