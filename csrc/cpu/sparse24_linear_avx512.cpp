// sparse24_linear for AVX-512: 16 kept weights of 32 columns a step. See sparse24_linear_rows.h.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")

#include "vec_avx512.h"
#include "../inline.h"

namespace pyfast {
namespace {

// 32 bits of metadata are 16 two-bit columns: lane j takes bits 2j and adds the base of its group, 4·(j/2).
// One vpermi2ps then picks 16 of the 32 activations held in two registers.
struct Fields {
  __m512i shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  __m512i base = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  __m512i two_bits = _mm512_set1_epi32(3);

  // gcc would read them from memory at every step, three loads where a step has four of its own.
  PYFAST_INLINE Fields() { asm("" : "+v"(shift), "+v"(base), "+v"(two_bits)); }
};

struct Lookup {
  __m512i index;

  Lookup(const uint16_t* metadata, const Fields& f) {
    uint32_t word;
    __builtin_memcpy(&word, metadata, sizeof word);
    const __m512i bits = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(word)), f.shift);
    constexpr int and_or = (0xF0 & 0xCC) | 0xAA;  // (bits & 3) | base
    index = _mm512_ternarylogic_epi32(bits, f.two_bits, f.base, and_or);
  }

  Vec operator()(Vec low, Vec high) const { return {_mm512_permutex2var_ps(low.v, index, high.v)}; }
};

}  // namespace
}  // namespace pyfast

#include "sparse24_linear_rows.h"

namespace pyfast {

const Sparse24LinearTable kSparse24LinearAvx512 = {
    {sparse24_linear<float>, sparse24_linear<bf16>, sparse24_linear<f16>, sparse24_linear<int8_t>},
};

}  // namespace pyfast
#endif
