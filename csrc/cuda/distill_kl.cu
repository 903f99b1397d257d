// distill_kl on the GPU: checks, layout, stream, launch, registration. What is computed is said in distill_kl.cuh.
#include "distill_kl.cuh"

#include <optional>
#include <string>
#include <tuple>

#include "../divergence_names.h"
#include "rows_launch.h"

namespace pyfast::cuda {
namespace {

template <class T>
void launch(DistillKlArgs<T> args, int device, cudaStream_t stream) {
  const DistillKlPlan plan = plan_distill_kl(args.words, sizeof(T), args.is_general(), limits_of(device, "distill_kl"));
  const bool resident = plan.cluster > 0;
  auto* const kernel = args.is_general()
                           ? (resident ? distill_kl_resident_kernel<T, true> : distill_kl_streamed_kernel<T, true>)
                           : (resident ? distill_kl_resident_kernel<T, false> : distill_kl_streamed_kernel<T, false>);
  args.share = plan.share;
  args.batch = plan.batch();
  launch_groups("distill_kl", kernel, args, {resident ? plan.cluster : 1, plan.threads, plan.shared_bytes}, device,
                stream);
}

void check_inputs(const Tensor& student, const Tensor& teacher, const Tensor& row_scale,
                  const std::optional<Tensor>& labels, const std::optional<Tensor>& ce_scale) {
  check_logits(student, "student");
  check_logits(teacher, "teacher");
  STD_TORCH_CHECK(student.size(0) == teacher.size(0) && student.size(1) == teacher.size(1) &&
                      student.get_device_index() == teacher.get_device_index(),
                  "student, teacher: shapes and devices must agree");
  STD_TORCH_CHECK(student.scalar_type() == teacher.scalar_type(), "student, teacher: dtypes must agree");
  check_per_row(row_scale, "row_scale", ScalarType::Float, student);
  STD_TORCH_CHECK(labels.has_value() == ce_scale.has_value(), "labels, ce_scale: both or none");
  if (!labels) return;
  check_per_row(*labels, "labels", ScalarType::Long, student);
  check_per_row(*ce_scale, "ce_scale", ScalarType::Float, student);
}

void check_options(Divergence divergence, double mix, double student_temperature, double teacher_temperature,
                   double student_softcap, double teacher_softcap) {
  const bool mixes =
      divergence == Divergence::jsd || divergence == Divergence::skew_kl || divergence == Divergence::skew_reverse_kl;
  STD_TORCH_CHECK(!mixes || (mix > 0 && mix < 1), "mix: got ", mix, ", accepted: above 0 and below 1");
  STD_TORCH_CHECK(student_temperature > 0 && teacher_temperature > 0, "temperatures: accepted: above 0");
  STD_TORCH_CHECK(student_softcap >= 0 && teacher_softcap >= 0, "softcaps: accepted: above 0, or 0 for none");
}

std::tuple<Tensor, Tensor, Tensor> distill_kl(const Tensor& student, const Tensor& teacher, const Tensor& row_scale,
                                              std::string divergence, double mix, double student_temperature,
                                              double teacher_temperature, double student_softcap,
                                              double teacher_softcap, std::optional<Tensor> labels,
                                              std::optional<Tensor> ce_scale, bool with_grad) {
  check_inputs(student, teacher, row_scale, labels, ce_scale);
  const std::optional<Divergence> kind = find_divergence(divergence);
  STD_TORCH_CHECK(kind.has_value(), "divergence: got '", divergence, "', accepted: ", divergence_names());
  check_options(*kind, mix, student_temperature, teacher_temperature, student_softcap, teacher_softcap);
  const int device = student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t count = student.size(0), words = student.size(1);
  Tensor rows = torch::stable::new_empty(student, {count}, ScalarType::Float);
  Tensor ce_rows = torch::stable::new_empty(student, {labels ? count : 0}, ScalarType::Float);
  Tensor grad = torch::stable::new_empty(student, {with_grad ? count : 0, with_grad ? words : 0});
  if (count == 0) return {rows, ce_rows, grad};
  const Tensor s = words_together(student), t = words_together(teacher);
  const Tensor scale = torch::stable::contiguous(row_scale);
  if (labels) labels = torch::stable::contiguous(*labels);
  if (ce_scale) ce_scale = torch::stable::contiguous(*ce_scale);
  with_element(student, [&](auto element) {
    using T = decltype(element);
    DistillKlArgs<T> args{};
    args.student = static_cast<const T*>(s.const_data_ptr());
    args.teacher = static_cast<const T*>(t.const_data_ptr());
    args.row_scale = scale.const_data_ptr<float>();
    args.labels = labels ? labels->const_data_ptr<int64_t>() : nullptr;
    args.ce_scale = ce_scale ? ce_scale->const_data_ptr<float>() : nullptr;
    args.rows = rows.mutable_data_ptr<float>();
    args.ce_rows = labels ? ce_rows.mutable_data_ptr<float>() : nullptr;
    args.grad = with_grad ? static_cast<T*>(grad.mutable_data_ptr()) : nullptr;
    args.student_stride = s.stride(0);
    args.teacher_stride = t.stride(0);
    args.grad_stride = words;
    args.count = count;
    args.words = static_cast<int>(words);
    args.options =
        distill_kl_options(*kind, mix, student_temperature, teacher_temperature, student_softcap, teacher_softcap);
    launch(args, device, current_stream(student));
  });
  return {rows, ce_rows, grad};
}

}  // namespace
}  // namespace pyfast::cuda

STABLE_TORCH_LIBRARY_IMPL(pyfast, CUDA, m) { m.impl("distill_kl", TORCH_BOX(&pyfast::cuda::distill_kl)); }
