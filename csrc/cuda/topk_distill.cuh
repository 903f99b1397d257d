// topk_distill on the GPU: divergence of a softmax from a teacher known by K of its words, and its gradient, a row at a
// time, by clusters of blocks that hold it. What is computed is said in csrc/cpu/topk_distill.h.
//
//   ids, entries [K]  ──► list, merge: the words of this block, log t of each           while the row arrives
//   row on chip       ──► take: their logits out of the row, -inf in their place        ──► Σ 2^… of theirs
//                     ──► first pass: Σ 2^… of what is left, without a mask and without cancellation
//                     ──► join_group ──► constants ──► terms of the words               (ignore: join_group once more)
//                     ──► last pass: gradient of the words outside, written, 0 for -inf; asks for the next row
//                     ──► __syncthreads ──► gradient of the words over it
//
//      block 0                          block 1                       x: a word of the teacher's, listed, taken out and
//      [░░░░x░░░░░░░░░░░░x░░░░░░]       [░░░░░░░░░x░░░░░]             written by the block that its vector lies in, so
//      word, t, log_t, logit [≤ K]      word, t, log_t, logit [≤ K]   that only the threads of one block write a place
//
// The terms of a row travel with the sums of the next one, so that a row costs one barrier of the cluster (two with
// `ignore`, whose gradient needs Σ (s_k - t_k)). renormalise reads K logits from memory, no row, and writes zeros.
// Which calls it takes, plan_topk_distill says: GPUs with clusters, K up to kMostEntries, and rows that 8 blocks hold
// (900000 words of 16 bits on an H100). All others are the Triton kernel's.
//
// Bytes. With E those of the logits: 2E, the row read once and kept on chip, the gradient written; a value alone E.
// renormalise: E and 0. K words cost 16 K bytes a row and K stores of a word each, which meet their lines in L2. At
// 151936 words of 16 bits and K = 64 a row takes 8 blocks of 38 KB, five on a multiprocessor of an H100; at 128256
// words 4 blocks of 64 KB, three.
//
// Instructions. At 2E, words of 16 bits and 3.0 TB/s an H100 (132 multiprocessors, 1.75 GHz) has 39 a word at the 4 a
// cycle that it can issue, and 24 at the 2.4 that these kernels reach. The code for sm_90 issues a word of bfloat16, in
// the loops over vectors:
//
//   first pass   4.5   a load, 2 to widen a pair, then FMA, MUFU.EX2 and addition of each
//   last pass    5.9   the same with a multiplication in place of the addition, a conversion a pair, store, LDGSTS
//
// The first pass looks for no maximum: a thread sums below the highest logit of its first vector, and begins anew below
// that of all its vectors where the sum then lies beyond 2^±40. The last pass has no question in its loop: vectors at
// the ends of rows are done apart. What a row costs outside of these loops (the sums over threads above all, as in
// distill_kl) comes on top; finding repeated ids takes three a pair of places of a block.
//
// Precision. Probabilities of the teacher, their sum, and x = log s - log t are computed in double, s and the sums in
// float32 with powers of the special function unit (ex2.approx: 2^-22). What a shift is rounded by is the same in the
// sums and in the gradient. A row whose words outside have a highest logit of 2^30 or more (over T, to base 2) gives
// NaN.
//
// Resources (tests/test_cuda_build.py compares; the shared memory is the most that a launch asks for, beside 2 KB):
//
//   topk_distill_kernel<T>    64 registers    230400 bytes of shared memory
#pragma once

#include "../topk_tail.h"
#include "common.cuh"
#include "distill_kl_group.cuh"
#include "distill_kl_store.cuh"
#include "distill_kl_sums.cuh"
#include "distill_kl_words.cuh"
#include "topk_distill_plan.h"
#include "topk_distill_store.cuh"
#include "topk_distill_teacher.cuh"

