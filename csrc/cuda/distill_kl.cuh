// distill_kl on the GPU: divergence between two tempered softmaxes and its gradient, a row pair at a time. What is
// computed is said in csrc/cpu/distill_kl.h; what a word adds to it, in distill_kl_terms.cuh.
//
//   first pass    Σ 2^… below the highest logit so far, of both; Σ w x for forward_kl (w = t) and reverse_kl (w = s)
//                 ──► join_group ──► RowConstants; value and H of the two KL
//   second pass   the others: Σ value, H = Σ s h; once more where the row turns out to be near   ──► join_group
//   last pass     gradient, written; value of near rows of the two KL                            ──► join_group
//
// Bytes. With E those of one logits tensor, what is moved is
//
//   Resident   3E    both rows read once and kept on chip, the gradient written; values alone 2E
//   Streamed   5E    forward_kl and reverse_kl: two readings;  7E the others: three;  values alone 2E and 4E
//
// (near rows one more reading of the Streamed: 4E for a value alone, 9E for the gradient of those that have a second
// pass), and of the streamed readings what L2 still holds costs no memory. Two or more blocks share a multiprocessor, and
// each asks for its next row while it writes the gradient of the last one, so that memory rests only where all of them
// reduce at once. Resident holds 262144 words of 16 bits on 8 blocks of an H100 (128 KB each; 64 KB at 128256 words, so
// that three share a multiprocessor) and goes up to 470000; without clusters, what one block holds (distill_kl_plan.h).
//
// Instructions are what it is bound by (docs/kernels.md). At 3E, 128256 words of 16 bits and 3.0 TB/s an H100 has 59 a
// word. The code for sm_90 issues a word of bfloat16, in the loops over vectors:
//
//                     first   second   last   all   of a near row
//   forward_kl         14.0       –    12.0    26         43
//   reverse_kl         14.2       –    14.1    28         43
//   tvd                10.4     14.2   13.2    38         63
//   mse                10.4     11.0   13.0    34         72
//   jsd                10.4     17.1   18.4    46         95
//   skew_kl            10.4     16.1   17.4    44         94
//   skew_reverse_kl    10.4     18.1   21.4    50         99
//
// of which 4 (forward_kl) to 10 (skew_reverse_kl) are the special function unit's, which takes one every 8. What a row
// costs besides, sums over threads above all, is about 5 a word at 128256 words, and 3 more where there is a second pass.
// Softcaps, labels and mixtures of very unequal weights have kernels of their own (kGeneral), so that the loops of the
// others hold no code for them.
//
// Precision. float32, sums by trees over threads, in two parts above a warp. Powers and logarithms are the special
// function unit's (ex2.approx, lg2.approx: 2^-22). x takes the logarithm of the ratio of the two sums, which is exact
// where one word has all of the mass: of its error 1e-8 to 3e-7 is left, as of each s - t of a plain row. In a near row a
// KL of 1e-7 (|x| of 4e-4) keeps four digits, and the gradient of forward_kl three to four. A row whose highest logit is
// 2^30 or more (over its temperature, to base 2) gives NaN.
//
// Resources (tests/test_cuda_build.py compares; the shared memory is the most that a launch asks for, beside 2 KB):
//
//   distill_kl_resident_kernel<T, false>    80 registers    230400 bytes of shared memory
//   distill_kl_resident_kernel<T, true>    128 registers    230400 bytes of shared memory
//   distill_kl_streamed_kernel<T, false>    96 registers     40960 bytes of shared memory
//   distill_kl_streamed_kernel<T, true>    128 registers     32768 bytes of shared memory
#pragma once

#include "common.cuh"
#include "distill_kl_group.cuh"
#include "distill_kl_options.h"
#include "distill_kl_plan.h"
#include "distill_kl_store.cuh"
#include "distill_kl_terms.cuh"

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
  int share;       // vectors of a row that a block holds (Resident)
  int batch;       // those of them that are waited for together
  int cluster;     // blocks that hold a row
  int64_t groups;  // how many of such share the rows
  DistillKlOptions options;

  // Whether rows need what only the general kernel has.
  bool is_general() const {
    return labels != nullptr || options.student_softcap != 0.0f || options.teacher_softcap != 0.0f ||
           options.goes_shared;
  }
};

