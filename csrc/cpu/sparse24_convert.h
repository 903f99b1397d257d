// sparse24_convert: dense rows to and from the 2:4 form of sparse24_linear.h, by the kernels of bitmap_convert.h.
// Elements are moved as integers of their size, so −0.0, subnormals and NaN survive and to_dense gives back the same
// bits.
//
// A group of four columns keeps two. Where fewer are stored (bits other than +0.0), zeros fill the free places; the
// pair is the first legal one that covers what is stored:
//
//   stored   —     0     1     2     3    01    02    03    12    13    23     three or four
//   kept    0,1   0,1   0,1   0,2   0,3   0,1   0,2   0,3   1,2   1,3   2,3    error: not 2:4
//
// What is kept is a word of 64 columns with two bits of every four: a byte of it, two groups, is a byte of metadata.
//
//   dense ──(scan)──► stored word ──(kept, metadata by its bytes)──► kept word, metadata
//   dense, kept word ──(pack)──► values
//   metadata ──(kept_by_metadata)──► kept word        values, kept word ──(expand)──► dense
#pragma once

#include <cstdint>

#include "bitmap_convert.h"

namespace pyfast {

struct Sparse24Pair {
  uint8_t nibble;  // first | second << 2; 0 where the mask is not 2:4
  uint8_t kept;    // the mask of the two
};

// By the mask of stored columns, bit c for column c.
inline constexpr Sparse24Pair kSparse24Pairs[16] = {
    {0x4, 0x3}, {0x4, 0x3}, {0x4, 0x3}, {0x4, 0x3},  // none, 0, 1, 01
    {0x8, 0x5}, {0x8, 0x5}, {0x9, 0x6}, {0x0, 0x0},  // 2, 02, 12, 012
    {0xC, 0x9}, {0xC, 0x9}, {0xD, 0xA}, {0x0, 0x0},  // 3, 03, 13, 013
    {0xE, 0xC}, {0x0, 0x0}, {0x0, 0x0}, {0x0, 0x0},  // 23, 023, 123, 0123
};

// Two groups at once, by the byte of what is stored, and what a byte of metadata keeps.
struct Sparse24Bytes {
  uint8_t metadata[256], kept[256];
  bool legal[256];
  uint8_t kept_by_metadata[256];

  constexpr Sparse24Bytes() : metadata{}, kept{}, legal{}, kept_by_metadata{} {
    for (int byte = 0; byte < 256; ++byte) {
      const Sparse24Pair low = kSparse24Pairs[byte & 15], high = kSparse24Pairs[byte >> 4];
      metadata[byte] = static_cast<uint8_t>(low.nibble | high.nibble << 4);
      kept[byte] = static_cast<uint8_t>(low.kept | high.kept << 4);
      legal[byte] = low.nibble != 0 && high.nibble != 0;
      const int columns[4] = {byte & 3, byte >> 2 & 3, 4 + (byte >> 4 & 3), 4 + (byte >> 6)};
      for (const int column : columns) kept_by_metadata[byte] |= static_cast<uint8_t>(1 << column);
    }
  }
};

inline constexpr Sparse24Bytes kSparse24Bytes{};

struct Sparse24ConvertArgs {
  int64_t k;             // dense columns
  int64_t k_padded;      // rounded up to a multiple of 32
  int64_t dense_stride;  // elements between dense rows
};

inline constexpr int kWordsAtOnce = 16;
inline constexpr int kWordValues = kWordColumns / 2;

// The kept word of 64 columns, or of the 32 that are left.
inline uint64_t kept_word(const uint16_t* metadata, int64_t columns) {
  uint64_t word = 0;
  for (int i = 0; i < 4 && 16 * i < columns; ++i) {
    const unsigned low = kSparse24Bytes.kept_by_metadata[metadata[i] & 0xff];
    const unsigned high = kSparse24Bytes.kept_by_metadata[metadata[i] >> 8];
    word |= static_cast<uint64_t>(high << 8 | low) << (16 * i);
  }
  return word;
}

// The kept words of `count` times 64 columns from `column` on.
inline void kept_words(const Sparse24ConvertArgs& a, const uint16_t* metadata, int64_t column, int64_t count,
                       uint64_t* words) {
  for (int64_t w = 0; w < count; ++w, column += kWordColumns)
    words[w] = kept_word(metadata + column / 16, a.k_padded - column);
}

// Calls visit(column, words, whole) for the columns of a row, up to kWordsAtOnce words of 64 at a time that lie within
// the matrix, `whole`, and at last for the word, if any, that its edge cuts.
template <class Visit>
void for_each_words(const Sparse24ConvertArgs& a, const Visit& visit) {
  int64_t column = 0;
  for (int64_t left = a.k / kWordColumns; left > 0; left -= kWordsAtOnce) {
    const int64_t words = left < kWordsAtOnce ? left : kWordsAtOnce;
    visit(column, words, true);
    column += words * kWordColumns;
  }
  if (column < a.k_padded) visit(column, int64_t{1}, false);
}

// The last columns of a row, padded with zeros.
template <class U>
struct CutWord {
  U copy[kWordColumns];
  uint64_t bytes;

