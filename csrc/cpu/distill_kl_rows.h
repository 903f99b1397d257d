// The row algorithm of distill_kl, written once over Vec and compiled by each ISA file.
//
//   pass 1   student row ──► Σ2^… (1024 words at a time, while they are in L1) ──► log-sum-exp ┐
//            teacher row ──► the same ─────────────────────────────────────────► log-sum-exp ──┤
//   pass 2   both rows again (L2/L3) ──► terms of each word ──► Σ in double ──► rows[i]        ▼
//                                             │
//              forward_kl, reverse_kl         ├──► (slope − H mass) · scale ──► streaming store ──► grad[i, :]
//              the others                     └──► scratch: slope, mass ──► pass 3
//   pass 3   scratch (L2/L3) ──► (slope − H mass) · scale ──► streaming store ──► grad[i, :]
//
// H = Σ slope is 0 for forward_kl, and for reverse_kl pass 1 has it already. The others know it only after pass 2;
// reading slope and mass back is cheaper than two exponentials and a logarithm once more. Cross-entropy and softcap
// are added in pass 3, whatever the divergence. A softcap is applied first, into float32 rows in scratch.
//
// Of a KL that is not small pass 1 can find the value too, and then there is no pass 2 for a value alone, and a shorter
// one for a gradient of 16 bits: distill_kl_apart.h.
#pragma once

#include "softmax_rows.h"
#include "../distill_kl_terms.h"
#include "distill_kl.h"
#include "distill_kl_apart.h"

