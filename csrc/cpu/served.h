// A product that was checked and looked up once, for another x of the same shape and dtype.
//
//     op called ──► checks ──► Served ──► y          while a thread records, what served its last call is kept,
//                                │                   and Python takes it (_C.record, _C.recorded)
//     asked again, by pointers ──┴──────► y
//
// Between two layers of a model the weights sweep the caches: what a call looks at, in Python, in the dispatcher and
// here, comes from memory. A Served looks at x, at what it multiplies by, and at nothing else.
#pragma once

#include <memory>

#include "torch_glue.h"

namespace pyfast {

class Served {
 public:
  virtual ~Served() = default;

  // Whether what it reads lies where it lay, and this thread has as many threads as it had.
  bool current() const;

  // y of x, and of mul where the first call had one: contiguous, of the first call's shapes and dtype.
  virtual void run(const void* x, const void* mul, void* y) const = 0;

 protected:
  // Reads this tensor's memory from now on, and keeps the tensor.
  const void* keep(const Tensor& t);

 private:
  struct Kept {
    Tensor tensor;
    const void* memory;
    int64_t numel;
  };
  std::vector<Kept> kept_;
  int64_t threads_ = max_workers();
};

// Of this thread: whether it records, from now on; what served its last call since, or nothing.
bool recording();
void record(bool on);
void set_recorded(std::unique_ptr<const Served> served);
std::unique_ptr<const Served> take_recorded();

}  // namespace pyfast
