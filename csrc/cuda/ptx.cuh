// One named wrapper for each PTX instruction that the kernels use, each with its contract. Three ways to read it:
//
//   nvcc         the wrappers are inline assembly or the intrinsic of the same name
//   PYFAST_SIMT  g++ compiles the same kernels and tests/simt executes them on the host, lane by lane: simt_ptx.h
//                holds the same names and checks what the contracts say
//   otherwise    types only: PYFAST_KERNELS is not defined, and the .cuh files hold no kernels
//
// A warp has 32 lanes; g = lane / 4, t = lane % 4. What is marked [warp] is called by all 32 lanes together.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define PYFAST_DEVICE __device__ __forceinline__
#define PYFAST_KERNELS 1
#elif defined(PYFAST_SIMT)
#define PYFAST_DEVICE inline __attribute__((always_inline))
#define PYFAST_KERNELS 1
#endif

namespace pyfast::cuda {

// Elements of 16 bits as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
struct Floats2 {
  float x, y;
};

inline constexpr uint32_t kFullWarp = 0xffffffffu;

template <class T>
inline constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;
template <class T>
inline constexpr bool kIsTensorCoreType = kIsBFloat16<T> || std::is_same_v<T, Float16>;

}  // namespace pyfast::cuda

#if defined(PYFAST_SIMT)
#include "simt_ptx.h"
#elif defined(__CUDACC__)

// A variable in the shared memory of the block. Type may be an alias of an array type.
#define PYFAST_SHARED(Type, name) __shared__ Type name
// The shared memory whose size the launch gives: an array of unsigned char at a multiple of 128 bytes.
#define PYFAST_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace pyfast::cuda::ptx {

// Where something lies in shared memory: the address that load_marked takes.
PYFAST_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- Barriers -----------------------------------------------------------------------------------------------------

// bar.sync: all threads of the block at one place; orders their memory accesses.
PYFAST_DEVICE void syncthreads() { __syncthreads(); }

// bar.warp.sync: the lanes of mask; orders their memory accesses.
PYFAST_DEVICE void syncwarp(uint32_t mask = kFullWarp) { __syncwarp(mask); }

// ---- Shuffles, votes, bits ----------------------------------------------------------------------------------------
// All lanes of mask call a shuffle or vote with the same mask. None of them orders memory accesses.

// shfl.idx: the value of lane `from`, which is in mask. T has 32 bits, here and below.
template <class T>
PYFAST_DEVICE T shfl(T value, int from, uint32_t mask = kFullWarp) {
  static_assert(sizeof(T) == 4);
  return __shfl_sync(mask, value, from);
}

// shfl.bfly: the value of lane (own ^ with).
template <class T>
PYFAST_DEVICE T shfl_xor(T value, int with, uint32_t mask = kFullWarp) {
  static_assert(sizeof(T) == 4);
  return __shfl_xor_sync(mask, value, with);
}

// shfl.up: the value of lane (own - by), the own value where there is none.
template <class T>
PYFAST_DEVICE T shfl_up(T value, int by, uint32_t mask = kFullWarp) {
  static_assert(sizeof(T) == 4);
  return __shfl_up_sync(mask, value, static_cast<unsigned>(by));
}

// shfl.down: the value of lane (own + by), the own value where there is none.
template <class T>
PYFAST_DEVICE T shfl_down(T value, int by, uint32_t mask = kFullWarp) {
  static_assert(sizeof(T) == 4);
  return __shfl_down_sync(mask, value, static_cast<unsigned>(by));
}

// shfl.up and an addition under its predicate: value and that of lane (own - By), the own value where there is none.
template <int By>
PYFAST_DEVICE uint32_t add_from_below(uint32_t value) {
  asm volatile(
      "{ .reg .pred there;\n\t"
      ".reg .b32 below;\n\t"
      "shfl.sync.up.b32 below|there, %0, %1, 0, 0xffffffff;\n\t"
      "@there add.u32 %0, %0, below; }"
      : "+r"(value)
      : "n"(By));
  return value;
}

// vote.ballot: bit i is the predicate of lane i.
PYFAST_DEVICE uint32_t ballot(bool predicate, uint32_t mask = kFullWarp) { return __ballot_sync(mask, predicate); }
PYFAST_DEVICE bool any(bool predicate, uint32_t mask = kFullWarp) { return __any_sync(mask, predicate) != 0; }
PYFAST_DEVICE bool all(bool predicate, uint32_t mask = kFullWarp) { return __all_sync(mask, predicate) != 0; }

// popc: how many bits are set.
PYFAST_DEVICE int popc(uint32_t word) { return __popc(word); }
PYFAST_DEVICE int popcll(uint64_t word) { return __popcll(word); }

