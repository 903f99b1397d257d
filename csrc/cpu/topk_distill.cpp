// topk_distill on the CPU: checks, threads, registration. The contract is in topk_distill.h.
#include "topk_distill.h"

#include <memory>
#include <string>

#include "reuse.h"

namespace pyfast {
namespace {

// Gradients larger than this leave the cache before anybody reads them: stream them.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

TopkTail tail_of(const std::string& name) {
  for (int i = 0; i < kTopkTailCount; ++i)
    if (name == kTopkTailNames[i]) return static_cast<TopkTail>(i);
  STD_TORCH_CHECK(false, "tail: got '", name, "', accepted: bucket, ignore, renormalise, sampled");
  return TopkTail::bucket;
}

std::tuple<Tensor, Tensor> topk_distill(const Tensor& student, const Tensor& ids, const Tensor& entries,
                                        const Tensor& row_scale, std::string tail, double temperature, bool with_grad) {
  STD_TORCH_CHECK(student.dim() == 2, "student: must have shape [rows, vocabulary]");
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == student.size(0) && ids.scalar_type() == ScalarType::Long,
                  "ids: must be int64 of shape [rows, k]");
  STD_TORCH_CHECK(entries.dim() == 2 && entries.size(0) == ids.size(0) && entries.size(1) == ids.size(1) &&
                      entries.scalar_type() == ScalarType::Double,
                  "entries: must be float64 of the shape of ids");
  STD_TORCH_CHECK(
      row_scale.dim() == 1 && row_scale.size(0) == student.size(0) && row_scale.scalar_type() == ScalarType::Float,
      "row_scale: must be float32 with one value a row");
  STD_TORCH_CHECK(temperature > 0, "temperature: must be above 0");
  const Dtype dtype = dtype_of(student, "student");
  const int64_t rows = student.size(0), vocab = student.size(1), k = ids.size(1);
  Tensor value = torch::stable::new_empty(student, {rows}, ScalarType::Float);
  Tensor grad = reusable_empty(student, with_grad ? rows : 0, with_grad ? vocab : 0);
  if (rows == 0 || vocab == 0) {
    torch::stable::zero_(value);
    return {value, grad};
  }
  const Tensor s = rows_contiguous(student), words = rows_contiguous(ids), teacher = rows_contiguous(entries);
  const Tensor scale = torch::stable::contiguous(row_scale);
  TopkDistillArgs args{};
  args.tail = tail_of(tail);
  args.student = s.const_data_ptr();
  args.ids = words.const_data_ptr<int64_t>();
  args.entries = teacher.const_data_ptr<double>();
  args.row_scale = scale.const_data_ptr<float>();
  args.rows = value.mutable_data_ptr<float>();
  args.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  args.student_stride = s.stride(0);
  args.ids_stride = words.stride(0);
  args.entries_stride = teacher.stride(0);
  args.grad_stride = vocab;
  args.vocab = vocab;
  args.k = k;
  args.temperature = temperature;
  args.stream_grad = with_grad && rows * vocab * static_cast<int64_t>(student.element_size()) > kStreamBytes;
  const TopkDistillKernel kernel = topk_distill_table(active_isa()).rows[static_cast<int>(dtype)];
  const bool whole_rows = with_grad || args.tail != TopkTail::renormalise;
  const int64_t work = (whole_rows ? vocab : 0) + 64 * k;  // an entry costs about as much as 64 words
  parallel_chunks(rows, 1 + 16384 / (work + 1), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<TopkEntry[]> scratch(new TopkEntry[static_cast<size_t>(2 * k)]);
    kernel(args, begin, end, scratch.get());
  });
  return {value, grad};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("topk_distill", TORCH_BOX(&pyfast::topk_distill)); }
