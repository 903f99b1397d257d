// One named wrapper for each PTX instruction that the kernels use. Device code only.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

namespace pyfast::cuda::ptx {

// st.global.v4.b32: 16 bytes at once to global memory; `to` is a multiple of 16 bytes.
__device__ __forceinline__ void store_global_v4(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

}  // namespace pyfast::cuda::ptx

#endif