// bfind: the place of the highest set bit; word is not 0.
PYFAST_DEVICE int highest_bit(uint32_t word) {
  int place;
  asm("bfind.u32 %0, %1;" : "=r"(place) : "r"(word));
  return place;
}

// shf.r.wrap: the 64 bits high:low shifted right by 0 to 31, their lower half.
PYFAST_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t by) { return __funnelshift_r(low, high, by); }

// prmt: nibble i of selector names the byte (0–3 of a, 4–7 of b) that becomes byte i; 8 more, and its sign bit fills
// byte i. The upper half of selector does not count. (__byte_perm masks a selector that it does not know, an
// instruction.)
PYFAST_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t word;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(selector));
  return word;
}

// No instruction: the value stays in its register, the compiler may not compute it again where it is used.
template <class T>
PYFAST_DEVICE void keep(T& value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(value));
  else
    asm volatile("" : "+r"(value));
}

// dp4a: sum plus the bytes of a times those of b. dp2a.lo: sum plus the halves of a times the two lower bytes of b.
PYFAST_DEVICE uint32_t dot4(uint32_t a, uint32_t b, uint32_t sum) { return __dp4a(a, b, sum); }
PYFAST_DEVICE uint32_t dot2(uint32_t a, uint32_t b, uint32_t sum) {
  asm("dp2a.lo.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
  return sum;
}

// ---- Global memory ------------------------------------------------------------------------------------------------
// Pointers are multiples of the size of what they point to.

// ld.global.nc: memory that no thread writes while the kernel runs, nor the grid before it if they may overlap: ptxas
// moves these loads across everything, wait_prerequisites too.
PYFAST_DEVICE uint32_t ld_nc(const uint32_t* from) {
  uint32_t word;
  asm("ld.global.nc.b32 %0, [%1];" : "=r"(word) : "l"(__cvta_generic_to_global(from)));
  return word;
}
PYFAST_DEVICE Words2 ld_nc(const Words2* from) {
  Words2 words;
  asm("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(__cvta_generic_to_global(from)));
  return words;
}
PYFAST_DEVICE Words4 ld_nc(const Words4* from) {
  Words4 words;
  asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
      : "l"(__cvta_generic_to_global(from)));
  return words;
}

// ld.global: memory that no thread of the grid writes. Stays behind wait_prerequisites.
// A half becomes a word: nvcc moves a register of 16 bits as soon as it is loaded, and waits for that.
PYFAST_DEVICE uint32_t ld_global(const uint16_t* from) {
  uint32_t word;
  asm volatile("ld.global.u16 %0, [%1];" : "=r"(word) : "l"(__cvta_generic_to_global(from)));
  return word;
}
PYFAST_DEVICE uint32_t ld_global(const uint32_t* from) {
  uint32_t word;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(word) : "l"(__cvta_generic_to_global(from)));
  return word;
}
PYFAST_DEVICE Words2 ld_global(const Words2* from) {
  Words2 words;
  asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(__cvta_generic_to_global(from)));
  return words;
}
PYFAST_DEVICE Words4 ld_global(const Words4* from) {
  Words4 words;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(__cvta_generic_to_global(from)));
  return words;
}

// The same for memory that is read once: not kept in L1.
PYFAST_DEVICE uint32_t ld_streaming(const uint32_t* from) {
  uint32_t word;
  asm volatile("ld.global.L1::no_allocate.b32 %0, [%1];" : "=r"(word) : "l"(__cvta_generic_to_global(from)));
  return word;
}
PYFAST_DEVICE Words2 ld_streaming(const Words2* from) {
  Words2 words;
  asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
               : "=r"(words.x), "=r"(words.y)
               : "l"(__cvta_generic_to_global(from)));
  return words;
}
PYFAST_DEVICE Words4 ld_streaming(const Words4* from) {
  Words4 words;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(__cvta_generic_to_global(from)));
  return words;
}

// prefetch.global.L2: a hint that the 128 bytes around the address will be read soon.
PYFAST_DEVICE void prefetch_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(from)));
}

