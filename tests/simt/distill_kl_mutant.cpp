// distill_kl of one element type: what mutants need, in a fraction of the time to compile.
#include "distill_kl.h"

DISTILL_KL(distill_kl_bf16, pyfast::cuda::BFloat16)
