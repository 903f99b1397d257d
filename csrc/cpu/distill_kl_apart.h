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
constexpr double kNear = 0.025;

constexpr bool is_kl(Divergence divergence) {
  return divergence == Divergence::forward_kl || divergence == Divergence::reverse_kl;
}

// Whether rows of these logits are asked at all.
template <class T>
constexpr bool kSearched = sizeof(T) == 2;

// What is wanted of a row that lies apart: nothing that others do not give too, its value, or the value and what the
// gradient is made of.
enum class Search { nothing, value, gradient };

// Both log-sum-exps, and Σ w x with an estimate in x: x = (student − share · teacher + offset) / student_temperature,
// which is off by what the offset is. Words that the teacher excludes are no part of it; reverse_kl has Σ es of those.
// forward_kl has it where the row looks apart only.
struct PairSums {
  RowSum student, teacher;
  double log_ratio, excluded;
  float offset;
  bool looks_apart;  // by its first chunk
};

// Of a chunk. log_ratio: of x · student_temperature.
struct ChunkSums {
  double student, teacher, log_ratio, excluded;
};

// What belongs to the kept words of a chunk: powers are of the shifts, times 1 / unit.
struct Ground {
  float student_shift, teacher_shift, student_unit, teacher_unit, offset;
};
static_assert(sizeof(Ground) == kGroundFloats * sizeof(float));

