// PYFAST_INLINE: a function of a few instructions on vectors, for the CPU and for a thread of a GPU.
#pragma once

#if defined(__CUDACC__)
#define PYFAST_INLINE __device__ __forceinline__
#elif defined(PYFAST_SIMT)  // tests/simt compiles often, and runs short
#define PYFAST_INLINE inline
#else
// All 512-bit registers are the caller's to save: a call in a loop over vectors moves every one of them to memory.
#define PYFAST_INLINE [[gnu::always_inline]] inline
#endif
