// distill_kl on the GPU: divergence between two tempered softmaxes and its gradient, a row pair at a time. What is
// computed is said in csrc/cpu/distill_kl.h; what a word adds to it, in csrc/distill_kl_terms.h, which both share.
//
//   first pass    statistics of each thread, online: highest logit so far, Σ 2^… below it   ──► join_group ──►
//   log-sum-exps second pass   Σ value, H = Σ slope (where H is not known yet and there is a gradient)   ──► join_group
//   last pass     gradient (slope − H mass) · scale, written; value, where it is not known  ──► join_group ──► rows[i]
//
// forward_kl needs no H, and that of reverse_kl is found with the statistics: they have no second pass.
//
// Bytes. With E those of one logits tensor, what is moved is
//
//   Resident   3E    both rows read once and kept on chip, the gradient written; values alone 2E
//   Streamed   5E    forward_kl and reverse_kl: two readings;  7E the others: three;  values alone 4E
//
// and of the streamed readings what L2 still holds costs no memory. Two or more blocks share a multiprocessor, and each
// asks for its next row while it writes the gradient of the last one, so that memory rests only where all of them
// reduce at once. Resident holds 262144 words of 16 bits on 8 blocks of an H100 (128 KB each; 64 KB at 128256 words, so
// that three share a multiprocessor) and goes up to 470000; without clusters, what one block holds (distill_kl_plan.h).
//
// Floor on an H100 at 8192×128256 bfloat16, 3E = 6.3 GB: 2.1 ms at 3.0 TB/s. That leaves 59 instructions a word on 132
// multiprocessors at 1.75 GHz. The code for sm_90 takes about 17 a word in the first pass (26 for reverse_kl) and in
// the last 34 (forward_kl) to 37, so that forward_kl should reach 75 to 85 % of the bandwidth and reverse_kl 70 to 80
// %. The others evaluate the slope twice, about 90 in all for tvd and mse and 130 to 165 for the mixtures: bound by
// instructions, at 60 % and 35 to 45 % of the bandwidth. None of this was measured.
//
// Precision. float32, sums by trees over threads. Powers and logarithms of probabilities are the special function
// unit's (ex2.approx, lg2.approx: 2^-22), which leaves a relative error of some 1e-6 in s and t and cancels nowhere:
// differences of s and t are formed from x by multiplications (exp_log.h). x takes the logarithm of the ratio of the
// two sums of the row, both carried in two parts and 1 exactly where one word has all of the mass, so that of its error
// about 1e-8 to 1e-7 is left: at a KL of 1e-7 (|x| of 4e-4) the gradient of forward_kl keeps three to four digits.
//
// Resources (tests/test_cuda_build.py compares; the shared memory is the most that a launch asks for, beside 2 KB):
//
//   distill_kl_resident_kernel<T>    96 registers    230400 bytes of shared memory
//   distill_kl_streamed_kernel<T>    96 registers     40960 bytes of shared memory
#pragma once

#include "common.cuh"
#include "distill_kl_group.cuh"
#include "distill_kl_plan.h"
#include "distill_kl_store.cuh"
#include "vec.cuh"

#include "../distill_kl_terms.h"

namespace pyfast::cuda {

template <class T>
struct DistillKlArgs {
  const T* student;
  const T* teacher;
  const float* row_scale;
  const int64_t* labels;  // null: no cross-entropy
  const float* ce_scale;
  float* rows;
  float* ce_rows;
  T* grad;  // null: values alone
  int64_t student_stride, teacher_stride, grad_stride, count;
  int words;
  int share;  // vectors of a row that a block holds (Resident)
  Divergence divergence;
  float student_inverse, teacher_inverse;  // 1 / temperature
  float teacher_share;                     // student_temperature / teacher_temperature
  float student_softcap, teacher_softcap;  // 0: none
  float mixture_teacher, mixture_student;

