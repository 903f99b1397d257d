// Where distill_kl keeps the words of a row pair between the passes over it.
//
//   Resident   in the shared memory of the blocks of a cluster: one reading of device memory. Block r of C holds its
//              part of the vectors; what lies in slot k of a thread was copied there by that thread, and nobody else
//              reads it, so that waiting for its own copies (cp.async) is all the synchronisation that words need:
//
//                block 0                  block 1                          thread 0, 1, 2, …, T-1 | 0, 1, 2, …
//                [student ░░░░░░░░░░]     [student ░░░░░░░░░░]     …       └─── k = 0 ────────┘ └─ k = 1
//                [teacher ░░░░░░░░░░]     [teacher ░░░░░░░░░░]
//
//              The last pass over a row frees slot after slot, and asks for the next row of the cluster in each: while
//              one row's gradient is computed and written, the next row arrives.
//   Streamed   nowhere: each pass reads device memory (L2 for what is still there, so passes change direction), through
//              a ring of kStages slots a thread.
//
// A vector is 16 bytes; vectors are counted from the multiple of 16 bytes at or before the first word of the student's
// row. The first and last one may reach beyond the row, and rows whose teacher or gradient lies otherwise are copied
// word by word: right for any stride and width, fast where the three agree, as they do for contiguous tensors.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "distill_kl_plan.h"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

template <class T>
inline constexpr int kVectorWords = 16 / static_cast<int>(sizeof(T));

// A vector that begins at `word` lies in a row of that many words if, as an unsigned number, word < inside_span.
template <class T>
PYFAST_DEVICE uint32_t inside_span(int words) {
  return words < kVectorWords<T> ? 0u : static_cast<uint32_t>(words - kVectorWords<T> + 1);
}

// A row pair in memory; no vectors: nothing of it is to be read.
template <class T>
struct RowInMemory {
  const T* student;
  const T* teacher;
  int vectors;
  int lead;  // words of the first vector before the row
  bool teacher_alike;

  PYFAST_DEVICE int first_word(int vector) const { return vector * kVectorWords<T> - lead; }
};

