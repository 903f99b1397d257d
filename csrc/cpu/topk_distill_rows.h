// The row algorithm of topk_distill, written once over Vec and compiled by each ISA file; see topk_distill.h for what
// is computed. Everything is in an unnamed namespace.
//
//      ids, entries ──► drop, sort by id, merge ──► K words in the order of the row
//                                                     │  their logits ──► Σ e^…  inside, in double
//                                                     ▼
//      row   |········|··x·····|········|········|x·····x·|····     x: words of the teacher; chunks of 1024 words
//      pass 1    as is    copy     as is    as is    copy           the copy has −inf at x ──► Σ 2^… outside
//      pass 2   stream    merge   stream   stream    merge          the gradient outside goes straight to memory;
//                                                                   where x is, through a chunk in L1 that takes the
//                                                                   K values before it is streamed out whole
#pragma once

#include "softmax_rows.h"
#include "topk_distill.h"

namespace pyfast {
namespace {

struct EntryTerm {
  double value;  // t (e^x - 1 - x)
  double gap;    // s - t
};

// x = log s - log t. Near 0 by the series of e^x - 1 - x, whose terms are all there is: nothing cancels.
inline EntryTerm entry_term(double t, double s, double x) {
  if (!(__builtin_fabs(x) < 0.5)) return {s - t - t * x, s - t};  // also NaN, and +inf where s is 0
  constexpr double coefficients[] = {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                                     1.0 / 120,     1.0 / 24,     1.0 / 6,     1.0 / 2};
  double p = 0.0;
  for (const double c : coefficients) p = p * x + c;
  const double q = p * x * x;
  return {t * q, t * (x + q)};
}

// Stable, least significant byte first, between the two halves of the scratch. Returns the half that holds the result.
inline TopkEntry* sort_by_id(TopkEntry* from, TopkEntry* to, int64_t n, int64_t vocab) {
  for (int shift = 0; shift < 63 && (vocab - 1) >> shift != 0; shift += 8) {
    int64_t start[257] = {};
    for (int64_t i = 0; i < n; ++i) ++start[((from[i].id >> shift) & 255) + 1];
    for (int b = 0; b < 256; ++b) start[b + 1] += start[b];
    for (int64_t i = 0; i < n; ++i) to[start[(from[i].id >> shift) & 255]++] = from[i];
    TopkEntry* const sorted = to;
    to = from;
    from = sorted;
  }
  return from;
}

// The words of the teacher in one row, in the order of their ids, each once.
struct TeacherRow {
  TopkEntry* begin = nullptr;
  TopkEntry* end = nullptr;
  double mass = 0.0;  // Σ t, before any division
  bool valid = true;  // every id names a word
};

inline TeacherRow read_teacher(const TopkDistillArgs& a, int64_t row, TopkEntry* scratch) {
  const int64_t* ids = a.ids + row * a.ids_stride;
  const double* entries = a.entries + row * a.entries_stride;
  const bool sampled = a.tail == TopkTail::sampled;
  double mass = 0.0;
  int64_t n = 0;
  for (int64_t k = 0; k < a.k; ++k) {
    const double t = sampled ? entries[k] : __builtin_exp(entries[k]);
    if (t == 0.0) continue;
    if (ids[k] < 0 || ids[k] >= a.vocab) return {nullptr, nullptr, mass, false};
    scratch[n++] = {ids[k], t, sampled ? __builtin_log(t) : entries[k], 0.0, 0.0, 0.0};
    mass += t;
  }
  TopkEntry* const begin = sort_by_id(scratch, scratch + a.k, n, a.vocab);
  TopkEntry* last = begin;
  for (const TopkEntry* e = begin; e != begin + n; ++e) {
    if (e != begin && e->id == last[-1].id) {
      last[-1].t += e->t;
      last[-1].log_t = __builtin_log(last[-1].t);
    } else {
      *last++ = *e;
    }
  }
  if (sampled || a.tail == TopkTail::renormalise) {
    const double log_mass = __builtin_log(mass);
    for (TopkEntry* e = begin; e != last; ++e) {
      e->t /= mass;
      e->log_t -= log_mass;
    }
  }
  return {begin, last, mass, true};
}

// Σ e^(logit - shift); -inf and 0 where there is nothing but logits of -inf.
struct ShiftedSum {
  double shift, sum;
};

// Over the words of the teacher; leaves e^(logit - shift) in their s.
template <class T>
ShiftedSum inside_sum(const T* z, const TeacherRow& teacher, double inverse) {
  double top = -__builtin_inf(), sum = 0.0;
  for (TopkEntry* e = teacher.begin; e != teacher.end; ++e) {
    e->logit = widen(z[e->id]) * inverse;
    if (e->logit > top) top = e->logit;
  }
  const double shift = top == -__builtin_inf() ? 0.0 : top;
  for (TopkEntry* e = teacher.begin; e != teacher.end; ++e) sum += e->s = __builtin_exp(e->logit - shift);
  return {top, sum};
}

// Σ 2^((z - shift) * scale) over the words that the teacher does not name, of which there is at least one.
template <class T>
RowSum outside_sum(const T* z, int64_t vocab, const TeacherRow& teacher, float scale) {
  alignas(64) float rest[kChunk];
  const TopkEntry* e = teacher.begin;
  int64_t first = 0;
  for (; e != teacher.end && e->id == first; ++e) ++first;
  RowSum r = no_sum(widen(z[first]), scale);
  e = teacher.begin;
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    const int64_t n = vocab - begin < kChunk ? vocab - begin : kChunk;
    if (e == teacher.end || e->id >= begin + n) {
      add_chunk(r, z + begin, n, scale);
      continue;
    }
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) store(rest + i, load(z + begin + i));
    if (i < n) store_partial(rest + i, n - i, load_partial(z + begin + i, n - i, kNegInf));
    for (; e != teacher.end && e->id < begin + n; ++e) rest[e->id - begin] = kNegInf;
    add_chunk<false>(r, rest, n, scale);
  }
  return r;
}