#if defined(PYFAST_KERNELS)

template <class T>
PYFAST_DEVICE Words<T> widen_vector(const Words4& bits) {
  const uint32_t parts[4] = {bits.x, bits.y, bits.z, bits.w};
  Words<T> out;
  PYFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out.at[i] = float_of(parts[i]);
    } else {
      const Floats2 pair = ptx::unpack<T>(parts[i]);
      out.at[2 * i] = pair.x;
      out.at[2 * i + 1] = pair.y;
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
      parts[i] = bits_of(z.at[i]);
    else
      parts[i] = ptx::pack<T>(z.at[2 * i], z.at[2 * i + 1]);
  }
  return {parts[0], parts[1], parts[2], parts[3]};
}

// The highest word of some vectors, before its softcap; NaN gives way to others.
template <class T, int kVectors>
PYFAST_DEVICE float highest_of(const Words4 (&bits)[kVectors]) {
  uint32_t top = bits[0].x;
  const auto take = [&](uint32_t word) {
    if constexpr (sizeof(T) == 4)
      top = bits_of(__builtin_fmaxf(float_of(top), float_of(word)));
    else
      top = ptx::max_pair<T>(top, word);
  };
  PYFAST_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    if (v > 0) take(bits[v].x);
    take(bits[v].y);
    take(bits[v].z);
    take(bits[v].w);
  }
  if constexpr (sizeof(T) == 4) {
    return float_of(top);
  } else {
    const Floats2 pair = ptx::unpack<T>(top);
    return __builtin_fmaxf(pair.x, pair.y);
  }
}

PYFAST_DEVICE float capped(float z, float softcap) {
  return softcap == 0.0f || z == kNegInf ? z : softcap * tanh(broadcast(z * (1.0f / softcap))).at[0];
}

// Logits of a vector under their softcap.
template <class T>
PYFAST_DEVICE Words<T> logits_of(const Words4& bits, float softcap) {
  Words<T> z = widen_vector<T>(bits);
  if (softcap != 0.0f) {
    PYFAST_UNROLL
    for (float& word : z.at) word = capped(word, softcap);
  }
  return z;
}

