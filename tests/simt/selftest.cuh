// Small kernels that use every wrapper of ptx.cuh: executed by test_simt.py, whole and broken, and compiled by nvcc in
// test_cuda_build.py.
#pragma once

#include "ptx.cuh"

namespace pyfast::cuda::selftest {

inline constexpr int kColumns = 32;  // of the 2:4 matrix a

// c[16, 8] = a·b: a[16, 32] in 2:4 form, values[16, 16] and metadata[16, 2] of 16 bits; b[k, 8], rows k to 31 are zero.
// One warp. b goes through shared memory by cp.async and ldmatrix.trans, a by plain loads.
template <class T, int Selector>
__global__ void sparse_product(const uint16_t* values, const uint16_t* metadata, const uint16_t* b, float* c, int k) {
  using Rows = uint16_t[kColumns][8];
  PYFAST_SHARED(Rows, rows);
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  ptx::cp_async<16>(rows[lane], b + (lane < k ? lane * 8 : 0), lane < k);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::syncwarp();

  uint32_t a_words[4], b_words[4];
  for (int i = 0; i < 4; ++i)
    a_words[i] = ptx::ld_nc(reinterpret_cast<const uint32_t*>(values + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8));
  ptx::ldmatrix<4, true>(b_words, rows[lane]);
  const int half = t - 2 * Selector;  // the lanes whose word does not count give an illegal one
  uint32_t word = 0;
  if (half == 0 || half == 1) word = metadata[g * 2 + half] | static_cast<uint32_t>(metadata[(g + 8) * 2 + half]) << 16;
  float sums[4] = {};
  ptx::mma_sp_m16n8k32<T, Selector>(sums, a_words, b_words, sums, word);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// c[16, 8] = a[16, 16]·b[16, 8], dense. a by ldmatrix, b by ldmatrix of its transposed copy bt[8, 16].
template <class T>
__global__ void dense_product(const uint16_t* a, const uint16_t* bt, float* c) {
  using Tile = uint16_t[16][16];
  PYFAST_SHARED(Tile, a_tile);
  PYFAST_SHARED(Tile, b_tile);
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const Words4 words = ptx::ld_streaming(reinterpret_cast<const Words4*>(a) + lane);
  *reinterpret_cast<Words4*>(&a_tile[lane / 2][lane % 2 * 8]) = words;
  ptx::cp_async<8>(&b_tile[lane / 4][lane % 4 * 4], bt + lane * 4);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::syncthreads();
  uint32_t a_words[4], b_words[2];
  float sums[4] = {};
  uint32_t kept = 0;
  ptx::keep(kept);
  sums[0] = static_cast<float>(kept);
  ptx::ldmatrix<4>(a_words, &a_tile[lane % 16][lane / 16 * 8]);
  ptx::ldmatrix<2>(b_words, &b_tile[lane % 8][lane / 8 % 2 * 8]);
  ptx::mma_m16n8k16<T>(sums, a_words, b_words, sums);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// sums[b] = the sum of block b's blockDim.x numbers, total += it; the last block to finish writes the mean of all sums.
__global__ void block_sums(const float* numbers, float* sums, float* total, uint32_t* counter, float* mean) {
  PYFAST_DYNAMIC_SHARED(bytes);
  float* const partial = reinterpret_cast<float*>(bytes);
  PYFAST_SHARED(uint32_t, number);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warps = static_cast<int>(blockDim.x) / 32;
  float sum = numbers[blockIdx.x * blockDim.x + threadIdx.x];
  for (int by = 16; by > 0; by /= 2) sum += ptx::shfl_xor(sum, by);
  if (lane == 0) partial[thread / 32] = sum;
  ptx::syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < warps; ++warp) sum += partial[warp];
    sums[blockIdx.x] = sum;
    ptx::atomic_add(total, sum);
    number = ptx::atomic_ticket(counter, gridDim.x);
  }
  ptx::syncthreads();
  if (number + 1 != gridDim.x || thread != 32) return;
  float all = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) all += sums[block];
  *mean = all / static_cast<float>(gridDim.x);
}

