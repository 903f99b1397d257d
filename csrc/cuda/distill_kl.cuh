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
// pass), and of the streamed readings what L2 still holds costs no memory. Two or more blocks share a multiprocessor,
// and each asks for its next row while it writes the gradient of the last one, so that memory rests only where all of
// them reduce at once. Resident holds 262144 words of 16 bits on 8 blocks of an H100 (128 KB each; 64 KB at 128256
// words, so that three share a multiprocessor) and goes up to 470000; without clusters, what one block holds
// (distill_kl_plan.h).
//
// Instructions are what it is bound by (docs/kernels-gpu.md). At 3E, 128256 words of 16 bits and 3.0 TB/s an H100 has
// 59 a word. The code for sm_90 issues a word of bfloat16, in the loops over vectors:
//
//                     first   second   last   all   of a near row
//   forward_kl         14.0       –    12.0    26         43
//   reverse_kl         14.2       –    14.1    28         43
//   tvd                10.4     14.2   13.2    38         63
//   mse                10.4     11.0   13.0    34         72
//   jsd                10.4     17.1   18.4    46        101
//   skew_kl            10.4     16.1   17.4    44        100
//   skew_reverse_kl    10.4     18.1   21.4    50        105
//
// of which 4 (forward_kl) to 10 (skew_reverse_kl) are the special function unit's, which takes one every 8. What a row
// costs besides, sums over threads above all, is about 5 a word at 128256 words, and 3 more where there is a second
// pass. Softcaps, labels and mixtures of very unequal weights have kernels of their own (kGeneral), so that the loops
// of the others hold no code for them.
//
// Precision. float32, sums by trees over threads, in two parts above a warp. Powers and logarithms are the special
// function unit's (ex2.approx, lg2.approx: 2^-22). x takes the logarithm of the ratio of the two sums, which is exact
// where one word has all of the mass: of its error 1e-8 to 3e-7 is left, as of each s - t of a plain row. In a near row
// a KL of 1e-7 (|x| of 4e-4) keeps four digits, and the gradient of forward_kl three to four. A row whose highest logit
// is 2^30 or more (over its temperature, to base 2) gives NaN.
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
#include "distill_kl_sums.cuh"
#include "distill_kl_terms.cuh"
#include "distill_kl_words.cuh"

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
        fill_words(grad, word, a.words, T{});
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
    const float zero = is_kl(o.divergence) ? origin_of(memory, o) : 0.0f;
    const Statistics sums =
        join_group(group, first_pass(memory, zero), o.student_rate, o.teacher_rate, o.divergence, a.labels != nullptr);
    Row row{};
    if (group.leads()) {
      row.next_counts = counts(i + a.groups);
      row.constants = constants_of(sums, o);
      row.way = !kGeneral ? Way::plain : o.goes_shared ? Way::shared : Way::near;
      if (is_kl(o.divergence)) {
        row.measured = measured_by_sums(o.divergence, sums, row.constants, zero);
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

  PYFAST_DEVICE Statistics first_pass(const RowInMemory<T>& row, float origin) const {
    Statistics sums = Statistics::nothing();
    const auto pass = [&]<Divergence divergence>() {
      store.template first<kGeneral ? 1 : 2>(
          row, [&]<int kVectors>(const Words4(&student)[kVectors], const Words4(&teacher)[kVectors]) {
            add_statistics<T, kGeneral, divergence, kVectors>(sums, student, teacher, origin, a.options,
                                                              a.labels != nullptr);
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

  PYFAST_DEVICE void write(T* grad, int word, uint32_t span, const Words<T>& z, Words4* slot) const {
    write_vector(grad, word, a.words, span, narrow_vector(z), slot);
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
