// The names of csrc/cuda/ptx.cuh on the host; their contracts stand there. Included by ptx.cuh alone.
#pragma once

#include <cmath>

#include "../cpu/scalars.h"
#include "simt.h"

#define PYFAST_SHARED(Type, name)                           \
  Type& name = *static_cast<Type*>(::simt::shared_variable( \
      [] {                                                  \
        static const char key = 0;                          \
        return static_cast<const void*>(&key);              \
      }(),                                                  \
      #name, sizeof(Type)))
#define PYFAST_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::dynamic_shared()

namespace pyfast::cuda::ptx {

using simt::Where;

PYFAST_DEVICE int lane_index() {
  const simt::Dim3 index = simt::thread_index(), size = simt::block_size();
  return static_cast<int>((index.x + size.x * (index.y + size.y * index.z)) % 32);
}

// Kernels address only the memory of the launch by number. From sm_90 on it begins behind what the system keeps, and in
// a cluster the number says whose memory it is.
PYFAST_DEVICE uint32_t shared_begin() { return simt::cluster_rank() << 24 | 1024; }
PYFAST_DEVICE uint32_t shared_address(const void* shared) {
  return shared_begin() + static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - simt::dynamic_shared());
}
PYFAST_DEVICE unsigned char* shared_at(uint32_t address) {
  return simt::dynamic_shared() + (static_cast<int64_t>(address) - shared_begin());
}

PYFAST_DEVICE void syncthreads(Where where = Where::current()) { simt::block_barrier(where); }
PYFAST_DEVICE void syncwarp(uint32_t mask = kFullWarp, Where where = Where::current()) {
  simt::warp_barrier(mask, where);
}

template <class T>
PYFAST_DEVICE T shuffle(simt::Shuffle mode, T value, int lane, uint32_t mask, Where where) {
  static_assert(sizeof(T) == 4);
  return __builtin_bit_cast(T, simt::shuffle(mode, __builtin_bit_cast(uint32_t, value), lane, mask, where));
}
template <class T>
PYFAST_DEVICE T shfl(T value, int from, uint32_t mask = kFullWarp, Where where = Where::current()) {
  return shuffle(simt::Shuffle::index, value, from, mask, where);
}
template <class T>
PYFAST_DEVICE T shfl_xor(T value, int with, uint32_t mask = kFullWarp, Where where = Where::current()) {
  return shuffle(simt::Shuffle::exclusive_or, value, with, mask, where);
}
template <class T>
PYFAST_DEVICE T shfl_up(T value, int by, uint32_t mask = kFullWarp, Where where = Where::current()) {
  return shuffle(simt::Shuffle::up, value, by, mask, where);
}
template <class T>
PYFAST_DEVICE T shfl_down(T value, int by, uint32_t mask = kFullWarp, Where where = Where::current()) {
  return shuffle(simt::Shuffle::down, value, by, mask, where);
}

template <int By>
PYFAST_DEVICE uint32_t add_from_below(uint32_t value, Where where = Where::current()) {
  const uint32_t below = shfl_up(value, By, kFullWarp, where);
  return value + (lane_index() >= By ? below : 0);
}

PYFAST_DEVICE uint32_t ballot(bool predicate, uint32_t mask = kFullWarp, Where where = Where::current()) {
  return simt::vote(predicate, mask, where);
}
PYFAST_DEVICE bool any(bool predicate, uint32_t mask = kFullWarp, Where where = Where::current()) {
  return simt::vote(predicate, mask, where) != 0;
}
PYFAST_DEVICE bool all(bool predicate, uint32_t mask = kFullWarp, Where where = Where::current()) {
  return simt::vote(predicate, mask, where) == mask;
}
PYFAST_DEVICE int popc(uint32_t word) { return __builtin_popcount(word); }
PYFAST_DEVICE int popcll(uint64_t word) { return __builtin_popcountll(word); }
PYFAST_DEVICE int highest_bit(uint32_t word) { return 31 - __builtin_clz(word); }
PYFAST_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31u));
}
PYFAST_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15u;
    const uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (nibble & 7u)) & 255u;
    word |= (nibble & 8u ? (byte & 128u ? 255u : 0u) : byte) << 8 * i;
  }
  return word;
}
PYFAST_DEVICE uint32_t dot4(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255u) * (b >> i & 255u);
  return sum;
}
PYFAST_DEVICE uint32_t dot2(uint32_t a, uint32_t b, uint32_t sum) {
  return sum + (a & 0xffffu) * (b & 255u) + (a >> 16) * (b >> 8 & 255u);
}

template <class T>
PYFAST_DEVICE void keep(T&) {}