// Each lane counts the set predicates before it: out[i] = popc of the lower lanes' ballot, from scans of each kind.
__global__ void warp_scan(const uint32_t* words, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t word = words[lane];
  const bool odd = (word & 1u) != 0;
  const uint32_t below = ptx::ballot(odd) & ((1u << lane) - 1u);
  uint32_t scan = odd;
  for (int by = 1; by < 32; by *= 2) {
    const uint32_t add = ptx::shfl_up(scan, by);
    if (lane >= by) scan += add;
  }
  const uint32_t last = ptx::shfl(scan, 31);
  const uint32_t next = ptx::shfl_down(word, 1);
  const bool agree = ptx::any(odd) == (last != 0) && ptx::all(odd) == (last == 32);
  const uint32_t swapped = ptx::byte_permute(word, next, 0x7610u);  // lower half of word, upper half of next
  const Floats2 pair = ptx::unpack<BFloat16>(ptx::pack<BFloat16>(1.5f, static_cast<float>(ptx::popc(word))));
  const Float16 half =
      ptx::from_float<Float16>(ptx::exp2_approx(3.0f) + ptx::log2_approx(4.0f) * ptx::reciprocal_approx(1.0f));
  out[lane] = static_cast<uint32_t>(ptx::popc(below)) + 100u * scan;
  out[32 + lane] = agree;
  out[64 + lane] = swapped;
  out[96 + lane] = static_cast<uint32_t>(2.0f * pair.x + pair.y + ptx::to_float(half));
  out[128 + lane] = static_cast<uint32_t>(ptx::popcll(static_cast<uint64_t>(word) << 32 | word));
  out[160 + lane] = static_cast<uint32_t>(ptx::highest_bit(word | 1u));
  out[192 + lane] = ptx::funnel_right(word, next, static_cast<uint32_t>(lane));
  out[224 + lane] = ptx::transpose_matrix(word);
  const float number = static_cast<float>(lane);
  out[256 + lane] = ptx::max_pair<Float16>(ptx::pack<Float16>(number, -number), ptx::pack<Float16>(5.0f, -5.0f));
  out[288 + lane] = static_cast<uint32_t>(8.0f * ptx::fma_saturated(ptx::multiply(number, 0.25f), 0.5f, -1.0f));
}

// Each lane marks 16 of its words' bits: out[lane] = its first marked values of the 8 that `values` gives each lane, as
// pairs at the places of the bits 8 to 15; out4, the sums of dot2 and dot4, add_from_below of all distances.
__global__ void marked_pairs(const uint32_t* words, const uint16_t* values, uint32_t* out) {
  PYFAST_DYNAMIC_SHARED(bytes);
  uint16_t* const own = reinterpret_cast<uint16_t*>(bytes) + threadIdx.x * 8;
  for (int i = 0; i < 8; ++i) own[i] = static_cast<uint16_t>(ptx::ld_global(values + threadIdx.x * 8 + i));
  const uint32_t word = words[threadIdx.x];
  uint32_t at[5], pairs[4];
  at[0] = ptx::shared_address(own);
  for (int i = 0; i < 4; ++i) at[i + 1] = at[i] + 2 * ptx::popc(word >> (8 + 2 * i) & 3u);
  ptx::load_marked<8>(pairs, word, at);
  for (int i = 0; i < 4; ++i) out[32 * i + threadIdx.x] = pairs[i];
  out[128 + threadIdx.x] = ptx::dot4(word, 0x04030201u, 7);
  out[160 + threadIdx.x] = ptx::dot2(word, 0xffff0503u, 7);
  out[192 + threadIdx.x] = ptx::add_from_below<1>(word);
  out[224 + threadIdx.x] = ptx::add_from_below<16>(word);
}