namespace pyfast {
namespace {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// How many words precede the first one whose gradient lies at an address that streaming stores take.
template <class G>
int64_t words_to_alignment(const G* grad, bool streaming, int64_t vocab) {
  constexpr uintptr_t align = Vec::width * sizeof(float);
  const uintptr_t past = reinterpret_cast<uintptr_t>(grad) % align;
  if (!streaming || past == 0) return 0;
  const int64_t words = static_cast<int64_t>((align - past) / sizeof(G));
  return words < vocab ? words : vocab;
}

// One row's walk: `head` words singly, pairs of vectors, the rest singly. Passes that share scratch walk alike.
// few(i, n): n <= Vec::width words from i; pair(i): kPair words; chunk(): after every kChunk words.
template <class Few, class Pair, class Chunk>
PYFAST_INLINE void walk(int64_t vocab, int64_t head, const Few& few, const Pair& pair, const Chunk& chunk) {
  int64_t i = 0;
  for (; i < head; i += Vec::width) few(i, head - i < Vec::width ? head - i : Vec::width);
  i = head;
  while (i + kPair <= vocab) {
    const int64_t left = (vocab - i) / kPair * kPair;
    const int64_t end = i + (left < kChunk ? left : kChunk);
    for (; i < end; i += kPair) pair(i);
    chunk();
  }
  for (; i < vocab; i += Vec::width) few(i, vocab - i < Vec::width ? vocab - i : Vec::width);
  chunk();
}

// Scratch of a word: pairs lie as [slope a, slope b, mass a, mass b], single vectors of n words as [slope, mass].
template <class T>
int64_t slope_slot(int64_t word, int64_t vocab, int64_t head) {
  const int64_t pairs_end = head + (vocab - head) / kPair * kPair;
  if (word >= head && word < pairs_end) {
    const int64_t begin = head + (word - head) / kPair * kPair;
    return 2 * begin + pair_lane(static_cast<const T*>(nullptr), word - begin);
  }
  const int64_t from = word < head ? 0 : pairs_end;
  const int64_t begin = from + (word - from) / Vec::width * Vec::width;
  return 2 * begin + (word - begin);
}

// Where a pass leaves what it has of the gradient.
enum class Into { nothing, grad, scratch };

struct Center {
  double value;   // of the divergence
  double center;  // H
};

// Terms of n <= Vec::width words, in a function of their own, so that the loop over whole pairs keeps its registers.
template <Divergence divergence, class T>
[[gnu::noinline]] Terms few_terms(const T* student, const T* teacher, int64_t n, const RowPair& row) {
  return terms<divergence>(load_up_to(student, n, kNegInf), load_up_to(teacher, n, kNegInf), row);
}

// Pass 2. scale: what the gradient is multiplied by; center: H, where it is known already. next_*: rows that the thread
// reads after this one. This pass computes while memory would rest, so it asks for them; the first pass over them then
// runs from L2.
template <Divergence divergence, From from, Into into, class T>
Center terms_pass_from(const RowPair& pair, const T* student, const T* teacher, void* out, int64_t vocab, int64_t head,
                       float scale, float center, bool streaming, const T* next_student, const T* next_teacher) {
  constexpr bool centered = divergence != Divergence::forward_kl;
  const RowPair row = pair;  // a copy that no store can change: its scalars stay in registers
  T* grad = static_cast<T*>(out);
  float* scratch = static_cast<float*>(out);
  const Vec factor = broadcast(scale), middle = broadcast(center);
  Total value{}, slope{};
  Center total{0.0, 0.0};
  auto keep = [&](const Terms& e) __attribute__((always_inline)) {
    value = value + e.value;
    if constexpr (centered && into == Into::scratch) slope = slope + e.slope;
  };
  auto gradient = [&](const Terms& e) __attribute__((always_inline)) {
    if constexpr (centered)
      return fnma(e.mass, middle, e.slope) * factor;
    else
      return e.slope * factor;
  };
  walk(
      vocab, head,
      [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Terms e = few_terms<divergence>(student + i, teacher + i, n, pair);
        keep(e);
        if constexpr (into == Into::grad) store_up_to(grad + i, n, gradient(e));
        if constexpr (into == Into::scratch) {
          store_up_to(scratch + 2 * i, n, e.slope * factor);
          store_up_to(scratch + 2 * i + n, n, e.mass * factor);
        }
      },
      [&](int64_t i) __attribute__((always_inline)) {
        for (int64_t byte = 0; byte < kPair * static_cast<int64_t>(sizeof(T)); byte += 64) {
          prefetch(reinterpret_cast<const char*>(next_student + i) + byte);
          prefetch(reinterpret_cast<const char*>(next_teacher + i) + byte);
        }
        const VecPair zs = load_pair(student + i), zt = load_pair(teacher + i);
        const Terms a = terms_from<divergence, from>(zs.a, zt.a, row),
                    b = terms_from<divergence, from>(zs.b, zt.b, row);
        keep(a);
        keep(b);
        if constexpr (into == Into::grad) {
          if (streaming)
            stream_pair(grad + i, {gradient(a), gradient(b)});
          else
            store_pair(grad + i, {gradient(a), gradient(b)});
        }
        if constexpr (into == Into::scratch) {
          store_pair(scratch + 2 * i, {a.slope * factor, b.slope * factor});
          store_pair(scratch + 2 * i + kPair, {a.mass * factor, b.mass * factor});
        }
      },
      [&]() __attribute__((always_inline)) {
        total.value += static_cast<double>(reduce_add(value));
        value = Total{};
        if constexpr (centered && into == Into::scratch) {
          total.center += static_cast<double>(reduce_add(slope));
          slope = Total{};
        }
      });
  return total;
}

template <Divergence divergence, Into into, class... Arguments>
Center terms_pass(const RowPair& row, const Arguments&... arguments) {
  return from_of(divergence, row) == From::student
             ? terms_pass_from<divergence, From::student, into>(row, arguments...)
             : terms_pass_from<divergence, From::teacher, into>(row, arguments...);
}

// What pass 3 adds to a gradient: cross-entropy (0: none) and the slope of the softcap (0: none).
struct Extras {
  float ce_scale, shift, log2_sum;
  float inverse_softcap;
};

inline Vec with_extras(Vec grad, Vec z, const Extras& x) {
  if (x.ce_scale != 0.0f) grad = fma(broadcast(x.ce_scale), probability(z, x.shift, kLog2e, x.log2_sum), grad);
  if (x.inverse_softcap != 0.0f) {  // z is capped: dz / d(raw) = 1 - (z / cap)²; a word of -inf has no gradient
    const Vec u = z * broadcast(x.inverse_softcap);
    grad = select(equal(z, broadcast(kNegInf)), broadcast(0.0f), grad * fnma(u, u, broadcast(1.0f)));
  }
  return grad;
}

// Pass 3: scratch to grad. Logits are read only where there are extras.
template <bool extras, class T, class G>
void finish_pass(const float* scratch, const T* student, G* grad, int64_t vocab, int64_t head, float center,
                 bool streaming, const Extras& x) {
  const Vec middle = broadcast(center);
  walk(
      vocab, head,
      [&](int64_t i, int64_t n) {
        Vec g = fnma(load_up_to(scratch + 2 * i + n, n, 0.0f), middle, load_up_to(scratch + 2 * i, n, 0.0f));
        if constexpr (extras) g = with_extras(g, load_up_to(student + i, n, kNegInf), x);
        store_up_to(grad + i, n, g);
      },
      [&](int64_t i) {
        const VecPair slope = load_pair(scratch + 2 * i), mass = load_pair(scratch + 2 * i + kPair);
        VecPair g = {fnma(mass.a, middle, slope.a), fnma(mass.b, middle, slope.b)};
        if constexpr (extras) {
          const VecPair z = load_pair(student + i);
          g = {with_extras(g.a, z.a, x), with_extras(g.b, z.b, x)};
        }
        if constexpr (!kSame<T, G>) {  // capped rows are float32: neighbours lie next to each other
          store(grad + i, g.a);
          store(grad + i + Vec::width, g.b);
        } else if (streaming) {
          stream_pair(grad + i, g);
        } else {
          store_pair(grad + i, g);
        }
      },
      [] {});
}

// What pass 1 finds besides the log-sum-exps, which are in RowPair then: H of reverse_kl; and of a KL that lies apart
// the value.
struct Known {
  double value, center;
  LogSums logs;
  bool apart;
};

// Pass 1. `row` has the scales, and is left with the shifts and sums.
template <Divergence divergence, class T>
Known pass_one(const T* student, const T* teacher, int64_t vocab, int64_t head, RowPair& row, double student_inverse,
               double teacher_inverse, Search search, const Kept& kept) {
  PairSums sums{};
  if constexpr (is_kl(divergence)) {
    sums = pair_sums<divergence>(student, teacher, vocab, head, row, student_inverse, teacher_inverse, search, kept);
  } else {
    sums.student = row_sum(student, vocab, row.student_scale);
    sums.teacher = row_sum(teacher, vocab, row.teacher_scale);
  }
  const RowSum &s = sums.student, &t = sums.teacher;
  Known known{0.0, 0.0, log_sums(sums, student_inverse, teacher_inverse), false};
  const double log_ratio = known.logs.teacher - known.logs.student;
  if constexpr (is_kl(divergence)) {
    const double value = kl_of(divergence, sums, log_ratio, student_inverse);
    if constexpr (divergence == Divergence::reverse_kl)  // h = x, and -1 for words that the teacher excludes
      known.center = value - sums.excluded / s.sum;
    known.apart = sums.looks_apart && !(value <= kNear);  // NaN too
    known.value = value;
  }
  row.student_shift = s.shift;
  row.teacher_shift = t.shift;
  row.student_log2_sum = static_cast<float>(s.log2());
  row.teacher_log2_sum = static_cast<float>(t.log2());
  row.log_ratio_offset = static_cast<float>(log_ratio);
  return known;
}

// One row whose logits are T, capped already if there is a cap; the gradient goes to G.
template <Divergence divergence, class T, class G>
void distill_row(const DistillKlArgs& a, int64_t i, const T* student, const T* teacher, const T* next_student,
                 const T* next_teacher, float* scratch) {
  const double student_inverse = 1.0 / a.student_temperature, teacher_inverse = 1.0 / a.teacher_temperature;
  G* grad = a.grad == nullptr ? nullptr : static_cast<G*>(a.grad) + i * a.grad_stride;
  const float weight = a.row_scale[i];
  const bool compared = weight != 0.0f;  // else only the cross-entropy counts, whatever the teacher holds
  RowPair row;
  row.student_scale = static_cast<float>(student_inverse / kLn2Double);
  row.teacher_scale = static_cast<float>(teacher_inverse / kLn2Double);
  row.teacher_share = static_cast<float>(a.student_temperature / a.teacher_temperature);
  row.student_inverse = static_cast<float>(student_inverse);
  const double mixture_teacher = divergence == Divergence::skew_reverse_kl ? 1.0 - a.mix : a.mix;
  row.mixture_teacher = static_cast<float>(mixture_teacher);
  row.mixture_student = static_cast<float>(1.0 - mixture_teacher);

  Extras extras{0.0f, 0.0f, 0.0f, a.student_softcap > 0 ? static_cast<float>(1.0 / a.student_softcap) : 0.0f};
  double ce = 0.0;
  if (a.labels != nullptr && a.ce_scale[i] != 0.0f) {
    const int64_t label = a.labels[i];
    const RowSum plain = row_sum(student, a.vocab, kLog2e);
    extras.ce_scale = a.ce_scale[i];
    extras.shift = plain.shift;
    extras.log2_sum = static_cast<float>(plain.log2());
    const bool known = label >= 0 && label < a.vocab;
    ce = !known ? __builtin_nan("")
                : kLn2Double * plain.log2() + (static_cast<double>(plain.shift) - widen(student[label]));
    if (!known) extras.log2_sum = __builtin_nanf("");
  }

  const float scale = static_cast<float>(weight * student_inverse);
  const bool has_extras = extras.ce_scale != 0.0f || extras.inverse_softcap != 0.0f;
  const bool streaming = a.stream_grad && kSame<T, G>;
  const int64_t head = grad == nullptr ? 0 : words_to_alignment(grad, streaming, a.vocab);
  const bool direct = is_kl(divergence) && kSame<T, G> && !has_extras;  // no third pass
  scratch += (kScratchPad - 2 * head % kScratchPad) % kScratchPad;      // pairs begin at whole vectors
  const Kept kept{scratch, reinterpret_cast<Ground*>(scratch + 2 * a.vocab)};
  const Search search = !direct || !kSearched<T> ? Search::nothing : grad == nullptr ? Search::value : Search::gradient;
  Known known{};
  if (compared)
    known = pass_one<divergence>(student, teacher, a.vocab, head, row, student_inverse, teacher_inverse, search, kept);
  double value = known.value, center = known.center;
  if (grad == nullptr) {
    if (compared && !known.apart)
      value = terms_pass<divergence, Into::nothing>(row, student, teacher, nullptr, a.vocab, 0, scale, 0.0f, false,
                                                    next_student, next_teacher)
                  .value;
  } else if (direct) {
    if constexpr (is_kl(divergence) && kSame<T, G>) {
      if (known.apart)
        kept_pass<divergence>(kept, grad, a.vocab, head, known.logs, student_inverse, teacher_inverse, scale, center,
                              streaming);
      else
        value = terms_pass<divergence, Into::grad>(row, student, teacher, grad, a.vocab, head, scale,
                                                   static_cast<float>(center), streaming, next_student, next_teacher)
                    .value;
    }
  } else {
    if (compared) {
      const Center sums = terms_pass<divergence, Into::scratch>(row, student, teacher, scratch, a.vocab, head, scale,
                                                                0.0f, false, next_student, next_teacher);
      value = sums.value;
      if constexpr (!is_kl(divergence)) center = sums.center;
    } else {
      zero_row(scratch, 2 * a.vocab);
    }
    const float middle = static_cast<float>(center);
    if (has_extras) {
      if (ce == ce && extras.ce_scale != 0.0f) scratch[slope_slot<T>(a.labels[i], a.vocab, head)] -= extras.ce_scale;
      finish_pass<true>(scratch, student, grad, a.vocab, head, middle, streaming, extras);
    } else {
      finish_pass<false>(scratch, student, grad, a.vocab, head, middle, streaming, extras);
    }
  }
  const float ce_part = static_cast<float>(extras.ce_scale * ce);
  a.rows[i] = static_cast<float>(weight * value) + ce_part;
  if (a.labels != nullptr) a.ce_rows[i] = ce_part;
}

// Logits under their softcap, or as they are where it is 0, as float32.
template <class T>
void cap_row(const T* z, float* out, int64_t n, double softcap) {
  const Vec cap = broadcast(static_cast<float>(softcap)), inverse = broadcast(static_cast<float>(1.0 / softcap));
  const Vec excluded = broadcast(kNegInf);
  for (int64_t i = 0; i < n; i += Vec::width) {
    const int64_t left = n - i < Vec::width ? n - i : Vec::width;
    const Vec v = load_up_to(z + i, left, 0.0f);
    store_up_to(out + i, left, softcap == 0 ? v : select(equal(v, excluded), excluded, cap * tanh(v * inverse)));
  }
}

template <Divergence divergence, class T>
void distill_rows(const DistillKlArgs& a, float* scratch, int64_t begin, int64_t end) {
  const bool capped = a.student_softcap > 0 || a.teacher_softcap > 0;
  const int64_t scratch_row = (a.vocab + kScratchPad - 1) / kScratchPad * kScratchPad;
  for (int64_t i = begin; i < end; ++i) {
    if (a.row_scale[i] == 0.0f && (a.labels == nullptr || a.ce_scale[i] == 0.0f)) {
      a.rows[i] = 0.0f;
      if (a.labels != nullptr) a.ce_rows[i] = 0.0f;
      if (a.grad != nullptr) zero_row(static_cast<T*>(a.grad) + i * a.grad_stride, a.vocab);
      continue;
    }
    const T* student = static_cast<const T*>(a.student) + i * a.student_stride;
    const T* teacher = static_cast<const T*>(a.teacher) + i * a.teacher_stride;
    if (capped) {
      float* capped_student = scratch;
      float* capped_teacher = scratch + scratch_row;
      cap_row(student, capped_student, a.vocab, a.student_softcap);
      cap_row(teacher, capped_teacher, a.vocab, a.teacher_softcap);
      distill_row<divergence, float, T>(a, i, capped_student, capped_teacher, capped_student, capped_teacher,
                                        scratch + 2 * scratch_row);
    } else {
      distill_row<divergence, T, T>(a, i, student, teacher, i + 1 < end ? student + a.student_stride : student,
                                    i + 1 < end ? teacher + a.teacher_stride : teacher, scratch);
    }
  }
  if (a.stream_grad) stream_fence();
}

template <class T>
void scale_rows(const ScaleRowsArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* grad = static_cast<const T*>(a.grad) + i * a.grad_stride;
    T* out = static_cast<T*>(a.out) + i * a.out_stride;
    if (grad == out && a.scale[i * a.scale_stride] == 1.0f) continue;
    const Vec scale = broadcast(a.scale[i * a.scale_stride]);
    int64_t v = 0;
    for (; v + Vec::width <= a.vocab; v += Vec::width) store(out + v, load(grad + v) * scale);
    if (v < a.vocab) store_partial(out + v, a.vocab - v, load_partial(grad + v, a.vocab - v, 0.0f) * scale);
  }
}

template <Divergence divergence>
constexpr void fill(DistillKlKernel (&kernels)[kDtypeCount]) {
  kernels[0] = distill_rows<divergence, float>;
  kernels[1] = distill_rows<divergence, bf16>;
  kernels[2] = distill_rows<divergence, f16>;
}

constexpr DistillKlTable make_distill_kl_table() {
  DistillKlTable table{};
  fill<Divergence::forward_kl>(table.rows[0]);
  fill<Divergence::reverse_kl>(table.rows[1]);
  fill<Divergence::jsd>(table.rows[2]);
  fill<Divergence::skew_kl>(table.rows[3]);
  fill<Divergence::skew_reverse_kl>(table.rows[4]);
  fill<Divergence::tvd>(table.rows[5]);
  fill<Divergence::mse>(table.rows[6]);
  table.scale_rows[0] = scale_rows<float>;
  table.scale_rows[1] = scale_rows<bf16>;
  table.scale_rows[2] = scale_rows<f16>;
  return table;
}

}  // namespace
}  // namespace pyfast
