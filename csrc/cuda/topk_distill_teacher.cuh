// The words that the teacher names in a row, as a block has them: those that lie in its part of the row.
//
//   ids, entries [K] ──► every block reads all ──► ballot, counts of the warps ──► own words, in the order of k
//                                                 (__syncthreads)                  (__syncthreads)
//
//   word    w0   w1   w0   w2  …      which word of the row
//   t       .1   .3   .2   .1  …      its probability, as it was given                  double
//   log_t   L0   L1   -inf L2  …      logarithm of the word's sum at its first place    double
//   logit   z0   z1   ·    z2  …      of the student; later the gradient
//
// Repeated ids: each place is compared with all others of the block, three instructions a pair of places.
// What there are K of is computed in double, spread over the threads.
#pragma once

#include "../topk_tail.h"
#include "common.cuh"
#include "distill_kl_group.cuh"
#include "topk_distill_plan.h"

namespace pyfast::cuda {

inline constexpr double kLn2Double = 0.6931471805599453, kLog2eDouble = 1.4426950408889634;

#if defined(PYFAST_KERNELS)

inline constexpr double kNegInfDouble = -__builtin_inf();

// The logarithms of what all lanes of a warp bring cost as much as one.
PYFAST_DEVICE double shfl_double(double value, int from) {
  const uint64_t bits = __builtin_bit_cast(uint64_t, value);
  const uint32_t low = ptx::shfl(static_cast<uint32_t>(bits), from),
                 high = ptx::shfl(static_cast<uint32_t>(bits >> 32), from);
  return __builtin_bit_cast(double, static_cast<uint64_t>(high) << 32 | low);
}

struct TeacherWords {
  int* word;
  double* t;
  double* log_t;
  float* logit;
  int* counts;  // two halves, used in turn, of a number a warp

  // places: room for words, a multiple of four.
  PYFAST_DEVICE TeacherWords(unsigned char* shared, int places) {
    word = reinterpret_cast<int*>(shared);
    t = reinterpret_cast<double*>(shared + 4 * places);
    log_t = t + places;
    logit = reinterpret_cast<float*>(log_t + places);
    counts = reinterpret_cast<int*>(logit + places);
  }

  // Lists the words of this block, and returns how many there are. owns(word) says which; an entry whose id names no
  // word is the business of the block that `leads`: it makes `mass` NaN.
  template <class Owns>
  PYFAST_DEVICE int list(const int64_t* ids, const double* entries, int count, int words, bool sampled, bool leads,
                         double& mass, const Owns& owns) const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int lane = thread % 32, warp = thread / 32;
    int listed = 0;
    int* half = counts;
    PYFAST_UNROLL_NOT
    for (int begin = 0; begin < count; begin += threads) {
      const int k = begin + thread;
      bool mine = false;
      int64_t id = 0;
      double entry = 0.0, p = 0.0;
      if (k < count) {
        id = ids[k];
        entry = entries[k];
        const bool known = id >= 0 && id < words;
        if (known ? owns(static_cast<int>(id)) : leads) {
          p = sampled ? entry : __builtin_exp(entry);
          mine = p != 0.0 && known;
          if (p != 0.0 && !known) mass = __builtin_nan("");
        }
      }
      const uint32_t marks = ptx::ballot(mine);
      if (lane == 0) half[warp] = ptx::popc(marks);
      ptx::syncthreads();
      int place = listed + ptx::popc(marks & ((1u << lane) - 1u));
      PYFAST_UNROLL_NOT
      for (int w = 0; w < threads / 32; ++w) {
        const int more = half[w];
        if (w < warp) place += more;
        listed += more;
      }
      if (mine) {
        word[place] = static_cast<int>(id);
        t[place] = p;
        log_t[place] = entry;
      }
      half = half == counts ? counts + kMaxWarps : counts;
    }
    if (thread < (-listed & 3)) word[listed + thread] = -1;  // what fours reach beyond
    ptx::syncthreads();
    return listed;
  }

  // The places of this thread. Neighbouring places belong to neighbouring lanes.
  template <class Visit>
  PYFAST_DEVICE static void each(int listed, const Visit& visit) {
    PYFAST_UNROLL_NOT
    for (int k = static_cast<int>(threadIdx.x); k < listed; k += static_cast<int>(blockDim.x)) visit(k);
  }
  // Those of them that are the first of their word.
  template <class Visit>
  PYFAST_DEVICE void each_word(int listed, const Visit& visit) const {
    each(listed, [&](int k) {
      if (log_t[k] != kNegInfDouble) visit(k);
    });
  }

  // Turns log_t into that of words: -inf at all places of a word but the first. Adds to Σ t and the number of words.
  PYFAST_DEVICE void merge(int listed, bool sampled, double& mass, int& distinct) const {
    each(listed, [&](int k) {
      const int own = word[k];
      const int four = k & ~3;  // those that it stands among
      bool repeats = false;
      const auto look = [&](int from, int to) {
        PYFAST_UNROLL_NOT
        for (int j = from; j < to; j += 4) {
          const Words4 others = *reinterpret_cast<const Words4*>(word + j);
          repeats |= others.x == static_cast<uint32_t>(own);
          repeats |= others.y == static_cast<uint32_t>(own);
          repeats |= others.z == static_cast<uint32_t>(own);
          repeats |= others.w == static_cast<uint32_t>(own);
        }
      };
      look(0, four);
      look(four + 4, listed);
      PYFAST_UNROLL
      for (int other = 1; other < 4; ++other) repeats |= word[four + (k + other) % 4] == own;
      double sum = t[k];
      mass += sum;
      bool first = true;
      if (repeats) {
        sum = 0.0;
        PYFAST_UNROLL_NOT
        for (int j = 0; j < listed; ++j) {
          if (word[j] != own) continue;
          sum += t[j];
          if (j < k) first = false;
        }
      }
      if (sampled || repeats) log_t[k] = first ? __builtin_log(sum) : kNegInfDouble;
      if (first) ++distinct;
    });
  }
};

#endif

}  // namespace pyfast::cuda