// 64 words through shared memory, written and read back by address, by each block of a cluster. Row 0: the weighted
// bytes of a word plus the lane; rows 1, 2, 3: the words, pairs and fours from the last on, their parts joined by xor;
// row 4: 2·lane added to 1 where lane is odd.
__global__ void by_address(const uint32_t* words, uint32_t* out) {
  PYFAST_DYNAMIC_SHARED(bytes);
  const int lane = static_cast<int>(threadIdx.x);
  ptx::launch_dependents();
  ptx::prefetch_l2(words);
  ptx::wait_prerequisites();
  const uint32_t begin = ptx::shared_address(bytes), end = begin + 256, back = static_cast<uint32_t>(lane) + 1;
  if (lane < 8) {
    reinterpret_cast<Words2*>(bytes)[lane] = ptx::ld_streaming(reinterpret_cast<const Words2*>(words) + lane);
  } else if (lane < 16) {
    for (uint32_t half = 0; half < 4; ++half)
      ptx::st_shared_half(begin + 8 * static_cast<uint32_t>(lane) + 2 * half,
                          words[2 * lane + static_cast<int>(half / 2)] >> 16 * (half % 2));
  } else if (lane < 24) {
    const uint32_t line = static_cast<uint32_t>(lane) - 8;
    if (lane < 20)
      ptx::st_shared(begin + 16 * line, ptx::ld_streaming(reinterpret_cast<const Words4*>(words) + line));
    else
      ptx::cp_async<16>(begin + 16 * line, words + 4 * line);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }
  out += blockIdx.x * 160;
  ptx::syncwarp();
  const Words2 two = ptx::ld_shared<Words2>(end - 8 * back);
  const Words4 four = ptx::ld_shared<Words4>(end - 16 * (back <= 16 ? back : back - 16));
  float sum = 1.0f;
  ptx::fma_unless_zero(static_cast<uint32_t>(lane) & 1u, sum, 2.0f, static_cast<float>(lane));
  out[lane] = ptx::dot4(ptx::ld_global(words + lane), 0x04030201u, static_cast<uint32_t>(lane));
  out[32 + lane] = ptx::ld_shared<uint32_t>(end - 4 * back);
  out[64 + lane] = two.x ^ two.y;
  out[96 + lane] = four.x ^ four.y ^ four.z ^ four.w;
  out[128 + lane] = static_cast<uint32_t>(sum);
}

// Copies 32·4 words with cp.async<4> in `Stages` stages, so that loads and the reversal of each row overlap.
template <int Stages>
__global__ void reversed_rows(const uint32_t* from, uint32_t* to, int rows) {
  using Ring = uint32_t[Stages][32];
  PYFAST_SHARED(Ring, ring);
  const int lane = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int row) {
    if (row < rows) ptx::cp_async<4>(&ring[row % Stages][lane], from + row * 32 + lane);
    ptx::cp_async_commit();
  };
  for (int row = 0; row < Stages - 1; ++row) fetch(row);
  for (int row = 0; row < rows; ++row) {
    ptx::cp_async_wait<Stages - 2>();
    ptx::syncwarp();
    fetch(row + Stages - 1);
    to[row * 32 + lane] = ring[row % Stages][31 - lane];
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Clusters along x: out[b] = sum over the cluster's blocks r of (r + 1)·numbers[block r], twice as two ways to read.
__global__ void cluster_sums(const float* numbers, float* out) {
  PYFAST_SHARED(float, own);
  PYFAST_SHARED(float, sent);
  if (threadIdx.x == 0) own = numbers[blockIdx.x];
  ptx::cluster_sync();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (uint32_t rank = 0; rank < ptx::cluster_size(); ++rank)
      sum += static_cast<float>(rank + 1) * (ptx::ld_cluster(&own, rank) + *ptx::map_shared_rank(&own, rank));
    out[blockIdx.x] = sum;
    ptx::st_cluster(&sent, (ptx::cluster_rank() + 1) % ptx::cluster_size(), sum);
  }
  ptx::cluster_fence();
  ptx::cluster_sync_relaxed();
  if (threadIdx.x == 0) out[blockIdx.x] += 1000.0f * sent + 0.0f * ptx::ld_cluster(&own, 0);
  ptx::cluster_leave();
}

#endif

}  // namespace pyfast::cuda::selftest
