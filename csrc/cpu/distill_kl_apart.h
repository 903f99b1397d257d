// forward_kl and reverse_kl of rows whose distributions lie apart: pass 1 finds value and H besides the sums, and pass
// 2 makes the gradient of s and t themselves. Of 16-bit logits pass 1 keeps what that takes:
//
//   pass 1   rows, 1024 words at a time ──► es = 2^…, et = 2^…, x ──► Σ es, Σ et, Σ w x ──► value, H
//                                                     └──► scratch: es and et (forward_kl), es and x (reverse_kl)
//   pass 2   scratch (L2/L3) ──► (s − t) · scale  or  s (x − H) · scale ──► streaming store ──► grad[i, :]
//
// w is t for forward_kl and s for reverse_kl. es and et belong to the shifts that their chunk had: those are kept too.
// Memory bounds float32: what is kept would be as much as the logits, which pass 2 reads again instead, as the one of
// distill_kl_rows.h does. s − t keeps enough digits where the value is not small (kNear).
#pragma once

#include "softmax_rows.h"
#include "../distill_kl_terms.h"
#include "distill_kl.h"

namespace pyfast {
namespace {

// A value from which on a row lies apart: |x| is then about 0.14, and float32 leaves 2e-6 of s − t.
constexpr double kNear = 0.01;

constexpr bool is_kl(Divergence divergence) {
  return divergence == Divergence::forward_kl || divergence == Divergence::reverse_kl;
}

// Whether pass 1 keeps anything.
template <class T>
constexpr bool kKeeps = sizeof(T) == 2;

// Both log-sum-exps, and Σ w x without the logarithms of the two sums in x. Words that the teacher excludes are no part
// of it; reverse_kl has Σ es of those.
struct PairSums {
  RowSum student, teacher;
  double log_ratio, excluded;
};

struct ChunkSums {
  float student, teacher, log_ratio, excluded;
};

// Shifts of a chunk's logits, and what its x lacks of them.
struct Shifts {
  float student, teacher;
  float log_ratio;