namespace pyfast::cuda {

template <class T>
struct TopkDistillArgs {
  const T* student;
  const int64_t* ids;
  const double* entries;  // log-probabilities; weights where tail is sampled
  const float* row_scale;
  float* rows;
  T* grad;  // null: values alone
  int64_t student_stride, ids_stride, entries_stride, grad_stride, count;
  int words, named;  // of a row
  int places;        // of TeacherWords
  TopkTail tail;
  double inverse;  // 1 / T
  float rate;      // log2 e / T
  int share;       // vectors of a row that a block holds
  int cluster;     // blocks that hold a row
  int64_t groups;  // how many of such share the rows
};

#if defined(PYFAST_KERNELS)

// What the passes over a row leave, to be joined.
struct TopkSums {
  Sum mass;                    // Σ t as given
  float distinct;              // words of the teacher
  float top, inside;           // their highest logit, and Σ 2^((z - top) · rate)
  float outside_top, outside;  // Σ 2^(z · rate - outside_top · rate) over all others, the product being rounded
  float before;                // Σ of the terms of the row before it

  PYFAST_DEVICE static TopkSums nothing() { return {{0.0f, 0.0f}, 0.0f, kLowestTop, 0.0f, kLowestTop, 0.0f, 0.0f}; }

  PYFAST_DEVICE void add_inside(float z, float rate) {
    const float higher = __builtin_fmaxf(top, z);
    inside = inside * ptx::exp2_approx((top - higher) * rate) + ptx::exp2_approx((z - higher) * rate);
    top = higher;
  }

  template <int kLanes, bool kExact>
  PYFAST_DEVICE void join(float rate) {
    float higher = top, outside_higher = outside_top;
    PYFAST_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      higher = __builtin_fmaxf(higher, ptx::shfl_xor(higher, distance));
      outside_higher = __builtin_fmaxf(outside_higher, ptx::shfl_xor(outside_higher, distance));
    }
    inside *= ptx::exp2_approx((top - higher) * rate);
    outside *= Statistics::kept(outside_top, outside_higher, rate);
    top = higher;
    outside_top = outside_higher;
    PYFAST_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      outside += ptx::shfl_xor(outside, distance);
      before += ptx::shfl_xor(before, distance);
    }
    if (!ptx::any(distinct != 0.0f || mass.hi != 0.0f)) return;  // most warps have no word of the teacher
    PYFAST_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      mass = add(mass, {ptx::shfl_xor(mass.hi, distance), ptx::shfl_xor(mass.lo, distance)});
      distinct += ptx::shfl_xor(distinct, distance);
      inside += ptx::shfl_xor(inside, distance);
    }
  }
};

struct TopkTerm {
  float value;  // t (e^x - 1 - x)
  float gap;    // s - t
};

// x = log s - log t. Near 0 by the series of e^x - 1 - x, whose terms are all there is: nothing cancels. Up to x^5 it
// is off by 1.3e-8 at |x| = 1/4.
PYFAST_DEVICE TopkTerm topk_term(float t, float s, float x) {
  if (!(__builtin_fabsf(x) < 0.25f)) return {(s - t) - t * x, s - t};  // also NaN, and +inf where s is 0
  float p = __builtin_fmaf(x, 1.0f / 5040, 1.0f / 720);
  p = __builtin_fmaf(p, x, 1.0f / 120);
  p = __builtin_fmaf(p, x, 1.0f / 24);
  p = __builtin_fmaf(p, x, 1.0f / 6);
  p = __builtin_fmaf(p, x, 0.5f);
  const float q = p * x * x;
  return {t * q, t * (x + q)};
}

// A row whose terms are not joined yet, where the first thread of a group has it. No barrier of the cluster is spent on
// them: they travel with the sums of the next row.
struct Unfinished {
  int64_t row;  // negative: there is none
  float scale, rest_value;
};

// One group of blocks doing rows `begin`, `begin` + a.groups, …
template <class T, bool kClusters>
struct TopkDistill {
  const TopkDistillArgs<T>& a;
  const ResidentRow<T>& store;
  const TeacherWords& teacher;
  Group<kClusters>& group;
  Unfinished& unfinished;  // in shared memory

  PYFAST_DEVICE void run(int64_t begin) const {
    if (leads()) unfinished.row = -1;
    float terms = 0.0f;  // this thread's part of the unfinished row
    bool counted = counts(begin);
    LogitsRow<T> row = row_at(begin, counted);
    store.begin(row);
    PYFAST_UNROLL_NOT
    for (int64_t i = begin; i < a.count; i += a.groups) {
      if (counted) {
        counted = distill(i, row, terms);
      } else {
        fill(i, T{});
        if (leads()) a.rows[i] = 0.0f;
        counted = counts(i + a.groups);
        row = row_at(i + a.groups, counted);
        store.begin(row);
      }
    }
    finish(join_group(group, Totals{terms, 0.0f, 0.0f}).value);
    group.sync();  // a block stays until nothing more is written into it
  }