template <class T>
PYFAST_DEVICE int words_past_multiple(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

template <class T>
PYFAST_DEVICE RowInMemory<T> row_in_memory(const T* student, const T* teacher, int words) {
  const int lead = words_past_multiple(student);
  const int vectors = (lead + words + kVectorWords<T> - 1) / kVectorWords<T>;
  return {student, teacher, vectors, lead, words_past_multiple(teacher) == lead};
}

// The bits of a word, which may be in shared memory, and of a logit of -inf.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

template <class T>
inline constexpr Bits<T> kExcluded = sizeof(T) == 4   ? 0xff800000u
                                     : kIsBFloat16<T> ? 0xff80u
                                                      : 0xfc00u;

// A vector word by word into a slot of this thread, -inf where it is not in the row.
template <class T>
PYFAST_DEVICE void fetch_words(Words4* slot, const T* row, int word, int words) {
  Bits<T>* const to = reinterpret_cast<Bits<T>*>(slot);
  PYFAST_UNROLL_NOT
  for (int i = 0; i < kVectorWords<T>; ++i)
    to[i] = word + i >= 0 && word + i < words ? __builtin_bit_cast(Bits<T>, row[word + i]) : kExcluded<T>;
}

// A vector word by word from a slot of this thread, without those that are not in the row.
template <class T>
PYFAST_DEVICE void write_words(T* row, const Words4* slot, int word, int words) {
  const Bits<T>* const from = reinterpret_cast<const Bits<T>*>(slot);
  PYFAST_UNROLL_NOT
  for (int i = 0; i < kVectorWords<T>; ++i)
    if (word + i >= 0 && word + i < words) row[word + i] = __builtin_bit_cast(T, from[i]);
}

// The same word over a vector of a row in memory, word by word.
template <class T>
PYFAST_DEVICE void fill_words(T* row, int word, int words, T value) {
  PYFAST_UNROLL_NOT
  for (int i = 0; i < kVectorWords<T>; ++i)
    if (word + i >= 0 && word + i < words) row[word + i] = value;
}

// The vector of a gradient whose first word is `word`, as a whole below `span`; `grad` may be null. slot: one of this
// thread that holds nothing that is needed any more.
template <class T>
PYFAST_DEVICE void write_vector(T* grad, int word, int words, uint32_t span, const Words4& bits, Words4* slot) {
  if (static_cast<uint32_t>(word) < span) {
    ptx::st_streaming(reinterpret_cast<Words4*>(grad + word), bits);
  } else if (grad != nullptr) {
    *slot = bits;
    write_words(grad, slot, word, words);
  }
}

// Slots of this block for rows of so many words: `capacity` for the student, as many for the teacher behind them.
template <class T>
struct Slots {
  Words4* student;
  int capacity, words;

  PYFAST_DEVICE Slots(unsigned char* shared, int slots, int row_words)
      : student(reinterpret_cast<Words4*>(shared)), capacity(slots), words(row_words) {}

  // That of the words whose vectors can be copied as a whole.
  PYFAST_DEVICE uint32_t span(const RowInMemory<T>& row) const {
    return row.teacher_alike ? inside_span<T>(words) : 0u;
  }

  // Begins to copy a vector of the row pair into a slot of this thread. What is not in the row becomes -inf.
  PYFAST_DEVICE void fetch(Words4* slot, const RowInMemory<T>& row, int word) const {
    if (static_cast<uint32_t>(word) < span(row))
      fetch_whole(slot, row, word);
    else
      fetch_by_words(slot, row, word);
  }
  PYFAST_DEVICE void fetch_whole(Words4* slot, const RowInMemory<T>& row, int word) const {
    ptx::cp_async<16>(slot, row.student + word);
    ptx::cp_async<16>(slot + capacity, row.teacher + word);
  }
  PYFAST_DEVICE void fetch_by_words(Words4* slot, const RowInMemory<T>& row, int word) const {
    fetch_words(slot, row.student, word, words);
    fetch_words(slot + capacity, row.teacher, word, words);
  }
};

template <class T>
class Resident {
 public:
  // share: vectors that a block holds; block `rank` has those from rank · share on. batch: slots that are waited for
  // together.
  PYFAST_DEVICE Resident(unsigned char* shared, int words, int share, int batch, int rank)
      : slots_(shared, share, words), first_(rank * share), batch_(batch) {}

  // Asks for the row, into slots that are free.
  PYFAST_DEVICE void begin(const RowInMemory<T>& row) const {
    const int count = held(row);
    PYFAST_UNROLL_NOT
    for (int batch = 0; batch < kBatches; ++batch) {
      fetch_from(batch, 0, count, row);
      ptx::cp_async_commit();
    }
  }

  // The first pass over a row, as it arrives: visit(student, teacher) with arrays of kMost vectors, 1 or 2, or one.
  template <int kMost, class Visit>
  PYFAST_DEVICE void first(const RowInMemory<T>& row, const Visit& visit) const {
    const int count = held(row);
    static_assert(kBatches == 2);
    PYFAST_UNROLL_NOT
    for (int batch = 0; batch < kBatches; ++batch) {
      if (batch == 0)
        ptx::cp_async_wait<1>();
      else
        ptx::cp_async_wait<0>();
      const Words4* const past = slots_.student + batch_end(batch, count);
      const Words4* slot = slots_.student + batch_begin(batch);
      PYFAST_UNROLL_NOT
      for (; slot + (kMost - 1) * step() < past; slot += kMost * step()) visit_at<kMost>(slot, visit);
      if (kMost > 1 && slot < past) visit_at<1>(slot, visit);
    }
  }

  // A pass between: visit(student, teacher) with a vector of each.
  template <class Visit>
  PYFAST_DEVICE void again(const RowInMemory<T>& row, const Visit& visit) const {
    const Words4* const past = slots_.student + held(row);
    PYFAST_UNROLL_NOT
    for (const Words4* slot = slots_.student + threadIdx.x; slot < past; slot += step())
      visit(*slot, slot[slots_.capacity]);
  }

  // The last pass over a row, which makes room for the next one and asks for it: visit(word, student, teacher, slot)
  // with the first word of the vector and a slot that may be written into.
  template <class Visit>
  PYFAST_DEVICE void last(const RowInMemory<T>& row, const RowInMemory<T>& next, const Visit& visit) const {
    const int count = held(row), count_next = held(next);
    const int shift = row.lead - next.lead;
    const uint32_t span = next.vectors == 0 ? 0u : slots_.span(next);
    const Words4* const end_next = slots_.student + count_next;
    PYFAST_UNROLL_NOT
    for (int batch = 0; batch < kBatches; ++batch) {
      const int begin = batch_begin(batch);
      int word = row.first_word(first_ + begin);
      Words4* slot = slots_.student + begin;
      const Words4* const end = slots_.student + batch_end(batch, count);
      PYFAST_UNROLL_NOT
      for (; slot < end; slot += step(), word += step() * kVectorWords<T>) {
        visit(word, *slot, slot[slots_.capacity], slot);
        if (static_cast<uint32_t>(word + shift) < span)
          slots_.fetch_whole(slot, next, word + shift);
        else if (slot < end_next)
          slots_.fetch_by_words(slot, next, word + shift);
      }
      if (count_next > count) fetch_from(batch, count, count_next, next);
      ptx::cp_async_commit();
    }
  }

 private:
  PYFAST_DEVICE static int step() { return static_cast<int>(blockDim.x); }
  PYFAST_DEVICE int batch_begin(int batch) const { return batch * batch_ + static_cast<int>(threadIdx.x); }
  PYFAST_DEVICE int batch_end(int batch, int count) const {
    const int end = (batch + 1) * batch_;
    return end < count ? end : count;
  }
  PYFAST_DEVICE int held(const RowInMemory<T>& row) const {
    const int left = row.vectors - first_;
    return left < 0 ? 0 : left < slots_.capacity ? left : slots_.capacity;
  }
  template <int kVectors, class Visit>
  PYFAST_DEVICE void visit_at(const Words4* slot, const Visit& visit) const {
    Words4 student[kVectors], teacher[kVectors];
    PYFAST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      student[v] = slot[v * step()];
      teacher[v] = slot[v * step() + slots_.capacity];
    }
    visit(student, teacher);
  }

  // Those of a batch from slot `begin` on.
  PYFAST_DEVICE void fetch_from(int batch, int begin, int count, const RowInMemory<T>& row) const {
    PYFAST_UNROLL_NOT
    for (int k = batch_begin(batch); k < batch_end(batch, count); k += step())
      if (k >= begin) slots_.fetch(slots_.student + k, row, row.first_word(first_ + k));
  }

  Slots<T> slots_;
  int first_, batch_;
};