struct RowResult {
  double value;
  double outside;  // what u_v is multiplied by in the gradient, u the softmax over the words outside
};

// Value, and the gradient to the words of the teacher (in their grad), both before row_scale / T.
inline RowResult row_terms(const TeacherRow& teacher, TopkTail tail, ShiftedSum in, ShiftedSum out, bool covered) {
  const double top = in.shift > out.shift ? in.shift : out.shift;
  const double share = __builtin_exp(in.shift - top), share_out = __builtin_exp(out.shift - top);
  const double sum = in.sum * share + out.sum * share_out, log_sum = __builtin_log(sum);
  double value = 0.0, gaps = 0.0;
  for (TopkEntry* e = teacher.begin; e != teacher.end; ++e) {
    e->s *= share / sum;
    const EntryTerm term = entry_term(e->t, e->s, (e->logit - top) - log_sum - e->log_t);
    value += term.value;
    gaps += term.gap;
    e->grad = term.gap;
  }
  if (tail == TopkTail::renormalise) return {value, 0.0};
  const double s_rest = out.sum * share_out / sum;
  if (tail == TopkTail::ignore) {
    for (TopkEntry* e = teacher.begin; e != teacher.end; ++e) e->grad -= gaps * e->s;
    return {value, -gaps * s_rest};
  }
  const bool open = tail == TopkTail::bucket && !covered && !(teacher.mass >= 1.0);
  if (!open) return {value + s_rest, s_rest};
  const double t_rest = 1.0 - teacher.mass;
  const double log_s_rest = (out.shift - top) + __builtin_log(out.sum) - log_sum;
  const EntryTerm rest = entry_term(t_rest, s_rest, log_s_rest - __builtin_log(t_rest));
  return {value + rest.value, rest.gap};
}

// Two vectors of the gradient, past the cache or through it.
template <class T>
void write_pair(T* to, VecPair v, bool streaming) {
  if (streaming)
    stream_pair(to, v);
  else
    store_pair(to, v);
}

// A chunk of the gradient from L1 to memory.
template <class T>
void write_out(const T* from, T* to, int64_t n, bool streaming) {
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) write_pair(to + i, load_pair(from + i), streaming);
  for (; i < n; ++i) to[i] = from[i];
}

// One row of the gradient: outside.pair(i) is that of kPair words from word i, outside(i, n) of n <= Vec::width words;
// the words of the teacher have their own. Chunks after the first begin where streaming stores may.
template <class T, class Outside>
void write_grad(T* grad, int64_t vocab, const TeacherRow& teacher, double scale, bool streaming,
                const Outside& outside) {
  alignas(64) T merged[kChunk];
  constexpr uintptr_t align = Vec::width * sizeof(float);
  const uintptr_t past = reinterpret_cast<uintptr_t>(grad) % align;
  int64_t end = streaming && past != 0 ? static_cast<int64_t>((align - past) / sizeof(T)) : kChunk;
  const TopkEntry* e = teacher.begin;
  for (int64_t begin = 0; begin < vocab; begin = end, end += kChunk) {
    if (end > vocab) end = vocab;
    const int64_t n = end - begin;
    const bool mixed = e != teacher.end && e->id < end;
    const bool aligned = streaming && (begin > 0 || past == 0);
    T* const out = mixed ? merged : grad + begin;
    int64_t i = outside.write_near(out, begin, n, aligned && !mixed);
    for (; i + kPair <= n; i += kPair) write_pair(out + i, outside.pair(begin + i), aligned && !mixed);
    for (; i < n; i += Vec::width) {
      const int64_t left = n - i < Vec::width ? n - i : Vec::width;
      store_up_to(out + i, left, outside(begin + i, left));
    }
    if (!mixed) continue;
    for (; e != teacher.end && e->id < end; ++e) narrow(static_cast<float>(e->grad * scale), merged + (e->id - begin));
    write_out(merged, grad + begin, n, aligned);
  }
}