  CutWord(const Sparse24ConvertArgs& a, int64_t column)
      : bytes(column < a.k ? static_cast<uint64_t>(a.k - column) * sizeof(U) : 0) {}

  const U* of(const U* dense) {
    clear_bytes(copy, sizeof copy);
    copy_bytes(copy, dense, bytes);
    return copy;
  }
};

// Rows [begin, end). Returns the dense position row * k + column of the first group that is not 2:4, or -1.
template <class U>
int64_t sparse24_compress(const Sparse24ConvertArgs& a, const U* dense, U* values, uint16_t* metadata, int64_t begin,
                          int64_t end) {
  const BitmapConvertTable& table = bitmap_convert_table(active_isa());
  int64_t violation = -1;
  for (int64_t row = begin; row < end && violation < 0; ++row) {
    const U* p = dense + row * a.dense_stride;
    uint16_t* m = metadata + row * (a.k_padded / 16);
    for_each_words(a, [&](int64_t column, int64_t count, bool whole) {
      CutWord<U> cut(a, column);
      const U* from = whole ? p + column : cut.of(p + column);
      uint64_t words[kWordsAtOnce];
      table.scan[kSizeIndex<U>](from, kWordColumns, count, words);
      for (int64_t w = 0; w < count; ++w) {
        uint64_t kept = 0;
        for (int64_t at = 0; at < kWordColumns && column + w * kWordColumns + at < a.k_padded; at += 8) {
          const unsigned byte = words[w] >> at & 0xff;
          if (!kSparse24Bytes.legal[byte] && violation < 0) {
            const int64_t group = kSparse24Pairs[byte & 15].nibble == 0 ? 0 : 4;
            violation = row * a.k + column + w * kWordColumns + at + group;
          }
          kept |= static_cast<uint64_t>(kSparse24Bytes.kept[byte]) << at;
          const unsigned half = kSparse24Bytes.metadata[byte];
          uint16_t& word = m[(column + w * kWordColumns + at) / 16];
          word = static_cast<uint16_t>(at % 16 == 0 ? half : word | half << 8);
        }
        words[w] = kept;
      }
      if (violation < 0)
        table.pack[kSizeIndex<U>](from, kWordColumns, count, words, values + row * (a.k_padded / 2) + column / 2);
    });
  }
  return violation;
}

// values at the kept places, taken from dense; zeros in the padding.
template <class U>
void sparse24_gather(const Sparse24ConvertArgs& a, const U* dense, const uint16_t* metadata, U* values, int64_t begin,
                     int64_t end) {
  const PackKernel pack = bitmap_convert_table(active_isa()).pack[kSizeIndex<U>];
  for (int64_t row = begin; row < end; ++row) {
    const U* p = dense + row * a.dense_stride;
    const uint16_t* m = metadata + row * (a.k_padded / 16);
    for_each_words(a, [&](int64_t column, int64_t count, bool whole) {
      CutWord<U> cut(a, column);
      uint64_t words[kWordsAtOnce];
      kept_words(a, m, column, count, words);
      pack(whole ? p + column : cut.of(p + column), kWordColumns, count, words,
           values + row * (a.k_padded / 2) + column / 2);
    });
  }
}

// Dense rows [begin, end); dense points at row begin. `stored`: how many values there are in all.
template <class U>
void sparse24_scatter(const Sparse24ConvertArgs& a, const U* values, int64_t stored, const uint16_t* metadata, U* dense,
                      int64_t begin, int64_t end) {
  const ExpandKernel expand = bitmap_convert_table(active_isa()).expand[kSizeIndex<U>];
  U last[kWordsAtOnce * kWordValues + kExpandOverread];
  for (int64_t row = begin; row < end; ++row) {
    U* p = dense + (row - begin) * a.dense_stride;
    const uint16_t* m = metadata + row * (a.k_padded / 16);
    for_each_words(a, [&](int64_t column, int64_t count, bool whole) {
      CutWord<U> cut(a, column);
      uint64_t words[kWordsAtOnce];
      kept_words(a, m, column, count, words);
      const int64_t at = row * (a.k_padded / 2) + column / 2;
      const U* from = values + at;
      if (const int64_t left = stored - at; left < count * kWordValues + kExpandOverread) {
        const int64_t used = left < count * kWordValues ? left : count * kWordValues;
        copy_bytes(last, from, static_cast<uint64_t>(used) * sizeof(U));
        from = last;
      }
      expand(from, words, count, whole ? p + column : cut.copy, kWordColumns);
      if (!whole) copy_bytes(p + column, cut.copy, cut.bytes);
    });
  }
}

}  // namespace pyfast
