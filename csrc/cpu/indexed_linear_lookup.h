// indexed_linear for one token on x86: the activations of four entries come by four scalar loads, side by side into one
// register. A gather does the same loads and takes about twice as long on Zen 4. Include only from a file whose target
// pragma names AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pyfast {
namespace {

inline __m128 look_up(const float* x, const uint8_t* columns) {
  uint32_t four;
  std::memcpy(&four, columns, 4);
  __m128 found = _mm_load_ss(x + (four & 255));
  found = _mm_insert_ps(found, _mm_load_ss(x + ((four >> 8) & 255)), 0x10);
  found = _mm_insert_ps(found, _mm_load_ss(x + ((four >> 16) & 255)), 0x20);
  return _mm_insert_ps(found, _mm_load_ss(x + (four >> 24)), 0x30);
}

// sum + the products of `count` entries, a multiple of four.
inline __m128 add_fours(const float* values, const uint8_t* columns, int64_t count, const float* x, __m128 sum) {
  for (int64_t i = 0; i < count; i += 4) sum = _mm_fmadd_ps(_mm_loadu_ps(values + i), look_up(x, columns + i), sum);
  return sum;
}

inline float sum_lanes(__m128 a) {
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

}  // namespace
}  // namespace pyfast
