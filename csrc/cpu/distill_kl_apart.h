// forward_kl and reverse_kl of 16-bit rows whose distributions lie apart: pass 1 finds the value besides the sums. A
// value alone has no pass 2 then. For a gradient pass 1 keeps what it is made of, so that pass 2 has no exponentials:
//
//   pass 1   rows, 1024 words at a time ──► es = 2^…, et = 2^…, x ──► Σ es, Σ et, Σ w x ──► value, H
//                                                     └──► scratch: es and et (forward_kl), es and x (reverse_kl)
//   pass 2   scratch (L2/L3) ──► (s − t) · scale  or  s (x − H) · scale ──► streaming store ──► grad[i, :]
//
// w is t for forward_kl and s for reverse_kl. es and et belong to the shifts that their chunk had: those are kept too.
// s − t keeps enough digits where the value is not small (kNear). The first chunk tells whether it seems to be: where
// it does not, the rest of the row is summed as in distill_kl_rows.h, nothing is kept, and its pass 2 follows. That is
// the way of float32, too: memory bounds it, and what would be kept is as much as the logits; and of rows with
// cross-entropy, whose gradient takes scratch already.
#pragma once

#include "softmax_rows.h"
#include "../distill_kl_terms.h"
#include "distill_kl.h"

namespace pyfast {
namespace {

// A value from which on a row lies apart: |x| is then about 0.2, and float32 leaves 2e-6 of s − t.
constexpr double kNear = 0.02;

constexpr bool is_kl(Divergence divergence) {
  return divergence == Divergence::forward_kl || divergence == Divergence::reverse_kl;
}

// Whether rows of these logits are asked at all.
template <class T>
constexpr bool kSearched = sizeof(T) == 2;

// What is wanted of a row that lies apart: nothing that others do not give too, its value, or the value and what the
// gradient is made of.
enum class Search { nothing, value, gradient };

// Both log-sum-exps, and Σ w x with `estimate` in x. Words that the teacher excludes are no part of it; reverse_kl has
// Σ es of those. forward_kl has it where the row looks apart only.
struct PairSums {
  RowSum student, teacher;
  double log_ratio, excluded;
  float estimate;    // of log_ratio of kl_of
  bool looks_apart;  // by its first chunk
};

struct ChunkSums {
  double student, teacher, log_ratio, excluded;
};

// What pass 1 leaves for pass 2. Of the words of a chunk, pairs lie as [es a, es b, et or x a, b], single vectors of n
// words as [es, et or x]; a chunk's words begin at 2 · begin.
struct Kept {
  float* words;
  float* grounds;  // of each chunk kGroundFloats: both shifts, and the log-sum-exp of the teacher less that of the
                   // student as it was estimated
};

// Both log-sum-exps of tempered logits.
struct LogSums {
  double student, teacher;
};

inline LogSums log_sums(const PairSums& sums, double student_inverse, double teacher_inverse) {
  return {sums.student.shift * student_inverse + kLn2Double * sums.student.log2(),
          sums.teacher.shift * teacher_inverse + kLn2Double * sums.teacher.log2()};
}

// The value, log_ratio being the log-sum-exp of the teacher less that of the student.
inline double kl_of(Divergence divergence, const PairSums& sums, double log_ratio) {
  const double lacking = log_ratio - sums.estimate;
  if (divergence == Divergence::forward_kl) return -(sums.log_ratio / sums.teacher.sum + lacking);
  return (sums.log_ratio + lacking * (sums.student.sum - sums.excluded)) / sums.student.sum;
}

// The chunks of a row: `head` words, then kChunk at a time. chunk(begin, n, number)
template <class Chunk>
PYFAST_INLINE void each_chunk(int64_t vocab, int64_t head, const Chunk& chunk) {
  int64_t number = 0;
  if (head > 0) chunk(int64_t{0}, head, number++);
  for (int64_t begin = head; begin < vocab; begin += kChunk)
    chunk(begin, vocab - begin < kChunk ? vocab - begin : kChunk, number++);
}

// Sums of this many words are added up on their own: of the error of a sum a value close to kNear feels 1 / kNear.
constexpr int64_t kFold = 8 * kPair;

// next_*: rows that the thread reads after these. Where words are kept this pass takes longer than the other one, so it
// asks for them.
template <Divergence divergence, bool keeps, class T>
ChunkSums pair_chunk(const T* student, const T* teacher, float* kept, int64_t n, const RowPair& pair,
                     const T* next_student, const T* next_teacher) {
  constexpr bool forward = divergence == Divergence::forward_kl;
  const RowPair row = pair;  // a copy that no store can change: its scalars stay in registers
  const Vec zero = broadcast(0.0f), most = broadcast(-kLowest);
  struct Sums {
    Vec student, teacher, log_ratio;
  };
  struct Totals {
    Total student, teacher, log_ratio;
  };
  Totals total{};
  Sums even{zero, zero, zero}, odd = even;
  Total excluded{};
  const auto add = [&](Vec zs, Vec zt, Sums& sums, Vec& first, Vec& second) __attribute__((always_inline)) {
    const Vec es = student_probability(zs, row), et = teacher_probability(zt, row), x = log_ratio(zs, zt, row);
    sums.student = sums.student + es;
    sums.teacher = sums.teacher + et;
    if constexpr (forward) {
      sums.log_ratio = select(equal(et, zero), sums.log_ratio, fma(et, x, sums.log_ratio));
    } else {
      const auto infinite = not_at_most(abs(x), most);
      sums.log_ratio = select(infinite, sums.log_ratio, fma(es, x, sums.log_ratio));
      if (any(infinite)) [[unlikely]]
        excluded = excluded + select(infinite, es, zero);
    }
    first = es;
    second = forward ? et : x;
  };
  const auto fold = [&]() __attribute__((always_inline)) {
    total = {total.student + (even.student + odd.student), total.teacher + (even.teacher + odd.teacher),
             total.log_ratio + (even.log_ratio + odd.log_ratio)};
    even = odd = {zero, zero, zero};
  };
  int64_t i = 0;
  while (i + kPair <= n) {
    const int64_t end = n - i < kFold ? n : i + kFold;
    for (; i + kPair <= end; i += kPair) {
      if constexpr (keeps) {
        for (int64_t byte = 0; byte < kPair * static_cast<int64_t>(sizeof(T)); byte += 64) {
          prefetch(reinterpret_cast<const char*>(next_student + i) + byte);
          prefetch(reinterpret_cast<const char*>(next_teacher + i) + byte);
        }
      }
      const VecPair zs = load_pair(student + i), zt = load_pair(teacher + i);
      VecPair first, second;
      add(zs.a, zt.a, even, first.a, second.a);
      add(zs.b, zt.b, odd, first.b, second.b);
      if constexpr (keeps) {
        store_pair(kept + 2 * i, first);
        store_pair(kept + 2 * i + kPair, second);
      }
    }
    fold();
  }
  for (; i < n; i += Vec::width) {
    const int64_t left = n - i < Vec::width ? n - i : Vec::width;
    Vec first, second;
    add(load_up_to(student + i, left, kNegInf), load_up_to(teacher + i, left, kNegInf), even, first, second);
    if constexpr (keeps) {
      store_up_to(kept + 2 * i, left, first);
      store_up_to(kept + 2 * i + left, left, second);
    }
  }
  fold();
  return {static_cast<double>(reduce_add(total.student)), static_cast<double>(reduce_add(total.teacher)),
          static_cast<double>(reduce_add(total.log_ratio)), static_cast<double>(reduce_add(excluded))};
}

// Pass 1. `row` has the scales, and is left with the shifts and the estimate of the last chunk. The estimate is made
// once, of the first kChunk words: the nearer it comes, the less Σ w x cancels against what it lacks.
template <Divergence divergence, class T>
PairSums pair_sums(const T* student, const T* teacher, int64_t vocab, int64_t head, RowPair& row,
                   double student_inverse, double teacher_inverse, Search search, const Kept& kept,
                   const T* next_student, const T* next_teacher) {
  PairSums sums{{first_shift(widen(student[0])), 0.0},
                {first_shift(widen(teacher[0])), 0.0},
                0.0,
                0.0,
                0.0f,
                search != Search::nothing};
  if (sums.student.shift != kLowest && sums.teacher.shift != kLowest)
    sums.estimate = static_cast<float>(sums.teacher.shift * teacher_inverse - sums.student.shift * student_inverse);
  row.student_log2_sum = row.teacher_log2_sum = 0.0f;
  const RowSum& weights = divergence == Divergence::forward_kl ? sums.teacher : sums.student;
  each_chunk(vocab, head, [&](int64_t begin, int64_t n, int64_t number) {
    if (divergence == Divergence::forward_kl && !sums.looks_apart) {
      add_chunk(sums.student, student + begin, n, row.student_scale);
      add_chunk(sums.teacher, teacher + begin, n, row.teacher_scale);
      return;
    }
    row.log_ratio_offset = sums.estimate;
    const bool keeps = kSearched<T> && search == Search::gradient && sums.looks_apart;
    const auto sum_chunk = [&] {
      row.student_shift = sums.student.shift;
      row.teacher_shift = sums.teacher.shift;
      if constexpr (kSearched<T>) {
        if (keeps)
          return pair_chunk<divergence, true>(student + begin, teacher + begin, kept.words + 2 * begin, n, row,
                                              next_student + begin, next_teacher + begin);
      }
      return pair_chunk<divergence, false>(student + begin, teacher + begin, nullptr, n, row, next_student + begin,
                                           next_teacher + begin);
    };
    ChunkSums chunk = sum_chunk();
    if (!(chunk.student <= kMuch) || !(chunk.teacher <= kMuch)) {
      const double before = weights.sum;
      raise_shift(sums.student, student + begin, n, row.student_scale);
      raise_shift(sums.teacher, teacher + begin, n, row.teacher_scale);
      const double shrink = before == 0.0 ? 0.0 : weights.sum / before;
      sums.excluded *= shrink;
      sums.log_ratio *= shrink;
      chunk = sum_chunk();
    }
    if (keeps) {
      float* const ground = kept.grounds + kGroundFloats * number;
      ground[0] = row.student_shift;
      ground[1] = row.teacher_shift;
      ground[2] = row.log_ratio_offset;
    }
    sums.student.sum += chunk.student;
    sums.teacher.sum += chunk.teacher;
    sums.log_ratio += chunk.log_ratio;
    sums.excluded += chunk.excluded;
    if (begin != head) return;
    const LogSums logs = log_sums(sums, student_inverse, teacher_inverse);
    const float estimate = static_cast<float>(logs.teacher - logs.student);
    sums.looks_apart = sums.looks_apart && !(kl_of(divergence, sums, logs.teacher - logs.student) <= kNear);
    if (!(__builtin_fabsf(estimate) <= -kLowest)) return;
    sums.log_ratio += (static_cast<double>(estimate) - sums.estimate) * (weights.sum - sums.excluded);
    sums.estimate = estimate;
  });
  return sums;
}

// Pass 2: what was kept to grad. center: H.
template <Divergence divergence, class T>
void kept_pass(const Kept& kept, T* grad, int64_t vocab, int64_t head, const LogSums& logs, double student_inverse,
               double teacher_inverse, float scale, double center, bool streaming) {
  constexpr bool forward = divergence == Divergence::forward_kl;
  each_chunk(vocab, head, [&](int64_t begin, int64_t n, int64_t number) {
    const float* const ground = kept.grounds + kGroundFloats * number;
    const float student_shift = ground[0], teacher_shift = ground[1], estimate = ground[2];
    const double log_s = student_shift * student_inverse - logs.student;
    const double log_t = teacher_shift * teacher_inverse - logs.teacher;
    const Vec by_s = broadcast(static_cast<float>(scale * __builtin_exp(log_s)));
    const Vec by_t = broadcast(static_cast<float>(scale * __builtin_exp(log_t)));
    // Of reverse_kl: what x lacks, less H; and for words that the teacher excludes −1 − H.
    const Vec offset = broadcast(static_cast<float>((logs.teacher - logs.student) - estimate - center));
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