  // mix: share of the first distribution of the mixture, see pyfast/reference/distill_kl.py.
  void set_options(Divergence kind, double mix, double student_temperature, double teacher_temperature,
                   double student_cap, double teacher_cap) {
    const double teachers = kind == Divergence::skew_reverse_kl ? 1.0 - mix : mix;
    divergence = kind;
    student_inverse = static_cast<float>(1.0 / student_temperature);
    teacher_inverse = static_cast<float>(1.0 / teacher_temperature);
    teacher_share = static_cast<float>(student_temperature / teacher_temperature);
    student_softcap = static_cast<float>(student_cap);
    teacher_softcap = static_cast<float>(teacher_cap);
    mixture_teacher = static_cast<float>(teachers);
    mixture_student = static_cast<float>(1.0 - teachers);
  }
};

#if defined(PYFAST_KERNELS)

// The words of a vector, as floats.
template <class T>
struct Words {
  static constexpr int kVecs = kVectorWords<T> / Vec::width;
  Vec vec[kVecs];

  PYFAST_DEVICE float& at(int i) { return vec[i / Vec::width].at[i % Vec::width]; }
  PYFAST_DEVICE float at(int i) const { return vec[i / Vec::width].at[i % Vec::width]; }
};

template <class T>
PYFAST_DEVICE Words<T> widen_vector(const Words4& bits) {
  const uint32_t parts[4] = {bits.x, bits.y, bits.z, bits.w};
  Words<T> out;
  PYFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out.at(i) = float_of(parts[i]);
    } else {
      const Floats2 pair = ptx::unpack<T>(parts[i]);
      out.at(2 * i) = pair.x;
      out.at(2 * i + 1) = pair.y;
    }
  }
  return out;
}

template <class T>
PYFAST_DEVICE Words4 narrow_vector(const Words<T>& z) {
  uint32_t parts[4];
  PYFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      parts[i] = bits_of(z.at(i));
    else
      parts[i] = ptx::pack<T>(z.at(2 * i), z.at(2 * i + 1));
  }
  return {parts[0], parts[1], parts[2], parts[3]};
}

PYFAST_DEVICE Vec capped(const Vec& z, float softcap) {
  const Vec excluded = broadcast(kNegInf);
  return select(equal(z, excluded), excluded, broadcast(softcap) * tanh(z * broadcast(1.0f / softcap)));
}

PYFAST_DEVICE float capped(float z, float softcap) { return softcap == 0.0f ? z : capped(broadcast(z), softcap).at[0]; }

// Logits of a vector under their softcap; -inf stands where the vector reaches beyond the row.
template <class T>
PYFAST_DEVICE Words<T> logits_of(const Words4& bits, int word, int count, float softcap) {
  Words<T> z = widen_vector<T>(bits);
  if (softcap != 0.0f) {
    PYFAST_UNROLL
    for (Vec& vec : z.vec) vec = capped(vec, softcap);
  }
  if (word < 0 || word + kVectorWords<T> > count) {
    PYFAST_UNROLL
    for (int i = 0; i < kVectorWords<T>; ++i)
      if (word + i < 0 || word + i >= count) z.at(i) = kNegInf;
  }
  return z;
}

template <class T>
PYFAST_DEVICE float highest_of(const Words<T>& z) {
  float top = z.at(0);
  PYFAST_UNROLL
  for (int i = 1; i < kVectorWords<T>; ++i) top = __builtin_fmaxf(top, z.at(i));
  return top;
}