template <class T>
PYFAST_DEVICE T load(const T* from, Where where) {
  T value;
  simt::load(&value, from, sizeof(T), where);
  return value;
}
template <class T>
PYFAST_DEVICE T constant(const T* from, Where where) {
  simt::check_alone(where);
  return load(from, where);
}
PYFAST_DEVICE uint32_t ld_nc(const uint32_t* from, Where where = Where::current()) { return constant(from, where); }
PYFAST_DEVICE Words2 ld_nc(const Words2* from, Where where = Where::current()) { return constant(from, where); }
PYFAST_DEVICE Words4 ld_nc(const Words4* from, Where where = Where::current()) { return constant(from, where); }
PYFAST_DEVICE uint32_t ld_global(const uint16_t* from, Where where = Where::current()) { return load(from, where); }
PYFAST_DEVICE uint32_t ld_global(const uint32_t* from, Where where = Where::current()) { return load(from, where); }
PYFAST_DEVICE Words2 ld_global(const Words2* from, Where where = Where::current()) { return load(from, where); }
PYFAST_DEVICE Words4 ld_global(const Words4* from, Where where = Where::current()) { return load(from, where); }
PYFAST_DEVICE uint32_t ld_streaming(const uint32_t* from, Where where = Where::current()) { return load(from, where); }
PYFAST_DEVICE Words2 ld_streaming(const Words2* from, Where where = Where::current()) { return load(from, where); }
PYFAST_DEVICE Words4 ld_streaming(const Words4* from, Where where = Where::current()) { return load(from, where); }
PYFAST_DEVICE void prefetch_l2(const void*) {}
PYFAST_DEVICE void st_streaming(Words4* to, const Words4& words, Where where = Where::current()) {
  simt::store(to, &words, sizeof(words), where);
}
PYFAST_DEVICE void store_global_v4(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                   Where where = Where::current()) {
  const Words4 words{a, b, c, d};
  simt::store(to, &words, sizeof(words), where);
}
PYFAST_DEVICE void atomic_add(float* to, float value, Where where = Where::current()) { simt::add(to, value, where); }
PYFAST_DEVICE void atomic_min(uint64_t* to, uint64_t value, Where where = Where::current()) {
  simt::minimum(to, value, where);
}
PYFAST_DEVICE uint32_t atomic_ticket(uint32_t* counter, uint32_t count, Where where = Where::current()) {
  return simt::ticket(counter, count, where);
}

template <class Words>
PYFAST_DEVICE Words ld_shared(uint32_t address, Where where = Where::current()) {
  return load(reinterpret_cast<const Words*>(shared_at(address)), where);
}

PYFAST_DEVICE void st_shared_half(uint32_t address, uint32_t word, Where where = Where::current()) {
  const uint16_t half = static_cast<uint16_t>(word);
  simt::store(shared_at(address), &half, sizeof(half), where);
}
PYFAST_DEVICE void st_shared(uint32_t address, const Words4& words, Where where = Where::current()) {
  simt::store(shared_at(address), &words, sizeof(words), where);
}

template <int Bytes>
PYFAST_DEVICE void cp_async(void* shared, const void* global, bool there = true, Where where = Where::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  simt::copy_async(shared, global, Bytes, there, where);
}
template <int Bytes>
PYFAST_DEVICE void cp_async(uint32_t shared, const void* global, bool there = true, Where where = Where::current()) {
  cp_async<Bytes>(shared_at(shared), global, there, where);
}
PYFAST_DEVICE void cp_async_commit() { simt::copy_commit(); }
template <int Pending>
PYFAST_DEVICE void cp_async_wait() {
  simt::copy_wait(Pending);
}

template <int First>
PYFAST_DEVICE void load_marked(uint32_t (&words)[4], uint32_t bits, const uint32_t (&at)[5],
                               Where where = Where::current()) {
  const auto from = [&](uint32_t address) {
    return load(reinterpret_cast<const uint16_t*>(shared_at(address)), where);
  };
  for (int i = 0; i < 4; ++i) {
    words[i] = bits >> (First + 2 * i) & 1u ? from(at[i]) : 0u;
    if (bits >> (First + 2 * i) & 2u) words[i] |= static_cast<uint32_t>(from(at[i + 1] - 2)) << 16;
  }
}

