// bitmap_convert over words, from what the file that includes this has for a few columns:
//   template <class U> uint64_t stored(const U* dense)             the word of 64 elements
//   template <class U> struct Piece { columns; pack, expand }      of some columns; pack must not write at `end` or
//   behind
#pragma once

#include "bitmap_convert.h"

namespace pyfast {
namespace {

template <class U>
void scan(const void* dense, int64_t stride, int64_t rows, uint64_t* words) {
  for (int64_t r = 0; r < rows; ++r) words[r] = stored(static_cast<const U*>(dense) + r * stride);
}

template <class U>
void pack(const void* dense, int64_t stride, int64_t rows, const uint64_t* words, void* values) {
  constexpr int columns = Piece<U>::columns;
  U* v = static_cast<U*>(values);
  const U* end = v;
  for (int64_t r = 0; r < rows; ++r) end += __builtin_popcountll(words[r]);
  for (int64_t r = 0; r < rows; ++r) {
    const U* p = static_cast<const U*>(dense) + r * stride;
#pragma GCC unroll 8
    for (int c = 0; c < kWordColumns; c += columns) {
      const uint64_t bits = words[r] >> c & (~uint64_t{0} >> (64 - columns));
      const int count = __builtin_popcountll(bits);
      Piece<U>::pack(p + c, bits, count, v, end);
      v += count;
    }
  }
}

template <class U>
void expand(const void* values, const uint64_t* words, int64_t rows, void* dense, int64_t stride) {
  constexpr int columns = Piece<U>::columns;
  const U* v = static_cast<const U*>(values);
  for (int64_t r = 0; r < rows; ++r) {
    U* p = static_cast<U*>(dense) + r * stride;
#pragma GCC unroll 8
    for (int c = 0; c < kWordColumns; c += columns) {
      const uint64_t bits = words[r] >> c & (~uint64_t{0} >> (64 - columns));
      Piece<U>::expand(v, bits, p + c);
      v += __builtin_popcountll(bits);
    }
  }
}

}  // namespace
}  // namespace pyfast
