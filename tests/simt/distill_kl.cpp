// distill_kl of words of 32 and of 16 bits, its layout, and its series.
#include "distill_kl.h"

DISTILL_KL(distill_kl_f32, float)
DISTILL_KL(distill_kl_bf16, pyfast::cuda::BFloat16)

// out: blocks that hold a row, vectors a block, threads, bytes of shared memory.
SIMT_EXPORT plan(int64_t words, int64_t word_bytes, int64_t is_general, int64_t shared_a_block,
                 int64_t shared_a_multiprocessor, int64_t clusters, int64_t* out) {
  const DistillKlPlan plan =
      plan_distill_kl(words, word_bytes, is_general != 0, {shared_a_block, shared_a_multiprocessor, clusters != 0});
  out[0] = plan.cluster;
  out[1] = plan.share;
  out[2] = plan.threads;
  out[3] = plan.shared_bytes;
}

// value, slope: kSeriesTerms coefficients each, in natural units. reach: the largest |x|.
SIMT_EXPORT series(int64_t divergence, float teacher, double* value, double* slope, float* reach) {
  const MixtureSeries found =
      mixture_series(static_cast<Divergence>(divergence), teacher, 1.0 - static_cast<double>(teacher), 1.0, 1.0);
  for (int i = 0; i < kSeriesTerms; ++i) {
    value[i] = found.value[i];
    slope[i] = found.slope[i];
  }
  *reach = kSeriesReach;
}