template <int Count, bool Transposed = false>
PYFAST_DEVICE void ldmatrix(uint32_t (&words)[Count], const void* row, Where where = Where::current()) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  simt::load_matrices(words, Count, Transposed, row, where);
}
PYFAST_DEVICE uint32_t transpose_matrix(uint32_t word, Where where = Where::current()) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  uint32_t column = 0;
  for (int half = 0; half < 2; ++half)
    column |= (shfl(word, 4 * (2 * t + half) + g / 2, kFullWarp, where) >> g % 2 * 16 & 0xffffu) << 16 * half;
  return column;
}
template <class T>
PYFAST_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                                Where where = Where::current()) {
  static_assert(kIsTensorCoreType<T>);
  simt::multiply(kIsBFloat16<T>, d, a, b, c, where);
}
template <class T, int Selector>
PYFAST_DEVICE void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], const float (&c)[4],
                                   uint32_t metadata, Where where = Where::current()) {
  static_assert(kIsTensorCoreType<T> && (Selector == 0 || Selector == 1));
  simt::multiply_sparse(kIsBFloat16<T>, Selector, d, a, b, c, metadata, where);
}

PYFAST_DEVICE void fma_unless_zero(uint32_t bits, float& sum, float a, float b) {
  if (bits != 0) sum = __builtin_fmaf(a, b, sum);
}
// Subnormal numbers count as 0, before and after. Off by simt::errors(); 2^0 and log2 1 are exact.
PYFAST_DEVICE float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
PYFAST_DEVICE float deviation(float x) {  // `rough` times a number from -1 to 1 that any bit of x changes
  const uint32_t bits = to_bits(x) * 2654435761u;
  return simt::errors().rough * (static_cast<float>(bits ^ bits >> 15) * 0x1p-31f - 1.0f);
}
PYFAST_DEVICE float exp2_approx(float x) {
  const float y = flushed(std::exp2(flushed(x)));
  return flushed(x) == 0.0f ? y : y + y * deviation(x);
}
PYFAST_DEVICE float log2_approx(float x) {
  const float y = std::log2(flushed(x));
  return y == 0.0f ? y : y + std::fmax(1.0f, std::fabs(y)) * (simt::errors().bias + deviation(x));
}
PYFAST_DEVICE float reciprocal_approx(float x) { return 1.0f / x + 0.5f / x * deviation(x); }
PYFAST_DEVICE float to_float(float x) { return x; }
PYFAST_DEVICE float to_float(BFloat16 x) { return widen(bf16{x.bits}); }
PYFAST_DEVICE float to_float(Float16 x) { return widen(f16{x.bits}); }
template <class T>
PYFAST_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    std::conditional_t<kIsBFloat16<T>, bf16, f16> narrowed;
    narrow(x, &narrowed);
    return T{narrowed.bits};
  }
}
template <class T>
PYFAST_DEVICE Floats2 unpack(uint32_t pair) {
  static_assert(kIsTensorCoreType<T>);
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}
template <class T>
PYFAST_DEVICE uint32_t pack(float first, float second) {
  static_assert(kIsTensorCoreType<T>);
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}
template <class T>
PYFAST_DEVICE uint32_t max_pair(uint32_t a, uint32_t b) {
  const Floats2 x = unpack<T>(a), y = unpack<T>(b);
  return pack<T>(std::fmax(x.x, y.x), std::fmax(x.y, y.y));
}
PYFAST_DEVICE float multiply(float a, float b) { return a * b; }
PYFAST_DEVICE float fma_saturated(float a, float b, float c) {
  const float x = std::fma(a, b, c);
  return x > 0.0f ? std::fmin(x, 1.0f) : 0.0f;
}

PYFAST_DEVICE void launch_dependents() { simt::launch_dependents(); }
PYFAST_DEVICE void wait_prerequisites() { simt::wait_prerequisites(); }

PYFAST_DEVICE uint32_t cluster_rank() { return simt::cluster_rank(); }
PYFAST_DEVICE uint32_t cluster_size() { return simt::cluster_size(); }
PYFAST_DEVICE void cluster_sync(Where where = Where::current()) { simt::cluster_barrier(where); }
PYFAST_DEVICE void cluster_leave(Where where = Where::current()) { simt::cluster_barrier(where); }
PYFAST_DEVICE void cluster_fence() {}
PYFAST_DEVICE void cluster_sync_relaxed(Where where = Where::current()) { simt::cluster_barrier(where); }
template <class T>
PYFAST_DEVICE T* map_shared_rank(T* shared, uint32_t rank, Where where = Where::current()) {
  return static_cast<T*>(simt::map_shared(shared, rank, where));
}
PYFAST_DEVICE float ld_cluster(const float* shared, uint32_t rank, Where where = Where::current()) {
  return load(map_shared_rank(shared, rank, where), where);
}
PYFAST_DEVICE void st_cluster(float* shared, uint32_t rank, float value, Where where = Where::current()) {
  simt::store(map_shared_rank(shared, rank, where), &value, sizeof(value), where);
}

}  // namespace pyfast::cuda::ptx
