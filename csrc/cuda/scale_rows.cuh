// scale_rows on the GPU: rows of a saved gradient times the gradient that comes in.
//
//   out[i, :] = scale[i] · grad[i, :], rounded from float32
//
// In place, rows of scale 1 are not touched: `loss.backward()` reads one number a block. Otherwise 2E, E being the
// bytes of the gradient: bound by memory. A block does kScaleVectors vectors of 16 bytes a thread of one row; a row
// that does not begin at a multiple of 16 bytes has the words before the first multiple, and those after the last, done
// singly.
#pragma once

#include "common.cuh"

namespace pyfast::cuda {

inline constexpr int kScaleThreads = 256;
inline constexpr int kScaleVectors = 4;

template <class T>
struct ScaleRowsArgs {
  const T* grad;
  const float* scale;
  T* out;
  int64_t grad_stride, scale_stride, out_stride;
  int64_t words;
};

// Words that a block does.
template <class T>
inline constexpr int64_t kScaleWords = int64_t{kScaleThreads} * kScaleVectors * 16 / static_cast<int64_t>(sizeof(T));

#if defined(PYFAST_KERNELS)

template <class T>
PYFAST_DEVICE void scale_word(T* out, const T* grad, float scale) {
  if constexpr (sizeof(T) == 4)
    *out = *grad * scale;
  else
    out->bits = ptx::from_float<T>(ptx::to_float(T{grad->bits}) * scale).bits;
}

template <class T>
PYFAST_DEVICE uint32_t scale_part(uint32_t part, float scale) {
  if constexpr (sizeof(T) == 4) {
    return __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, part) * scale);
  } else {
    const Floats2 pair = ptx::unpack<T>(part);
    return ptx::pack<T>(pair.x * scale, pair.y * scale);
  }
}

// Grid: rows along x, pieces of kScaleWords of a row along y.
template <class T>
__global__ void __launch_bounds__(kScaleThreads) scale_rows_kernel(const ScaleRowsArgs<T> a) {
  constexpr int kWords = 16 / static_cast<int>(sizeof(T));
  const int64_t row = blockIdx.x;
  const float scale = a.scale[row * a.scale_stride];
  const T* grad = a.grad + row * a.grad_stride;
  T* out = a.out + row * a.out_stride;
  if (grad == out && scale == 1.0f) return;
  const int64_t lead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(grad) % 16 / sizeof(T));
  const bool alike = reinterpret_cast<uintptr_t>(out) % 16 == reinterpret_cast<uintptr_t>(grad) % 16;
  const int64_t first = blockIdx.y * kScaleWords<T> - lead;
  PYFAST_UNROLL
  for (int k = 0; k < kScaleVectors; ++k) {
    const int64_t word = first + (int64_t{k} * kScaleThreads + threadIdx.x) * kWords;
    if (alike && word >= 0 && word + kWords <= a.words) {
      const Words4 v = *reinterpret_cast<const Words4*>(grad + word);
      ptx::st_streaming(reinterpret_cast<Words4*>(out + word), {scale_part<T>(v.x, scale), scale_part<T>(v.y, scale),
                                                                scale_part<T>(v.z, scale), scale_part<T>(v.w, scale)});
    } else {
      for (int i = 0; i < kWords; ++i)
        if (word + i >= 0 && word + i < a.words) scale_word(out + word + i, grad + word + i, scale);
    }
  }
}

#endif

}  // namespace pyfast::cuda
