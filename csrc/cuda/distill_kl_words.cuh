// Vectors of distill_kl, 16 bytes of logits or of a gradient, as floats: widened, under their softcap, narrowed.
#pragma once

#include "common.cuh"
#include "distill_kl_store.cuh"
#include "vec.cuh"

#include "../exp_log.h"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

// The words of a vector, as floats.
template <class T>
struct Words {
  static constexpr int count = kVectorWords<T>;
  float at[count];
};

template <class T>
PYFAST_DEVICE Words<T> widen_vector(const Words4& bits) {
  const uint32_t parts[4] = {bits.x, bits.y, bits.z, bits.w};
  Words<T> out;
  PYFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out.at[i] = float_of(parts[i]);
    } else {
      const Floats2 pair = ptx::unpack<T>(parts[i]);
      out.at[2 * i] = pair.x;
      out.at[2 * i + 1] = pair.y;
    }
  }
  return out;
}

template <class T>
PYFAST_DEVICE Words4 narrow_vector(const Words<T>& z) {
  uint32_t parts[4];
  PYFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      parts[i] = bits_of(z.at[i]);
    else
      parts[i] = ptx::pack<T>(z.at[2 * i], z.at[2 * i + 1]);
  }
  return {parts[0], parts[1], parts[2], parts[3]};
}

// The highest word of some vectors, before its softcap; NaN gives way to others.
template <class T, int kVectors>
PYFAST_DEVICE float highest_of(const Words4 (&bits)[kVectors]) {
  uint32_t top = bits[0].x;
  const auto take = [&](uint32_t word) {
    if constexpr (sizeof(T) == 4)
      top = bits_of(__builtin_fmaxf(float_of(top), float_of(word)));
    else
      top = ptx::max_pair<T>(top, word);
  };
  PYFAST_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    if (v > 0) take(bits[v].x);
    take(bits[v].y);
    take(bits[v].z);
    take(bits[v].w);
  }
  if constexpr (sizeof(T) == 4) {
    return float_of(top);
  } else {
    const Floats2 pair = ptx::unpack<T>(top);
    return __builtin_fmaxf(pair.x, pair.y);
  }
}

PYFAST_DEVICE float capped(float z, float softcap) {
  return softcap == 0.0f || z == kNegInf ? z : softcap * tanh(broadcast(z * (1.0f / softcap))).at[0];
}

// Logits of a vector under their softcap.
template <class T>
PYFAST_DEVICE Words<T> logits_of(const Words4& bits, float softcap) {
  Words<T> z = widen_vector<T>(bits);
  if (softcap != 0.0f) {
    PYFAST_UNROLL
    for (float& word : z.at) word = capped(word, softcap);
  }
  return z;
}

#endif

}  // namespace pyfast::cuda
