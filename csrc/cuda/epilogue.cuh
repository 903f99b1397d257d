// What happens to a sum of a linear layer before it is stored, y = f(sum + bias) · mul, in float32 and rounded once:
// csrc/cpu/epilogue.h on the GPU. Shared by the products with sparse weights.
#pragma once

#include <cmath>

#include "ptx.cuh"

namespace pyfast::cuda {

enum class Activation : int32_t { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

inline constexpr int kActivationCount = 5;

struct Epilogue {
  const void* bias;  // [n]; null: none
  const void* mul;   // [tokens, n]; null: none
  void* y;           // [tokens, n]; all three in the dtype of x
  int64_t n;
  Activation activation;
};

#if defined(PYFAST_KERNELS)

PYFAST_DEVICE float activate(Activation f, float v) {
  switch (f) {
    case Activation::none:
      break;
    case Activation::relu:
      return v < 0.0f ? 0.0f : v;  // NaN stays
    case Activation::gelu:
      return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case Activation::gelu_tanh:
      return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case Activation::silu:
      return v / (1.0f + expf(-v));
  }
  return v;
}

// Stores element (token, row) of y, T = BFloat16, Float16 or float.
template <class T>
PYFAST_DEVICE void write_output(const Epilogue& e, int64_t token, int64_t row, float sum) {
  if (e.bias != nullptr) sum += ptx::to_float(static_cast<const T*>(e.bias)[row]);
  sum = activate(e.activation, sum);
  if (e.mul != nullptr) sum *= ptx::to_float(static_cast<const T*>(e.mul)[token * e.n + row]);
  static_cast<T*>(e.y)[token * e.n + row] = ptx::from_float<T>(sum);
}

#endif

}  // namespace pyfast::cuda