 private:
  PYFAST_DEVICE bool is(TopkTail tail) const { return a.tail == tail; }
  PYFAST_DEVICE bool reads() const { return !is(TopkTail::renormalise); }
  PYFAST_DEVICE bool divides() const { return is(TopkTail::renormalise) || is(TopkTail::sampled); }
  PYFAST_DEVICE bool counts(int64_t i) const { return i < a.count && a.row_scale[i] != 0.0f; }
  PYFAST_DEVICE bool leads() const { return threadIdx.x == 0 && group.rank() == 0; }
  PYFAST_DEVICE T* grad_of(int64_t i) const { return a.grad == nullptr ? nullptr : a.grad + i * a.grad_stride; }

  PYFAST_DEVICE void finish(float terms) const {
    if (!leads()) return;
    // volatile: or the whole warp reads it first and asks who it is later, which racecheck takes for a race.
    const int64_t row = *static_cast<const volatile int64_t*>(&unfinished.row);
    if (row < 0) return;
    a.rows[row] = unfinished.scale * (terms + unfinished.rest_value);
    unfinished.row = -1;
  }

  // Row i, or no vectors where it is not to be read.
  PYFAST_DEVICE LogitsRow<T> row_at(int64_t i, bool counted) const {
    if (!counted || !reads()) return {};
    const T* const words = a.student + i * a.student_stride;
    const int lead = words_past_multiple(words);
    return {words, vectors_of<T>(lead, a.words), lead};
  }

  // The gradient of row i, the same for all words.
  PYFAST_DEVICE void fill(int64_t i, T value) const {
    T* const grad = grad_of(i);
    if (grad == nullptr) return;
    Words<T> same;
    PYFAST_UNROLL
    for (float& word : same.at) word = ptx::to_float(value);
    const Words4 bits = narrow_vector(same);
    store.each_vector(words_past_multiple(grad), [&](int word) {
      if (static_cast<uint32_t>(word) < inside_span<T>(a.words))
        ptx::st_streaming(reinterpret_cast<Words4*>(grad + word), bits);
      else
        fill_words(grad, word, a.words, value);
    });
  }

  // What the words of a row need to know of it. The first warp finds it out, the others read it.
  struct alignas(16) Row {
    double log_sum;   // of the student, Σ e^((z - top) / T)
    double log_mass;  // what log t of the words is divided by
    float top, inverse_sum;
    float shift, factor;  // gradient outside: 2^(z · rate - shift) · factor
    float rest, nothing;  // s_R; 0, or NaN where the whole row is to be that
    bool is_empty, next_counts;
  };

