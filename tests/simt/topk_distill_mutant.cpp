// topk_distill of one element type: what mutants need, in a fraction of the time to compile.
#include "topk_distill.h"

TOPK_DISTILL(topk_distill_bf16, pyfast::cuda::BFloat16)
