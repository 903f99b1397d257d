// Large outputs that are made and dropped at every step, such as the gradient of logits: their memory is kept and
// handed out again. A fresh allocation of this size comes from the kernel as untouched pages, and faulting in and
// zeroing them took as long as the whole fused loss (docs/kernels.md).
//
// At most one block is kept, the one freed last; release_memory() gives it back.
#pragma once

#include "torch_glue.h"

namespace pyfast {

// An uninitialised contiguous matrix of like's dtype. Small ones come from torch's allocator.
Tensor reusable_empty(const Tensor& like, int64_t rows, int64_t columns);

// Frees the kept block and returns its bytes.
int64_t release_memory();

}  // namespace pyfast
