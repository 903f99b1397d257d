// What happens to a sum of a linear layer before it is stored: y = f(scale · sum + bias) · mul, rounded once.
//
//   scale  one number a row, where the stored values are integers
//   f      none, relu, gelu (by erf), gelu_tanh, silu
//   mul    [tokens, n]: the other branch of a gated MLP, as in silu(x Gᵀ) · (x Uᵀ)
//
// write_output is for a few outputs of a row of weights; where a token has many at once, the table's kernels.
#pragma once

#include <cstdint>

#include "isa.h"
#include "scalars.h"

namespace pyfast {

enum class Activation { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

inline constexpr const char* kActivationNames[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
inline constexpr int kActivationCount = 5;

struct Epilogue {
  const float* scales;  // [n]; null: 1
  const float* bias;    // [n]; null: 0
  const void* mul;      // [tokens, n] in the dtype of y; null: 1
  void* y;              // [tokens, n]
  int64_t mul_stride, y_stride;
  int64_t n;
  Dtype dtype;  // of y and mul
  Activation activation;
};

// Outputs [row, row + count) of a token from their sums, which lie next to each other. Not for weights with scales:
// those of integers are multiplied by kernels for few tokens alone.
using EpilogueKernel = void (*)(const Epilogue& e, const void* sums, int64_t row, int64_t token, int64_t count);

struct EpilogueTable {  // by the dtype of y
  EpilogueKernel from_float[kDtypeCount];
  EpilogueKernel from_same[kDtypeCount];  // sums of that dtype; they may lie in y itself
};

extern const EpilogueTable kEpilogueSerial;
#if defined(__x86_64__)
extern const EpilogueTable kEpilogueAvx2;
extern const EpilogueTable kEpilogueAvx512;
#endif

const EpilogueTable& epilogue_table(Isa isa);

namespace {

inline float activate(Activation f, float v) {
  switch (f) {
    case Activation::none:
      break;
    case Activation::relu:
      return v < 0.0f ? 0.0f : v;  // NaN stays
    case Activation::gelu:
      return 0.5f * v * (1.0f + __builtin_erff(v * 0.70710678f));
    case Activation::gelu_tanh:
      return 0.5f * v * (1.0f + __builtin_tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case Activation::silu:
      return v / (1.0f + __builtin_expf(-v));
  }
  return v;
}

template <class T>
void write_output(const Epilogue& e, int64_t row, int64_t token, float sum) {
  float v = e.scales == nullptr ? sum : sum * e.scales[row];
  if (e.bias != nullptr) v += e.bias[row];
  if (e.activation != Activation::none) v = activate(e.activation, v);
  if (e.mul != nullptr) v *= widen(static_cast<const T*>(e.mul)[token * e.mul_stride + row]);
  narrow(v, static_cast<T*>(e.y) + token * e.y_stride + row);
}

// Rows of padding, at and beyond n, are not written.
inline void write_output(const Epilogue& e, int64_t row, int64_t token, float sum) {
  if (row >= e.n) return;
  switch (e.dtype) {
    case Dtype::f32:
      return write_output<float>(e, row, token, sum);
    case Dtype::bf16:
      return write_output<bf16>(e, row, token, sum);
    case Dtype::f16:
      return write_output<f16>(e, row, token, sum);
  }
}

}  // namespace
}  // namespace pyfast