  // Does row i, and begins to read the next one, which takes its place. Returns whether that one counts. terms: of the
  // row before, of which nothing is left, and of this one.
  PYFAST_DEVICE bool distill(int64_t i, LogitsRow<T>& memory, float& terms) const {
    T* const grad = grad_of(i);
    // Who has which word: who writes the vector that it lies in.
    const int lead = reads() ? memory.lead : grad == nullptr ? 0 : words_past_multiple(grad);
    double mass = 0.0;
    const int listed = teacher.list(a.ids + i * a.ids_stride, a.entries + i * a.entries_stride, a.named, a.words,
                                    is(TopkTail::sampled), group.rank() == 0, mass,
                                    [&](int word) { return store.place(word, lead) < store.places(); });
    TopkSums sums = TopkSums::nothing();
    int distinct = 0;
    teacher.merge(listed, is(TopkTail::sampled), mass, distinct);
    sums.mass.hi = static_cast<float>(mass);
    sums.mass.lo = static_cast<float>(mass - static_cast<double>(sums.mass.hi));
    sums.distinct = static_cast<float>(distinct);
    sums.before = terms;
    terms = 0.0f;
    if (reads()) store.arrived();
    teacher.each_word(listed, [&](int k) {
      const float z = reads() ? taken(store.at(store.place(teacher.word[k], lead)))
                              : ptx::to_float(a.student[i * a.student_stride + teacher.word[k]]);
      teacher.logit[k] = z;
      sums.add_inside(z, a.rate);
    });
    if (reads()) {
      ptx::syncthreads();
      add_outside(sums, memory);
    }
    sums = join_group(group, sums, a.rate);

    Row row{};
    if (group.leads()) {
      finish(sums.before);
      const float scale = a.row_scale[i];
      row.next_counts = counts(i + a.groups);
      const float rest_value = find_constants(row, sums, scale);
      if (leads() && !row.is_empty) unfinished = {i, scale, rest_value};
    }
    row = group.broadcast(row);
    const LogitsRow<T> next = row_at(i + a.groups, row.next_counts);
    if (row.is_empty) {
      if (grad != nullptr) fill(i, T{});
      store.begin(next);
      if (leads()) a.rows[i] = 0.0f;
      memory = next;
      return row.next_counts;
    }

    float gaps = 0.0f;
    teacher.each_word(listed, [&](int k) {
      const float z = teacher.logit[k];
      const double log_t = teacher.log_t[k] - row.log_mass;
      const float t = ptx::exp2_approx(static_cast<float>(log_t * kLog2eDouble));
      const float s = ptx::exp2_approx((z - row.top) * a.rate) * row.inverse_sum;
      const double log_s = (static_cast<double>(z) - static_cast<double>(row.top)) * a.inverse - row.log_sum;
      const TopkTerm term = topk_term(t, s, static_cast<float>(log_s - log_t));
      terms += term.value;
      gaps += term.gap;
      teacher.logit[k] = term.gap + row.nothing;
      teacher.t[k] = static_cast<double>(s);
    });
    if (is(TopkTail::ignore)) {
      gaps = join_group(group, Totals{gaps, 0.0f, 0.0f}).value;
      const Gaps found = group.broadcast(Gaps{gaps, row.factor * -gaps});
      gaps = found.gaps;
      row.factor = found.factor;
    }
    if (!reads()) {
      if (grad != nullptr) fill(i, ptx::from_float<T>(row.nothing));
    } else if (grad != nullptr) {
      write_outside(grad, memory, next, row);
    } else {
      store.begin(next);
    }
    memory = next;
    if (grad == nullptr) return row.next_counts;
    ptx::syncthreads();  // the words of the teacher come after all others
    const float own_scale = a.row_scale[i] * static_cast<float>(a.inverse);
    teacher.each_word(listed, [&](int k) {
      const float s_of_gap = is(TopkTail::ignore) ? static_cast<float>(teacher.t[k]) : 0.0f;
      const float slope = __builtin_fmaf(-gaps, s_of_gap, teacher.logit[k]);
      grad[teacher.word[k]] = ptx::from_float<T>(slope * own_scale);
    });
    return row.next_counts;
  }

  struct alignas(16) Gaps {
    float gaps, factor;
  };

  // A logit out of the row.
  PYFAST_DEVICE static float taken(Bits<T>& place) {
    const T z = __builtin_bit_cast(T, place);
    place = kExcluded<T>;
    return ptx::to_float(z);
  }

