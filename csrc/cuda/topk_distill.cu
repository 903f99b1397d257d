// topk_distill on the GPU: checks, layout, stream, launch, registration. What is computed is said in topk_distill.cuh.
#include "topk_distill.cuh"

#include <string>
#include <tuple>

#include "rows_launch.h"

namespace pyfast::cuda {
namespace {

TopkTail tail_of(const std::string& name) {
  for (int i = 0; i < kTopkTailCount; ++i)
    if (name == kTopkTailNames[i]) return static_cast<TopkTail>(i);
  STD_TORCH_CHECK(false, "tail: got '", name, "', accepted: bucket, ignore, renormalise, sampled");
  return TopkTail::bucket;
}

void check_entries(const Tensor& tensor, const char* name, ScalarType dtype, const Tensor& student, int64_t named) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == student.get_device_index(), name,
                  ": must be on the device of the logits");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == student.size(0) && tensor.size(1) == named &&
                      tensor.scalar_type() == dtype,
                  name, ": must be ", dtype == ScalarType::Long ? "int64" : "float64", " of shape [rows, k], as ids");
}

ResidentPlan plan_of(const Tensor& student, int64_t named) {
  return plan_topk_distill(student.size(1), is_wide(student, "student") ? 4 : 2, named,
                           limits_of(student.get_device_index(), "topk_distill"));
}

// Whether the kernel takes rows like these with so many entries, on their device.
bool topk_distill_fits(const Tensor& student, int64_t named) {
  check_logits(student, "student");
  return plan_of(student, named).cluster > 0;
}

std::tuple<Tensor, Tensor> topk_distill(const Tensor& student, const Tensor& ids, const Tensor& entries,
                                        const Tensor& row_scale, std::string tail, double temperature, bool with_grad) {
  check_logits(student, "student");
  STD_TORCH_CHECK(ids.dim() == 2, "ids: must be int64 of shape [rows, k]");
  const int64_t count = student.size(0), words = student.size(1), named = ids.size(1);
  check_entries(ids, "ids", ScalarType::Long, student, named);
  check_entries(entries, "entries", ScalarType::Double, student, named);
  check_per_row(row_scale, "row_scale", ScalarType::Float, student);
  STD_TORCH_CHECK(temperature > 0, "temperature: got ", temperature, ", accepted: above 0");
  const TopkTail kind = tail_of(tail);
  const int device = student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor rows = torch::stable::new_empty(student, {count}, ScalarType::Float);
  Tensor grad = torch::stable::new_empty(student, {with_grad ? count : 0, with_grad ? words : 0});
  if (count == 0) return {rows, grad};
  const ResidentPlan plan = plan_of(student, named);
  STD_TORCH_CHECK(plan.cluster > 0, "topk_distill_cuda: got ", words, " words and ", named,
                  " entries a row, more than a cluster of blocks of this GPU holds");
  const Tensor s = words_together(student), listed = words_together(ids), given = words_together(entries);
  const Tensor scale = torch::stable::contiguous(row_scale);
  with_element(student, [&](auto element) {
    using T = decltype(element);
    TopkDistillArgs<T> args{};
    args.student = static_cast<const T*>(s.const_data_ptr());
    args.ids = listed.const_data_ptr<int64_t>();
    args.entries = given.const_data_ptr<double>();
    args.row_scale = scale.const_data_ptr<float>();
    args.rows = rows.mutable_data_ptr<float>();
    args.grad = with_grad ? static_cast<T*>(grad.mutable_data_ptr()) : nullptr;
    args.student_stride = s.stride(0);
    args.ids_stride = listed.stride(0);
    args.entries_stride = given.stride(0);
    args.grad_stride = words;
    args.count = count;
    args.words = static_cast<int>(words);
    args.named = static_cast<int>(named);
    args.places = static_cast<int>(places_for(named));
    args.tail = kind;
    args.inverse = 1.0 / temperature;
    args.rate = static_cast<float>(args.inverse * kLog2eDouble);
    args.share = plan.share;
    launch_groups("topk_distill", topk_distill_kernel<T>, args, {plan.cluster, plan.threads, plan.shared_bytes}, device,
                  current_stream(student));
  });
  return {rows, grad};
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) {
  m.impl("topk_distill_cuda", TORCH_BOX(&pyfast::cuda::topk_distill));
  m.impl("topk_distill_fits", TORCH_BOX(&pyfast::cuda::topk_distill_fits));
}
