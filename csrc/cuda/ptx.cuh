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

// prmt: nibble i of selector names the byte (0–3 of a, 4–7 of b) that becomes byte i.
PYFAST_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// ---- Global memory ------------------------------------------------------------------------------------------------
// Pointers are multiples of the size of what they point to.

// ld.global.nc: memory that no thread writes while the kernel runs.
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

// The same for memory that is read once: not kept in L1.
PYFAST_DEVICE Words4 ld_streaming(const Words4* from) {
  Words4 words;
  asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
      : "l"(__cvta_generic_to_global(from)));
  return words;
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
// memory before, and its block before their last barrier, is seen by the block of each later taker after its next one.
PYFAST_DEVICE uint32_t atomic_ticket(uint32_t* counter, uint32_t count) {
  uint32_t number;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(number)
               : "l"(__cvta_generic_to_global(counter)), "r"(count - 1)
               : "memory");
  return number;
}

// ---- Copies into shared memory ------------------------------------------------------------------------------------

// cp.async: Bytes (4, 8 or 16) from global to shared memory, both at multiples of Bytes. Only source_bytes are read,
// the rest becomes zero. They lie there for this thread after its cp_async_wait, for others after a barrier besides.
template <int Bytes>
PYFAST_DEVICE void cp_async(void* shared, const void* global, int source_bytes = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "n"(Bytes), "r"(source_bytes)
                 : "memory");
}

// cp.async.commit_group: the copies begun since the last one are a group (perhaps an empty one).
PYFAST_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// cp.async.wait_group: until no more than the newest Pending groups of this thread are under way.
template <int Pending>
PYFAST_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(Pending) : "memory");
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

// ---- Numbers ------------------------------------------------------------------------------------------------------

// ex2.approx.ftz.f32, lg2.approx.ftz.f32: 2^x and log2 x, to about 2 units in the last place.
PYFAST_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PYFAST_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx.ftz.f32: 1 / x, to one unit in the last place.
PYFAST_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Widening is exact; narrowing rounds to nearest even (cvt.rn).
PYFAST_DEVICE float to_float(float x) { return x; }
PYFAST_DEVICE float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
PYFAST_DEVICE float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two neighbours in one word, the first in the lower half.
template <class T>
PYFAST_DEVICE Floats2 unpack(uint32_t pair) {
  static_assert(kIsTensorCoreType<T>);
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}
template <class T>
PYFAST_DEVICE uint32_t pack(float first, float second) {
  static_assert(kIsTensorCoreType<T>);
  uint32_t pair;
  if constexpr (kIsBFloat16<T>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
template <class T>
PYFAST_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else
    return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
}

// max.bf16x2, max.f16x2: of two pairs, word by word; a NaN gives way to the other.
template <class T>
PYFAST_DEVICE uint32_t max_pair(uint32_t a, uint32_t b) {
  static_assert(kIsTensorCoreType<T>);
  uint32_t pair;
  if constexpr (kIsBFloat16<T>)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// mul.rn: a · b rounded; the compiler does not fuse it with an addition.
PYFAST_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }

// fma.rn.sat: a · b + c between 0 and 1; 0 for NaN.
PYFAST_DEVICE float fma_saturated(float a, float b, float c) { return __saturatef(__fmaf_rn(a, b, c)); }

// ---- Clusters of blocks (sm_90 and up: a kernel that uses them guards its body) -------------------------------------

PYFAST_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));  // read again rather than kept in a register
  return rank;
}
PYFAST_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// barrier.cluster arrive.release, wait.acquire: all threads of the cluster; orders their memory accesses. One comes
// before the first access to another block's shared memory (the block may not have begun) and one after the last (it
// may have ended).
PYFAST_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;"
      :
      :
      : "memory");
}

// fence.acq_rel.cluster, and barrier.cluster arrive.relaxed, wait.acquire: a cluster_sync() that orders only the
// accesses that threads made before their cluster_fence(). A fence waits for all that its thread has written.
PYFAST_DEVICE void cluster_fence() { asm volatile("fence.acq_rel.cluster;" : : : "memory"); }
PYFAST_DEVICE void cluster_sync_relaxed() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;"
      :
      :
      : "memory");
}

// mapa: the same variable in the shared memory of block `rank` of the cluster; plain loads and stores reach it.
template <class T>
PYFAST_DEVICE T* map_shared_rank(T* shared, uint32_t rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(address);
}

// ld.shared::cluster: the float that block `rank` holds at the place of `shared`.
PYFAST_DEVICE float ld_cluster(const float* shared, uint32_t rank) {
  float value;
  asm volatile(
      "{ .reg .b32 address;\n\t"
      "mapa.shared::cluster.u32 address, %1, %2;\n\t"
      "ld.shared::cluster.f32 %0, [address]; }"
      : "=f"(value)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return value;
}

// st.shared::cluster: sets it.
PYFAST_DEVICE void st_cluster(float* shared, uint32_t rank, float value) {
  asm volatile(
      "{ .reg .b32 address;\n\t"
      "mapa.shared::cluster.u32 address, %0, %1;\n\t"
      "st.shared::cluster.f32 [address], %2; }"
      :
      : "r"(shared_address(shared)), "r"(rank), "f"(value)
      : "memory");
}

}  // namespace pyfast::cuda::ptx

#endif