template <class T>
class Streamed {
 public:
  PYFAST_DEVICE Streamed(unsigned char* shared, int words)
      : slots_(shared, kStages * static_cast<int>(blockDim.x), words) {}

  PYFAST_DEVICE void begin(const RowInMemory<T>&) {}

  template <int kMost, class Visit>
  PYFAST_DEVICE void first(const RowInMemory<T>& row, const Visit& visit) {
    backwards_ = true;
    again(row, [&](const Words4& student, const Words4& teacher) {
      const Words4 students[1] = {student}, teachers[1] = {teacher};
      visit(students, teachers);
    });
  }

  template <class Visit>
  PYFAST_DEVICE void again(const RowInMemory<T>& row, const Visit& visit) {
    read(row, [&](int, const Words4& student, const Words4& teacher, Words4*) { visit(student, teacher); });
  }

  template <class Visit>
  PYFAST_DEVICE void last(const RowInMemory<T>& row, const RowInMemory<T>&, const Visit& visit) {
    read(row, visit);
  }

 private:
  template <class Visit>
  PYFAST_DEVICE void read(const RowInMemory<T>& row, const Visit& visit) {
    backwards_ = !backwards_;
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int own = (row.vectors - thread + threads - 1) / threads;
    PYFAST_UNROLL_NOT
    for (int k = 0; k < kStages - 1; ++k) fetch(row, k, own);
    PYFAST_UNROLL_NOT
    for (int k = 0; k < own; ++k) {
      ptx::cp_async_wait<kStages - 2>();
      Words4* const slot = slots_.student + (k % kStages * threads + thread);
      const Words4 student = *slot, teacher = slot[slots_.capacity];
      fetch(row, k + kStages - 1, own);
      visit(row.first_word(vector(k, own)), student, teacher, slot);
    }
  }

  PYFAST_DEVICE int vector(int k, int own) const {
    return (backwards_ ? own - 1 - k : k) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  PYFAST_DEVICE void fetch(const RowInMemory<T>& row, int k, int own) const {
    const int slot = k % kStages * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (k < own) slots_.fetch(slots_.student + slot, row, row.first_word(vector(k, own)));
    ptx::cp_async_commit();
  }

  Slots<T> slots_;
  bool backwards_ = false;
};

#endif

}  // namespace pyfast::cuda