// st.global.cs: memory that is not read again soon.
PYFAST_DEVICE void st_streaming(Words4* to, const Words4& words) {
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// st.global.v4.b32: 16 bytes at once.
PYFAST_DEVICE void store_global_v4(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// red.add.f32: adds to global or shared memory; the order among threads is open.
PYFAST_DEVICE void atomic_add(float* to, float value) { atomicAdd(to, value); }

// red.min.u64: the smaller of what is there and value, in global memory.
PYFAST_DEVICE void atomic_min(uint64_t* to, uint64_t value) {
  atomicMin(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// atom.acq_rel.gpu.inc.u32: takes the next number below count; the last one leaves 0. What the taker wrote to global
// memory before, and its block before their last barrier, is seen by the block of each later taker after its next one;
// likewise warp and syncwarp.
PYFAST_DEVICE uint32_t atomic_ticket(uint32_t* counter, uint32_t count) {
  uint32_t number;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(number)
               : "l"(__cvta_generic_to_global(counter)), "r"(count - 1)
               : "memory");
  return number;
}

// ---- Shared memory ------------------------------------------------------------------------------------------------

// ld.shared: Words is uint32_t, Words2 or Words4, at a multiple of its size. Plain loads do the same; this one adds no
// base to an address that was computed from shared_address, nor looks for the kind of memory of a pointer.
template <class Words>
PYFAST_DEVICE Words ld_shared(uint32_t address) {
  Words words;
  if constexpr (std::is_same_v<Words, uint32_t>)
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words) : "r"(address) : "memory");
  else if constexpr (std::is_same_v<Words, Words2>)
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(address) : "memory");
  else
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(address)
                 : "memory");
  return words;
}

// st.shared: the lower half of a word, or 16 bytes, to an address as ld_shared takes it.
PYFAST_DEVICE void st_shared_half(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b16 [%0], %1;" : : "r"(address), "h"(static_cast<uint16_t>(word)) : "memory");
}
PYFAST_DEVICE void st_shared(uint32_t address, const Words4& words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// ---- Copies into shared memory ------------------------------------------------------------------------------------

// cp.async: Bytes (4, 8 or 16) from global to shared memory, both at multiples of Bytes; zeros, and nothing is read,
// where they are not `there`. They lie there for this thread after its cp_async_wait, for others after a barrier
// besides. Part of a chunk cannot be copied: of any source size but 0 the hardware reads all Bytes. `shared` may be an
// address as ld_shared takes it.
template <int Bytes>
PYFAST_DEVICE void cp_async(uint32_t shared, const void* global, bool there = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const int source_bytes = there ? Bytes : 0;
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(shared), "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared), "l"(__cvta_generic_to_global(global)), "n"(Bytes), "r"(source_bytes)
                 : "memory");
}
template <int Bytes>
PYFAST_DEVICE void cp_async(void* shared, const void* global, bool there = true) {
  cp_async<Bytes>(shared_address(shared), global, there);
}

// cp.async.commit_group: the copies begun since the last one are a group (perhaps an empty one).
PYFAST_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// cp.async.wait_group: until no more than the newest Pending groups of this thread are under way.
template <int Pending>
PYFAST_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(Pending) : "memory");
}

// ---- Shared memory under predicates --------------------------------------------------------------------------------

// ld.shared.u16 of 8 places, each where its bit, the First-th of `bits` or one of the 7 above it, is set; else zero.
// Place 2i lies at the shared address at[i], place 2i + 1 ends at at[i + 1]; words[i] holds both, the first in the
// lower half. The tests of 7 bits stand together because ptxas then takes them out of the register at once (R2P).
template <int First>
PYFAST_DEVICE void load_marked(uint32_t (&words)[4], uint32_t bits, const uint32_t (&at)[5]) {
#define PYFAST_TEST(place) "and.b32 word, %9, (1 << (%10 + " #place "));\n\tsetp.ne.u32 p" #place ", word, 0;\n\t"
#define PYFAST_LOAD(place, address) \
  "mov.b32 v" #place ", 0;\n\t@p" #place " ld.shared.u16 v" #place ", [" address "];\n\t"
  asm volatile(
      "{ .reg .pred p<8>;\n\t"
      ".reg .b32 v<8>, word;\n\t"  //
      PYFAST_TEST(0) PYFAST_TEST(1) PYFAST_TEST(2) PYFAST_TEST(3) PYFAST_TEST(4) PYFAST_TEST(5) PYFAST_TEST(6)
      PYFAST_LOAD(0, "%4") PYFAST_LOAD(1, "%5+-2") PYFAST_LOAD(2, "%5") PYFAST_LOAD(3, "%6+-2")
      PYFAST_LOAD(4, "%6") PYFAST_LOAD(5, "%7+-2") PYFAST_LOAD(6, "%7") PYFAST_TEST(7) PYFAST_LOAD(7, "%8+-2")
      "prmt.b32 %0, v0, v1, 0x5410;\n\t"
      "prmt.b32 %1, v2, v3, 0x5410;\n\t"
      "prmt.b32 %2, v4, v5, 0x5410;\n\t"
      "prmt.b32 %3, v6, v7, 0x5410; }"
      : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
      : "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "r"(bits), "n"(First)
      : "memory");
#undef PYFAST_TEST
#undef PYFAST_LOAD
}

