// Where topk_distill keeps the words of a row between the passes over it: as Resident of distill_kl_store.cuh, one row
// in place of a pair. The difference is that threads also reach into slots of others, for the words that the teacher
// names, so that the row is waited for as a whole:
//
//       block 0                        block 1
//       [░░░░x░░░░░░░░░░░░x░]          [░░░░░░░░x░░░░░]   …     x: named; -inf stands there while the others are summed
//        0 1 2 … T-1 0 1 2 …            0 1 2 …                 thread that copies, sums and writes the slot
//
// A word lies in exactly one block, which lists it, takes it out and writes its gradient.
#pragma once

#include "common.cuh"
#include "distill_kl_store.cuh"

namespace pyfast::cuda {

#if defined(PYFAST_KERNELS)

// A row in memory; no vectors: nothing of it is to be read.
template <class T>
struct LogitsRow {
  const T* words;
  int vectors;
  int lead;  // words of the first vector before the row

  PYFAST_DEVICE int first_word(int vector) const { return vector * kVectorWords<T> - lead; }
};

template <class T>
PYFAST_DEVICE int vectors_of(int lead, int words) {
  return (lead + words + kVectorWords<T> - 1) / kVectorWords<T>;
}

template <class T>
class ResidentRow {
 public:
  // share: vectors that a block holds; block `rank` has those from rank · share on.
  PYFAST_DEVICE ResidentRow(unsigned char* shared, int words, int share, int rank)
      : slots_(reinterpret_cast<Words4*>(shared)), words_(words), share_(share), first_(rank * share) {}

  // Where a word lies among those of this block, as long as that is a number below places().
  PYFAST_DEVICE uint32_t place(int word, int lead) const {
    return static_cast<uint32_t>(word + lead - first_ * kVectorWords<T>);
  }
  PYFAST_DEVICE uint32_t places() const { return static_cast<uint32_t>(share_ * kVectorWords<T>); }
  PYFAST_DEVICE Bits<T>& at(uint32_t place) const { return reinterpret_cast<Bits<T>*>(slots_)[place]; }

  // Asks for the row, into slots that are free.
  PYFAST_DEVICE void begin(const LogitsRow<T>& row) const {
    const int count = held(row.vectors);
    PYFAST_UNROLL_NOT
    for (int k = static_cast<int>(threadIdx.x); k < count; k += step())
      fetch(slots_ + k, row, row.first_word(first_ + k));
    ptx::cp_async_commit();
  }

  // Until the row is there, for every thread of the block.
  PYFAST_DEVICE void arrived() const {
    ptx::cp_async_wait<0>();
    ptx::syncthreads();
  }

  // The first vector of this thread, if it has one.
  template <class Visit>
  PYFAST_DEVICE void foremost(const LogitsRow<T>& row, const Visit& visit) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < held(row.vectors)) visit_at<1>(slots_ + thread, visit);
  }

  // A pass over the row: visit(vectors) with an array of kMost vectors, or of one.
  template <int kMost, class Visit>
  PYFAST_DEVICE void each(const LogitsRow<T>& row, const Visit& visit) const {
    const Words4* const past = slots_ + held(row.vectors);
    const Words4* slot = slots_ + threadIdx.x;
    PYFAST_UNROLL_NOT
    for (; slot + (kMost - 1) * step() < past; slot += kMost * step()) visit_at<kMost>(slot, visit);
    if constexpr (kMost > 1) {
      PYFAST_UNROLL_NOT
      for (; slot < past; slot += step()) visit_at<1>(slot, visit);
    }
  }

  // The last pass over a row, which makes room for the next one and asks for it: visit(vector) gives a vector of the
  // gradient, which goes to `grad`. Vectors that lie in both rows and can be written as a whole take a loop without
  // questions, two a turn; what is left at the ends, or where the gradient lies otherwise than the row, takes one that
  // asks for each.
  template <class Visit>
  PYFAST_DEVICE void last(const LogitsRow<T>& row, const LogitsRow<T>& next, T* grad, const Visit& visit) const {
    const int count = held(row.vectors), shift = row.lead - next.lead;
    const uint32_t inside = inside_span<T>(words_);
    const uint32_t span = words_past_multiple(grad) == row.lead ? inside : 0u;
    const uint32_t span_next = next.vectors == 0 ? 0u : inside;
    const int both = static_cast<int>(span < span_next ? span : span_next) - (shift > 0 ? shift : 0);
    const int alike = both <= 0 ? 0 : (both + row.lead + kVectorWords<T> - 1) / kVectorWords<T> - first_;
    const Words4* const end = slots_ + count;
    const Words4* const end_next = slots_ + held(next.vectors);
    const Words4* const end_alike = slots_ + (alike < count ? alike : count);
    const T* from = next.words + shift;
    ptx::keep(from);  // or ptxas adds the shift in every turn
    const int turn = step() * kVectorWords<T>;
    Words4* slot = slots_ + threadIdx.x;
    int word = row.first_word(first_ + static_cast<int>(threadIdx.x));
    PYFAST_UNROLL_NOT
    while (slot < end || slot < end_next) {
      if (word >= 0 && word + shift >= 0) {
        PYFAST_UNROLL_NOT
        for (; slot + step() < end_alike; slot += 2 * step(), word += 2 * turn) {
          Words4* const second = slot + step();
          const Words4 one = visit(*slot), two = visit(*second);
          ptx::st_streaming(reinterpret_cast<Words4*>(grad + word), one);
          ptx::st_streaming(reinterpret_cast<Words4*>(grad + (word + turn)), two);
          ptx::cp_async<16>(slot, from + word);
          ptx::cp_async<16>(second, from + (word + turn));
        }
      }
      if (slot < end) write_vector(grad, word, words_, span, visit(*slot), slot);
      if (slot < end_next) fetch(slot, next, word + shift);
      slot += step();
      word += turn;
    }
    ptx::cp_async_commit();
  }

  // visit(word) for the vectors of this block, in a row of which `lead` words of the first vector lie before it.
  template <class Visit>
  PYFAST_DEVICE void each_vector(int lead, const Visit& visit) const {
    const int count = held(vectors_of<T>(lead, words_));
    PYFAST_UNROLL_NOT
    for (int k = static_cast<int>(threadIdx.x); k < count; k += step()) visit((first_ + k) * kVectorWords<T> - lead);
  }

 private:
  PYFAST_DEVICE static int step() { return static_cast<int>(blockDim.x); }
  PYFAST_DEVICE int held(int vectors) const {
    const int left = vectors - first_;
    return left < 0 ? 0 : left < share_ ? left : share_;
  }
  template <int kVectors, class Visit>
  PYFAST_DEVICE void visit_at(const Words4* slot, const Visit& visit) const {
    Words4 vectors[kVectors];
    PYFAST_UNROLL
    for (int v = 0; v < kVectors; ++v) vectors[v] = slot[v * step()];
    visit(vectors);
  }

  // Begins to copy a vector into a slot of this thread. What is not in the row becomes -inf.
  PYFAST_DEVICE void fetch(Words4* slot, const LogitsRow<T>& row, int word) const {
    if (static_cast<uint32_t>(word) < inside_span<T>(words_))
      ptx::cp_async<16>(slot, row.words + word);
    else
      fetch_words(slot, row.words, word, words_);
  }

  Words4* slots_;
  int words_, share_, first_;
};

#endif

}  // namespace pyfast::cuda
