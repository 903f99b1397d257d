// topk_distill of words of 32 and of 16 bits, and its layout.
#include "topk_distill.h"

TOPK_DISTILL(topk_distill_f32, float)
TOPK_DISTILL(topk_distill_bf16, pyfast::cuda::BFloat16)

// out: blocks that hold a row (0: the kernel does not take it), vectors a block, threads, bytes of shared memory.
SIMT_EXPORT plan(int64_t words, int64_t word_bytes, int64_t named, int64_t shared_a_block,
                 int64_t shared_a_multiprocessor, int64_t clusters, int64_t* out) {
  const ResidentPlan plan =
      plan_topk_distill(words, word_bytes, named, {shared_a_block, shared_a_multiprocessor, clusters != 0});
  out[0] = plan.cluster;
  out[1] = plan.share;
  out[2] = plan.threads;
  out[3] = plan.shared_bytes;
}
