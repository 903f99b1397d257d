// The epilogue of many outputs of one token, over Vec (vec_serial.h, vec_avx2.h, vec_avx512.h).
#pragma once

#include "epilogue.h"
#include "softmax_rows.h"

namespace pyfast {
namespace {

// erf has no vector form here: gelu goes lane by lane.
PYFAST_INLINE Vec activate_lanes(Activation f, Vec v) {
  float lanes[Vec::width];
  store(lanes, v);
  for (float& lane : lanes) lane = activate(f, lane);
  return load(lanes);
}

// v / (1 + e^−u); −0 where e^−u is beyond the largest power of two.
PYFAST_INLINE Vec times_sigmoid(Vec v, Vec u) {
  const Vec n = u * broadcast(-kLog2e), most = broadcast(127.0f);
  return select(above(n, most), broadcast(-0.0f), v / (broadcast(1.0f) + exp2(min(most, n))));
}

PYFAST_INLINE Vec activate(Activation f, Vec v) {
  const Vec zero = broadcast(0.0f);
  switch (f) {
    case Activation::none:
      break;
    case Activation::relu:
      return select(above(zero, v), zero, v);  // NaN stays
    case Activation::gelu:
      return activate_lanes(f, v);
    case Activation::gelu_tanh:  // (1 + tanh(u)) / 2 is the sigmoid of 2u
      return times_sigmoid(v, broadcast(1.59576912f) * fma(broadcast(0.044715f) * v * v, v, v));
    case Activation::silu:
      return times_sigmoid(v, v);
  }
  return v;
}

template <class From, class T>
void outputs(const Epilogue& e, const void* sums, int64_t row, int64_t token, int64_t count) {
  const From* from = static_cast<const From*>(sums);
  T* y = static_cast<T*>(e.y) + token * e.y_stride + row;
  const T* mul = e.mul == nullptr ? nullptr : static_cast<const T*>(e.mul) + token * e.mul_stride + row;
  for (int64_t i = 0; i < count; i += Vec::width) {
    const int64_t left = count - i < Vec::width ? count - i : Vec::width;
    Vec v = load_up_to(from + i, left, 0.0f);
    if (e.bias != nullptr) v = v + load_up_to(e.bias + row + i, left, 0.0f);
    if (e.activation != Activation::none) v = activate(e.activation, v);
    if (mul != nullptr) v = v * load_up_to(mul + i, left, 0.0f);
    store_up_to(y + i, left, v);
  }
}

constexpr EpilogueTable make_epilogue_table() {
  return {{outputs<float, float>, outputs<float, bf16>, outputs<float, f16>},
          {outputs<float, float>, outputs<bf16, bf16>, outputs<f16, f16>}};
}

}  // namespace
}  // namespace pyfast
