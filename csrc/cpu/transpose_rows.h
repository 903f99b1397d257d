// The algorithm of transpose over Vec: squares of Vec::width rows and columns, turned in registers.
#pragma once

#include "softmax_rows.h"
#include "transpose.h"

namespace pyfast {
namespace {

template <class T>
void copy_widened(const T* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += Vec::width) {
    const int64_t left = count - i < Vec::width ? count - i : Vec::width;
    store_up_to(out + i, left, load_up_to(in + i, left, 0.0f));
  }
}

template <class T>
void transpose(const void* from, int64_t in_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride,
               int64_t wide) {
  const T* in = static_cast<const T*>(from);
  if (wide == 1 && out_stride == 1) return copy_widened(in, columns, out);
  if (columns == 1 && in_stride == 1 && rows == wide) return copy_widened(in, rows, out);
  for (int64_t r = 0; r < wide; r += Vec::width) {
    const int64_t lanes = wide - r < Vec::width ? wide - r : Vec::width;
    for (int64_t c = 0; c < columns; c += Vec::width) {
      const int64_t here = columns - c < Vec::width ? columns - c : Vec::width;
      Vec square[Vec::width];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i)
        square[i] = r + i < rows ? load_up_to(in + (r + i) * in_stride + c, here, 0.0f) : broadcast(0.0f);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::width; ++i)
        if (i < here) store_up_to(out + (c + i) * out_stride + r, lanes, square[i]);
    }
  }
}

constexpr TransposeTable make_transpose_table() { return {{transpose<float>, transpose<bf16>, transpose<f16>}}; }

}  // namespace
}  // namespace pyfast