// Every word alike.
template <class T>
struct Constant {
  Vec value;
  int64_t write_near(T*, int64_t, int64_t, bool) const { return 0; }
  VecPair pair(int64_t) const { return {value, value}; }
  Vec operator()(int64_t, int64_t) const { return value; }
};

// u_v times a factor, u the softmax over the words outside. Reads ahead in the row that the thread takes next: this
// pass computes while memory would rest, and that row's first reads are of the teacher's words, anywhere in it.
template <class T>
struct Softmax {
  const T* z;
  const T* next;
  Vec shift, scale, factor;
  Ranged near;
  Vec of(Vec logits) const { return exp2((logits - shift) * scale) * factor; }
  VecPair logits(int64_t i) const {
    for (int64_t byte = 0; byte < kPair * static_cast<int64_t>(sizeof(T)); byte += 64)
      prefetch(reinterpret_cast<const char*>(next + i) + byte);
    return load_pair(z + i);
  }
  VecPair pair(int64_t i) const {
    const VecPair p = logits(i);
    return {of(p.a), of(p.b)};
  }
  Vec operator()(int64_t i, int64_t n) const { return of(load_up_to(z + i, n, kNegInf)); }

  // As many of n words from word i as are two pairs, if all of those lie near the shift; how many it has written.
  int64_t write_near(T* out, int64_t i, int64_t n, bool streaming) const {
    if (!near.usable) return 0;
    const Ranged of[1] = {near};
    const Vec by = factor * broadcast(static_cast<float>(near.unit));
    const int64_t whole = n / (2 * kPair) * (2 * kPair);
    const Powers powers;
    Outside outside;
    for (int64_t j = 0; j < whole; j += 2 * kPair) {
      const VecPair p = logits(i + j), q = logits(i + j + kPair);
      Vec e[4] = {p.a, p.b, q.a, q.b};
      ranged_exp2(e, of, powers, outside);
      write_pair(out + j, {e[0] * by, e[1] * by}, streaming);
      write_pair(out + j + kPair, {e[2] * by, e[3] * by}, streaming);
    }
    return outside.any() ? 0 : whole;
  }
};

template <class T>
void topk_distill(const TopkDistillArgs& a, int64_t begin, int64_t end, TopkEntry* scratch) {
  const double inverse = 1.0 / a.temperature;
  const float scale = static_cast<float>(inverse / kLn2Double);
  for (int64_t i = begin; i < end; ++i) {
    T* grad = a.grad == nullptr ? nullptr : static_cast<T*>(a.grad) + i * a.grad_stride;
    const float weight = a.row_scale[i];
    const TeacherRow teacher = weight == 0.0f ? TeacherRow{} : read_teacher(a, i, scratch);
    if (teacher.valid && teacher.begin == teacher.end) {  // also where weight is 0
      a.rows[i] = 0.0f;
      if (grad != nullptr) zero_row(grad, a.vocab);
      continue;
    }
    const T* student = static_cast<const T*>(a.student) + i * a.student_stride;
    if (!teacher.valid) {
      a.rows[i] = __builtin_nanf("");
      if (grad != nullptr)
        write_grad(grad, a.vocab, teacher, 0.0, a.stream_grad, Constant<T>{broadcast(__builtin_nanf(""))});
      continue;
    }
    const ShiftedSum in = inside_sum(student, teacher, inverse);
    const bool covered = teacher.end - teacher.begin == a.vocab;
    const bool partial = a.tail == TopkTail::renormalise;
    RowSum out{kNegInf, 0.0, {}};
    if (!covered && !partial) out = outside_sum(student, a.vocab, teacher, scale);
    const RowResult result = row_terms(teacher, a.tail, in, {out.shift * inverse, out.sum}, covered);
    a.rows[i] = weight * static_cast<float>(result.value);
    if (grad == nullptr) continue;
    const double grad_scale = weight * inverse;
    if (partial) {
      write_grad(grad, a.vocab, teacher, grad_scale, a.stream_grad, Constant<T>{broadcast(0.0f)});
      continue;
    }
    // Where all words outside are -inf they have no softmax and take no gradient.
    const double factor = out.sum == 0.0 ? 0.0 : result.outside / out.sum * grad_scale;
    const Softmax<T> outside{student,
                             i + 1 < end ? student + a.student_stride : student,
                             broadcast(out.shift),
                             broadcast(scale),
                             broadcast(static_cast<float>(factor)),
                             out.near};
    write_grad(grad, a.vocab, teacher, grad_scale, a.stream_grad, outside);
  }
  if (a.stream_grad) stream_fence();
}

}  // namespace
}  // namespace pyfast
