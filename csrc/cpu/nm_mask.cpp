// nm_mask on the CPU: checks, threads, registration. The contract is in nm_mask.h.
#include "nm_mask.h"

#include "torch_glue.h"

namespace pyfast {
namespace {

Tensor nm_mask(const Tensor& scores, int64_t n, int64_t m) {
  STD_TORCH_CHECK(scores.dim() == 2, "scores: must have shape [rows, k]");
  STD_TORCH_CHECK(1 <= n && n <= m && m <= kNmMaskMaxGroup, "n, m: got ", n, ":", m, ", accepted: 1 <= n <= m <= 32");
  const Dtype dtype = dtype_of(scores, "scores");
  const int64_t rows = scores.size(0), k = scores.size(1);
  Tensor mask = torch::stable::new_empty(scores, {rows, k}, ScalarType::Bool);
  if (rows == 0 || k == 0) return mask;
  const Tensor s = rows_contiguous(scores);
  NmMaskArgs args{};
  args.scores = s.const_data_ptr();
  args.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  args.k = k;
  args.score_stride = s.stride(0);
  args.n = n;
  args.m = m;
  const NmMaskKernel kernel = nm_mask_table(active_isa()).rows[static_cast<int>(dtype)];
  parallel_chunks(rows, 1 + 65536 / (k + 1), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return mask;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("nm_mask", TORCH_BOX(&pyfast::nm_mask)); }
