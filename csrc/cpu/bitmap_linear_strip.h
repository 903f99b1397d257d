// What the vector forms of bitmap_linear share: reading a tile's values safely, and writing a strip's results.
#pragma once

#include "bitmap_linear.h"

namespace pyfast {
namespace {

constexpr int kOverread = 16;  // expanding reads up to this many values from the first one wanted

// The values of a tile, readable for kOverread elements past their end. Only the last tiles of a weight need the
// copy: elsewhere the next tile's values follow in the same buffer.
template <class T>
struct TileValues {
  T copy[kTileRows * kTileColumns + kOverread];

  const T* at(const BitmapLinearArgs& a, int64_t tile) {
    const T* values = static_cast<const T*>(a.values) + a.offsets[tile];
    if (a.offsets[tile + 1] + kOverread <= a.nnz) return values;
    __builtin_memcpy(copy, values, static_cast<uint64_t>(a.offsets[tile + 1] - a.offsets[tile]) * sizeof(T));
    return copy;
  }
};

// Asks for the values that lie kAhead bytes after w, as many lines as one word of the bitmap takes up at half
// density. Without it two threads stay well below the read bandwidth: decoding leaves too few loads in flight.
template <class T>
inline void prefetch_values(const T* w) {
  constexpr int kAhead = 2048, kLine = 64;
  for (int line = 0; line < 32 * static_cast<int>(sizeof(T)) / kLine; ++line)
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kAhead + line * kLine, 0, 3);
}

template <class T>
void write_output(const BitmapLinearArgs& a, int64_t row, int64_t token, float sum) {
  if (row >= a.n) return;  // a row of padding
  const float bias = a.bias == nullptr ? 0.0f : a.bias[row];
  narrow(sum + bias, static_cast<T*>(a.y) + token * a.y_stride + row);
}

}  // namespace
}  // namespace pyfast