  // The sum of this thread, below the highest logit of its first vector: in a row that is any like others, no word lies
  // so far above that float32 minds. Where one does, or there is none, below the highest of all.
  PYFAST_DEVICE void add_outside(TopkSums& sums, const LogitsRow<T>& memory) const {
    store.foremost(memory, [&](const Words4(&vectors)[1]) {
      sums.outside_top = __builtin_fmaxf(kLowestTop, highest_of<T>(vectors));
    });
    PYFAST_UNROLL_NOT
    for (bool again = false;; again = true) {
      const float shift = ptx::multiply(sums.outside_top, a.rate);
      float sum = 0.0f;
      store.template each<2>(memory, [&]<int kVectors>(const Words4(&vectors)[kVectors]) {
        float power[kVectors * kVectorWords<T>];
        PYFAST_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const Words<T> z = widen_vector<T>(vectors[v]);
          PYFAST_UNROLL
          for (int k = 0; k < kVectorWords<T>; ++k)
            power[v * kVectorWords<T> + k] = ptx::exp2_approx(__builtin_fmaf(z.at[k], a.rate, -shift));
        }
        sum += sum_over<kVectors * kVectorWords<T>>([&](int k) { return power[k]; });
      });
      sums.outside = sum;
      if (again || (sum >= kLeastSum && sum <= kMostSum)) return;
      store.template each<1>(memory, [&](const Words4(&vectors)[1]) {
        sums.outside_top = __builtin_fmaxf(sums.outside_top, highest_of<T>(vectors));
      });
    }
  }
  static constexpr float kLeastSum = 0x1p-40f, kMostSum = 0x1p40f;

  // Returns the value of the words outside. All lanes of a warp call it together.
  PYFAST_DEVICE float find_constants(Row& row, const TopkSums& sums, float scale) const {
    const double mass = static_cast<double>(sums.mass.hi) + static_cast<double>(sums.mass.lo);
    row.is_empty = sums.distinct == 0.0f && mass == 0.0;
    row.top = __builtin_fmaxf(sums.top, sums.outside_top);
    row.shift = ptx::multiply(sums.outside_top, a.rate);
    // Σ 2^… of both below `top`; what outside_top · rate was rounded by counts.
    const double rounding = static_cast<double>(sums.outside_top) * static_cast<double>(a.rate) - row.shift;
    const float apart = sums.outside * ptx::exp2_approx(__builtin_fmaf(sums.outside_top - row.top, a.rate,
                                                                       -static_cast<float>(rounding)));
    const float sum = __builtin_fmaf(sums.inside, ptx::exp2_approx((sums.top - row.top) * a.rate), apart);
    const bool closed = sums.distinct == static_cast<float>(a.words) || mass > 1.0;
    const double t_rest = closed ? 0.0 : 1.0 - mass;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const double log = __builtin_log(lane == 0   ? static_cast<double>(sum)
                                     : lane == 1 ? static_cast<double>(sums.outside)
                                     : lane == 2 ? t_rest
                                                 : mass);
    row.log_sum = shfl_double(log, 0);
    const double log_outside = shfl_double(log, 1), log_t_rest = shfl_double(log, 2), log_mass = shfl_double(log, 3);
    row.log_mass = divides() ? log_mass : 0.0;
    row.inverse_sum = 1.0f / sum;
    row.rest = apart * row.inverse_sum;
    const bool fits = sums.outside == 0.0f || __builtin_fabsf(row.shift) < kMostExponent;
    row.nothing = fits ? 0.0f * (static_cast<float>(mass) + sum) : __builtin_nanf("");
    float value = 0.0f, spread = row.rest;  // spread: what the softmax of the words outside is multiplied by
    if (is(TopkTail::sampled) || (is(TopkTail::bucket) && t_rest == 0.0)) {
      value = row.rest;
    } else if (is(TopkTail::bucket)) {
      const double log_rest = (static_cast<double>(sums.outside_top) - static_cast<double>(row.top)) * a.inverse -
                              rounding * kLn2Double + log_outside - row.log_sum;
      const TopkTerm term = topk_term(static_cast<float>(t_rest), row.rest, static_cast<float>(log_rest - log_t_rest));
      value = term.value;
      spread = term.gap;
    }
    row.factor =
        (sums.outside == 0.0f ? 0.0f : spread / sums.outside) * (scale * static_cast<float>(a.inverse)) + row.nothing;
    return value + row.nothing;
  }

  // The gradient of the words outside; those that the teacher names are -inf, and get 0.
  PYFAST_DEVICE void write_outside(T* grad, const LogitsRow<T>& memory, const LogitsRow<T>& next,
                                   const Row& row) const {
    store.last(memory, next, grad, [&](const Words4& bits) {
      Words<T> z = widen_vector<T>(bits);
      PYFAST_UNROLL
      for (float& each : z.at) each = ptx::exp2_approx(__builtin_fmaf(each, a.rate, -row.shift)) * row.factor;
      return narrow_vector(z);
    });
  }
};

// Grid: clusters of blocks along x, each doing rows its number apart. Shared memory: a.share vectors, and
// teacher_bytes() of a.named.
template <class T>
__global__ void __launch_bounds__(kTopkThreads, 1) topk_distill_kernel(const TopkDistillArgs<T> a) {
  PYFAST_DYNAMIC_SHARED(slots);
  PYFAST_SHARED(GroupMemory, memory);
  PYFAST_SHARED(Unfinished, unfinished);
  Group<kHasClusters> group(memory, a.cluster);
  const ResidentRow<T> store(slots, a.words, a.share, group.rank());
  const TeacherWords teacher(slots + kVectorBytes * a.share, a.places);
  TopkDistill<T, kHasClusters>{a, store, teacher, group, unfinished}.run(blockIdx.x /
                                                                         static_cast<unsigned>(group.size));
}

#endif

}  // namespace pyfast::cuda
