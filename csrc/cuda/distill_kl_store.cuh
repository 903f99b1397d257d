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

#include "common.cuh"
#include "distill_kl_plan.h"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

inline constexpr int kBatches = 4;  // commits a row, in Resident

template <class T>
inline constexpr int kVectorWords = 16 / static_cast<int>(sizeof(T));

// A row pair in memory; no vectors: nothing of it is to be read.
template <class T>
struct RowInMemory {
  const T* student;
  const T* teacher;
  int words, vectors;
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
  return {student, teacher, words, vectors, lead, words_past_multiple(teacher) == lead};
}

// Begins to copy the vector whose first word is `word` into a slot of this thread. What is not in the row becomes 0.
template <class T>
PYFAST_DEVICE void fetch_vector(Words4* slot, const T* row, int word, int words, bool aligned) {
  const int left = words - word;
  if (aligned && word >= 0) {
    ptx::cp_async<16>(slot, row + word, left < kVectorWords<T> ? left * static_cast<int>(sizeof(T)) : 16);
    return;
  }
  constexpr int kWordsOf32Bits = 4 / static_cast<int>(sizeof(T));
  uint32_t parts[4] = {};
  PYFAST_UNROLL
  for (int i = 0; i < kVectorWords<T>; ++i) {
    if (word + i < 0 || i >= left) continue;
    uint32_t bits;
    if constexpr (sizeof(T) == 4)
      bits = __builtin_bit_cast(uint32_t, row[word + i]);
    else
      bits = row[word + i].bits;
    parts[i / kWordsOf32Bits] |= bits << (i % kWordsOf32Bits * 16);
  }
  *slot = {parts[0], parts[1], parts[2], parts[3]};
}

// Slots of this block: `capacity` for the student, as many for the teacher.
struct Slots {
  Words4* student;
  Words4* teacher;

  PYFAST_DEVICE Slots(unsigned char* shared, int capacity)
      : student(reinterpret_cast<Words4*>(shared)), teacher(student + capacity) {}

  template <class T>
  PYFAST_DEVICE void fetch(int slot, const RowInMemory<T>& row, int vector) const {
    const int word = row.first_word(vector);
    fetch_vector(student + slot, row.student, word, row.words, true);
    fetch_vector(teacher + slot, row.teacher, word, row.words, row.teacher_alike);
  }
};

template <class T>
class Resident {
 public:
  // share: vectors that a block holds; block `rank` has those from rank · share on.
  PYFAST_DEVICE Resident(unsigned char* shared, int share, int rank) : slots_(shared, share), share_(share) {
    first_ = rank * share;
    const int threads = static_cast<int>(blockDim.x);
    batch_ = ((share + threads - 1) / threads + kBatches - 1) / kBatches * threads;
  }

  // Asks for the row, into slots that are free.
  PYFAST_DEVICE void begin(const RowInMemory<T>& row) const {
    const int count = held(row);
    for (int batch = 0; batch < kBatches; ++batch) {
      for (int k = batch_begin(batch); k < batch_end(batch, count); k += step()) slots_.fetch(k, row, first_ + k);
      ptx::cp_async_commit();
    }
  }

  // The first pass over a row: visit(vector, student, teacher), as they arrive.
  template <class Visit>
  PYFAST_DEVICE void first(const RowInMemory<T>& row, const Visit& visit) const {
    const int count = held(row);
    static_assert(kBatches == 4);
    for (int batch = 0; batch < kBatches; ++batch) {
      if (batch == 0)
        ptx::cp_async_wait<3>();
      else if (batch == 1)
        ptx::cp_async_wait<2>();
      else if (batch == 2)
        ptx::cp_async_wait<1>();
      else
        ptx::cp_async_wait<0>();
      for (int k = batch_begin(batch); k < batch_end(batch, count); k += step())
        visit(first_ + k, slots_.student[k], slots_.teacher[k]);
    }
  }

  template <class Visit>
  PYFAST_DEVICE void again(const RowInMemory<T>& row, const Visit& visit) const {
    const int count = held(row);
    for (int k = static_cast<int>(threadIdx.x); k < count; k += step())
      visit(first_ + k, slots_.student[k], slots_.teacher[k]);
  }

  // The last pass over a row, which makes room for the next one and asks for it.
  template <class Visit>
  PYFAST_DEVICE void last(const RowInMemory<T>& row, const RowInMemory<T>& next, const Visit& visit) const {
    const int count = held(row), count_next = held(next);
    const int more = count > count_next ? count : count_next;
    for (int batch = 0; batch < kBatches; ++batch) {
      for (int k = batch_begin(batch); k < batch_end(batch, more); k += step()) {
        if (k < count) visit(first_ + k, slots_.student[k], slots_.teacher[k]);
        if (k < count_next) slots_.fetch(k, next, first_ + k);
      }
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
    return left < 0 ? 0 : left < share_ ? left : share_;
  }

  Slots slots_;
  int share_, first_;
  int batch_;  // slots of all threads in a batch
};

template <class T>
class Streamed {
 public:
  PYFAST_DEVICE explicit Streamed(unsigned char* shared) : slots_(shared, kStages * static_cast<int>(blockDim.x)) {}

  PYFAST_DEVICE void begin(const RowInMemory<T>&) {}

  template <class Visit>
  PYFAST_DEVICE void first(const RowInMemory<T>& row, const Visit& visit) {
    backwards_ = true;
    again(row, visit);
  }

  template <class Visit>
  PYFAST_DEVICE void again(const RowInMemory<T>& row, const Visit& visit) {
    backwards_ = !backwards_;
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int own = (row.vectors - thread + threads - 1) / threads;
    for (int k = 0; k < kStages - 1; ++k) fetch(row, k, own);
    for (int k = 0; k < own; ++k) {
      ptx::cp_async_wait<kStages - 2>();
      const int slot = k % kStages * threads + thread;
      const Words4 student = slots_.student[slot], teacher = slots_.teacher[slot];
      fetch(row, k + kStages - 1, own);
      visit(vector(k, own), student, teacher);
    }
  }

  template <class Visit>
  PYFAST_DEVICE void last(const RowInMemory<T>& row, const RowInMemory<T>&, const Visit& visit) {
    again(row, visit);
  }

 private:
  PYFAST_DEVICE int vector(int k, int own) const {
    return (backwards_ ? own - 1 - k : k) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  PYFAST_DEVICE void fetch(const RowInMemory<T>& row, int k, int own) const {
    const int slot = k % kStages * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (k < own) slots_.fetch(slot, row, vector(k, own));
    ptx::cp_async_commit();
  }

  Slots slots_;
  bool backwards_ = false;
};

#endif

}  // namespace pyfast::cuda
