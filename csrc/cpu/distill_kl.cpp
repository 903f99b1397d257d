// distill_kl on the CPU: checks, threads, registration. The contract is in distill_kl.h.
#include "distill_kl.h"

#include <string>

#include "../divergence_names.h"
#include "reuse.h"

namespace pyfast {
namespace {

// Gradients larger than this leave the cache before anybody reads them: stream them.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

void check_rows(const Tensor& student, const Tensor& teacher, const Tensor& row_scale,
                const std::optional<Tensor>& labels, const std::optional<Tensor>& ce_scale) {
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2, "student, teacher: must have shape [rows, vocabulary]");
  STD_TORCH_CHECK(student.size(0) == teacher.size(0) && student.size(1) == teacher.size(1),
                  "student, teacher: shapes must agree");
  STD_TORCH_CHECK(student.scalar_type() == teacher.scalar_type(), "student, teacher: dtypes must agree");
  const int64_t rows = student.size(0);
  STD_TORCH_CHECK(row_scale.dim() == 1 && row_scale.size(0) == rows && row_scale.scalar_type() == ScalarType::Float,
                  "row_scale: must be float32 with one value a row");
  STD_TORCH_CHECK(labels.has_value() == ce_scale.has_value(), "labels, ce_scale: both or none");
  if (!labels) return;
  STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == rows && labels->scalar_type() == ScalarType::Long,
                  "labels: must be int64 with one value a row");
  STD_TORCH_CHECK(ce_scale->dim() == 1 && ce_scale->size(0) == rows && ce_scale->scalar_type() == ScalarType::Float,
                  "ce_scale: must be float32 with one value a row");
}

// Floats of scratch a thread; what for is said at DistillKlKernel. A KL of float32 without extras needs none.
int64_t scratch_floats(const DistillKlArgs& args, Divergence divergence, Dtype dtype) {
  const bool capped = args.student_softcap > 0 || args.teacher_softcap > 0;
  const bool kl = divergence == Divergence::forward_kl || divergence == Divergence::reverse_kl;
  const bool direct = kl && !capped && args.labels == nullptr && dtype == Dtype::f32;
  const int64_t row = (args.vocab + kScratchPad - 1) / kScratchPad * kScratchPad;
  const int64_t floats = (capped ? 2 * row : 0) + (args.grad == nullptr || direct ? 0 : row_scratch(args.vocab));
  return (floats + kScratchPad - 1) / kScratchPad * kScratchPad;
}