// What pass 1 leaves for pass 2. Of the words of a chunk, pairs lie as [es a, es b, other a, b], single vectors of n
// words as [es, other]; a chunk's words begin at 2 · begin. The other is et for forward_kl, else x ·
// student_temperature.
struct Kept {
  float* words;
  Ground* grounds;  // of each chunk
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
inline double kl_of(Divergence divergence, const PairSums& sums, double log_ratio, double student_inverse) {
  const double lacking = log_ratio - sums.offset * student_inverse;
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

// Bytes ahead in their own row that pass 1 asks for: into L1, for it computes too long between two loads for the
// processor to see far ahead by itself.
constexpr int64_t kAhead = 2048;

// Both give the powers of two of a row pair in place of its logits, the student's and the teacher's in turn. AnyPowers
// of any logits; NearPowers of those near their shifts, none of which is infinite, and `outside` tells if one was not.
struct AnyPowers {
  static constexpr bool finite = false;
  RowPair row;
  template <int count>
  PYFAST_INLINE void operator()(Vec (&z)[count]) {
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) z[j] = j % 2 == 0 ? student_probability(z[j], row) : teacher_probability(z[j], row);
  }
};

struct NearPowers {
  static constexpr bool finite = true;
  Ranged of[2];
  Powers powers;
  Outside outside;
  template <int count>
  PYFAST_INLINE void operator()(Vec (&z)[count]) {
    ranged_exp2(z, of, powers, outside);
  }
};

// One chunk by AnyPowers, or by NearPowers where n is a multiple of kPair.
template <Divergence divergence, bool keeps, class T, class PairPowers>
ChunkSums pair_chunk(const T* student, const T* teacher, float* kept, int64_t n, float teacher_share, float offset,
                     PairPowers& pair_powers) {
  constexpr bool forward = divergence == Divergence::forward_kl;
  PairPowers powers = pair_powers;  // a copy that no store can change: its scalars stay in registers
  const Vec zero = broadcast(0.0f), most = broadcast(-kLowest), share = broadcast(teacher_share);
  struct Sums {
    Vec student, teacher, log_ratio;
  };
  struct Totals {
    Total student, teacher, log_ratio;
  };
  Totals total{};
  Sums sums[2] = {{zero, zero, zero}, {zero, zero, zero}};
  Total excluded{};
  // zs, zt: `count` vectors of logits, which become es and what is kept beside them.
  const auto add = [&]<int count>(Vec(&zs)[count], Vec(&zt)[count]) __attribute__((always_inline)) {
    Vec e[2 * count], x[count];
    for (int j = 0; j < count; ++j) {
      e[2 * j] = zs[j];
      e[2 * j + 1] = zt[j];
      x[j] = fnma(zt[j], share, zs[j]) + broadcast(offset);
    }
    powers(e);
    for (int j = 0; j < count; ++j) {
      const Vec es = e[2 * j], et = e[2 * j + 1], weight = forward ? et : es;
      sums[j].student = sums[j].student + es;
      sums[j].teacher = sums[j].teacher + et;
      const Vec more = fma(weight, x[j], sums[j].log_ratio);
      if constexpr (PairPowers::finite) {
        sums[j].log_ratio = more;
      } else if constexpr (forward) {
        sums[j].log_ratio = select(equal(et, zero), sums[j].log_ratio, more);
      } else {
        const auto infinite = not_at_most(abs(x[j]), most);
        sums[j].log_ratio = select(infinite, sums[j].log_ratio, more);
        if (any(infinite)) [[unlikely]]
          excluded = excluded + select(infinite, es, zero);
      }
      zs[j] = es;
      zt[j] = forward ? et : x[j];
    }
  };
  const auto fold = [&]() __attribute__((always_inline)) {
    total = {total.student + (sums[0].student + sums[1].student), total.teacher + (sums[0].teacher + sums[1].teacher),
             total.log_ratio + (sums[0].log_ratio + sums[1].log_ratio)};
    sums[0] = sums[1] = {zero, zero, zero};
  };
  int64_t i = 0;
  while (i + kPair <= n) {
    const int64_t end = n - i < kFold ? n : i + kFold;
    for (; i + kPair <= end; i += kPair) {
      if constexpr (kSearched<T>) {
        for (int64_t byte = kAhead; byte < kAhead + kPair * static_cast<int64_t>(sizeof(T)); byte += 64) {
          prefetch_l1(reinterpret_cast<const char*>(student + i) + byte);
          prefetch_l1(reinterpret_cast<const char*>(teacher + i) + byte);
        }
      }
      const VecPair ps = load_pair(student + i), pt = load_pair(teacher + i);
      Vec zs[2] = {ps.a, ps.b}, zt[2] = {pt.a, pt.b};
      add(zs, zt);
      if constexpr (keeps) {
        store_pair(kept + 2 * i, {zs[0], zs[1]});
        store_pair(kept + 2 * i + kPair, {zt[0], zt[1]});
      }
    }
    fold();
  }
  if constexpr (!PairPowers::finite) {
    for (; i < n; i += Vec::width) {
      const int64_t left = n - i < Vec::width ? n - i : Vec::width;
      Vec zs[1] = {load_up_to(student + i, left, kNegInf)}, zt[1] = {load_up_to(teacher + i, left, kNegInf)};
      add(zs, zt);
      if constexpr (keeps) {
        store_up_to(kept + 2 * i, left, zs[0]);
        store_up_to(kept + 2 * i + left, left, zt[0]);
      }
    }
    fold();
  }
  pair_powers = powers;
  return {static_cast<double>(reduce_add(total.student)), static_cast<double>(reduce_add(total.teacher)),
          static_cast<double>(reduce_add(total.log_ratio)), static_cast<double>(reduce_add(excluded))};
}

// One chunk with the shifts and the offset that `sums` has. ground: what belongs to the words that are kept.
template <Divergence divergence, bool keeps, class T>
ChunkSums sum_chunk(PairSums& sums, const T* student, const T* teacher, float* kept, int64_t n, RowPair& row,
                    Ground& ground) {
  row.student_shift = sums.student.shift;
  row.teacher_shift = sums.teacher.shift;
  ground = {row.student_shift, row.teacher_shift, 1.0f, 1.0f, sums.offset};
  const Ranged &s = sums.student.near, &t = sums.teacher.near;
  if (s.usable && t.usable && n % kPair == 0) {
    NearPowers powers{{s, t}, {}, {}};
    const ChunkSums near =
        pair_chunk<divergence, keeps>(student, teacher, kept, n, row.teacher_share, sums.offset, powers);
    if (!powers.outside.any()) {
      ground.student_unit = static_cast<float>(s.unit);
      ground.teacher_unit = static_cast<float>(t.unit);
      const double unit = divergence == Divergence::forward_kl ? t.unit : s.unit;
      return {near.student * s.unit, near.teacher * t.unit, near.log_ratio * unit, 0.0};
    }
    sums.student.near.usable = false;  // the next chunk, too: words that are excluded are seldom alone
  }
  AnyPowers powers{row};
  return pair_chunk<divergence, keeps>(student, teacher, kept, n, row.teacher_share, sums.offset, powers);
}

// Pass 1. `row` has the scales, and is left with the shifts of the last chunk. The offset is chosen anew once, by the
// first kChunk words: the nearer it comes, the less Σ w x cancels against what it lacks.
template <Divergence divergence, class T>
PairSums pair_sums(const T* student, const T* teacher, int64_t vocab, int64_t head, RowPair& row,
                   double student_inverse, double teacher_inverse, Search search, const Kept& kept) {
  PairSums sums{no_sum(widen(student[0]), row.student_scale),
                no_sum(widen(teacher[0]), row.teacher_scale),
                0.0,
                0.0,
                0.0f,
                search != Search::nothing};
  if (sums.student.shift != kLowest && sums.teacher.shift != kLowest)
    sums.offset = static_cast<float>(sums.teacher.shift * teacher_inverse / student_inverse - sums.student.shift);
  row.student_log2_sum = row.teacher_log2_sum = 0.0f;
  const RowSum& weights = divergence == Divergence::forward_kl ? sums.teacher : sums.student;
  each_chunk(vocab, head, [&](int64_t begin, int64_t n, int64_t number) {
    if (divergence == Divergence::forward_kl && !sums.looks_apart) {
      add_chunk(sums.student, student + begin, n, row.student_scale);
      add_chunk(sums.teacher, teacher + begin, n, row.teacher_scale);
      return;
    }
    const bool keeps = kSearched<T> && search == Search::gradient && sums.looks_apart;
    const auto sum = [&] {
      if constexpr (kSearched<T>) {
        if (keeps)
          return sum_chunk<divergence, true>(sums, student + begin, teacher + begin, kept.words + 2 * begin, n, row,
                                             kept.grounds[number]);
      }
      Ground nowhere;
      return sum_chunk<divergence, false>(sums, student + begin, teacher + begin, nullptr, n, row, nowhere);
    };
    ChunkSums chunk = sum();
    if (!(chunk.student <= kMuch) || !(chunk.teacher <= kMuch)) {
      const double before = weights.sum;
      raise_shift(sums.student, student + begin, n, row.student_scale);
      raise_shift(sums.teacher, teacher + begin, n, row.teacher_scale);
      const double shrink = before == 0.0 ? 0.0 : weights.sum / before;
      sums.excluded *= shrink;
      sums.log_ratio *= shrink;
      chunk = sum();
    }
    sums.student.sum += chunk.student;
    sums.teacher.sum += chunk.teacher;
    sums.log_ratio += chunk.log_ratio * student_inverse;
    sums.excluded += chunk.excluded;
    if (begin != head) return;
    const LogSums logs = log_sums(sums, student_inverse, teacher_inverse);
    const double log_ratio = logs.teacher - logs.student;
    sums.looks_apart = sums.looks_apart && !(kl_of(divergence, sums, log_ratio, student_inverse) <= kNear);
    const float offset = static_cast<float>(log_ratio / student_inverse);
    if (!(__builtin_fabsf(offset) <= -kLowest)) return;
    sums.log_ratio += (static_cast<double>(offset) - sums.offset) * student_inverse * (weights.sum - sums.excluded);
    sums.offset = offset;
  });
  return sums;
}

// Pass 2: what was kept to grad. center: H.
template <Divergence divergence, class T>
void kept_pass(const Kept& kept, T* grad, int64_t vocab, int64_t head, const LogSums& logs, double student_inverse,
               double teacher_inverse, float scale, double center, bool streaming) {
  constexpr bool forward = divergence == Divergence::forward_kl;
  // Of reverse_kl, for words that the teacher excludes: −1 − H.
  const Vec none = broadcast(static_cast<float>(-1.0 - center)), most = broadcast(-kLowest);
  const Vec inverse = broadcast(static_cast<float>(student_inverse));
  const Ground* known = nullptr;
  float student_factor = 0.0f, teacher_factor = 0.0f;  // of the ground that is known
  each_chunk(vocab, head, [&](int64_t begin, int64_t n, int64_t number) {
    const Ground& ground = kept.grounds[number];
    if (known == nullptr || __builtin_memcmp(&ground, known, sizeof(Ground)) != 0) {
      known = &ground;
      const double log_s = ground.student_shift * student_inverse - logs.student;
      const double log_t = ground.teacher_shift * teacher_inverse - logs.teacher;
      student_factor = static_cast<float>(scale * __builtin_exp(log_s) * ground.student_unit);
      teacher_factor = static_cast<float>(scale * __builtin_exp(log_t) * ground.teacher_unit);
    }
    const Vec by_s = broadcast(student_factor), by_t = broadcast(teacher_factor);
    // Of reverse_kl: what x lacks, less H.
    const Vec lacking =
        broadcast(static_cast<float>((logs.teacher - logs.student) - ground.offset * student_inverse - center));
    const auto gradient = [&](Vec es, Vec other) __attribute__((always_inline)) {
      if constexpr (forward) return fnma(other, by_t, es * by_s);
      Vec h = fma(other, inverse, lacking);
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
