// Large memory that is had and dropped at every step, such as the gradient of logits: it is kept and handed out again.
// Fresh memory of this size comes from the system as untouched pages, and faulting in and zeroing them took as long as
// the whole fused loss (docs/kernels.md).
//
//     in use  ██████████ ▒▒▒▒▒        kept  ░░░░░ ░░░          in use + kept never exceed the most
//             └─────────── most ever in use at once ────────┘  that was in use at once
//
// So a step finds all its blocks again, and keeping them raises no peak. Blocks kept longest go first;
// release_memory() gives all of them back.
#pragma once

#include "torch_glue.h"

namespace pyfast {

// An uninitialised contiguous matrix of like's dtype. Small ones come from torch's allocator.
Tensor reusable_empty(const Tensor& like, int64_t rows, int64_t columns);

// Bytes that are kept.
int64_t kept_memory();

// Frees what is kept and returns its bytes.
int64_t release_memory();

}  // namespace pyfast