std::tuple<Tensor, Tensor, Tensor> distill_kl(const Tensor& student, const Tensor& teacher, const Tensor& row_scale,
                                              std::string divergence, double mix, double student_temperature,
                                              double teacher_temperature, double student_softcap,
                                              double teacher_softcap, std::optional<Tensor> labels,
                                              std::optional<Tensor> ce_scale, bool with_grad) {
  check_rows(student, teacher, row_scale, labels, ce_scale);
  const std::optional<Divergence> known = find_divergence(divergence);
  STD_TORCH_CHECK(known.has_value(), "divergence: got '", divergence, "', accepted: ", divergence_names());
  const Divergence kind = *known;
  const Dtype dtype = dtype_of(student, "student");
  const int64_t rows = student.size(0), vocab = student.size(1);
  Tensor value = torch::stable::new_empty(student, {rows}, ScalarType::Float);
  Tensor ce_value = torch::stable::new_empty(student, {labels ? rows : 0}, ScalarType::Float);
  Tensor grad = reusable_empty(student, with_grad ? rows : 0, with_grad ? vocab : 0);
  if (rows == 0 || vocab == 0) {
    torch::stable::zero_(value);
    torch::stable::zero_(ce_value);
    return {value, ce_value, grad};
  }
  const Tensor s = rows_contiguous(student), t = rows_contiguous(teacher);
  const Tensor scale = torch::stable::contiguous(row_scale);
  if (labels) labels = torch::stable::contiguous(*labels);
  if (ce_scale) ce_scale = torch::stable::contiguous(*ce_scale);
  DistillKlArgs args{};
  args.student = s.const_data_ptr();
  args.teacher = t.const_data_ptr();
  args.row_scale = scale.const_data_ptr<float>();
  args.labels = labels ? labels->const_data_ptr<int64_t>() : nullptr;
  args.ce_scale = ce_scale ? ce_scale->const_data_ptr<float>() : nullptr;
  args.rows = value.mutable_data_ptr<float>();
  args.ce_rows = ce_value.mutable_data_ptr<float>();
  args.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  args.student_stride = s.stride(0);
  args.teacher_stride = t.stride(0);
  args.grad_stride = vocab;
  args.vocab = vocab;
  args.mix = mix;
  args.student_temperature = student_temperature;
  args.teacher_temperature = teacher_temperature;
  args.student_softcap = student_softcap;
  args.teacher_softcap = teacher_softcap;
  args.stream_grad = with_grad && rows * vocab * static_cast<int64_t>(student.element_size()) > kStreamBytes;
  const DistillKlKernel kernel = distill_kl_table(active_isa()).rows[static_cast<int>(kind)][static_cast<int>(dtype)];
  const int64_t floats = scratch_floats(args, kind, dtype);
  Tensor scratch = torch::stable::new_empty(student, {max_workers() * floats}, ScalarType::Float);
  float* base = scratch.mutable_data_ptr<float>();
  parallel_workers(rows, 1 + 16384 / vocab, [&](int64_t begin, int64_t end, int64_t worker) {
    kernel(args, base + worker * floats, begin, end);
  });
  return {value, ce_value, grad};
}

void check_scale(const Tensor& grad, const Tensor& scale) {
  STD_TORCH_CHECK(grad.dim() == 2 && scale.dim() == 1 && scale.size(0) == grad.size(0),
                  "grad, scale: must have shapes [rows, vocabulary] and [rows]");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, "scale: must be float32");
}

void scale_into(const Tensor& grad, const Tensor& scale, Tensor& out) {
  const int64_t rows = grad.size(0), vocab = grad.size(1);
  if (rows == 0 || vocab == 0) return;
  ScaleRowsArgs args{};
  args.grad = grad.const_data_ptr();
  args.scale = scale.const_data_ptr<float>();
  args.out = out.mutable_data_ptr();
  args.grad_stride = grad.stride(0);
  args.scale_stride = scale.stride(0);
  args.out_stride = out.stride(0);
  args.vocab = vocab;
  const ScaleRowsKernel kernel = distill_kl_table(active_isa()).scale_rows[static_cast<int>(dtype_of(grad, "grad"))];
  parallel_chunks(rows, 1 + 65536 / vocab, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor scale_rows(const Tensor& grad, const Tensor& scale) {
  check_scale(grad, scale);
  Tensor out = reusable_empty(grad, grad.size(0), grad.size(1));
  scale_into(rows_contiguous(grad), scale, out);
  return out;
}

// Rows whose scale is 1 are left alone, so that a loss that nothing multiplies costs nothing here.
void scale_rows_(Tensor grad, const Tensor& scale) {
  check_scale(grad, scale);
  STD_TORCH_CHECK(grad.size(1) <= 1 || grad.stride(1) == 1, "grad: the words of a row must lie next to each other");
  const float* factor = scale.const_data_ptr<float>();
  const int64_t rows = scale.size(0), stride = scale.stride(0);
  int64_t i = 0;
  while (i < rows && factor[i * stride] == 1.0f) ++i;
  if (i < rows) scale_into(grad, scale, grad);
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("distill_kl", TORCH_BOX(&pyfast::distill_kl));
  m.impl("scale_rows", TORCH_BOX(&pyfast::scale_rows));
  m.impl("scale_rows_", TORCH_BOX(&pyfast::scale_rows_));
}