// Σ a(i), Σ a(i) b(i) for i below kCount, a power of two.
template <int kCount, class A>
PYFAST_DEVICE float sum_over(const A& a) {
  float part[kCount / 2];
  PYFAST_UNROLL
  for (int i = 0; i < kCount / 2; ++i) part[i] = a(2 * i) + a(2 * i + 1);
  PYFAST_UNROLL
  for (int half = kCount / 4; half > 0; half /= 2) {
    PYFAST_UNROLL
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}
template <int kCount, class A, class B>
PYFAST_DEVICE float sum_over(const A& a, const B& b) {
  float part[2] = {a(0) * b(0), a(1) * b(1)};
  PYFAST_UNROLL
  for (int i = 2; i < kCount; ++i) part[i % 2] = __builtin_fmaf(a(i), b(i), part[i % 2]);
  return part[0] + part[1];
}

// What the gradient takes besides the divergence.
struct Extras {
  float ce_scale;       // 0: no cross-entropy
  float top, log2_sum;  // the highest logit, and log2 Σ e^(z - top) at temperature 1
  int64_t label;
};

// One group of blocks doing rows `begin`, `begin` + a.groups, …
template <class T, class Store, bool kClusters, bool kGeneral>
struct DistillKl {
  const DistillKlArgs<T>& a;
  Store& store;
  Group<kClusters>& group;

  PYFAST_DEVICE void run(int64_t begin) const {
    RowInMemory<T> row = row_at(begin, counts(begin));
    store.begin(row);
    for (int64_t i = begin; i < a.count; i += a.groups) {
      if (row.vectors != 0) {
        row = distill(i, row);
      } else {
        row = row_at(i + a.groups, counts(i + a.groups));
        skip(i, row);
      }
    }
    group.sync();  // a block stays until nothing more is written into it
  }

 private:
  PYFAST_DEVICE float ce_scale(int64_t i) const { return kGeneral && a.labels != nullptr ? a.ce_scale[i] : 0.0f; }
  PYFAST_DEVICE bool counts(int64_t i) const { return i < a.count && (a.row_scale[i] != 0.0f || ce_scale(i) != 0.0f); }
  PYFAST_DEVICE bool leads() const { return threadIdx.x == 0 && group.rank() == 0; }

  // Row i, or no vectors where it does not count.
  PYFAST_DEVICE RowInMemory<T> row_at(int64_t i, bool counts) const {
    if (!counts) return {};
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
    PYFAST_UNROLL_NOT
    for (int v = group.rank() * threads + static_cast<int>(threadIdx.x); v < vectors; v += group.size * threads) {
      const int word = v * kVectorWords<T> - lead;
      if (static_cast<uint32_t>(word) < inside_span<T>(a.words))
        ptx::st_streaming(reinterpret_cast<Words4*>(grad + word), Words4{});
      else
        write_zeros(grad, word, a.words);
    }
  }

  // run.template operator()<divergence>() with that of the call.
  template <class Run>
  PYFAST_DEVICE void with_divergence(const Run& run) const {
    switch (a.options.divergence) {
      case Divergence::forward_kl:
        return run.template operator()<Divergence::forward_kl>();
      case Divergence::reverse_kl:
        return run.template operator()<Divergence::reverse_kl>();
      case Divergence::jsd:
        return run.template operator()<Divergence::jsd>();
      case Divergence::skew_kl:
        return run.template operator()<Divergence::skew_kl>();
      case Divergence::skew_reverse_kl:
        return run.template operator()<Divergence::skew_reverse_kl>();
      case Divergence::tvd:
        return run.template operator()<Divergence::tvd>();
      case Divergence::mse:
        return run.template operator()<Divergence::mse>();
    }
  }

  // The same with the way of a row. The general kernel has no plain one: the other two are right for any row.
  template <class Run>
  PYFAST_DEVICE void with_way(Way way, const Run& run) const {
    with_divergence([&]<Divergence divergence>() {
      if constexpr (!kGeneral) {
        if (way == Way::plain) return run.template operator()<divergence, Way::plain>();
      } else if constexpr (is_mixture(divergence)) {
        if (way == Way::shared) return run.template operator()<divergence, Way::shared>();
      }
      run.template operator()<divergence, Way::near>();
    });
  }

  // What a pass needs to know of its row. The first warp finds it out, the others read it.
  struct alignas(16) Row {
    RowConstants constants;
    Factors factors;
    Measured measured;
    Way way;
    bool next_counts;
    Extras extras;
  };

  // Does row i, and begins to read the next one, which it returns.
  PYFAST_DEVICE RowInMemory<T> distill(int64_t i, const RowInMemory<T>& memory) const {
    const DistillKlOptions& o = a.options;
    const float zero = is_kl(o.divergence) ? origin(memory) : 0.0f;
    const Statistics sums =
        join_group(group, first_pass(memory, zero), o.student_rate, o.teacher_rate, o.divergence, a.labels != nullptr);
    Row row{};
    if (group.leads()) {
      row.next_counts = counts(i + a.groups);
      row.constants = constants_of(sums);
      row.way = !kGeneral ? Way::plain : o.goes_shared ? Way::shared : Way::near;
      if (is_kl(o.divergence)) {
        row.measured = measured_by_sums(sums, row.constants, zero);
        if (row.measured.value <= kNearValue) row.way = Way::near;
        set_factors(i, row);
      }
      if constexpr (kGeneral) row.extras = extras_of(i, sums);
    }
    row = group.broadcast(row);
    if (!is_kl(o.divergence)) second_pass(i, memory, row);
    const RowInMemory<T> next = row_at(i + a.groups, row.next_counts);
    const bool near_kl = is_kl(o.divergence) && row.measured.value <= kNearValue;
    float value = 0.0f;
    if (a.grad != nullptr || near_kl)
      value = last_pass(i, memory, next, row);
    else
      store.begin(next);
    if (near_kl)
      row.measured.value = group.broadcast(join_group(group, Totals{value, 0.0f, 0.0f}).value) * row.constants.mass;
    if (leads()) write_values(i, memory, row);
    return next;
  }

  PYFAST_DEVICE void set_factors(int64_t i, Row& row) const {
    const float scale = a.row_scale[i] * a.options.inverse;
    with_divergence([&]<Divergence divergence>() {
      row.factors = factors_of<divergence>(scale, row.measured.center, row.constants, a.options, row.way);
    });
  }

  PYFAST_DEVICE Extras extras_of(int64_t i, const Statistics& sums) const {
    Extras extras{ce_scale(i), sums.student_top, 0.0f, 0};
    if (extras.ce_scale != 0.0f) {
      extras.label = a.labels[i];
      const bool known = extras.label >= 0 && extras.label < a.words;
      extras.log2_sum = known ? ptx::log2_approx(sums.plain) : __builtin_nanf("");
    }
    return extras;
  }

  // The row's x but for RowConstants::offset: near those of the row where its logits have an offset.
  PYFAST_DEVICE float origin(const RowInMemory<T>& row) const {
    const float zs = capped(ptx::to_float(*row.student), a.options.student_softcap);
    const float zt = capped(ptx::to_float(*row.teacher), a.options.teacher_softcap);
    const float x = log_ratio(zs, zt, 0.0f, a.options);
    return is_finite(x) ? x : 0.0f;
  }

  PYFAST_DEVICE Statistics first_pass(const RowInMemory<T>& row, float origin) const {
    Statistics sums = Statistics::nothing();
    const auto pass = [&]<Divergence divergence>() {
      store.template first<kGeneral ? 1 : 2>(
          row, [&]<int kVectors>(const Words4(&student)[kVectors], const Words4(&teacher)[kVectors]) {
            add_statistics<divergence, kVectors>(sums, student, teacher, origin);
          });
    };
    if (kGeneral || !is_kl(a.options.divergence))
      pass.template operator()<Divergence::jsd>();
    else if (a.options.divergence == Divergence::forward_kl)
      pass.template operator()<Divergence::forward_kl>();
    else
      pass.template operator()<Divergence::reverse_kl>();
    return sums;
  }

  // Adds vectors to the statistics of this thread. kDivergence: that of the call as far as it matters, but for the
  // general kernel.
  template <Divergence kDivergence, int kVectors>
  PYFAST_DEVICE void add_statistics(Statistics& sums, const Words4 (&student)[kVectors],
                                    const Words4 (&teacher)[kVectors], float origin) const {
    const DistillKlOptions& o = a.options;
    constexpr int kCount = kVectors * kVectorWords<T>;
    const Divergence divergence = kGeneral ? o.divergence : kDivergence;
    const bool reverse = divergence == Divergence::reverse_kl;
    float top_s = highest_of<T>(student), top_t = highest_of<T>(teacher);
    if constexpr (kGeneral) {
      top_s = capped(top_s, o.student_softcap);
      top_t = capped(top_t, o.teacher_softcap);
    }
    top_s = __builtin_fmaxf(sums.student_top, top_s);
    top_t = __builtin_fmaxf(sums.teacher_top, top_t);
    const float shift_s = ptx::multiply(top_s, o.student_rate), shift_t = ptx::multiply(top_t, o.teacher_rate);
    const float keep_s = ptx::exp2_approx(ptx::multiply(sums.student_top, o.student_rate) - shift_s);
    const float keep_t = ptx::exp2_approx(ptx::multiply(sums.teacher_top, o.teacher_rate) - shift_t);
    float zs[kCount], zt[kCount], s[kCount], t[kCount];
    PYFAST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Words<T> vs = logits_of<T>(student[v], kGeneral ? o.student_softcap : 0.0f);
      const Words<T> vt = logits_of<T>(teacher[v], kGeneral ? o.teacher_softcap : 0.0f);
      PYFAST_UNROLL
      for (int i = 0; i < kVectorWords<T>; ++i) {
        zs[v * kVectorWords<T> + i] = vs.at[i];
        zt[v * kVectorWords<T> + i] = vt.at[i];
      }
    }
    PYFAST_UNROLL
    for (int i = 0; i < kCount; ++i) {
      s[i] = ptx::exp2_approx(__builtin_fmaf(zs[i], o.student_rate, -shift_s));
      t[i] = ptx::exp2_approx(__builtin_fmaf(zt[i], o.teacher_rate, -shift_t));
    }
    sums.student.hi = __builtin_fmaf(sums.student.hi, keep_s, sum_over<kCount>([&](int i) { return s[i]; }));
    sums.teacher.hi = __builtin_fmaf(sums.teacher.hi, keep_t, sum_over<kCount>([&](int i) { return t[i]; }));
    if (kGeneral && a.labels != nullptr) {
      const float keep = ptx::exp2_approx((sums.student_top - top_s) * kLog2e);
      const float more = sum_over<kCount>([&](int i) { return ptx::exp2_approx((zs[i] - top_s) * kLog2e); });
      sums.plain = __builtin_fmaf(sums.plain, keep, more);
    }
    if (is_kl(divergence)) {
      const auto weight = [&](int i) { return reverse ? s[i] : t[i]; };
      const auto ratio = [&](int i) { return log_ratio(zs[i], zt[i], -origin, o); };
      float drift = sum_over<kCount>(weight, ratio), absent = 0.0f;
      if (!is_finite(drift)) [[unlikely]] {  // logits of -inf, which count only where there is mass
        drift = sum_over<kCount>([&](int i) {
          const bool counts = weight(i) != 0.0f && !(reverse && zt[i] == kNegInf);
          return counts ? weight(i) * ratio(i) : 0.0f;
        });
        absent = sum_over<kCount>([&](int i) { return zt[i] == kNegInf ? s[i] : 0.0f; });
      }
      sums.drift = __builtin_fmaf(sums.drift, reverse ? keep_s : keep_t, drift);
      if (reverse) sums.absent = __builtin_fmaf(sums.absent, keep_s, absent);
    }
    sums.student_top = top_s;
    sums.teacher_top = top_t;
  }

  // log(t / s) of two sums, which keeps its digits where they are close.
  PYFAST_DEVICE static float log_of_ratio(const Sum& t, const Sum& s) {
    const float gap = (t.hi - s.hi) + (t.lo - s.lo);
    const Vec more = broadcast(__builtin_fabsf(gap)) / broadcast(gap < 0.0f ? t.hi : s.hi);
    const float log = log_parts(more).log1p.at[0];
    return gap < 0.0f ? -log : log;
  }

  // A sum whose highest word counts 2^rest, not what that was rounded to: exact where one word has all of the mass.
  PYFAST_DEVICE static Sum with_exact_top(const Sum& sum, float rest) {
    return {sum.hi,
            sum.lo - (__builtin_fabsf(rest) < kNear1 ? (ptx::exp2_approx(rest) - 1.0f) - expm1_near_0(rest) : 0.0f)};
  }

  // What follows from the sums. NaN in any of them reaches every constant.
  PYFAST_DEVICE RowConstants constants_of(const Statistics& sums) const {
    const DistillKlOptions& o = a.options;
    RowConstants row;
    const float shift_s = ptx::multiply(sums.student_top, o.student_rate);
    const float shift_t = ptx::multiply(sums.teacher_top, o.teacher_rate);
    const float rest_s = __builtin_fmaf(sums.student_top, o.student_rate, -shift_s);
    const float rest_t = __builtin_fmaf(sums.teacher_top, o.teacher_rate, -shift_t);
    const float log2_s = ptx::log2_approx(sums.student.hi), log2_t = ptx::log2_approx(sums.teacher.hi);
    const bool fits = __builtin_fmaxf(__builtin_fabsf(shift_s), __builtin_fabsf(shift_t)) < kMostExponent;
    const float bad = fits ? 0.0f * (log2_s + log2_t) : __builtin_nanf("");
    row.student_log2 = shift_s + log2_s + bad;
    row.teacher_log2 = shift_t + log2_t + bad;
    const float ratio = log_of_ratio(with_exact_top(sums.teacher, rest_t), with_exact_top(sums.student, rest_s));
    row.offset = __builtin_fmaf(rest_s - rest_t, kLn2, ratio) - log_ratio(sums.student_top, sums.teacher_top, 0.0f, o);
    const float over_s = row.student_log2 - shift_s, over_t = row.teacher_log2 - shift_t;
    row.balance_log2 = __builtin_fmaf(-kLog2e, ratio, over_t - over_s);
    row.balance = power_near_1(row.balance_log2);
    row.mass = power_near_1(over_s - log2_s);
    row.student_top = sums.student_top;
    row.teacher_top = sums.teacher_top;
    row.student_sum = log2_s - rest_s + bad;
    row.teacher_sum = log2_t - rest_t + bad;
    return row;
  }

  // The two KL: H, and the value of a row that is not near.
  PYFAST_DEVICE Measured measured_by_sums(const Statistics& sums, const RowConstants& row, float origin) const {
    const float offset = origin + row.offset;
    if (a.options.divergence == Divergence::forward_kl) return {-(sums.drift / sums.teacher.hi + offset), 0.0f};
    const float present = sums.student.hi - sums.absent;
    const float value = __builtin_fmaf(offset, present, sums.drift) / sums.student.hi;
    return {value, value - sums.absent / sums.student.hi};
  }

  // The others: value and H. Finds out whether the row is near.
  PYFAST_DEVICE void second_pass(int64_t i, const RowInMemory<T>& memory, Row& row) const {
    while (true) {
      Totals parts[2] = {Totals::nothing(), Totals::nothing()};
      if constexpr (kGeneral) {
        store.again(memory, [&](const Words4& student, const Words4& teacher) {
          const Words<T> zs = logits_of<T>(student, a.options.student_softcap),
                         zt = logits_of<T>(teacher, a.options.teacher_softcap);
          with_way(row.way, [&]<Divergence divergence, Way way>() {
            if constexpr (!is_kl(divergence)) measure<divergence, way, T>(zs, zt, row.constants, a.options, parts);
          });
        });
      } else {
        with_way(row.way, [&]<Divergence divergence, Way way>() {
          if constexpr (!is_kl(divergence))
            store.again(memory, [&](const Words4& student, const Words4& teacher) {
              measure<divergence, way, T>(widen_vector<T>(student), widen_vector<T>(teacher), row.constants, a.options,
                                          parts);
            });
        });
      }
      const Totals totals = join_group(group, Totals{parts[0].value + parts[1].value, parts[0].slope + parts[1].slope,
                                                     parts[0].square + parts[1].square});
      Way way = Way::near;  // to be measured again as what it was found to be
      if (group.leads()) {
        with_divergence([&]<Divergence divergence>() {
          row.measured = measured_of<divergence>(totals, row.constants, a.options, row.way);
          if (row.way != Way::plain || !lies_near<divergence>(row.measured, totals)) way = row.way;
        });
        set_factors(i, row);
      }
      const Found found = group.broadcast(Found{row.factors, row.measured, way});
      row.factors = found.factors;
      row.measured = found.measured;
      if (found.way == row.way) return;
      row.way = found.way;
    }
  }

  struct alignas(16) Found {
    Factors factors;
    Measured measured;
    Way way;
  };

  // The last pass. Returns this thread's part of the value of near rows of forward_kl and reverse_kl.
  PYFAST_DEVICE float last_pass(int64_t i, const RowInMemory<T>& memory, const RowInMemory<T>& next,
                                const Row& row) const {
    float value[2] = {0.0f, 0.0f};
    T* const grad = a.grad == nullptr ? nullptr : a.grad + i * a.grad_stride;
    const uint32_t span = grad != nullptr && words_past_multiple(grad) == memory.lead ? inside_span<T>(a.words) : 0u;
    if constexpr (kGeneral) {
      store.last(memory, next, [&](int word, const Words4& student, const Words4& teacher, Words4* slot) {
        const Words<T> zs = logits_of<T>(student, a.options.student_softcap),
                       zt = logits_of<T>(teacher, a.options.teacher_softcap);
        Words<T> g;
        with_way(row.way, [&]<Divergence divergence, Way way>() {
          g = gradients<divergence, way, T>(zs, zt, row.constants, a.options, row.factors, value);
        });
        add_extras(g, zs, word, a.row_scale[i], row.extras);
        write(grad, word, span, g, slot);
      });
    } else {
      with_way(row.way, [&]<Divergence divergence, Way way>() {
        store.last(memory, next, [&](int word, const Words4& student, const Words4& teacher, Words4* slot) {
          write(grad, word, span,
                gradients<divergence, way, T>(widen_vector<T>(student), widen_vector<T>(teacher), row.constants,
                                              a.options, row.factors, value),
                slot);
        });
      });
    }
    return value[0] + value[1];
  }

  // The vector of the gradient whose first word is `word`. slot: that of its logits, which are not needed any more.
  PYFAST_DEVICE void write(T* grad, int word, uint32_t span, const Words<T>& z, Words4* slot) const {
    const Words4 bits = narrow_vector(z);
    if (static_cast<uint32_t>(word) < span) {
      ptx::st_streaming(reinterpret_cast<Words4*>(grad + word), bits);
    } else if (grad != nullptr) {
      *slot = bits;
      write_words(grad, slot, word, a.words);
    }
  }

  // Adds the cross-entropy's gradient, and takes the softcap's slope: z is capped, dz / d(raw) = 1 - (z / cap)².
  PYFAST_DEVICE void add_extras(Words<T>& g, const Words<T>& zs, int word, float scale, const Extras& extras) const {
    if (extras.ce_scale != 0.0f) {
      PYFAST_UNROLL
      for (int k = 0; k < kVectorWords<T>; ++k) {
        const float p = ptx::exp2_approx(__builtin_fmaf(zs.at[k] - extras.top, kLog2e, -extras.log2_sum));
        const float own = scale == 0.0f ? 0.0f : g.at[k];
        g.at[k] = __builtin_fmaf(extras.ce_scale, p - (word + k == extras.label ? 1.0f : 0.0f), own);
      }
    }
    if (a.options.student_softcap == 0.0f) return;
    const float inverse = 1.0f / a.options.student_softcap;
    PYFAST_UNROLL
    for (int k = 0; k < kVectorWords<T>; ++k) {
      const float u = zs.at[k] * inverse;
      g.at[k] = zs.at[k] == kNegInf ? 0.0f : g.at[k] * __builtin_fmaf(-u, u, 1.0f);
    }
  }

  PYFAST_DEVICE void write_values(int64_t i, const RowInMemory<T>& memory, const Row& row) const {
    const Extras& extras = row.extras;
    const float value = row.measured.value;
    float ce = 0.0f;
    if (kGeneral && extras.ce_scale != 0.0f) {  // log2_sum is NaN where the label names no word
      const bool known = extras.log2_sum == extras.log2_sum;
      const float logit = known ? capped(ptx::to_float(memory.student[extras.label]), a.options.student_softcap) : 0.0f;
      ce = extras.ce_scale * __builtin_fmaf(kLn2, extras.log2_sum, extras.top - logit);
    }
    const float scale = a.row_scale[i];
    a.rows[i] = (scale == 0.0f ? 0.0f : scale * value) + ce;
    if (a.labels != nullptr) a.ce_rows[i] = ce;
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline constexpr bool kHasClusters = true;
#else
inline constexpr bool kHasClusters = false;
#endif

// Grid: clusters of blocks along x, each doing rows its number apart. Shared memory: two times a.share vectors.
template <class T, bool kGeneral>
__global__ void __launch_bounds__(resident_threads(kGeneral), 1) distill_kl_resident_kernel(const DistillKlArgs<T> a) {
  PYFAST_DYNAMIC_SHARED(slots);
  PYFAST_SHARED(GroupMemory, memory);
  Group<kHasClusters> group(memory, a.cluster);
  Resident<T> store(slots, a.words, a.share, a.batch, group.rank());
  DistillKl<T, Resident<T>, kHasClusters, kGeneral>{a, store, group}.run(blockIdx.x /
                                                                         static_cast<unsigned>(group.size));
}

// Grid: blocks, each doing rows its number apart. Shared memory: two times kStages vectors a thread.
template <class T, bool kGeneral>
__global__ void __launch_bounds__(streamed_threads(kGeneral), 2) distill_kl_streamed_kernel(const DistillKlArgs<T> a) {
  PYFAST_DYNAMIC_SHARED(slots);
  PYFAST_SHARED(GroupMemory, memory);
  Group<false> group(memory, 1);
  Streamed<T> store(slots, a.words);
  DistillKl<T, Streamed<T>, false, kGeneral>{a, store, group}.run(blockIdx.x);
}

#endif

}  // namespace pyfast::cuda