// ---- Tensor cores -------------------------------------------------------------------------------------------------

// [warp] ldmatrix: Count (1, 2 or 4) matrices of 8×8 16-bit elements from shared memory. Lane 8i + r gives the address
// of row r of matrix i, a multiple of 16 bytes; addresses of lanes past 8·Count do not count.
//   words[i]   elements 2t and 2t + 1 of row g of matrix i; Transposed: element g of the rows 2t and 2t + 1
template <int Count, bool Transposed = false>
PYFAST_DEVICE void ldmatrix(uint32_t (&words)[Count], const void* row) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
#define PYFAST_LDMATRIX(shape, outputs, address, ...)                                                \
  if constexpr (Transposed)                                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".trans.shared.b16 " outputs ", [" address "];" \
                 : __VA_ARGS__                                                                       \
                 : "r"(shared_address(row))                                                          \
                 : "memory");                                                                        \
  else                                                                                               \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".shared.b16 " outputs ", [" address "];"       \
                 : __VA_ARGS__                                                                       \
                 : "r"(shared_address(row))                                                          \
                 : "memory")
  if constexpr (Count == 4) {
    PYFAST_LDMATRIX("x4", "{%0, %1, %2, %3}", "%4", "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]));
  } else if constexpr (Count == 2) {
    PYFAST_LDMATRIX("x2", "{%0, %1}", "%2", "=r"(words[0]), "=r"(words[1]));
  } else {
    PYFAST_LDMATRIX("x1", "{%0}", "%1", "=r"(words[0]));
  }
#undef PYFAST_LDMATRIX
}

// [warp] movmatrix: transposes an 8×8 matrix of 16-bit elements that the warp holds.
//   word     elements 2t and 2t + 1 of row g        result   elements 2t and 2t + 1 of column g
PYFAST_DEVICE uint32_t transpose_matrix(uint32_t word) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
  return transposed;
}

// [warp] mma.m16n8k16: d[16, 8] = a[16, 16]·b[16, 8] + c[16, 8]; T is BFloat16 or Float16, sums are float32. d may be
// c.
//   a[0], a[1]   columns 2t, 2t + 1 of the rows g, g + 8       a[2], a[3]   columns 2t + 8, 2t + 9 of the same rows
//   b[i]         rows 2t + 8i, 2t + 8i + 1 of column g
//   c[0], c[1]   columns 2t, 2t + 1 of row g                   c[2], c[3]   the same of row g + 8
template <class T>
PYFAST_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  static_assert(kIsTensorCoreType<T>);
#define PYFAST_MMA(type)                                     \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "  \
      "{%10, %11, %12, %13};"                                \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
  if constexpr (kIsBFloat16<T>)
    PYFAST_MMA("bf16");
  else
    PYFAST_MMA("f16");
#undef PYFAST_MMA
}

// [warp] mma.sp::ordered_metadata.m16n8k32: d[16, 8] = a[16, 32]·b[32, 8] + c[16, 8] with a in 2:4 form. a is its 16×16
// kept values, laid out as in mma_m16n8k16, c and d too.
//   b[i]       rows 2t + 8i, 2t + 8i + 1 of column g
//   metadata   nibbles of the groups of four columns, lowest bits first: 4, 8, 9, C, D or E (two places, ascending).
//              Of lanes t = 2·Selector (columns 0–15) and t = 2·Selector + 1 (columns 16–31): bits 0–15 row g, bits
//              16–31 row g + 8. The other two lanes' words do not count.
template <class T, int Selector>
PYFAST_DEVICE void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], const float (&c)[4],
                                   uint32_t metadata) {
  static_assert(kIsTensorCoreType<T> && (Selector == 0 || Selector == 1));
#define PYFAST_MMA_SP(type)                                                                                           \
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type                                     \
      ".f32 {%0, %1, %2, %3}, "                                                                                       \
      "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%12, %13, %14, %15}, %16, %17;"                                         \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "f"(c[0]), "f"(c[1]), \
        "f"(c[2]), "f"(c[3]), "r"(metadata), "n"(Selector))
  if constexpr (kIsBFloat16<T>)
    PYFAST_MMA_SP("bf16");
  else
    PYFAST_MMA_SP("f16");
#undef PYFAST_MMA_SP
}

}  // namespace pyfast::cuda::ptx

#include "ptx_grids.cuh"
#include "ptx_numbers.cuh"

#endif
