// bitmap_convert in portable code: a column at a time where columns are looked for, a stored one at a time elsewhere.
#include "bitmap_convert.h"

namespace pyfast {
namespace {

template <class U>
void scan(const void* dense, int64_t stride, int64_t rows, uint64_t* words) {
  for (int64_t r = 0; r < rows; ++r) {
    const U* p = static_cast<const U*>(dense) + r * stride;
    uint64_t word = 0;
    for (int c = 0; c < kWordColumns; ++c) word |= static_cast<uint64_t>(p[c] != 0) << c;
    words[r] = word;
  }
}

template <class U>
void pack(const void* dense, int64_t stride, int64_t rows, const uint64_t* words, void* values) {
  U* v = static_cast<U*>(values);
  for (int64_t r = 0; r < rows; ++r)
    for (uint64_t bits = words[r]; bits != 0; bits &= bits - 1)
      *v++ = static_cast<const U*>(dense)[r * stride + __builtin_ctzll(bits)];
}

template <class U>
void expand(const void* values, const uint64_t* words, int64_t rows, void* dense, int64_t stride) {
  const U* v = static_cast<const U*>(values);
  for (int64_t r = 0; r < rows; ++r) {
    U* p = static_cast<U*>(dense) + r * stride;
    clear_bytes(p, kWordColumns * sizeof(U));
    for (uint64_t bits = words[r]; bits != 0; bits &= bits - 1) p[__builtin_ctzll(bits)] = *v++;
  }
}

}  // namespace

const BitmapConvertTable kBitmapConvertSerial = {
    {scan<uint8_t>, scan<uint16_t>, scan<uint32_t>},
    {pack<uint8_t>, pack<uint16_t>, pack<uint32_t>},
    {expand<uint8_t>, expand<uint16_t>, expand<uint32_t>},
};

}  // namespace pyfast