// Σ f(i) over the words of a vector, by a tree.
template <class T, class F>
PYFAST_DEVICE float sum_over(const F& f) {
  float part[kVectorWords<T>];
  PYFAST_UNROLL
  for (int i = 0; i < kVectorWords<T>; ++i) part[i] = f(i);
  PYFAST_UNROLL
  for (int half = kVectorWords<T> / 2; half > 0; half /= 2) {
    PYFAST_UNROLL
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// What the gradient takes besides the divergence.
struct Extras {
  float ce_scale;  // 0: no cross-entropy
  float log2_sum;  // of e^(z - peak), at temperature 1
  int64_t label;
};

// One group of blocks doing rows `begin`, `begin` + `step`, …
template <class T, class Store, bool kClusters>
struct DistillKl {
  const DistillKlArgs<T>& a;
  Store& store;
  Group<kClusters>& group;

  PYFAST_DEVICE void run(int64_t begin, int64_t step) const {
    RowInMemory<T> row = row_at(begin);
    store.begin(row);
    for (int64_t i = begin; i < a.count; i += step) {
      const RowInMemory<T> next = row_at(i + step);
      if (row.vectors == 0)
        skip(i, next);
      else
        distill(i, row, next);
      row = next;
    }
    group.sync();  // a block stays until nothing more is written into it
  }

 private:
  PYFAST_DEVICE float ce_scale(int64_t i) const { return a.labels == nullptr ? 0.0f : a.ce_scale[i]; }
  PYFAST_DEVICE bool leads() const { return group.rank == 0 && threadIdx.x == 0; }

  // Row i, or no vectors where there is none or it does not count.
  PYFAST_DEVICE RowInMemory<T> row_at(int64_t i) const {
    if (i >= a.count || (a.row_scale[i] == 0.0f && ce_scale(i) == 0.0f)) return {};
    return row_in_memory(a.student + i * a.student_stride, a.teacher + i * a.teacher_stride, a.words);
  }

  PYFAST_DEVICE void skip(int64_t i, const RowInMemory<T>& next) const {
    store.begin(next);
    if (leads()) {
      a.rows[i] = 0.0f;
      if (a.labels != nullptr) a.ce_rows[i] = 0.0f;
    }
    if (a.grad == nullptr) return;
    T* grad = a.grad + i * a.grad_stride;
    const int lead = words_past_multiple(grad), threads = static_cast<int>(blockDim.x);
    const int vectors = (lead + a.words + kVectorWords<T> - 1) / kVectorWords<T>;
    for (int v = group.rank * threads + static_cast<int>(threadIdx.x); v < vectors; v += group.size * threads)
      write(grad, v * kVectorWords<T> - lead, true, Words<T>{});
  }

  // The vector of the gradient whose first word is `word`.
  PYFAST_DEVICE void write(T* grad, int word, bool aligned, const Words<T>& z) const {
    if (aligned && word >= 0 && word + kVectorWords<T> <= a.words) {
      ptx::st_streaming(reinterpret_cast<Words4*>(grad + word), narrow_vector(z));
      return;
    }
    PYFAST_UNROLL
    for (int i = 0; i < kVectorWords<T>; ++i) {
      if (word + i < 0 || word + i >= a.words) continue;
      if constexpr (sizeof(T) == 4)
        grad[word + i] = z.at(i);
      else
        grad[word + i].bits = ptx::from_float<T>(z.at(i)).bits;
    }
  }

  // The row's x up to a constant: near those of the row where its logits have an offset.
  PYFAST_DEVICE float origin(const RowInMemory<T>& row, const RowPair& pair) const {
    const float zs = capped(ptx::to_float(*row.student), a.student_softcap);
    const float zt = capped(ptx::to_float(*row.teacher), a.teacher_softcap);
    const float x = log_ratio(broadcast(zs), broadcast(zt), pair).at[0];
    return __builtin_fabsf(x) <= -kLowestLogit ? x : 0.0f;
  }

  PYFAST_DEVICE void add_statistics(Statistics& sums, const Words<T>& zs, const Words<T>& zt, const RowPair& pair,
                                    float origin) const {
    const float top_s = __builtin_fmaxf(sums.student_peak, highest_of(zs));
    const float top_t = __builtin_fmaxf(sums.teacher_peak, highest_of(zt));
    const float keep_s = power_below(sums.student_peak, top_s, pair.student_scale);
    const float keep_t = power_below(sums.teacher_peak, top_t, pair.teacher_scale);
    Words<T> weight;
    PYFAST_UNROLL
    for (int i = 0; i < kVectorWords<T>; ++i) weight.at(i) = power_below(zs.at(i), top_s, pair.student_scale);
    const float more_s = sum_over<T>([&](int i) { return weight.at(i); });
    const float more_t = sum_over<T>([&](int i) { return power_below(zt.at(i), top_t, pair.teacher_scale); });
    sums.student.hi = __builtin_fmaf(sums.student.hi, keep_s, more_s);
    sums.teacher.hi = __builtin_fmaf(sums.teacher.hi, keep_t, more_t);
    if (a.labels != nullptr) {
      const float more = sum_over<T>([&](int i) { return power_below(zs.at(i), top_s, kLog2e); });
      sums.plain = __builtin_fmaf(sums.plain, power_below(sums.student_peak, top_s, kLog2e), more);
    }
    if (a.divergence == Divergence::reverse_kl) {
      const float drift = sum_over<T>([&](int i) {
        const float x = __builtin_fmaf(-zt.at(i), pair.teacher_share, zs.at(i)) * pair.student_inverse - origin;
        return zt.at(i) == kNegInf || weight.at(i) == 0.0f ? 0.0f : weight.at(i) * x;
      });
      const float absent = sum_over<T>([&](int i) { return zt.at(i) == kNegInf ? weight.at(i) : 0.0f; });
      sums.drift = __builtin_fmaf(sums.drift, keep_s, drift);
      sums.absent = __builtin_fmaf(sums.absent, keep_s, absent);
    }
    sums.student_peak = top_s;
    sums.teacher_peak = top_t;
  }

  // log(t / s) of two sums, which keeps its digits where they are close.
  PYFAST_DEVICE static float log_of_ratio(const Sum& t, const Sum& s) {
    const float gap = (t.hi - s.hi) + (t.lo - s.lo);
    const Vec more = broadcast(__builtin_fabsf(gap)) / broadcast(gap < 0.0f ? t.hi : s.hi);
    const float log = log_parts(more).log1p.at[0];
    return gap < 0.0f ? -log : log;
  }

  PYFAST_DEVICE void distill(int64_t i, const RowInMemory<T>& row, const RowInMemory<T>& next) const {
    RowPair pair;
    pair.student_scale = a.student_inverse * kLog2e;
    pair.teacher_scale = a.teacher_inverse * kLog2e;
    pair.teacher_share = a.teacher_share;
    pair.student_inverse = a.student_inverse;
    pair.mixture_teacher = a.mixture_teacher;
    pair.mixture_student = a.mixture_student;
    pair.log_ratio_offset = 0.0f;
    const bool reverse = a.divergence == Divergence::reverse_kl;
    const float zero = reverse ? origin(row, pair) : 0.0f;

    Statistics sums = Statistics::nothing();
    store.first(row, [&](int vector, const Words4& student, const Words4& teacher) {
      const int word = row.first_word(vector);
      add_statistics(sums, logits_of<T>(student, word, a.words, a.student_softcap),
                     logits_of<T>(teacher, word, a.words, a.teacher_softcap), pair, zero);
    });
    sums = join_group(group, sums, pair.student_scale, pair.teacher_scale, a.labels != nullptr, reverse);

    pair.student_shift = sums.student_peak;
    pair.teacher_shift = sums.teacher_peak;
    pair.student_log2_sum = ptx::log2_approx(sums.student.hi);
    pair.teacher_log2_sum = ptx::log2_approx(sums.teacher.hi);
    pair.log_ratio_offset = log_of_ratio(sums.teacher, sums.student) -
                            log_ratio(broadcast(sums.student_peak), broadcast(sums.teacher_peak), pair).at[0];
    float center = 0.0f;  // H
    if (reverse) {
      const float present = sums.student.hi - sums.absent;
      center = (__builtin_fmaf(zero + pair.log_ratio_offset, present, sums.drift) - sums.absent) / sums.student.hi;
    }
    Extras extras{ce_scale(i), 0.0f, 0};
    if (extras.ce_scale != 0.0f) {
      extras.label = a.labels[i];
      const bool known = extras.label >= 0 && extras.label < a.words;
      extras.log2_sum = known ? ptx::log2_approx(sums.plain) : __builtin_nanf("");
    }

    const bool center_known = reverse || a.divergence == Divergence::forward_kl;
    Totals totals = Totals::nothing();
    if (!center_known || a.grad == nullptr) {
      store.again(row, [&](int vector, const Words4& student, const Words4& teacher) {
        const int word = row.first_word(vector);
        const Words<T> zs = logits_of<T>(student, word, a.words, a.student_softcap);
        const Words<T> zt = logits_of<T>(teacher, word, a.words, a.teacher_softcap);
        const VectorTerms e = terms_of(zs, zt, pair);
        totals.value += sum_over<T>([&](int k) { return e.value.at(k); });
        totals.slope += sum_over<T>([&](int k) { return e.slope.at(k); });
      });
      totals = join_group(group, totals, 0.0f, 0.0f, false, false);
      if (!center_known) center = totals.slope;
    }
    if (a.grad == nullptr) {
      store.begin(next);
    } else {
      const float value = write_gradient(i, row, next, pair, extras, center);
      if (center_known) totals = join_group(group, Totals{value, 0.0f}, 0.0f, 0.0f, false, false);
    }
    if (leads()) write_values(i, row, pair, extras, totals.value);
  }

  // The last pass. Returns this thread's part of the value for forward_kl and reverse_kl.
  PYFAST_DEVICE float write_gradient(int64_t i, const RowInMemory<T>& row, const RowInMemory<T>& next,
                                     const RowPair& pair, const Extras& extras, float center) const {
    T* grad = a.grad + i * a.grad_stride;
    const float scale = a.row_scale[i] * a.student_inverse;
    const bool aligned = words_past_multiple(grad) == row.lead;
    float value = 0.0f;
    store.last(row, next, [&](int vector, const Words4& student, const Words4& teacher) {
      const int word = row.first_word(vector);
      const Words<T> zs = logits_of<T>(student, word, a.words, a.student_softcap);
      const Words<T> zt = logits_of<T>(teacher, word, a.words, a.teacher_softcap);
      const VectorTerms e = slopes_of(zs, zt, pair);
      Words<T> g;
      PYFAST_UNROLL
      for (int k = 0; k < kVectorWords<T>; ++k) g.at(k) = __builtin_fmaf(-e.mass.at(k), center, e.slope.at(k)) * scale;
      value += sum_over<T>([&](int k) { return e.value.at(k); });
      if (extras.ce_scale != 0.0f) {
        PYFAST_UNROLL
        for (int v = 0; v < Words<T>::kVecs; ++v) {
          const Vec p = probability(zs.vec[v], pair.student_shift, kLog2e, extras.log2_sum);
          PYFAST_UNROLL
          for (int k = 0; k < Vec::width; ++k) {
            const float chosen = word + v * Vec::width + k == extras.label ? 1.0f : 0.0f;
            const float own = scale == 0.0f ? 0.0f : g.vec[v].at[k];
            g.vec[v].at[k] = __builtin_fmaf(extras.ce_scale, p.at[k] - chosen, own);
          }
        }
      }
      if (a.student_softcap != 0.0f) {  // z is capped: dz / d(raw) = 1 - (z / cap)²; a word of -inf has no gradient
        const float inverse = 1.0f / a.student_softcap;
        PYFAST_UNROLL
        for (int k = 0; k < kVectorWords<T>; ++k) {
          const float u = zs.at(k) * inverse;
          g.at(k) = zs.at(k) == kNegInf ? 0.0f : g.at(k) * __builtin_fmaf(-u, u, 1.0f);
        }
      }
      write(grad, word, aligned, g);
    });
    return value;
  }

  PYFAST_DEVICE void write_values(int64_t i, const RowInMemory<T>& row, const RowPair& pair, const Extras& extras,
                                  float value) const {
    float ce = 0.0f;
    if (extras.ce_scale != 0.0f) {  // log2_sum is NaN where the label names no word
      const bool known = extras.log2_sum == extras.log2_sum;
      const float logit = known ? capped(ptx::to_float(row.student[extras.label]), a.student_softcap) : 0.0f;
      ce = extras.ce_scale * __builtin_fmaf(kLn2, extras.log2_sum, pair.student_shift - logit);
    }
    const float scale = a.row_scale[i];
    a.rows[i] = (scale == 0.0f ? 0.0f : scale * value) + ce;
    if (a.labels != nullptr) a.ce_rows[i] = ce;
  }

  struct VectorTerms {
    Words<T> value, slope, mass;
  };

  template <Divergence divergence>
  PYFAST_DEVICE static VectorTerms terms_of(const Words<T>& zs, const Words<T>& zt, const RowPair& pair) {
    VectorTerms out;
    PYFAST_UNROLL
    for (int v = 0; v < Words<T>::kVecs; ++v) {
      const Terms e = terms<divergence>(zs.vec[v], zt.vec[v], pair);
      out.value.vec[v] = e.value;
      out.slope.vec[v] = e.slope;
      out.mass.vec[v] = e.mass;
    }
    return out;
  }

  PYFAST_DEVICE VectorTerms terms_of(const Words<T>& zs, const Words<T>& zt, const RowPair& pair) const {
    switch (a.divergence) {
      case Divergence::forward_kl:
        return terms_of<Divergence::forward_kl>(zs, zt, pair);
      case Divergence::reverse_kl:
        return terms_of<Divergence::reverse_kl>(zs, zt, pair);
      case Divergence::jsd:
        return terms_of<Divergence::jsd>(zs, zt, pair);
      case Divergence::skew_kl:
        return terms_of<Divergence::skew_kl>(zs, zt, pair);
      case Divergence::skew_reverse_kl:
        return terms_of<Divergence::skew_reverse_kl>(zs, zt, pair);
      case Divergence::tvd:
        return terms_of<Divergence::tvd>(zs, zt, pair);
      default:
        return terms_of<Divergence::mse>(zs, zt, pair);
    }
  }

  // The same without the values of those divergences that have them from the pass before.
  PYFAST_DEVICE VectorTerms slopes_of(const Words<T>& zs, const Words<T>& zt, const RowPair& pair) const {
    if (a.divergence == Divergence::forward_kl) return terms_of<Divergence::forward_kl>(zs, zt, pair);
    if (a.divergence == Divergence::reverse_kl) return terms_of<Divergence::reverse_kl>(zs, zt, pair);
    VectorTerms out = terms_of(zs, zt, pair);
    out.value = {};
    return out;
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline constexpr bool kHasClusters = true;
#else
inline constexpr bool kHasClusters = false;
#endif

// Grid: clusters of blocks along x, each doing rows its number apart. Shared memory: two times a.share vectors.
template <class T>
__global__ void __launch_bounds__(kResidentThreads, 1) distill_kl_resident_kernel(const DistillKlArgs<T> a) {
  PYFAST_DYNAMIC_SHARED(slots);
  PYFAST_SHARED(GroupMemory, memory);
  Group<kHasClusters> group(memory);
  Resident<T> store(slots, a.share, group.rank);
  const int64_t size = group.size;
  DistillKl<T, Resident<T>, kHasClusters>{a, store, group}.run(blockIdx.x / size, gridDim.x / size);
}

// Grid: blocks, each doing rows its number apart. Shared memory: two times kStages vectors a thread.
template <class T>
__global__ void __launch_bounds__(kStreamedThreads, 2) distill_kl_streamed_kernel(const DistillKlArgs<T> a) {
  PYFAST_DYNAMIC_SHARED(slots);
  PYFAST_SHARED(GroupMemory, memory);
  Group<false> group(memory);
  Streamed<T> store(slots);
  DistillKl<T, Streamed<T>, false>{a, store, group}.run(blockIdx.x, gridDim.x);
}

#endif

}  // namespace pyfast::cuda
