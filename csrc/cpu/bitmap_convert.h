// bitmap_convert: dense rows to and from the bitmap form of bitmap_linear.h, 64 columns of a row at a time.
//
//   word     bit c: whether column c is stored              ··· 0 1 1 0 1
//   dense    64 elements of a row                           ··· 0 c b 0 a
//   values   the stored ones, one after the other               a b c
//
//   scan     dense        ──► word
//   pack     dense, word  ──► values
//   expand   values, word ──► dense, zeros where nothing is stored
//
// Elements move as integers of their size. One is stored where its bits are not those of +0.0: −0.0, subnormals and NaN
// survive, and expand gives back the same bits. sparse24_convert.h makes words of its metadata and uses the same
// kernels. Traffic: what is read once and what is written once.
#pragma once

#include <cstdint>

#include "bitmap_linear.h"

namespace pyfast {

inline constexpr int kWordColumns = kTileColumns;

// Elements that expand may read behind the last value.
inline constexpr int kExpandOverread = 64;

// `rows` words; dense points to 64 columns of as many rows, `stride` elements apart.
using ScanKernel = void (*)(const void* dense, int64_t stride, int64_t rows, uint64_t* words);
using PackKernel = void (*)(const void* dense, int64_t stride, int64_t rows, const uint64_t* words, void* values);
using ExpandKernel = void (*)(const void* values, const uint64_t* words, int64_t rows, void* dense, int64_t stride);

struct BitmapConvertTable {  // by the size of an element: 1, 2 or 4 bytes
  ScanKernel scan[3];
  PackKernel pack[3];
  ExpandKernel expand[3];
};

extern const BitmapConvertTable kBitmapConvertSerial;
#if defined(__x86_64__)
extern const BitmapConvertTable kBitmapConvertAvx2;
extern const BitmapConvertTable kBitmapConvertAvx512;
extern const BitmapConvertTable kBitmapConvertAvx512Vbmi2;  // 1 and 2 bytes without widening
#endif

const BitmapConvertTable& bitmap_convert_table(Isa isa);

// Where in the table elements of unsigned integers U are.
template <class U>
inline constexpr int kSizeIndex = sizeof(U) == 4 ? 2 : sizeof(U) - 1;

}  // namespace pyfast