  Shifts(float student, float teacher, double student_inverse, double teacher_inverse)
      : student(student),
        teacher(teacher),
        log_ratio(static_cast<float>(teacher * teacher_inverse - student * student_inverse)) {}
};

// What pass 1 leaves for pass 2. Of the words of a chunk, pairs lie as [es a, es b, et or x a, b], single vectors of n
// words as [es, et or x]; a chunk's words begin at 2 · begin.
struct Kept {
  float* words;
  float* shifts;  // of each chunk: the student's, the teacher's
};

// The chunks of a row: `head` words, then kChunk at a time. chunk(begin, n, number)
template <class Chunk>
PYFAST_INLINE void each_chunk(int64_t vocab, int64_t head, const Chunk& chunk) {
  int64_t number = 0;
  if (head > 0) chunk(int64_t{0}, head, number++);
  for (int64_t begin = head; begin < vocab; begin += kChunk)
    chunk(begin, vocab - begin < kChunk ? vocab - begin : kChunk, number++);
}

// next_*: rows that the thread reads after these. Where words are kept this pass takes longer than the other one, so it
// asks for them.
template <Divergence divergence, bool keeps, class T>
ChunkSums pair_chunk(const T* student, const T* teacher, float* kept, int64_t n, const RowPair& pair,
                     const T* next_student, const T* next_teacher) {
  constexpr bool forward = divergence == Divergence::forward_kl;
  const RowPair row = pair;  // a copy that no store can change: its scalars stay in registers
  Vec s = broadcast(0.0f), t = s, log_ratio_sum = s, excluded = s;
  const Vec zero = broadcast(0.0f), most = broadcast(-kLowest);
  auto add = [&](Vec zs, Vec zt, Vec& first, Vec& second) __attribute__((always_inline)) {
    const Vec es = student_probability(zs, row), et = teacher_probability(zt, row), x = log_ratio(zs, zt, row);
    s = s + es;
    t = t + et;
    if constexpr (forward) {
      log_ratio_sum = select(equal(et, zero), log_ratio_sum, fma(et, x, log_ratio_sum));
    } else {
      const auto odd = not_at_most(abs(x), most);
      log_ratio_sum = select(odd, log_ratio_sum, fma(es, x, log_ratio_sum));
      if (any(odd)) excluded = excluded + select(odd, es, zero);
    }
    first = es;
    second = forward ? et : x;
  };
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    if constexpr (keeps) {
      for (int64_t byte = 0; byte < kPair * static_cast<int64_t>(sizeof(T)); byte += 64) {
        prefetch(reinterpret_cast<const char*>(next_student + i) + byte);
        prefetch(reinterpret_cast<const char*>(next_teacher + i) + byte);
      }
    }
    const VecPair zs = load_pair(student + i), zt = load_pair(teacher + i);
    VecPair first, second;
    add(zs.a, zt.a, first.a, second.a);
    add(zs.b, zt.b, first.b, second.b);
    if constexpr (keeps) {
      store_pair(kept + 2 * i, first);
      store_pair(kept + 2 * i + kPair, second);
    }
  }
  for (; i < n; i += Vec::width) {
    const int64_t left = n - i < Vec::width ? n - i : Vec::width;
    Vec first, second;
    add(load_up_to(student + i, left, kNegInf), load_up_to(teacher + i, left, kNegInf), first, second);
    if constexpr (keeps) {
      store_up_to(kept + 2 * i, left, first);
      store_up_to(kept + 2 * i + left, left, second);
    }
  }
  return {reduce_add(s), reduce_add(t), reduce_add(log_ratio_sum), reduce_add(excluded)};
}

// Pass 1. `row` has the scales, and is left with the shifts of the last chunk.
template <Divergence divergence, bool keeps, class T>
PairSums pair_sums(const T* student, const T* teacher, int64_t vocab, int64_t head, RowPair& row,
                   double student_inverse, double teacher_inverse, const Kept& kept, const T* next_student,
                   const T* next_teacher) {
  constexpr bool forward = divergence == Divergence::forward_kl;
  PairSums sums{{first_shift(widen(student[0])), 0.0}, {first_shift(widen(teacher[0])), 0.0}, 0.0, 0.0};
  row.student_log2_sum = row.teacher_log2_sum = 0.0f;
  const auto shift = [&] {
    const Shifts now(sums.student.shift, sums.teacher.shift, student_inverse, teacher_inverse);
    row.student_shift = now.student;
    row.teacher_shift = now.teacher;
    row.log_ratio_offset = now.log_ratio;
    return now;
  };
  Shifts shifts = shift();
  each_chunk(vocab, head, [&](int64_t begin, int64_t n, int64_t number) {
    float* const words = keeps ? kept.words + 2 * begin : nullptr;
    ChunkSums chunk = pair_chunk<divergence, keeps>(student + begin, teacher + begin, words, n, row,
                                                    next_student + begin, next_teacher + begin);
    if (!(chunk.student <= kMuch) || !(chunk.teacher <= kMuch)) {
      const RowSum before = forward ? sums.teacher : sums.student;
      raise_shift(sums.student, student + begin, n, row.student_scale);
      raise_shift(sums.teacher, teacher + begin, n, row.teacher_scale);
      const RowSum& after = forward ? sums.teacher : sums.student;
      const double shrink = before.sum == 0.0 ? 0.0 : after.sum / before.sum;
      sums.excluded *= shrink;
      const double from = shifts.log_ratio;
      shifts = shift();
      sums.log_ratio = sums.log_ratio * shrink + (shifts.log_ratio - from) * (after.sum - sums.excluded);
      chunk = pair_chunk<divergence, keeps>(student + begin, teacher + begin, words, n, row, next_student + begin,
                                            next_teacher + begin);
    }
    if constexpr (keeps) {
      kept.shifts[2 * number] = shifts.student;
      kept.shifts[2 * number + 1] = shifts.teacher;
    }
    sums.student.sum += static_cast<double>(chunk.student);
    sums.teacher.sum += static_cast<double>(chunk.teacher);
    sums.log_ratio += static_cast<double>(chunk.log_ratio);
    sums.excluded += static_cast<double>(chunk.excluded);
  });
  return sums;
}

// Slope and mass of a word; the value is known.
template <Divergence divergence>
PYFAST_INLINE Terms apart_terms(Vec zs, Vec zt, const RowPair& row) {
  const Vec s = student_probability(zs, row), zero = broadcast(0.0f);
  if constexpr (divergence == Divergence::forward_kl) return {zero, s - teacher_probability(zt, row), s};
  const Vec x = log_ratio(zs, zt, row);
  const auto odd = not_at_most(abs(x), broadcast(-kLowest));
  Vec slope = s * x;
  if (any(odd)) [[unlikely]]
    slope = select(odd, zero - s, slope);
  return {zero, slope, s};
}

// Both log-sum-exps of tempered logits.
struct LogSums {
  double student, teacher;
};

// Pass 2: what was kept to grad. center: H.
template <Divergence divergence, class T>
void kept_pass(const Kept& kept, T* grad, int64_t vocab, int64_t head, const LogSums& logs, double student_inverse,
               double teacher_inverse, float scale, double center, bool streaming) {
  constexpr bool forward = divergence == Divergence::forward_kl;
  each_chunk(vocab, head, [&](int64_t begin, int64_t n, int64_t number) {
    const Shifts shifts(kept.shifts[2 * number], kept.shifts[2 * number + 1], student_inverse, teacher_inverse);
    const double log_s = shifts.student * student_inverse - logs.student;
    const double log_t = shifts.teacher * teacher_inverse - logs.teacher;
    const Vec by_s = broadcast(static_cast<float>(scale * __builtin_exp(log_s)));
    const Vec by_t = broadcast(static_cast<float>(scale * __builtin_exp(log_t)));
    // Of reverse_kl: what x lacks, less H; and for words that the teacher excludes −1 − H.
    const Vec offset = broadcast(static_cast<float>((logs.teacher - logs.student) - shifts.log_ratio - center));
    const Vec none = broadcast(static_cast<float>(-1.0 - center)), most = broadcast(-kLowest);
    const auto gradient = [&](Vec es, Vec other) __attribute__((always_inline)) {
      if constexpr (forward) return fnma(other, by_t, es * by_s);
      Vec h = other + offset;
      const auto odd = not_at_most(abs(other), most);
      if (any(odd)) [[unlikely]]
        h = select(odd, none, h);
      return es * by_s * h;
    };
    const float* words = kept.words + 2 * begin;
    T* const out = grad + begin;
    int64_t i = 0;
    for (; i + kPair <= n; i += kPair) {
      const VecPair es = load_pair(words + 2 * i), other = load_pair(words + 2 * i + kPair);
      const VecPair g = {gradient(es.a, other.a), gradient(es.b, other.b)};
      if (streaming)
        stream_pair(out + i, g);
      else
        store_pair(out + i, g);
    }
    for (; i < n; i += Vec::width) {
      const int64_t left = n - i < Vec::width ? n - i : Vec::width;
      store_up_to(out + i, left,
                  gradient(load_up_to(words + 2 * i, left, 0.0f), load_up_to(words + 2 * i + left, left, 0.0f)));
    }
  });
}

}  // namespace
}  // namespace pyfast
